"""Linear layers of int8 at the sizes of DiT-XL and DiT-S, and with few rows their modulations: on
tokens that are quantised already, on floats, and with groups of 64 columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import quant_linear, quantize, quantize_weight


def _cases(rows: int, k: int, n: int) -> list[Case]:
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    tokens, whole = quantize(x, impl="ref"), quantize_weight(weight)
    grouped = quantize_weight(weight, group=64)
    turned = whole.values.t()
    arms: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: F.linear(x, weight, bias),
        "int_mm": lambda: torch._int_mm(tokens.values, turned),  # the product alone
    }
    shape, flops = f"[{rows}, {k}] x [{n}, {k}]", 2.0 * rows * k * n
    runs: dict[str, Callable[[], Tensor]] = {
        "int8 tokens": lambda: quant_linear(tokens, whole, bias),
        "float32": lambda: quant_linear(x, whole, bias),
        "float32, groups of 64": lambda: quant_linear(x, grouped, bias),
    }
    return [
        Case(f"{shape} {name}", run, arms, flops=flops, comparable=False, target=1.0)
        for name, run in runs.items()
    ]


def cases() -> list[Case]:
    shapes = ((1024, 1152, 4608), (512, 384, 1536), (4, 1152, 6912))
    return [case for shape in shapes for case in _cases(*shape)]
