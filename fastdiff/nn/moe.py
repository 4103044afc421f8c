"""A feed-forward layer of experts: route, grouped products, combine. The host waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.ops.grouped_linear import ACTIVATIONS, GATED, activate
from fastdiff.ops.moe import logits_of


class Routed(NamedTuple):
    """What one layer of experts chose in one call.

    Attributes:
        logits: ``[T, E]``, those of tokens and samples together.
        experts: int64 ``[T, K]``.
        counts: int64 ``[E]``, slots that chose each expert.
        gate: as in ``ops.moe_route``.
    """

    logits: Tensor
    experts: Tensor
    counts: Tensor
    gate: str

    def balance(self) -> Tensor:
        """``ops.load_balance_loss`` of the layer: 1 where its experts share the tokens evenly."""
        return ops.load_balance_loss(self.logits, self.experts, gate=self.gate)


class Weights(NamedTuple):
    """Of some experts, stacked, as :class:`MoE` has them of all."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


_routes: ContextVar[list[Routed] | None] = ContextVar("fastdiff_routes", default=None)


@contextmanager
def routes() -> Iterator[list[Routed]]:
    """In the block, what every layer of experts chooses is added to the list, in the order of
    calls. Calls of a compiled function, or of an ``ExpertCache``, add nothing."""
    found: list[Routed] = []
    token = _routes.set(found)
    try:
        yield found
    finally:
        _routes.reset(token)


def balance_loss(found: Sequence[Routed]) -> Tensor:
    """The sum of the layers' balance losses, to be added to a training loss with a small factor.

    Raises:
        ValueError: ``found`` is empty.
    """
    if not found:
        raise ValueError("balance_loss: found is empty, need what nn.routes() gave of a call")
    return torch.stack([layer.balance() for layer in found]).sum()


def _autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that linear layers compute in here."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T``; the gradient of ``W``, a sum over all tokens, has the same bits for any number of
    threads, which torch's has not."""
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return nn.functional.linear(x, weight)
    ends = torch.tensor([0, x.shape[0]], device=x.device)
    return ops.grouped_linear(x, weight[None], ends)


class SwiGLU(nn.Module):
    """``down(silu(g) * h)`` with ``[g, h] = up x``, no biases: what all tokens go through.

    Attributes:
        up, down: ``[2F, C]`` and ``[C, F]``.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(2 * hidden, width))
        self.down = nn.Parameter(torch.empty(width, hidden))
        for weight in (self.up, self.down):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = _autocast(x)
        h = activate(ops.linear(x, self.up.to(x.dtype)), "swiglu")
        return ops.linear(h, self.down.to(x.dtype))


class MoE(nn.Module):
    """``sum_j g_j down_(e_j)(act(up_(e_j) x)) (+ shared(x))`` with the k experts of each token.

    Args:
        width: C.
        hidden: F of an expert.
        experts: E; k: of each token.
        activation: of ``ops.grouped_linear``; gated ones take ``[2F, C]`` weights.
        gate, renormalise, capacity: as in ``ops.moe_route``.
        bias: experts have biases: True, False, or "up" for the first layer alone.
        router: a linear gate over tokens is part of the layer; False: logits come with the call.
        shared: a module that every token goes through too.

    Attributes:
        up, down: the experts' weights, ``[E, F or 2F, C]`` and ``[E, C, F]``.
        router: float ``[E, C]``, or None.

    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        k: int,
        *,
        activation: str = "swiglu",
        gate: str = "softmax",
        renormalise: bool = False,
        capacity: int | None = None,
        bias: bool | str = False,
        router: bool = True,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("hidden", hidden), ("experts", experts), ("k", k)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"MoE: {name} is {value!r}, need an integer of at least 1")
        if k > experts:
            raise ValueError(f"MoE: k is {k}, need at most {experts}, the experts")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MoE: activation is {activation!r}, need one of {ACTIVATIONS}")
        self.k, self.activation, self.gate = k, activation, gate
        self.renormalise, self.capacity = renormalise, capacity
        rows = 2 * hidden if activation in GATED else hidden
        self.up = nn.Parameter(torch.empty(experts, rows, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(experts, rows)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(experts, width)) if bias is True else None
        self.router = nn.Parameter(torch.empty(experts, width)) if router else None
        self.shared = shared
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear`` draws them, for each expert."""
        for weight in (self.up, self.down, self.router):
            if weight is not None:
                nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def route(
        self, x: Tensor, logits: Tensor | None = None, sample_logits: Tensor | None = None
    ) -> ops.Routing:
        """The experts of every token ``[T, C]``; ``logits [T, E]`` where there is no router."""
        if logits is None:
            if self.router is None:
                raise ValueError(
                    "MoE: logits is None and the layer has no router, need one of them"
                )
            wide = torch.promote_types(x.dtype, torch.float32)
            with torch.autocast(x.device.type, enabled=False):  # a rounded logit changes experts
                logits = _product(x.to(wide), self.router.to(wide))
        routing = ops.moe_route(
            logits, self.k, sample_logits=sample_logits, gate=self.gate,
            renormalise=self.renormalise, capacity=self.capacity,
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            found = _routes.get()
            if found is not None:
                full = logits_of(logits, sample_logits)
                found.append(Routed(full, routing.experts, routing.counts, self.gate))
        return routing

    def weights(self) -> Weights:
        """The experts' own."""
        return Weights(self.up, self.down, self.up_bias, self.down_bias)

    def layer(
        self,
        which: str,
        x: Tensor,
        offsets: Tensor,
        index: Tensor | None = None,
        weights: Weights | None = None,
    ) -> Tensor:
        """The experts' first ("up", with its activation) or second layer ("down") over rows as
        ``ops.grouped_linear`` takes them; of ``weights`` in place of the layer's own."""
        own = self.weights() if weights is None else weights
        first = which == "up"
        weight, bias = (own.up, own.up_bias) if first else (own.down, own.down_bias)
        return ops.grouped_linear(
            x, weight.to(x.dtype), offsets, bias=None if bias is None else bias.to(x.dtype),
            index=index, activation=self.activation if first else None,
        )  # fmt: skip

    def experts_of(self, x: Tensor, routing: ops.Routing, weights: Weights | None = None) -> Tensor:
        """``[T, C]``: what the experts of a routing give for tokens ``[T, C]``. ``weights`` of as
        many experts as the routing has offsets for, in place of the layer's own."""
        h = self.layer("up", _autocast(x), routing.offsets, routing.tokens, weights)
        y = self.layer("down", h, routing.offsets, weights=weights)
        return ops.moe_combine(y, routing.weights, routing.position)

    def forward(
        self, x: Tensor, logits: Tensor | None = None, sample_logits: Tensor | None = None
    ) -> Tensor:
        """Args:
        x: ``[..., C]``.
        logits: ``[..., E]`` of the tokens, without a router.
        sample_logits: ``[B, E]``, added for the tokens of each sample.
        """
        tokens = x.reshape(-1, x.shape[-1])
        if logits is not None:
            logits = logits.reshape(-1, logits.shape[-1])
        out = self.experts_of(tokens, self.route(tokens, logits, sample_logits)).view(x.shape)
        return out if self.shared is None else out + self.shared(x)
