r"""Activations as int8 (or float8_e4m3fn) with one scale a token, and weights as int8, 4 bits (or
float8_e4m3fn) with one scale an output channel or group.

    y = act(x) / smooth                         smooth [K]: outlier channels move to the weight
                                                act: None, GELU (tanh form), SiLU, or GEGLU, that
                                                of [h, g] = x [2K]: h * gelu(g)
    s = max_k |y_k| / 127,   q = round(y / s)   symmetric, to the nearest, ties to even; |q| <= 127

1 / s is taken as 1 / max times 127, each rounded to float32.

A token of zeros, or below ``TINY``, has s = 0 and q = 0; one with a NaN or an infinity has s = NaN
and q = 0, so that whatever is made of it is NaN: nothing is hidden in a large number. Rounding has
no gradient: where one is asked for, every row refuses.

SmoothQuant (Xiao et al. 2023, arXiv:2211.10438, eq. 4) takes
``smooth = max |x_k|^a / max |w_k|^(1 - a)`` and scales the weight's columns by it.

In float8_e4m3fn (4 bits of exponent, 3 of fraction; Micikevicius et al. 2022, arXiv:2209.05433)
448, its largest value, takes the place of 127, and y / s is rounded to its values, ties to even.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from fastdiff._native import in_cuda, native, why_not_native
from fastdiff.dispatch import Impl, _has_tangent, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_shape, check_strided, check_tensor, wide

LEVELS = 127  # of int8 to either side of 0
TINY = 127 * 2.0**-126  # below it 127 / max is no float32
FLOAT8 = torch.float8_e4m3fn
MOST_FLOAT8 = 448  # its largest value
TINY_FLOAT8 = 448 * 2.0**-126
ACTIVATIONS = (None, "gelu_tanh", "silu", "geglu")


class Quantized(NamedTuple):
    """Tokens: ``values`` int8 or float8_e4m3fn ``[..., K]``, ``scale`` float32 ``[...]``; ``dtype``
    is that which they had."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """``[..., K]``."""
        return self.values.shape


class QuantWeight(NamedTuple):
    """A weight ``[N, K]``.

    Attributes:
        values: int8 or float8_e4m3fn ``[N, K]``; of 4 bits uint8 ``[N, K / 2]``, the even column
            in the low half, each plus 8.
        scale: float32 ``[N, G]``: of G groups of K / G columns.
        bits: 8 or 4.
    """

    values: Tensor
    scale: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        return self.values.shape[0], self.values.shape[1] * (8 // self.bits)


# The dtype of a row's result is given where it is not int8.
def quantize_ref(
    x: Tensor, smooth: Tensor | None, activation: str | None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """The specification: float32 inside (float64 for float64 ``x``)."""
    levels, tiny = (LEVELS, TINY) if dtype == torch.int8 else (MOST_FLOAT8, TINY_FLOAT8)
    y = wide(x)
    if activation == "geglu":
        hidden, gate = y.chunk(2, -1)
        y = hidden * F.gelu(gate)
    elif activation is not None:
        y = F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else F.silu(y)
    if smooth is not None:
        y = y / smooth.to(y.dtype)
    most = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.new_zeros(*y.shape[:-1], 1)
    finite = most.float().isfinite()  # as the scale must be
    usable = finite & (most >= tiny)
    v = y * (torch.where(usable, most, 1.0).reciprocal() * levels)
    v = v.round() if dtype == torch.int8 else v
    q = torch.where(usable, v.clamp(-levels, levels), 0.0).to(dtype)
    s = most / torch.full_like(most, levels)  # by a number, GPUs multiply with its inverse
    scale = torch.where(finite, torch.where(usable, s, 0.0), torch.nan)
    return q, scale.squeeze(-1).float()


def why_not_float8(device: torch.device) -> str | None:
    """The sentence why a GPU has no products of float8_e4m3fn, nor Triton its numbers, or None."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 9):
        return None
    return f"float8_e4m3fn needs compute capability 8.9 or above, {device} has {major}.{minor}"


def _native_why_not(
    x: Tensor, smooth: Tensor | None, activation: str | None, dtype: torch.dtype = torch.int8
) -> str | None:
    if dtype != torch.int8 and not in_cuda(x):
        return f"native kernels for the cpu give int8, dtype is {dtype}"
    return why_not_native(x, gpu="quantize") or refuse_grad(x, smooth)


def _triton_why_not(
    x: Tensor, smooth: Tensor | None, activation: str | None, dtype: torch.dtype = torch.int8
) -> str | None:
    reason = why_not_triton(x) or refuse_grad(x, smooth)
    return reason or (None if dtype == torch.int8 else why_not_float8(x.device))


def _ref_why_not(x: Tensor, smooth: Tensor | None, *_: Any) -> str | None:
    if _has_tangent((x, smooth)):
        return "an input has a tangent, and rounding has no derivative"
    return refuse_grad(x, smooth)  # autograd would give that of the scale alone


IMPLS = (
    Impl("native", native("quantize"), _native_why_not),
    Impl("triton", triton_row("quantize"), _triton_why_not),
    Impl("ref", quantize_ref, _ref_why_not),
)


def check_smooth(op: str, smooth: Tensor, like: Tensor, name: str) -> None:
    check_tensor(op, "smooth", smooth)
    check_shape(op, "smooth", smooth, like.shape[-1:])
    if smooth.device != like.device:
        raise ValueError(
            f"{op}: smooth is on {smooth.device}, need {like.device}, the device of {name}"
        )


def _check_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.int8, FLOAT8):
        raise ValueError(f"{op}: dtype is {dtype!r}, need torch.int8 or {FLOAT8}")


def row_args(
    x: Tensor,
    *,
    smooth: Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype = torch.int8,
    op: str = "quantize",  # that errors name
) -> tuple[Any, ...]:
    """Check the public arguments and give those of a row."""
    check_tensor(op, "x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation is {activation!r}, need None, 'gelu_tanh', 'silu' or 'geglu'"
        )
    gated = activation == "geglu"
    if gated and x.shape[-1] % 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, need an even last dimension")
    if smooth is not None:
        check_smooth(op, smooth, x[..., ::2] if gated else x, "x")
        smooth = smooth.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    _check_dtype(op, dtype)
    return (x, smooth, activation) if dtype == torch.int8 else (x, smooth, activation, dtype)


TABLES = {"quantize": (IMPLS, row_args)}


def quantize(
    x: Tensor,
    *,
    smooth: Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype = torch.int8,
    impl: str | None = None,
) -> Quantized:
    """``x`` as int8 (or float8_e4m3fn) with one scale for each token.

    Args:
        x: ``[..., K]``, for "geglu" ``[..., 2K]``; float16, bfloat16 or float32 (float64 on the
            reference row).
        smooth: ``[K]``, what channels are divided by; None for 1.
        activation: None, "gelu_tanh", "silu" or "geglu", applied before.
        dtype: int8 or float8_e4m3fn (not of the row "native" on a CPU).
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        :class:`Quantized`: contiguous, never views of ``x``.

    Raises:
        ValueError: a shape, dtype or device differs from the above; the message names it.
        NoImpl: the forced row refuses, or a gradient is asked for; the message says why.
    """
    args = row_args(x, smooth=smooth, activation=activation, dtype=dtype)
    values, scale = pick("quantize", IMPLS, impl, *args)(*args)
    return Quantized(values, scale, x.dtype)


def _holds(condition: Tensor) -> bool:
    """Looked at where it has a value: not on meta or fake tensors."""
    return condition.is_meta or isinstance(condition, FakeTensor) or bool(condition)


def quantize_weight(
    weight: Tensor,
    *,
    bits: int = 8,
    group: int | None = None,
    smooth: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> QuantWeight:
    """A weight as integers or float8_e4m3fn, once, when it is loaded; plain torch.

    Args:
        weight: ``[N, K]`` floats, finite.
        bits: 8 (127 levels to either side) or 4 (7).
        group: columns that share a scale, a divisor of K (and even, with 4 bits); None: all.
        smooth: ``[K]`` above 0, what columns are multiplied by before.
        dtype: of 8 bits, int8 or float8_e4m3fn.

    Raises:
        ValueError: an argument does not fit, or a value is not finite.
    """
    check_tensor("quantize_weight", "weight", weight, dim=2)
    rows, columns = weight.shape
    if not isinstance(bits, int) or bits not in (8, 4):
        raise ValueError(f"quantize_weight: bits is {bits!r}, need 8 or 4")
    _check_dtype("quantize_weight", dtype)
    if bits == 4 and dtype != torch.int8:
        raise ValueError(f"quantize_weight: dtype is {dtype} with 4 bits, need torch.int8")
    size = columns if group is None else group
    whole = isinstance(size, int) and not isinstance(size, bool)
    if not whole or (columns and (size < 1 or columns % size)):
        raise ValueError(f"quantize_weight: group is {group!r}, need a divisor of K {columns}")
    if bits == 4 and size % 2:
        raise ValueError(f"quantize_weight: group is {size}, need an even number with 4 bits")
    w = wide(weight.detach())
    if smooth is not None:
        check_smooth("quantize_weight", smooth, weight, "weight")
        if not _holds((smooth > 0).all() & smooth.isfinite().all()):
            raise ValueError("quantize_weight: smooth has a value that is not above 0 and finite")
        w = w * smooth.detach().to(w.dtype)
    if not _holds(w.float().isfinite().all()):
        raise ValueError("quantize_weight: weight has a value that is not finite as float32")
    eight = dtype == FLOAT8
    levels = MOST_FLOAT8 if eight else LEVELS if bits == 8 else 7
    grouped = w.view(rows, columns // size if columns else 0, size if columns else 1)
    most = grouped.abs().amax(-1, keepdim=True) if columns else grouped.new_zeros(rows, 0, 1)
    usable = most >= (TINY_FLOAT8 if eight else TINY)
    scale = torch.where(usable, most / levels, 0.0)
    q = grouped / torch.where(usable, scale, 1.0)
    q = (q if eight else q.round()).clamp(-levels, levels)
    q = torch.where(usable, q, 0.0).view(rows, columns).to(dtype)
    if bits == 4:
        pairs = (q + 8).to(torch.uint8).view(rows, columns // 2, 2)
        q = pairs[..., 0] | pairs[..., 1] << 4
    return QuantWeight(q.contiguous(), scale.squeeze(-1).float().contiguous(), bits)


def unpacked(weight: QuantWeight) -> Tensor:
    """The integers of a weight, int8 ``[N, K]``; or its values of float8_e4m3fn."""
    if weight.bits == 8:
        return weight.values
    low, high = weight.values & 15, weight.values >> 4
    return torch.stack((low, high), -1).flatten(1).to(torch.int8) - 8


def dequantize_weight(weight: QuantWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[N, K]`` in ``dtype``: what the integers stand for."""
    rows, columns = weight.shape
    q = unpacked(weight).float()
    if not columns:
        return q.to(dtype)
    groups = weight.scale.shape[1]
    grouped = q.view(rows, groups, columns // groups)
    return (grouped * weight.scale[..., None]).view(rows, columns).to(dtype)


def check_weight(op: str, weight: QuantWeight, device: torch.device) -> None:
    """A weight of :func:`quantize_weight`, or one that was loaded, is whole.

    Raises:
        ValueError: it is not; the message says what is wrong.
    """
    if not isinstance(weight, QuantWeight):
        raise ValueError(
            f"{op}: weight is {type(weight).__name__}, need a QuantWeight of quantize_weight"
        )
    values, scale, bits = weight
    if not isinstance(bits, int) or bits not in (8, 4):
        raise ValueError(f"{op}: weight has {bits!r} bits, need 8 or 4")
    eight = bits == 8 and isinstance(values, Tensor) and values.dtype == FLOAT8
    for name, t, dtype in (
        ("values", values, FLOAT8 if eight else torch.int8 if bits == 8 else torch.uint8),
        ("scale", scale, torch.float32),
    ):
        if not isinstance(t, Tensor) or t.dtype != dtype or t.dim() != 2 or t.device != device:
            found = (
                f"{t.dtype} {list(t.shape)} on {t.device}"
                if isinstance(t, Tensor)
                else type(t).__name__
            )
            raise ValueError(f"{op}: weight.{name} is {found}, need {dtype} [N, .] on {device}")
        check_strided(op, f"weight.{name}", t)
        if not t.is_contiguous():
            raise ValueError(f"{op}: weight.{name} has strides {t.stride()}, need contiguous")
    rows, columns = weight.shape
    groups = scale.shape[1]
    if scale.shape[0] != rows or (columns and (not groups or columns % groups)):
        raise ValueError(
            f"{op}: weight.scale is {list(scale.shape)}, need [{rows}, G] with G a divisor of "
            f"K {columns}"
        )


if hasattr(torch.ops.fastdiff, "quantize"):

    @torch.library.register_fake("fastdiff::quantize")
    def _(
        x: Tensor,
        smooth: Tensor | None,
        activation: str | None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        shape, K = x.shape[:-1], x.shape[-1] // (2 if activation == "geglu" else 1)
        q = x.new_empty(*shape, K, dtype=dtype or torch.int8)
        return q, x.new_empty(shape, dtype=torch.float32)
