"""Experts on disk, read ahead of a run whose choices are known.

The file is safetensors, mapped into memory; what a block needs at a level is copied into one stack
of its chosen experts by a thread, while earlier blocks compute. Stacks in memory stay within a
budget; where there is room they wait for the next level that wants the same experts, and the one
wanted last goes first (Belady 1966).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.nn import MoE, Weights

Key = tuple[int, tuple[int, ...]]  # a layer, and its chosen experts in ascending order
FIELDS = Weights._fields
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # by safetensors' names of dtypes


def layers_of(network: nn.Module) -> list[MoE]:
    """Layers of experts, in the order of the network's modules."""
    return [m for m in network.modules() if isinstance(m, MoE)]


class ExpertStore:
    """Weights of experts in a file of :meth:`write`.

    Args:
        path: the file.
        budget: bytes of stacks in memory at a time, those in use among them. One stack must fit;
            with two or more, reading and computing overlap.

    Attributes:
        peak: the most bytes that were in memory; loaded: bytes read from the file.

    Raises:
        ValueError: the file is not one of :meth:`write`.
    """

    def __init__(self, path: str | Path, *, budget: int) -> None:
        self.path, self.budget = Path(path), budget
        self.peak = self.loaded = 0
        try:
            with safe_open(str(path), framework="pt") as file:
                self._have = set(file.keys())
                self._bytes = {}
                for name in self._have:  # no weight is read for that
                    part = file.get_slice(name)
                    self._bytes[name] = prod(part.get_shape()) * ITEM_BYTES[part.get_dtype()]
        except Exception as error:
            raise ValueError(f"ExpertStore: {path} is not readable: {error}") from error
        if "0.0.up" not in self._have:
            raise ValueError(f"ExpertStore: {path} has no 0.0.up, need a file of ExpertStore.write")

    @staticmethod
    def write(network: nn.Module, path: str | Path) -> int:
        """Write every expert of every layer, in its dtype; gives the bytes."""
        state: dict[str, Tensor] = {}
        for i, layer in enumerate(layers_of(network)):
            for name, stack in zip(FIELDS, layer.weights(), strict=True):
                for e, t in enumerate(() if stack is None else stack.detach()):
                    state[f"{i}.{e}.{name}"] = t.contiguous()
        save_file(state, str(path))
        return sum(t.numel() * t.element_size() for t in state.values())

    @staticmethod
    def strip(network: nn.Module) -> None:
        """Give the memory of the network's experts back; it then runs with a store alone."""
        for layer in layers_of(network):
            for name, stack in zip(FIELDS, layer.weights(), strict=True):
                if stack is not None:
                    empty = torch.empty_like(stack, device="meta")
                    setattr(layer, name, nn.Parameter(empty, requires_grad=False))

    def size(self, key: Key) -> int:
        """Bytes of a stack.

        Raises:
            ValueError: the file has no such expert.
        """
        layer, experts = key
        total = 0
        for e in experts:
            if f"{layer}.{e}.up" not in self._have:
                raise ValueError(f"ExpertStore: {self.path} has no expert {e} of layer {layer}")
            total += sum(self._bytes.get(f"{layer}.{e}.{name}", 0) for name in FIELDS)
        return total

    def _load(self, file: Any, key: Key, device: torch.device) -> Weights:
        layer, experts = key
        found: list[Tensor | None] = []
        for field in FIELDS:
            names = [f"{layer}.{e}.{field}" for e in experts]
            if names[0] in self._have:
                found.append(torch.stack([file.get_tensor(n) for n in names]).to(device))
            else:
                found.append(None)
        self.loaded += self.size(key)
        up, down, up_bias, down_bias = found
        assert up is not None and down is not None
        return Weights(up, down, up_bias, down_bias)

    @contextmanager
    def run(
        self, plan: Sequence[Key], device: str | torch.device = "cpu"
    ) -> Iterator[Callable[[], Weights]]:
        """In the block, a thread reads ahead what ``plan`` lists; each call of the function that
        is given takes the next of it, whose tensors are good until the call after.

        Raises:
            ValueError: one stack is larger than the budget, or the file lacks an expert.
        """
        reader = _Reader(self, plan, torch.device(device))
        thread = threading.Thread(target=reader.work, name="fastdiff experts", daemon=True)
        thread.start()
        try:
            yield reader.take
        finally:
            reader.stop()
            thread.join()


class _Reader:
    """One run: what is in memory, and where the run stands."""

    def __init__(self, store: ExpertStore, plan: Sequence[Key], device: torch.device) -> None:
        self._store, self._plan, self._device = store, list(plan), device
        self._size = {key: store.size(key) for key in self._plan}
        self._uses: dict[Key, list[int]] = {}
        for i, key in enumerate(self._plan):
            self._uses.setdefault(key, []).append(i)
        for key, size in self._size.items():
            if size > store.budget:
                raise ValueError(
                    f"ExpertStore: budget is {store.budget} bytes, need at least {size} for "
                    f"experts {key[1]} of layer {key[0]}"
                )
        self._here: dict[Key, Weights] = {}
        self._used, self._at = 0, 0
        self._busy: Key | None = None  # what the caller computes with
        self._error: BaseException | None = None
        self._stopped = False
        self._change = threading.Condition()

    def _next(self, key: Key) -> int:
        """The place in the plan where ``key`` is taken next, its length where never."""
        uses = self._uses[key]
        i = bisect_left(uses, self._at)
        return uses[i] if i < len(uses) else len(self._plan)

    def _make_room(self, i: int) -> bool:
        """For entry ``i``, from stacks that are taken later than it; False: not yet."""
        need = self._size[self._plan[i]]
        while self._used + need > self._store.budget:
            free = [k for k in self._here if k != self._busy and self._next(k) > i]
            if not free:
                return False
            last = max(free, key=self._next)
            del self._here[last]
            self._used -= self._size[last]
        return True

    def work(self) -> None:
        """Read ahead, until the plan ends or the run breaks off."""
        try:
            with safe_open(str(self._store.path), framework="pt") as file:
                for i, key in enumerate(self._plan):
                    with self._change:
                        while not (self._stopped or key in self._here or self._make_room(i)):
                            self._change.wait()
                        if self._stopped:
                            return
                        if key in self._here:
                            continue
                        self._used += self._size[key]
                        self._store.peak = max(self._store.peak, self._used)
                    found = self._store._load(file, key, self._device)
                    with self._change:
                        self._here[key] = found
                        self._change.notify_all()
        except BaseException as error:
            with self._change:
                self._error = error
                self._change.notify_all()

    def take(self) -> Weights:
        """The next of the plan; waits for the disk where the thread is not that far."""
        with self._change:
            if self._at == len(self._plan):
                raise ValueError(f"ExpertStore: the plan's {self._at} entries are all taken")
            key = self._plan[self._at]
            self._busy = None
            self._change.notify_all()
            while key not in self._here:
                if self._error is not None:
                    raise RuntimeError(
                        f"ExpertStore: reading {self._store.path} failed"
                    ) from self._error
                self._change.wait()
            self._busy = key
            self._at += 1
            self._change.notify_all()
            return self._here[key]

    def stop(self) -> None:
        """End the thread, and give the memory back."""
        with self._change:
            self._stopped = True
            self._here.clear()
            self._change.notify_all()
