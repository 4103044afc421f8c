"""Triton kernels of sample_sums: a program per piece of a sample, then one per sample.

Products of a piece are added in float32, pieces in float64 and in an order that the size of a
sample alone decides: no atomics, the same bits in every run. Inputs are read once; a sample of one
piece takes one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# PIECE: elements that are added in float32.
CONFIGS = [triton.Config({"PIECE": p}, num_warps=w) for p, w in ((4096, 8), (2048, 4), (1024, 4))]


@triton.jit
def _sample_sums_kernel(
    x_ptr,  # sample b at b * x_b, contiguous
    y_ptr,  # sample b at b * y_b; not read without HAS_Y
    sums_ptr,  # [B, pieces]: float64 parts; float32 results where there is one piece
    size,  # N, elements of a sample
    pieces,
    x_b, y_b,
    HAS_Y: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    b = task // pieces
    i = (task % pieces) * PIECE + tl.arange(0, PIECE)
    live = i < size
    u = tl.load(x_ptr + b * x_b + i, mask=live, other=0.0).to(tl.float32)
    v = u
    if HAS_Y:
        v = tl.load(y_ptr + b * y_b + i, mask=live, other=0.0).to(tl.float32)
    if DIFFERENCE:
        u = u - v
        v = u
    tl.store(sums_ptr + task, tl.sum(u * v, 0).to(sums_ptr.dtype.element_ty))


@triton.jit
def _sample_sums_add_kernel(
    parts_ptr,  # [B, pieces] float64
    out_ptr,  # [B] float32
    pieces,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, pieces, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + b * pieces + i, mask=i < pieces, other=0.0)
    tl.store(out_ptr + b, tl.sum(total, 0).to(tl.float32))


def _dense_samples(t: Tensor) -> Tensor:
    """``[B, N]`` of unit last stride."""
    t = t.flatten(1) if t.dim() > 1 else t[:, None]
    return t if t.shape[1] == 1 or t.stride(1) == 1 else t.contiguous()


def sample_sums(
    x: Tensor, y: Tensor | None, difference: bool, *, config: triton.Config = CONFIGS[0]
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.sample_sums``."""
    batch = x.shape[0]
    if not x.numel():
        return torch.zeros(batch, dtype=torch.float32, device=x.device)
    x = _dense_samples(x)
    other = x if y is None else _dense_samples(y)
    size, pieces = x.shape[1], triton.cdiv(x.shape[1], config.kwargs["PIECE"])
    out = torch.empty(batch, dtype=torch.float32, device=x.device)
    parts = out
    if pieces > 1:
        parts = torch.empty(batch, pieces, dtype=torch.float64, device=x.device)
    _sample_sums_kernel[(batch * pieces,)](
        x, other, parts, size, pieces, x.stride(0), other.stride(0) if len(other) == batch else 0,
        HAS_Y=y is not None, DIFFERENCE=difference,
        **config.kwargs, num_warps=config.num_warps,
    )  # fmt: skip
    if pieces > 1:
        _sample_sums_add_kernel[(batch,)](
            parts, out, pieces, BLOCK=min(256, triton.next_power_of_2(pieces)), num_warps=4
        )
    return out
