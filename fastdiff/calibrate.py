"""What policies learn once, on inputs like those to come, so that runs need not measure it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastdiff.accelerate import _networks, accelerated, acceleration_of
from fastdiff.cache import AccumulatedDistance, Broadcast, DeepCache, FirstBlock, Forecast
from fastdiff.cache._check import number, whole
from fastdiff.cache.broadcast import KINDS
from fastdiff.engine.history import History
from fastdiff.engine.patch import Patch
from fastdiff.engine.quant_experts import listen
from fastdiff.engine.quant_layers import layers_of
from fastdiff.engine.request import Request
from fastdiff.precision import Precision


@dataclass(frozen=True)
class _Recorder(Forecast):
    """Computes every step and writes down how the residual's magnitude changes."""

    seen: dict[int, list[float]] = field(default_factory=dict)

    @property
    def neutral(self) -> bool:
        return False

    def full(self, step: int, steps: int | None) -> bool:
        return True

    def observe(self, history: History) -> None:
        """The mean ratio over samples and tokens of the first stream's L2 norm over channels."""
        if len(history.order) < 2:
            return
        now, before = (values[0].float() for values in history.values[:2])
        channel = 1 if now.dim() == 4 else -1  # [B, C, h, w] of a U-Net, [B, N, C] of blocks
        ratio = now.norm(dim=channel) / before.norm(dim=channel)
        self.seen.setdefault(history.nodes[0][0], []).append(ratio.mean().item())


@dataclass(frozen=True)
class _Changes(Broadcast):
    """Computes every step and writes down how far modules' outputs are from those steps before:
    for a kind, a step and a number of steps back, a value a module, stream, sample and call."""

    seen: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    def skips(self, kind: str) -> bool:
        return True

    def computes(self, kind: str, step: int, steps: int | None) -> bool:
        return True

    def kept(self, kind: str, step: int, steps: int | None) -> bool:
        return True

    def observe(self, kind: str, history: History) -> None:
        """``|F_now - F_before| / |F_now|`` in the L1 norm; the batch stands in dimension 1."""
        now, *past = history.values
        step, *nodes = history.nodes[0]
        for before, node in zip(past, nodes, strict=True):
            seen = self.seen.setdefault((kind, step, step - node), [])
            for n, b in zip(now, before, strict=True):
                size = n.float().flatten(2).abs().sum(2)
                seen += ((n.float() - b.float()).flatten(2).abs().sum(2) / size).flatten().tolist()


def _run_of(target: Any, policy: Any, run: Callable[[], Any]) -> Request:
    """The run that ``run()`` made of ``target`` under ``policy``."""
    with accelerated(target, cache=policy, exact=False):
        run()
        acceleration = acceleration_of(target)
        assert acceleration is not None
        if acceleration.last is None:
            raise ValueError(
                "calibrate: run made no run of target; need a call of the pipeline, or of "
                "fastdiff.sample with the network"
            )
        return acceleration.last


def activation_maxima(
    target: Any, run: Callable[[], Any]
) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """The largest magnitude of every input channel of every linear layer over a run, as
    :class:`~fastdiff.precision.Precision` takes it for smoothing.

    Args:
        target: a pipeline or network, not accelerated.
        run: calls it, in inference.

    Raises:
        ValueError: ``run`` called no linear layer, or a channel was not finite.
    """
    seen: dict[str, torch.Tensor] = {}
    hooks, patch = [], Patch()

    def add(key: str, x: torch.Tensor) -> None:
        most = x.detach().float().flatten(0, -2).abs().amax(0)
        seen[key] = torch.maximum(seen[key], most) if key in seen else most

    for prefix, network in _networks(target).items():
        for name, module in layers_of(network):

            def look(_: Any, args: tuple[Any, ...], key: str = name) -> None:
                add(key, args[0])

            full = f"{prefix}.{name}" if prefix else name
            hooks.append(module.register_forward_pre_hook(partial(look, key=full)))
        listen(network, f"{prefix}." if prefix else "", add, patch)
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
        patch.undo()
    if not seen:
        raise ValueError("activation_maxima: run called no linear layer of target")
    for name, most in seen.items():
        if not bool(most.isfinite().all()):
            raise ValueError(f"activation_maxima: inputs of layer {name} are not finite")
    return tuple((name, tuple(most.tolist())) for name, most in seen.items())


def layer_errors(target: Any, run: Callable[[], Any], precision: Precision) -> dict[str, float]:
    """The relative L2 error of every layer's output in the formats of ``precision``, the largest
    first, measured on the first call of each layer in a run.

    Args:
        target: a pipeline or network, not accelerated.
        run: ``run()`` calls the pipeline, or ``fastdiff.sample`` with the network.

    Raises:
        ValueError: ``run`` made no run of ``target``.
    """
    with accelerated(target, precision=precision, exact=False):
        run()
        acceleration = acceleration_of(target)
        assert acceleration is not None
        found = {layer.name: layer.error() for layer in acceleration.layers.values()}
    errors = {name: error for name, error in found.items() if error is not None}
    if not errors:
        raise ValueError(
            "layer_errors: run made no run of target in which a layer was in another format; need "
            "a call of the pipeline, or of fastdiff.sample with the network"
        )
    return dict(sorted(errors.items(), key=lambda pair: -pair[1]))


def sensitive(errors: dict[str, float], share: float) -> tuple[tuple[str, str], ...]:
    """``layers`` of a :class:`~fastdiff.precision.Precision` in which that share of the layers,
    those of the largest errors, stays in floats."""
    count = round(share * len(errors))
    return tuple((name, "float") for name in sorted(errors, key=lambda n: -errors[n])[:count])


def slower(
    target: Any, run: Callable[[], Any], precision: Precision
) -> tuple[tuple[str, str], ...]:
    """``layers`` of a :class:`~fastdiff.precision.Precision` in which the linear layers and
    convolutions whose format takes longer than floats, on this machine, stay in floats.

    Each is timed both ways on the first input that it has in a run.

    Args:
        target: a pipeline or network, not accelerated.
        run: ``run()`` calls the pipeline, or ``fastdiff.sample`` with the network.

    Raises:
        ValueError: ``run`` made no run of ``target`` in which a layer was in another format.
    """
    took: dict[str, tuple[float, float]] = {}
    hooks = []
    with accelerated(target, precision=precision, exact=False):
        acceleration = acceleration_of(target)
        assert acceleration is not None
        for own in acceleration.layers.values():
            if not isinstance(own.module, torch.nn.Module):
                continue  # the weight of experts

            def look(_: Any, args: tuple[Any, ...], own: Any = own) -> None:
                if own.name not in took and args and own.usable(args[0]):
                    took[own.name] = own.both(args[0])

            hooks.append(own.module.register_forward_pre_hook(look))
        try:
            with torch.no_grad():
                run()
        finally:
            for hook in hooks:
                hook.remove()
    if not took:
        raise ValueError(
            "slower: run made no run of target in which a layer was in another format; need a "
            "call of the pipeline, or of fastdiff.sample with the network"
        )
    return tuple((name, "float") for name, (floats, own) in took.items() if own > floats)


def magnitude_ratios(target: Any, run: Callable[[], Any]) -> tuple[float, ...]:
    """The ratios that :class:`~fastdiff.cache.MagnitudeRatio` takes, of one run.

    Args:
        target: a pipeline or network, not accelerated.
        run: ``run()`` calls the pipeline, or ``fastdiff.sample`` with the network.

    Returns:
        One ratio a step, the first is 1. Calls of one step (guidance) are averaged.

    Raises:
        ValueError: ``run`` did not run ``target``, or a ratio is not finite.
    """
    recorder = _Recorder(order=1)
    request = _run_of(target, recorder, run)
    steps = 1 + max(event.step for event in request.trace)
    ratios = [sum(seen) / len(seen) for _, seen in sorted(recorder.seen.items())]
    if len(ratios) != steps - 1 or not torch.tensor(ratios).isfinite().all():
        raise ValueError(
            f"magnitude_ratios: the run of {steps} steps gave {len(ratios)} ratios, {ratios}; need "
            "a finite one for each step but the first"
        )
    return (1.0, *ratios)


def frozen(
    target: Any,
    policy: FirstBlock | AccumulatedDistance,
    run: Callable[[], Any],
    share: float = 0.5,
) -> Forecast | DeepCache:
    """A rule's decisions on calibration inputs as a schedule, for runs of as many steps.

    It never waits for a decision and can be captured.

    Args:
        target: a pipeline or network, not accelerated.
        policy: the rule.
        run: ``run()`` calls the pipeline, or ``fastdiff.sample`` with the network.
        share: a step is computed where at least this share of the samples computed it.

    Returns:
        :class:`~fastdiff.cache.Forecast` for a transformer; for a U-Net
        :class:`~fastdiff.cache.DeepCache` at the rule's branch.

    Raises:
        ValueError: ``share`` is not in (0, 1], or ``run`` did not run ``target``.
    """
    if not 0 < share <= 1:
        raise ValueError(f"frozen: share is {share!r}, need a number above 0, to 1")
    request = _run_of(target, policy, run)
    done: dict[int, list[bool]] = {}
    for event in request.trace:
        done.setdefault(event.step, []).extend(event.computed)
    steps = tuple(s for s, c in sorted(done.items()) if s == 0 or sum(c) >= share * len(c))
    if request.trace[0].part.startswith("blocks"):
        return Forecast(schedule=steps, order=policy.order, method=policy.method)
    return DeepCache(branch=1, schedule=steps, order=policy.order, method=policy.method)


def module_schedules(
    target: Any, run: Callable[[], Any], threshold: float = 0.1, most: int = 3
) -> Broadcast:
    """A schedule for each kind of module, from how their outputs change over a run (after
    SmoothCache, Liu et al. 2024, arXiv:2411.10510).

    After a computed step t, steps s are reused while the change

        E(t, s) = mean |F_s - F_t|_1 / |F_s|_1    over modules of the kind, samples and calls

    is below ``threshold``, and the next one is computed. Compare with an even schedule: on the
    bundled DiT (25 steps, guidance 2, ten digits, 26 of 50 kinds and steps computed) the schedule
    of threshold 0.15 kept 35.7 dB of PSNR, ``Broadcast(2, 2, 2, 0, 1)`` 38.2 dB, and with
    ``order=1`` put into the former 46.7 dB.

    Args:
        target: a pipeline or network, not accelerated.
        run: ``run()`` calls the pipeline, or ``fastdiff.sample`` with the network. While it runs,
            every module keeps ``most + 1`` outputs.
        threshold: of the change; 0 reuses nothing.
        most: reuses in a row, 1 to 4.

    Returns:
        :class:`~fastdiff.cache.Broadcast` of order 0, for runs of as many steps.

    Raises:
        ValueError: an argument does not fit, ``run`` did not run ``target``, or no modules of
            ``target`` are known.
    """
    number("module_schedules", "threshold", threshold, 0, 1e9, "a number of at least 0")
    if whole("module_schedules", "most", most, 1) > 4:
        raise ValueError(f"module_schedules: most is {most}, need 1 to 4")
    recorder = _Changes(order=most)
    request = _run_of(target, recorder, run)
    steps = 1 + max(event.step for event in request.trace)
    found: dict[str, Any] = {}
    for kind in KINDS:
        computed = [0]
        for step in range(1, steps):
            seen = recorder.seen.get((kind, step, step - computed[-1]), [])
            # NaN is no small change.
            if not seen or not sum(seen) / len(seen) < threshold:
                computed.append(step)
        found[kind] = computed if len(computed) < steps else 1
    return Broadcast(**found, start=0, stop=1)
