r"""Linear layers of experts over ragged groups of rows, in int8: ``grouped_linear`` with the
products of ``quant_linear``.

    u[r, n] = s[i_r] sum_g w[e, n, g] (sum_{k in g} q[i_r, k] v[e, n, k]) + bias[e, n]
    y[r] = act(u[r]),   offsets_e <= r < offsets_(e + 1),   act and i as in ``grouped_linear``

The inner sums are integers, exact on every processor; what is after them is as in ``quant_linear``,
to the bit. Tokens are quantised once each, however many experts they go to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff._native import DTYPES, native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_like, check_range, check_shape, check_tensor
from fastdiff.ops.grouped_linear import (
    ACTIVATIONS,
    GATED,
    _check_ascending,
    _check_offsets,
    _check_rows,
    _groups,
    activate,
)
from fastdiff.ops.quant_linear import MOST_COLUMNS, quant_linear_ref
from fastdiff.ops.quantize import IMPLS as TOKENS
from fastdiff.ops.quantize import (
    Quantized,
    QuantWeight,
    check_weight,
    dequantize_weight,
    quantize_weight,
    unpacked,
)
from fastdiff.ops.quantize import row_args as token_args

Args = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, str | None, torch.dtype
]


class ExpertWeight(NamedTuple):
    """Weights ``[E, N, K]`` of experts.

    Attributes:
        values: int8 ``[E, N, K]``; of 4 bits uint8 ``[E, N, K / 2]``, as in :class:`QuantWeight`.
        scale: float32 ``[E, N, G]``: of G groups of K / G columns.
        bits: 8 or 4.
    """

    values: Tensor
    scale: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(E, N, K)``."""
        experts, rows, bytes_ = self.values.shape
        return experts, rows, bytes_ * (8 // self.bits)

    @property
    def stacked(self) -> QuantWeight:
        """``[E N, K]``: all experts' rows, one after another."""
        return QuantWeight(self.values.flatten(0, 1), self.scale.flatten(0, 1), self.bits)


def quantize_experts(
    weight: Tensor, *, bits: int = 8, group: int | None = None, smooth: Tensor | None = None
) -> ExpertWeight:
    """Each expert's weight as ``quantize_weight`` makes it.

    Args:
        weight: ``[E, N, K]`` floats, finite.
        bits, group, smooth: of ``quantize_weight``, for all experts.

    Raises:
        ValueError: an argument does not fit, or a value is not finite.
    """
    check_tensor("quantize_experts", "weight", weight, dim=3)
    made = quantize_weight(weight.flatten(0, 1), bits=bits, group=group, smooth=smooth)
    lead = weight.shape[:2]
    return ExpertWeight(made.values.unflatten(0, lead), made.scale.unflatten(0, lead), bits)


def dequantize_experts(weight: ExpertWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[E, N, K]`` in ``dtype``: what the integers stand for."""
    return dequantize_weight(weight.stacked, dtype).unflatten(0, weight.shape[:2])


def grouped_quant_linear_ref(
    q: Tensor,
    s: Tensor,
    values: Tensor,
    scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """The specification: integer sums in float64, which holds them exactly; one rounding at the
    end. Every expert computes every row, so that no size depends on values; rows past the last
    group are 0."""
    if index is not None:
        check_range("grouped_quant_linear", "index", index, 0, q.shape[0])
        q, s = q[index], s[index]
    _check_ascending("grouped_quant_linear", offsets, q.shape[0])
    group = _groups(offsets, q.shape[0])
    out = s.new_zeros(q.shape[0], values.shape[1], dtype=torch.float64)
    for e in range(values.shape[0]):
        own = None if bias is None else bias[e]
        found = quant_linear_ref(q, s, values[e], scale[e], own, None, torch.float64)
        out = torch.where((group == e)[:, None], found, out)
    live = (group < values.shape[0])[:, None]
    return torch.where(live, activate(out, activation), 0.0).to(dtype)


def _native_why_not(
    q: Tensor,
    s: Tensor,
    values: Tensor,
    scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> str | None:
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    why = why_not_native(s, scale, bias, gpu="grouped_quant_linear")
    return why or refuse_grad(s, scale, bias)


def _triton_why_not(
    q: Tensor,
    s: Tensor,
    values: Tensor,
    scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> str | None:
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    return why_not_triton(s, scale, bias) or refuse_grad(s, scale, bias)


IMPLS = (
    Impl("native", native("grouped_quant_linear"), _native_why_not),
    Impl("triton", triton_row("grouped_quant_linear"), _triton_why_not),
    Impl("ref", grouped_quant_linear_ref, always),
)


def check_experts(op: str, weight: ExpertWeight, device: torch.device) -> None:
    """A weight of :func:`quantize_experts`, or one that was loaded, is whole.

    Raises:
        ValueError: it is not; the message says what is wrong.
    """
    if not isinstance(weight, ExpertWeight):
        raise ValueError(
            f"{op}: weight is {type(weight).__name__}, need an ExpertWeight of quantize_experts"
        )
    for name, t in (("values", weight.values), ("scale", weight.scale)):
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.dim() != 3:
            found = type(t).__name__
            if isinstance(t, Tensor):
                found = f"{t.dtype} {list(t.shape)} with layout {t.layout}"
            raise ValueError(f"{op}: weight.{name} is {found}, need a strided tensor [E, N, .]")
        if not t.is_contiguous():
            raise ValueError(f"{op}: weight.{name} has strides {t.stride()}, need contiguous")
    values, scale = weight.values, weight.scale
    if values.shape[:2] != scale.shape[:2] or not values.shape[0]:
        raise ValueError(
            f"{op}: weight.values is {list(values.shape)} and weight.scale {list(scale.shape)}, "
            "need [E, N, .] of the same experts, at least one"
        )
    if values.is_floating_point():
        raise ValueError(f"{op}: weight.values is {values.dtype}, need torch.int8")
    check_weight(op, weight.stacked, device)


def row_args(
    x: Tensor | Quantized,
    weight: ExpertWeight,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    activation: str | None = None,
    smooth: Tensor | None = None,
) -> Args:
    """Check the public arguments and give those of a row; floats are quantised here."""
    op = "grouped_quant_linear"
    if isinstance(x, Tensor):
        tokens = token_args(x, smooth=smooth, op=op)
        integers, scales = pick("quantize", TOKENS, None, *tokens)(*tokens)
        x = Quantized(integers, scales, x.dtype)
    elif not isinstance(x, Quantized):
        raise ValueError(f"{op}: x is {type(x).__name__}, need a tensor, or Quantized of quantize")
    elif smooth is not None:
        raise ValueError(f"{op}: smooth is given with tokens that are quantised already")
    q, s, dtype = x
    if q.dtype != torch.int8 or s.dtype != torch.float32 or q.dim() != 2:
        raise ValueError(
            f"{op}: x is {q.dtype} {list(q.shape)} with scale {s.dtype}, need torch.int8 [rows, K] "
            "with scale torch.float32"
        )
    check_shape(op, "x.scale", s, q.shape[:1])
    if s.device != q.device:
        raise ValueError(f"{op}: x.scale is on {s.device}, need {q.device}, the device of x.values")
    check_experts(op, weight, q.device)
    experts, rows, columns = weight.shape
    if q.shape[1] != columns:
        raise ValueError(
            f"{op}: weight is {[experts, rows, columns]}, need [E, N, {q.shape[1]}], as wide as x"
        )
    if columns > MOST_COLUMNS * weight.scale.shape[2]:
        raise ValueError(
            f"{op}: weight has {columns} columns in {weight.scale.shape[2]} groups, need groups of "
            f"at most {MOST_COLUMNS}, or int32 sums overflow"
        )
    _check_offsets(op, offsets, q, experts)
    _check_rows(op, index, q)
    if bias is not None:
        check_like(op, "bias", bias, torch.empty(0, dtype=dtype, device=q.device))
        check_shape(op, "bias", bias, (experts, rows))
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(a) for a in ACTIVATIONS)
        raise ValueError(f"{op}: activation is {activation!r}, need one of {names}")
    if activation in GATED and rows % 2:
        raise ValueError(
            f"{op}: weight is {[experts, rows, columns]}, need an even number of rows for "
            f"{activation}"
        )
    values = unpacked(weight.stacked).view(experts, rows, columns)
    given = (q.contiguous(), s.contiguous(), values, weight.scale, offsets, bias, index)
    return *given, activation, dtype


TABLES = {"grouped_quant_linear": (IMPLS, row_args)}


def grouped_quant_linear(
    x: Tensor | Quantized,
    weight: ExpertWeight,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    activation: str | None = None,
    smooth: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Each group of rows through its expert's linear layer in int8, and an activation.

    Args:
        x: ``[R, K]`` floats, rows group after group, or ``[T, K]`` in any order with ``index``:
            they are quantised here; or :class:`Quantized` tokens.
        weight: of :func:`quantize_experts`; those of 4 bits are widened to int8 here.
        offsets: int64 ``[E + 1]``, ascending from 0 to at most R; a group may be empty.
        bias: ``[E, N]``, dtype and device of ``x``; None for 0.
        index: int64 ``[R]``: row r is ``x[index[r]]``. Repeats are allowed.
        activation: as in ``grouped_linear``; gated ones halve N.
        smooth: ``[K]``, as the weight was made with; of floats alone.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[R, N]`` or ``[R, N / 2]``, dtype and device of ``x``. Rows past the last group have no
        defined value. A token with a NaN or an infinity gives rows of NaN.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or, on the CPU, an index is
            outside of x, or offsets are not ascending from 0 to at most R. On a GPU nothing waits
            for that: such rows have no defined value.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(
        x, weight, offsets, bias=bias, index=index, activation=activation, smooth=smooth
    )
    out: Tensor = pick("grouped_quant_linear", IMPLS, impl, *args)(*args)
    return out


if hasattr(torch.ops.fastdiff, "grouped_quant_linear"):

    @torch.library.register_fake("fastdiff::grouped_quant_linear")
    def _(
        q: Tensor,
        s: Tensor,
        values: Tensor,
        scale: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        activation: str | None,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = q.shape[0] if index is None else index.shape[0]
        out = values.shape[1] // 2 if activation in GATED else values.shape[1]
        return q.new_empty((rows, out), dtype=dtype)
