"""One linear layer of experts over ragged groups of rows, and the gradient of its weight, against a
loop over experts in torch and against one product of the same size."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import grouped_linear, grouped_weight_grad, linear


def _groups(experts: int, rows: int) -> list[int]:
    """Of different sizes, known to the host."""
    g = torch.Generator("cpu").manual_seed(0)
    share = torch.rand(experts, generator=g, device="cpu").cumsum(0)
    edges = [0, *(share / share[-1] * rows).round().long().tolist()]
    return [b - a for a, b in pairwise(edges)]


def _case(experts: int, rows: int, k: int, n: int, dtype: torch.dtype) -> list[Case]:
    x, weight = torch.randn(rows, k).to(dtype), (torch.randn(experts, n, k) / k**0.5).to(dtype)
    parts, grad = _groups(experts, rows), torch.randn(rows, n).to(dtype)
    offsets = torch.tensor([0, *accumulate(parts)])
    what = f"{experts} experts [{rows}, {k}] x [{n}, {k}] {str(dtype)[6:]}"

    def eager() -> Tensor:
        return torch.cat([F.linear(p, w) for p, w in zip(x.split(parts), weight, strict=True)])

    def eager_grad() -> Tensor:
        pairs = zip(grad.split(parts), x.split(parts), strict=True)
        return torch.stack([g.T @ p for g, p in pairs])

    flops = 2.0 * rows * k * n
    return [
        Case(
            f"grouped_linear {what}",
            lambda: grouped_linear(x, weight, offsets),
            {"eager": eager, "one product": lambda: linear(x, weight[0])},
            flops=flops,
            target=1.0,
        ),
        Case(
            f"grouped_weight_grad {what}",
            lambda: grouped_weight_grad(grad, x, offsets),
            {"eager": eager_grad},
            flops=flops,
            target=1.0,
        ),
    ]


def cases() -> list[Case]:
    shapes = [(8, 2048, 384, 1536), (8, 2048, 1536, 384), (64, 2048, 384, 1536)]
    found = [_case(*shape, torch.float32) for shape in shapes]
    return [case for part in [*found, _case(8, 2048, 384, 1536, torch.bfloat16)] for case in part]
