"""Keys and values of a prompt, projected once in a run in place of once a step: the same bits.

The prompt is known by its tensor (kept, so that no other can take its place) and that tensor's
version, the projections by their weights and versions. Values written through ``.data`` change no
version: do that between runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdiff.engine.request import current
from fastdiff.integrations.rules import readable
from fastdiff.nn.layers import heard

_MOST = 4  # prompts kept of a layer: guidance calls the network with two in turn


class _Owners:
    """The prompt's storage and the weights: held, but not memory of the cache."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: tuple[Tensor, ...]):
        self.tensors = tensors

    def are(self, tensors: tuple[Tensor, ...]) -> bool:
        """The same objects."""
        same = len(self.tensors) == len(tensors)
        return same and all(a is b for a, b in zip(self.tensors, tensors, strict=True))


class _Entry(NamedTuple):
    owners: _Owners
    mark: tuple[Any, ...]
    pair: tuple[Tensor, Tensor] | None  # None at first sight: a prompt seen once is not kept


def _steady(layer: Any, context: Tensor) -> bool:
    """A layer gives the same for the same weights at every step: it is a plain one, or one in
    another format that has no steps in floats."""
    steady = getattr(layer.__dict__.get("forward"), "steady", False) and not heard(layer)
    return steady or readable(layer, nn.Linear, context)


def project(module: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    """``to_k(context)`` and ``to_v(context)``, ``[B, T, H*D]`` each, not to be written to."""
    layers = module.to_k, module.to_v
    request = current()
    if request is None or request.static or not all(_steady(layer, context) for layer in layers):
        return module.to_k(context), module.to_v(context)
    weights = [w for layer in layers for w in (layer.weight, layer.bias) if w is not None]
    base = context if context._base is None else context._base
    owners = (base, *weights)
    if context.is_inference() or any(t.is_inference() for t in owners):  # they have no version
        return module.to_k(context), module.to_v(context)
    shape = tuple(context.shape), context.stride(), context.storage_offset()
    mark = (*shape, context._version, *(t._version for t in owners))
    entries: list[_Entry] = request.state.setdefault(("text_kv", id(module)), [])
    for i, entry in enumerate(entries):
        if entry.mark == mark and entry.owners.are(owners):
            if entry.pair is not None:
                return entry.pair
            pair = module.to_k(context), module.to_v(context)
            kept = [t for e in entries for t in e.pair or ()] + list(pair)
            size = sum(t.numel() * t.element_size() for t in kept)
            if request.allows(("text_kv", id(module)), size):  # else projected at every step
                entries[i] = _Entry(_Owners(owners), mark, pair)
            return pair
    entries.append(_Entry(_Owners(owners), mark, None))
    del entries[:-_MOST]
    return module.to_k(context), module.to_v(context)
