"""When caches are off, whatever the policy, and when they are of little use."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fastdiff.engine.request import Request, current

FEW = 8  # steps of a distilled model: neighbours differ too much for a cache to be of use


def why_off(network: nn.Module) -> str:
    """Why nothing may be reused in a call of ``network`` that begins now; "" where it may."""
    if network.training:
        return "the network is in training mode"
    request = current()
    if request is not None and request.off:
        return request.off
    return "gradients are recorded" if torch.is_grad_enabled() else ""


def warn_of_few(request: Request, policy: Any) -> None:
    """At the first step of a run with few steps."""
    step, steps = request.step, request.steps
    if step == 0 and steps is not None and steps <= FEW and not policy.full(1, steps):
        name = type(policy).__name__
        warnings.warn(f"{name}: a run of {steps} steps gains little and loses much", stacklevel=5)
