r"""Generation under a linear reward, ``y = g . x0 + noise`` (Guo et al. 2024, arXiv:2404.14743; in
the overview of Chen et al. 2024, arXiv:2404.07771, section 5): samples of ``x0 | y``.

    log p(y | x_t) = -1/2 (y - g . x0_hat(x_t))^2 / (noise^2 + g^T Cov[x0 | x_t] g) + const
    score          = score + beta_t (y - g . x0_hat) J^T g,    beta_t = 1 / (noise^2 + g^T Cov g)
    Cov[x0 | x_t] g = sigma_t^2 / alpha_t J^T g,               J = d x0_hat / d x_t

One product with J^T gives both the direction and beta. For Gaussian data J is a constant and the
guided score is that of ``x0 | y`` exactly; for other data it is exact in the covariance only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.methods.trajectory import Trajectory, running


def linear_reward_guidance(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    direction: Tensor,
    target: float | Tensor,
    *,
    noise: float,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample given the value of a linear reward.

    Args:
        model, x: as for :func:`fastdiff.sample`; the model is differentiable.
        direction: g, ``[C, ...]`` of a sample's shape.
        target: y, one for all or ``[B]``.
        noise: standard deviation of y about ``g . x0``, above 0.
        callback: ``callback(i, run)`` after every step; the run is not to be changed.
        cache, settings: of :func:`fastdiff.sample`.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit.
    """
    if not isinstance(noise, int | float) or not noise > 0:
        raise ValueError(f"linear_reward: noise is {noise!r}, need a number above 0")
    with running(model, x, cache=cache, **settings) as run:
        if direction.shape != run.x.shape[1:]:
            raise ValueError(
                f"linear_reward: direction is {list(direction.shape)}, need {list(run.x.shape[1:])}"
            )
        if isinstance(target, Tensor):
            y = target.to(run.x)
        else:
            y = torch.full((), target, dtype=run.x.dtype, device=run.x.device)
        if y.shape not in ((), (run.batch,)):
            raise ValueError(
                f"linear_reward: target is {list(y.shape)}, need a number or [{run.batch}]"
            )
        g = direction.to(run.x)
        run.start()
        for i in range(len(run)):
            alpha, sigma = float(run.alpha[i]), float(run.sigma[i])
            with torch.enable_grad():
                at = run.x.detach().requires_grad_()
                m = run.predict(i, at)
                x0 = run.x0(i, run.combined(m), at).to(at.dtype)
                reward = ops.sample_sums(x0, g[None], kind="product")
                (along,) = torch.autograd.grad(reward.sum(), at)  # J^T g
            m = m.detach()
            if alpha > 0:  # at alpha 0 the state says nothing of x0
                along_g = ops.sample_sums(along, g[None], kind="product")
                spread = noise**2 + sigma**2 / alpha * along_g
                push = ((y - reward.detach()) / spread).to(at.dtype)
                push = push.view(-1, *[1] * (at.dim() - 1))
                m = run.shifted(i, m, eps=-sigma * push * along)
            run.step(i, m)
            if callback is not None:
                callback(i, run)
        return run.x
