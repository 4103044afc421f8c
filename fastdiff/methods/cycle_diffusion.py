r"""CycleDiffusion and its DPM-Encoder (Wu & De la Torre 2022, arXiv:2210.05559): an image as the
noise that a stochastic sampler would have drawn for it, and another model run with that noise.

    x_T ~ q(x_T | x0),   x_s ~ q(x_s | x_t, x0)          the path, which needs no model
    r_t = x_s - mean_theta(x_t),   s < t; the last x_s is x0        encode
    y_s = mean_theta'(y_t) + r_t,  y_T = x_T                        decode

with ``q(x_s | x_t, x0) = N(alpha_s x0 + sqrt(sigma_s^2 - v^2) (x_t - alpha_t x0) / sigma_t, v^2)``
for a sampler that draws ``v z``. With the same model and the same plan decode gives back x0.

All x_t are known before the first model call, so that calls at many levels can share a batch. Or
they go one by one from noise to data, as decode's do: then a cache sees the same in both, and the
round trip is exact through it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdiff.methods.inversion import clean
from fastdiff.methods.store import Plan, Store
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops.fused_step import COLUMNS, fused_step, philox_normal
from fastdiff.samplers.ddim import DDIM

ENCODE_STREAM = 9
ETA = 0.1  # of DDIM, the paper's for images
SIGMA = COLUMNS.index("sigma")


def posterior_path(run: Trajectory, x0: Tensor, start: int = 0) -> list[Tensor]:
    """``x_start`` to ``x_n = x0`` from q, ``[B, C, ...]`` each, without the model."""
    n, x = len(run), run.noised(x0, start, ENCODE_STREAM)
    path = [x]
    for i in range(start, n - 1):
        (a_t, s_t), (a_s, s_s) = ((float(run.alpha[j]), float(run.sigma[j])) for j in (i, i + 1))
        v = min(run.table.host[i][SIGMA], s_s)
        share = (s_s**2 - v**2) ** 0.5 / s_t
        z = philox_normal(x.shape, *run.noise(ENCODE_STREAM), dtype=x.dtype)
        x = (a_s - share * a_t) * x0 + share * x + v * z
        path.append(x)
    return [*path, x0]


def encode(
    model: Callable[..., Tensor],
    x: Tensor,
    *,
    start: int = 0,
    time_batch: int | None = None,
    dtype_residuals: torch.dtype | None = None,
    cache: Any = None,
    **settings: Any,
) -> Store:
    """DPM-Encoder: the noise behind ``x``.

    Args:
        model, cache, settings: as for :func:`fastdiff.sample`; ``classes`` describe ``x``. The
            sampler, DDIM of eta 0.1 where none is given, may not keep a history.
        x: ``[B, C, ...]``, clean.
        start: level of the noisiest state, 0 is the first of a run; later ones stay closer to x.
        time_batch: levels that share a model call, for which caches are then off; None: one by
            one, through caches.
        dtype_residuals: float32 or float64; None: float32, and float64 for float64 states. Where it
            is wider than the state, the round trip is exact to the bit as far as the model is.

    Returns:
        :class:`~fastdiff.methods.store.Store`: the state of level ``start`` and the residuals of
        all steps from there, the last included.

    Raises:
        ValueError: an argument does not fit.
    """
    settings.setdefault("sampler", DDIM(eta=ETA))
    if time_batch is not None:
        if isinstance(time_batch, bool) or not isinstance(time_batch, int) or time_batch < 1:
            raise ValueError(f"encode: time_batch is {time_batch!r}, need an integer of at least 1")
        if cache is not None:
            raise ValueError(
                f"encode: time_batch is {time_batch} and cache is {cache!r}, need one of them: "
                "calls that share a batch have no order in time"
            )
    with running(model, clean("encode", x), cache=cache, **settings) as run:
        n = len(run)
        _single(run)
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < n:
            raise ValueError(f"encode: start is {start!r}, need a level from 0 to {n - 1}")
        plan = Plan.of(run, range(start, n), cached=time_batch is None)
        wide = torch.promote_types(run.x.dtype, torch.float32)
        store = Store(plan, wide if dtype_residuals is None else dtype_residuals)
        path = posterior_path(run, run.x, start)
        store.keep(start, path[0])
        run.dirty()
        if time_batch is None:
            for i in range(start, n):
                run.x = path[i - start]
                mean = run.step(i, run.predict(i), noise=False)
                store.keep_residual(i, path[i - start + 1], mean)
            return store
        for levels in _groups(run, start, time_batch):
            states = torch.cat([path[i - start] for i in levels])
            means = _means(run, levels, states).view(len(levels), *run.x.shape)
            for i, mean in zip(levels, means, strict=True):
                store.keep_residual(i, path[i - start + 1], mean)
        return store


def decode(
    model: Callable[..., Tensor],
    store: Store,
    *,
    may_differ: Sequence[str] = (),
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample with the noise of ``store``: x itself with the model and the settings of the encoder,
    a translation with others.

    Args:
        model, cache, settings: as for :func:`fastdiff.sample`.
        store: of :func:`encode`.
        may_differ: parts of the plan (:class:`~fastdiff.methods.store.Plan`) that need not be
            the encoder's: "guidance" for another scale, "table" for another prediction.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit, or the plan is another than the encoder's.
    """
    settings.setdefault("sampler", DDIM(eta=ETA))
    calls = store.plan.calls
    with running(model, store.state(calls[0]), cache=cache, **settings) as run:
        _single(run)
        store.plan.check(Plan.of(run, calls), may_differ)
        run.dirty()
        for i in calls:
            mean = run.step(i, run.predict(i), noise=False)
            run.x = store.add_residual(i, mean)
        return run.x


def cycle_diffusion(
    source: Callable[..., Tensor],
    target: Callable[..., Tensor],
    x: Tensor,
    *,
    classes: Tensor | None = None,
    source_classes: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    source_guidance: float | Tensor = 1.0,
    start: int = 0,
    time_batch: int | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Translate ``x`` from the domain of ``source`` to that of ``target`` (or, with one model, from
    ``source_classes`` to ``classes``).

    Args:
        source, target: models with the same levels.
        x: ``[B, C, ...]``, clean.
        guidance, source_guidance: scale of decode and of encode.
        start, time_batch: of :func:`encode`.
        cache: of both ways; not with ``time_batch``.
        settings: of :func:`fastdiff.sample`, of both ways.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit, or the models have other levels.
    """
    store = encode(
        source, x, classes=source_classes, guidance=source_guidance, start=start,
        time_batch=time_batch, cache=cache, **settings,
    )  # fmt: skip
    may_differ = ("table", "guidance")
    return decode(
        target, store, classes=classes, guidance=guidance, may_differ=may_differ, cache=cache,
        **settings,
    )  # fmt: skip


def _single(run: Trajectory) -> None:
    run.known_variance("cycle_diffusion")
    if any(run.table.reads):
        raise ValueError("cycle_diffusion: the sampler keeps a history, need one of single steps")


def _groups(run: Trajectory, start: int, size: int) -> list[list[int]]:
    """Levels that share a call: all guided, or none."""
    groups: list[list[int]] = []
    for i in range(start, len(run)):
        last = groups[-1] if groups else []
        if last and len(last) < size and run.guided[last[0]] == run.guided[i]:
            last.append(i)
        else:
            groups.append([i])
    return groups


def _means(run: Trajectory, levels: list[int], x: Tensor) -> Tensor:
    """Steps without noise of ``x [L B, C, ...]``, B rows for each of successive levels."""
    number = run.numbers[levels[0] : levels[-1] + 1].repeat_interleave(run.batch)
    y = None if run.y is None else torch.cat([run.y] * len(levels))
    off = nullcontext() if run.request is None else run.request.without("levels share a call")
    with off:
        m = run.predict_rows(number, x, y)
        run.visits += levels
        if not run.guided[levels[0]]:
            return run.mean_rows(number, x, m)
        assert y is not None and run.null is not None and run.weights is not None
        null = run.predict_rows(number, x, torch.full_like(y, run.null))
    w = run.weights.repeat(len(levels), 1)
    both = torch.stack((null, m))
    return fused_step(x, both, run.rows, step=number, w=w, rescale=run.rescale)[0]
