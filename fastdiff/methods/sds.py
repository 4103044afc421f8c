r"""Score distillation (Poole et al. 2022, arXiv:2209.14988, eq. 3): parameters of a renderer, so
that what it renders is likely under a diffusion model.

    x = render(theta),   x_t = alpha x + sigma eps
    grad = E_{t, eps} w(t) (eps_hat(x_t) - eps) dx/dtheta

without a gradient through the model. Level and noise are drawn anew for every update and sample, so
calls have nothing to do with each other: caches are off.

For Gaussian data N(m, S)

    E_eps[grad] = w sigma alpha (x - m) / (alpha^2 S + sigma^2) dx/dtheta
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdiff.methods.guide import schedule_of
from fastdiff.methods.latent_adam import Adam
from fastdiff.methods.particles import uniform
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops.fused_step import philox_normal
from fastdiff.samplers.table import to_eps

LEVEL_STREAM, NOISE_STREAM = 16, 17
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of alpha, sigma
    "sigma2": lambda alpha, sigma: sigma**2,
    "score": lambda alpha, sigma: sigma / alpha,
    "const": lambda alpha, sigma: torch.ones_like(sigma),
}


class Distilled:
    """The gradient with respect to rendered samples, at a level of its own for each.

    Args:
        run: gives model, levels, noise and guidance.
        weight: "sigma2", "score" (sigma / alpha) or "const".
    """

    def __init__(self, run: Trajectory, weight: str = "sigma2"):
        if weight not in WEIGHTS:
            raise ValueError(f"sds: weight is {weight!r}, need one of {', '.join(WEIGHTS)}")
        alpha, sigma = run.alpha[:-1], run.sigma[:-1]
        columns = (
            alpha,
            sigma,
            *to_eps(run.prediction, alpha, sigma),
            WEIGHTS[weight](alpha, sigma),
        )
        self.run = run
        self.columns = torch.stack(columns, 1).to(run.x.device, run.x.dtype)  # [n, 5]
        self.off = "score distillation draws noise anew"

    def _eps(self, x: Tensor, levels: Tensor, e_x: Tensor, e_m: Tensor) -> Tensor:
        run = self.run
        y = run.y
        if run.weights is not None:
            assert y is not None and run.null is not None
            both = torch.cat((torch.full_like(y, run.null), y))
            m = run.predict_rows(torch.cat((levels, levels)), torch.cat((x, x)), both)
            m = run.combined(m.view(2, *x.shape))
        else:
            m = run.predict_rows(levels, x, y)
        return e_x * x + e_m * m.to(x.dtype)

    def __call__(self, x: Tensor, levels: Tensor, eps: Tensor) -> Tensor:
        """``w (eps_hat - eps)``, ``[B, C, ...]``.

        Args:
            x: rendered samples.
            levels: int64 ``[B]``, on the device, 0 the noisiest.
            eps: noise like ``x``.
        """
        shape = (-1, *[1] * (x.dim() - 1))
        alpha, sigma, e_x, e_m, w = (c.view(shape) for c in self.columns[levels].unbind(1))
        request = self.run.request
        with nullcontext() if request is None else request.without(self.off):
            found = self._eps(alpha * x + sigma * eps, levels, e_x, e_m)
        return w * (found - eps)


def score_distillation(
    model: Callable[..., Tensor],
    theta: Tensor,
    render: Callable[[Tensor, int], Tensor],
    *,
    updates: int = 100,
    levels: tuple[int, int] | None = None,
    weight: str = "sigma2",
    lr: float | Sequence[float] | Callable[[int], float] = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    antithetic: bool = False,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Parameters whose renders the model finds likely.

    Args:
        model, cache, settings: as for :func:`fastdiff.sample`; of the sampler only its levels
            count.
        theta: parameters of any shape, floats; not written to.
        render: ``render(theta, k) -> [B, C, ...]`` for update k, differentiable; views may differ.
        updates: of Adam.
        levels: ``(first, stop)`` of the levels drawn from, 0 the noisiest; None: all.
        weight: w(t): "sigma2", "score" (sigma / alpha) or "const".
        lr: of Adam: a number, one for every update, or a function of the update's number.
        betas: of Adam.
        antithetic: two calls each, for eps and -eps.
        callback: ``callback(k, theta, grad)`` after update k, with the gradient that it took.

    Returns:
        As ``theta``.

    Raises:
        ValueError: an argument does not fit.
    """
    if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
        raise ValueError(f"sds: updates is {updates!r}, need an integer of at least 1")
    rates = schedule_of(lr, updates)
    theta = theta.detach()
    with torch.no_grad():
        first = render(theta, 0)
    with running(model, first, cache=cache, **settings) as run:
        if run.rescale:
            raise ValueError(f"sds: guidance_rescale is {run.rescale}, need 0")
        low, stop = (0, len(run)) if levels is None else levels
        if not 0 <= low < stop <= len(run):
            raise ValueError(
                f"sds: levels is {levels!r}, need (first, stop), 0 <= first < stop <= {len(run)}"
            )
        distilled, adam = Distilled(run, weight), Adam(theta, betas)
        for k in range(updates):
            u = uniform((run.batch,), run.noise(LEVEL_STREAM))
            level = (low + (u * (stop - low)).long()).clamp(max=stop - 1)
            eps = philox_normal(first.shape, *run.noise(NOISE_STREAM), dtype=run.x.dtype)
            with torch.enable_grad():
                leaf = theta.clone().requires_grad_()
                x = render(leaf, k)
            if x.shape != first.shape:
                raise ValueError(
                    f"sds: render gives {list(x.shape)} at update {k}, need {list(first.shape)}"
                )
            g = distilled(x.detach(), level, eps)
            if antithetic:
                g = 0.5 * (g + distilled(x.detach(), level, -eps))
            (grad,) = torch.autograd.grad(x, leaf, g.to(x.dtype))
            theta = adam.step(theta, grad, rates[k])
            if callback is not None:
                callback(k, theta, grad)
        return theta
