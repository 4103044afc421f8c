"""Quality as a target: which policies a network could take, and the search on a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.accelerate import accelerated, acceleration_of
from fastdiff.cache import (
    AccumulatedDistance,
    Broadcast,
    DeepCache,
    EncoderPropagation,
    FirstBlock,
    Forecast,
    GuidanceReuse,
    MagnitudeRatio,
)
from fastdiff.calibrate import magnitude_ratios, slower
from fastdiff.integrations import unet_views
from fastdiff.precision import Precision
from fastdiff.tokens import RegionAdaptive
from fastdiff.tune import Quality, Report, tune

Call = Callable[[Any, int], Tensor]  # samples [B, ...] of an input, in so many steps


def candidates(network: nn.Module, ratios: Sequence[float] = ()) -> list[Any]:
    """Policies worth a try on ``network``, by its kind: a U-Net, or else a list of blocks.

    Some of them may refuse this network: ``accelerate`` says so.

    Args:
        ratios: of :func:`fastdiff.calibrate.magnitude_ratios`; empty: no MagnitudeRatio.
    """
    every: list[Any] = [Broadcast(), Broadcast(order=1), GuidanceReuse()]
    if ratios:
        every += [MagnitudeRatio(ratios, threshold=t, most=5) for t in (0.03, 0.06, 0.12)]
    if not isinstance(unet_views.view(network), str):
        every += [DeepCache(n, branch) for branch in (0, 1, 2) for n in (2, 3, 5)]
        every += [DeepCache(n, order=1) for n in (2, 3)]
        every += [EncoderPropagation(n) for n in (2, 3)]
        every += [Precision(), Precision(attention="int8"), [DeepCache(2), Precision()]]
        every += [Precision(convolutions="all")]
        return [*every, [DeepCache(2), Broadcast()], [DeepCache(3), GuidanceReuse()]]
    every += [Forecast(n, order) for order in (0, 1, 2) for n in (2, 3, 4, 6)]
    every += [FirstBlock(t) for t in (0.05, 0.1, 0.2)]
    every += [AccumulatedDistance(t) for t in (0.1, 0.2, 0.4)]
    every += [RegionAdaptive(r, high=0.0) for r in (0.5, 0.25)]
    every += [Precision(), Precision(attention="int8"), [Forecast(2, 1), Precision()]]
    return [*every, [Forecast(2, 1), Broadcast()], [Forecast(3, 1), GuidanceReuse()]]


def default_fewer(steps: int) -> list[int]:
    """Three quarters, a half, a third and a quarter of ``steps``, those that are fewer."""
    return sorted({n for n in (steps * 3 // 4, steps // 2, steps // 3, steps // 4) if n})


def _tensor(out: Any) -> Tensor:
    """The samples of what a pipeline returned: its first field, as ``[B, ...]`` float32."""
    first = out if isinstance(out, Tensor | np.ndarray) else out[0]
    if isinstance(first, list | tuple):  # pictures of PIL
        first = np.stack([np.asarray(one) for one in first])
    return torch.as_tensor(first).detach().cpu().float()


def _generators(value: Any) -> Any:
    """A seed as a fresh generator, a list of seeds as a list of them."""
    if isinstance(value, list | tuple):
        return [_generators(one) for one in value]
    return torch.Generator().manual_seed(value)


def _check_call(i: int, call: Any) -> None:
    if not isinstance(call, Mapping):
        raise ValueError(
            f"accelerate: calibrate[{i}] is {type(call).__name__}, need a dict of the pipeline's "
            "arguments"
        )
    seeds = call.get("generator", 0)
    for seed in seeds if isinstance(seeds, list | tuple) else [seeds]:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(
                f"accelerate: calibrate[{i}] has generator {type(seed).__name__}, which a run uses "
                "up; need an int, the seed"
            )


def _steps_of(pipe: Any, calibrate: Sequence[Any], steps: int | None) -> int:
    """The steps of the plain run: the argument's, the inputs', or the pipeline's default."""
    default = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    named = {call.get("num_inference_steps", default and default.default) for call in calibrate}
    if steps is not None:
        named = {steps}
    if len(named) != 1 or not isinstance(value := named.pop(), int) or value < 1:
        raise ValueError(
            "accelerate: calibrate has no one num_inference_steps of at least 1, need the same in "
            "every input"
        )
    return value


def _pipeline_call(pipe: Any) -> Call:
    """``call(arguments, steps)`` of a pipeline, as tensors."""
    known = inspect.signature(type(pipe).__call__).parameters

    def call(arguments: Any, steps: int) -> Tensor:
        given = {**arguments, "num_inference_steps": steps}
        if "generator" in given:
            given["generator"] = _generators(given["generator"])
        if "output_type" in known:
            given.setdefault("output_type", "np")
        return _tensor(pipe(**given))

    return call


def _accepted(target: Any, policies: Sequence[Any], settings: dict[str, Any]) -> Iterator[Any]:
    """Those that ``target`` can take."""
    for policy in policies:
        try:
            with accelerated(target, cache=policy, **settings):
                pass
        except ValueError:
            continue
        yield policy


def search(
    target: Any,
    quality: Quality,
    calibrate: Sequence[Any],
    *,
    run: Call | None = None,
    steps: int | None = None,
    candidates: Sequence[Any] | None = None,
    fewer: Sequence[int] | None = None,
    rounds: int = 1,
    progress: Callable[[str], None] = lambda name: None,
    **settings: Any,
) -> Report:
    """Find the fastest policy that keeps ``quality``; see :func:`fastdiff.accelerate`.

    ``target`` is left as it was. The plain run is that of ``accelerate(target, cache=None,
    **settings)``: exact mode is not what is judged here.

    Raises:
        ValueError: an argument does not fit; or a run of a network was no run to its caches.
    """
    network = isinstance(target, nn.Module)
    if not isinstance(quality, Quality):
        raise ValueError(
            f"accelerate: target is {type(quality).__name__}, need a fastdiff.tune.Quality"
        )
    if network and (run is None or steps is None):
        raise ValueError(
            "accelerate: target on a network needs run, as run(input, steps), and steps"
        )
    if not network and run is None:
        for i, one in enumerate(calibrate):
            _check_call(i, one)
    count = steps if network and steps is not None else _steps_of(target, calibrate, steps)
    call = run or _pipeline_call(target)

    def once(one: Any, cache: Any = None, steps: int = count) -> Tensor:
        with accelerated(target, cache=cache, **settings):
            out = call(one, steps)
            done = acceleration_of(target)
            if done is not None and done.lonely:
                raise ValueError(
                    f"accelerate: run called the network {done.lonely} times outside a run, where "
                    "caches are off; need fastdiff.sample or `with fastdiff.request():` there"
                )
            return out

    if candidates is None:
        candidates = list(_accepted(target, _defaults(target, calibrate, call, count), settings))
    else:
        for policy in candidates:  # an error now, not after the first half of the search
            with accelerated(target, cache=policy, **settings):
                pass
    few = default_fewer(count) if fewer is None else fewer
    with torch.no_grad():
        return tune(
            once, calibrate, quality, candidates,
            steps=count, fewer=few, rounds=rounds, progress=progress,
        )  # fmt: skip


def _defaults(target: Any, calibrate: Sequence[Any], call: Call, steps: int) -> list[Any]:
    """The candidates of the network whose steps a pipeline counts, with one calibrating run."""
    for name in ("unet", "transformer"):
        network = getattr(target, name, None)
        if isinstance(network, nn.Module):
            break
    else:
        network = target
    ratios: tuple[float, ...] = ()
    if not calibrate:
        return candidates(network, ratios)

    def run() -> Tensor:
        return call(calibrate[0], steps)

    try:
        ratios = magnitude_ratios(target, run)
    except ValueError:
        pass  # a network without residuals to measure, or a run of one step: no MagnitudeRatio
    found = candidates(network, ratios)
    try:
        # Where floats are faster on this machine, as Winograd's are with no int8 instructions.
        floats = slower(target, run, Precision(convolutions="all"))
    except ValueError:
        return found  # no layer is large enough
    rest = Precision(layers=floats, convolutions="all")
    with accelerated(target, precision=rest):
        done = acceleration_of(target)
        assert done is not None
        some = bool(floats and done.layers)
    return [*found, rest] if some else found
