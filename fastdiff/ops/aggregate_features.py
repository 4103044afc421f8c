r"""Features of several models into one, by weights of every position: Adaptive Feature Aggregation
(Wang et al. 2024, arXiv:2405.17082, section 3.3).

    w[k] = exp(logits[k]) / sum_j exp(logits[j])            at every position (and channel)
    y = sum_k w[k] x[k]

Gradients, with g that of y and the sum over the channels that share a logit:

    dx[k] = w[k] g,    d[k] = sum_c g x[k],    dlogits[k] = w[k] (d[k] - sum_j w[j] d[j])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, needs_grad, pick
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_like, check_shape, check_tensor, wide

MAX_MODELS = 16  # csrc/cpu/aggregate_features.h


def _inner(x: Tensor) -> bool:
    """Channels, dimension 2, are innermost in the memory of a model's sample."""
    if x.dim() == 3 or not x.numel():
        return False
    sample = x[0, 0]
    return not sample.is_contiguous() and sample.movedim(0, -1).is_contiguous()


def _laid(t: Tensor, at: int, inner: bool) -> Tensor:
    """``t``, its channels in dimension ``at``, in the order of memory that results have."""
    return t.movedim(at, -1).contiguous().movedim(-1, at) if inner else t.contiguous()


def _weights(logits: Tensor) -> Tensor:
    """softmax over dimension 0, with a logit of +inf far above all others: torch gives NaN."""
    most = logits.detach().amax(0)
    highest = logits.isinf() & (logits == most)  # inf - inf is NaN
    w = torch.where(highest, 0.0, logits - most).exp()
    return torch.where(most > -torch.inf, w / w.sum(0), torch.nan)


def aggregate_features_ref(x: Tensor, logits: Tensor) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    y = (_weights(wide(logits)) * wide(x)).sum(0)
    return _laid(y.to(x.dtype), 1, _inner(x))


def aggregate_features_backward_ref(
    grad: Tensor, x: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """The specification: float32 inside (float64 for float64 input), one rounding of each."""
    w, d = _weights(wide(logits)), wide(grad) * wide(x)
    if logits.shape[2] != x.shape[2]:
        d = d.sum(2, keepdim=True)
    slope, inner = w * (d - (w * d).sum(0)), _inner(x)
    grad_x = (w * wide(grad)).expand(x.shape).to(x.dtype)
    return _laid(grad_x, 2, inner), _laid(slope.to(logits.dtype), 2, inner)


def _too_many(x: Tensor) -> str | None:
    if x.shape[0] > MAX_MODELS:
        return f"x is of {x.shape[0]} models, above {MAX_MODELS}, the kernels' most"
    return None


def _native_why_not(x: Tensor, logits: Tensor) -> str | None:
    return _too_many(x) or why_not_native(x, logits, gpu="aggregate_features")


def _triton_why_not(x: Tensor, logits: Tensor) -> str | None:
    return _too_many(x) or why_not_triton(x, logits)


def _backward_native_why_not(grad: Tensor, x: Tensor, logits: Tensor) -> str | None:
    return _too_many(x) or why_not_native(grad, x, logits, gpu="aggregate_features_backward")


def _backward_triton_why_not(grad: Tensor, x: Tensor, logits: Tensor) -> str | None:
    return _too_many(x) or why_not_triton(grad, x, logits)


_STEM = "aggregate_features"
IMPLS = (
    Impl("native", native(_STEM), _native_why_not),
    Impl("triton", triton_row(_STEM), _triton_why_not),
    Impl("ref", aggregate_features_ref, always),
)
BACKWARD_IMPLS = (
    Impl("native", native(f"{_STEM}_backward"), _backward_native_why_not),
    Impl("triton", triton_row(_STEM, f"{_STEM}_backward"), _backward_triton_why_not),
    Impl("ref", aggregate_features_backward_ref, always),
)


def _check_models(op: str, x: Tensor, logits: Tensor) -> None:
    check_tensor(op, "x", x, min_dim=3)
    if not x.shape[0]:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, need at least one model")
    check_tensor(op, "logits", logits)
    if logits.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: logits is {logits.dtype}, need {x.dtype} or torch.float32")
    if logits.device != x.device:
        raise ValueError(f"{op}: logits is on {logits.device}, need {x.device}, the device of x")
    K, B, _, *rest = x.shape
    check_shape(op, "logits", logits, (K, B, 1, *rest), x.shape)


def row_args(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Check the public arguments of aggregate_features and give those of a row."""
    _check_models("aggregate_features", x, logits)
    return x, logits


def backward_args(grad: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the public arguments of aggregate_features_backward and give those of a row."""
    op = "aggregate_features_backward"
    _check_models(op, x, logits)
    check_like(op, "grad", grad, x)
    check_shape(op, "grad", grad, x.shape[1:])
    return grad, x, logits


TABLES = {
    "aggregate_features": (IMPLS, row_args),
    "aggregate_features_backward": (BACKWARD_IMPLS, backward_args),
}


class _Aggregate(torch.autograd.Function):
    """Keeps inputs alone: the weights are computed again."""

    @staticmethod
    def forward(ctx: Any, row: Callable[..., Tensor], impl: str | None, *args: Any) -> Tensor:
        ctx.save_for_backward(*args)
        ctx.impl = impl
        return row(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "aggregate_features: only the row ref has a second derivative; force it for that"
            )
        args = (grad, *ctx.saved_tensors)
        grads = pick("aggregate_features_backward", BACKWARD_IMPLS, ctx.impl, *args)(*args)
        wants = ctx.needs_input_grad[2:]
        return None, None, *(g if w else None for g, w in zip(grads, wants, strict=True))


def aggregate_features(x: Tensor, logits: Tensor, *, impl: str | None = None) -> Tensor:
    """The sum of the models' features, each weighted by the softmax over models of its logits.

    Args:
        x: ``[K, B, C, ...]``, K models (the native and Triton rows take up to 16); float16,
            bfloat16 or float32 (float64 on the reference row). Within a sample contiguous, or with
            channels innermost (tokens ``[K, B, N, C]``: ``x.movedim(-1, 2)``); else it is copied.
        logits: ``[K, B, 1, ...]`` or ``[K, B, C, ...]``; of the dtype of ``x`` or float32, on its
            device.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[B, C, ...]``, dtype and device of ``x``, in the order of memory of its samples; never a
        view of it. The softmax is taken in float32. One model is copied. Of logits that are +inf
        the weights are shared out among those (torch's softmax gives NaN there), so one such model
        comes out as it is where the others are finite. NaN where a logit is NaN, or all are -inf.
        Gradients are those of :func:`aggregate_features_backward`, to both.

    Raises:
        ValueError: a shape, dtype or device differs from the above; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, logits)
    row = pick("aggregate_features", IMPLS, impl, *args)
    if row is aggregate_features_ref or not needs_grad(*args):
        return row(*args)
    out: Tensor = _Aggregate.apply(row, impl, *args)  # type: ignore[no-untyped-call]
    return out


def aggregate_features_backward(
    grad: Tensor, x: Tensor, logits: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`aggregate_features` from that of its result.

    Args:
        grad: ``[B, C, ...]``, dtype and device of ``x``.
        x, logits: as in :func:`aggregate_features`.
        impl: row of ``BACKWARD_IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``grad_x`` and ``grad_logits``, of the shape and dtype of ``x`` and ``logits``, in the order
        of memory of samples of ``x``. Sums over channels are taken in float32, in an order that
        depends on shapes alone.

    Raises:
        ValueError: as :func:`aggregate_features` does, or ``grad`` does not fit.
        NoImpl: the forced row refuses; the message says why.
    """
    args = backward_args(grad, x, logits)
    return pick("aggregate_features_backward", BACKWARD_IMPLS, impl, *args)(*args)


def _empty(t: Tensor, at: int, inner: bool) -> Tensor:
    if inner:
        shape = t.movedim(at, -1).shape
        return t.new_empty(shape).movedim(-1, at)
    return t.new_empty(t.shape)


if hasattr(torch.ops.fastdiff, "aggregate_features"):

    @torch.library.register_fake("fastdiff::aggregate_features")
    def _(x: Tensor, logits: Tensor) -> Tensor:
        return _empty(x[0], 1, _inner(x))

    @torch.library.register_fake("fastdiff::aggregate_features_backward")
    def _(grad: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        inner = _inner(x)
        return _empty(x, 2, inner), _empty(logits, 2, inner)
