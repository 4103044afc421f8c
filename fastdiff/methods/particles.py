r"""Particles: weights, effective sample size, and who survives, without the host.

Log-weights ``logw [G, K]`` are of K particles in each of G groups. A selection gives the place of
every survivor's parent within its group, ``[G, K]`` (or ``[G, 1]``: one for each group).
Uniform numbers come from the run's counters, so that a selection depends on nothing else.

Systematic: ``u ~ U(0, 1)``, survivor j has the parent whose share of the cumulative weights holds
``(u + j) / K``; a particle of weight w has floor(K w) or ceil(K w) children (Kitagawa 1996).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.fused_step import Noise, philox_normal
from fastdiff.ops.resample import SLACK, normalised, selected
from fastdiff.ops.resample import systematic as _systematic

SCHEMES = ("systematic", "multinomial", "argmax", "gumbel", "topk")


class Degenerate(ValueError):
    """No particle of a group has a weight: all rewards are -inf or NaN."""


def uniform(shape: tuple[int, ...], noise: Noise) -> Tensor:
    """Numbers in (0, 1), float64 ``[G, ...]``, from ``noise``'s counters: its normal numbers
    through their distribution function."""
    z = philox_normal(shape, *noise).double()
    tiny = 2.0**-53
    return torch.special.ndtr(z).clamp(tiny, 1 - tiny)


def check(logw: Tensor, what: str = "rewards") -> None:
    """The host looks whether every group has a weight.

    Raises:
        Degenerate: one has none.
    """
    dead = (~(logw > -math.inf)).all(1).nonzero()[:, 0].tolist()
    if dead:
        raise Degenerate(
            f"particles: in group {dead[0]} all {logw.shape[1]} {what} are -inf or NaN, need one "
            "particle with a finite one"
        )


def ess(logw: Tensor) -> Tensor:
    """Effective sample size ``[G]``, 1 to K: ``1 / sum w^2`` of normalised weights."""
    return 1 / normalised(logw).square().sum(1)


def systematic(logw: Tensor, u: Tensor) -> Tensor:
    """``[G, K]`` parents for ``u [G]`` in (0, 1)."""
    return _systematic(normalised(logw), u)


def multinomial(logw: Tensor, u: Tensor) -> Tensor:
    """``[G, N]`` independent parents for ``u [G, N]`` in (0, 1)."""
    edges = normalised(logw).cumsum(1)
    edges = edges / edges[:, -1:]
    return torch.searchsorted(edges, u, right=True).clamp(max=logw.shape[1] - 1)


def argmax(logw: Tensor) -> Tensor:
    """``[G, 1]``: the particle of the largest weight, the first of equals."""
    return normalised(logw).argmax(1, keepdim=True)


def gumbel(logw: Tensor, u: Tensor) -> Tensor:
    """``[G, 1]``: one particle with probability proportional to its weight, for ``u [G, K]``."""
    return (normalised(logw).log() - torch.log(-torch.log(u))).argmax(1, keepdim=True)


def topk(logw: Tensor, n: int) -> Tensor:
    """``[G, K]``: the ``n`` particles of the largest weights in turn, K // n or more copies of
    each."""
    best = normalised(logw).topk(n, 1).indices
    k = logw.shape[1]
    return best.repeat(1, -(-k // n))[:, :k]


class Resampled(NamedTuple):
    """``rows`` int64 ``[G K]``: the row that each row takes; ``logw [G, K]`` after; ``did [G]``
    bool: which groups were resampled."""

    rows: Tensor
    logw: Tensor
    did: Tensor


def resample(
    logw: Tensor, noise: Noise, *, scheme: str = "systematic", ess_below: float = 1.0
) -> Resampled:
    """Resample the groups whose effective sample size is below ``ess_below K``; others keep their
    particles *and their weights*.

    After a selection all weights of a group are equal: the mean weight, so that their sum (the
    estimate of the normalising constant) stays.

    Args:
        logw: ``[G, K]``.
        noise: its counters are of the groups, ``[G]``.
        scheme: "systematic" or "multinomial".
        ess_below: in (0, 1]; 1: whenever the weights differ.
    """
    groups, k = logw.shape
    if scheme == "systematic":
        parents, after, did = ops.resample(logw, uniform((groups,), noise), ess_below)
    elif scheme == "multinomial":
        parents = multinomial(logw, uniform((groups, k), noise))
        parents, after, did = selected(logw, parents, ess_below * k * SLACK)
    else:
        raise ValueError(f"resample: scheme is {scheme!r}, need 'systematic' or 'multinomial'")
    first = torch.arange(groups, device=logw.device)[:, None] * k
    return Resampled((first + parents).flatten(), after, did)
