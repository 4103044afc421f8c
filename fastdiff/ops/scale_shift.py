r"""A scale and a shift of every channel: what DiffFit's gamma does to a branch (Xie et al. 2023,
arXiv:2304.06648, section 3.2) and Diffscaler's affiner to a layer (Nair et al. 2024,
arXiv:2404.09976).

    y[b, ..., c] = x[b, ..., c] scale[a, c] + shift[a, c],      a = index[b]

Gradients, with g that of y; the sums go over all positions of the samples with row a:

    dx = g scale[a],    dscale[a, c] = sum g x,    dshift[a, c] = sum g

With one row for each task a batch may mix tasks, each sample with its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, needs_grad, pick
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import (
    check_index,
    check_like,
    check_range,
    check_shape,
    check_tensor,
    wide,
)


def _last(x: Tensor, dim: int) -> bool:
    """Channels are the last dimension."""
    return dim == -1 or x.dim() == 2


def _channels_last(x: Tensor, dim: int) -> bool:
    """Channels are dimension 1, and innermost in a dense memory."""
    return not _last(x, dim) and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _laid(y: Tensor, x: Tensor, dim: int) -> Tensor:
    """``y`` in the order of memory that results for ``x`` have."""
    if _channels_last(x, dim):
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y.contiguous()


def _spread(t: Tensor, x: Tensor, dim: int, index: Tensor | None) -> Tensor:
    """Rows of channels, widened and ready to broadcast over ``x``."""
    t = wide(t)
    t = t[None] if index is None else t[index]
    rows, channels = t.shape
    ones = [1] * (x.dim() - 2)
    return t.reshape((rows, *ones, channels) if _last(x, dim) else (rows, channels, *ones))


def scale_shift_ref(
    x: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor | None, dim: int
) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    if index is not None:
        check_range("scale_shift", "index", index, 0, scale.shape[0])
    y = wide(x) * _spread(scale, x, dim, index)
    if shift is not None:
        y = y + _spread(shift, x, dim, index)
    return _laid(y.to(x.dtype), x, dim)


def scale_shift_backward_ref(
    grad: Tensor, x: Tensor, scale: Tensor, index: Tensor | None, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: sums in float32 (float64 for float64 input)."""
    if index is not None:
        check_range("scale_shift_backward", "index", index, 0, scale.shape[0])
    g = wide(grad)
    grad_x = _laid((g * _spread(scale, x, dim, index)).to(x.dtype), x, dim)
    axis = -1 if _last(x, dim) else 1
    sums = []
    for product in (g * wide(x), g):
        rows = product.movedim(axis, -1)
        if index is None:
            sums.append(rows.flatten(0, -2).sum(0, keepdim=True))
            continue
        rows = rows.flatten(1, -2).sum(1) if rows.dim() > 2 else rows
        mine = index == torch.arange(scale.shape[0], device=index.device)[:, None]  # [A, B]
        sums.append(torch.where(mine[:, :, None], rows, 0.0).sum(1))
    return grad_x, sums[0], sums[1]


def _native_why_not(
    x: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor | None, dim: int
) -> str | None:
    return why_not_native(x, scale, shift, gpu="scale_shift")


def _triton_why_not(
    x: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor | None, dim: int
) -> str | None:
    return why_not_triton(x, scale, shift)


def _backward_native_why_not(
    grad: Tensor, x: Tensor, scale: Tensor, index: Tensor | None, dim: int
) -> str | None:
    return why_not_native(grad, x, scale, gpu="scale_shift_backward")


def _backward_triton_why_not(
    grad: Tensor, x: Tensor, scale: Tensor, index: Tensor | None, dim: int
) -> str | None:
    return why_not_triton(grad, x, scale)


IMPLS = (
    Impl("native", native("scale_shift"), _native_why_not),
    Impl("triton", triton_row("scale_shift"), _triton_why_not),
    Impl("ref", scale_shift_ref, always),
)
BACKWARD_IMPLS = (
    Impl("native", native("scale_shift_backward"), _backward_native_why_not),
    Impl("triton", triton_row("scale_shift", "scale_shift_backward"), _backward_triton_why_not),
    Impl("ref", scale_shift_backward_ref, always),
)


def _check_channels(
    op: str, x: Tensor, scale: Tensor, shift: Tensor | None, dim: int, index: Tensor | None
) -> None:
    check_tensor(op, "x", x, min_dim=2)
    if isinstance(dim, bool) or dim not in (-1, 1):
        raise ValueError(f"{op}: dim is {dim!r}, need -1 or 1")
    channels = x.shape[-1 if dim == -1 else 1]
    check_tensor(op, "scale", scale)
    if scale.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: scale is {scale.dtype}, need {x.dtype} or torch.float32")
    if scale.device != x.device:
        raise ValueError(f"{op}: scale is on {scale.device}, need {x.device}, the device of x")
    if index is None:
        check_shape(op, "scale", scale, (channels,))
    else:
        check_index(op, "index", index, x)
        check_shape(op, "index", index, x.shape[:1])
        if scale.dim() != 2 or scale.shape[1] != channels:
            raise ValueError(
                f"{op}: scale has shape {list(scale.shape)}, need [any number, {channels}] with an "
                "index"
            )
    if shift is not None:
        check_like(op, "shift", shift, scale, "scale")
        check_shape(op, "shift", shift, scale.shape)


def row_args(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    dim: int = -1,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """Check the public arguments of scale_shift and give those of a row."""
    _check_channels("scale_shift", x, scale, shift, dim, index)
    return x, scale, shift, index, dim


def backward_args(
    grad: Tensor, x: Tensor, scale: Tensor, *, dim: int = -1, index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """Check the public arguments of scale_shift_backward and give those of a row."""
    op = "scale_shift_backward"
    _check_channels(op, x, scale, None, dim, index)
    check_like(op, "grad", grad, x)
    check_shape(op, "grad", grad, x.shape)
    return grad, x, scale, index, dim


TABLES = {
    "scale_shift": (IMPLS, row_args),
    "scale_shift_backward": (BACKWARD_IMPLS, backward_args),
}


class _ScaleShift(torch.autograd.Function):
    """Keeps inputs alone."""

    @staticmethod
    def forward(ctx: Any, row: Callable[..., Tensor], impl: str | None, *args: Any) -> Tensor:
        x, scale, shift, index, dim = args
        ctx.save_for_backward(x, scale, index)
        ctx.dim, ctx.impl, ctx.shifts = dim, impl, shift is not None
        return row(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "scale_shift: only the row ref has a second derivative; force it for that"
            )
        x, scale, index = ctx.saved_tensors
        _, _, wants_x, wants_scale, wants_shift, *_ = ctx.needs_input_grad
        if not wants_scale and not wants_shift:
            of_x = (grad, scale, None, index, ctx.dim)
            grad_x = pick("scale_shift", IMPLS, ctx.impl, *of_x)(*of_x)
            return None, None, grad_x, None, None, None, None
        args = (grad, x, scale, index, ctx.dim)
        grad_x, *sums = pick("scale_shift_backward", BACKWARD_IMPLS, ctx.impl, *args)(*args)
        grad_scale, grad_shift = (s.view(scale.shape).to(scale.dtype) for s in sums)
        return (
            None,
            None,
            grad_x if wants_x else None,
            grad_scale if wants_scale else None,
            grad_shift if wants_shift else None,
            None,
            None,
        )


def scale_shift(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    dim: int = -1,
    index: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``x * scale + shift``, a scale and a shift of every channel.

    Args:
        x: ``[B, ..., C]``, or ``[B, C, ...]`` with ``dim`` 1; float16, bfloat16 or float32 (float64
            on the reference row). With ``dim`` 1 contiguous or channels last; other layouts are
            copied.
        scale: ``[C]``, or ``[A, C]`` with ``index``; of the dtype of ``x`` or float32, on its
            device.
        shift: like ``scale``; None for 0.
        dim: of the channels: -1 or 1.
        index: int64 ``[B]``, 0 to A - 1: the row of ``scale`` and ``shift`` of every sample.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        Shape, dtype and device of ``x``; channels last where ``x`` is and ``dim`` is 1, else
        contiguous; never a view of it. With a scale of 1 and no shift, or one of 0, it equals
        ``x`` (-0 + 0 is 0; the level avx512_bf16 of the native row rounds subnormal bfloat16 to
        0). Gradients are those of :func:`scale_shift_backward`, to all three.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or, on the CPU, an index is
            outside of 0 to A - 1; the message names it. On a GPU nothing waits for that: the CUDA
            and Triton rows give NaN for such a sample.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, scale, shift, dim=dim, index=index)
    row = pick("scale_shift", IMPLS, impl, *args)
    if row is scale_shift_ref or not needs_grad(x, scale, shift):
        return row(*args)
    out: Tensor = _ScaleShift.apply(row, impl, *args)  # type: ignore[no-untyped-call]
    return out


def scale_shift_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    *,
    dim: int = -1,
    index: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`scale_shift` from that of its result.

    Args:
        grad: like ``x``.
        x, scale, dim, index: as in :func:`scale_shift`.
        impl: row of ``BACKWARD_IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``grad_x``, like the result of :func:`scale_shift`; ``grad_scale`` and ``grad_shift``,
        float32 (float64 for float64) ``[A, C]``, or ``[1, C]`` without ``index``: summed in
        float32 in an order that depends on shapes alone, so the same in every run. A row that no
        sample has gets 0.

    Raises:
        ValueError: as :func:`scale_shift` does. On a GPU a sample with an index out of range adds
            to no row, and its ``grad_x`` is NaN.
        NoImpl: the forced row refuses; the message says why.
    """
    args = backward_args(grad, x, scale, dim=dim, index=index)
    return pick("scale_shift_backward", BACKWARD_IMPLS, impl, *args)(*args)


def _empty_like(x: Tensor, dim: int) -> Tensor:
    if _channels_last(x, dim):
        return torch.empty_like(x.movedim(1, -1)).movedim(-1, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


if hasattr(torch.ops.fastdiff, "scale_shift"):

    @torch.library.register_fake("fastdiff::scale_shift")
    def _(x: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor | None, dim: int) -> Tensor:
        return _empty_like(x, dim)

    @torch.library.register_fake("fastdiff::scale_shift_backward")
    def _(
        grad: Tensor, x: Tensor, scale: Tensor, index: Tensor | None, dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = 1 if index is None else scale.shape[0]
        shape = rows, x.shape[-1 if dim == -1 else 1]
        sums = [x.new_empty(shape, dtype=torch.float32) for _ in range(2)]
        return _empty_like(x, dim), sums[0], sums[1]
