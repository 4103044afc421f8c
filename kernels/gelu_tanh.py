"""Triton kernel of gelu_tanh: one program per row and BLOCK channels (without a bias the whole
input is one row), one read and one write per element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((1024, 4), (256, 2), (4096, 8))]


@triton.jit
def _gelu_tanh_kernel(
    x_ptr,  # [rows, dim], contiguous
    bias_ptr,  # [dim]
    y_ptr,  # [rows, dim], contiguous
    dim,
    blocks,  # programs of a row
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(x_ptr + row * dim + i, mask=i < dim, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + i, mask=i < dim, other=0.0).to(tl.float32)
    y = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    tl.store(y_ptr + row * dim + i, y.to(y_ptr.dtype.element_ty), mask=i < dim)


def gelu_tanh(x: Tensor, bias: Tensor | None, *, config: triton.Config = CONFIGS[0]) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.gelu_tanh``."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if y.numel():
        dim = y.numel() if bias is None else y.shape[-1]
        blocks = triton.cdiv(dim, config.kwargs["BLOCK"])
        _gelu_tanh_kernel[(y.numel() // dim * blocks,)](
            x, x if bias is None else bias.contiguous(), y, dim, blocks,
            HAS_BIAS=bias is not None, **config.kwargs, num_warps=config.num_warps,
        )  # fmt: skip
    return y
