"""Linear layers with and without an activation, at the sizes of DiT-S, DiT-XL and SDXL blocks;
with few rows, their modulations."""

from __future__ import annotations

import torch
from _case import Case
from torch.nn import functional as F

from fastdiff.ops import linear


def _case(rows: int, k: int, n: int, dtype: torch.dtype, activation: str | None) -> Case:
    x, weight = torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    bias = torch.randn(n).to(dtype)

    def eager() -> torch.Tensor:
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate="tanh") if activation else y

    baselines = {"eager": eager}
    if dtype != torch.float32:
        wide = x.float(), weight.float(), bias.float()
        baselines["fastdiff float32"] = lambda: linear(*wide, activation=activation)
    return Case(
        f"[{rows}, {k}] x [{n}, {k}] {str(dtype)[6:]}{' ' + activation if activation else ''}",
        lambda: linear(x, weight, bias, activation=activation),
        baselines,
        flops=2.0 * rows * k * n,
        target=1.0,
    )


def cases() -> list[Case]:
    shapes = [
        (512, 1152, 1152),
        (2048, 384, 1536),
        (64, 192, 768),
        (1, 256, 1024),
        (4096, 640, 640),
        (2, 384, 2304),
        (2, 1152, 6912),
        (8, 1152, 6912),
    ]
    result = [_case(*s, d, None) for d in (torch.float32, torch.bfloat16) for s in shapes]
    result += [_case(2048, 384, 1536, d, "gelu_tanh") for d in (torch.float32, torch.bfloat16)]
    return [*result, _case(64, 192, 768, torch.float16, None)]
