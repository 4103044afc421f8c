r"""Data whose diffusion is known exactly: mixtures of Gaussians, and what a sampler makes of them.

For ``x0 ~ N(mu, S)`` with diagonal S the noise that explains ``x = alpha x0 + sigma eps`` best is

    eps(x) = sigma (x - alpha mu) / (alpha^2 S + sigma^2)

linear in x, so that a sampler's step is an affine map and the law of its output a Gaussian that
:func:`recursion` computes. That law, and not the data's, is what an exact test compares with: a
sampler of n steps has a bias of order 1/n that no number of samples removes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.samplers import VP, Schedule, Table
from fastdiff.samplers.run import Run


class GaussianModel(nn.Module):
    """The best prediction for Gaussian data, or for a mixture of Gaussians.

    Args:
        mean: ``[K, C, ...]`` of K components (broadcasts to the state).
        variance: ``[K, C, ...]``.
        schedule: of noise: model times are looked up in ``levels``.
        prediction: "eps", "v", "x0" or "flow".
        classes: y picks a component, K is the null class (all components); otherwise y is ignored.
    """

    def __init__(
        self,
        mean: Tensor,
        variance: Tensor,
        *,
        schedule: Schedule | None = None,
        prediction: str = "eps",
        classes: bool = False,
    ):
        super().__init__()
        mean, variance = torch.broadcast_tensors(mean, variance)
        self.mean, self.variance = nn.Parameter(mean.clone()), nn.Parameter(variance.clone())
        self.schedule = schedule or VP()
        self.prediction = prediction
        self.calls: list[Tensor] = []
        if classes:
            self.num_classes = len(mean)

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma ``[B]`` at model times ``t``."""
        if isinstance(self.schedule, VP):
            step = t.double().cpu() * (self.schedule.train_steps / 1000)
            alpha, sigma, _ = self.schedule.at_timesteps(step.round())
            n = len(t)
            return alpha[:n].to(t.device), sigma[:n].to(t.device)
        s = t.double() / 1000
        return 1 - s, s

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls.append(t)
        alpha, sigma = (v.view(-1, *[1] * (x.dim() - 1)) for v in self.level(t))
        wide = x.double()
        mean, variance = self.mean.double(), self.variance.double()
        shape = (-1, len(mean), *[1] * (x.dim() - 1))
        total = alpha[:, None] ** 2 * variance + sigma[:, None] ** 2  # [B, K, ...]
        away = wide[:, None] - alpha[:, None] * mean
        logp = -0.5 * (away**2 / total + total.log()).flatten(2).sum(2)  # [B, K]
        if y is not None and hasattr(self, "num_classes"):
            own = torch.nn.functional.one_hot(y, len(mean) + 1)[:, : len(mean)].bool()
            own = own | (y == len(mean))[:, None]
            logp = logp.masked_fill(~own, -torch.inf)
        share = logp.softmax(1).view(shape)
        eps = (share * sigma[:, None] * away / total).sum(1)
        return convert(self.prediction, wide, eps, alpha, sigma).to(x.dtype)


def convert(prediction: str, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a model of that prediction says where the noise is ``eps``."""
    if prediction == "eps":
        return eps
    x0 = (x - sigma * eps) / alpha.clamp(min=1e-12)  # pure noise: eps is x / sigma, x0 is 0 / 0
    if prediction == "x0":
        return x0
    return alpha * eps - sigma * x0 if prediction == "v" else eps - x0


@torch.no_grad()
def affine(table: Table, run: Run, model: GaussianModel) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``(A, b, s)`` of every step ``x' = A x + b + s z``, for one component, elementwise."""
    assert len(model.mean) == 1
    found = []
    zero, one = torch.zeros_like(model.mean), torch.ones_like(model.mean)
    for i, row in enumerate(table.rows.double()):
        a_x, a_m, c_x, c_0, c_m, *_, sigma, _, _, _, _, _, _ = row.tolist()

        def step(x: Tensor, i: int = i, a: Any = (a_x, a_m, c_x, c_0, c_m)) -> Tensor:
            m = model(x, run.times[i].expand(1), None).double()
            return a[2] * x + a[3] * (a[0] * x + a[1] * m) + a[4] * m

        b = step(zero.double())
        found.append((step(one.double()) - b, b, torch.full_like(b, sigma)))
    return found


def recursion(
    run: Run, model: GaussianModel, mean: Tensor | None = None, variance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[1, C, ...]`` of what the run's sampler gives from ``N(mean, variance)``
    (None: standard normal noise), for samplers without history and without clipping."""
    m = torch.zeros_like(model.mean).double() if mean is None else mean.double()
    v = torch.ones_like(m) if variance is None else variance.double()
    for a, b, s in affine(run.table, run, model):
        m, v = a * m + b, a**2 * v + s**2
    return m.detach(), v.detach()
