r"""Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1) on what a program optimises: latents,
scene parameters. Elementwise, so samples do not touch each other; no host synchronisation.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    theta <- theta - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """State of one tensor's optimiser."""

    def step(self, theta: Tensor, g: Tensor, lr: float) -> Tensor:
        """The new ``theta`` for the gradient ``g`` of its shape."""
        ...


class SGD:
    """``theta - lr g``: no state."""

    def step(self, theta: Tensor, g: Tensor, lr: float) -> Tensor:
        return theta - lr * g


class Adam:
    """State of one tensor's optimiser; ``theta`` is never written to."""

    def __init__(self, theta: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"Adam: betas is {betas!r}, need two numbers in [0, 1)")
        self.betas, self.eps = betas, eps
        self.m, self.v, self.k = torch.zeros_like(theta), torch.zeros_like(theta), 0

    def step(self, theta: Tensor, g: Tensor, lr: float) -> Tensor:
        """The new ``theta`` for the gradient ``g`` of its shape."""
        b1, b2 = self.betas
        self.k += 1
        self.m = torch.lerp(g, self.m, b1)
        self.v = torch.lerp(g * g, self.v, b2)
        root = (self.v / (1 - b2**self.k)).sqrt() + self.eps
        return theta - lr * (self.m / (1 - b1**self.k)) / root
