"""Experts' layers of int8 at the sizes of DiT-MoE-S and -B, 2 of 8: on tokens that are quantised
already and on floats, beside the grouped product of floats; rows even and all uneven."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _case import Case
from torch import Tensor

from fastdiff.ops import grouped_linear, grouped_quant_linear, quantize, quantize_experts


def _cases(what: str, shares: list[int], k: int, n: int) -> list[Case]:
    rows = sum(shares)
    x, weight = torch.randn(rows, k), torch.randn(len(shares), n, k) / k**0.5
    offsets = torch.tensor([0, *shares]).cumsum(0)
    tokens, whole = quantize(x, impl="ref"), quantize_experts(weight)
    arms: dict[str, Callable[[], Tensor]] = {"floats": lambda: grouped_linear(x, weight, offsets)}
    runs: dict[str, Callable[[], Tensor]] = {
        "int8 tokens": lambda: grouped_quant_linear(tokens, whole, offsets),
        "float32": lambda: grouped_quant_linear(x, whole, offsets),
    }
    flops = 2.0 * rows * k * n
    name = f"{what}, {rows} rows, {k} to {n}"
    return [
        Case(f"{name}, {kind}", run, arms, flops=flops, comparable=False, target=1.0)
        for kind, run in runs.items()
    ]


def cases() -> list[Case]:
    even, uneven, few = [128] * 8, [700, 0, 200, 3, 60, 1, 0, 60], [4] * 8
    return [
        *_cases("DiT-MoE-S", even, 384, 3072),
        *_cases("DiT-MoE-B", uneven, 768, 6144),
        *_cases("DiT-MoE-B", few, 3072, 768),
    ]
