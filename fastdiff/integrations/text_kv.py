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

_MOST = 4  # prompts kept of a layer: guidance calls the network with two in turn


class _Entry(NamedTuple):
    owners: tuple[Tensor, ...]  # the prompt's storage and the weights
    mark: tuple[Any, ...]
    pair: tuple[Tensor, Tensor] | None  # None at first sight: a prompt seen once is not kept


def project(module: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    """``to_k(context)`` and ``to_v(context)``, ``[B, T, H*D]`` each, not to be written to."""
    layers = module.to_k, module.to_v
    request = current()
    if (
        request is None
        or request.static
        or not all(readable(layer, nn.Linear, context) for layer in layers)
    ):
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
        same = len(entry.owners) == len(owners) and entry.mark == mark
        if same and all(a is b for a, b in zip(entry.owners, owners, strict=True)):
            if entry.pair is not None:
                return entry.pair
            pair = module.to_k(context), module.to_v(context)
            entries[i] = _Entry(owners, mark, pair)
            return pair
    entries.append(_Entry(owners, mark, None))
    del entries[:-_MOST]
    return module.to_k(context), module.to_v(context)
