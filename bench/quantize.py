"""Tokens as int8 with one scale each, at the widths of DiT-XL and DiT-S: plain, with channels
divided, and after the GELU of a feed-forward layer."""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import quantize


def _case(rows: int, dim: int, dtype: torch.dtype, smooth: bool, activation: str | None) -> Case:
    x, divisor = torch.randn(rows, dim).to(dtype), torch.rand(dim) + 0.5
    by = divisor if smooth else None
    other = torch.empty_like(x)

    def eager() -> tuple[Tensor, Tensor]:
        y = x.float()
        if activation is not None:
            y = F.gelu(y, approximate="tanh")
        if by is not None:
            y = y / by
        s = y.abs().amax(-1, keepdim=True) / 127
        return (y / s).round().to(torch.int8), s.squeeze(-1)

    words = [f"[{rows}, {dim}] {str(dtype)[6:]}"]
    words += ["smooth"] * smooth + ([activation] if activation else [])
    return Case(
        " ".join(words),
        lambda: quantize(x, smooth=by, activation=activation)[:2],
        {"eager": eager, "copy": lambda: other.copy_(x)},
        bytes=float(x.numel() * (x.element_size() + 1)),
        target=1.0,
    )


def cases() -> list[Case]:
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        for rows, dim in ((1024, 1152), (512, 384), (4, 1152)):
            result.append(_case(rows, dim, dtype, False, None))
        result.append(_case(1024, 1152, dtype, True, None))
        result.append(_case(1024, 4608, dtype, False, "gelu_tanh"))
    return result
