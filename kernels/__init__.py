"""Triton kernels of fastdiff: one module per op, which imports torch and triton only.

A kernel module is imported by the op's row when it first runs, so `import fastdiff` needs no
triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Triton decides between compiler and interpreter when a kernel is decorated, so this is read once.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
AVAILABLE = importlib.util.find_spec("triton") is not None


def triton_row(op: str, function: str | None = None) -> Callable[..., Any]:
    """The launcher ``fastdiff.kernels.<op>.<function>``, imported at its first call."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fastdiff.kernels.{op}"), function or op)(*args)

    return launch


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_triton(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """None where triton can run on these tensors, of ``dtypes``: on a GPU, or on the CPU under its
    interpreter."""
    if not AVAILABLE:
        return "triton is not installed (pip install triton)"
    for t in tensors:
        if t is None:
            continue
        if t.device.type == "cpu" and not INTERPRET:
            return "tensors are on the cpu; triton kernels need a GPU (tests: TRITON_INTERPRET=1)"
        if t.dtype not in dtypes:
            names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
            return f"dtype {t.dtype} is not {', '.join(names[:-1])} or {names[-1]}"
    return None
