r"""Routing of tokens to experts and the weighted sum of what experts give (Shazeer et al. 2017,
arXiv:1701.06538, eq. 2-5; DiT-MoE: Fei et al. 2024, arXiv:2407.11633, eq. 4-6).

With logits l_te = token_te + sample_be (b: the sample of token t), token t goes to the k experts of
highest l_te, of equal ones to the lowest, NaN last; their gates are

    g_te = exp(l_te - max_e l_te) / sum_e exp(l_te - max_e l_te)              "softmax", over all E
    g_te = 1 / (1 + exp(-l_te))                                               "sigmoid"

or, with ``renormalise``, those divided by the sum of the k chosen. A slot is (t, j), j < k, of the
number t k + j; rows are slots in the order of (expert, slot), so those of an expert lie together.
With a capacity the slots of an expert after its first ``capacity`` are dropped: their gate is 0,
and their rows come after those of all experts. The output of token t is sum_j g_tj y[position_tj].

All of it stays on the device: shapes depend on T, E and k alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, needs_grad, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_index, check_range, check_shape, check_tensor, wide

GATES = ("softmax", "sigmoid")
MAX_EXPERTS = 256  # of the kernels: a token's logits lie in registers


class Routing(NamedTuple):
    """Which experts compute which tokens; on the device of the logits.

    Attributes:
        weights: float32 ``[T, K]``, gates of the chosen experts; of a token with a NaN among its
            logits, or with "softmax" an infinite one as its largest, all NaN: its output is NaN,
            and no other.
        experts: int64 ``[T, K]``, the highest logit first.
        order: int64 ``[T K]``, the slot ``t K + j`` of every row.
        position: int64 ``[T, K]``, the row of every slot; -1 where it is dropped.
        offsets: int64 ``[E + 1]``; rows of expert e are ``offsets[e]`` to ``offsets[e + 1]``.
        counts: int64 ``[E]``, slots that chose each expert, dropped ones among them.
    """

    weights: Tensor
    experts: Tensor
    order: Tensor
    position: Tensor
    offsets: Tensor
    counts: Tensor

    @property
    def tokens(self) -> Tensor:
        """int64 ``[T K]``: the token of every row, the ``index`` of ``grouped_linear``."""
        return self.order // self.experts.shape[1]

    @property
    def dropped(self) -> Tensor:
        """int64 ``[E]``: slots that each expert had no room for."""
        return self.counts - self.offsets.diff()


def gates_of(logits: Tensor, experts: Tensor, sigmoid: bool, renormalise: bool) -> Tensor:
    """``[T, K]``: gates of the chosen experts, in the dtype of ``logits``."""
    if sigmoid:
        gates = logits.sigmoid()
        gates = gates.masked_fill(logits.isnan().any(1, keepdim=True), torch.nan)
    else:
        gates = logits.softmax(1)
    chosen = gates.gather(1, experts)
    return chosen / chosen.sum(1, keepdim=True) if renormalise else chosen


def logits_of(logits: Tensor, sample: Tensor | None) -> Tensor:
    """float32 (float64) ``[T, E]``: logits with those of the samples added."""
    if sample is None:
        return wide(logits)
    return wide(logits) + wide(sample).repeat_interleave(logits.shape[0] // sample.shape[0], 0)


def moe_route_ref(
    logits: Tensor, sample: Tensor | None, k: int, sigmoid: bool, renormalise: bool, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification: one addition in float32, then comparisons; gates in float32."""
    full = logits_of(logits, sample)
    tokens, count = full.shape
    value = full.masked_fill(full.isnan(), -torch.inf)
    # NaN comes after -inf: sorted apart, as both compare alike.
    order = torch.sort(value, dim=1, stable=True, descending=True).indices
    last = torch.sort(full.isnan().gather(1, order).byte(), dim=1, stable=True).indices
    experts = order.gather(1, last)[:, :k].contiguous()
    weights = gates_of(full, experts, sigmoid, renormalise)
    each = torch.arange(count, device=full.device)
    hits = experts.flatten()[:, None] == each  # [T K, E]
    counts = hits.sum(0)
    kept = counts if capacity < 0 else counts.clamp(max=capacity)
    rank = hits.cumsum(0).gather(1, experts.view(-1, 1))[:, 0] - 1
    drop = rank >= capacity if capacity >= 0 else torch.zeros_like(rank, dtype=torch.bool)
    key = experts.flatten().masked_fill(drop, count)
    rows = torch.sort(key, stable=True).indices
    position = torch.empty_like(rows)
    position.scatter_(0, rows, torch.arange(rows.shape[0], device=rows.device))
    position = position.masked_fill(drop, -1).view(tokens, k)
    weights = weights.masked_fill(drop.view(tokens, k), 0.0)
    offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
    return weights, experts, rows, position, offsets, counts


def moe_combine_ref(y: Tensor, weights: Tensor, position: Tensor) -> Tensor:
    """The specification: products added in float32 in the order of j; one rounding at the end."""
    check_range("moe_combine", "position", position, -1, y.shape[0])
    tokens, k = position.shape
    total = wide(y).new_zeros(tokens, y.shape[1])
    for j in range(k):
        at = position[:, j]
        row = wide(y)[at.clamp(min=0)] if y.shape[0] else total
        total = total + torch.where(at[:, None] >= 0, weights[:, j : j + 1] * row, 0.0)
    return total.to(y.dtype)


def _route_native_why_not(logits: Tensor, sample: Tensor | None, *_: object) -> str | None:
    return _too_many(logits) or why_not_native(logits, sample, gpu="moe_route")


def _route_triton_why_not(logits: Tensor, sample: Tensor | None, *_: object) -> str | None:
    return _too_many(logits) or why_not_triton(logits, sample)


def _too_many(logits: Tensor) -> str | None:
    if logits.shape[1] > MAX_EXPERTS:
        return f"logits are of {logits.shape[1]} experts, above {MAX_EXPERTS}, the kernels' most"
    return None


def _combine_native_why_not(y: Tensor, weights: Tensor, position: Tensor) -> str | None:
    return why_not_native(y, gpu="moe_combine") or refuse_grad(y, weights)


def _combine_triton_why_not(y: Tensor, weights: Tensor, position: Tensor) -> str | None:
    return why_not_triton(y) or refuse_grad(y, weights)


ROUTE_IMPLS = (
    Impl("native", native("moe_route"), _route_native_why_not),
    Impl("triton", triton_row("moe", "moe_route"), _route_triton_why_not),
    Impl("ref", moe_route_ref, always),
)
COMBINE_IMPLS = (
    Impl("native", native("moe_combine"), _combine_native_why_not),
    Impl("triton", triton_row("moe", "moe_combine"), _combine_triton_why_not),
    Impl("ref", moe_combine_ref, always),
)


def route_args(
    logits: Tensor,
    k: int,
    *,
    sample_logits: Tensor | None = None,
    gate: str = "softmax",
    renormalise: bool = False,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor | None, int, bool, bool, int]:
    """Check the public arguments and give those of a row."""
    op = "moe_route"
    check_tensor(op, "logits", logits, dim=2)
    tokens, experts = logits.shape
    if not experts:
        raise ValueError(f"{op}: logits has shape {list(logits.shape)}, need at least one expert")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= experts:
        raise ValueError(f"{op}: k is {k!r}, need an integer from 1 to {experts}, the experts")
    if sample_logits is not None:
        check_tensor(op, "sample_logits", sample_logits, dim=2)
        if sample_logits.device != logits.device:
            raise ValueError(
                f"{op}: sample_logits is on {sample_logits.device}, need {logits.device}"
            )
        samples = sample_logits.shape[0]
        if sample_logits.shape[1] != experts or not samples or tokens % samples:
            raise ValueError(
                f"{op}: sample_logits has shape {list(sample_logits.shape)}, need [B, {experts}] "
                f"with {tokens} tokens a multiple of B"
            )
        sample_logits = sample_logits.contiguous()
    if gate not in GATES:
        raise ValueError(f"{op}: gate is {gate!r}, need one of {', '.join(GATES)}")
    if capacity is not None and (
        isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0
    ):
        raise ValueError(f"{op}: capacity is {capacity!r}, need an integer of at least 0, or None")
    most = -1 if capacity is None else capacity
    return logits.contiguous(), sample_logits, k, gate == "sigmoid", bool(renormalise), most


def combine_args(y: Tensor, weights: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the public arguments and give those of a row."""
    op = "moe_combine"
    check_tensor(op, "y", y, dim=2)
    check_tensor(op, "weights", weights, dim=2)
    need = torch.float64 if y.dtype == torch.float64 else torch.float32
    if weights.dtype != need or weights.device != y.device:
        raise ValueError(
            f"{op}: weights is {weights.dtype} on {weights.device}, need {need} on {y.device}"
        )
    check_index(op, "position", position, y, "y")
    check_shape(op, "position", position, tuple(weights.shape))
    return y.contiguous(), weights.contiguous(), position.contiguous()


TABLES = {"moe_route": (ROUTE_IMPLS, route_args), "moe_combine": (COMBINE_IMPLS, combine_args)}


def moe_route(
    logits: Tensor,
    k: int,
    *,
    sample_logits: Tensor | None = None,
    gate: str = "softmax",
    renormalise: bool = False,
    capacity: int | None = None,
    impl: str | None = None,
) -> Routing:
    """Choose ``k`` experts for every token, and sort the chosen by expert; no wait for the device.

    Args:
        logits: ``[T, E]``, 1 to 256 experts (any number on the reference row); any float dtype,
            compared in float32.
        k: experts of a token, 1 to E.
        sample_logits: ``[B, E]``, added to the logits of the T / B tokens of each sample: routing
            by the noise level (MoDE), or biased by it.
        gate: "softmax" or "sigmoid".
        renormalise: gates of a token add up to 1.
        capacity: the most rows of an expert; slots beyond are dropped in the order of tokens, and
            counted in :attr:`Routing.dropped`. None: none is ever dropped.
        impl: row of the table to force; None takes the first that accepts.

    Returns:
        A :class:`Routing`. Its weights carry gradients to the logits; the choice is a constant.

    Raises:
        ValueError: an argument does not fit; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = route_args(
        logits, k, sample_logits=sample_logits, gate=gate, renormalise=renormalise,
        capacity=capacity,
    )  # fmt: skip
    run = pick("moe_route", ROUTE_IMPLS, impl, *args)
    if not needs_grad(logits, sample_logits):
        return Routing(*run(*args))
    with torch.no_grad():
        found = Routing(*run(*args))
    weights = gates_of(logits_of(*args[:2]), found.experts, args[3], args[4])
    return found._replace(weights=weights.masked_fill(found.position < 0, 0.0))


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        y: Tensor,
        weights: Tensor,
        position: Tensor,
        impl: str | None,
    ) -> Tensor:
        ctx.save_for_backward(y, weights, position)
        out: Tensor = pick("moe_combine", COMBINE_IMPLS, impl, y, weights, position)(
            y, weights, position
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        y, weights, position = ctx.saved_tensors
        k = position.shape[1]
        grad_y = torch.zeros_like(y) if ctx.needs_input_grad[0] else None
        grad_weights = torch.zeros_like(weights) if ctx.needs_input_grad[1] else None
        for j in range(k):
            at = position[:, j]
            kept = (at >= 0)[:, None]
            where = at.clamp(min=0)
            if grad_y is not None and y.shape[0]:
                # Each row has one slot: dropped slots add 0 to row 0.
                part = torch.where(kept, weights[:, j : j + 1] * wide(grad), 0.0).to(y.dtype)
                grad_y.index_add_(0, where, part)
            if grad_weights is not None and y.shape[0]:
                dot = (wide(y)[where] * wide(grad)).sum(1)
                grad_weights[:, j] = torch.where(kept[:, 0], dot, 0.0)
        return grad_y, grad_weights, None, None


def moe_combine(y: Tensor, weights: Tensor, position: Tensor, *, impl: str | None = None) -> Tensor:
    """The weighted sum of what each token's experts gave, always in the same order.

    Args:
        y: ``[R, C]``, rows as in :class:`Routing`; float16, bfloat16 or float32 (float64 on the
            reference row).
        weights: float32 ``[T, K]`` (float64 for float64).
        position: int64 ``[T, K]``, rows of ``y``; -1: none. No row may stand twice.
        impl: row of the table to force; None takes the first that accepts.

    Returns:
        ``[T, C]``, dtype and device of ``y``; 0 for a token that has no row. Gradients flow to
        ``y`` and ``weights``.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or, on the CPU, a position is
            outside of -1 to R - 1. On a GPU nothing waits for that: such a slot counts as -1.
        NoImpl: the forced row refuses; the message says why.
    """
    args = combine_args(y, weights, position)
    if needs_grad(y, weights):
        out: Tensor = _Combine.apply(*args, impl)  # type: ignore[no-untyped-call]
        return out
    return pick("moe_combine", COMBINE_IMPLS, impl, *args)(*args)


def load_balance_loss(logits: Tensor, experts: Tensor, *, gate: str = "softmax") -> Tensor:
    """E sum_e f_e P_e, f_e the share of slots and P_e the mean gate of expert e (Fedus et al. 2021,
    arXiv:2101.03961, eq. 4-6): 1 where both are even. Its gradient goes through P alone.

    Args:
        logits: ``[T, E]``.
        experts: int64 ``[T, K]`` of :class:`Routing`.
        gate: "softmax" or "sigmoid" (gates divided by their sum over all E).

    Raises:
        ValueError: a shape does not fit.
    """
    check_tensor("load_balance_loss", "logits", logits, dim=2)
    if experts.dim() != 2 or experts.shape[0] != logits.shape[0]:
        raise ValueError(
            f"load_balance_loss: experts has shape {list(experts.shape)}, need "
            f"[{logits.shape[0]}, K]"
        )
    if gate not in GATES:
        raise ValueError(f"load_balance_loss: gate is {gate!r}, need one of {', '.join(GATES)}")
    full, count = wide(logits), logits.shape[1]
    gates = full.softmax(1) if gate == "softmax" else full.sigmoid()
    if gate == "sigmoid":
        gates = gates / gates.sum(1, keepdim=True)
    share = torch.zeros(count, dtype=full.dtype, device=full.device)
    ones = torch.ones(experts.numel(), dtype=full.dtype, device=full.device)
    share.index_add_(0, experts.flatten(), ones)
    return count * (share / max(1, experts.numel()) * gates.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """The mean square of the logits' log-sum-exp, which keeps them small (Zoph et al. 2022,
    arXiv:2202.08906, eq. 5).

    Args:
        logits: ``[T, E]``.
    """
    check_tensor("z_loss", "logits", logits, dim=2)
    return wide(logits).logsumexp(1).square().mean()


if hasattr(torch.ops.fastdiff, "moe_route"):

    @torch.library.register_fake("fastdiff::moe_route")
    def _(
        logits: Tensor,
        sample: Tensor | None,
        k: int,
        sigmoid: bool,
        renormalise: bool,
        capacity: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        tokens, experts = logits.shape
        weights = logits.new_empty(tokens, k, dtype=torch.float32)
        index = logits.new_empty(tokens, k, dtype=torch.int64)
        order = logits.new_empty(tokens * k, dtype=torch.int64)
        offsets = logits.new_empty(experts + 1, dtype=torch.int64)
        counts = logits.new_empty(experts, dtype=torch.int64)
        return weights, index, order, torch.empty_like(index), offsets, counts

    @torch.library.register_fake("fastdiff::moe_combine")
    def _(y: Tensor, weights: Tensor, position: Tensor) -> Tensor:
        return y.new_empty(weights.shape[0], y.shape[1])
