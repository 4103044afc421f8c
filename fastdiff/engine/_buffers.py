"""The static input buffers of a step: named tensors whose addresses never change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = dict[str, Any] | tuple[Any, ...]


def flatten(name: str, value: Any) -> tuple[list[str], list[Any], pytree.TreeSpec]:
    """Names, leaves and structure of a tree of tensors: ``inputs['cache']['k']``, ..., or a number
    where a class (diffusers' outputs) does not name its parts."""
    leaves, spec = pytree.tree_flatten(value)
    try:
        names = [name + pytree.keystr(p) for p, _ in pytree.tree_flatten_with_path(value)[0]]
    except ValueError:
        names = [f"{name}[{i}]" for i in range(len(leaves))]
    return names, leaves, spec


def _check_leaf(who: str, name: str, leaf: Any) -> None:
    if leaf is None:
        return
    if not isinstance(leaf, Tensor):
        raise ValueError(
            f"{who}: {name} is {type(leaf).__name__} {leaf!r}, need a torch.Tensor: "
            "a capture freezes any other value"
        )
    if leaf.layout != torch.strided:
        raise ValueError(f"{who}: {name} has layout {leaf.layout}, need a strided tensor")


class Buffers:
    """Tensors at fixed addresses, in the structure that the step takes.

    Args:
        who: the caller's name, for errors.
        inputs: a dict (``step(**inputs)``) or a tuple (``step(*inputs)``) of tensors, or of trees
            (dict, list, tuple) of tensors; None leaves stay None. All on one device.
        share: the tensors become the buffers themselves, so that several steps work on one state.
            Otherwise the buffers are copies.

    Raises:
        ValueError: a leaf is no strided tensor, there is none, the devices differ, or a shared
            tensor requires a gradient.
    """

    def __init__(self, who: str, inputs: Inputs, *, share: bool = False):
        if not isinstance(inputs, dict | tuple):
            raise ValueError(f"{who}: inputs is {type(inputs).__name__}, need a dict or a tuple")
        self.names, leaves, self.spec = flatten("inputs", inputs)
        self.leaves: list[Tensor | None] = []
        for name, leaf in zip(self.names, leaves, strict=True):
            _check_leaf(who, name, leaf)
            if leaf is not None and leaf.requires_grad and share:
                raise ValueError(
                    f"{who}: {name} requires a gradient, need a detached tensor to share"
                )
            self.leaves.append(leaf if leaf is None or share else leaf.detach().clone())
        if not self.tensors:
            raise ValueError(f"{who}: inputs has no tensor, need at least one")
        self.device = self.tensors[0].device
        for name, leaf in zip(self.names, self.leaves, strict=True):
            if leaf is not None and leaf.device != self.device:
                raise ValueError(f"{who}: {name} is on {leaf.device}, need {self.device}")
        self._places = [_place(t) for t in self.tensors]

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers, without the None leaves."""
        return [leaf for leaf in self.leaves if leaf is not None]

    @property
    def tree(self) -> Any:
        """The buffers in the structure of ``inputs``; the containers are new at every call."""
        return pytree.tree_unflatten(self.leaves, self.spec)

    def call(self, who: str, step: Callable[..., Any]) -> Any:
        """Run ``step`` on the buffers.

        Raises:
            RuntimeError: the step put another tensor in a buffer's place.
        """
        tree = self.tree
        out = step(**tree) if isinstance(tree, dict) else step(*tree)
        moved = self.moved(tree)
        if moved is not None:
            raise RuntimeError(f"{who}: the step {moved}; write into a buffer with copy_()")
        return out

    def moved(self, tree: Any) -> str | None:
        """What a step that was given ``tree`` did to a buffer's address, or None."""
        names, leaves, _ = flatten("inputs", tree)
        for name, leaf in zip(names, leaves, strict=True):
            if not any(leaf is own for own in self.leaves):
                return f"put another tensor in the place of {name}"
        if len(leaves) < len(self.leaves):
            gone = next(name for name in self.names if name not in names)
            return f"took away the buffer {gone}"
        places = [_place(t) for t in self.tensors]
        held = [n for n, leaf in zip(self.names, self.leaves, strict=True) if leaf is not None]
        for name, before, now in zip(held, self._places, places, strict=True):
            if before != now:
                return f"moved or resized the buffer {name}"
        return None

    def values(self) -> list[Tensor]:
        """Copies of what the buffers hold."""
        return [t.clone() for t in self.tensors]

    def set(self, values: list[Tensor]) -> None:
        """Write ``values`` into the buffers."""
        for buffer, value in zip(self.tensors, values, strict=True):
            buffer.copy_(value)

    def update(self, who: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy new values into the buffers, in the signature of the step; others keep theirs.

        Everything is checked before anything is written. A value may be another buffer, or a view
        of one: it is read before any buffer changes.

        Raises:
            ValueError: an unknown input, or another structure, shape, dtype or device.
        """
        tree = self.tree
        if isinstance(tree, dict):
            if args:
                raise ValueError(
                    f"{who}: {len(args)} positional values, need names: inputs is a dict"
                )
            given = [(f"inputs[{k!r}]", tree.get(k, flatten), v) for k, v in kwargs.items()]
        else:
            if kwargs:
                raise ValueError(
                    f"{who}: {', '.join(kwargs)} given by name, need positions: inputs is a tuple"
                )
            if len(args) > len(tree):
                raise ValueError(f"{who}: {len(args)} values, need at most {len(tree)}")
            given = [(f"inputs[{i}]", tree[i], v) for i, v in enumerate(args)]
        copies: list[tuple[Tensor, Tensor]] = []
        for name, child, value in given:
            if child is flatten:
                raise ValueError(f"{who}: {name} is unknown, need one of {', '.join(tree)}")
            copies += _pairs(who, name, child, value)
        storages = {t.untyped_storage().data_ptr() for t in self.tensors}
        copies = [
            (buffer, v.clone() if v.untyped_storage().data_ptr() in storages else v)
            for buffer, v in copies
        ]
        for buffer, value in copies:
            buffer.copy_(value)


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def _pairs(who: str, name: str, child: Any, value: Any) -> list[tuple[Tensor, Tensor]]:
    """(buffer, new value) of one input; checks that they fit."""
    names, buffers, spec = flatten(name, child)
    _, values, found = flatten(name, value)
    if found != spec:
        raise ValueError(
            f"{who}: {name} is {type(value).__name__} of {len(values)} leaves, need the structure "
            f"of the captured one, {type(child).__name__} of {len(buffers)}"
        )
    pairs = []
    for leaf_name, buffer, new in zip(names, buffers, values, strict=True):
        _check_leaf(who, leaf_name, new)
        if (buffer is None) != (new is None):
            have, need = ("None", "a tensor") if new is None else ("a tensor", "None")
            raise ValueError(f"{who}: {leaf_name} is {have}, need {need}, as captured")
        if new is None:
            continue
        facts: list[tuple[str, Any, Any]] = [
            ("has shape", list(new.shape), list(buffer.shape)),
            ("is", new.dtype, buffer.dtype),
            ("is on", new.device, buffer.device),
        ]
        for what, found_value, need in facts:
            if found_value != need:
                raise ValueError(
                    f"{who}: {leaf_name} {what} {found_value}, need {need}, as captured"
                )
        pairs.append((buffer, new.detach()))
    return pairs
