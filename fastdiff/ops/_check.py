"""User-facing checks of the ops: one error that names the argument, the value and the need."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wide(t: Tensor) -> Tensor:
    """The dtype that references compute in: float64 stays, everything else goes to float32."""
    return t if t.dtype == torch.float64 else t.float()


def check_strided(op: str, name: str, t: Tensor) -> None:
    """``t`` has one value for every index: it is not sparse, nor any other compressed layout."""
    if t.layout != torch.strided:
        raise ValueError(f"{op}: {name} has layout {t.layout}, need a strided tensor")


def check_tensor(
    op: str, name: str, t: Tensor, *, dim: int | None = None, min_dim: int = 1
) -> None:
    """``t`` is a strided floating-point tensor of ``dim`` (or at least ``min_dim``) dimensions."""
    if not isinstance(t, Tensor):
        raise ValueError(f"{op}: {name} is {type(t).__name__}, need a torch.Tensor")
    if t.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} is {t.dtype}, need float16, bfloat16, float32 (or float64)")
    check_strided(op, name, t)
    if dim is not None and t.dim() != dim:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, need {dim} dimensions")
    if t.dim() < min_dim:
        raise ValueError(
            f"{op}: {name} has shape {list(t.shape)}, need at least {min_dim} dimensions"
        )


def check_like(op: str, name: str, t: Tensor, x: Tensor, other: str = "x") -> None:
    """``t`` is a tensor of the dtype and device of ``x``."""
    if not isinstance(t, Tensor):
        raise ValueError(f"{op}: {name} is {type(t).__name__}, need a torch.Tensor")
    check_strided(op, name, t)
    if t.dtype != x.dtype:
        raise ValueError(f"{op}: {name} is {t.dtype}, need {x.dtype}, the dtype of {other}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, need {x.device}, the device of {other}")


def check_shape(op: str, name: str, t: Tensor, *needs: Sequence[int]) -> None:
    """``t`` has one of the shapes ``needs``."""
    for need in needs:
        if t.shape == tuple(need):
            return
    alternatives = " or ".join(str(list(n)) for n in needs)
    raise ValueError(f"{op}: {name} has shape {list(t.shape)}, need {alternatives}")


def check_last(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """``t`` is one vector over the last dimension of ``x``."""
    if t.shape != x.shape[-1:]:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, need {[x.shape[-1]]}")


def check_finite(op: str, name: str, value: float, *, positive: bool = False) -> None:
    """``value`` is a finite number (and above 0)."""
    if not isinstance(value, int | float) or not math.isfinite(value) or (positive and value <= 0):
        need = "a finite number above 0" if positive else "a finite number"
        raise ValueError(f"{op}: {name} is {value!r}, need {need}")


def check_index(op: str, name: str, t: Tensor, x: Tensor, other: str = "x") -> None:
    """``t`` is an int64 tensor on the device of ``x``."""
    if not isinstance(t, Tensor):
        raise ValueError(f"{op}: {name} is {type(t).__name__}, need a torch.Tensor")
    check_strided(op, name, t)
    if t.dtype != torch.int64:
        raise ValueError(f"{op}: {name} is {t.dtype}, need torch.int64")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}, need {x.device}, the device of {other}")


def _readable(t: Tensor) -> bool:
    traced = torch.compiler.is_compiling() or isinstance(t, FakeTensor)
    return not traced and t.device.type == "cpu"


def check_range(op: str, name: str, t: Tensor, low: int, high: int) -> None:
    """Every value of the int64 tensor ``t`` lies in ``[low, high)``.

    For reference rows. Looks at values, so only where they exist and cost no sync: not under
    torch.compile, not on fake or meta tensors, not on a GPU (whose gathers assert on their own).
    """
    if _readable(t) and t.numel():
        least, most = (int(x) for x in t.aminmax())
        if least < low or most >= high:
            bad = least if least < low else most
            raise ValueError(f"{op}: {name} has value {bad}, need {low} to {high - 1}")


def check_starts(op: str, name: str, t: Tensor, rows: int) -> None:
    """The int64 vector ``t`` ascends from 0 to ``rows``; looked at where ``check_range`` looks."""
    if not _readable(t):
        return
    if t[0] != 0:
        raise ValueError(f"{op}: {name} begins with {int(t[0])}, need 0")
    for before, after in zip(t[:-1], t[1:], strict=True):
        if before > after:
            raise ValueError(
                f"{op}: {name} has value {int(after)} after {int(before)}, need ascending values"
            )
    if t[-1] != rows:
        raise ValueError(f"{op}: {name} ends with {int(t[-1])}, need {rows}, the rows of q")
