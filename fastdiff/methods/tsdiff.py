r"""TSDiff (Kollovieh et al. 2023, arXiv:2307.11494): forecasts and imputations by a diffusion model
of time series without conditions.

Observation self-guidance: with ``f(x_t)`` the model's own clean series and ``y`` what was observed,

    -log p(y | x_t) = sum_obs rho(y - f(x_t)) + const
    rho(u) = u^2 / 2                          Gaussian ("mse")
    rho(u) = max(kappa u, (kappa - 1) u)      asymmetric Laplace ("quantile"), kappa of the sample
    DDPM:  mean <- mean + s v^2 d log p(y | x_t) / d x_t,     v^2: variance of the step
    DDIM:  eps  <- eps - s sigma_t d log p(y | x_t) / d x_t

Refinement: a forecast ``x`` follows the model's own energy at one level (alpha, sigma),

    E(x) = |eps(alpha x + sigma z) - z|^2 + lam sum_obs rho(y - x)
    x <- x - eta dE/dx + sqrt(2 eta gamma) xi     Langevin ("langevin"); "mle": without noise
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.methods.guide import Energy, schedule_of
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops.fused_step import COLUMNS, philox_normal

LOSSES = ("quantile", "mse")
ON = ("mean", "eps")
AT = ("before", "after")
REFINE = ("langevin", "mle")
NOISE_STREAM, LANGEVIN_STREAM = 12, 13


def quantile_levels(samples: int, series: int = 1) -> Tensor:
    """``kappa_j = (j + 1) / (samples + 1)`` for ``samples`` forecasts of every series, next to each
    other: float32 ``[series * samples]``."""
    return ((torch.arange(samples) + 1) / (samples + 1)).repeat(series)


def observation_loss(
    observed: Tensor, mask: Tensor, loss: str = "quantile", kappa: Tensor | float = 0.5
) -> Energy:
    """``energy(f [B, C, L]) -> [B]``: ``sum rho(observed - f)`` where ``mask`` is 1.

    What is not observed may be NaN.

    Args:
        observed: ``[B|1, C, L]``.
        mask: ``[B|1, C|1, L]``, bool.
        loss: "quantile" or "mse".
        kappa: of "quantile": in (0, 1), one for all or ``[B]``.
    """

    def energy(f: Tensor) -> Tensor:
        u = torch.where(mask, observed.to(f) - f, 0.0)
        if loss == "mse":
            rho = 0.5 * u**2
        else:
            k = kappa.to(f).view(-1, 1, 1) if isinstance(kappa, Tensor) else kappa
            rho = torch.maximum(k * u, (k - 1) * u)
        return rho.flatten(1).sum(1)

    return energy


def _observations(
    run: Trajectory, observed: Tensor, mask: Tensor, loss: str, kappa: Tensor | float | None
) -> Energy:
    x = run.x
    if x.dim() != 3:
        raise ValueError(f"tsdiff: x is {list(x.shape)}, need series [B, C, L]")
    leads = {(b, *x.shape[1:]) for b in (1, x.shape[0])}
    if not isinstance(observed, Tensor) or tuple(observed.shape) not in leads:
        what = list(observed.shape) if isinstance(observed, Tensor) else repr(observed)
        raise ValueError(
            f"tsdiff: observed is {what}, need a tensor [B|1, C, L] of {list(x.shape)}"
        )
    leads |= {(b, 1, x.shape[2]) for b in (1, x.shape[0])}
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) not in leads:
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"tsdiff: mask is {found}, need bool [B|1, C|1, L] of {list(x.shape)}")
    if loss not in LOSSES:
        raise ValueError(f"tsdiff: loss is {loss!r}, need one of {', '.join(LOSSES)}")
    kappa = quantile_levels(run.batch) if kappa is None else kappa
    if isinstance(kappa, Tensor):
        if kappa.shape != (run.batch,) or not kappa.is_floating_point():
            raise ValueError(
                f"tsdiff: kappa is {kappa.dtype} {list(kappa.shape)}, need floats [{run.batch}]"
            )
        kappa = kappa.to(x.device)
    elif not isinstance(kappa, int | float) or not 0 < kappa < 1:
        raise ValueError(f"tsdiff: kappa is {kappa!r}, need a number in (0, 1) or a tensor [B]")
    return observation_loss(observed.to(x.device), mask.to(x.device), loss, kappa)


def _through(run: Trajectory, i: int, energy: Energy, again: bool) -> tuple[Tensor, Tensor]:
    """The prediction at level ``i`` and the gradient of the energy of its clean series."""
    with torch.enable_grad():
        x = run.x.detach().requires_grad_()
        m = run.predict(i, x, again=again)
        (g,) = torch.autograd.grad(energy(run.x0(i, run.combined(m), x)).sum(), x)
    return m.detach(), g


def tsdiff(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    observed: Tensor,
    mask: Tensor,
    *,
    scale: float | Sequence[float] | Callable[[int], float] = 1.0,
    loss: str = "quantile",
    kappa: Tensor | float | None = None,
    on: str | None = None,
    at: str = "before",
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample series that agree with observed values, by the model's own guidance.

    Args:
        model, x, cache, settings: as for :func:`fastdiff.sample`; ``x`` is ``[B, C, L]`` or its
            shape. The model is differentiated through.
        observed: ``[B|1, C, L]``; only what ``mask`` shows counts.
        mask: bool ``[B|1, C|1, L]``, True where a value was observed.
        scale: s, for all calls or one for each; 0 is plain sampling.
        loss: "quantile" or "mse".
        kappa: quantile levels ``[B]`` or one for all; None: ``quantile_levels(B)``, the batch being
            the forecasts of one series.
        on: "mean" or "eps"; None: "mean" where the sampler draws noise, else "eps".
        at: of "mean": the gradient "before" the step, through the call that the step needs anyway
            as in the paper; or "after" it as in its public code, at the new state with the time of
            the old: one call more a step.

    Returns:
        ``[B, C, L]``.

    Raises:
        ValueError: an argument does not fit.
    """
    if on not in (None, *ON):
        raise ValueError(f"tsdiff: on is {on!r}, need one of {', '.join(ON)}, or None")
    if at not in AT:
        raise ValueError(f"tsdiff: at is {at!r}, need one of {', '.join(AT)}")
    with running(model, x, cache=cache, **settings) as run:
        energy = _observations(run, observed, mask, loss, kappa)
        n, draws = len(run), any(run.table.draws)
        scales = schedule_of(scale, n)
        if on == "mean" and not draws:
            raise ValueError("tsdiff: on is 'mean' and the sampler draws no noise, need 'eps'")
        on = on or ("mean" if draws else "eps")
        if on == "eps" and at == "after":
            raise ValueError("tsdiff: at is 'after' and on is 'eps', need 'before'")
        run.known_variance("tsdiff")
        variance = [row[COLUMNS.index("sigma")] ** 2 for row in run.table.host]
        run.start()
        for i in range(n):
            amount = scales[i] * float(variance[i] if on == "mean" else run.sigma[i])
            if not amount:
                run.step(i, run.predict(i))
            elif at == "after":
                run.step(i, run.predict(i))
                _, g = _through(run, i, energy, again=True)
                run.x = run.x - amount * g
            else:
                m, g = _through(run, i, energy, again=False)
                if on == "eps":
                    run.step(i, run.shifted(i, m, eps=amount * g))
                else:
                    run.x = run.step(i, m) - amount * g
        return run.x


def refine(
    model: Callable[..., Tensor],
    x: Tensor,
    observed: Tensor,
    mask: Tensor,
    *,
    iterations: int = 20,
    time: float = 200.0,
    eta: float = 0.1,
    gamma: float = 0.1,
    lam: float = 1.0,
    loss: str = "quantile",
    kappa: Tensor | float | None = None,
    how: str = "langevin",
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Improve forecasts, of any method, by the model's own energy.

    Args:
        model, cache, settings: as for :func:`fastdiff.sample`.
        x: ``[B, C, L]``, clean: the forecasts.
        observed, mask, loss, kappa: of :func:`tsdiff`.
        iterations: at least 0; 0 gives ``x``.
        time: model time 0..1000 of the level at which the energy is taken: of the levels of the
            run, the nearest.
        eta: step size, above 0.
        gamma: temperature of "langevin", at least 0.
        lam: weight of the observations.
        how: "langevin" or "mle".

    Returns:
        ``[B, C, L]``.

    Raises:
        ValueError: an argument does not fit.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"tsdiff: iterations is {iterations!r}, need an integer of at least 0")
    for name, value, low in (("eta", eta, "above"), ("gamma", gamma, "at least")):
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"tsdiff: {name} is {value!r}, need a number {low} 0")
    if eta == 0:
        raise ValueError("tsdiff: eta is 0, need a number above 0")
    if how not in REFINE:
        raise ValueError(f"tsdiff: how is {how!r}, need one of {', '.join(REFINE)}")
    with running(model, x, cache=cache, **settings) as run:
        energy = _observations(run, observed, mask, loss, kappa)
        i = int((run.table.t - time).abs().argmin())  # a table of the host
        alpha, sigma = float(run.alpha[i]), float(run.sigma[i])
        spread = math.sqrt(2 * eta * gamma) if how == "langevin" else 0.0
        for _ in range(iterations):
            z = philox_normal(run.x.shape, *run.noise(NOISE_STREAM), dtype=run.x.dtype)
            with torch.enable_grad():
                x = run.x.detach().requires_grad_()
                noised = alpha * x + sigma * z
                m = run.predict(i, noised, independent="other noise in every iteration")
                away = run.eps(i, run.combined(m), noised) - z
                total = ops.sample_sums(away) + lam * energy(x)
                (g,) = torch.autograd.grad(total.sum(), x)
            run.x = run.x - eta * g
            if spread:
                xi = philox_normal(run.x.shape, *run.noise(LANGEVIN_STREAM), dtype=run.x.dtype)
                run.x = run.x + spread * xi
        return run.x
