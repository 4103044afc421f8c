"""What adapters of rank 16 add to a linear layer, a sample each of eight or one for all: DiT-XL/2
at 256 and 1024 tokens, the DiT of the digits, and Stable Diffusion's U-Net. Beside it the layer
alone, each sample through the layer and two products as PEFT does, the layer with an adapter merged
into its weight (one adapter for all), and two batched products with gathered factors."""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import linear, lora_add, lora_linear

BATCH, RANK = 8, 16


def _case(tokens: int, k: int, n: int, dtype: torch.dtype, adapters: int = 8) -> list[Case]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, weight, bias = draw(BATCH, tokens, k), draw(n, k) / k**0.5, draw(n)
    down, up = draw(adapters, RANK, k) / k**0.5, draw(adapters, n, RANK)
    scale = torch.rand(adapters) + 0.5
    index = 1 + torch.arange(BATCH) % adapters if adapters > 1 else None
    which = [b % adapters for b in range(BATCH)]
    gain = scale.to(dtype)
    y, merged = linear(x, weight, bias), weight + gain[0] * (up[0] @ down[0])

    def samples() -> Tensor:
        parts = []
        for b, a in enumerate(which):
            low = F.linear(x[b], down[a])
            parts.append(F.linear(x[b], weight, bias) + F.linear(low, up[a]) * gain[a])
        return torch.stack(parts)

    def eager() -> Tensor:
        if index is None:
            return y + F.linear(F.linear(x, down[0]), up[0]) * gain[0]
        a = index - 1
        low = torch.bmm(x, down[a].mT)
        return y + gain[a][:, None, None] * torch.bmm(low, up[a].mT)

    what = f"{adapters} of rank {RANK} [{BATCH}, {tokens}, {k}] to {n} {str(dtype)[6:]}"
    size = x.element_size()
    rows = BATCH * tokens
    arms = {
        "samples": samples,
        "layer": lambda: linear(x, weight, bias),
        "merged": lambda: F.linear(x, merged, bias),
    }
    return [
        Case(
            f"lora_add {what}",
            lambda: lora_add(y, x, down, up, scale, index),
            {"eager": eager, "layer": lambda: linear(x, weight, bias)},
            flops=2.0 * rows * RANK * (k + n),
            bytes=float(size * rows * (k + 2 * n)),
            target=1.0,
            also={"layer": 10.0} if min(k, n) > 1000 else {},
        ),
        Case(
            f"lora_linear {what}",
            lambda: lora_linear(x, weight, bias, down, up, scale, index),
            arms,
            flops=2.0 * rows * (k * n + RANK * (k + n)),
            vs="samples",
            target=1.0,
        ),
    ]


def _training(tokens: int, k: int, n: int, dtype: torch.dtype) -> Case:
    """Gradients of x and of both factors of one adapter."""
    y, x = (torch.randn(BATCH, tokens, w).to(dtype) for w in (n, k))
    down, up = torch.randn(1, RANK, k).to(dtype) / k**0.5, torch.randn(1, n, RANK).to(dtype)
    scale, grad = torch.ones(1), torch.randn_like(y)
    leaves = [t.requires_grad_() for t in (x, down, up)]

    def eager() -> tuple[Tensor, ...]:
        out = y + F.linear(F.linear(x, down[0]), up[0]) * 1.0
        return torch.autograd.grad(out, leaves, grad)

    return Case(
        f"lora_add with gradients [{BATCH}, {tokens}, {k}] to {n} {str(dtype)[6:]}",
        lambda: torch.autograd.grad(lora_add(y, x, down, up, scale), leaves, grad),
        {"eager": eager},
        flops=6.0 * BATCH * tokens * RANK * (k + n),
        target=1.0,
    )


def cases() -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (256, 1024):
            for k, n in ((1152, 3456), (1152, 4608), (4608, 1152)):
                found += _case(tokens, k, n, dtype)
        found += _case(64, 192, 192, dtype)
        for tokens, width in ((4096, 320), (1024, 640), (256, 1280)):
            found += _case(tokens, width, width, dtype, adapters=1)
        found.append(_training(256, 1152, 1152, dtype))
    return found
