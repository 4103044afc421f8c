r"""Noise schedules, and the levels that a sampler visits.

At level i the state is ``x = alpha x0 + sigma eps``. The state is what the model sees: the input scaling
of variance-exploding samplers is folded into alpha and sigma, so that no sampler scales its input.
Model time ``t`` runs over 0..1000 for every schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TRAIN_STEPS = 1000


class Levels(NamedTuple):
    """Noise levels from the first to the clean end; float64 on the CPU."""

    alpha: Tensor  # [n + 1]
    sigma: Tensor  # [n + 1], last is 0
    t: Tensor  # [n], model time


def timesteps(steps: int, spacing: str, train_steps: int = TRAIN_STEPS, extra: int = 0) -> Tensor:
    """Training timesteps to visit, highest first, float64 ``[steps]`` (Lin et al. 2023, table 2).

    Args:
        steps: 1..train_steps.
        spacing: "trailing" starts at the last training step; "leading" ends at the first;
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
        ratio = train_steps / steps
        return (train_steps - ratio * torch.arange(steps, dtype=torch.float64)).round() - 1
    raise ValueError(f"timesteps: spacing is {spacing!r}, need 'leading', 'linspace' or 'trailing'")


def karras_sigmas(steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022 (arXiv:2206.00364), eq. 5, without the final 0; float64 ``[steps]``."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def alphas_cumprod(
    kind: str = "linear", low: float = 1e-4, high: float = 0.02, train_steps: int = TRAIN_STEPS
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


@dataclass(frozen=True, eq=False)
class VP:
    """Variance-preserving discrete-time schedule: ``alpha_t^2 = alpha_bar_t``, ``sigma^2 = 1 - alpha^2``.

    Args:
        alpha_bar: ``[T]``, decreasing, in (0, 1); None for linear betas 1e-4..0.02.
        karras: levels from Karras sigmas between the ends of the spaced levels (fractional t).
        karras_ends: "schedule" takes the ends of the whole schedule, "spacing" those of the levels.
    """

    alpha_bar: Tensor | None = None
    karras: bool = False
    karras_ends: str = "spacing"

    def bar(self) -> Tensor:
        return alphas_cumprod() if self.alpha_bar is None else self.alpha_bar.double().cpu()

    def levels(self, steps: int, spacing: str, extra: int = 0) -> Levels:
        bar = self.bar()
        if steps > len(bar):
            raise ValueError(f"levels: steps is {steps}, need at most {len(bar)}, the training steps")
        all_sigmas = ((1 - bar) / bar).sqrt()
        t = timesteps(steps, spacing, len(bar), extra)
        if self.karras:
            ends = all_sigmas if self.karras_ends == "schedule" else all_sigmas[t.long()].flip(0)
            sigmas = karras_sigmas(steps, float(ends[0]), float(ends[-1]))
            t = sigma_to_t(sigmas, all_sigmas)
            alpha = (1 + sigmas**2).rsqrt()
            sigma = sigmas * alpha
        else:
            alpha, sigma = bar[t.long()].sqrt(), (1 - bar[t.long()]).sqrt()
        one, zero = alpha.new_ones(1), alpha.new_zeros(1)
        scale = TRAIN_STEPS / len(bar)
        return Levels(torch.cat((alpha, one)), torch.cat((sigma, zero)), t * scale)


def sigma_to_t(sigmas: Tensor, all_sigmas: Tensor) -> Tensor:
    """Fractional timestep of each sigma: linear in log sigma between the neighbours of the table."""
    x, table = sigmas.log(), all_sigmas.log()
    low = (torch.searchsorted(table, x, right=True) - 1).clamp(0, len(table) - 2)
    return low + ((x - table[low]) / (table[low + 1] - table[low])).clamp(0, 1)


@dataclass(frozen=True)
class Flow:
    r"""Straight paths ``x = (1 - s) x0 + s eps`` (Liu et al. 2022, arXiv:2209.03003), ``t = 1000 s``.

    Args:
        shift: ``s -> shift s / (1 + (shift - 1) s)`` (Esser et al. 2024, arXiv:2403.03206, eq. 23).

    Every spacing but "linspace" takes ``s = 1, (n-1)/n, ..., 1/n``; "linspace" ends at 1/1000.
    """

    shift: float = 1.0

    def levels(self, steps: int, spacing: str, extra: int = 0) -> Levels:
        last = 1 / TRAIN_STEPS if spacing == "linspace" else 1 / steps
        s = torch.linspace(1, last, steps, dtype=torch.float64)
        s = self.shift * s / (1 + (self.shift - 1) * s)
        s = torch.cat((s, s.new_zeros(1)))
        return Levels(1 - s, s, TRAIN_STEPS * s[:-1])
