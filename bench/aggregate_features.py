"""Features of three models into one, at the finest level of Stable Diffusion's U-Net and DiT-XL/2's
1024 tokens, with one map for all channels or one for each; and with gradients, as training of an
aggregator needs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _case import Case
from torch import Tensor

from fastdiff.ops import aggregate_features

MODELS = 3


def _eager(x: Tensor, logits: Tensor) -> Tensor:
    return (logits.softmax(0) * x).sum(0)


def _with_gradients(op: Callable[..., Tensor], *parts: Tensor) -> Any:
    leaves = [t.detach().requires_grad_() for t in parts]
    y = op(*leaves)
    return torch.autograd.grad(y, leaves, y)


def _case(x: Tensor, logits: Tensor, what: str) -> list[Case]:
    out = torch.empty_like(x)
    size, maps = (float(t.numel() * t.element_size()) for t in (x, logits))
    return [
        Case(
            f"aggregate_features {what}",
            lambda: aggregate_features(x, logits),
            {"eager": lambda: _eager(x, logits), "copy of x": lambda: out.copy_(x)},
            bytes=size + maps + size / MODELS,
            target=1.5,
        ),
        Case(
            f"aggregate_features with gradients {what}",
            lambda: _with_gradients(aggregate_features, x, logits),
            {
                "eager": lambda: _with_gradients(_eager, x, logits),
                "ref": lambda: _with_gradients(partial(aggregate_features, impl="ref"), x, logits),
            },
            bytes=3 * size + 3 * maps + 2 * size / MODELS,
            target=1.2,
        ),
    ]


def cases() -> list[Case]:
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        image = torch.randn(MODELS, 2, 320, 64, 64).to(dtype)
        inner = image.movedim(2, -1).contiguous().movedim(-1, 2)
        shared = torch.randn(MODELS, 2, 1, 64, 64).to(dtype)
        what = f"{MODELS} x [2, 320, 64, 64] {name}"
        result += _case(image, shared, what)
        result += _case(inner, shared, f"{what} channels_last")
        result += _case(image, torch.randn_like(image), f"{what}, a map of each channel")
        tokens = torch.randn(MODELS, 2, 1024, 1152).to(dtype).movedim(-1, 2)
        maps = torch.randn(MODELS, 2, 1, 1024).to(dtype)
        result += _case(tokens, maps, f"{MODELS} x [2, 1024, 1152] {name}")
    return result
