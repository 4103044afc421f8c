"""Group norm and SiLU of a U-Net: 320 channels at 64 x 64, 1280 at 16 x 16, both layouts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import group_norm_silu


def _with_gradients(norm: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = norm(leaves[0], 32, *leaves[1:])
    return torch.autograd.grad(y, leaves, y)


def cases() -> list[Case]:
    result = []
    for shape in ((2, 320, 64, 64), (2, 1280, 16, 16)):
        for layout in (torch.contiguous_format, torch.channels_last):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(shape).to(dtype).to(memory_format=layout)
                weight, bias = torch.randn(2, shape[1]).to(dtype)
                out = torch.empty_like(x)
                result.append(
                    Case(
                        f"{list(shape)} {str(dtype)[6:]} {str(layout)[6:]}",
                        lambda a=(x, 32, weight, bias): group_norm_silu(*a),
                        {
                            "eager": lambda a=(x, 32, weight, bias): F.silu(F.group_norm(*a)),
                            "copy": lambda x=x, o=out: o.copy_(x),
                        },
                        bytes=2.0 * x.numel() * x.element_size(),
                        target=2.0,
                        also={"copy": 1 / 1.8},
                    )
                )
                result.append(
                    Case(
                        f"with gradients {list(shape)} {str(dtype)[6:]} {str(layout)[6:]}",
                        lambda a=(x, weight, bias): _with_gradients(group_norm_silu, *a),
                        {
                            "eager": lambda a=(x, weight, bias): _with_gradients(
                                lambda *b: F.silu(F.group_norm(*b)), *a
                            ),
                            "ref": lambda a=(x, weight, bias): _with_gradients(
                                partial(group_norm_silu, impl="ref"), *a
                            ),
                        },
                        bytes=5.0 * x.numel() * x.element_size(),
                    )
                )
    return result
