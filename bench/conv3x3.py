"""3x3 convolutions of the shipped U-Net (batch 8) and of SD 1.5's (two samples), channels-last."""

from __future__ import annotations

import torch
from _case import Case
from torch.nn import functional as F

from fastdiff.ops import conv3x3

# (B, C, side, N)
SHAPES = [(8, 32, 32, 32), (8, 64, 32, 64), (8, 96, 8, 96), (8, 192, 8, 96), (2, 320, 64, 320),
          (2, 640, 32, 640), (2, 1280, 16, 1280)]  # fmt: skip


def _eager(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, up: bool) -> torch.Tensor:
    if up:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv2d(x, w, b, padding=1)


def cases() -> list[Case]:
    result = []
    last = torch.channels_last
    for batch, c, side, n in SHAPES:
        for up in (False, True) if side == 32 else (False,):
            x = torch.randn(batch, c, side, side).contiguous(memory_format=last)
            w, b = torch.randn(n, c, 3, 3) / (9 * c) ** 0.5, torch.randn(n)
            packed = w.contiguous(memory_format=last)
            result.append(
                Case(
                    f"{[batch, c, side, side]} -> {n}{' upsampled' if up else ''}",
                    lambda x=x, w=w, b=b, up=up: conv3x3(x, w, b, upsample=up),
                    {
                        "eager": lambda x=x, w=w, b=b, up=up: _eager(x, w, b, up),
                        "weights channels-last": lambda x=x, w=packed, b=b, up=up: _eager(
                            x, w, b, up
                        ),
                    },
                    flops=2 * 9 * batch * c * n * side**2 * (4 if up else 1),
                    target=1.15,
                )
            )
    return result
