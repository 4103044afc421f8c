r"""Condition embedding perturbation (Chen et al. 2024, arXiv:2405.20494, on slight corruption of
training data): conditions are disturbed a little in training, and not at all in sampling.

    c <- c + delta,   delta ~ U(-gamma / sqrt(d), gamma / sqrt(d))    variance gamma^2 / (3 d)
                  or  delta ~ N(0, gamma^2 / d I)                     variance gamma^2 / d

d is the width of an embedding. The noise has counters of its own: neither a sampler's nor torch's
own random numbers are other ones for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.methods.particles import uniform
from fastdiff.ops.fused_step import Noise, philox_normal

KINDS = ("uniform", "normal")
CEP_STREAM = 24


def _check(gamma: float, kind: str) -> None:
    if not isinstance(gamma, int | float) or not 0 <= gamma < math.inf:
        raise ValueError(f"cep: gamma is {gamma!r}, need a number of at least 0")
    if kind not in KINDS:
        raise ValueError(f"cep: kind is {kind!r}, need one of {', '.join(KINDS)}")


def perturbed(c: Tensor, noise: Noise, *, gamma: float = 1.0, kind: str = "uniform") -> Tensor:
    """``c + delta`` in the dtype of ``c``; differentiable in c.

    Args:
        c: embeddings ``[B, ..., d]``.
        noise: counters of the samples; the stream is the caller's, see :data:`CEP_STREAM`.
        gamma: 0: ``c`` itself.
        kind: "uniform" or "normal".

    Raises:
        ValueError: an argument does not fit.
    """
    _check(gamma, kind)
    if c.dim() < 2 or not c.is_floating_point():
        raise ValueError(f"cep: c is {c.dtype} {list(c.shape)}, need floats [B, ..., d]")
    if gamma == 0:
        return c
    spread = gamma / math.sqrt(c.shape[-1])
    shape = tuple(c.shape)
    if kind == "uniform":
        delta = spread * (2 * uniform(shape, noise) - 1)
    else:
        delta = spread * philox_normal(shape, *noise)
    wide = torch.promote_types(c.dtype, torch.float32)
    return (c.to(wide) + delta.to(device=c.device, dtype=wide)).to(c.dtype)


class ConditionNoise:
    """Disturbs what a layer of a network gives, wherever that layer is in training mode.

    The n-th call in training draws with number n, each sample by its place in the batch.

    Args:
        network: any module.
        target: name of the layer whose output ``[B, ..., d]`` is the condition; of
            :class:`fastdiff.models.DiT` "y_embedder.embedding_table".
        gamma, kind: of :func:`perturbed`.
        seed: of the noise.

    Attributes:
        calls: disturbed so far; goes into a training checkpoint.

    Raises:
        ValueError: an argument does not fit, or the network has no such layer.
    """

    def __init__(
        self,
        network: nn.Module,
        target: str = "y_embedder.embedding_table",
        *,
        gamma: float = 1.0,
        kind: str = "uniform",
        seed: int = 0,
    ):
        _check(gamma, kind)
        layers = dict(network.named_modules())
        if target not in layers or not target:
            some = ", ".join([name for name in layers if name][:4]) or "none"
            raise ValueError(f"cep: target is {target!r}, need a layer's name, such as {some}")
        self.gamma, self.kind, self.seed, self.calls = gamma, kind, seed, 0
        self._handle: Any = layers[target].register_forward_hook(self._hook)

    def _hook(self, layer: nn.Module, args: Any, c: Tensor) -> Tensor | None:
        if not layer.training or self.gamma == 0:
            return None
        slots = torch.arange(c.shape[0], device=c.device)
        seeds = torch.full_like(slots, self.seed)
        noise = Noise(seeds, slots, self.calls, CEP_STREAM)
        self.calls += 1
        return perturbed(c, noise, gamma=self.gamma, kind=self.kind)

    def remove(self) -> None:
        """Take the hook off; the network is what it was."""
        self._handle.remove()

    def __enter__(self) -> ConditionNoise:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()
