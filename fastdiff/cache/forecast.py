r"""Forecasts of features (after TaylorSeer, Liu et al. 2025, arXiv:2503.06923) on a fixed schedule.

The residual F of a stack of blocks is computed at some steps and continued as a polynomial through
the last ``order + 1`` of them, in Lagrange's form, which takes nodes that are unevenly spaced:

    F(s) = sum_j F(s_j) prod_{i != j} (s - s_i) / (s_j - s_i)

Order 0 reuses the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdiff.cache._check import whole


@dataclass(frozen=True)
class Forecast:
    """Compute every ``interval``-th step, forecast the others.

    Args:
        interval: after ``warmup`` steps every N-th is computed; 1 forecasts nothing.
        order: of the polynomial, 0 to 4; lower while fewer steps have been computed.
        warmup: first steps that are all computed, at least 1.
        last: the last step of a run is computed, where the number of steps is known.

    Raises:
        ValueError: an argument does not fit.
    """

    interval: int = 3
    order: int = 1
    warmup: int = 2
    last: bool = False

    def __post_init__(self) -> None:
        whole("Forecast", "interval", self.interval, 1)
        whole("Forecast", "order", self.order, 0)
        whole("Forecast", "warmup", self.warmup, 1)
        if self.order > 4:
            raise ValueError(f"Forecast: order is {self.order}, need at most 4")

    def full(self, step: int, steps: int | None) -> bool:
        """Step ``step`` of ``steps``, from 0, is computed."""
        if self.last and steps is not None and step == steps - 1:
            return True
        return step < self.warmup or (step - self.warmup + 1) % self.interval == 0


def lagrange(nodes: Sequence[int], step: int) -> list[float]:
    """Weights of the values at ``nodes`` (distinct) for the value at ``step``."""
    weights = []
    for j, here in enumerate(nodes):
        weight = 1.0
        for i, other in enumerate(nodes):
            if i != j:
                weight *= (step - other) / (here - other)
        weights.append(weight)
    return weights
