r"""Pairwise sample optimisation (Miao et al. 2024, arXiv:2410.03190): preference tuning of few-step
samplers through the density of their steps, which is a known Gaussian.

    log p(x_s | x_t) = mean_d log N(x_s; mu_theta(x_t), v^2)          steps that draw noise only
    r = exp(log p_theta - log p_ref), clipped to 1 +- c
    L = -log sigmoid(beta (log r_win - log r_lose))           online: the sampler's own steps
    L = -log sigmoid(beta ((l_win - l_lose)_ref - (l_win - l_lose)_theta))   offline: x0 losses l

The mean over dimensions is the paper's. The last step draws nothing and has no density: it is left
out. The reference is the same network with its adapters off. Densities are recorded, and asked for
again, without caches: a cached step has another mean, and a ratio of two would mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.adapters.base import attached
from fastdiff.methods.uncached import uncached
from fastdiff.ops.fused_step import COLUMNS
from fastdiff.samplers.run import Run

_SIGMA = COLUMNS.index("sigma")


class Path(NamedTuple):
    """What a sampler did: the sample ``x [B, C, ...]``, the states before and after each step that
    drew noise ``states, after [S, B, C, ...]``, and the calls those steps were ``calls``."""

    x: Tensor
    states: Tensor
    after: Tensor
    calls: tuple[int, ...]


def log_normal(x: Tensor, mean: Tensor, spread: float) -> Tensor:
    """``mean_d log N(x; mean, spread^2)`` ``[B]``, in float32 or wider."""
    if x.dtype != mean.dtype:
        both = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), torch.float32)
        x, mean = x.to(both), mean.to(both)
    square = ops.sample_sums(x, mean, kind="difference") / x[0].numel()
    return -0.5 / spread**2 * square - math.log(spread) - 0.5 * math.log(2 * math.pi)


def _single(run: Run) -> Run:
    if any(run.table.reads) or run.table.first is not None:
        raise ValueError("pso: sampler keeps a history or has churn, need one of single steps")
    run.known_variance("pso")
    return run


@torch.no_grad()
def record(model: Callable[..., Tensor], x: Tensor | Sequence[int], **settings: Any) -> Path:
    """Sample, and keep what the densities of the steps need.

    Args:
        model, x, settings: as for :func:`fastdiff.samplers.sample`; the sampler has to draw noise
            (DDIM with eta 1 is Euler's ancestral).

    Returns:
        :class:`Path`.

    Raises:
        ValueError: an argument does not fit, or no step draws noise.
    """
    uncached("pso", model, "whose steps have other means than the model's")
    run = _single(Run(model, x, **settings))
    states, after = [], []
    calls = tuple(i for i in range(len(run)) if run.table.draws[i])
    if not calls:
        raise ValueError("pso: sampler draws no noise in any step, need one that does")
    for i in range(len(run)):
        before = run.x
        run.step(i, run.predict(i))
        if i in calls:
            states.append(before)
            after.append(run.x)
    return Path(run.x, torch.stack(states), torch.stack(after), calls)


def step_log_probs(
    model: Callable[..., Tensor], path: Path, only: Sequence[int] | None = None, **settings: Any
) -> Tensor:
    """Log-probabilities ``[S, B]`` of a path's steps under ``model``, differentiable in it.

    Args:
        model: may be another than the one that made the path.
        path: of :func:`record` with the same ``settings``.
        only: places in ``path.calls``; None: all.

    Raises:
        ValueError: an argument does not fit, or a step draws no noise under these settings.
    """
    uncached("pso", model, "whose steps have other means than the model's")
    found = []
    run = _single(Run(model, path.x, **settings))
    for j in range(len(path.calls)) if only is None else only:
        i = path.calls[j]
        if i >= len(run) or not run.table.draws[i]:
            raise ValueError(f"pso: call {i} draws no noise, need the settings of the path")
        run.x = path.states[j]
        mean = run.step(i, run.predict(i), noise=False)
        spread = float(run.table.rows[i, _SIGMA])
        found.append(log_normal(path.after[j], mean, spread))
    return torch.stack(found)


def log_ratio(logp: Tensor, reference: Tensor, clip: float) -> Tensor:
    """``log clamp(exp(logp - reference), 1 - clip, 1 + clip)``: 0 gradient outside."""
    return (logp - reference.detach()).clamp(math.log1p(-clip), math.log1p(clip))


def pair_loss(win: Tensor, lose: Tensor, beta: float = 50.0) -> Tensor:
    """``-log sigmoid(beta (win - lose))``, the mean over all pairs: log 2 where they are equal."""
    return F.softplus(-beta * (win - lose)).mean()


def pso_loss(
    model: Callable[..., Tensor],
    reference: Sequence[Tensor],
    win: Path,
    lose: Path,
    *,
    beta: float = 50.0,
    clip: float = 0.1,
    lose_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> Tensor:
    """The loss of pairs of paths of the model's own.

    Args:
        model: what is trained.
        reference: log-probabilities ``[S, B]`` of win and of lose under the reference, as
            :func:`step_log_probs` gives them within :func:`adapters_off`.
        win, lose: paths of :func:`record`, pair b in sample b of each.
        beta, clip: of the paper; clip in (0, 1).
        lose_settings: where those of ``lose`` differ (another class).
        settings: of the paths.

    Raises:
        ValueError: an argument does not fit.
    """
    if not isinstance(beta, int | float) or not 0 < beta < math.inf:
        raise ValueError(f"pso: beta is {beta!r}, need a number above 0")
    if not isinstance(clip, int | float) or not 0 < clip < 1:
        raise ValueError(f"pso: clip is {clip!r}, need a number in (0, 1)")
    if win.after.shape != lose.after.shape:
        raise ValueError(
            f"pso: lose is {list(lose.after.shape)}, need {list(win.after.shape)}, as win"
        )
    ratios = []
    for path, ref, own in zip(
        (win, lose), reference, (settings, settings | (lose_settings or {})), strict=True
    ):
        logp = step_log_probs(model, path, **own)
        if ref.shape != logp.shape:
            raise ValueError(f"pso: reference is {list(ref.shape)}, need {list(logp.shape)}")
        ratios.append(log_ratio(logp, ref, clip))
    return pair_loss(ratios[0], ratios[1], beta)


def offline_loss(
    win: Tensor,
    lose: Tensor,
    win_ref: Tensor,
    lose_ref: Tensor,
    *,
    beta: float = 200.0,
    eta: float = 0.1,
) -> Tensor:
    """The loss of pairs of given pictures, from their losses of x0 ``[B]`` under the model and the
    reference: ``-log sigmoid(beta ((win - eta lose)_ref - (win - eta lose)_theta))``."""
    return pair_loss((win_ref - eta * lose_ref).detach(), win - eta * lose, beta)


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[nn.Module]:
    """Within, ``network`` is what it was before its adapters, without gradients.

    Adapters that train weights of the network itself write them here, in place: ask the reference
    before the model, or its graph is stale (torch says so in the backward).

    Raises:
        ValueError: an adapter is merged, or there is none.
    """
    own = attached(network)
    merged = [a.method for a in own if a.merged]
    if merged or not own:
        what = f"adapter {merged[0]} merged" if merged else "no adapters"
        raise ValueError(f"pso: network has {what}, need adapters that are attached, not merged")
    for adapter in reversed(own):
        adapter.detach()
    try:
        with torch.no_grad():
            yield network
    finally:
        for adapter in own:
            adapter.attach()


def references(network: nn.Module, paths: Sequence[Path], **settings: Any) -> list[Tensor]:
    """:func:`step_log_probs` of each path with the network's adapters off."""
    with adapters_off(network):
        return [step_log_probs(network, path, **settings) for path in paths]
