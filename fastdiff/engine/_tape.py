"""A step as a CUDA graph sees it: operations on memory, with every Python value frozen.

A tensor is written down as a view of a storage, and a storage as what it is to the step: its n-th
input, the n-th that it made, or one from outside. So two runs of a step can be compared, and a run
can be replayed on other buffers.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

Storage = tuple[str, int]  # ("input", n), ("made", n), ("constant", n), ("outside" or "kept", id)


class Where(NamedTuple):
    """A line of the step, and the line of the step's own code that led there."""

    file: str
    line: int
    caller: str | None = None  # "file:line", where it is another

    def __str__(self) -> str:
        via = "" if self.caller is None else f" (called from {self.caller})"
        return f"{self.file}:{self.line}{via}"


class View(NamedTuple):
    """A tensor: which bytes of which storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    conj: bool
    neg: bool


class Entry(NamedTuple):
    """One operation of the dispatcher."""

    func: Any
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]  # of (args, kwargs): View for a tensor
    outs: tuple[View | None, ...]
    where: Where
    constant: bytes = b""  # of a tensor made from Python values: those

    def frozen(self) -> str:
        """All that a replay would repeat as it is, tensors from the step and its inputs aside."""
        return repr((self.func, self.spec, self.leaves, self.outs, self.constant))


class Made:
    """Storages that runs of a step made, by run; holds no memory of those that died."""

    def __init__(self) -> None:
        self._alive: dict[int, StorageWeakRef] = {}

    def add(self, t: Tensor) -> None:
        ref = StorageWeakRef(t.untyped_storage())
        self._alive[ref.cdata] = ref

    def __contains__(self, t: Tensor) -> bool:
        return t.untyped_storage()._cdata in self._alive


class Tape:
    """The operations of one run.

    Args:
        inputs: the buffers, each with a storage of its own.
        earlier: storages that earlier runs made: what is read of them was kept in Python.
    """

    def __init__(self, inputs: list[Tensor], earlier: Made):
        self.entries: list[Entry] = []
        self.outputs: tuple[Any, ...] = ()
        self.made = Made()
        self._earlier = earlier
        self._names: dict[int, Storage] = {}
        self._held: list[Tensor] = []  # so that no address is used twice during the run
        self._sources: dict[Storage, Tensor] = {}  # outside tensors and constants
        self._count = 0
        for i, t in enumerate(inputs):
            self._names[t.untyped_storage()._cdata] = ("input", i)
            self._held.append(t)

    def view(self, t: Tensor) -> View:
        """``t`` in the terms of this run."""
        cdata = t.untyped_storage()._cdata
        storage = self._names.get(cdata)
        if storage is None:
            storage = ("kept" if t in self._earlier else "outside", cdata)
            self._name(t, storage)
            self._sources[storage] = t
        offset, bits = int(t.storage_offset()), (t.is_conj(), t.is_neg())
        return View(storage, offset, tuple(t.shape), t.stride(), t.dtype, *bits)

    def _name(self, t: Tensor, storage: Storage) -> None:
        self._names[t.untyped_storage()._cdata] = storage
        self._held.append(t)

    def constant(self, t: Tensor) -> bytes:
        """Register a tensor that Python values were just turned into; gives its bytes."""
        if t.untyped_storage()._cdata not in self._names:
            storage = ("constant", self._count)
            self._count += 1
            self._name(t, storage)
            self._sources[storage] = t.clone()
        return bytes(t.contiguous().view(-1).view(torch.uint8).tolist())

    def record(self, entry: Entry, out: Any) -> None:
        """Append ``entry``, whose ``outs`` are filled in from ``out``."""
        outs: list[View | None] = []
        for leaf in pytree.tree_leaves(out):
            if not isinstance(leaf, Tensor):
                outs.append(None)
                continue
            if leaf.untyped_storage()._cdata not in self._names:
                self._name(leaf, ("made", self._count))
                self._count += 1
                self.made.add(leaf)
            outs.append(self.view(leaf))
        self.entries.append(entry._replace(outs=tuple(outs)))

    def finish(self, outputs: list[Tensor | None], earlier: Made) -> None:
        """Note the outputs of the run and let go of what it made; inputs stay."""
        self.outputs = tuple(None if t is None else self.view(t) for t in outputs)
        earlier._alive.update(self.made._alive)
        self._held.clear()

    def difference(self, other: Tape) -> tuple[Entry | None, Entry | None] | None:
        """The first pair of operations in which two runs differ; None where they are the same."""
        for mine, theirs in zip_longest(self.entries, other.entries):
            if mine is None or theirs is None or mine.frozen() != theirs.frozen():
                return mine, theirs
        return (None, None) if self.outputs != other.outputs else None

    def replay(self, inputs: list[Tensor]) -> list[Tensor | None]:
        """The recorded operations on other buffers; gives the outputs."""
        storages = {("input", i): t.untyped_storage() for i, t in enumerate(inputs)}
        for name, source in self._sources.items():
            t = source.clone() if name[0] == "constant" else source
            storages[name] = t.untyped_storage()

        def tensor(leaf: Any) -> Any:
            if not isinstance(leaf, View):
                return leaf
            t = torch.empty(0, dtype=leaf.dtype, device=inputs[0].device)
            t.set_(storages[leaf.storage], leaf.offset, leaf.size, leaf.stride)
            t = t.conj() if leaf.conj else t
            return torch._neg_view(t) if leaf.neg else t

        for entry in self.entries:
            args, kwargs = pytree.tree_unflatten(
                [tensor(leaf) for leaf in entry.leaves], entry.spec
            )
            out = pytree.tree_leaves(entry.func(*args, **kwargs))
            for leaf, view in zip(out, entry.outs, strict=True):
                if view is not None:
                    storages.setdefault(view.storage, leaf.untyped_storage())
        return [tensor(view) for view in self.outputs]
