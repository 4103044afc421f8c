r"""Denoising as adaptation (Liao et al. 2024, Noise-DA, arXiv:2406.18516): a restoration network
learns from synthetic and real pictures through a denoiser that it helps, and that is thrown away.

    y = sqrt(gamma) y0 + sqrt(1 - gamma) eps,    gamma ~ U(gamma_{t-1}, gamma_t) for every row
    eps_hat = D([y, S(syn, real)], gamma)        conditions: restored synthetic and real pictures
    S swaps the two at random: D cannot tell which is which by its place
    negatives: syn_in + (real - real_in) and real_in + (syn - syn_in), the residuals swapped
    L = 1/2 (mean |eps - eps_hat|^2 + mean relu(|eps - eps_hat| - |eps - eps_neg| + margin))

Norms are root mean squares of a sample. Gradients reach the conditions, and by them the
restoration network; its loss on synthetic pairs is added by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.methods.particles import uniform
from fastdiff.methods.uncached import uncached
from fastdiff.ops.fused_step import Noise, philox_normal

STREAM = 32  # of the noise; then those of t, of gamma within its bin and of swaps


class Drawn(NamedTuple):
    """What a training step draws: ``gamma [B]``, ``eps [B, C, ...]``, ``swap [B]`` bool."""

    gamma: Tensor
    eps: Tensor
    swap: Tensor


class Losses(NamedTuple):
    """``total`` = (``diffusion`` + ``contrast``) / 2, scalars; ``eps_hat [B, C, ...]``."""

    total: Tensor
    diffusion: Tensor
    contrast: Tensor
    eps_hat: Tensor


def drawn(y0: Tensor, alpha_bar: Tensor, seed: int | Tensor = 0, step: int = 0) -> Drawn:
    """Levels, noise and swaps of training step ``step``, each sample by its own counters.

    Args:
        y0: ``[B, C, ...]``, for its shape, dtype and device.
        alpha_bar: ``[T]``, decreasing within (0, 1); the level before the first is 1.
        seed: one integer, or int64 ``[B]``.

    Raises:
        ValueError: ``alpha_bar`` does not fit.
    """
    if alpha_bar.dim() != 1 or not len(alpha_bar) or not alpha_bar.is_floating_point():
        raise ValueError(
            f"noise_da: alpha_bar is {alpha_bar.dtype} {list(alpha_bar.shape)}, need floats [T]"
        )
    batch, device = y0.shape[0], y0.device
    slots = torch.zeros(batch, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        slots, seed = torch.arange(batch, device=device), torch.full_like(slots, seed)

    def numbers(stream: int) -> Tensor:
        return uniform((batch, 1), Noise(seed, slots, step, stream))[:, 0]

    edges = torch.cat((alpha_bar.new_ones(1), alpha_bar)).double().to(device)
    t = (numbers(STREAM + 1) * len(alpha_bar)).long().clamp(max=len(alpha_bar) - 1)
    gamma = torch.lerp(edges[t], edges[t + 1], numbers(STREAM + 2))
    eps = philox_normal(y0.shape, seed, slots, step, STREAM, dtype=y0.dtype)
    return Drawn(
        gamma.to(torch.promote_types(y0.dtype, torch.float32)), eps, numbers(STREAM + 3) < 0.5
    )


def q_sample(y0: Tensor, gamma: Tensor, eps: Tensor) -> Tensor:
    """``sqrt(gamma) y0 + sqrt(1 - gamma) eps`` with a level for every row, in the dtype of ``y0``.

    Args:
        y0, eps: ``[B, C, ...]``.
        gamma: ``[B]`` in [0, 1].
    """
    level = gamma.view(-1, *[1] * (y0.dim() - 1))
    return (level.sqrt() * y0 + (1 - level).sqrt() * eps).to(y0.dtype)


def swapped(syn: Tensor, real: Tensor, swap: Tensor) -> Tensor:
    """The two conditions ``[B, 2 C, ...]`` one after the other, real first where ``swap``."""
    there = swap.view(-1, *[1] * (syn.dim() - 1))
    return torch.cat((torch.where(there, real, syn), torch.where(there, syn, real)), 1)


def noise_da_loss(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    syn: Tensor,
    real: Tensor,
    draw: Drawn,
    *,
    inputs: tuple[Tensor, Tensor] | None = None,
    margin: float = 1.0,
) -> Losses:
    """The loss of the denoiser and, through its conditions, of the restoration network.

    Args:
        denoiser: ``denoiser([N, 3 C, ...], gamma [N]) -> [N, C, ...]``: the noise in the first C
            channels. Positives and negatives are the rows of one call.
        y0: clean pictures ``[B, C, ...]``.
        syn, real: what the restoration network makes of synthetic and of real pictures.
        draw: of :func:`drawn`; positives and negatives share it.
        inputs: the synthetic and the real pictures themselves, whose residuals the negatives swap;
            None: no negatives, contrast 0.
        margin: of the contrast, in units of noise; at least 0.

    Raises:
        ValueError: an argument does not fit, or ``denoiser`` has caches.
    """
    for name, value in (("syn", syn), ("real", real), ("draw.eps", draw.eps)):
        if value.shape != y0.shape:
            raise ValueError(f"noise_da: {name} is {list(value.shape)}, need {list(y0.shape)}")
    for name, value in (("draw.gamma", draw.gamma), ("draw.swap", draw.swap)):
        if value.shape != y0.shape[:1]:
            raise ValueError(f"noise_da: {name} is {list(value.shape)}, need [{y0.shape[0]}]")
    if not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise ValueError(f"noise_da: margin is {margin!r}, need a number of at least 0")
    uncached("noise_da", denoiser, "which know nothing of conditions that change in every row")
    y = q_sample(y0, draw.gamma, draw.eps)
    rows, gamma = torch.cat((y, swapped(syn, real, draw.swap)), 1), draw.gamma
    if inputs is not None:
        syn_in, real_in = inputs
        for name, value in (("inputs[0]", syn_in), ("inputs[1]", real_in)):
            if value.shape != y0.shape:
                raise ValueError(f"noise_da: {name} is {list(value.shape)}, need {list(y0.shape)}")
        negative = swapped(syn_in + (real - real_in), real_in + (syn - syn_in), draw.swap)
        rows = torch.cat((rows, torch.cat((y, negative), 1)))
        gamma = torch.cat((gamma, gamma))
    out = denoiser(rows, gamma)
    if out.shape != (len(rows), *y0.shape[1:]):
        raise ValueError(
            f"noise_da: denoiser gives {list(out.shape)}, need {[len(rows), *y0.shape[1:]]}"
        )
    eps_hat = out[: len(y0)]
    diffusion = F.mse_loss(eps_hat, draw.eps)
    contrast = torch.zeros_like(diffusion)
    if inputs is not None:
        near, far = (_distance(draw.eps, one) for one in (eps_hat, out[len(y0) :]))
        contrast = F.relu(near - far + margin).mean()
    return Losses((diffusion + contrast) / 2, diffusion, contrast, eps_hat)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean squares ``[B]``, with a gradient at 0."""
    both = torch.promote_types(a.dtype, b.dtype)
    square = ops.sample_sums(a.to(both), b.to(both), kind="difference") / a[0].numel()
    return (square + 1e-12).sqrt()
