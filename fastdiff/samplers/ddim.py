r"""DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16), on any Gaussian path.

    x_s = alpha_s x0 + sqrt(sigma_s^2 - v^2) eps + v z,   v = eta sigma_s / sigma_t sigma_{t|s},
    sigma_{t|s}^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2

With eta 0 this is Euler's method in ``sigma / alpha``; on straight paths it is ``x + (s' - s) velocity``.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.samplers.table import Schedule, Table, build, to_eps, to_x0


@dataclass(frozen=True)
class DDIM:
    """``eta`` 0: deterministic; 1: the ancestral variance. ``rederive``: eps from the clipped x0."""

    eta: float = 0.0
    spacing: str = "trailing"
    rederive: bool = True

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table:
        alpha, sigma, t = schedule.levels(steps, self.spacing)
        alpha_t, sigma_t, alpha_s, sigma_s = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
        jump = (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).clamp(min=0).sqrt()
        v = self.eta * sigma_s / sigma_t * jump
        direction = (sigma_s**2 - v**2).clamp(min=0).sqrt()
        a_x, a_m = to_x0(prediction, alpha_t, sigma_t)
        e_x, e_m = to_eps(prediction, alpha_t, sigma_t)
        c = {"a_x": a_x, "a_m": a_m, "sigma": v, "r_a": alpha_s, "r_b": sigma_s}
        if clip is not None and self.rederive:
            c |= {"c_x": direction / sigma_t, "c_0": alpha_s - direction * alpha_t / sigma_t}
        else:
            c |= {"c_x": direction * e_x, "c_0": alpha_s, "c_m": direction * e_m}
        return build(t, c, clip=clip)
