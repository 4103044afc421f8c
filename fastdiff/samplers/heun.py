r"""Euler and Heun steps of the probability-flow ODE with churn (Karras et al. 2022,
arXiv:2206.00364, algorithm 2; on straight paths also of ``dx/ds = eps - x0``).

In ``u = x / N`` and ``tau = sigma / N``, with ``N = alpha`` (so tau is Karras's sigma) or, on
straight paths, ``N = alpha + sigma``, the ODE is ``du/dtau = d``; d is eps, or eps - x0 on straight
paths. A step from tau to tau' is

    u1 = u + (tau' - tau) d(u, tau)                  Euler; in x it is alpha' x0 + sigma' eps
    u' = [u + (tau' - tau) / 2 d(u, tau)] + (tau' - tau) / 2 d(u1, tau')   Heun

and what stands in brackets is the one history entry of the first call. Churn raises the level
before a step from ratio ``rho = sigma / alpha`` to ``(1 + gamma) rho`` by noise of that variance;
it is part of the row of the step before it, so it costs no pass of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.samplers.schedule import Levels, Schedule
from fastdiff.samplers.table import Table, build, eps_columns, to_x0


@dataclass(frozen=True)
class Churn:
    """Karras's S_churn, S_tmin, S_tmax, S_noise; levels in ``sigma / alpha``."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def raised(self, schedule: Schedule, levels: Levels) -> tuple[Levels, Tensor, Tensor]:
        """Levels with churn, and the ``scale`` and ``noise`` that raise the state to each."""
        alpha, sigma, t = (part.clone() for part in levels)
        n = len(t)
        gamma = min(self.s_churn / n, math.sqrt(2) - 1)
        scale, noise = torch.ones_like(alpha), torch.zeros_like(alpha)
        if gamma > 0:
            ratio = sigma[:n] / alpha[:n]  # inf at alpha 0: pure noise, which churn leaves as it is
            on = (ratio >= self.s_tmin) & (ratio <= self.s_tmax) & torch.isfinite(ratio)
            high = (1 + gamma) * ratio[on]
            new_alpha, new_sigma, new_t = schedule.at(high)
            where = torch.nonzero(on)[:, 0]
            scale[where] = new_alpha / alpha[where]
            noise[where] = self.s_noise * new_alpha * (high**2 - ratio[on] ** 2).sqrt()
            alpha[where], sigma[where], t[where] = new_alpha, new_sigma, new_t
        return Levels(alpha, sigma, t), scale, noise


@dataclass(frozen=True)
class Euler(Churn):
    """One call a step. Without churn it is DDIM."""

    spacing: str = "trailing"

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table:
        return _table(self, schedule, schedule.levels(steps, self.spacing), prediction, clip, False)


@dataclass(frozen=True)
class Heun(Churn):
    """Two calls a step but one for the last: 2 n - 1 calls."""

    spacing: str = "trailing"

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table:
        return _table(self, schedule, schedule.levels(steps, self.spacing), prediction, clip, True)


def _table(
    churn: Churn, schedule: Schedule, plain: Levels, prediction: str, clip: float | None, heun: bool
) -> Table:
    high, scale, noise = churn.raised(schedule, plain)
    n = len(plain.t)
    straight = torch.allclose(plain.alpha + plain.sigma, torch.ones_like(plain.alpha))

    def norm(alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha + sigma if straight else alpha

    levels, steps, seconds = [], [], []  # (alpha, sigma, t) of a call, its step, is it the second
    for i in range(n):
        levels.append(torch.stack((high.alpha[i], high.sigma[i], high.t[i])))
        steps.append(i)
        seconds.append(False)
        if heun and i + 1 < n:
            levels.append(torch.stack((plain.alpha[i + 1], plain.sigma[i + 1], plain.t[i + 1])))
            steps.append(i)
            seconds.append(True)
    alpha, sigma, t = torch.stack(levels, 1)
    step, second = torch.tensor(steps), torch.tensor(seconds)
    two = second | torch.cat((second[1:], torch.tensor([False])))  # calls of a two-call step

    to_alpha, to_sigma = plain.alpha[step + 1], plain.sigma[step + 1]
    n_from, n_to = norm(high.alpha[step], high.sigma[step]), norm(to_alpha, to_sigma)
    if heun and (n_from <= 0).any():
        raise ValueError("Heun: the schedule starts at alpha = 0, need finite sigma / alpha")
    delta = to_sigma / n_to - high.sigma[step] / n_from
    a_x, a_m = to_x0(prediction, alpha, sigma)
    e_x, e_0, e_m = eps_columns(prediction, alpha, sigma, clip is not None)
    d_0 = e_0 - 1 if straight else e_0
    # The state that a step ends in is raised to the next step's level; not before a second call.
    ends, begins_two = second | ~two, two & ~second
    lift, half = torch.where(ends, scale[step + 1], 1.0), 0.5 * delta * n_to * scale[step + 1]

    def pick(single: Tensor, pair: Tensor | float) -> Tensor:  # Euler's rows; second calls
        return torch.where(second, pair, single)

    def hold(column: Tensor) -> Tensor:  # entries of first calls
        return torch.where(begins_two, column, 0.0)

    columns = {
        "a_x": a_x, "a_m": a_m,
        "c_x": pick(lift * to_sigma * e_x, half * e_x),
        "c_0": pick(lift * (to_alpha + to_sigma * e_0), half * d_0),
        "c_m": pick(lift * to_sigma * e_m, half * e_m),
        "c_h1": torch.where(second, 1.0, 0.0),
        "k_x": hold(n_to * scale[step + 1] / n_from + half * e_x),
        "k_0": hold(half * d_0), "k_m": hold(half * e_m),
        "sigma": torch.where(ends, noise[step + 1], 0.0),
        "r_a": torch.where(ends, high.alpha[step + 1], to_alpha),
        "r_b": torch.where(ends, high.sigma[step + 1], to_sigma),
    }  # fmt: skip
    first = None
    if noise[0] > 0:
        first = {"c_x": float(scale[0]), "sigma": float(noise[0])}
    return build(t, columns, at=(alpha, sigma), clip=clip, first=first)
