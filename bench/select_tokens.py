"""The choice of a quarter of the tokens, of SD 3 at 512 and 1024 pixels, against torch's sorts and
top-k. What it is held to is a step of the network: its share of one stands in bench/sparse.py."""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor

import fastdiff
from fastdiff.ops import select_tokens


def _top_k(score: Tensor, count: int) -> Tensor:
    """The highest alone, in order: less than what the op does."""
    return score.topk(count, 1).indices.sort(1).values


def cases() -> list[Case]:
    result = []
    for tokens in (1024, 4096, 16384):
        score, count = torch.rand(2, tokens), tokens // 4
        drops = torch.randint(5, (2, tokens), dtype=torch.int32)

        def ours(score: Tensor = score, count: int = count, drops: Tensor = drops) -> Tensor:
            return select_tokens(score, count, drops, high=0.3)[0]

        def sorts(score: Tensor = score, count: int = count, drops: Tensor = drops) -> Tensor:
            with fastdiff.use("ref"):
                return select_tokens(score, count, drops, high=0.3)[0]

        result.append(
            Case(
                f"25% of [2, {tokens}], both ends",
                ours,
                {
                    "eager": sorts,
                    "topk": lambda score=score, count=count: _top_k(score, count),
                },
                bytes=2.0 * tokens * 12 + 2.0 * count * 8,
                target=1.2,
            )
        )
    return result
