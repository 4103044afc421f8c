"""Triton kernel of gelu_tanh: one program per BLOCK elements of the flattened input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((1024, 4), (4096, 8))]


@triton.jit
def _gelu_tanh_kernel(
    x_ptr,  # [n], contiguous
    bias_ptr,  # [dim]
    y_ptr,  # [n], contiguous
    n,
    dim,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + at % dim, mask=at < n, other=0.0).to(tl.float32)
    inner = 1.5957691216057308 * (h + 0.044715 * h * h * h)
    y = h * tl.sigmoid(inner)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < n)


def gelu_tanh(x: Tensor, bias: Tensor | None, *, config: triton.Config = CONFIGS[0]) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.gelu_tanh``."""
    x = x.contiguous()
    y = torch.empty_like(x)
    n = x.numel()
    if n:
        grid = (triton.cdiv(n, config.kwargs["BLOCK"]),)
        _gelu_tanh_kernel[grid](
            x, x if bias is None else bias.contiguous(), y, n, x.shape[-1],
            HAS_BIAS=bias is not None, **config.kwargs, num_warps=config.num_warps,
        )
    return y
