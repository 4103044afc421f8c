"""Triton kernel of geglu: one program per row and BLOCK output channels, one read per element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((1024, 4), (256, 2), (4096, 8))]


@triton.jit
def _geglu_kernel(
    x_ptr,  # [rows, 2 dim], contiguous
    bias_ptr,  # [2 dim]
    y_ptr,  # [rows, dim], contiguous
    dim,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = i < dim
    x_ptr += row * 2 * dim
    h = tl.load(x_ptr + i, mask=keep, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + dim + i, mask=keep, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + i, mask=keep, other=0.0).to(tl.float32)
        g += tl.load(bias_ptr + dim + i, mask=keep, other=0.0).to(tl.float32)
    if TANH:
        gate = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        gate = 0.5 * g * (1.0 + tl.erf(0.7071067811865476 * g))
    tl.store(y_ptr + row * dim + i, (h * gate).to(y_ptr.dtype.element_ty), mask=keep)


def geglu(
    x: Tensor, bias: Tensor | None, tanh: bool, *, config: triton.Config = CONFIGS[0]
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.geglu``."""
    x = x.contiguous()
    dim = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], dim, dtype=x.dtype, device=x.device)
    if y.numel():
        grid = (y.numel() // dim, triton.cdiv(dim, config.kwargs["BLOCK"]))
        _geglu_kernel[grid](
            x, x if bias is None else bias.contiguous(), y, dim,
            HAS_BIAS=bias is not None, TANH=tanh, **config.kwargs, num_warps=config.num_warps,
        )  # fmt: skip
    return y
