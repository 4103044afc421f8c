"""State that several programs work on: memory that stays where it is, and Python values beside it.

A captured step sees addresses and repeats what Python decided when it was captured. So what lives
across steps keeps its memory, and what Python knows of it (which values count, how old they are)
can be read as a value, compared, and set again.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import prod
from typing import Any

import torch
from torch import Tensor


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
