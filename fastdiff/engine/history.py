"""The last values of a feature that a cache keeps, and what they forecast."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fastdiff.cache.extrapolate import weights

Streams = tuple[Tensor, ...]


def fits_of(streams: Streams) -> Hashable:
    """What two calls must have in common for one to use what the other kept."""
    return tuple((s.shape, s.dtype, s.device) for s in streams)


def _stored(value: Tensor, minus: Tensor | None, room: Tensor | None) -> Tensor:
    """A copy of ``value`` or of ``value - minus``, in the memory of ``room`` where there is one."""
    if minus is not None:
        return value - minus if room is None else torch.sub(value, minus, out=room)
    return value.clone() if room is None else room.copy_(value)


class History:
    """Up to ``length`` values of a tuple of features ``[B, ...]``, each sample with its own steps.

    Memory is allocated until ``length`` values are kept and then used again: addresses stay.

    Attributes:
        values: the newest first.
        nodes: for every sample, the steps at which its values were computed, the newest first.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.values: list[Streams] = []
        self.nodes: list[list[int]] = []

    def put(self, step: int, streams: Streams, minus: Streams | None = None) -> None:
        """Keep ``streams`` (less ``minus``, of as many tensors or more) of all samples. A step that
        is done again, as its call broke off, takes its own place."""
        if not self.nodes:
            self.nodes = [[] for _ in range(streams[0].shape[0])]
        again = all(nodes[:1] == [step] for nodes in self.nodes)
        full = len(self.values) == self.length
        room: Sequence[Tensor | None] = self.values[-1] if full else ()
        if again:
            room = self.values.pop(0)
            self.nodes = [nodes[1:] for nodes in self.nodes]
        room = room or (None,) * len(streams)
        less: Sequence[Tensor | None] = minus or (None,) * len(streams)
        # A last block may end a stream, which is then not kept.
        new = tuple(_stored(s, m, r) for s, m, r in zip(streams, less, room, strict=False))
        self.values = [new, *self.values][: self.length]
        for nodes in self.nodes:
            nodes[:] = [step, *nodes][: self.length]

    def put_rows(self, step: int, rows: Tensor, which: Sequence[int], streams: Streams) -> None:
        """Keep ``streams [R, ...]`` of the samples ``which``; ``rows``: the same on the device."""
        kept = len(self.values)
        if kept < self.length and any(len(self.nodes[b]) == kept for b in which):
            self.values.append(tuple(torch.zeros_like(v) for v in self.values[0]))
        for newer, older in zip(self.values[-2::-1], self.values[:0:-1], strict=True):
            for n, o in zip(newer, older, strict=True):
                o.index_copy_(0, rows, n[rows])
        for newest, s in zip(self.values[0], streams, strict=False):
            newest.index_copy_(0, rows, s)
        for b in which:
            self.nodes[b] = [step, *self.nodes[b]][: self.length]

    def _weights(self, method: str, step: int, like: Tensor) -> list[float] | Tensor:
        """``[K]``, or ``[B, K]`` where samples differ."""
        each = [weights(method, tuple(nodes), step) for nodes in self.nodes]
        if all(w == each[0] for w in each):
            return list(each[0])
        padded = [[*w, *[0.0] * (len(self.values) - len(w))] for w in each]
        return torch.tensor(padded, dtype=torch.float32).to(like.device)

    def onto(self, start: Streams, step: int, method: str) -> Streams:
        """``start`` plus the forecast for ``step``; new tensors."""
        found = self._weights(method, step, start[0])
        return tuple(
            _sum(s, [v[i] for v in self.values], found)
            for i, s in enumerate(start[: len(self.values[0])])
        )

    def forecast(self, step: int, method: str) -> Streams:
        """The forecast for ``step``; the newest value itself where that is all there is."""
        if len(self.values) == 1:
            return self.values[0]
        found = self._weights(method, step, self.values[0][0])
        return tuple(
            _sum(None, [v[i] for v in self.values], found) for i in range(len(self.values[0]))
        )


def _sum(start: Tensor | None, values: list[Tensor], found: list[float] | Tensor) -> Tensor:
    if isinstance(found, Tensor):
        shape = (-1,) + (1,) * (values[0].dim() - 1)
        terms = [v * w.view(shape).to(v) for v, w in zip(values, found.unbind(1), strict=True)]
        out = terms[0] if start is None else terms[0].add_(start)
        for term in terms[1:]:
            out.add_(term)
        return out
    first, rest = found[0], list(zip(values[1:], found[1:], strict=False))
    out = values[0] * first if start is None else torch.add(start, values[0], alpha=first)
    for value, w in rest:
        out.add_(value, alpha=w)
    return out
