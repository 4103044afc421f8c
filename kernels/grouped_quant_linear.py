"""Triton kernel of grouped_quant_linear: int8 products of groups of rows whose sizes only the
device knows.

Tiles of rows are found as in grouped_linear, products and their scales taken as in quant_linear: a
program holds BLOCK_M x BLOCK_N int32 sums of one group of columns, and float32 totals of those
before; of a gated activation half the columns are of each half of u. Tokens and their scales are
read through the index.

Values are not checked, for that would need a sync: an index out of range reads zeros, and offsets
outside of the rows end with them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.grouped_linear import _GATED, _bounds, _gelu, _silu
from fastdiff.kernels.quantize import activated

# Chosen by compiling (triton 3.9), not by timing: no call of fastdiff/gpu_cases.py spills registers
# on sm_80, sm_90, sm_100, sm_120 or gfx942, as tiles of 128 x 128 do.
CONFIGS = [
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=3),
]


def _config(rows: int, experts: int, groups: int, size: int) -> triton.Config:
    """By the mean rows of an expert; with groups of columns by what a group holds."""
    if groups > 1:
        return CONFIGS[0 if size % 64 == 0 else 1]
    return CONFIGS[0 if rows > 16 * experts else 2]


@triton.jit
def _grouped_quant_linear_kernel(
    q_ptr,  # [R, K] or [T, K], contiguous
    s_ptr,  # a scale for each of q's rows, contiguous
    values_ptr,  # [E, N, K], contiguous
    scale_ptr,  # [E, N, G], contiguous
    offsets_ptr,  # [E + 1]
    bias_ptr,  # [E, N], contiguous
    index_ptr,  # [R], contiguous
    out_ptr,  # [R, N] or [R, N / 2], contiguous
    rows,  # R
    width,  # K
    experts,  # E
    columns,  # of out
    given,  # T
    groups,  # G
    size,  # K / G
    HAS_BIAS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "none" or its name
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    COLUMNS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    across = tl.cdiv(columns, COLUMNS)
    most = tl.cdiv(rows, BLOCK_M) + experts
    first = tl.program_id(0) // (GROUP * across) * GROUP
    here = tl.minimum(most - first, GROUP)
    tile = first + tl.program_id(0) % (GROUP * across) % here
    n = tl.program_id(0) % (GROUP * across) // here * COLUMNS + tl.arange(0, COLUMNS)
    n = n.to(tl.int64)  # N * K

    begin, end = _bounds(offsets_ptr, experts, rows, BLOCK_E)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    upto = tl.cumsum(tiles, 0)
    if tile >= tl.sum(tiles, 0):
        return
    mine = (upto > tile) & (upto - tiles <= tile)
    expert = tl.sum(tl.where(mine, tl.arange(0, BLOCK_E), 0), 0).to(tl.int64)
    past = tl.sum(tl.where(mine, end, 0), 0)
    row = tl.sum(tl.where(mine, begin + (tile - upto + tiles) * BLOCK_M, 0), 0)
    row += tl.arange(0, BLOCK_M)  # int64: R * N
    live = row < past
    if HAS_INDEX:
        source = tl.load(index_ptr + row, mask=live, other=-1)
        inside = (source >= 0) & (source < given)
    else:
        source = row
        inside = live

    k = tl.arange(0, BLOCK_K)
    half = columns if GATED else 0  # to the second half of u
    values_ptr += expert * (columns + half) * width
    scale_ptr += expert * (columns + half) * groups
    q_rows, w_rows = q_ptr + source * width, values_ptr + n * width
    keep = n < columns
    total = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    if GATED:
        w_other = w_rows + half.to(tl.int64) * width
        other = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for g in range(0, groups):
        sums = tl.zeros([BLOCK_M, COLUMNS], tl.int32)
        if GATED:
            others = tl.zeros([BLOCK_M, COLUMNS], tl.int32)
        for start in range(0, size, BLOCK_K):
            at, in_k = g * size + start + k, start + k < size
            mask = in_k[:, None] & keep[None, :]
            q = tl.load(
                q_rows[:, None] + at[None, :], mask=inside[:, None] & in_k[None, :], other=0
            )
            w = tl.load(w_rows[None, :] + at[:, None], mask=mask, other=0)
            sums = tl.dot(q, w, sums, out_dtype=tl.int32)
            if GATED:
                w = tl.load(w_other[None, :] + at[:, None], mask=mask, other=0)
                others = tl.dot(q, w, others, out_dtype=tl.int32)
        scale = tl.load(scale_ptr + n * groups + g, mask=keep, other=0.0)[None, :]
        total = tl.fma(sums.to(tl.float32), tl.zeros_like(total) + scale, total)
        if GATED:
            scale = tl.load(scale_ptr + (n + half) * groups + g, mask=keep, other=0.0)[None, :]
            other = tl.fma(others.to(tl.float32), tl.zeros_like(other) + scale, other)

    s = tl.load(s_ptr + source, mask=inside, other=0.0)[:, None] + tl.zeros_like(total)
    if HAS_BIAS:
        bias_ptr += expert * (columns + half)
        bias = tl.load(bias_ptr + n, mask=keep, other=0.0).to(tl.float32)[None, :]
        total = tl.fma(s, total, tl.zeros_like(total) + bias)
        if GATED:
            bias = tl.load(bias_ptr + half + n, mask=keep, other=0.0).to(tl.float32)[None, :]
            other = tl.fma(s, other, tl.zeros_like(other) + bias)
    else:
        total = s * total
        if GATED:
            other = s * other
    if ACTIVATION == "gelu":
        total = _gelu(total)
    if ACTIVATION == "gelu_tanh" or ACTIVATION == "silu":
        total = activated(total, ACTIVATION)
    if ACTIVATION == "geglu":
        total = total * _gelu(other)
    if ACTIVATION == "swiglu":
        total = _silu(total) * other
    if ACTIVATION == "swishglu":
        total = total * _silu(other)
    out = total.to(out_ptr.dtype.element_ty)
    mask = live[:, None] & keep[None, :]
    tl.store(out_ptr + row[:, None] * columns + n[None, :], out, mask=mask)


def grouped_quant_linear(
    q: Tensor,
    s: Tensor,
    values: Tensor,
    scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    *,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.grouped_quant_linear``."""
    (E, N, K), G, R = values.shape, scale.shape[2], (q if index is None else index).shape[0]
    gated = activation in _GATED
    columns = N // 2 if gated else N
    out = torch.empty(R, columns, dtype=dtype, device=q.device)
    if out.numel():
        size = K // G if G else 0
        config = config or _config(R, E, G, size)
        tiles = triton.cdiv(R, config.kwargs["BLOCK_M"]) + E
        across = triton.cdiv(columns, config.kwargs["BLOCK_N"] // (2 if gated else 1))
        _grouped_quant_linear_kernel[(tiles * across,)](
            q, s, values, scale, offsets.contiguous(), s if bias is None else bias.contiguous(),
            offsets if index is None else index.contiguous(), out,
            R, K, E, columns, q.shape[0], G if K else 0, size,
            HAS_BIAS=bias is not None, HAS_INDEX=index is not None,
            ACTIVATION=activation or "none", GATED=gated, BLOCK_E=triton.next_power_of_2(E),
            GROUP=8, **config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
