r"""The norms of a DiT block (Peebles & Xie 2023, arXiv:2212.09748, adaLN-Zero; LayerNorm: Ba et al.
2016, arXiv:1607.06450; RMS: Zhang & Sennrich 2019, arXiv:1910.07467), alone and as one chain.

    r = x + gate y                                            gate_residual
    h = (r - mean_d r) / sqrt(var_d r + eps)                  or r / sqrt(mean_d r^2 + eps)  (rms)
    m = (h weight + bias) (1 + scale) + shift                 layer_norm_modulate, with x for r

``gate_residual_norm_modulate`` gives (r, m), with m from r before r is rounded to its dtype.
``gate_residual_norm_quantize`` gives r and m as the int8 tokens of :func:`quantize`, for layers of
:func:`quant_linear`: m is neither rounded to a dtype nor written.

Gradients: the native rows have a backward for modulations per sample; those per token, and second
derivatives, take the reference's. Forward and backward of the chain took 0.2 to 0.7 of the
reference's time on one thread of an AMD EPYC (Zen 5), 2 x 1024 x 1152 and 4 x 256 x 384, float32 or
bfloat16 (``bench/run.py layer_norm_modulate``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, _has_tangent, always, needs_grad, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import (
    check_finite,
    check_last,
    check_like,
    check_shape,
    check_tensor,
    wide,
)
from fastdiff.ops._layer_norm_modulate_grad import no_backward, register
from fastdiff.ops.quantize import Quantized, check_smooth, quantize_ref

MAX_TRITON_DIM = 16384  # float32 of one row in the registers of one program


def _tokens(m: Tensor) -> Tensor:
    """A modulation ``[B, D]`` or ``[B, N, D]``, widened and ready to broadcast over tokens."""
    return wide(m).unsqueeze(1) if m.dim() == 2 else wide(m)


def _norm_modulate(
    r: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> Tensor:
    w = None if weight is None else wide(weight)
    b = None if bias is None else wide(bias)
    if rms:
        m = F.rms_norm(r, r.shape[-1:], w, eps)
        m = m if b is None else m + b
    else:
        m = F.layer_norm(r, r.shape[-1:], w, b, eps)
    if scale is not None:
        m = m * (1 + _tokens(scale))
    return m if shift is None else m + _tokens(shift)


def layer_norm_modulate_ref(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    return _norm_modulate(wide(x), shift, scale, weight, bias, eps, rms).to(x.dtype)


def gate_residual_ref(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    return (wide(x) + _tokens(gate) * wide(y)).to(x.dtype)


def gate_residual_norm_modulate_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """The specification: float32 inside (float64 for float64 input), one rounding per output."""
    r = wide(x) + _tokens(gate) * wide(y)
    m = _norm_modulate(r, shift, scale, weight, bias, eps, rms)
    return r.to(x.dtype), m.to(x.dtype)


def gate_residual_norm_quantize_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    smooth: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: float32 inside (float64 for float64 input), as that of ``quantize``."""
    r = wide(x) + _tokens(gate) * wide(y)
    m = _norm_modulate(r, shift, scale, weight, bias, eps, rms)
    return r.to(x.dtype), *quantize_ref(m, smooth, None)


def _quantize_why_not(*args: Any) -> str | None:
    tensors = [t for t in args if isinstance(t, Tensor)]
    return why_not_native(*tensors, gpu="layer_norm_modulate") or refuse_grad(*tensors)


def _quantize_ref_why_not(*args: Any) -> str | None:
    tensors = tuple(t for t in args if isinstance(t, Tensor))
    if _has_tangent(tensors):
        return "an input has a tangent, and rounding has no derivative"
    return refuse_grad(*tensors)


def _triton_why_not(x: Tensor, *args: Any) -> str | None:
    tensors = [x, *(t for t in args if isinstance(t, Tensor))]
    if x.shape[-1] > MAX_TRITON_DIM:
        return f"D is {x.shape[-1]}; the kernel holds a row in registers, at most {MAX_TRITON_DIM}"
    return why_not_triton(*tensors) or refuse_grad(*tensors)


def _rows(op: str, ref: Callable[..., Any]) -> tuple[Impl, ...]:
    def native_why_not(*args: Any) -> str | None:
        tensors = [t for t in args if isinstance(t, Tensor)]
        reason = why_not_native(*tensors, gpu="layer_norm_modulate")
        return reason or (no_backward(op, args) if needs_grad(*tensors) else None)

    return (
        Impl("native", native(op), native_why_not),
        Impl("triton", triton_row("layer_norm_modulate", op), _triton_why_not),
        Impl("ref", ref, always),
    )


LAYER_NORM_MODULATE = _rows("layer_norm_modulate", layer_norm_modulate_ref)
GATE_RESIDUAL = _rows("gate_residual", gate_residual_ref)
GATE_RESIDUAL_NORM_MODULATE = _rows("gate_residual_norm_modulate", gate_residual_norm_modulate_ref)


GATE_RESIDUAL_NORM_QUANTIZE = (
    Impl("native", native("gate_residual_norm_quantize"), _quantize_why_not),
    Impl(
        "triton",
        triton_row("layer_norm_modulate", "gate_residual_norm_quantize"),
        _triton_why_not,
    ),
    Impl("ref", gate_residual_norm_quantize_ref, _quantize_ref_why_not),
)


def _check_modulation(op: str, x: Tensor, **modulations: Tensor | None) -> None:
    B, N, D = x.shape
    for name, m in modulations.items():
        if m is not None:
            check_like(op, name, m, x)
            check_shape(op, name, m, (B, D), (B, N, D))


def _check_norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None:
            check_like(op, name, w, x)
            check_last(op, name, w, x)
    check_finite(op, "eps", eps, positive=True)


def _norm_row_args(x, shift=None, scale=None, *, weight=None, bias=None, eps=1e-6, rms=False):
    """Check the public arguments and give those of a row."""
    op = "layer_norm_modulate"
    check_tensor(op, "x", x, dim=3)
    _check_modulation(op, x, shift=shift, scale=scale)
    _check_norm(op, x, weight, bias, eps)
    return x, shift, scale, weight, bias, float(eps), bool(rms)


def _check_residual(op: str, x: Tensor, y: Tensor, gate: Tensor) -> None:
    check_tensor(op, "x", x, dim=3)
    check_like(op, "y", y, x)
    check_shape(op, "y", y, x.shape)
    check_like(op, "gate", gate, x)
    _check_modulation(op, x, gate=gate)


def _gate_row_args(x, y, gate):
    """Check the public arguments and give those of a row."""
    _check_residual("gate_residual", x, y, gate)
    return x, y, gate


def _chain_row_args(
    x, y, gate, shift=None, scale=None, *, weight=None, bias=None, eps=1e-6, rms=False
):
    """Check the public arguments and give those of a row."""
    op = "gate_residual_norm_modulate"
    _check_residual(op, x, y, gate)
    _check_modulation(op, x, shift=shift, scale=scale)
    _check_norm(op, x, weight, bias, eps)
    return x, y, gate, shift, scale, weight, bias, float(eps), bool(rms)


def _quantize_row_args(
    x, y, gate, shift=None, scale=None, *, weight=None, bias=None, smooth=None, eps=1e-6, rms=False
):
    """Check the public arguments and give those of a row."""
    op = "gate_residual_norm_quantize"
    _check_residual(op, x, y, gate)
    _check_modulation(op, x, shift=shift, scale=scale)
    _check_norm(op, x, weight, bias, eps)
    if smooth is not None:
        check_smooth(op, smooth, x, "x")
        smooth = smooth.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x, y, gate, shift, scale, weight, bias, smooth, float(eps), bool(rms)


TABLES = {
    "layer_norm_modulate": (LAYER_NORM_MODULATE, _norm_row_args),
    "gate_residual": (GATE_RESIDUAL, _gate_row_args),
    "gate_residual_norm_modulate": (GATE_RESIDUAL_NORM_MODULATE, _chain_row_args),
    "gate_residual_norm_quantize": (GATE_RESIDUAL_NORM_QUANTIZE, _quantize_row_args),
}


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Normalise the last dimension of ``x``, then modulate: ``norm(x) * (1 + scale) + shift``.

    Args:
        x: ``[B, N, D]``; float16, bfloat16 or float32 (float64 on the reference row).
        shift, scale: ``[B, D]`` (one per sample) or ``[B, N, D]`` (one per token), dtype and device
            of ``x``; None for 0. Chunks of one wider projection are taken without a copy.
        weight, bias: ``[D]``, the norm's own affine map; None for 1 and 0.
        eps: added to the variance (mean square with ``rms``), so in units of ``x**2``; above 0.
        rms: divide by the root mean square and subtract no mean.
        impl: row of the table to force; None takes the first that accepts.

    Returns:
        ``[B, N, D]``, dtype and device of ``x``, contiguous; never a view of it.

    Raises:
        ValueError: a shape, dtype or device differs from the above; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = _norm_row_args(x, shift, scale, weight=weight, bias=bias, eps=eps, rms=rms)
    return pick("layer_norm_modulate", LAYER_NORM_MODULATE, impl, *args)(*args)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, impl: str | None = None) -> Tensor:
    """``x + gate * y``: the end of a DiT block's branch.

    Args:
        x, y: ``[B, N, D]``; float16, bfloat16 or float32 (float64 on the reference row).
        gate: ``[B, D]`` (one per sample) or ``[B, N, D]`` (one per token), dtype and device of
            ``x``.
        impl: row of the table to force; None takes the first that accepts.

    Returns:
        ``[B, N, D]``, dtype and device of ``x``, contiguous; never a view of an input.

    Raises:
        ValueError: a shape, dtype or device differs from the above; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = _gate_row_args(x, y, gate)
    return pick("gate_residual", GATE_RESIDUAL, impl, *args)(*args)


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """End of one branch and start of the next: ``r = x + gate * y`` and ``layer_norm_modulate(r)``.

    Args:
        x, y: ``[B, N, D]``; float16, bfloat16 or float32 (float64 on the reference row).
        gate, shift, scale: ``[B, D]`` or ``[B, N, D]``, dtype and device of ``x``; shift and scale
            None for 0. Chunks of one wider projection are taken without a copy.
        weight, bias: ``[D]``, the norm's own affine map; None for 1 and 0.
        eps: added to the variance (mean square with ``rms``), so in units of ``x**2``; above 0.
        rms: divide by the root mean square and subtract no mean.
        impl: row of the table to force; None takes the first that accepts.

    Returns:
        (residual, modulated), each ``[B, N, D]``, dtype and device of ``x``, contiguous, no views.
        The norm is that of the residual before its rounding to the dtype of ``x``.

    Raises:
        ValueError: a shape, dtype or device differs from the above; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = _chain_row_args(x, y, gate, shift, scale, weight=weight, bias=bias, eps=eps, rms=rms)
    return pick("gate_residual_norm_modulate", GATE_RESIDUAL_NORM_MODULATE, impl, *args)(*args)


def gate_residual_norm_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    smooth: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Quantized]:
    """``gate_residual_norm_modulate`` whose second output is int8: a token's largest magnitude is
    127.

    Args:
        x, y, gate, shift, scale, weight, bias, eps, rms: of :func:`gate_residual_norm_modulate`.
        smooth: ``[D]``, what channels are divided by before; None for 1.
        impl: row of the table to force; None takes the first that accepts.

    Returns:
        The residual ``[B, N, D]``, and tokens for :func:`quant_linear`: values int8 ``[B, N, D]``,
        scales float32 ``[B, N]``, with zeros and NaN as :func:`quantize` has them.

    Raises:
        ValueError: a shape, dtype or device differs from the above; the message names it.
        NoImpl: the forced row refuses, or a gradient is asked for; the message says why.
    """
    args = _quantize_row_args(
        x, y, gate, shift, scale, weight=weight, bias=bias, smooth=smooth, eps=eps, rms=rms
    )
    r, q, s = pick("gate_residual_norm_quantize", GATE_RESIDUAL_NORM_QUANTIZE, impl, *args)(*args)
    return r, Quantized(q, s, x.dtype)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


if hasattr(torch.ops.fastdiff, "layer_norm_modulate"):

    @torch.library.register_fake("fastdiff::layer_norm_modulate")
    def _(x, shift, scale, weight, bias, eps, rms):
        return _contiguous_like(x)

    @torch.library.register_fake("fastdiff::gate_residual")
    def _(x, y, gate):
        return _contiguous_like(x)

    @torch.library.register_fake("fastdiff::gate_residual_norm_modulate")
    def _(x, y, gate, shift, scale, weight, bias, eps, rms):
        return _contiguous_like(x), _contiguous_like(x)

    register()


if hasattr(torch.ops.fastdiff, "gate_residual_norm_quantize"):

    @torch.library.register_fake("fastdiff::gate_residual_norm_quantize")
    def _(x, y, gate, shift, scale, weight, bias, smooth, eps, rms):
        s = x.new_empty(x.shape[:2], dtype=torch.float32)
        return _contiguous_like(x), _contiguous_like(x).to(torch.int8), s
