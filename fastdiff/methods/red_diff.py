r"""RED-Diff (Mardani et al. 2023, arXiv:2305.04391, algorithm 1): inverse problems by a variational
fit, with the diffusion model as a regulariser and no gradient through it.

    minimise  v/2 |y - H mu|^2 + E_{t, eps} w_t (eps_hat(x_t) - eps)^T mu
    where     x_t = alpha mu + sigma eps

and the bracket counts as a constant: the gradient is ``v H^T (H mu - y) + w_t (eps_hat - eps)``.
Noise is drawn anew for every call, so that calls have nothing to do with each other: caches are
off.

For Gaussian data N(m, S) the point where the expected gradient is 0 solves, with the "linear"
weight ``w_t = lam sigma / alpha``,

    [v H^T H + lam E_t sigma^2 / (alpha^2 S + sigma^2)] mu = v H^T y + lam E_t[...] m
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.methods.guide import schedule_of
from fastdiff.methods.latent_adam import SGD, Adam, Optimizer
from fastdiff.methods.operators import Operator, measured
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops.fused_step import philox_normal

FIT_STREAM = 16
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {  # of sigma / alpha
    "linear": lambda r: r,
    "sqrt": lambda r: r.sqrt(),
    "square": lambda r: r.square(),
    "log": lambda r: r.log1p(),
    "trunc": lambda r: r.clamp(max=1),
    "const": torch.ones_like,
}


def residual(run: Trajectory, i: int, x0: Tensor, *, antithetic: bool = False) -> Tensor:
    """``eps_hat(x_t) - eps`` at level ``i`` for clean states ``x0 [B, C, ...]`` and fresh noise;
    the mean of that for eps and -eps where ``antithetic``, which takes two calls."""
    eps = philox_normal(x0.shape, *run.noise(FIT_STREAM), dtype=x0.dtype)
    alpha, sigma = float(run.alpha[i]), float(run.sigma[i])
    found: list[Tensor] = []
    for z in (eps, -eps) if antithetic else (eps,):
        x = alpha * x0 + sigma * z
        m = run.predict(i, x, independent="RED-Diff draws noise anew", again=bool(found))
        found.append(run.eps(i, run.combined(m), x) - z)
    return found[0] if len(found) == 1 else 0.5 * (found[0] + found[1])


def red_diff(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    operator: Operator,
    y: Tensor,
    *,
    at: Sequence[Sequence[int]] | None = None,
    lam: float = 0.25,
    weight: str = "linear",
    fidelity: float = 1.0,
    lr: float | Sequence[float] | Callable[[int], float] = 0.1,
    betas: tuple[float, float] | None = (0.9, 0.99),
    antithetic: bool = False,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """The clean state that explains ``y`` and that the model finds likely.

    Args:
        model, cache, settings: as for :func:`fastdiff.sample`; of the sampler only its levels
            count.
        x: where the fit begins, ``[B, C, ...]``; or that shape, to begin at ``H^+ y``.
        operator: H.
        y: ``[B, ...]``, ``operator.apply`` of a state.
        at: for every update the levels (0 to n - 1, 0 the noisiest) whose gradients it averages;
            None: one each, from the noisiest to the cleanest. ``[range(n)] * k``: k updates, each
            of all levels.
        lam, weight: of the regulariser: ``w_t = lam weight(sigma / alpha)``; weight is "linear",
            "sqrt", "square", "log", "trunc" or "const".
        fidelity: v. Sums over elements, not means: the published code's means are ``lam M / N``
            for M measurements of N elements.
        lr: of Adam: a number, one for every update, or a function of the update's number.
        betas: of Adam; None: plain gradient descent in its place.
        antithetic: two calls each, for eps and -eps: without noise where the model is linear.
        callback: ``callback(k, run)`` after update k; ``run.x`` is mu.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit.
    """
    if weight not in WEIGHTS:
        raise ValueError(f"red_diff: weight is {weight!r}, need one of {', '.join(WEIGHTS)}")
    with running(model, x, cache=cache, **settings) as run:
        n = len(run)
        updates = [(i,) for i in range(n)] if at is None else [tuple(levels) for levels in at]
        if any(not levels or not all(i in range(n) for i in levels) for levels in updates):
            raise ValueError(f"red_diff: at is {at!r}, need for every update levels 0 to {n - 1}")
        if run.rescale:
            raise ValueError(f"red_diff: guidance_rescale is {run.rescale}, need 0")
        w = lam * WEIGHTS[weight](run.sigma[:-1] / run.alpha[:-1])
        if not all(math.isfinite(w[i]) for levels in updates for i in levels):
            raise ValueError(
                f"red_diff: weight is {weight!r}, infinite at alpha = 0; need 'trunc' or "
                "'const', or a schedule without that level"
            )
        rates = schedule_of(lr, len(updates))
        y = measured(operator, run.x, y)
        mu = run.x if isinstance(x, Tensor) else operator.pinv(y)
        optimizer: Optimizer = SGD() if betas is None else Adam(mu, betas)
        for k, levels in enumerate(updates):
            g = fidelity * operator.adjoint(operator.apply(mu) - y)
            for i in levels:
                found = residual(run, i, mu, antithetic=antithetic)
                g = g + (float(w[i]) / len(levels)) * found
            mu = optimizer.step(mu, g, rates[k])
            if callback is not None:
                run.x = mu
                callback(k, run)
        return mu
