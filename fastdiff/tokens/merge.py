r"""Token merging for diffusion (Bolya & Hoffman 2023, arXiv:2303.17604; ToMe: Bolya et al. 2023,
arXiv:2210.09461): a module runs on fewer tokens, of which some stand for several.

Of every cell of ``stride`` tokens the first is a destination, the others are sources. Each source
has a best destination, by the cosine of what the module reads; the r = floor(ratio N) sources that
are most alike to theirs are merged: a destination becomes the mean of itself and of what is merged
into it. Afterwards every merged source gets what its destination got.

With s_j the number of tokens that j stands for, attention is proportional with the bias log s_j on
key j: then merging equal tokens changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.cache._check import number, whole


@dataclass(frozen=True)
class Merge:
    """Self-attention on merged tokens.

    Args:
        ratio: share of the tokens that is merged away, 0 to 1; at most the sources there are
            (3 of 4 with a stride of 2). 0 merges nothing.
        stride: tokens on a side of a cell, at least 2.
        proportional: keys that stand for several tokens count as several.
        levels: of a U-Net's resolutions with attention, how many from the finest on.

    Raises:
        ValueError: an argument does not fit.
    """

    ratio: float = 0.5
    stride: int = 2
    proportional: bool = True
    levels: int = 1

    def __post_init__(self) -> None:
        number("Merge", "ratio", self.ratio, 0, 1, "a number from 0 to 1")
        whole("Merge", "stride", self.stride, 2)
        whole("Merge", "levels", self.levels, 1)

    @property
    def neutral(self) -> bool:
        """It merges nothing."""
        return self.ratio == 0

    def full(self, step: int, steps: int | None) -> bool:
        """Whether a step computes everything: all steps are alike."""
        return self.neutral


class Plan(NamedTuple):
    """Who is merged into whom, for the samples of a batch.

    Attributes:
        kept: ``[B, M]``, tokens that stay, ascending; M = N - r.
        place: ``[B, N]``, the place in ``kept`` of every token, or of what it is merged into.
        sizes: float32 ``[B, M]``, how many tokens each stands for.
    """

    kept: Tensor
    place: Tensor
    sizes: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """Means ``[B, M, C]`` of tokens ``[B, N, C]``, taken in float32."""
        wide = x.float()
        total = wide.new_zeros(x.shape[0], self.kept.shape[1], x.shape[2])
        total.scatter_add_(1, self.place[:, :, None].expand(-1, -1, x.shape[2]), wide)
        return (total / self.sizes[:, :, None]).to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        """Every token what it, or its destination, got: ``[B, M, C]`` -> ``[B, N, C]``."""
        return y.gather(1, self.place[:, :, None].expand(-1, -1, y.shape[2]))


@lru_cache(maxsize=64)
def _destinations(height: int, width: int, stride: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a grid that are destinations, and the others."""
    first = {r * width + c for r in range(0, height, stride) for c in range(0, width, stride)}
    rest = tuple(n for n in range(height * width) if n not in first)
    return tuple(sorted(first)), rest


def plan(x: Tensor, grid: Sequence[int], policy: Merge) -> Plan | None:
    """Whom to merge, by the tokens ``x [B, N, C]`` of a ``grid`` (rows, columns); None: nobody."""
    batch, tokens = x.shape[:2]
    to, sources = (torch.tensor(i, device=x.device) for i in _destinations(*grid, policy.stride))
    count = min(int(policy.ratio * tokens), len(sources))
    if count == 0:
        return None
    unit = F.normalize(x.float(), dim=2)
    alike, best = (unit[:, sources] @ unit[:, to].mT).max(2)  # [B, sources]
    order = alike.sort(dim=1, descending=True, stable=True).indices[:, :count]
    gone = sources[order]  # [B, r]
    into = to[best.gather(1, order)]
    stays = torch.ones(batch, tokens, dtype=torch.bool, device=x.device).scatter_(1, gone, False)
    kept = stays.byte().sort(dim=1, descending=True, stable=True).indices[:, : tokens - count]
    place = stays.long().cumsum(1) - 1
    place = place.scatter(1, gone, place.gather(1, into))
    sizes = torch.zeros(kept.shape, device=x.device)
    sizes.scatter_add_(1, place, torch.ones(batch, tokens, device=x.device))
    return Plan(kept, place, sizes)
