"""Squared distances and scalar products of latents, per sample, against torch's elementwise ops and
sum: Stable Diffusion's at 512 pixels, SD 3's at 1024, a batch of particles, a video's."""

from __future__ import annotations

from functools import partial

import torch
from _case import Case
from torch import Tensor

from fastdiff.ops import sample_sums


def _difference(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().flatten(1).sum(1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(1).sum(1)


def _einsum(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("bd,bd->b", x.flatten(1), y.flatten(1))


def cases() -> list[Case]:
    result = []
    for shape in ((2, 4, 64, 64), (2, 16, 128, 128), (16, 4, 64, 64), (1, 16, 13, 60, 90)):
        x, y = torch.randn(shape), torch.randn(shape)
        moved, size = 2.0 * x.numel() * x.element_size(), "x".join(map(str, shape))
        result.append(
            Case(
                f"|x - y|^2 {size}",
                partial(sample_sums, x, y, kind="difference"),
                {"eager": partial(_difference, x, y)},
                bytes=moved,
                target=1.2,
            )
        )
        result.append(
            Case(
                f"<x, y> {size}",
                partial(sample_sums, x, y, kind="product"),
                {"eager": partial(_product, x, y), "einsum": partial(_einsum, x, y)},
                bytes=moved,
                target=1.2,
            )
        )
    return result
