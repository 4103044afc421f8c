"""The norms of DiT-XL/2 at 512 pixels (1024 tokens of 1152) and of 4096 tokens of 640."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import gate_residual, gate_residual_norm_modulate, layer_norm_modulate


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _chain(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    r = x + gate[:, None] * y
    return r, _modulate(r, shift, scale)


def _with_gradients(chain: Callable[..., tuple[Tensor, Tensor]], *parts: Tensor) -> Any:
    leaves = [t.detach().requires_grad_() for t in parts]
    outputs = chain(*leaves)
    return torch.autograd.grad(outputs, leaves, outputs)


def cases() -> list[Case]:
    result = []
    for shape in ((2, 1024, 1152), (2, 4096, 640)):
        for dtype in (torch.float32, torch.bfloat16):
            x, y = torch.randn(2, *shape).to(dtype)
            gate, shift, scale = torch.randn(shape[0], 6 * shape[-1]).to(dtype).chunk(6, 1)[:3]
            out, out2 = torch.empty_like(x), torch.empty_like(x)
            what = f"{list(shape)} {str(dtype)[6:]}"
            size = float(x.numel() * x.element_size())
            result += [
                Case(
                    f"layer_norm_modulate {what}",
                    lambda a=(x, shift, scale): layer_norm_modulate(*a),
                    {
                        "eager": lambda a=(x, shift, scale): _modulate(*a),
                        "copy": lambda x=x, o=out: o.copy_(x),
                    },
                    bytes=2 * size,
                    target=3.0,
                    also={"copy": 1 / 1.5},
                ),
                Case(
                    f"gate_residual {what}",
                    lambda a=(x, y, gate): gate_residual(*a),
                    {
                        "eager": lambda x=x, y=y, g=gate: x + g[:, None] * y,
                        "addcmul": lambda x=x, y=y, g=gate: torch.addcmul(x, g[:, None], y),
                    },
                    bytes=3 * size,
                ),
                Case(
                    f"gate_residual_norm_modulate {what}",
                    lambda a=(x, y, gate, shift, scale): gate_residual_norm_modulate(*a),
                    {
                        "eager": lambda a=(x, y, gate, shift, scale): _chain(*a),
                        "two copies": lambda x=x, y=y, o=out, p=out2: (o.copy_(x), p.copy_(y)),
                    },
                    bytes=4 * size,
                    target=3.0,
                    also={"two copies": 1 / 1.5},
                ),
                Case(
                    f"gate_residual_norm_modulate with gradients {what}",
                    lambda a=(x, y, gate, shift, scale): _with_gradients(
                        gate_residual_norm_modulate, *a
                    ),
                    {
                        "eager": lambda a=(x, y, gate, shift, scale): _with_gradients(_chain, *a),
                        "ref": lambda a=(x, y, gate, shift, scale): _with_gradients(
                            partial(gate_residual_norm_modulate, impl="ref"), *a
                        ),
                    },
                    bytes=10 * size,
                    target=1.2,
                ),
            ]
    return result
