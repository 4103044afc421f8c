"""Embeddings and input checks that both networks share."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from fastdiff.ops._check import check_range, check_tensor, wide


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """``[B]`` times -> ``[B, dim]`` cosines, then sines (Vaswani et al. 2017, section 3.5).

    float64 for float64 times, float32 for all others.
    """
    half, t = dim // 2, wide(t)
    index = torch.arange(half, dtype=t.dtype, device=t.device)
    angle = t[:, None] * torch.exp(index * (-math.log(max_period) / half))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


@lru_cache(maxsize=32)
def sincos_2d(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D position table ``[1, height*width, dim]``, float32 on the CPU.

    The first half of the channels encodes the column, the second half the row; each half is sines,
    then cosines, of the coordinate times ``10000^(-4i/dim)``. Computed in float64.
    """
    with torch.device("cpu"):
        omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
        column = torch.arange(width, dtype=torch.float64)[:, None] * omega
        row = torch.arange(height, dtype=torch.float64)[:, None] * omega
    column = torch.cat([column.sin(), column.cos()], dim=1)[None].expand(height, -1, -1)
    row = torch.cat([row.sin(), row.cos()], dim=1)[:, None].expand(-1, width, -1)
    return torch.cat([column, row], dim=2).reshape(1, height * width, dim).float()


def check_inputs(
    name: str,
    x: Tensor,
    t: Tensor,
    y: Tensor | None,
    *,
    channels: int,
    multiple: int,
    classes: int,
    layout: bool = False,
) -> None:
    """``x [B, channels, H, W]``, H and W in ``multiple``s; ``t [B]``; ``y [B]`` in 0..classes, or a
    ``layout [B, K, 3]`` of class, top and left."""
    check_tensor(name, "x", x, dim=4)
    if x.shape[1] != channels:
        raise ValueError(f"{name}: x has {x.shape[1]} channels, need {channels}")
    if x.shape[2] % multiple or x.shape[3] % multiple or not (x.shape[2] and x.shape[3]):
        raise ValueError(
            f"{name}: x is {x.shape[2]}x{x.shape[3]}, "
            f"need a height and width divisible by {multiple}"
        )
    if not isinstance(t, Tensor) or t.shape != (x.shape[0],):
        got: object = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"{name}: t is {got}, need a tensor [{x.shape[0]}], one time per sample")
    if t.device != x.device:
        raise ValueError(f"{name}: t is on {t.device}, need {x.device}, the device of x")
    if y is None:
        return
    shape: tuple[int, ...] = (x.shape[0],)
    what = "classes"
    if layout:
        boxes = y.shape[1] if isinstance(y, Tensor) and y.dim() == 3 else 3
        shape, what = (x.shape[0], boxes, 3), "boxes: class, top and left"
    if not isinstance(y, Tensor) or y.shape != shape or y.dtype != torch.int64:
        got = f"{list(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{name}: y is {got}, need an int64 tensor {list(shape)} of {what}")
    if y.device != x.device:
        raise ValueError(f"{name}: y is on {y.device}, need {x.device}, the device of x")
    if not layout:
        check_range(name, "y", y, 0, classes + 1)
        return
    check_range(name, "y's class", y[..., 0], 0, classes + 1)
    check_range(name, "y's top", y[..., 1], 0, x.shape[2])
    check_range(name, "y's left", y[..., 2], 0, x.shape[3])


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that ``module`` computes in: that of its first parameter."""
    return next(module.parameters()).dtype
