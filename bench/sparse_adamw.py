"""AdamW on 5 % of the entries of DiT-XL/2's weights, against torch's fused AdamW on the whole
weight and on the packed entries without the weight, and against a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _case import Case
from torch import Tensor

from fastdiff.ops import sparse_adamw_

# Projection into queries, keys and values, first feed-forward layer, modulation.
SHAPES = ((3456, 1152), (4608, 1152), (6912, 1152))
SHARE = 20  # one entry of so many
NUMBERS = dict(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def _state(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameter, gradient and moments."""
    p, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return [p, g, torch.zeros_like(p), torch.rand(shape).to(dtype)]


def _fused(state: list[Tensor]) -> Callable[[], Tensor]:
    """What ``torch.optim.AdamW(fused=True)`` calls for one parameter."""
    parts, count = [[t] for t in state], [torch.full((1,), 3.0)]

    def step() -> Tensor:
        torch._fused_adamw_(
            *parts,
            [],
            count,
            lr=NUMBERS["lr"],
            beta1=NUMBERS["beta1"],
            beta2=NUMBERS["beta2"],
            weight_decay=NUMBERS["weight_decay"],
            eps=NUMBERS["eps"],
            amsgrad=False,
            maximize=False,
        )
        return state[0]

    return step


def _case(shape: tuple[int, int], dtype: torch.dtype, index: torch.dtype) -> Case:
    size = shape[0] * shape[1]
    count = size // SHARE
    # One entry of every run of SHARE, so that they ascend on any device.
    places = torch.arange(count) * SHARE + torch.randint(SHARE, (count,))
    places = places.to(index)
    weight, packed = torch.randn(shape).to(dtype), _state((count,))
    # Memory moves in lines of 64 bytes: at 5 % nearly every one of the weight, to and fro.
    lines = min(64 * count, weight.numel() * weight.element_size())
    bytes = float(count * (7 * 4 + places.element_size()) + 2 * lines)
    source = torch.empty(int(bytes) // 8)  # read once and written once

    def step() -> Tensor:
        return sparse_adamw_(*packed, weight, places, **NUMBERS, step=3)

    return Case(
        f"5% of {list(shape)} {str(dtype)[6:]}, index {str(index)[6:]}",
        step,
        {
            "fused, dense": _fused(_state(shape, dtype)),
            "fused, packed": _fused(_state((count,))),
            "copy": lambda: source.clone(),
        },
        bytes=bytes,
        target=2.5,
        vs="fused, dense",
        comparable=False,  # the dense step is of all entries
    )


def cases() -> list[Case]:
    found = [_case(shape, torch.float32, torch.int32) for shape in SHAPES]
    found.append(_case(SHAPES[1], torch.bfloat16, torch.int32))
    found.append(_case(SHAPES[1], torch.float32, torch.int64))
    return found
