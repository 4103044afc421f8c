"""The CUDA kernels as machine code, with no GPU: what nvcc makes of them and how they are launched.

:func:`library` compiles ``csrc/cuda/*.cu`` and links them with ``csrc/simt/launches.cpp`` in place
of CUDA's runtime: the native rows of ops then build their arguments and launch as they would on a
GPU, and each launch is noted (kernel, grid, block, shared memory) and not run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastdiff import _native, ops
from fastdiff.gpu_cases import Case, traffic
from fastdiff.gpu_code import Code, read_cuda

CSRC = Path(__file__).resolve().parents[1] / "csrc"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# As nvcc has it: "a" is the architecture with its own instructions, which no later one runs.
ARCH = {"sm_90": "sm_90a", "sm_100": "sm_100a", "sm_120": "sm_120a"}
# Dtypes of ops whose CUDA kernel does not take them all: tensor cores have no float32.
_TENSOR = (torch.bfloat16, torch.float16)
_PRODUCTS = ("attention", "grouped_linear", "grouped_weight_grad", "lora_add", "sparse_weight_grad",
             "sparse_conv2d_weight_grad")  # fmt: skip
DTYPES = {op: _TENSOR for op in _PRODUCTS}
FLOAT8 = ("sm_89", "sm_90", "sm_100", "sm_120")  # of TARGETS, those with its products
ENTRY = r'extern "C" int fastdiff_gpu_(\w+)\('


def why_not() -> str | None:
    """The sentence why CUDA kernels cannot be compiled here, or None."""
    if _native._C is None:
        return _native.load_error
    if not CSRC.exists():
        return f"no sources in {CSRC}: this is not a source tree"
    return None if shutil.which("nvcc") else "no nvcc on PATH"


def entries() -> set[str]:
    """Names of the CUDA kernels' entries, from the sources: fastdiff_gpu_<name>."""
    return {name for p in CSRC.glob("cuda/*.cu") for name in re.findall(ENTRY, p.read_text())}


def has_kernel(op: str, dtype: torch.dtype | None = None) -> bool:
    """Whether csrc/cuda has a kernel for this public op, and for this dtype of it."""
    if dtype is not None and dtype not in DTYPES.get(op, (dtype,)):
        return False
    return not entries().isdisjoint((op.rstrip("_"), _stem(op)))


def _stem(op: str) -> str:
    return str(getattr(ops, op).__module__).rpartition(".")[2]


def readable(mangled: str) -> str:
    """Name and template arguments of a kernel, where c++filt is there to tell them."""
    if shutil.which("c++filt") is None:
        return mangled
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    found = re.search(r"(\w+(<[^(]*>)?)\(", done.stdout.replace("(anonymous namespace)", ""))
    return found[1] if found else mangled


def _build(out: Path, targets: tuple[str, ...]) -> None:
    arch = [ARCH.get(t, t).removeprefix("sm_") for t in targets]
    command = ["nvcc", "-std=c++17", "-O3", "-shared", "-cudart=none", f"-I{CSRC}"]
    command += [f"-I{CSRC / 'cuda'}", "-Xcompiler=-fPIC", "-o", str(out)]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in arch]
    command += [str(p) for p in sorted(CSRC.glob("cuda/*.cu"))]
    command.append(str(CSRC / "simt" / "launches.cpp"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-4000:]}")


@lru_cache(maxsize=2)
def library(targets: tuple[str, ...] = TARGETS) -> Path:
    """The library of all kernels for ``targets``, built once for these sources.

    Raises:
        RuntimeError: there is no nvcc, or it fails; with its words.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(f"testing_cuda: {reason}")
    paths = [*CSRC.glob("cuda/*"), *CSRC.glob("cpu/*.h"), CSRC / "simt" / "launches.cpp"]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(paths)))
    digest.update(" ".join(targets).encode())
    path = Path(tempfile.gettempdir()) / f"fastdiff-cuda-{os.getuid()}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            _build(Path(work) / "cuda.so", targets)
            os.replace(Path(work) / "cuda.so", path)  # whole or not at all, for several processes
    return path


def code(path: Path, target: str) -> dict[str, Code]:
    """Every kernel of a library by its mangled name, as compiled for ``target``."""
    return {kernel.name: kernel for kernel in read_cuda(path, ARCH.get(target, target))}


def launches(case: Case, path: Path) -> Iterator[dict[str, Any]]:
    """The launches of one call's native row, in order: kernel, grid, block, dynamic shared bytes.

    Raises:
        ValueError: the op has no CUDA kernel.
    """
    if not has_kernel(case.op):
        raise ValueError(f"testing_cuda: {case.op} has no CUDA kernel")
    rows, row_args = sys.modules[getattr(ops, case.op).__module__].TABLES[case.op]
    (native,) = (row for row in rows if row.name == "native")
    args, kwargs = case.make()
    placed = row_args(*args, **kwargs)
    _native._C.load_gpu_library(str(path), True)
    noted = ctypes.CDLL(str(path)).fastdiff_launch
    noted.restype = ctypes.c_char_p
    fields = (ctypes.c_size_t * 7)()
    noted(-1, fields)
    _native._C.set_emulating(True)
    try:
        out = native.fn(*placed)
    finally:
        _native._C.set_emulating(False)
    i = 0
    while (name := noted(i, fields)) is not None:
        yield {
            "op": case.op,
            "case": case.name,
            "kernel": name.decode(),
            "grid": list(fields[:3]),
            "block": list(fields[3:6]),
            "shared": fields[6],
            "bytes": traffic(case.op, placed, out),
        }
        i += 1
