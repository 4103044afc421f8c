r"""DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16), on any Gaussian path.

    x_s = alpha_s x0 + sqrt(sigma_s^2 - v^2) eps + v z,   v = eta sigma_s / sigma_t sigma_{t|s},
    sigma_{t|s}^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2

With eta 0 this is Euler's method in ``sigma / alpha``, and on straight paths Euler's in ``s``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastdiff.samplers.schedule import Schedule
from fastdiff.samplers.table import Table, build, eps_columns, to_x0


def jump_variance(alpha: Tensor, sigma: Tensor) -> Tensor:
    """``sigma_{t|s}^2`` of neighbouring levels: the variance of ``q(x_t | x_s)``."""
    return (sigma[:-1] ** 2 - (alpha[:-1] / alpha[1:]) ** 2 * sigma[1:] ** 2).clamp(min=0)


@dataclass(frozen=True)
class DDIM:
    """``eta`` 0: deterministic, 1: ancestral variance. ``rederive``: eps from the clipped x0."""

    eta: float = 0.0
    spacing: str = "trailing"
    rederive: bool = True

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table:
        alpha, sigma, t = schedule.levels(steps, self.spacing)
        alpha_s, sigma_s = alpha[1:], sigma[1:]
        v = self.eta * sigma_s / sigma[:-1] * jump_variance(alpha, sigma).sqrt()
        direction = (sigma_s**2 - v**2).clamp(min=0).sqrt()
        a_x, a_m = to_x0(prediction, alpha[:-1], sigma[:-1])
        e_x, e_0, e_m = eps_columns(
            prediction, alpha[:-1], sigma[:-1], clip is not None and self.rederive
        )
        columns = {
            "a_x": a_x, "a_m": a_m, "c_x": direction * e_x, "c_0": alpha_s + direction * e_0,
            "c_m": direction * e_m, "sigma": v, "r_a": alpha_s, "r_b": sigma_s,
        }  # fmt: skip
        return build(t, columns, at=(alpha[:-1], sigma[:-1]), clip=clip)
