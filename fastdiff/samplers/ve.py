r"""The two stochastic differential equations of Song et al. 2021 (arXiv:2011.13456, section 3.4),
as schedules.

    VE:  x = x0 + sigma eps,   sigma(t) = low (high / low)^t
    VP:  x = alpha x0 + sigma eps,   ln alpha(t) = -(b1 - b0) t^2 / 4 - b0 t / 2,
         sigma^2 = 1 - alpha^2

for t in [0, 1]; model time is 1000 t. The noise of one model is the same function of ``x / alpha``
and ``sigma / alpha`` in all of them (and in the discrete :class:`fastdiff.samplers.VP`), so at the
same ratios they give the same samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.samplers.schedule import TIME, Levels, to_clean


def _times(steps: int, spacing: str, last: float) -> Tensor:
    """From 1 to ``last`` with "linspace" spacing, else 1, (n - 1) / n, ..., 1 / n."""
    last = last if spacing == "linspace" else 1 / steps
    return torch.linspace(1, last, steps, dtype=torch.float64)


@dataclass(frozen=True)
class VE:
    """Variance-exploding: the state is not scaled, so its first is ``start`` times standard noise.

    Args:
        low, high: sigma at the clean and at the noisy end, 0 < low < high.

    Raises:
        ValueError: an argument does not fit.
    """

    low: float = 0.01
    high: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"VE: low, high are {self.low!r}, {self.high!r}, need 0 < low < high")

    @property
    def start(self) -> float:
        """Standard deviation of the first state: drawn so where a sampler is given a shape; a state
        that is given has to be ``start * noise``."""
        return self.high

    def at(self, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = (ratio / self.low).log() / math.log(self.high / self.low)
        return torch.ones_like(ratio), ratio, TIME * t

    def levels(self, steps: int, spacing: str, extra: int = 0) -> Levels:
        t = _times(steps, spacing, 0.0)
        return to_clean(*self.at(self.low * (self.high / self.low) ** t))


@dataclass(frozen=True)
class VPSDE:
    """Variance-preserving in continuous time.

    Args:
        b0, b1: rate of noise beta(t) at t = 0 and 1, 0 <= b0 < b1.
        last: t of the last level with "linspace" spacing.

    Raises:
        ValueError: an argument does not fit.
    """

    b0: float = 0.1
    b1: float = 20.0
    last: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.b0 < self.b1 < math.inf:
            raise ValueError(f"VPSDE: b0, b1 are {self.b0!r}, {self.b1!r}, need 0 <= b0 < b1")
        if not 0 < self.last < 1:
            raise ValueError(f"VPSDE: last is {self.last!r}, need a number in (0, 1)")

    def at(self, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # -2 ln alpha = ln(1 + ratio^2) = (b1 - b0) t^2 / 2 + b0 t; solved without cancellation.
        decay = torch.log1p(ratio**2)
        root = (self.b0**2 + 2 * (self.b1 - self.b0) * decay).sqrt()
        t = 2 * decay / (self.b0 + root)
        alpha = (1 + ratio**2).rsqrt()
        return alpha, ratio * alpha, TIME * t

    def levels(self, steps: int, spacing: str, extra: int = 0) -> Levels:
        t = _times(steps, spacing, self.last)
        decay = (self.b1 - self.b0) * t**2 / 2 + self.b0 * t
        return to_clean((-decay / 2).exp(), (-torch.expm1(-decay)).sqrt(), TIME * t)
