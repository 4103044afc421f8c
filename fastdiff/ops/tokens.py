r"""Tokens by index: taken out, so that a step computes some of them, and put back (Rao et al. 2021,
DynamicViT, arXiv:2106.02034; region-adaptive sampling: Liu et al. 2025, arXiv:2502.10389).

    gather_tokens:    out[b, a] = x[b, index[b, a]]
    scatter_tokens:   out = x, then out[b, index[b, a]] = y[b, a], a = 0, 1, ...
      with a gate:    out = x, then out[b, index[b, a]] = x[b, index[b, a]] + gate y[b, a]
    update_tokens_:   the same without a gate, in x itself and in all its heads: what refreshes the
                      kept keys and values of the tokens that a step computes

Of several a with one index in a sample the last counts, in every row of the table and with a gate
too, so that a result depends on no order of threads. Every element of an output is written once.

Ragged batches: with as many tokens for each sample as it likes, a batch whose samples lie one after
another in memory is one sample of B * N tokens, of which sample b's are b * N + 0, 1, ...
(``x.view(1, B * N, D)``, index ``[1, total]``); nothing is padded then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import (
    check_index,
    check_like,
    check_range,
    check_shape,
    check_tensor,
    wide,
)


def _take(t: Tensor, index: Tensor) -> Tensor:
    return t.gather(1, index[:, :, None].expand(-1, -1, t.shape[2]))


def gather_tokens_ref(x: Tensor, index: Tensor) -> Tensor:
    """The specification: the bits of ``x``. Its gradient adds up where an index repeats."""
    check_range("gather_tokens", "index", index, 0, x.shape[1])
    return _take(x, index)


def scatter_tokens_ref(x: Tensor, index: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    check_range("scatter_tokens", "index", index, 0, x.shape[1])
    if index.shape[1] == 0:
        return x.clone(memory_format=torch.contiguous_format)
    position = torch.arange(index.shape[1], device=x.device).expand_as(index)
    last = index.new_full(x.shape[:2], -1).scatter_reduce(1, index, position, "amax")  # [B, N]
    source = last.clamp(min=0)
    row = _take(y, source)
    if gate is not None:
        gain = gate[:, None] if gate.dim() == 2 else _take(gate, source)
        row = (wide(x) + wide(gain) * wide(row)).to(x.dtype)
    return torch.where((last >= 0)[:, :, None], row, x).contiguous()


def update_tokens_ref(cache: Tensor, index: Tensor, y: Tensor) -> None:
    """The specification: the bits of ``y``; nothing else in the memory of ``cache`` is written."""
    tokens = cache.dim() - 2
    check_range("update_tokens_", "index", index, 0, cache.shape[tokens])
    position = torch.arange(index.shape[1], device=index.device).expand_as(index)
    last = index.new_full((cache.shape[0], cache.shape[tokens]), -1)
    last = last.scatter_reduce(1, index, position, "amax")  # [B, N]
    hit, source = last >= 0, last.clamp(min=0)
    if index.shape[1] == 0:
        return
    if cache.dim() == 4:
        hit, source = hit[:, None], source[:, None].expand(-1, cache.shape[1], -1)
    row = y.gather(tokens, source[..., None].expand(*source.shape, y.shape[-1]))
    cache.copy_(torch.where(hit[..., None], row, cache))


def _gather_native_why_not(x: Tensor, index: Tensor) -> str | None:
    return why_not_native(x, gpu="gather_tokens") or refuse_grad(x)


def _gather_triton_why_not(x: Tensor, index: Tensor) -> str | None:
    return why_not_triton(x) or refuse_grad(x)


def _scatter_native_why_not(x: Tensor, index: Tensor, y: Tensor, gate: Tensor | None) -> str | None:
    return why_not_native(x, y, gate, gpu="scatter_tokens") or refuse_grad(x, y, gate)


def _scatter_triton_why_not(x: Tensor, index: Tensor, y: Tensor, gate: Tensor | None) -> str | None:
    return why_not_triton(x, y, gate) or refuse_grad(x, y, gate)


def _update_native_why_not(cache: Tensor, index: Tensor, y: Tensor) -> str | None:
    return why_not_native(cache, y, gpu="update_tokens") or refuse_grad(cache, y)


def _update_triton_why_not(cache: Tensor, index: Tensor, y: Tensor) -> str | None:
    return why_not_triton(cache, y) or refuse_grad(cache, y)


GATHER_IMPLS = (
    Impl("native", native("gather_tokens"), _gather_native_why_not),
    Impl("triton", triton_row("tokens", "gather_tokens"), _gather_triton_why_not),
    Impl("ref", gather_tokens_ref, always),
)
SCATTER_IMPLS = (
    Impl("native", native("scatter_tokens"), _scatter_native_why_not),
    Impl("triton", triton_row("tokens", "scatter_tokens"), _scatter_triton_why_not),
    Impl("ref", scatter_tokens_ref, always),
)
UPDATE_IMPLS = (
    Impl("native", native("update_tokens_"), _update_native_why_not),
    Impl("triton", triton_row("tokens", "update_tokens_"), _update_triton_why_not),
    Impl("ref", update_tokens_ref, always),
)


def _check_tokens(op: str, x: Tensor, index: Tensor) -> None:
    check_tensor(op, "x", x, dim=3)
    check_index(op, "index", index, x)
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: index has shape {list(index.shape)}, need [{x.shape[0]}, any number]"
        )


def gather_args(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Check the public arguments of gather_tokens and give those of a row."""
    _check_tokens("gather_tokens", x, index)
    return x, index


def scatter_args(
    x: Tensor, index: Tensor, y: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check the public arguments of scatter_tokens and give those of a row."""
    op = "scatter_tokens"
    _check_tokens(op, x, index)
    B, N, D = x.shape
    check_like(op, "y", y, x)
    check_shape(op, "y", y, (B, index.shape[1], D))
    if gate is not None:
        check_like(op, "gate", gate, x)
        check_shape(op, "gate", gate, (B, D), (B, index.shape[1], D))
    return x, index, y, gate


def update_args(cache: Tensor, index: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the public arguments of update_tokens_ and give those of a row."""
    op = "update_tokens_"
    check_tensor(op, "cache", cache)
    if cache.dim() not in (3, 4):
        raise ValueError(f"{op}: cache has shape {list(cache.shape)}, need 3 or 4 dimensions")
    if cache.shape[-1] > 1 and cache.stride(-1) != 1:
        raise ValueError(
            f"{op}: cache has strides {list(cache.stride())}, need a last dimension that is "
            "contiguous"
        )
    check_index(op, "index", index, cache)
    if index.dim() != 2 or index.shape[0] != cache.shape[0]:
        raise ValueError(
            f"{op}: index has shape {list(index.shape)}, need [{cache.shape[0]}, any number]"
        )
    check_like(op, "y", y, cache)
    check_shape(op, "y", y, (*cache.shape[:-2], index.shape[1], cache.shape[-1]))
    return cache, index, y


TABLES = {
    "gather_tokens": (GATHER_IMPLS, gather_args),
    "scatter_tokens": (SCATTER_IMPLS, scatter_args),
    "update_tokens_": (UPDATE_IMPLS, update_args),
}


def gather_tokens(x: Tensor, index: Tensor, *, impl: str | None = None) -> Tensor:
    """Rows ``index`` of ``x``: ``out[b, a] = x[b, index[b, a]]``.

    Args:
        x: ``[B, N, D]``; float16, bfloat16 or float32 (float64 on the reference row); last
            dimension contiguous, else it is copied.
        index: ``[B, A]`` int64, 0 to N - 1, on the device of ``x``; a token may be named any number
            of times. One index for all samples: ``index.expand(B, A)``.
        impl: row of ``GATHER_IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[B, A, D]``, dtype, device and bits of ``x``, contiguous; never a view of it.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or, on the CPU, an index is
            outside of 0 to N - 1; the message names it. On a GPU nothing waits for that: the CUDA
            and Triton rows give zeros for such an index.
        NoImpl: the forced row refuses; the message says why.
    """
    args = gather_args(x, index)
    return pick("gather_tokens", GATHER_IMPLS, impl, *args)(*args)


def scatter_tokens(
    x: Tensor, index: Tensor, y: Tensor, gate: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """``x`` with rows ``index`` replaced by ``y``, or with ``gate * y`` added to them.

    Args:
        x: ``[B, N, D]``; float16, bfloat16 or float32 (float64 on the reference row); last
            dimension contiguous, else it is copied.
        index: ``[B, A]`` int64, 0 to N - 1, on the device of ``x``. Where a sample names a token
            several times, the last counts, and of the others neither ``y`` nor ``gate`` is used.
        y: ``[B, A, D]``, dtype and device of ``x``.
        gate: ``[B, D]`` or ``[B, A, D]``, dtype and device of ``x``; None replaces the rows.
        impl: row of ``SCATTER_IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[B, N, D]``, dtype and device of ``x``, contiguous; never a view of an input, and ``x``
        is left as it is. Rows that are not added to have the bits of ``x`` or ``y``.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or, on the CPU, an index is
            outside of 0 to N - 1; the message names it. On a GPU nothing waits for that: the CUDA
            and Triton rows skip such an index.
        NoImpl: the forced row refuses; the message says why.
    """
    args = scatter_args(x, index, y, gate)
    return pick("scatter_tokens", SCATTER_IMPLS, impl, *args)(*args)


def update_tokens_(cache: Tensor, index: Tensor, y: Tensor, *, impl: str | None = None) -> Tensor:
    """Write rows into ``cache`` in place: ``cache[b, ..., index[b, a], :] = y[b, ..., a, :]``.

    Args:
        cache: ``[B, N, D]``, or ``[B, H, N, D]`` (keys or values of heads); float16, bfloat16 or
            float32 (any on the reference row); any strides but that of the last dimension, 1.
        index: ``[B, A]`` int64, 0 to N - 1, on the device of ``cache``. Where a sample names a
            token several times, the last counts.
        y: ``[B, A, D]`` or ``[B, H, A, D]``, dtype and device of ``cache``; shares no memory with
            it; last dimension contiguous, else it is copied.
        impl: row of ``UPDATE_IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``cache``.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or, on the CPU, an index is
            outside of 0 to N - 1; nothing is written then. On a GPU nothing waits for that: the
            CUDA and Triton rows skip such an index.
        NoImpl: the forced row refuses; the message says why.
    """
    args = update_args(cache, index, y)
    pick("update_tokens_", UPDATE_IMPLS, impl, *args)(*args)
    return cache


if hasattr(torch.ops.fastdiff, "gather_tokens"):

    @torch.library.register_fake("fastdiff::gather_tokens")
    def _(x: Tensor, index: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], index.shape[1], x.shape[2])

    @torch.library.register_fake("fastdiff::scatter_tokens")
    def _(x: Tensor, index: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.register_fake("fastdiff::update_tokens_")
    def _(cache: Tensor, index: Tensor, y: Tensor) -> None:
        return None
