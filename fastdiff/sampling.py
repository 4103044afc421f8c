"""``fastdiff.sample``: the sampling loop as one run of an accelerated network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastdiff import samplers
from fastdiff.accelerate import accelerated, acceleration_of, network_of, request
from fastdiff.engine.request import current
from fastdiff.engine.token_state import gaps_of, open_region, region
from fastdiff.samplers.run import model_times
from fastdiff.tokens import RegionAdaptive

_TIMES = ("sampler", "steps", "clip", "prediction", "schedule")  # what the model's times depend on


def sample(
    model: Callable[..., Tensor], x: Tensor | Sequence[int], *, cache: Any = None, **settings: Any
) -> Tensor:
    """Sample from a diffusion or flow model, with or without a cache.

    Args:
        model: as for :func:`fastdiff.samplers.sample`. One that ``accelerate`` has changed, or
            ``programs`` of it, keeps its own cache; a run that is open already
            (``with fastdiff.request():``) is then the run, and its owner counts the steps.
        x: the noise, or its shape.
        cache: a policy of ``fastdiff.cache``, for this call; ``model`` is then an ``nn.Module``.
            Every evaluation of the model is a step of the policy: Heun's method has two a level.
        settings: of :func:`fastdiff.samplers.sample`.

    Returns:
        ``[B, C, ...]``: the sample. What the run computed stands in
        ``fastdiff.summary(model)`` where ``model`` stays accelerated.

    Raises:
        ValueError: an argument does not fit, or ``cache`` does not run on this model.
    """
    network = network_of(model)
    if cache is None and (acceleration_of(network) is None or current() is not None):
        return samplers.sample(model, x, **settings)
    times = model_times(model, **{k: v for k, v in settings.items() if k in _TIMES})
    scope: AbstractContextManager[Any] = nullcontext()
    if cache is not None:
        scope = accelerated(model, cache=cache, exact=False)
    mask = settings.get("mask")
    inside: AbstractContextManager[Any] = nullcontext()
    if isinstance(mask, Tensor) and mask.dim() > 2 and open_region() is None:
        inside = region((mask > 0).any(1))  # what is generated; the rest is the reference's
    with scope, inside, request(len(times), calls_per_step=1) as run:
        run.times = times
        shape = list(x.shape if isinstance(x, Tensor) else x)
        run.samples = shape[0] if shape and isinstance(shape[0], int) else None
        acceleration = acceleration_of(network)
        assert acceleration is not None
        acceleration.last = run
        sparse = [p for p in acceleration.policies if isinstance(p, RegionAdaptive)]
        if sparse:
            settings.setdefault("predicted", partial(setattr, run, "prediction"))
        if any(p.own_times for p in sparse):
            assert isinstance(network, nn.Module)
            settings.setdefault("gaps", partial(gaps_of, run, network))
        return samplers.sample(model, x, **settings)
