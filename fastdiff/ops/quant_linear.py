r"""A linear layer of int8 tokens and an int8 weight: integer products, exact on every processor.

    y[m, n] = act(s[m] sum_g w[n, g] (sum_{k in g} q[m, k] v[n, k]) + bias[n])

The inner sums are integers (at most 127^2 K / G: int32 holds those of groups up to 133,144
columns), so that rows differ in the rounding of what comes after them alone: an inner sum is
rounded to float32, groups are added in order with fused multiply-adds, and so is the bias.

Tokens and weight may both be float8_e4m3fn instead: an inner sum is then one of float32, whose
order differs between rows. Tensor cores of Ada, and of Hopper on the row "triton", keep 13 bits of
fraction of such a sum, and cut the rest off (SageAttention2, arXiv:2411.10958, sec. 3.3): the row
"native" adds 64 columns in that way, and these sums in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff._native import DTYPES, in_cuda, native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_like, check_shape
from fastdiff.ops.linear import ACTIVATIONS
from fastdiff.ops.quantize import (
    FLOAT8,
    Quantized,
    QuantWeight,
    check_weight,
    unpacked,
    why_not_float8,
)
from fastdiff.ops.quantize import IMPLS as TOKENS
from fastdiff.ops.quantize import row_args as token_args

MOST_COLUMNS = (2**31 - 1) // 127**2  # of a group


def quant_linear_ref(
    q: Tensor,
    s: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """The specification: integer sums in float64, which holds them exactly; one rounding at the
    end."""
    groups = scale.shape[1]
    rows, columns = values.shape
    lead = q.shape[:-1]
    size = columns // groups if groups else 0
    x = q.reshape(s.numel(), groups, size).double()
    w = values.view(rows, groups, size).double()
    sums = torch.einsum("mgk,ngk->mng", x, w).float().double()
    y = s.reshape(-1, 1).double() * (sums * scale.double()).sum(-1)
    if bias is not None:
        y = y + bias.double()
    if activation is not None:
        y = F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else F.silu(y)
    return y.to(dtype).view(*lead, rows)


def _native_why_not(
    q: Tensor,
    s: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> str | None:
    if q.dtype != torch.int8 and not in_cuda(q):
        return f"native kernels for the cpu take int8, x is {q.dtype}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    why = why_not_native(s, scale, bias, gpu="quant_linear") or refuse_grad(s, scale, bias)
    return why or (None if q.dtype == torch.int8 else why_not_float8(q.device))


def _triton_why_not(
    q: Tensor,
    s: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> str | None:
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    reason = why_not_triton(s, scale, bias) or refuse_grad(s, scale, bias)
    return reason or (None if q.dtype == torch.int8 else why_not_float8(q.device))


IMPLS = (
    Impl("native", native("quant_linear"), _native_why_not),
    Impl("triton", triton_row("quant_linear"), _triton_why_not),
    Impl("ref", quant_linear_ref, always),
)


def row_args(
    x: Tensor | Quantized,
    weight: QuantWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, str | None, torch.dtype]:
    """Check the public arguments and give those of a row; floats are quantised here."""
    op = "quant_linear"
    if isinstance(x, Tensor):
        of_weight = getattr(getattr(weight, "values", None), "dtype", None)
        of_tokens = FLOAT8 if of_weight == FLOAT8 else torch.int8
        tokens = token_args(x, smooth=smooth, dtype=of_tokens, op=op)
        integers, scales = pick("quantize", TOKENS, None, *tokens)(*tokens)
        x = Quantized(integers, scales, x.dtype)
    elif not isinstance(x, Quantized):
        raise ValueError(f"{op}: x is {type(x).__name__}, need a tensor, or Quantized of quantize")
    elif smooth is not None:
        raise ValueError(f"{op}: smooth is given with tokens that are quantised already")
    q, s, dtype = x
    if q.dtype not in (torch.int8, FLOAT8) or s.dtype != torch.float32 or q.dim() < 1:
        raise ValueError(
            f"{op}: x is {q.dtype} {list(q.shape)} with scale {s.dtype}, need torch.int8 (or "
            f"{FLOAT8}) [..., K] with scale torch.float32"
        )
    check_shape(op, "x.scale", s, q.shape[:-1])
    if s.device != q.device:
        raise ValueError(f"{op}: x.scale is on {s.device}, need {q.device}, the device of x.values")
    check_weight(op, weight, q.device)
    if (weight.values.dtype == FLOAT8) != (q.dtype == FLOAT8):
        raise ValueError(f"{op}: weight.values is {weight.values.dtype}, x is {q.dtype}")
    rows, columns = weight.shape
    if q.shape[-1] != columns:
        raise ValueError(f"{op}: weight is {[rows, columns]}, need [N, {q.shape[-1]}]")
    if q.dtype == torch.int8 and columns > MOST_COLUMNS * weight.scale.shape[1]:
        raise ValueError(
            f"{op}: weight has {columns} columns in {weight.scale.shape[1]} groups, need groups of "
            f"at most {MOST_COLUMNS}, or int32 sums overflow"
        )
    if bias is not None:
        check_like(op, "bias", bias, torch.empty(0, dtype=dtype, device=q.device))
        check_shape(op, "bias", bias, (rows,))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, need None, 'gelu_tanh' or 'silu'")
    values = unpacked(weight)
    return q.contiguous(), s.contiguous(), values, weight.scale, bias, activation, dtype


TABLES = {"quant_linear": (IMPLS, row_args)}


def quant_linear(
    x: Tensor | Quantized,
    weight: QuantWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    smooth: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``act(x @ weight.T + bias)`` in int8, with one scale a token and one an output channel or
    group.

    Args:
        x: ``[..., K]`` floats, which are quantised here, or :class:`Quantized` tokens.
        weight: of :func:`quantize_weight`; those of 4 bits are widened to int8 here. Tokens are of
            its dtype (int8 with 4 bits); float8_e4m3fn not on the row "native" of a CPU.
        bias: ``[N]``, dtype and device of ``x``; None for 0.
        activation: None, "gelu_tanh" or "silu", applied after.
        smooth: ``[K]``, as the weight was made with; of floats alone.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[..., N]``, dtype and device of ``x``. A token with a NaN or an infinity gives a row of
        NaN.

    Raises:
        ValueError: a shape, dtype or device differs from the above; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, weight, bias, activation=activation, smooth=smooth)
    out: Tensor = pick("quant_linear", IMPLS, impl, *args)(*args)
    return out


if hasattr(torch.ops.fastdiff, "quant_linear"):

    @torch.library.register_fake("fastdiff::quant_linear")
    def _(
        q: Tensor,
        s: Tensor,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        activation: str | None,
        dtype: torch.dtype,
    ) -> Tensor:
        return q.new_empty((*q.shape[:-1], values.shape[0]), dtype=dtype)
