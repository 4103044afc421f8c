"""Experts, whose weights are stacks in no Linear, in the formats of a
:class:`~fastdiff.precision.Precision`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.engine.patch import Patch
from fastdiff.engine.quant_forward import BITS, PROBE, QuantForward, Stored, more, version
from fastdiff.engine.request import current
from fastdiff.nn import MoE, SwiGLU
from fastdiff.ops import ExpertWeight
from fastdiff.ops.grouped_linear import activate
from fastdiff.precision import Precision


class Weight:
    """A weight of a module of experts, "up" or "down", as if it were that of a linear layer: one of
    ``SwiGLU`` ``[N, K]``, of ``MoE`` ``[E, N, K]``."""

    def __init__(self, owner: MoE | SwiGLU, which: str) -> None:
        self.owner, self.which = owner, which

    @property
    def weight(self) -> Tensor:
        found: Tensor = getattr(self.owner, self.which)
        return found

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        setattr(self.owner, self.which, value)

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = getattr(self.owner, f"{self.which}_bias", None)
        return found

    @property
    def training(self) -> bool:
        return self.owner.training

    def forward(self, x: Tensor) -> Tensor:
        """Of ``SwiGLU``."""
        return ops.linear(x, self.weight.to(x.dtype))


def expert_weights(network: nn.Module) -> Iterator[tuple[str, Weight]]:
    """The weights of a network's experts, and of those that all tokens go through, by name."""
    for name, module in network.named_modules():
        if isinstance(module, MoE | SwiGLU):
            for which in ("up", "down"):
                yield f"{name}.{which}" if name else which, Weight(module, which)


def listen(
    network: nn.Module, prefix: str, tell: Callable[[str, Tensor], None], patch: Patch
) -> None:
    """``tell(name, x)`` of every input of ``expert_weights`` from here on."""

    def hear(name: str, module: Any) -> None:
        plain: Any = module.layer if isinstance(module, MoE) else module.forward

        def layer(which: str, x: Tensor, offsets: Tensor, *more: Any, **rest: Any) -> Tensor:
            own = "index" in rest or any(isinstance(m, Tensor) for m in more)
            live = x if own else x[: int(offsets[-1])]  # rows past it are of no expert
            if len(live):
                tell(name + which, live)
            y: Tensor = plain(which, x, offsets, *more, **rest)
            return y

        def forward(x: Tensor) -> Tensor:
            tell(f"{name}up", x)
            tell(f"{name}down", activate(Weight(module, "up").forward(x), "swiglu"))
            y: Tensor = plain(x)
            return y

        experts = isinstance(module, MoE)
        patch.set(module, "layer" if experts else "forward", layer if experts else forward)

    for name, module in network.named_modules():
        if isinstance(module, MoE | SwiGLU):
            hear(prefix + (f"{name}." if name else ""), module)


class QuantExperts(QuantForward):
    """One of the two weights of ``MoE`` while it is quantised; stored as ``[E N, K]``: smoothing,
    rotation and the correction in floats are of all experts together."""

    def __init__(
        self,
        name: str,
        module: Weight,
        format: str,
        policy: Precision,
        stored: Stored | None = None,
    ):
        owner: Any = module.owner
        self._plain_layer: Any = owner.layer
        stored = stored or Stored.of(name, module.weight.flatten(0, 1), format, policy)
        super().__init__(name, module, format, policy, stored)
        self.experts = len(module.weight)

    def usable(self, x: Any) -> bool:
        return super().usable(x if x.numel() else x.new_zeros(1))  # no rows are fine

    def layer(self, x: Tensor, offsets: Tensor, index: Tensor | None) -> Tensor:
        """As ``MoE.layer``."""
        module: Any = self.module
        if not self._now(x):
            plain: Tensor = self._plain_layer(module.which, x, offsets, index)
            return plain
        run = current()
        start = time.perf_counter()
        if self._stale():
            flat = module.weight.flatten(0, 1)
            self.stored = Stored.of(self.name, flat, self.format, self.policy)
            self._version = version(module.weight)
        activation = module.owner.activation if module.which == "up" else None
        y = self._product(x, offsets, index, activation)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - start
        if run is not None and not run.static and not self.released and self._probed is not run:
            self._probed = run
            self._probe_rows(x, offsets, index)
        return y

    def _bias(self, x: Tensor) -> Tensor | None:
        bias: Tensor | None = self.module.bias
        return None if bias is None else bias.to(x.dtype)

    def _product(
        self, x: Tensor, offsets: Tensor, index: Tensor | None, activation: str | None
    ) -> Tensor:
        stored, lead = self.stored, (self.experts, -1)
        tensors = stored.tensors
        how: dict[str, Any] = {"bias": self._bias(x), "index": index}
        if stored.format == "bfloat16":
            weight = tensors["weight"].to(x.dtype).unflatten(0, lead)
            return ops.grouped_linear(x, weight, offsets, **how, activation=activation)
        rotation, smooth = tensors.get("rotation"), tensors.get("smooth")
        if rotation is not None:
            x = (x.unflatten(-1, (-1, len(rotation))) @ rotation.to(x.dtype)).flatten(-2)
        values, scale = (tensors[name].unflatten(0, lead) for name in ("values", "scale"))
        weight = ExpertWeight(values, scale, BITS[stored.format])
        low = "down" in tensors
        y = ops.grouped_quant_linear(
            x, weight, offsets, **how, activation=None if low else activation, smooth=smooth
        )
        if not low:
            return y
        near = F.linear(
            x if smooth is None else x / smooth.to(x.dtype), tensors["down"].to(x.dtype)
        )
        up = tensors["up"].to(x.dtype).unflatten(0, lead)
        return activate(y + ops.grouped_linear(near, up, offsets, index=index), activation)

    def _probe_rows(self, x: Tensor, offsets: Tensor, index: Tensor | None) -> None:
        """Rows spread evenly over all, each by its own expert."""
        count = len(x) if index is None else len(index)
        take = min(count, PROBE)
        some = torch.arange(take, device=x.device) * count // max(1, take)
        ends = (some < offsets[:, None]).sum(1)
        rows = x[some if index is None else index[some]]
        weight = self.module.weight.to(x.dtype)
        want = ops.grouped_linear(rows, weight, ends, bias=self._bias(x))
        got = self._product(rows, ends, None, None)
        live = (torch.arange(len(rows), device=x.device) < ends[-1])[:, None]
        self.seen = more(self.seen, torch.where(live, got, 0.0), torch.where(live, want, 0.0))


class Layers(NamedTuple):
    """What ``MoE.layer`` is while one of its weights, or both, are quantised."""

    plain: Any
    own: dict[str, QuantExperts]

    def __call__(
        self,
        which: str,
        x: Tensor,
        offsets: Tensor,
        index: Tensor | None = None,
        weights: Any = None,
    ) -> Tensor:
        own = self.own.get(which)
        if own is None or weights is not None:  # given weights are in floats
            y: Tensor = self.plain(which, x, offsets, index, weights)
            return y
        return own.layer(x, offsets, index)


def patch_experts(owner: MoE | SwiGLU, own: dict[str, QuantForward], patch: Patch) -> None:
    if isinstance(owner, MoE):
        patch.set(owner, "layer", Layers(owner.layer, own))  # type: ignore[arg-type]
        return

    def product(which: str, x: Tensor) -> Tensor:
        return own[which].activated(x, None) if which in own else Weight(owner, which).forward(x)

    plain = owner.forward

    def forward(x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return plain(x)
        return product("down", activate(product("up", x), "swiglu"))

    patch.set(owner, "forward", forward)
