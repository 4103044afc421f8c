r"""Ancestral sampling of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 7), on any Gaussian path.

    x_s = alpha_s sigma_{t|s}^2 / sigma_t^2 x0 + alpha_t / alpha_s sigma_s^2 / sigma_t^2 x_t + v z

``v^2`` is the posterior variance ``sigma_s^2 sigma_{t|s}^2 / sigma_t^2`` ("small") or
``sigma_{t|s}^2``, which on neighbouring training steps is beta_t ("large").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdiff.samplers.ddim import jump_variance
from fastdiff.samplers.schedule import Schedule
from fastdiff.samplers.table import Table, build, to_x0


@dataclass(frozen=True)
class DDPM:
    """``variance`` "small", "large" or "learned" (the second half of the model's channels, between
    both); the last step draws no noise."""

    variance: str = "small"
    spacing: str = "trailing"

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table:
        known = ("small", "large", "learned")
        if self.variance not in known:
            raise ValueError(f"DDPM: variance is {self.variance!r}, need one of {', '.join(known)}")
        alpha, sigma, t = schedule.levels(steps, self.spacing)
        alpha_s, sigma_s, sigma_t = alpha[1:], sigma[1:], sigma[:-1]
        jump = jump_variance(alpha, sigma)
        small = sigma_s / sigma_t * jump.sqrt()
        v = torch.where(sigma_s > 0, jump.sqrt(), 0.0) if self.variance == "large" else small
        logs = None
        if self.variance == "learned":
            logs = (small**2).clamp(min=1e-20).log(), jump.clamp(min=1e-20).log()
        a_x, a_m = to_x0(prediction, alpha[:-1], sigma_t)
        columns = {
            "a_x": a_x, "a_m": a_m, "c_x": alpha[:-1] / alpha_s * (sigma_s / sigma_t) ** 2,
            "c_0": alpha_s * jump / sigma_t**2, "sigma": v, "r_a": alpha_s, "r_b": sigma_s,
        }  # fmt: skip
        return build(t, columns, at=(alpha[:-1], sigma[:-1]), clip=clip, learned=logs)
