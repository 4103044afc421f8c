r"""Multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

f   = c_skip(t) x + c_out(t) x0,   x_s = alpha_s f + sigma_s z   (no noise at the clean end)
c_skip = d^2 / ((k t)^2 + d^2),   c_out = k t / sqrt((k t)^2 + d^2),   d = 0.5, k = 10
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdiff.samplers.schedule import VP, Schedule
from fastdiff.samplers.table import Table, build, to_x0


@dataclass(frozen=True)
class LCM:
    """``original_steps``: steps of the solver that was distilled; the levels are among its own."""

    original_steps: int = 50
    time_scaling: float = 10.0
    sigma_data: float = 0.5

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table:
        if not isinstance(schedule, VP):
            raise ValueError(
                f"LCM: schedule is {type(schedule).__name__}, need VP: it has timesteps"
            )
        if steps > self.original_steps:
            raise ValueError(f"LCM: steps is {steps}, need at most {self.original_steps}")
        train_steps = schedule.train_steps
        origin = torch.arange(1, self.original_steps + 1) * (train_steps // self.original_steps) - 1
        index = torch.linspace(0, self.original_steps, steps + 1, dtype=torch.float64)[:-1].floor()
        step = origin.flip(0)[index.long()].double()
        alpha, sigma, t = schedule.at_timesteps(step)
        a_x, a_m = to_x0(prediction, alpha[:-1], sigma[:-1])
        scaled, d2 = self.time_scaling * step, self.sigma_data**2
        c_skip, c_out = d2 / (scaled**2 + d2), scaled / (scaled**2 + d2).sqrt()
        columns = {
            "a_x": a_x, "a_m": a_m, "c_x": alpha[1:] * c_skip, "c_0": alpha[1:] * c_out,
            "sigma": sigma[1:], "r_a": alpha[1:], "r_b": sigma[1:],
        }  # fmt: skip
        return build(t, columns, at=(alpha[:-1], sigma[:-1]), clip=clip)
