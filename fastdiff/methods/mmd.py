r"""Fine-tuning few-step samplers on a distance of laws (Aiello et al. 2023, MMD-DDM,
arXiv:2301.07969): the whole sampler is differentiated, and its samples' features are compared with
the data's by the unbiased maximum mean discrepancy.

    MMD^2 = (sum_{i != j} k(x_i, x_j)) / (m (m - 1)) + (sum_{i != j} k(y_i, y_j)) / (n (n - 1))
            - 2 / (m n) sum_{i, j} k(x_i, y_j)
    rbf:  k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2))      bandwidth^2 = d / 2 where none is given
    poly: k(x, y) = (<x, y> / d + 1)^3

Its mean is 0 where the laws are equal, so it may be below 0: it is not clamped. Memory is that of
one model call and the states between calls, as each call is a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from fastdiff.methods.uncached import uncached
from fastdiff.samplers.run import Run

KERNELS = ("rbf", "poly")


def rollout(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    *,
    checkpoint: bool = True,
    **settings: Any,
) -> Tensor:
    """What :func:`fastdiff.samplers.sample` gives, differentiable in the model and in ``x``.

    Steps run on rows that have a backward. Without gradients it is the same loop, bit for bit.

    Args:
        model, x, settings: as for :func:`fastdiff.samplers.sample`.
        checkpoint: keep the states between model calls alone, and call the model anew in the
            backward; its random numbers (dropout) are then the same.

    Raises:
        ValueError: an argument does not fit, or ``model`` has caches: what they keep is of other
            weights after every update, and has no gradient.
    """
    uncached("mmd", model, "which have no gradient and are of older weights after an update")
    run = Run(model, x, **settings)
    run.start()
    for i in range(len(run)):
        if checkpoint and torch.is_grad_enabled():
            m = recomputed(lambda x, i=i: run.predict(i, x), run.x, use_reentrant=False)
        else:
            m = run.predict(i)
        run.step(i, m)
    return run.x


def kernel(x: Tensor, y: Tensor, kind: str = "rbf", bandwidth: float | None = None) -> Tensor:
    """``k(x_i, y_j)`` ``[m, n]`` of ``x [m, D]`` and ``y [n, D]``."""
    d = x.shape[1]
    if kind == "poly":
        return (x @ y.T / d + 1) ** 3
    if kind != "rbf":
        raise ValueError(f"mmd: kernel is {kind!r}, need one of {', '.join(KERNELS)}")
    twice = d if bandwidth is None else 2 * bandwidth**2
    # By differences, not by |x|^2 + |y|^2 - 2 x y: no cancellation at near points.
    return torch.exp(-(x[:, None] - y[None]).square().sum(2) / twice)


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kind: str = "rbf",
    bandwidth: float | None = None,
    block: int | None = None,
) -> Tensor:
    """The unbiased estimate of MMD^2, a float64 number, differentiable in both.

    Args:
        x, y: features ``[m, D]`` and ``[n, D]``, at least two of each.
        kind: "rbf" or "poly".
        bandwidth: of "rbf".
        block: rows at a time, each block recomputed in the backward: memory is ``block`` times the
            larger set and not their product; None: all.

    Raises:
        ValueError: an argument does not fit.
    """
    for name, value in (("x", x), ("y", y)):
        if value.dim() != 2 or len(value) < 2 or not value.is_floating_point():
            raise ValueError(
                f"mmd: {name} is {value.dtype} {list(value.shape)}, need floats [at least 2, D]"
            )
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"mmd: y has {y.shape[1]} features, need {x.shape[1]}, as x")
    if kind not in KERNELS:
        raise ValueError(f"mmd: kernel is {kind!r}, need one of {', '.join(KERNELS)}")
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(f"mmd: bandwidth is {bandwidth!r}, need a number above 0, or None")
    if block is not None and (not isinstance(block, int) or block < 1):
        raise ValueError(f"mmd: block is {block!r}, need an integer of at least 1, or None")
    a, b = x.double(), y.double()

    def total(u: Tensor, v: Tensor) -> Tensor:
        if block is None:
            return kernel(u, v, kind, bandwidth).sum()
        sums = [
            recomputed(
                lambda p, q: kernel(p, q, kind, bandwidth).sum(), part, v, use_reentrant=False
            )
            for part in torch.split(u, block)
        ]
        return torch.stack(sums).sum()

    def own(u: Tensor) -> Tensor:
        same = (u.square().sum(1) / u.shape[1] + 1) ** 3 if kind == "poly" else u.new_ones(len(u))
        return (total(u, u) - same.sum()) / (len(u) * (len(u) - 1))

    return own(a) + own(b) - 2 * total(a, b) / (len(a) * len(b))


def mmd_loss(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    data: Tensor,
    features: Callable[[Tensor], Tensor] | None = None,
    *,
    kind: str = "rbf",
    bandwidth: float | None = None,
    block: int | None = None,
    checkpoint: bool = True,
    **settings: Any,
) -> Tensor:
    """MMD^2 between samples and data, for an optimiser of the model's parameters.

    Args:
        model, x, checkpoint, settings: of :func:`rollout`; ``settings`` with another ``seed`` in
            every update.
        data: ``[n, C, ...]`` of the data's law.
        features: ``features(x [N, C, ...]) -> [N, D]``, differentiable, its own weights not
            trained; None: the samples themselves, flattened.
        kind, bandwidth, block: of :func:`mmd`.

    Raises:
        ValueError: an argument does not fit.
    """
    phi = features or (lambda z: z.flatten(1))
    with torch.no_grad():
        target = phi(data)
    found = phi(rollout(model, x, checkpoint=checkpoint, **settings))
    return mmd(found, target, kind=kind, bandwidth=bandwidth, block=block)
