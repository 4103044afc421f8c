"""Triton kernel of layer_norm_modulate, gate_residual and their chains: one program per ROWS rows.

A program holds its rows in registers, so every element is read once and written once per output;
the modulation of a sample is read once per program and stays in cache. The variance comes from
deviations, and the mean's rounding error from their sum: rows with mean >> deviation stay exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.quantize import integers, most, scales

# By D: up to 1024, up to 8192, above. Chosen by compiling for sm_80 and sm_90 (triton 3.9), not by
# timing: each keeps its row in registers without spills (16384 float32 in 4 warps would spill).
CONFIGS = [
    triton.Config({"ROWS": 4}, num_warps=8),
    triton.Config({"ROWS": 1}, num_warps=4),
    triton.Config({"ROWS": 1}, num_warps=16),
]


@triton.jit
def _load_rows(ptr, at_b, at_n, at_d, stride_b, stride_n, mask):
    at = at_b[:, None] * stride_b + at_n[:, None] * stride_n + at_d[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _layer_norm_modulate_kernel(
    x_ptr,  # [B, N, D], unit last stride
    y_ptr,  # [B, N, D], unit last stride
    gate_ptr,  # [B, D] (n stride 0) or [B, N, D], unit last stride; so are shift and scale
    shift_ptr,
    scale_ptr,
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    residual_ptr,  # [B, N, D], contiguous
    out_ptr,  # [B, N, D], contiguous; int8 with ROUNDED
    smooth_ptr,  # [D]
    s_ptr,  # [B, N], contiguous
    rows,  # B * N
    tokens,  # N
    dim,
    eps,
    x_b, x_n, y_b, y_n, gate_b, gate_n, shift_b, shift_n, scale_b, scale_n,
    HAS_Y: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    ROUNDED: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: B * N * D passes 2**31
    b = row // tokens
    n = row % tokens
    d = tl.arange(0, BLOCK_D)
    live_d = d < dim
    live = (row < rows)[:, None] & live_d[None, :]
    to = row[:, None] * dim + d[None, :]

    r = _load_rows(x_ptr, b, n, d, x_b, x_n, live)
    if HAS_Y:
        gate = _load_rows(gate_ptr, b, n, d, gate_b, gate_n, live)
        r += gate * _load_rows(y_ptr, b, n, d, y_b, y_n, live)
        tl.store(residual_ptr + to, r.to(residual_ptr.dtype.element_ty), mask=live)
    if HAS_OUT:
        if RMS:
            square = tl.sum(r * r, 1) / dim
            m = r / tl.sqrt(square + eps)[:, None]
        else:
            mean = tl.sum(r, 1) / dim
            m = tl.where(live, r - mean[:, None], 0.0)
            rest = tl.sum(m, 1) / dim
            variance = tl.maximum(tl.sum(m * m, 1) / dim - rest * rest, 0.0)
            m = (m - rest[:, None]) / tl.sqrt(variance + eps)[:, None]
        if HAS_WEIGHT:
            m *= tl.load(weight_ptr + d, mask=live_d, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            m += tl.load(bias_ptr + d, mask=live_d, other=0.0).to(tl.float32)[None, :]
        if HAS_SCALE:
            m *= 1.0 + _load_rows(scale_ptr, b, n, d, scale_b, scale_n, live)
        if HAS_SHIFT:
            m += _load_rows(shift_ptr, b, n, d, shift_b, shift_n, live)
        if HAS_SMOOTH:
            smooth = tl.load(smooth_ptr + d, mask=live_d, other=1.0)
            m = tl.div_rn(m, tl.zeros_like(m) + smooth[None, :])
        if ROUNDED:
            m = tl.where(live, m, 0.0)
            inverse, usable, s = scales(most(m), 127.0, 127.0 * 2.0**-126)
            tl.store(s_ptr + row, s, mask=row < rows)
            tl.store(out_ptr + to, integers(m, inverse, usable, 127.0, tl.int8), mask=live)
        else:
            tl.store(out_ptr + to, m.to(out_ptr.dtype.element_ty), mask=live)


def _launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    eps: float,
    rms: bool,
    config: triton.Config,
    smooth: Tensor | None = None,
    s: Tensor | None = None,
) -> None:
    B, N, D = x.shape
    if x.numel() == 0:
        return

    def unit_last(t: Tensor) -> Tensor:
        return t if t.stride(-1) == 1 else t.contiguous()

    def strides(t: Tensor) -> tuple[int, int]:
        return t.stride(0), t.stride(1) if t.dim() == 3 else 0

    placed = [x if t is None else unit_last(t) for t in (x, y, gate, shift, scale)]
    _layer_norm_modulate_kernel[(triton.cdiv(B * N, config.kwargs["ROWS"]),)](
        *placed,
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        x if residual is None else residual,
        x if out is None else out,
        x if smooth is None else smooth.contiguous(),
        x if s is None else s,
        B * N,
        N,
        D,
        eps,
        *(s for t in placed for s in strides(t)),
        HAS_Y=y is not None,
        HAS_OUT=out is not None,
        HAS_SHIFT=shift is not None,
        HAS_SCALE=scale is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SMOOTH=smooth is not None,
        ROUNDED=s is not None,
        RMS=rms,
        **config.kwargs,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=config.num_warps,
    )


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _config(x: Tensor) -> triton.Config:
    return CONFIGS[0 if x.shape[-1] <= 1024 else 1 if x.shape[-1] <= 8192 else 2]


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    *,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.layer_norm_modulate``."""
    out = _empty(x)
    config = config or _config(x)
    _launch(x, None, None, shift, scale, weight, bias, None, out, eps, rms, config)
    return out


def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor, *, config: triton.Config | None = None
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.gate_residual``."""
    residual = _empty(x)
    config = config or _config(x)
    _launch(x, y, gate, None, None, None, None, residual, None, 0.0, False, config)
    return residual


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    *,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; shapes as in ``fastdiff.ops.gate_residual_norm_modulate``."""
    residual, out = _empty(x), _empty(x)
    config = config or _config(x)
    _launch(x, y, gate, shift, scale, weight, bias, residual, out, eps, rms, config)
    return residual, out


def gate_residual_norm_quantize(
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
    *,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on the current stream; shapes as in ``fastdiff.ops.gate_residual_norm_quantize``."""
    residual = _empty(x)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    s = torch.zeros(x.shape[:2], dtype=torch.float32, device=x.device)
    config = config or _config(x)
    _launch(x, y, gate, shift, scale, weight, bias, residual, q, eps, rms, config, smooth, s)
    return residual, q, s
