r"""Experts for ranges of noise levels, chosen for every row of a batch (PPAP: Go et al. 2023,
arXiv:2212.05973; range i of N is [e_i, e_(i+1)), the last one closed).

Whole modules run on the rows of their range; low-rank adapters of linear layers need no wait for
the device, as their rows are grouped there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops


def uniform_edges(count: int, high: float = 1000.0) -> list[float]:
    """Edges of ``count`` ranges of equal size from 0 to ``high``."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"uniform_edges: count is {count!r}, need an integer of at least 1")
    return [high * i / count for i in range(count + 1)]


def _edges(who: str, edges: Sequence[float], count: int) -> list[float]:
    found = [float(e) for e in edges]
    if len(found) != count + 1 or any(b <= a for a, b in zip(found, found[1:], strict=False)):
        raise ValueError(f"{who}: edges is {list(edges)!r}, need {count + 1} ascending numbers")
    return found


def noise_bins(t: Tensor, edges: Tensor) -> Tensor:
    """int64 ``[B]``: the range of every level; no wait.

    Args:
        t: ``[B]``, levels. Those outside of all ranges get the nearest one.
        edges: float ``[N + 1]``, ascending, on the device of ``t``.
    """
    found = torch.bucketize(t.float(), edges.float(), right=True) - 1
    return found.clamp(0, edges.shape[0] - 2)


class NoiseExperts(nn.Module):
    """One module for each range of noise levels: ``experts[i](x, t, ...)`` on the rows of range i.

    Args:
        experts: N modules of the same signature, ``(x [B, ...], t [B], *tensors [B, ...])``.
        edges: N + 1 ascending levels.

    Raises:
        ValueError: the edges do not fit.
    """

    def __init__(self, experts: Sequence[nn.Module], edges: Sequence[float]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        found = _edges("NoiseExperts", edges, len(self.experts))
        self.register_buffer("edges", torch.tensor(found), persistent=False)

    def forward(self, x: Tensor, t: Tensor, *more: Tensor | None) -> Tensor:
        """Each row through the expert of its level.

        The host needs to know the rows of every range: a batch of one level (an expanded scalar)
        or ``t`` on the CPU costs no wait; another ``t`` on a device costs one.

        Raises:
            ValueError: a level is outside of all ranges, or ``t`` is not ``[B]``.
        """
        if t.dim() != 1 or t.shape[0] != x.shape[0]:
            raise ValueError(f"NoiseExperts: t has shape {list(t.shape)}, need [{x.shape[0]}]")
        levels = t[:1] if t.stride(0) == 0 else t
        edges = self.get_buffer("edges").cpu()
        known = levels.detach().float().cpu()
        bad = known[~((known >= edges[0]) & (known <= edges[-1]))]
        if bad.numel():
            raise ValueError(
                f"NoiseExperts: t has level {float(bad[0])}, need {float(edges[0])} to "
                f"{float(edges[-1])}"
            )
        which = noise_bins(known, edges)
        if which.numel() and bool((which == which[0]).all()):
            out: Tensor = self.experts[int(which[0])](x, t, *more)
            return out
        parts, rows = [], []
        for i, expert in enumerate(self.experts):
            row = (which == i).nonzero()[:, 0].to(x.device)
            if row.numel():
                some = (m if m is None else m[row] for m in more)
                parts.append(expert(x[row], t[row], *some))
                rows.append(row)
        if not parts:
            return x.clone()
        place = torch.cat(rows)
        return torch.cat(parts)[torch.argsort(place)]


class NoiseAdapters(nn.Module):
    """A linear layer with a low-rank adapter for each range: ``W x + b + scale up_i down_i x``.

    Rows are grouped by range on the device and run as two grouped products; nothing waits.

    Args:
        linear: the layer, which stays as it is.
        count: N adapters.
        rank: of each, at least 1.
        edges: N + 1 ascending levels; None: equal ranges of 0 to 1000.
        scale: of what adapters add.

    Attributes:
        down, up: ``[N, rank, K]`` and ``[N, out, rank]``; ``up`` starts at 0.

    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        linear: nn.Linear,
        count: int,
        rank: int,
        edges: Sequence[float] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("count", count), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"NoiseAdapters: {name} is {value!r}, need at least 1")
        self.linear, self.scale = linear, scale
        found = _edges("NoiseAdapters", edges or uniform_edges(count), count)
        like: dict[str, Any] = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        self.register_buffer(
            "edges", torch.tensor(found, device=linear.weight.device), persistent=False
        )
        self.down = nn.Parameter(torch.empty(count, rank, linear.in_features, **like))
        self.up = nn.Parameter(torch.zeros(count, linear.out_features, rank, **like))
        nn.init.normal_(self.down, std=linear.in_features**-0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Args:
        x: ``[B, ..., K]``.
        t: ``[B]``, the level of every row; outside of all ranges the nearest one counts.
        """
        which = noise_bins(t, self.get_buffer("edges"))
        each = x.shape[1:-1].numel()
        which = which.repeat_interleave(each, output_size=which.shape[0] * each)
        hit = which[:, None] == torch.arange(self.down.shape[0], device=x.device)
        routing = ops.moe_route(hit.float(), 1, gate="sigmoid")
        rows = x.reshape(-1, x.shape[-1])
        low = ops.grouped_linear(rows, self.down, routing.offsets, index=routing.tokens)
        added = ops.grouped_linear(low, self.up, routing.offsets)
        back = added[routing.position[:, 0]].view(*x.shape[:-1], -1)
        out: Tensor = self.linear(x) + self.scale * back
        return out

    def merged(self, i: int) -> Tensor:
        """``[out, K]``: the weight with the adapter of range ``i``."""
        return self.linear.weight + self.scale * self.up[i] @ self.down[i]
