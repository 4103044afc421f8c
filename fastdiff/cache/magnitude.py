r"""Magnitude ratio (MagCache, Ma et al. 2025, arXiv:2506.09045): a calibrated schedule.

The ratio of the residual's magnitude to that of the step before,

    gamma_t = mean over samples and tokens of |r_t| / |r_{t-1}|    (L2 norm over channels),

is nearly the same for all inputs of a model. Measured once, it says before a run how far a reused
residual would be off: reuse at steps t+1, t+2, ... after a computed step t adds up

    e <- e + |1 - gamma_{t+1} ... gamma_{t+k}|

and goes on while e <= threshold, for at most ``most`` steps in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fastdiff.cache._check import extrapolation, number, whole


@dataclass(frozen=True)
class MagnitudeRatio:
    """Reuse the residual of all blocks while its magnitude, as calibrated, changes little.

    Args:
        ratios: gamma of every step of a run, the first is 1; from
            :func:`fastdiff.calibrate.magnitude_ratios`. For runs of another length the nearest
            entries are taken. Empty: everything is computed.
        threshold: of the accumulated error; 0 reuses nothing.
        most: reuses in a row, at least 1.
        retention: share of the run's first steps that are all computed, 0 to 1.
        order: of the forecast from what was computed, 0 (reuse) to 4.
        method: of :mod:`fastdiff.cache.extrapolate`.

    Raises:
        ValueError: an argument does not fit.
    """

    ratios: Sequence[float] = ()
    threshold: float = 0.06
    most: int = 3
    retention: float = 0.2
    order: int = 0
    method: str = "lagrange"

    def __post_init__(self) -> None:
        who = "MagnitudeRatio"
        object.__setattr__(self, "ratios", tuple(self.ratios))
        for value in self.ratios:
            number(who, "ratios", value, 0, 1e9, "numbers of at least 0")
        number(who, "threshold", self.threshold, 0, 1e9, "a number of at least 0")
        number(who, "retention", self.retention, 0, 1, "a number from 0 to 1")
        whole(who, "most", self.most, 1)
        extrapolation(who, self.order, self.method)

    @property
    def neutral(self) -> bool:
        """It computes everything."""
        return self.threshold == 0 or not self.ratios

    def full(self, step: int, steps: int | None) -> bool:
        """Step ``step`` of ``steps``, from 0, is computed.

        Raises:
            ValueError: the number of steps is not known.
        """
        if self.neutral:
            return True
        if steps is None:
            raise ValueError("MagnitudeRatio: need the number of steps of the run")
        return step in _computed(self, steps)


@lru_cache(maxsize=64)
def _computed(policy: MagnitudeRatio, steps: int) -> frozenset[int]:
    count = len(policy.ratios)
    found, error, product, row = {0}, 0.0, 1.0, 0
    for step in range(1, steps):
        nearest = round(step * (count - 1) / max(steps - 1, 1))
        product *= policy.ratios[nearest]
        error, row = error + abs(1 - product), row + 1
        early = step < policy.retention * steps
        if early or error > policy.threshold or row > policy.most:
            found.add(step)
            error, product, row = 0.0, 1.0, 0
    return frozenset(found)
