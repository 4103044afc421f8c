r"""DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2) and its SDE form (eq. 18).

With ``lambda = ln(alpha / sigma)``, ``h = lambda_s - lambda_t`` and ``r`` the h before over this h:

    D   = x0 + (x0 - x0_before) / (2 r)
    x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D                                          ODE
    x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z         SDE

The first step and the one to the clean end, where h is infinite, are of first order (D = x0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdiff.samplers.schedule import Schedule
from fastdiff.samplers.table import Multistep, Table, build, to_x0


@dataclass(frozen=True)
class DPMpp2M:
    """``sde``: the stochastic form. Karras sigmas are the schedule's: ``VP(karras=True)``."""

    sde: bool = False
    spacing: str = "linspace"

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table:
        alpha, sigma, t = schedule.levels(steps, self.spacing, extra=1)
        alpha_s, sigma_s, sigma_t = alpha[1:], sigma[1:], sigma[:-1]
        lam = (alpha / sigma).log()  # -inf at alpha 0, inf at the clean end
        shrink = alpha[:-1] * sigma_s / (alpha_s * sigma_t)  # e^-h
        ahead = torch.zeros_like(shrink)  # 1 / (2 r)
        h = lam[1:] - lam[:-1]
        ahead[1:-1] = 0.5 * h[1:-1] / h[:-2]  # 0 after an infinite step
        a_x, a_m = to_x0(prediction, alpha[:-1], sigma_t)
        one = torch.ones_like(shrink)
        if self.sde:
            c_x, c_d = sigma_s / sigma_t * shrink, alpha_s * (1 - shrink**2)
            v = sigma_s * (1 - shrink**2).sqrt()
        else:
            c_x, c_d, v = sigma_s / sigma_t, alpha_s * (1 - shrink), 0 * one
        columns = {
            "a_x": a_x, "a_m": a_m, "c_x": c_x, "c_0": c_d * (1 + ahead), "c_h1": -c_d * ahead,
            "k_0": one, "sigma": v, "r_a": alpha_s, "r_b": sigma_s,
        }  # fmt: skip
        multistep = Multistep.of(lam[:-1], a_x, a_m, clip)
        return build(t, columns, at=(alpha[:-1], sigma[:-1]), clip=clip, multistep=multistep)
