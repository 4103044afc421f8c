r"""Accumulated distance (TeaCache, Liu et al. 2024, arXiv:2411.19108), for every sample on its own.

The change of the first block's modulated input from step to step stands for that of the output:

    a_b <- a_b + poly(mean |s_b - s'_b| / mean |s'_b|)

with s' of the step before. While a_b <= threshold the residual of all blocks is reused; a computed
step sets a_b to 0. The polynomial maps changes of the input to changes of the output; the authors
fit one for each model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.cache._check import rule
from fastdiff.cache.first_block import Memory, relative_change


@dataclass(frozen=True)
class AccumulatedDistance:
    """Reuse the residual of all blocks until the changes of their input add up.

    On a U-Net the input is the result of the first residual layer of the way down, and what is
    reused is what its depths hand to the join of skip 1.

    Args:
        threshold: of the accumulated distance; 0 reuses nothing.
        coefficients: of the polynomial, the highest power first; (1, 0): the change itself.
        order: of the forecast from what was computed, 0 (reuse) to 4.
        warmup: first steps that are all computed, at least 1.
        most: reuses in a row after which a sample is computed; None: no such limit.
        method: of :mod:`fastdiff.cache.extrapolate`.

    Raises:
        ValueError: an argument does not fit.
    """

    threshold: float = 0.2
    coefficients: Sequence[float] = (1.0, 0.0)
    order: int = 0
    warmup: int = 1
    most: int | None = None
    method: str = "lagrange"

    def __post_init__(self) -> None:
        rule("AccumulatedDistance", self)
        values = tuple(self.coefficients)
        if not values or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise ValueError(
                f"AccumulatedDistance: coefficients is {self.coefficients!r}, need finite numbers"
            )
        object.__setattr__(self, "coefficients", values)

    @property
    def neutral(self) -> bool:
        """It computes everything."""
        return self.threshold == 0

    def distance(self, memory: Memory, signal: Tensor) -> Tensor:
        """``[B]``: what has added up with this step's ``signal [B, ...]``."""
        change = relative_change(signal, memory["signal"])
        total = torch.zeros_like(change)
        for value in self.coefficients:
            total = total * change + value
        return memory["sum"] + total

    def update(
        self, memory: Memory, signal: Tensor, rows: Tensor | None, distance: Tensor | None
    ) -> Memory:
        """Memory for the next step; the samples ``rows`` were computed, None: all of them."""
        kept = signal.clone()  # the network may write over what it is a view of
        if rows is None or distance is None:
            wide = torch.promote_types(signal.dtype, torch.float32)
            return {"signal": kept, "sum": signal.new_zeros(signal.shape[0], dtype=wide)}
        return {"signal": kept, "sum": distance.index_fill(0, rows, 0.0)}
