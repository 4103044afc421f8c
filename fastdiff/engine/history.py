"""The last values of a feature that a cache keeps, and what they forecast."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.cache.extrapolate import weights
from fastdiff.engine.held import Held, permute_rows_, rows_of

Streams = tuple[Tensor, ...]


def fits_of(streams: Streams) -> Hashable:
    """What two calls must have in common for one to use what the other kept."""
    return tuple((s.shape, s.dtype, s.device) for s in streams)


def _stored(value: Tensor, minus: Tensor | None, room: Tensor | None) -> Tensor:
    """A copy of ``value`` or of ``value - minus``, in the memory of ``room`` where there is one."""
    if minus is not None:
        return value - minus if room is None else torch.sub(value, minus, out=room)
    return value.clone() if room is None else room.copy_(value)


class History(Held):
    """Up to ``length`` values of a tuple of features ``[B, ...]``, each sample with its own steps.

    Memory is allocated until there are ``length`` buffers and then used again: addresses stay.

    Attributes:
        buffers: memory of the values.
        order: the buffers in use, that of the newest value first.
        nodes: for every sample, the steps at which its values were computed, the newest first.
    """

    def __init__(self, length: int, observe: Callable[[History], None] | None = None) -> None:
        self.length, self._observe = length, observe
        self.buffers: list[Streams] = []
        self.order: list[int] = []
        self.nodes: list[list[int]] = []

    @property
    def complete(self) -> bool:
        return len(self.buffers) >= self.length

    def tensors(self) -> Any:
        return [list(buffer) for buffer in self.buffers]

    def look(self, step: int) -> Hashable:
        return tuple(self.order), tuple(tuple(step - s for s in n) for n in self.nodes)

    def become(self, tensors: Any, look: Any, step: int) -> None:
        self.buffers = [tuple(buffer) for buffer in tensors]
        self.order, self.nodes = list(look[0]), [[step - s for s in n] for n in look[1]]

    def fill(self) -> None:
        while self.buffers and not self.complete:
            self.buffers.append(tuple(torch.zeros_like(v) for v in self.buffers[0]))
            self.version += 1

    def forget(self) -> None:
        self.order, self.nodes = [], []

    def permute(self, index: Tensor, samples: int) -> int:
        waits = 0
        if any(nodes != self.nodes[0] for nodes in self.nodes):  # each sample has its own steps
            which = rows_of(index, samples, len(self.nodes)).tolist()
            self.nodes, waits = [list(self.nodes[b]) for b in which], 1
        for i in self.order:
            for value in self.buffers[i]:
                permute_rows_(value, index, samples)
        return waits

    @property
    def values(self) -> list[Streams]:
        """What is kept, the newest first."""
        return [self.buffers[i] for i in self.order]

    def _place(self) -> int:
        """The buffer of the next value: an unused one, or that of the oldest value."""
        unused = (i for i in range(self.length) if i not in self.order)
        return next(unused, self.order[-1] if self.order else 0)

    def _repeat(self, step: int) -> None:
        """A step that is done again, as its call broke off, takes its own place."""
        if self.nodes and all(nodes[:1] == [step] for nodes in self.nodes):
            self.order = self.order[1:]
            self.nodes = [nodes[1:] for nodes in self.nodes]

    def put(self, step: int, streams: Streams, minus: Streams | None = None) -> None:
        """Keep ``streams`` (less ``minus``, of as many tensors or more) of all samples. A step that
        is done again, as its call broke off, takes its own place."""
        self._repeat(step)
        place = self._place()
        used = place < len(self.buffers)
        room: Sequence[Tensor | None] = self.buffers[place] if used else (None,) * len(streams)
        less: Sequence[Tensor | None] = minus or (None,) * len(streams)
        # A last block may end a stream, which is then not kept.
        new = tuple(_stored(s, m, r) for s, m, r in zip(streams, less, room, strict=False))
        if not used:
            self.buffers.append(new)
            self.version += 1
        self.order = [place, *(i for i in self.order if i != place)]
        self.nodes = [[step, *n][: self.length] for n in self.nodes or [[]] * new[0].shape[0]]
        if self._observe is not None:
            self._observe(self)

    def put_rows(self, step: int, rows: Tensor, which: Sequence[int], streams: Streams) -> None:
        """Keep ``streams [R, ...]`` of the samples ``which``; ``rows``: the same on the device."""
        kept = len(self.order)
        moved = [b for b in which if self.nodes[b][0] != step]
        if kept < self.length and any(len(self.nodes[b]) == kept for b in moved):
            place = self._place()
            if place == len(self.buffers):
                self.buffers.append(tuple(torch.zeros_like(v) for v in self.buffers[0]))
            self.order.append(place)
        values = self.values
        away = rows if len(moved) == len(which) else torch.tensor(moved, device=rows.device)
        for newer, older in zip(values[-2::-1], values[:0:-1], strict=True):
            for n, o in zip(newer, older, strict=True):
                o.index_copy_(0, away, n[away])
        for newest, s in zip(values[0], streams, strict=False):
            newest.index_copy_(0, rows, s)
        for b in moved:
            self.nodes[b] = [step, *self.nodes[b]][: self.length]

    def _weights(self, method: str, step: int, like: Tensor) -> list[float] | Tensor:
        """``[K]``, or ``[B, K]`` where samples differ."""
        each = [weights(method, tuple(nodes), step) for nodes in self.nodes]
        if all(w == each[0] for w in each):
            return list(each[0])
        padded = [[*w, *[0.0] * (len(self.order) - len(w))] for w in each]
        return torch.tensor(padded, dtype=torch.float32).to(like.device)

    def onto(self, start: Streams, step: int, method: str) -> Streams:
        """``start`` plus the forecast for ``step``; new tensors."""
        found, values = self._weights(method, step, start[0]), self.values
        return tuple(
            _sum(s, [v[i] for v in values], found) for i, s in enumerate(start[: len(values[0])])
        )

    def forecast(self, step: int, method: str) -> Streams:
        """The forecast for ``step``; the newest value itself where that is all there is."""
        values = self.values
        if len(values) == 1:
            return values[0]
        found = self._weights(method, step, values[0][0])
        return tuple(_sum(None, [v[i] for v in values], found) for i in range(len(values[0])))


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
