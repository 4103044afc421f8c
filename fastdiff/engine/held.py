"""State that several programs work on: memory that stays where it is, and Python values beside it.

A captured step sees addresses and repeats what Python decided when it was captured. So what lives
across steps keeps its memory, and what Python knows of it (which values count, how old they are)
can be read as a value, compared, and set again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn


class Held:
    """What a program holds between its steps. Two states with equal tensors and equal
    :meth:`look` at their step go the same way."""

    @property
    def complete(self) -> bool:
        """All memory that a run needs is there."""
        return True

    version: int = 0  # changes when memory is made: what was captured before works on other memory

    def tensors(self) -> Any:
        """The memory: a tree of lists and dicts."""
        raise NotImplementedError

    def look(self, step: int) -> Hashable:
        """The Python values, with steps counted back from ``step``."""
        raise NotImplementedError

    def become(self, tensors: Any, look: Any, step: int) -> None:
        """Work on other memory (as :meth:`tensors` gave it), with these Python values."""
        raise NotImplementedError

    def fill(self) -> None:
        """Make what is missing of the memory, as far as one knows; its values do not count."""

    def forget(self) -> None:
        """A new run begins: no value counts."""
        raise NotImplementedError

    def permute(self, index: Tensor, samples: int) -> int:
        """Sample ``b`` of the run becomes what sample ``index[b]`` was, in the same memory; rows
        are those of the samples, once for each branch of guidance.

        Returns:
            How often the host waited.

        Raises:
            Fixed: this state cannot.
        """
        raise Fixed(type(self).__name__)


class Fixed(Exception):
    """A state whose samples cannot change places: it has to be computed anew."""


def rows_of(index: Tensor, samples: int, rows: int) -> Tensor:
    """``index [samples]`` for a batch of ``rows``, which holds the samples once or several times.

    Raises:
        Fixed: it does not.
    """
    if not samples or rows % samples:
        raise Fixed(f"{rows} rows of {samples} samples")
    branch = torch.arange(0, rows, samples, device=index.device)
    return (branch[:, None] + index).flatten()


def permute_rows_(t: Tensor, index: Tensor, samples: int) -> None:
    """Rows of ``t [R, ...]`` change places where they are."""
    t.copy_(t[rows_of(index, samples, t.shape[0])])


def held_in(value: Any) -> Iterator[Held]:
    """What a tree of dicts, lists, tuples and objects holds across steps, in a fixed order."""
    if isinstance(value, Held):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from held_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from held_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module):
        yield from held_in(vars(value))


def permute(value: Any, index: Tensor, samples: int, done: dict[int, int]) -> Any:
    """A tree of dicts, lists, tuples and objects whose tensors have a row for every sample, with
    the samples at other places. Objects change in place, each once.

    Args:
        done: how often the host waited for each :class:`Held` that has changed, by id.

    Raises:
        Fixed: some of it cannot; of the rest, some has changed.
    """
    if isinstance(value, Held):
        if id(value) not in done:
            done[id(value)] = value.permute(index, samples)
        return value
    if isinstance(value, Tensor):
        return value[rows_of(index, samples, value.shape[0] if value.dim() else 0)]
    if isinstance(value, dict):
        return {key: permute(item, index, samples, done) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [permute(item, index, samples, done) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        for name, item in vars(value).items():
            if isinstance(item, Held | Tensor | dict | list | tuple):
                setattr(value, name, permute(item, index, samples, done))
    return value


class Cell:
    """An attribute of a :class:`Cells` that is a tensor or None, and keeps its memory.

    A tensor that is assigned is copied. Reading gives the memory: the next assignment writes
    over it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, cells: Cells, owner: type) -> Tensor | None:
        shape = cells.shapes.get(self._name)
        return None if shape is None else cells.memory[self._name][: prod(shape)].view(shape)

    def __set__(self, cells: Cells, value: Tensor | None) -> None:
        if value is None:
            cells.shapes.pop(self._name, None)
            return
        cells.reserve(self._name, value.numel(), value.dtype, value.device)
        cells.shapes[self._name] = tuple(value.shape)
        cells.memory[self._name][: value.numel()].view(value.shape).copy_(value)


class Cells(Held):
    """Attributes of kind :class:`Cell`.

    Attributes:
        memory: of each, flat, by name.
        shapes: of those whose value counts.
    """

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def reserve(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> None:
        """Memory for ``count`` elements under ``name``; what is there and large enough stays."""
        there = self.memory.get(name)
        fits = there is not None and there.dtype == dtype and there.device == device
        if there is None or not fits or there.numel() < count:
            self.memory[name] = torch.zeros(count, dtype=dtype, device=device)
            self.version += 1

    def tensors(self) -> Any:
        return dict(self.memory)

    def look(self, step: int) -> Hashable:
        return tuple(sorted(self.shapes.items()))

    def become(self, tensors: Any, look: Any, step: int) -> None:
        self.memory.update(tensors)
        self.shapes = dict(look)

    def forget(self) -> None:
        self.shapes = {}
