"""Batches in which every sample has as many tokens as it likes, packed one after another.

A packed stream is ``[1, T, C]`` with the rows of sample 0 first; ``counts`` says how many each has.
What works on single rows (linear layers, norms with a modulation per token) takes it as it is;
:func:`fastdiff.ops.gather_tokens` and ``update_tokens_`` take places among the B * N tokens of all
samples (:func:`packed_index`). Counts are known to the host: nothing is padded, nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops


def _check(who: str, counts: Sequence[int], batch: int, total: int) -> list[int]:
    each = [int(n) for n in counts]
    if len(each) != batch or any(n < 0 for n in each) or sum(each) != total:
        raise ValueError(
            f"{who}: counts is {list(counts)!r}, need {batch} integers of at least 0 that add up "
            f"to {total}"
        )
    return each


def _starts(counts: list[int], device: torch.device) -> Tensor:
    """Where the rows of each sample begin, and the end; nothing waits for the copy to a GPU."""
    pin = device.type == "cuda"
    starts = torch.tensor([0, *accumulate(counts)], device="cpu", pin_memory=pin)
    return starts.to(device, non_blocking=True)


def packed_index(index: Sequence[Tensor], tokens: int) -> Tensor:
    """Places of packed tokens in a batch whose samples lie one after another.

    Args:
        index: for every sample int64 ``[A_b]``, its tokens, 0 to ``tokens - 1``.
        tokens: N of a sample.

    Returns:
        int64 ``[1, sum A_b]``, for ``gather_tokens(x.view(1, B * N, C), ...)``.
    """
    return torch.cat([part + b * tokens for b, part in enumerate(index)])[None]


def packed_modulation(m: Tensor, counts: Sequence[int]) -> Tensor:
    """A modulation per sample ``[B, D]`` for packed rows: ``[1, T, D]``."""
    each = _check("packed_modulation", counts, m.shape[0], sum(counts))
    return torch.cat([row.expand(n, -1) for row, n in zip(m, each, strict=True)])[None]


def packed_attention(q: Tensor, k: Tensor, v: Tensor, counts: Sequence[int], **how: Any) -> Tensor:
    """Attention of packed queries, each over the keys of its own sample.

    Args:
        q: ``[1, H, T, D]``, the rows of all samples one after another.
        k, v: ``[B, H, N, D]``.
        counts: rows of each sample, adding up to T.
        how: ``scale``, ``bias`` per key ``[B|1, H|1, N]`` and ``key_lengths [B]`` of
            :func:`fastdiff.ops.attention`, which runs once: one launch, whose cost follows T.

    Returns:
        ``[1, H, T, D]``, on the native and triton rows to the bit what each sample gives alone.

    Raises:
        ValueError: ``counts`` does not fit q and k, or an argument is none of those.
    """
    each = _check("packed_attention", counts, k.shape[0], q.shape[2])
    if not how.keys() <= {"scale", "bias", "key_lengths", "impl"}:
        unknown = sorted(how.keys() - {"scale", "bias", "key_lengths", "impl"})[0]
        raise ValueError(f"packed_attention: {unknown} is given, need scale, bias or key_lengths")
    bias = how.get("bias")
    if bias is not None and bias.dim() != 3:
        raise ValueError(
            f"packed_attention: bias has shape {list(bias.shape)}, need a bias per key, 3 "
            "dimensions"
        )
    out: Any = ops.attention(q, k, v, q_starts=_starts(each, q.device), **how)
    return out
