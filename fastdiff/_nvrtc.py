"""Compiles csrc/cuda/*.cu by NVRTC: CUDA's compiler as a library, for machines without nvcc.

It needs the wheel ``nvidia-cuda-nvrtc`` (or a CUDA toolkit) and CUDA's headers, and neither a
driver nor a device.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
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
