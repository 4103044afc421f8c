"""Loading of the compiled extension, and the parts of ``why_not`` that all native rows share."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import _nvrtc

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

try:
    from fastdiff import _C  # type: ignore[attr-defined]

    load_error: str | None = None
except ImportError as error:  # never fatal: every op has a reference row
    _C = None  # type: ignore[assignment]
    load_error = f"fastdiff._C does not load: {error}"


def build_info() -> dict[str, Any]:
    """What setup.py built: extension, levels, CUDA, torch version, environment."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {"extension": "not built"}


def cpu_levels() -> list[str]:
    """Instruction-set levels that this processor and this build have, lowest first."""
    return [] if _C is None else list(_C.cpu_levels())


def emulated() -> bool:
    """Whether levels past avx2 are imitated in it (FASTDIFF_EMULATE of setup.py): slow."""
    return bool(getattr(_C, "emulated", False))


def cpu_level() -> str:
    """The level in use: the processor's, lowered by FASTDIFF_CPU or :func:`set_cpu_level`."""
    return "none" if _C is None else str(_C.cpu_level())


def set_cpu_level(name: str) -> None:
    """Process-wide override for tests; raises ValueError for a level this processor lacks."""
    if _C is None:
        raise RuntimeError(f"set_cpu_level: {load_error}")
    _C.set_cpu_level(name)


def native(op: str) -> Callable[..., Any]:
    """``torch.ops.fastdiff.<op>``; without the extension a function that says why not. An extension
    that lacks an operation was built from other sources: it counts as none from then on."""
    global _C, load_error
    if _C is not None and hasattr(torch.ops.fastdiff, op):
        return getattr(torch.ops.fastdiff, op).default
    if _C is not None:
        _C, load_error = None, f"fastdiff._C is older than the package, as it has no {op}; build it"

    def missing(*_: Any) -> Any:
        raise RuntimeError(load_error)

    return missing


def why_not_native(
    *tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES, gpu: str | None = None
) -> str | None:
    """None where the extension is loaded and all tensors are on the CPU, in ``dtypes``.

    ``gpu`` names the op's CUDA kernel, where it has one: then tensors may all be on a GPU instead.
    """
    if _C is None:
        return load_error
    for t in tensors:
        if t is None:
            continue
        if t.device.type == "cuda":
            if gpu is None:
                return f"a tensor is on {t.device}; this op's native kernels are for the cpu"
            reason = _C.why_not_gpu(gpu) or (_why_not_compiled() if _by_nvrtc() else None)
            if reason:
                return str(reason)
        elif t.device.type != "cpu":
            return f"a tensor is on {t.device}; native kernels are for the cpu and cuda"
        elif _levels_missing:
            return "native kernels need AVX2, FMA and F16C, which this processor lacks"
        if t.dtype not in dtypes:
            return f"dtype {t.dtype} is not one of {', '.join(map(str, dtypes))}"
    return None


def in_cuda(tensor: Tensor) -> bool:
    """Whether a native row takes this tensor to a CUDA kernel: on a GPU, or in the model of one."""
    return tensor.device.type == "cuda" or (_C is not None and bool(_C.emulating()))


def _by_nvrtc() -> bool:
    return not GPU_LIBRARY.exists() and DRIVER_LIBRARY.exists()


@lru_cache(maxsize=1)
def _why_not_compiled() -> str | None:
    return _nvrtc.why_not()


def gpu_kernels() -> str:
    """Where the CUDA kernels come from, in words."""
    if _by_nvrtc():
        reason = _why_not_compiled()
        return f"NVRTC, which cannot: {reason}" if reason else "NVRTC, at the first call"
    return "nvcc, when the package was built" if GPU_LIBRARY.exists() else "none were built"


_levels_missing = _C is not None and not cpu_levels()
# One of the two: built by nvcc; or, where there was none, by the C++ compiler for NVRTC's kernels.
GPU_LIBRARY = Path(__file__).with_name("_cuda.so")
DRIVER_LIBRARY = Path(__file__).with_name("_cuda_driver.so")
if _C is not None and GPU_LIBRARY.exists():
    _C.load_gpu_library(str(GPU_LIBRARY), False)
elif _C is not None and DRIVER_LIBRARY.exists():
    _C.load_gpu_library(str(DRIVER_LIBRARY), False)
    _nvrtc.serve(DRIVER_LIBRARY)
