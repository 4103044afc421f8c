"""Prior noise injection (Faster Diffusion, arXiv:2312.09608, section 3.4) after a scheduler's step.

What is added after step i enters step i + 1 before its encoder, whether that is a key step or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.cache.faster_diffusion import EncoderPropagation
from fastdiff.engine.request import Request

_KEY = "prior noise"


def _late(request: Request, scheduler: Any, policy: EncoderPropagation) -> list[bool]:
    """Which steps of the run are late; the host waits for the times once a run."""
    if getattr(scheduler, "order", 1) != 1:
        raise ValueError(
            f"EncoderPropagation: inject is {policy.inject}, which needs a scheduler of order 1; "
            f"{type(scheduler).__name__} has {scheduler.order}"
        )
    times = scheduler.timesteps
    if isinstance(times, Tensor):
        request.syncs += times.device.type != "cpu"
        times = times.tolist()
    share = policy.inject_below * scheduler.config.num_train_timesteps
    return [t < share for t in times[len(times) - (request.steps or len(times)) :]]


@torch.no_grad()
def inject(
    request: Request, scheduler: Any, x: Tensor, out: Any, policy: EncoderPropagation
) -> None:
    """After step ``request.step`` from ``x``: add the run's first ``x`` to the new state.

    Args:
        x: what the scheduler's step was given as its sample.
        out: what it returned, the new state first; written in place.

    Raises:
        ValueError: the scheduler is of a higher order: it would overwrite what is added.
    """
    if _KEY not in request.state:
        request.state[_KEY] = (x.clone(), _late(request, scheduler, policy))
    first, late = request.state[_KEY]
    following = request.step + 1
    if following < len(late) and late[following]:
        out[0].add_(first, alpha=policy.inject)
