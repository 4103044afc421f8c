r"""Attention with other numbers of tokens than in training, and with reference tokens.

The entropy of a softmax grows with the number of keys. Where a network was trained with T tokens
and sees N, attention keeps the entropy it was trained for with the scale (Jin et al. 2023,
arXiv:2306.08645, section 3.3)

    lambda = sqrt(log_T(N) / d)

of which 1 / sqrt(d) is the case N = T. It is for self-attention alone, and N is the number of keys:
at a sparse step all tokens, not those in focus.

Reference tokens (a picture whose subject the result shall have) get a weight w by adding log w to
their scores, low at the first and last steps and high between (CustomVideoX, Jiang et al. 2025,
arXiv:2502.06527, section 3.3), and another in a region of the picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.cache._check import number, whole
from fastdiff.ops import GroupBias


def entropy_scale(tokens: int, trained: int, dim: int) -> float:
    """The scale of self-attention over ``tokens`` keys in a network trained with ``trained``.

    Args:
        tokens: N, at least 1.
        trained: T, at least 2.
        dim: d, channels of a head, at least 1.

    Returns:
        ``sqrt(log N / log T / d)``; exactly ``1 / sqrt(d)`` at N = T, 0 at N = 1.

    Raises:
        ValueError: an argument is no integer of that range.
    """
    who = "entropy_scale"
    whole(who, "tokens", tokens, 1)
    whole(who, "trained", trained, 2)
    whole(who, "dim", dim, 1)
    if tokens == trained:
        return 1.0 / math.sqrt(dim)
    return math.sqrt(math.log(tokens) / math.log(trained) / dim)


def parabola(steps: int, low: float, high: float) -> Tensor:
    """Weights of reference tokens over a run: ``low`` at both ends, ``high`` between, float32
    ``[steps]``, the same forwards and backwards.

    Raises:
        ValueError: ``steps`` is below 1, or a weight is negative or not finite.
    """
    whole("parabola", "steps", steps, 1)
    for name, value in (("low", low), ("high", high)):
        number("parabola", name, value, 0, 1e30, "a finite number of at least 0")
    if steps == 1:
        return torch.tensor([float(high)])
    x = torch.linspace(-1, 1, steps, dtype=torch.float64)
    x = (x - x.flip(0)) / 2  # to the bit the same on both sides
    return (high + (low - high) * x.square()).float()


def reference_bias(weight: Tensor, tokens: int, references: int) -> Tensor:
    """A bias per key for :func:`fastdiff.ops.attention`: log ``weight`` on the last keys.

    Args:
        weight: ``[]`` or ``[B]``, at least 0: that of the step, such as ``parabola(...)[i]``; stays
            on its device. 1 changes nothing, 0 leaves the references out.
        tokens: keys before the references.
        references: keys of the reference, which come last.

    Returns:
        float32 ``[B|1, 1, tokens + references]``.
    """
    w = weight.float().reshape(-1, 1, 1)
    bias = w.new_zeros(w.shape[0], 1, tokens + references)
    bias[..., tokens:] = w.log()
    return bias


def region_bias(weight: Tensor, region: Tensor, delta: float, references: int) -> GroupBias:
    """The same as a bias by groups, with ``delta`` more on the references for rows of a region.

    Args:
        weight: as for :func:`reference_bias`.
        region: bool ``[B|1, N]``, tokens of the picture that show the reference's subject.
        delta: added to the scores of references there, in natural-log units; -inf leaves them out.
        references: keys of the reference, which come after the N of the picture.

    Returns:
        For queries of the N tokens, and N + ``references`` keys.

    Raises:
        ValueError: ``region`` is not bool ``[B, N]``, or ``delta`` is NaN.
    """
    if region.dtype != torch.bool or region.dim() != 2:
        raise ValueError(
            f"region_bias: region is {region.dtype} {list(region.shape)}, need torch.bool [B, N]"
        )
    if delta != delta:
        raise ValueError(f"region_bias: delta is {delta!r}, need a number")
    log = weight.float().reshape(-1).log()
    zero = torch.zeros_like(log)
    rows = torch.stack([zero, log, zero, log + delta], 1).view(-1, 1, 2, 2)
    tokens = region.shape[1]
    keys = torch.arange(tokens + references, device=region.device)[None] >= tokens
    return GroupBias(region.long(), keys.long(), rows)
