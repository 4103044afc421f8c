"""GELU with bias at the MLP widths of DiT-S/2 and DiT-XL/2 (256 tokens)."""

from __future__ import annotations

import torch
from _case import Case
from torch.nn import functional as F

from fastdiff.ops import gelu_tanh


def cases() -> list[Case]:
    result = []
    for shape in ((2, 256, 1536), (2, 256, 4608)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype)
            bias = torch.randn(shape[-1]).to(dtype)
            result.append(
                Case(
                    f"{list(shape)} {str(dtype)[6:]}",
                    lambda x=x, b=bias: gelu_tanh(x, b),
                    {
                        "eager": lambda x=x, b=bias: F.gelu(x + b, approximate="tanh"),
                        "gelu alone": lambda x=x: F.gelu(x, approximate="tanh"),
                    },
                    bytes=2.0 * x.numel() * x.element_size(),
                    target=1.0,
                )
            )
    return result
