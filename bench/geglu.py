"""GEGLU with bias at the feed-forward widths of SD 1.5 and SDXL (64 x 64 and 32 x 32 latents)."""

from __future__ import annotations

import torch
from _case import Case
from torch.nn import functional as F

from fastdiff.ops import geglu


def _eager(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    h, g = (x + bias).chunk(2, -1)
    return h * F.gelu(g, approximate=approximate)


def _chunked(x: torch.Tensor) -> torch.Tensor:
    h, g = x.chunk(2, -1)
    return h * F.gelu(g)


def cases() -> list[Case]:
    result = []
    for shape in ((256, 2560), (2, 1024, 5120)):
        for dtype in (torch.float32, torch.bfloat16):
            for approximate in ("none", "tanh"):
                x = torch.randn(shape).to(dtype)
                bias = torch.randn(shape[-1]).to(dtype)
                args = x, bias, approximate
                half = x[..., : shape[-1] // 2].contiguous()
                result.append(
                    Case(
                        f"{list(shape)} {str(dtype)[6:]} {approximate}",
                        lambda a=args: geglu(*a[:2], approximate=a[2]),
                        {
                            "eager": lambda a=args: _eager(*a),
                            "eager, bias in the linear": lambda x=x: _chunked(x),
                            "copy of half of x": lambda h=half: h.clone(),
                        },
                        bytes=1.5 * x.numel() * x.element_size(),
                        target=1.0,
                    )
                )
    return result
