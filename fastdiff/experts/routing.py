"""Routes kept over steps: which experts a token goes to changes slowly along a run.

With ``grouped_linear`` routing is a few per cent of a layer, so little time is to be won; what is
kept with it is the choice itself, so that a token does not change its experts from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.cache._check import whole


@dataclass(frozen=True)
class RoutingReuse:
    """Route at every ``interval``-th step, and use the experts and gates of then between.

    Args:
        interval: 1 routes at every step.
        warmup: first steps that all route, at least 1.

    Raises:
        ValueError: an argument does not fit.
    """

    interval: int = 2
    warmup: int = 1

    def __post_init__(self) -> None:
        whole("RoutingReuse", "interval", self.interval, 1)
        whole("RoutingReuse", "warmup", self.warmup, 1)

    @property
    def neutral(self) -> bool:
        """It routes at every step."""
        return self.interval == 1

    def full(self, step: int, steps: int | None) -> bool:
        """Step ``step``, from 0, routes."""
        return step < self.warmup or (step - self.warmup + 1) % self.interval == 0
