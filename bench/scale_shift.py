"""A scale and shift of every channel at DiT-XL/2's 1024 tokens and at the finest level of Stable
Diffusion's U-Net, both layouts; and with its gradients, as training of gammas needs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _case import Case
from torch import Tensor

from fastdiff.ops import scale_shift


def _with_gradients(op: Callable[..., Tensor], *parts: Tensor) -> Any:
    leaves = [t.detach().requires_grad_() for t in parts]
    y = op(*leaves)
    return torch.autograd.grad(y, leaves, y)


def _cases(x: Tensor, dim: int, what: str) -> list[Case]:
    scale, shift = torch.randn(2, x.shape[dim]).to(x.dtype)
    rows = torch.randn(8, x.shape[dim]).to(x.dtype)
    index = torch.arange(x.shape[0]) % 8
    out, size = torch.empty_like(x), float(x.numel() * x.element_size())
    spread = (-1,) if dim == -1 else (-1, *[1] * (x.dim() - 2))

    def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return x * scale.view(spread) + shift.view(spread)

    def of_rows() -> Tensor:
        mine = rows[index]
        return x * (mine.view(mine.shape[0], *[1] * (x.dim() - 2), -1) if dim == -1
                    else mine.view(*mine.shape, *spread[1:]))  # fmt: skip

    return [
        Case(
            f"scale_shift {what}",
            lambda: scale_shift(x, scale, shift, dim=dim),
            {
                "eager": lambda: eager(x, scale, shift),
                "addcmul": lambda: torch.addcmul(shift.view(spread), x, scale.view(spread)),
                "copy": lambda: out.copy_(x),
            },
            bytes=2 * size,
            target=1.2,
            also={"copy": 1 / 1.5},
        ),
        Case(
            f"scale_shift 8 tasks {what}",
            lambda: scale_shift(x, rows, dim=dim, index=index),
            {"eager": of_rows, "copy": lambda: out.copy_(x)},
            bytes=2 * size,
        ),
        Case(
            f"scale_shift with gradients {what}",
            lambda: _with_gradients(partial(scale_shift, dim=dim), x, scale, shift),
            {
                "eager": lambda: _with_gradients(eager, x, scale, shift),
                "ref": lambda: _with_gradients(
                    partial(scale_shift, dim=dim, impl="ref"), x, scale, shift
                ),
            },
            bytes=5 * size,
            target=1.2,
        ),
    ]


def cases() -> list[Case]:
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        x = torch.randn(2, 1024, 1152).to(dtype)
        result += _cases(x, -1, f"[2, 1024, 1152] {name}")
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 320, 64, 64).to(dtype).to(memory_format=layout)
            result += _cases(x, 1, f"[2, 320, 64, 64] {name} {str(layout)[6:]}")
    return result
