"""Triton kernel of quantize: rows as int8, or as float8_e4m3fn, with one scale each.

A program takes ROWS rows, BLOCK columns at a time: once where BLOCK holds a row, which then stays
in registers, else twice, for the largest value and for the quotients. Products are rounded before
they are rounded to integers (no fused multiply-add), so that without an activation the values are
those of the reference, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Chosen by compiling (triton 3.9), not by timing: no call of fastdiff/gpu_cases.py spills registers
# on sm_80, sm_90, sm_100, sm_120 or gfx942.
CONFIGS = [
    triton.Config({"ROWS": 4, "BLOCK": 1024}, num_warps=4),
    triton.Config({"ROWS": 1, "BLOCK": 2048}, num_warps=4),
    triton.Config({"ROWS": 1, "BLOCK": 1024}, num_warps=4),
]
_TINY = 2.0**-126  # times the levels: below it levels / max is no float32
_LEVELS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))  # 2 sqrt(2 / pi)
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _values(x_rows, smooth_ptr, k, width, live, ACTIVATION: tl.constexpr, SMOOTH: tl.constexpr):
    known = k < width
    x = tl.load(x_rows[:, None] + k[None, :], mask=live[:, None] & known[None, :], other=0.0)
    y = activated(x.to(tl.float32), ACTIVATION)
    if ACTIVATION == "geglu":
        mask = live[:, None] & known[None, :]
        g = tl.load(x_rows[:, None] + (width + k)[None, :], mask=mask, other=0.0).to(tl.float32)
        y = y * (0.5 * g * (1.0 + tl.erf(0.7071067811865476 * g)))
    if SMOOTH:
        smooth = tl.load(smooth_ptr + k, mask=known, other=1.0)
        y = tl.div_rn(y, tl.zeros_like(y) + smooth[None, :])
    return y


@triton.jit
def most(y):
    """The largest absolute value of a row: infinite where one is a NaN."""
    size = tl.abs(y)
    return tl.max(tl.where(size < float("inf"), size, float("inf")), 1)


@triton.jit
def integers(y, inverse, usable, LEVELS: tl.constexpr, Q: tl.constexpr):
    v = y * inverse[:, None]
    if Q == tl.int8:
        v = (v + 12582912.0) - 12582912.0  # 1.5 2^23: to an integer, ties to even
    v = tl.minimum(tl.maximum(v, -LEVELS), LEVELS)
    return tl.where(usable[:, None], v, 0.0).to(Q)


@triton.jit
def scales(most, LEVELS: tl.constexpr, TINY: tl.constexpr):
    """From the largest values: LEVELS over them, which rows have one, and what the rows are in."""
    finite = most < float("inf")
    usable = finite & (most >= TINY)
    one = tl.full(most.shape, 1.0, tl.float32)
    # LEVELS / most as torch has it: a reciprocal, then a product.
    inverse = tl.div_rn(one, tl.where(usable, most, 1.0)) * LEVELS
    scale = tl.where(usable, tl.div_rn(most, one * LEVELS), 0.0)
    return inverse, usable, tl.where(finite, scale, float("nan"))


@triton.jit
def _quantize_kernel(
    x_ptr,  # [M, K] or for geglu [M, 2 K], unit last stride
    smooth_ptr,  # [K], contiguous
    q_ptr,  # [M, K], contiguous
    s_ptr,  # [M], contiguous
    rows,  # M
    width,  # K
    x_m,
    LEVELS: tl.constexpr,
    TINY: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "none" or its name
    SMOOTH: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK holds a row
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: M * K
    k = tl.arange(0, BLOCK)
    live = m < rows
    x_rows, q_rows = x_ptr + m * x_m, q_ptr + m * width
    Q: tl.constexpr = q_ptr.dtype.element_ty

    y = _values(x_rows, smooth_ptr, k, width, live, ACTIVATION, SMOOTH)
    top = most(y)
    if not WHOLE:
        for at in range(BLOCK, width, BLOCK):
            y = _values(x_rows, smooth_ptr, at + k, width, live, ACTIVATION, SMOOTH)
            top = tl.maximum(top, most(y))
    inverse, usable, scale = scales(top, LEVELS, TINY)
    tl.store(s_ptr + m, scale, mask=live)
    if WHOLE:
        q = integers(y, inverse, usable, LEVELS, Q)
        tl.store(q_rows[:, None] + k[None, :], q, mask=live[:, None] & (k < width)[None, :])
    else:
        for at in range(0, width, BLOCK):
            y = _values(x_rows, smooth_ptr, at + k, width, live, ACTIVATION, SMOOTH)
            q = integers(y, inverse, usable, LEVELS, Q)
            mask = live[:, None] & (at + k < width)[None, :]
            tl.store(q_rows[:, None] + (at + k)[None, :], q, mask=mask)


def quantize(
    x: Tensor,
    smooth: Tensor | None,
    activation: str | None,
    dtype: torch.dtype = torch.int8,
    *,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; shapes as in ``fastdiff.ops.quantize``."""
    K = x.shape[-1] // (2 if activation == "geglu" else 1)
    q = torch.empty((*x.shape[:-1], K), dtype=dtype, device=x.device)
    s = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if s.numel():
        flat = x.reshape(s.numel(), x.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        config = config or next((c for c in CONFIGS if c.kwargs["BLOCK"] >= K), CONFIGS[-1])
        _quantize_kernel[(triton.cdiv(s.numel(), config.kwargs["ROWS"]),)](
            flat, flat if smooth is None else smooth.contiguous(), q, s,
            s.numel(), K, flat.stride(0),
            LEVELS=_LEVELS[dtype], TINY=_LEVELS[dtype] * _TINY, ACTIVATION=activation or "none",
            SMOOTH=smooth is not None, WHOLE=config.kwargs["BLOCK"] >= K,
            **config.kwargs, num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return q, s
