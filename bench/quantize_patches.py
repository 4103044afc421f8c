"""Convolutions in int8, patches and product, at the shapes of Stable Diffusion's U-Net: against
torch's float32 and our own, which is Winograd's form where that wins."""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import conv3x3, quant_linear, quantize_patches, quantize_weight


def _case(c: int, n: int, side: int, stride: int = 1) -> Case:
    last = torch.channels_last
    x = torch.randn(2, c, side, side).contiguous(memory_format=last)
    w = (torch.randn(n, c, 3, 3) / (9 * c) ** 0.5).contiguous(memory_format=last)
    bias = torch.randn(n)
    weight = quantize_weight(w.permute(0, 2, 3, 1).flatten(1))

    def ours() -> Tensor:
        tokens = quantize_patches(x, 3, stride=stride, padding=1)
        return quant_linear(tokens, weight, bias).permute(0, 3, 1, 2)

    arms = {"eager": lambda: F.conv2d(x, w, bias, stride, 1)}
    if stride == 1:
        arms["fastdiff float32"] = lambda: conv3x3(x, w, bias)
    words = f"[2, {c}, {side}, {side}] -> {n}" + (f", stride {stride}" if stride > 1 else "")
    out = side // stride
    return Case(words, ours, arms, flops=2.0 * 9 * c * n * 2 * out * out, comparable=False)


def cases() -> list[Case]:
    """One row a shape."""
    shapes = (320, 320, 64), (640, 640, 32), (1280, 1280, 16), (1280, 1280, 8), (320, 320, 64, 2)
    return [_case(*shape) for shape in shapes]
