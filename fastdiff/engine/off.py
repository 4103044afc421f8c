"""When caches are off, whatever the policy."""

from __future__ import annotations

import torch
from torch import nn


def why_off(network: nn.Module) -> str:
    """Why nothing may be reused in a call of ``network`` that begins now; "" where it may."""
    if network.training:
        return "the network is in training mode"
    return "gradients are recorded" if torch.is_grad_enabled() else ""
