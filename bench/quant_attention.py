"""Attention with int8 scores at the shapes of SD 3 and DiT, against scaled_dot_product_attention in
float32 and the float kernel of this package.

Results differ by what rounding to 8 bits changes: 1 % of the outputs, more than bench/run.py lets
pass for equal, so that no arm is compared by values here; tests/ops/test_quant_attention.py is.
"""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import attention, quant_attention

SHAPES = ((2, 16, 1024, 64), (2, 24, 4096, 64))  # (B, H, N, D)


def case(shape: tuple[int, ...]) -> Case:
    """Self-attention of this shape in float32."""
    batch, heads, rows, dim = shape

    def new() -> Tensor:  # in memory [B, N, H, D], as projections leave them
        return torch.randn(batch, rows, heads, dim).transpose(1, 2)

    q, k, v = new(), new(), new()
    return Case(
        f"{list(shape)} float32",
        lambda: quant_attention(q, k, v),
        {
            "eager": lambda: F.scaled_dot_product_attention(q, k, v),
            "ours, float32": lambda: attention(q, k, v),
        },
        flops=4.0 * batch * heads * rows * rows * dim,
        comparable=False,
    )


def cases() -> list[Case]:
    return [case(shape) for shape in SHAPES]
