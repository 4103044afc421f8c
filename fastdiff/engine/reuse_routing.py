"""Routes of experts that are kept over the steps of a run."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn

from fastdiff import ops
from fastdiff.engine.held import Cell, Cells
from fastdiff.engine.off import why_off
from fastdiff.engine.patch import Patch
from fastdiff.engine.request import Event, current
from fastdiff.experts.routing import RoutingReuse
from fastdiff.nn import MoE

PART = "routing"


class _Kept(Cells):
    """The :class:`fastdiff.ops.Routing` of a layer."""

    weights, experts, order = Cell(), Cell(), Cell()
    position, offsets, counts = Cell(), Cell(), Cell()

    @property
    def complete(self) -> bool:
        return bool(self.memory)

    def put(self, routing: ops.Routing) -> None:
        for name, value in zip(routing._fields, routing, strict=True):
            setattr(self, name, value)

    def get(self, tokens: int) -> ops.Routing | None:
        """None where nothing is kept, or that of other tokens."""
        if self.weights is None or self.weights.shape[0] != tokens:
            return None
        return ops.Routing(*(getattr(self, name) for name in ops.Routing._fields))


def routing(network: nn.Module, policy: RoutingReuse, patch: Patch) -> list[str]:
    """Run ``policy`` on the layers of experts of a network; a sentence that says so.

    Raises:
        ValueError: it has none.
    """
    layers = [module for module in network.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(
            f"accelerate: cache is {policy!r}, which runs on layers of experts (fastdiff.nn.MoE), "
            f"and {type(network).__name__} has none"
        )
    for i, layer in enumerate(layers):
        patch.set(layer, "route", _wrapped(network, i, layer.route, policy))
    return [f"{policy}: {len(layers)} layers of experts"]


def _wrapped(network: nn.Module, i: int, plain: Any, policy: RoutingReuse) -> Any:
    def route(x: Any, *args: Any, **kwargs: Any) -> ops.Routing:
        request = current()
        if request is None or request.slot is None or why_off(network):
            found: ops.Routing = plain(x, *args, **kwargs)
            return found
        key: Hashable = (request.slot, PART, i)
        kept: _Kept = request.state.setdefault(key, _Kept())
        routing = None if policy.full(request.step, request.steps) else kept.get(x.shape[0])
        if i == 0:
            how = "full" if routing is None else "reuse"
            request.trace.append(Event(request.step, request.slot, PART, (routing is None,), how))
        if routing is None:
            routing = plain(x, *args, **kwargs)
            size = sum(t.numel() * t.element_size() for t in routing)
            request.claim(key, size)
            kept.put(routing)
        return routing

    return route
