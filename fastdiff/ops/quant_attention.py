r"""Attention whose scores are products of int8 (SageAttention, Zhang et al. 2024,
arXiv:2410.02367, section 3 and eq. 1 to 5).

    k'[j]   = k[j] - mean_j k[j]                     smoothing: per head and channel
    s(x)    = max_d |x_d| / 127,  x8 = round(x / s)  of each row of q and of k', ties to even
    S[i, j] = scale * s_q[i] * s_k[j] * (q8[i] . k8[j])
    out[i]  = sum_j softmax_j(S[i, j]) v[j]

The mean takes the same number off every score of a query, which its softmax does not see; what it
leaves of keys with a large common part is small enough for 8 bits. The paper has a scale for each
block of tokens; here every token has its own, so that none is rounded more coarsely for its
neighbours: 0.9 % of the outputs are error in place of 1.2 % with blocks of 64 (normal q, k and v,
[2, 16, 1024, 64]). Integers are exact on every row; the mean is the float32 of a float64 sum and
rows are rounded to integers from float32, whatever the dtype, so that rows of the table and dtypes
agree on them but for rare ties.

Non-finite values: a row of q with a NaN or an infinity, or a head with one in k, gives NaN. So
does a row whose scores overflow float32. v is read as :func:`attention` reads it. Rounding has no
gradient: where one is asked for, every row refuses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, _has_tangent, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_finite, check_like, check_shape, check_tensor, wide

LEVELS = 127  # of int8 to either side of 0
TINY = 127 * 2.0**-126  # below it 127 / max is no float32
MOST_DIM = (2**31 - 1) // 127**2  # whose products an int32 holds the sum of
# Of a head: above, tiles do not stay in the registers of a GPU (tests/test_testing_compile.py).
TRITON_MAX_DIM = 256
CUDA_MAX_DIM = TRITON_MAX_VALUE_DIM = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}


def _int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers, as floats, and scales ``[..., 1]`` of float32 ``x``."""
    most = x.abs().amax(-1, keepdim=True)
    finite = most.isfinite()
    usable = finite & (most >= TINY)
    inverse = torch.where(usable, most, 1.0).reciprocal() * LEVELS
    integers = torch.where(usable, (x * inverse).round().clamp(-LEVELS, LEVELS), 0.0)
    scale = torch.where(usable, most / LEVELS, 0.0)
    return integers, torch.where(finite, scale, torch.nan)


def quant_attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float, smooth: bool) -> Tensor:
    """The specification: integers of float32, their products in float64, which holds them exactly;
    then float32 (float64 for float64 input), one rounding at the end."""
    keys = k.float()
    if smooth and k.shape[2]:
        keys = keys - k.double().mean(2, keepdim=True).float()
    (q8, s_q), (k8, s_k) = _int8_rows(q.float()), _int8_rows(keys)
    value = wide(v)
    products = (q8.double() @ k8.double().transpose(-1, -2)).to(value.dtype)
    score = products * (s_k.to(value.dtype).transpose(-1, -2) * (s_q.to(value.dtype) * scale))
    return (score.softmax(-1) @ value).to(q.dtype)


def _native_why_not(q: Tensor, k: Tensor, v: Tensor, scale: float, smooth: bool) -> str | None:
    widest, most = max(q.shape[3], v.shape[3]), CUDA_MAX_DIM.get(q.dtype, 0)
    if q.is_cuda and q.dtype in CUDA_MAX_DIM and widest > most:
        return (
            f"head dimension {widest} is above {most}, the CUDA kernel's most in {q.dtype}: sums "
            "would not stay in registers"
        )
    return why_not_native(q, k, v, gpu="quant_attention") or refuse_grad(q, k, v)


def _triton_why_not(q: Tensor, k: Tensor, v: Tensor, scale: float, smooth: bool) -> str | None:
    reason = why_not_triton(q, k, v)
    if reason is not None:
        return reason
    for name, t, most in (
        ("q", q, TRITON_MAX_DIM),
        ("v", v, TRITON_MAX_VALUE_DIM[v.dtype]),
    ):
        if t.shape[3] > most:
            return (
                f"head dimension {t.shape[3]} of {name} is above {most}: a tile would not stay in "
                "the registers of a GPU"
            )
    return refuse_grad(q, k, v)


def _ref_why_not(q: Tensor, k: Tensor, v: Tensor, scale: float, smooth: bool) -> str | None:
    if _has_tangent((q, k, v)):
        return "an input has a tangent, and rounding has no derivative"
    return refuse_grad(q, k, v)  # autograd would give that of the scales alone


IMPLS = (
    Impl("native", native("quant_attention"), _native_why_not),
    Impl("triton", triton_row("quant_attention"), _triton_why_not),
    Impl("ref", quant_attention_ref, _ref_why_not),
)


def row_args(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, smooth: bool = True
) -> tuple[Tensor, Tensor, Tensor, float, bool]:
    """Check the public arguments and give those of a row."""
    op = "quant_attention"
    check_tensor(op, "q", q, dim=4)
    for name, t in (("k", k), ("v", v)):
        check_like(op, name, t, q, "q")
        check_tensor(op, name, t, dim=4)
    batch, heads, _, dim = q.shape
    if not 0 < dim <= MOST_DIM:
        raise ValueError(
            f"{op}: q has shape {list(q.shape)}, need a head dimension of 1 to {MOST_DIM}"
        )
    check_shape(op, "k", k, (batch, heads, k.shape[2], dim))
    check_shape(op, "v", v, (batch, heads, k.shape[2], v.shape[3]))
    if scale is None:
        scale = 1.0 / math.sqrt(dim)
    check_finite(op, "scale", scale)
    if not isinstance(smooth, bool):
        raise ValueError(f"{op}: smooth is {smooth!r}, need True or False")
    return q, k, v, scale, smooth


TABLES = {"quant_attention": (IMPLS, row_args)}


def quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    smooth: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Softmax attention of ``q`` over ``k`` and ``v``, its scores from products of int8.

    Without bias, lengths or chosen rows: :func:`attention` has these.

    Args:
        q: ``[B, H, S, D]``; float16, bfloat16 or float32 (float64 on the ref row); any strides, no
            copy is made where the last one is 1. Any D up to 133,144; of a multiple of 4 no
            product is wasted on a CPU, of 32, 64, 128 or 256 none on a GPU.
        k: ``[B, H, T, D]``, dtype and device of ``q``.
        v: ``[B, H, T, Dv]``, dtype and device of ``q``.
        scale: factor of the scores; None for ``1/sqrt(D)``.
        smooth: take the mean over the keys off ``k`` before it is rounded. Right for all but keys
            that have none, or whose mean is not what is common to them.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[B, H, S, Dv]`` in the dtype of ``q``; from the native and triton rows a view of a
        contiguous ``[B, S, H, Dv]`` buffer, so that ``out.transpose(1, 2).flatten(2)`` is free.
        Without keys 0.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``scale`` is not finite.
        NoImpl: the forced row refuses, or a gradient is asked for; the message says why.
    """
    args = row_args(q, k, v, scale=scale, smooth=smooth)
    out: Tensor = pick("quant_attention", IMPLS, impl, *args)(*args)
    return out


if hasattr(torch.ops.fastdiff, "quant_attention"):

    @torch.library.register_fake("fastdiff::quant_attention")
    def _(q: Tensor, k: Tensor, v: Tensor, scale: float, smooth: bool) -> Tensor:
        batch, heads, rows, _ = q.shape
        return q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)
