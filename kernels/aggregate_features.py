"""Triton kernels of aggregate_features and its backward.

Where channels share a logit, a program takes positions of a sample: it holds the weights of all
models in registers and walks the channels. Else it takes elements, one logit for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# SPOTS: positions (or a share of the elements) of a program, CHANNELS: of a step.
CONFIGS = [
    triton.Config({"SPOTS": s, "CHANNELS": c}, num_warps=w)
    for s, c, w in ((32, 32, 4), (64, 16, 4), (16, 128, 8))
]


@triton.jit
def _below(logit, most):
    # inf - inf is NaN: the largest are 0 below themselves; NaN stays
    same = (logit == most) & (logit == logit)
    return tl.exp(tl.where(same, 0.0, logit - tl.where(same, 0.0, most)))


@triton.jit
def _shared_weights(logits_ptr, b, p, live, l_k, l_b, K: tl.constexpr, MODELS: tl.constexpr):
    # [SPOTS, MODELS]; 0 past the last model
    k = tl.arange(0, MODELS)
    at = k.to(tl.int64)[None, :] * l_k + b * l_b + p[:, None]
    mask = live[:, None] & (k < K)[None, :]
    logit = tl.load(logits_ptr + at, mask=mask, other=-float("inf")).to(tl.float32)
    most = tl.max(logit, 1)[:, None]
    w = tl.where((k < K)[None, :], _below(logit, most), 0.0)
    total = tl.sum(w, 1)[:, None]
    return tl.where(most == -float("inf"), float("nan"), w / total)


@triton.jit
def _aggregate_shared_kernel(
    x_ptr,  # [K, B], samples [C, P] or [P, C] by their strides
    logits_ptr,  # [K, B], samples [P]
    out_ptr,  # [B], samples like x's
    channels,  # C
    positions,  # P
    x_k, x_b, x_c, x_p, l_k, l_b,
    K: tl.constexpr,
    MODELS: tl.constexpr,
    SPOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * SPOTS + tl.arange(0, SPOTS)
    live = p < positions
    w = _shared_weights(logits_ptr, b, p, live, l_k, l_b, K, MODELS)
    models = tl.arange(0, MODELS)[None, :]
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        mask = live[:, None] & (c < channels)[None, :]
        at = p.to(tl.int64)[:, None] * x_p + c.to(tl.int64)[None, :] * x_c
        total = tl.zeros([SPOTS, CHANNELS], tl.float32)
        for k in range(0, K):
            share = tl.sum(tl.where(models == k, w, 0.0), 1)[:, None]
            x = tl.load(x_ptr + k * x_k + b * x_b + at, mask=mask, other=0.0)
            total += share * x.to(tl.float32)
        to = b * channels * positions + at
        tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _aggregate_shared_backward_kernel(
    grad_ptr,  # [B], samples like x's
    x_ptr,  # [K, B], samples [C, P] or [P, C] by their strides
    logits_ptr,  # [K, B], samples [P]
    grad_x_ptr,  # [K, B], samples like x's
    grad_logits_ptr,  # [K, B, P]
    batch,
    channels,  # C
    positions,  # P
    x_k, x_b, x_c, x_p, l_k, l_b,
    K: tl.constexpr,
    MODELS: tl.constexpr,
    SPOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * SPOTS + tl.arange(0, SPOTS)
    live = p < positions
    w = _shared_weights(logits_ptr, b, p, live, l_k, l_b, K, MODELS)
    models = tl.arange(0, MODELS)
    d = tl.zeros([SPOTS, MODELS], tl.float32)
    size = channels * positions
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        mask = live[:, None] & (c < channels)[None, :]
        at = p.to(tl.int64)[:, None] * x_p + c.to(tl.int64)[None, :] * x_c
        g = tl.load(grad_ptr + b * size + at, mask=mask, other=0.0).to(tl.float32)
        for k in range(0, K):
            share = tl.sum(tl.where(models[None, :] == k, w, 0.0), 1)[:, None]
            x = tl.load(x_ptr + k * x_k + b * x_b + at, mask=mask, other=0.0).to(tl.float32)
            d += tl.where(models[None, :] == k, tl.sum(g * x, 1)[:, None], 0.0)
            to = (tl.cast(k, tl.int64) * batch + b) * size + at
            tl.store(grad_x_ptr + to, (share * g).to(grad_x_ptr.dtype.element_ty), mask=mask)
    slope = w * (d - tl.sum(w * d, 1)[:, None])
    to = (models.to(tl.int64)[None, :] * batch + b) * positions + p[:, None]
    mask = live[:, None] & (models < K)[None, :]
    tl.store(grad_logits_ptr + to, slope.to(grad_logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _each_softmax(logits_ptr, at, mask, l_k, K: tl.constexpr):
    # the largest logit of an element, and the sum of what exp gives below it
    most = tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for k in range(1, K):
        logit = tl.load(logits_ptr + k * l_k + at, mask=mask, other=0.0).to(tl.float32)
        most = tl.maximum(most, logit)
    total = tl.zeros_like(most)
    for k in range(0, K):
        logit = tl.load(logits_ptr + k * l_k + at, mask=mask, other=0.0).to(tl.float32)
        total += _below(logit, most)
    return most, tl.where(most == -float("inf"), float("nan"), total)


@triton.jit
def _aggregate_each_kernel(
    x_ptr,  # [K, B], samples of `size` elements
    logits_ptr,
    out_ptr,  # [B, size]
    size,
    x_k, x_b, l_k, l_b,
    K: tl.constexpr,
    SPOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * (SPOTS * CHANNELS) + tl.arange(0, SPOTS * CHANNELS)
    mask = i < size
    at = b * l_b + i
    most, total = _each_softmax(logits_ptr, at, mask, l_k, K)
    y = tl.zeros([SPOTS * CHANNELS], tl.float32)
    for k in range(0, K):
        logit = tl.load(logits_ptr + k * l_k + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + k * x_k + b * x_b + i, mask=mask, other=0.0).to(tl.float32)
        y += _below(logit, most) / total * x
    tl.store(out_ptr + b * size + i, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _aggregate_each_backward_kernel(
    grad_ptr,  # [B, size]
    x_ptr,  # [K, B], samples of `size` elements
    logits_ptr,
    grad_x_ptr,  # [K, B, size]
    grad_logits_ptr,
    batch,
    size,
    x_k, x_b, l_k, l_b,
    K: tl.constexpr,
    SPOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * (SPOTS * CHANNELS) + tl.arange(0, SPOTS * CHANNELS)
    mask = i < size
    at = b * l_b + i
    most, total = _each_softmax(logits_ptr, at, mask, l_k, K)
    g = tl.load(grad_ptr + b * size + i, mask=mask, other=0.0).to(tl.float32)
    mean = tl.zeros([SPOTS * CHANNELS], tl.float32)
    for k in range(0, K):
        logit = tl.load(logits_ptr + k * l_k + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + k * x_k + b * x_b + i, mask=mask, other=0.0).to(tl.float32)
        mean += _below(logit, most) / total * (g * x)
    for k in range(0, K):
        logit = tl.load(logits_ptr + k * l_k + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + k * x_k + b * x_b + i, mask=mask, other=0.0).to(tl.float32)
        w = _below(logit, most) / total
        to = (tl.cast(k, tl.int64) * batch + b) * size + i
        tl.store(grad_x_ptr + to, (w * g).to(grad_x_ptr.dtype.element_ty), mask=mask)
        slope = w * (g * x - mean)
        tl.store(grad_logits_ptr + to, slope.to(grad_logits_ptr.dtype.element_ty), mask=mask)


def _inner(x: Tensor) -> bool:
    if x.dim() == 3:
        return False
    sample = x[0, 0]
    return not sample.is_contiguous() and sample.movedim(0, -1).is_contiguous()


def _place(t: Tensor, at: int, inner: bool) -> Tensor:
    """``t``, its channels in dimension ``at``, in the order of memory, samples contiguous."""
    t = t.movedim(at, -1) if inner else t
    dense = t[0].is_contiguous() if at == 1 else t[0, 0].is_contiguous()
    return t if dense else t.contiguous()


def _new(t: Tensor, at: int, inner: bool) -> tuple[Tensor, Tensor]:
    """A buffer like ``t`` in the order of memory, and what is handed out of it."""
    shape = t.movedim(at, -1).shape if inner else t.shape
    out = torch.empty(shape, dtype=t.dtype, device=t.device)
    return out, out.movedim(-1, at) if inner else out


def _strides(x: Tensor, inner: bool, channels: int, positions: int) -> tuple[int, ...]:
    return (*x.stride()[:2], *((1, channels) if inner else (positions, 1)))


def aggregate_features(x: Tensor, logits: Tensor, *, config: triton.Config = CONFIGS[0]) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.aggregate_features``."""
    K, B, C = x.shape[:3]
    if not x.numel():
        return torch.empty(x.shape[1:], dtype=x.dtype, device=x.device)
    P, inner = x[0, 0, 0].numel(), _inner(x)
    out, given = _new(x[0], 1, inner)
    values, maps = _place(x, 2, inner), _place(logits, 2, inner)
    spots, how = config.kwargs["SPOTS"], dict(**config.kwargs, num_warps=config.num_warps)
    if logits.shape[2] == C:
        _aggregate_each_kernel[(triton.cdiv(C * P, spots * config.kwargs["CHANNELS"]), B)](
            values, maps, out, C * P, *values.stride()[:2], *maps.stride()[:2], K=K, **how
        )
    else:
        _aggregate_shared_kernel[(triton.cdiv(P, spots), B)](
            values, maps, out, C, P, *_strides(values, inner, C, P), *maps.stride()[:2],
            K=K, MODELS=triton.next_power_of_2(K), **how,
        )  # fmt: skip
    return given


def aggregate_features_backward(
    grad: Tensor, x: Tensor, logits: Tensor, *, config: triton.Config = CONFIGS[0]
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; shapes as in ``fastdiff.ops.aggregate_features_backward``."""
    K, B, C = x.shape[:3]
    if not x.numel():
        return torch.empty_like(x), torch.zeros_like(logits)
    P, inner = x[0, 0, 0].numel(), _inner(x)
    grad_x, given_x = _new(x, 2, inner)
    grad_logits, given_logits = _new(logits, 2, inner)
    values, maps = _place(x, 2, inner), _place(logits, 2, inner)
    g = (grad.movedim(1, -1) if inner else grad).contiguous()
    spots, how = config.kwargs["SPOTS"], dict(**config.kwargs, num_warps=config.num_warps)
    if logits.shape[2] == C:
        _aggregate_each_backward_kernel[
            (triton.cdiv(C * P, spots * config.kwargs["CHANNELS"]), B)
        ](
            g, values, maps, grad_x, grad_logits, B, C * P,
            *values.stride()[:2], *maps.stride()[:2], K=K, **how,
        )  # fmt: skip
    else:
        _aggregate_shared_backward_kernel[(triton.cdiv(P, spots), B)](
            g, values, maps, grad_x, grad_logits, B, C, P,
            *_strides(values, inner, C, P), *maps.stride()[:2],
            K=K, MODELS=triton.next_power_of_2(K), **how,
        )  # fmt: skip
    return given_x, given_logits
