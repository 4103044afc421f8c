"""Forecasts of features on a schedule that is known before the run.

The residual of a stack of blocks (on a U-Net: what its depths hand to the join of skip 0) is
computed at some steps, and continued from the last of them at the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdiff.cache._check import extrapolation, step_list, whole


@dataclass(frozen=True)
class Forecast:
    """Compute every ``interval``-th step, forecast the others.

    Args:
        interval: after ``warmup`` steps every N-th is computed; 1 forecasts nothing.
        order: of the forecast, 0 (reuse) to 4; lower while fewer steps have been computed.
        warmup: first steps that are all computed, at least 1.
        last: the last step of a run is computed, where the number of steps is known.
        method: of :mod:`fastdiff.cache.extrapolate`.
        schedule: the computed steps themselves, ascending from 0; ``interval`` and ``warmup`` are
            then not used.

    Raises:
        ValueError: an argument does not fit.
    """

    interval: int = 3
    order: int = 1
    warmup: int = 2
    last: bool = False
    method: str = "lagrange"
    schedule: Sequence[int] | None = None

    def __post_init__(self) -> None:
        whole("Forecast", "interval", self.interval, 1)
        whole("Forecast", "warmup", self.warmup, 1)
        extrapolation("Forecast", self.order, self.method)
        if self.schedule is not None:
            steps = step_list("Forecast", "schedule", self.schedule)
            object.__setattr__(self, "schedule", steps)

    @property
    def neutral(self) -> bool:
        """It computes everything."""
        return self.interval == 1 and self.schedule is None

    def full(self, step: int, steps: int | None) -> bool:
        """Step ``step`` of ``steps``, from 0, is computed."""
        if self.last and steps is not None and step == steps - 1:
            return True
        if self.schedule is not None:
            return step in self.schedule
        return step < self.warmup or (step - self.warmup + 1) % self.interval == 0
