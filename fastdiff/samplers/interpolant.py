r"""Stochastic interpolants (Albergo, Boffi & Vanden-Eijnden 2023, arXiv:2303.08797): paths between
two data laws, and the tables of their samplers.

    x_t = a(t) x0 + b(t) x1 + gamma(t) z,    x0 ~ rho_0, x1 ~ rho_1, z ~ N(0, I), t from 0 to 1
    drift b(x, t) = E[a' x0 + b' x1 + gamma' z | x_t = x]
    score s(x, t) = -E[z | x_t = x] / gamma
    v(x, t) = E[a' x0 + b' x1 | x_t = x],    b = v - gamma gamma' s

    linear: a = 1 - t, b = t     trig: a = cos(pi t / 2), b = sin(pi t / 2)
    encdec: a = cos^2(pi t) before t = 1/2 and 0 after, b the other way round
    gamma^2 = width 2 t (1 - t)    ("brownian"),    sin^2(pi t)    ("sin2", smooth at both ends)
    one-sided: rho_0 is N(0, I) and x0 the only noise: gamma "none", s = -E[x0 | x_t = x] / a

With encdec, gamma is sin^2(pi t), which is 1 where neither end has a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.samplers.schedule import TIME, Schedule
from fastdiff.samplers.table import Table, build

PATHS = ("linear", "trig", "encdec")
GAMMAS = ("brownian", "sin2", "none")


@dataclass(frozen=True)
class Interpolant:
    """Coefficients of a path at times ``t`` in [0, 1], of any shape, in float64.

    Args:
        path: "linear", "trig" or "encdec".
        gamma: "brownian", "sin2" or "none".
        width: of "brownian": gamma is ``sqrt(2 width t (1 - t))``.

    Raises:
        ValueError: an argument does not fit.
    """

    path: str = "linear"
    gamma: str = "brownian"
    width: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (("path", self.path, PATHS), ("gamma", self.gamma, GAMMAS)):
            if value not in known:
                raise ValueError(
                    f"interpolant: {name} is {value!r}, need one of {', '.join(known)}"
                )
        if not self.width > 0:
            raise ValueError(f"interpolant: width is {self.width!r}, need a number above 0")

    def ends(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and b."""
        t = t.double()
        if self.path == "linear":
            return 1 - t, t
        if self.path == "trig":
            return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        square = torch.cos(math.pi * t).square()
        return torch.where(t < 0.5, square, 0.0), torch.where(t > 0.5, square, 0.0)

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a' and b'."""
        t = t.double()
        if self.path == "linear":
            return -torch.ones_like(t), torch.ones_like(t)
        if self.path == "trig":
            half = math.pi / 2
            return -half * torch.sin(half * t), half * torch.cos(half * t)
        slope = -math.pi * torch.sin(2 * math.pi * t)
        return torch.where(t < 0.5, slope, 0.0), torch.where(t > 0.5, slope, 0.0)

    def noise(self, t: Tensor) -> Tensor:
        """gamma."""
        t = t.double()
        if self.gamma == "brownian":
            return (2 * self.width * t * (1 - t)).clamp(min=0).sqrt()
        return torch.sin(math.pi * t).square() if self.gamma == "sin2" else torch.zeros_like(t)

    def noise_slope(self, t: Tensor) -> Tensor:
        """``gamma'``; infinite at the ends of "brownian"."""
        t = t.double()
        if self.gamma == "brownian":
            return self.width * (1 - 2 * t) / self.noise(t)
        if self.gamma == "sin2":
            return math.pi * torch.sin(2 * math.pi * t)
        return torch.zeros_like(t)

    def product(self, t: Tensor) -> Tensor:
        """``gamma gamma'``, finite at the ends."""
        if self.gamma == "brownian":
            return self.width * (1 - 2 * t.double())
        return self.noise(t) * self.noise_slope(t)


@dataclass(frozen=True)
class Drift:
    """Euler's or Heun's steps of ``dX = drift dt + sqrt(2 epsilon) dW``, as a sampler.

    The model gives the drift of that equation as its one prediction, at model times ``1000 t``
    (``prediction`` and ``schedule`` of a run are not looked at). Backward, its time runs down and
    what it gives is the drift per unit of time gone *back*.

    Args:
        backward: from t = 1 to 0.
        epsilon: of the noise; Heun takes 0.
        heun: second order: two calls a step.
        start, stop: times of the first and the last state, 0 <= start < stop <= 1.
    """

    backward: bool = False
    epsilon: float = 0.0
    heun: bool = False
    start: float = 0.0
    stop: float = 1.0

    def times(self, steps: int) -> Tensor:
        """``[steps + 1]`` float64, in the order of the states."""
        t = torch.linspace(self.start, self.stop, steps + 1, dtype=torch.float64)
        return t.flip(0) if self.backward else t

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table:
        if clip is not None:
            raise ValueError(f"interpolant: clip is {clip}, need None: a drift is not clipped")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"interpolant: start and stop are {self.start} and {self.stop}, need 0 <= start < "
                "stop <= 1"
            )
        if not 0 <= self.epsilon < math.inf or (self.heun and self.epsilon):
            raise ValueError(
                f"interpolant: epsilon is {self.epsilon}, need a number of at least 0 (0 with heun)"
            )
        t = self.times(steps)
        dt = (self.stop - self.start) / steps
        one = torch.ones(steps * (2 if self.heun else 1), dtype=torch.float64)
        if self.heun:
            at = torch.stack((t[:-1], t[1:]), 1).flatten()
            second = torch.arange(2 * steps) % 2 == 1
            columns = {
                "c_x": torch.where(second, 0.0, one),
                "c_m": torch.where(second, 0.5 * dt, dt * one),
                "c_h1": torch.where(second, one, 0.0),
                "k_x": torch.where(second, 0.0, one),
                "k_m": torch.where(second, 0.0, 0.5 * dt * one),
            }
        else:
            at = t[:-1]
            columns = {"c_x": one, "c_m": dt * one, "sigma": math.sqrt(2 * self.epsilon * dt) * one}
        # What a run takes for alpha and sigma: a drift means no x0, and nothing asks for one.
        return build(TIME * at, columns, at=(one, one), clip=None)
