"""Compiles csrc/cuda/*.cu by NVRTC: CUDA's compiler as a library, for machines without nvcc.

It needs the wheel ``nvidia-cuda-nvrtc`` (or a CUDA toolkit) and CUDA's headers, and neither a
driver nor a device. CuPy compiles with the same library; it is not needed for this.

Where the package was built without nvcc, ``fastdiff/_cuda_driver.so`` launches the kernels through
the GPU's driver and asks :func:`serve` for the code of a kernel file when it is first needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# Inside an installed package, beside it in a source tree.
CSRC = next((p for p in (_HERE / "csrc", _HERE.parent / "csrc") if p.exists()), _HERE / "csrc")
_ARCHITECTURES = {90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}  # others have no "a"
# A header of each wheel that the kernels' headers come from.
_WHEELS = {"cuda_fp16.h": "nvidia-cuda-runtime", "cuda/std/cstdint": "nvidia-cuda-cccl"}
# NVRTC has no C++ library; what kernel files include of it is CUDA's own.
_HEADERS = {
    "cstdint": "#include <cuda/std/cstdint>\nusing namespace cuda::std;\n",
    "type_traits": "#include <cuda/std/type_traits>\n",
    "cstring": "",
}


def _roots() -> list[Path]:
    """Folders that may hold NVRTC and the headers: NVIDIA's wheels, then the toolkit of nvcc."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else spec.submodule_search_locations or []
    roots = [folder for place in places for folder in sorted(Path(place).glob("*"))]
    nvcc = shutil.which("nvcc")
    if nvcc:
        words = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        tops = [w.split("=", 1)[1] for w in words.splitlines() if w.startswith("#$ TOP=")]
        roots += [Path(top).resolve() for top in tops]
    return roots


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    found = [p for root in _roots() for p in sorted(root.glob("lib*/libnvrtc.so*"))]
    if not found:
        raise RuntimeError("NVRTC is not installed; need nvidia-cuda-nvrtc or a CUDA toolkit")
    for part in sorted(found[0].parent.glob("libnvrtc-builtins.so*")):
        ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)  # it looks for this by name
    return ctypes.CDLL(str(found[0]))


def _includes() -> list[str]:
    folders = [root / "include" for root in _roots()]
    folders += [folder / "cccl" for folder in folders]
    return [str(f) for f in (*folders, CSRC, CSRC / "cuda") if f.exists()]


def compile(source: Path, arch: str) -> bytes:
    """The cubin of a kernel file for ``arch``, such as "sm_90a".

    Raises:
        RuntimeError: NVRTC is missing, or with the compiler's words.
    """
    nvrtc, program, size = _library(), ctypes.c_void_p(), ctypes.c_size_t()
    strings = ctypes.c_char_p * len(_HEADERS)
    texts = strings(*[text.encode() for text in _HEADERS.values()])
    names = strings(*[name.encode() for name in _HEADERS])
    code = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        source.read_bytes(),
        source.name.encode(),
        len(_HEADERS),
        texts,
        names,
    )
    if code:
        raise RuntimeError(f"nvrtcCreateProgram: error {code}")
    try:
        words = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device"]
        options = [w.encode() for w in (*words, *(f"-I{folder}" for folder in _includes()))]
        code = nvrtc.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        if code:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{source.name} for {arch}:\n{log.value.decode()[:4000]}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def why_not() -> str | None:
    """None where kernels can be compiled, else what is missing."""
    try:
        _library()
    except (RuntimeError, OSError) as error:
        return str(error)
    folders = [Path(folder) for folder in _includes()]
    for header, wheel in _WHEELS.items():
        if not any((folder / header).exists() for folder in folders):
            return f"CUDA's header {header} is not installed; need {wheel} or a CUDA toolkit"
    if not (CSRC / "cuda").exists():
        return f"the kernels' sources are missing: {CSRC / 'cuda'}"
    return None


def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``FASTDIFF_CACHE``, else ``~/.cache/fastdiff``."""
    given = os.environ.get("FASTDIFF_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "fastdiff"


def cached(source: Path, arch: str) -> bytes:
    """:func:`compile`, kept on disk for these sources, this architecture and this NVRTC.

    A file that cannot be read, or was cut off, is compiled and written again; a folder that cannot
    be written to is done without.
    """
    key = hashlib.sha256(f"{source.name} {arch} {_version()}".encode())
    for path in sorted([*CSRC.glob("cuda/*"), *CSRC.glob("cpu/*.h")]):
        key.update(path.read_bytes())
    path = cache_folder() / f"{source.stem}-{arch}-{key.hexdigest()[:24]}.cubin"
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return data[32:]
    except OSError:
        pass
    cubin = compile(source, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(file.name, path)  # whole or not at all, for several processes
    except OSError:
        pass
    return cubin


_COMPILER = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)
)
_kept: list[object] = []  # what a library holds pointers to, as long as the process lives


@_COMPILER
def _compiler(stem: bytes, capability: int, words: ctypes._Pointer[ctypes.c_char_p]) -> int | None:
    """The address of a cubin; None, and the reason in ``words``, where there is none."""
    arch = _ARCHITECTURES.get(capability, f"sm_{capability}")
    try:
        _kept.append(cached(CSRC / "cuda" / f"{stem.decode()}.cu", arch))
    except Exception as error:  # nothing may be raised through C++
        _kept.append(" ".join(str(error).split()).encode())
        words[0] = _kept[-1]
        return None
    return ctypes.cast(ctypes.c_char_p(_kept[-1]), ctypes.c_void_p).value  # type: ignore[arg-type]


def serve(library: Path) -> None:
    """Let a library that launches through the driver get its kernels from here."""
    ctypes.CDLL(str(library)).fastdiff_driver_compiler(_compiler)
