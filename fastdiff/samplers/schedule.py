r"""Noise schedules, and the levels that a sampler visits.

At a level the state is ``x = alpha x0 + sigma eps``. The state is what the model sees: the input
scaling of variance-exploding samplers is folded into alpha and sigma, so that no step scales its
input. Model time ``t`` runs over 0..1000 (:class:`EDM`: ln(sigma) / 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

TIME = 1000  # model time of a schedule's noisy end


class Levels(NamedTuple):
    """Noise levels, noisiest first; float64 on the CPU."""

    alpha: Tensor  # [n + 1]
    sigma: Tensor  # [n + 1], the last is 0
    t: Tensor  # [n], model time


class Schedule(Protocol):
    """A family of noise levels."""

    def levels(self, steps: int, spacing: str, extra: int = 0) -> Levels:
        """The ``steps`` levels of a run and the clean end; ``extra`` as in :func:`timesteps`."""
        ...

    def at(self, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(alpha, sigma, t)`` of the levels where ``sigma / alpha`` is ``ratio``."""
        ...


def timesteps(steps: int, spacing: str, train_steps: int = 1000, extra: int = 0) -> Tensor:
    """Training timesteps to visit, highest first, float64 ``[steps]`` (Lin et al. 2023, table 2).

    Args:
        steps: 1..train_steps.
        spacing: "trailing" starts at the last training step, "leading" ends at the first,
            "linspace" does both.
        extra: points after the last that are laid out and dropped (DPM-Solver: 1).
    """
    if spacing == "linspace":
        t = torch.linspace(0, train_steps - 1, steps + extra, dtype=torch.float64).round().flip(0)
        return t[:steps]
    if spacing == "leading":
        ratio = train_steps // (steps + extra)
        return (torch.arange(steps + extra, dtype=torch.float64) * ratio).flip(0)[:steps]
    if spacing == "trailing":
        stride = train_steps / steps
        return (train_steps - stride * torch.arange(steps, dtype=torch.float64)).round() - 1
    raise ValueError(f"timesteps: spacing is {spacing!r}, need 'leading', 'linspace' or 'trailing'")


def karras_sigmas(steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022 (arXiv:2206.00364), eq. 5, without the final 0; float64 ``[steps]``."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def alphas_cumprod(
    kind: str = "linear", low: float = 1e-4, high: float = 0.02, train_steps: int = 1000
) -> Tensor:
    r"""Cumulative products of ``1 - beta_t``, float64 ``[train_steps]``.

    "linear": betas from ``low`` to ``high`` (Ho et al. 2020); "scaled_linear": their square roots
    (Rombach et al. 2022); "cosine": Nichol & Dhariwal 2021, eq. 17, betas at most 0.999.
    """
    if kind == "linear":
        beta = torch.linspace(low, high, train_steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        beta = torch.linspace(low**0.5, high**0.5, train_steps, dtype=torch.float64) ** 2
    elif kind == "cosine":
        s = torch.arange(train_steps + 1, dtype=torch.float64) / train_steps
        bar = torch.cos((s + 0.008) / 1.008 * torch.pi / 2) ** 2
        beta = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(
            f"alphas_cumprod: kind is {kind!r}, need 'linear', 'scaled_linear' or 'cosine'"
        )
    return torch.cumprod(1 - beta, 0)


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Lin et al. 2023 (arXiv:2305.08891), algorithm 1: shifted and scaled so that the last is 0."""
    root = alpha_bar.double().sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def sigma_to_t(sigmas: Tensor, table: Tensor) -> Tensor:
    """Fractional timestep of each sigma: linear in log sigma, clamped to the ends of ``table``."""
    x, logs = sigmas.log(), table.log()
    low = (torch.searchsorted(logs, x.contiguous(), right=True) - 1).clamp(0, len(logs) - 2)
    return low + ((x - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)


def to_clean(alpha: Tensor, sigma: Tensor, t: Tensor) -> Levels:
    """These levels and the clean end."""
    return Levels(torch.cat((alpha, alpha.new_ones(1))), torch.cat((sigma, sigma.new_zeros(1))), t)


@dataclass(frozen=True, eq=False)
class VP:
    """Variance-preserving, discrete time: ``alpha_t^2 = alpha_bar_t = 1 - sigma_t^2``.

    Args:
        alpha_bar: ``[T]``, decreasing, in [0, 1); None for linear betas 1e-4..0.02 and T = 1000.
        karras: levels from Karras sigmas between the ends of the spaced levels; t is fractional.
        offset: added to every timestep of "leading" spacing.
    """

    alpha_bar: Tensor | None = None
    karras: bool = False
    offset: int = 0

    def _bar(self) -> Tensor:
        return alphas_cumprod() if self.alpha_bar is None else self.alpha_bar.double().cpu()

    @property
    def train_steps(self) -> int:
        return len(self._bar())

    def at_timesteps(self, t: Tensor) -> Levels:
        """The levels of training timesteps ``t``, and the clean end."""
        bar = self._bar()
        level = bar[t.long()]
        return to_clean(level.sqrt(), (1 - level).sqrt(), t * (TIME / len(bar)))

    def at(self, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bar = self._bar()
        alpha = (1 + ratio**2).rsqrt()
        t = sigma_to_t(ratio, ((1 - bar) / bar).sqrt()) * (TIME / len(bar))
        return alpha, ratio * alpha, t

    def levels(self, steps: int, spacing: str, extra: int = 0) -> Levels:
        train_steps = self.train_steps
        if steps + extra > train_steps:
            raise ValueError(
                f"levels: steps is {steps}, need at most {train_steps - extra}, the training steps"
            )
        t = timesteps(steps, spacing, train_steps, extra)
        if spacing == "leading":
            t = (t + self.offset).clamp(0, train_steps - 1)
        levels = self.at_timesteps(t)
        if not self.karras:
            return levels
        ratio = levels.sigma[:-1] / levels.alpha[:-1]
        return to_clean(*self.at(karras_sigmas(steps, float(ratio[-1]), float(ratio[0]))))


@dataclass(frozen=True)
class Flow:
    r"""Straight paths ``x = (1 - s) x0 + s eps``, ``t = 1000 s`` (Liu et al., arXiv:2209.03003).

    Args:
        shift: ``s -> shift s / (1 + (shift - 1) s)`` (Esser et al. 2024, arXiv:2403.03206, eq. 23).

    ``s`` is 1, (n-1)/n, ..., 1/n; with "linspace" spacing the last is 1/1000.
    """

    shift: float = 1.0

    def at(self, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = 1 / (1 + 1 / ratio)  # 1 at an infinite ratio
        return 1 - s, s, TIME * s

    def levels(self, steps: int, spacing: str, extra: int = 0) -> Levels:
        last = 1 / TIME if spacing == "linspace" else 1 / steps
        s = torch.linspace(1, last, steps, dtype=torch.float64)
        s = self.shift * s / (1 + (self.shift - 1) * s)
        return to_clean(1 - s, s, TIME * s)


@dataclass(frozen=True)
class EDM:
    """Karras et al. 2022, table 1: prediction "edm", model input ``c_in x``, t = ln(sigma) / 4."""

    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def at(self, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c_in = (ratio**2 + self.sigma_data**2).rsqrt()
        return c_in, c_in * ratio, ratio.log() / 4

    def levels(self, steps: int, spacing: str, extra: int = 0) -> Levels:
        return to_clean(*self.at(karras_sigmas(steps, self.low, self.high, self.rho)))


@dataclass(frozen=True, eq=False)
class Given:
    """Levels of one's own: ``sigma / alpha`` of each, on another schedule."""

    ratios: Tensor  # [n], decreasing, without the final 0
    base: Schedule

    def at(self, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.base.at(ratio)

    def levels(self, steps: int, spacing: str, extra: int = 0) -> Levels:
        if len(self.ratios) != steps:
            raise ValueError(f"levels: steps is {steps}, need {len(self.ratios)}, the given levels")
        return to_clean(*self.at(self.ratios.double().cpu()))
