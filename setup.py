"""Build fastdiff._C: one extension, its CPU kernels compiled once per instruction set.

``csrc/*.cpp`` and ``csrc/cpu/<op>.cpp`` are host code (torch headers, baseline flags);
``csrc/cpu/<op>_kernel.cpp`` hold the loops (no torch header) and are compiled once for each level
of ``LEVELS`` (for those of VNNI alone, where there are products of int8) into its own namespace, so
that the linker can never merge code of two levels.
``csrc/cuda/*.cu`` become fastdiff/_cuda.so where there is nvcc: a library of its own without torch,
which the extension loads at run time, so that it needs no CUDA build of torch. Without nvcc their
host halves become fastdiff/_cuda_driver.so, and NVRTC compiles the kernels when they are used.

Environment: ``FASTDIFF_CUDA`` 0|1 (default: 1 where nvcc and CUDA sources exist),
``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``, ``FASTDIFF_SANITIZE`` ("address,undefined"),
``FASTDIFF_NO_EXT`` 1 (pure Python install on the reference rows), ``FASTDIFF_EMULATE`` 1 (the
levels of AVX-512 in AVX2 by csrc/emulate, which needs SIMDe's headers: slow, for tests alone).
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent.resolve()
os.chdir(HERE)

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {
    "avx2": AVX2,
    "avx2_vnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}
# The kernels with products of int8: others are the same with VNNI and without.
INT8 = ("grouped_quant_linear", "quant_attention", "quant_linear")
EMULATE = os.environ.get("FASTDIFF_EMULATE") == "1"
if EMULATE:
    # SIMDe's signed sums wrap, as the instructions' do.
    shim = [*AVX2, f"-I{HERE / 'csrc/emulate'}", "-Wno-psabi", "-fwrapv"]
    LEVELS = {
        level: AVX2 if level == "avx2" else [*shim, f"-DFASTDIFF_EMULATE_{level.upper()}"]
        for level in LEVELS
    }


def say(*words):
    print("fastdiff:", *words, file=sys.stderr, flush=True)


def build_flags():
    flags = ["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-g0"]
    links = ["-fopenmp"]
    if EMULATE:
        flags.append("-DFASTDIFF_EMULATE")
    sanitize = os.environ.get("FASTDIFF_SANITIZE")
    if sanitize:
        extra = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
        flags += [*extra, "-O1", "-g1"]  # the last -O counts: -O3 with checks takes minutes a file
        links += extra
    return flags, links


def no_extension_reason():
    if os.environ.get("FASTDIFF_NO_EXT") == "1":
        return "FASTDIFF_NO_EXT=1"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"no native kernels for {platform.machine()} yet"
    if not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")):
        return "no C++ compiler (g++) on PATH"
    try:
        import torch  # noqa: F401
    except ImportError:
        return (
            "torch is not importable in the build environment; install torch first and "
            "pass --no-build-isolation"
        )
    return None


def cuda_request():
    """(nvcc or None, sentence): what FASTDIFF_CUDA and the machine ask for."""
    want, nvcc = os.environ.get("FASTDIFF_CUDA"), shutil.which("nvcc")
    if want not in (None, "0", "1"):
        raise SystemExit(f"fastdiff: FASTDIFF_CUDA={want!r}: must be 0 or 1")
    sources = sorted(HERE.glob("csrc/cuda/*.cu"))
    if want == "0":
        return None, "CUDA off (FASTDIFF_CUDA=0)"
    if want == "1" and not nvcc:
        raise SystemExit("fastdiff: FASTDIFF_CUDA=1 but nvcc is not on PATH")
    if not nvcc:
        return None, "CUDA kernels by NVRTC when they are used (no nvcc on PATH)"
    if not sources:
        return None, "CUDA off (this version has no CUDA sources; GPU rows are Triton)"
    return nvcc, f"CUDA on ({nvcc}, {cuda_archs()})"


def cuda_archs():
    """As torch writes them: "8.0;9.0a+PTX", where +PTX adds code for later GPUs to compile: that of
    8.9 by default, which has float8."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;8.6;8.9+PTX;9.0a;10.0a;12.0a"


def build_cuda(nvcc):
    """csrc/cuda/*.cu into fastdiff/_cuda.so: its own CUDA runtime, no torch, nothing to link to."""
    from concurrent.futures import ThreadPoolExecutor

    codes = []
    for name in cuda_archs().replace(" ", ";").strip(";").split(";"):
        arch = name.removesuffix("+PTX").replace(".", "")
        codes.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if name.endswith("+PTX"):
            codes.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    out = HERE / "build" / "cuda"
    out.mkdir(parents=True, exist_ok=True)
    own = (HERE / "setup.py").stat().st_mtime
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=default", f"-I{HERE / 'csrc'}"]
    flags += [f"-I{HERE / 'csrc' / 'cuda'}", *codes]

    def one(source):
        obj = out / (source.stem + ".o")
        if not obj.exists() or obj.stat().st_mtime < max(own, newest(source)):
            subprocess.run([nvcc, *flags, "-c", str(source), "-o", str(obj)], check=True)
        return str(obj)

    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(one, sorted(HERE.glob("csrc/cuda/*.cu"))))
    library = str(HERE / "fastdiff" / "_cuda.so")
    subprocess.run([nvcc, "-shared", "-cudart=static", *objects, "-o", library], check=True)


FOLDERS = ("", "/cuda", "/emulate")


def newest(source):
    """When a source, or a header of ours that it includes, was last changed."""
    seen, todo = set(), [source]
    while todo:
        path = todo.pop()
        seen.add(path)
        for name in re.findall(r'#include ["<](.+)[">]', path.read_text()):
            near = (f / name for f in (path.parent, *(HERE / f"csrc{s}" for s in FOLDERS)))
            todo += [p for p in near if p.exists() and p not in seen][:1]
    return max(path.stat().st_mtime for path in seen)


def build_driver():
    """The host halves of csrc/cuda/*.cu, by the C++ compiler; NVRTC compiles the kernels later."""
    cxx = os.environ.get("CXX", "g++")
    command = [cxx, "-std=c++20", "-O1", "-fPIC", "-shared", "-DFASTDIFF_DRIVER", "-g0"]
    command += ["-Wno-unknown-pragmas", f"-I{HERE / 'csrc'}", f"-I{HERE / 'csrc' / 'cuda'}"]
    command += ["-x", "c++", *map(str, sorted(HERE.glob("csrc/cuda/*.cu"))), "-x", "none"]
    command += [str(HERE / "csrc/cuda/driver.cpp"), str(HERE / "csrc/simt/runtime.cpp"), "-ldl"]
    library = str(HERE / "fastdiff" / "_cuda_driver.so")
    subprocess.run([*command, "-o", library], check=True)


def extension():
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags, links = build_flags()

    class Build(BuildExtension):
        """Adds one compile of every ``*_kernel.cpp`` per instruction set, all through ninja."""

        def build_extensions(self):
            ext = self.extensions[0]
            # One wrapper per (kernel, level) names the level; ninja then builds all in parallel.
            for level, isa in LEVELS.items():
                ext.extra_objects += self.compile_level(ext, level, isa)
            super().build_extensions()
            for name in ("_cuda.so", "_cuda_driver.so"):  # one of the two, never a stale one
                (HERE / "fastdiff" / name).unlink(missing_ok=True)
            if nvcc:
                build_cuda(nvcc)
            elif os.environ.get("FASTDIFF_CUDA") != "0":
                build_driver()

        def compile_level(self, ext, level, isa):
            from concurrent.futures import ThreadPoolExecutor

            out = Path(self.build_temp).resolve() / (f"{level}_emulated" if EMULATE else level)
            out.mkdir(parents=True, exist_ok=True)
            cxx = os.environ.get("CXX", "g++")

            def one(source):
                obj = out / (source.stem + ".o")
                if obj.exists() and obj.stat().st_mtime > newest(source):
                    return str(obj)
                command = [cxx, *flags, *isa, "-fPIC", "-fvisibility=hidden"]
                command += [f"-DFASTDIFF_LEVEL={level}", f"-I{HERE / 'csrc'}"]
                self.spawn([*command, "-c", str(source), "-o", str(obj)])
                return str(obj)

            jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
            with ThreadPoolExecutor(jobs) as pool:
                names = INT8 if level.endswith("_vnni") else ("*",)
                sources = (p for n in names for p in HERE.glob(f"csrc/cpu/{n}_kernel.cpp"))
                return list(pool.map(one, sorted(sources)))

    host = ["csrc/ops.cpp", "csrc/gpu_library.cpp"]
    host += [
        str(p.relative_to(HERE))
        for p in sorted(HERE.glob("csrc/cpu/*.cpp"))
        if not p.stem.endswith("_kernel")
    ]
    ext = CppExtension(
        "fastdiff._C",
        host,
        include_dirs=[str(HERE / "csrc")],
        extra_compile_args=[*flags, "-fvisibility=hidden"],
        extra_link_args=links,
        depends=[str(p.relative_to(HERE)) for p in sorted(HERE.glob("csrc/**/*")) if p.is_file()],
    )
    return [ext], {"build_ext": Build}


reason = no_extension_reason()
exts, commands, cuda, nvcc = [], {}, "CUDA off", None
if reason is None:
    nvcc, cuda = cuda_request()
    exts, commands = extension()
    sanitize = os.environ.get("FASTDIFF_SANITIZE", "off")
    say(f"building _C for {', '.join(LEVELS)}; {cuda}; sanitizers {sanitize}")
else:
    say(f"building no extension: {reason}. Every op will run on its reference row.")
record = {
    "extension": reason or "built",
    "levels": list(LEVELS) if not reason else [],
    "cuda": cuda,
}
record |= {
    k: os.environ[k]
    for k in (
        "FASTDIFF_CUDA",
        "TORCH_CUDA_ARCH_LIST",
        "MAX_JOBS",
        "FASTDIFF_SANITIZE",
        "FASTDIFF_EMULATE",
    )
    if k in os.environ
}
if not reason:
    import torch

    record["torch"] = torch.__version__
(HERE / "fastdiff" / "_build_info.json").write_text(json.dumps(record, indent=1) + "\n")

packages = ["fastdiff", "fastdiff.kernels", "fastdiff.bench"]
packages += [f"fastdiff.csrc{folder}" for folder in ("", ".cpu", ".cuda", ".simt")]
packages += [
    "fastdiff." + str(p.parent.relative_to(HERE / "fastdiff")).replace("/", ".")
    for p in sorted((HERE / "fastdiff").rglob("__init__.py"))
    if p.parent not in (HERE / "fastdiff", HERE / "fastdiff" / "kernels")
]
# bench/ has no __init__.py: its files are scripts that fastdiff/cli.py finds by path.
setup(
    packages=packages,
    package_dir={
        "fastdiff": "fastdiff",
        "fastdiff.kernels": "kernels",
        "fastdiff.bench": "bench",
        "fastdiff.csrc": "csrc",
    },
    py_modules=["fastdiff_engine"],
    package_data={
        "fastdiff": ["py.typed", "_build_info.json", "_cuda*.so", "checkpoints/*"],
        "fastdiff.csrc.cpu": ["*.h"],  # what NVRTC compiles
        "fastdiff.csrc.cuda": ["*.cu", "*.h"],
        "fastdiff.csrc.simt": ["*"],
    },
    ext_modules=exts,
    cmdclass=commands,
)
