"""What policies learn once, on inputs like those to come, so that runs need not measure it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdiff.accelerate import accelerated, acceleration_of
from fastdiff.cache import AccumulatedDistance, DeepCache, FirstBlock, Forecast
from fastdiff.engine.history import History
from fastdiff.engine.request import Request


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
