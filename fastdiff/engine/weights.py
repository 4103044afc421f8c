"""Changes of a network's weights within a run: caches must not go on with features of the old ones.

Seen are writes to parameters in place, whatever happens to adapters of ours, and adapters of PEFT
that are loaded, switched or scaled.
Not seen are writes through ``.data``, which change no version, and parameters that others take
the place of.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from fastdiff import adapters
from fastdiff.engine.request import Request


class Watch:
    """Of one network; cheap enough for every call."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._parameters: list[Tensor] = []
        self._adapters: list[Any] = []

    def _mark(self) -> Hashable:
        others = tuple(
            (tuple(layer.scaling.items()), tuple(layer.active_adapters), layer.disable_adapters)
            for layer in self._adapters
        )
        known = tuple(getattr(self._network, "peft_config", ()))
        own = adapters.version(self._network)
        return sum(p._version for p in self._parameters), own, others, known

    def look(self, request: Request) -> bool:
        """Before a call: where the weights are others than at the last one, drop what is kept, and
        say so."""
        key = id(self._network)
        if key not in request.marks:  # a new run
            self._collect()
            request.marks[key] = self._mark()
            return False
        if self._mark() == request.marks[key]:
            return False
        self._collect()
        request.marks[key] = self._mark()
        request.forget(self._network)
        request.notes.append(f"weights changed before step {request.step}: caches began anew")
        return True

    def _collect(self) -> None:
        self._parameters = [p for p in self._network.parameters() if not p.is_inference()]
        self._adapters = [
            m for m in self._network.modules()
            if isinstance(getattr(m, "scaling", None), dict) and hasattr(m, "active_adapters")
        ]  # fmt: skip
