r"""LaCon, late-constraint diffusion for steerable guided image synthesis (Liu et al. 2023,
arXiv:2305.11520): guidance by an energy of the features inside the network.

    g   = grad_{x_t} L(A(F(x_t, t, c)), y)             F: features of some blocks, A: an aligner
    g   = lam |eps - x_t| / |g| g                      norms of each sample
    eps = eps + g                                      where t > truncation

The gradient needs the network only up to its last tapped block, with the condition alone. With
scope "batch" the norms are those of the whole batch, as in public code: a sample's guidance then
depends on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.methods.guide import norms, unit
from fastdiff.methods.taps import Features, blocks_of, features, network_of
from fastdiff.methods.trajectory import Trajectory, running

FeatureEnergy = Callable[[Features], Tensor]


def feature_gradient(
    run: Trajectory, i: int, energy: FeatureEnergy, taps: Sequence[str], *, stop: bool = True
) -> Tensor:
    """``grad_x`` of ``energy(features) -> [B]`` at the run's state and level ``i``: ``[B, ...]``.

    Args:
        taps, stop: of :func:`fastdiff.methods.taps.tapped`.

    Raises:
        ValueError: ``energy`` gives something else than one number for each sample.
    """
    with torch.enable_grad():
        x = run.x.detach().requires_grad_()
        value = energy(features(run, i, taps, x, stop=stop))
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"energy gives {what}, need a tensor [{len(x)}], one for each sample")
        (g,) = torch.autograd.grad(value.sum(), x)
    return g


def matched(g: Tensor, like: Tensor, scope: str = "sample") -> Tensor:
    """``g [B, ...]`` with the norm of ``like``; 0 stays 0."""
    return unit(g, scope) * norms(like, scope)


def lacon(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    energy: FeatureEnergy,
    *,
    taps: Sequence[str],
    strength: float = 2.0,
    truncation: float = 500.0,
    scope: str = "sample",
    stop: bool = True,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample with a late constraint.

    Args:
        model: a network (``nn.Module``) as for :func:`fastdiff.sample`, differentiable.
        x: as for :func:`fastdiff.sample`.
        energy: ``energy(features) -> [B]`` of a dict from tap to the output of that block,
            ``[B, N, D]`` of a transformer, ``[B, C, H, W]`` of a U-Net. Its own scale does not
            matter.
        taps: names of blocks, e.g. "blocks.3" or "up_blocks.1".
        strength: lam; 0 is plain sampling.
        truncation: model time (0 to 1000) at and below which steps are not guided.
        scope: of the norms, "sample" or "batch".
        stop: end the call for the gradient at the last tapped block; False: run all of it, the
            same result.
        callback: ``callback(i, run)`` after every step; the run is not to be changed.
        cache, settings: of :func:`fastdiff.sample`. Calls for the gradient use no cache.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit, or a tapped block is not called.
    """
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ValueError(f"lacon: strength is {strength!r}, need a finite number")
    if not isinstance(truncation, int | float) or math.isnan(truncation):
        raise ValueError(f"lacon: truncation is {truncation!r}, need a model time")
    if scope not in ("sample", "batch"):
        raise ValueError(f"lacon: scope is {scope!r}, need 'sample' or 'batch'")
    blocks_of(network_of(model), taps)
    with running(model, x, cache=cache, **settings) as run:
        times = run.table.times
        run.start()
        for i in range(len(run)):
            m = run.predict(i)
            if strength != 0 and times[i] > truncation:
                g = feature_gradient(run, i, energy, taps, stop=stop)
                like = run.eps(i, run.combined(m)) - run.x
                m = run.shifted(i, m, eps=strength * matched(g, like, scope))
            run.step(i, m)
            if callback is not None:
                callback(i, run)
        return run.x
