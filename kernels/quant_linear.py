"""Triton kernel of quant_linear: int8 (or float8_e4m3fn) products on tensor cores, scales after
them.

A program holds BLOCK_M x BLOCK_N sums of one group's columns, as int32 (float32 of float8), and
walks the groups in order; blocks of BLOCK_K columns do not reach over a group's end. A group's sums
are then added, times its scale, to float32 totals: registers twice, and in one loop where BLOCK_K
is a group. GROUP tiles of rows share a stretch of programs, so that the weight comes from the
cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.quantize import activated

# Chosen by compiling (triton 3.9), not by timing: no call of fastdiff/gpu_cases.py spills registers
# on sm_80, sm_90, sm_100, sm_120 or gfx942.
CONFIGS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=3),
]


def _config(rows: int, groups: int, size: int) -> triton.Config:
    """By rows; with several groups by what a group holds, as totals take as many registers as
    sums."""
    if groups > 1:
        return CONFIGS[1 if size % 128 == 0 else 2 if size % 64 == 0 else 3]
    return CONFIGS[0 if rows >= 512 else 1 if rows > 16 else 4]


@triton.jit
def _quant_linear_kernel(
    q_ptr,  # [M, K], contiguous
    s_ptr,  # [M], contiguous
    values_ptr,  # [N, K], contiguous
    scale_ptr,  # [N, G], contiguous
    bias_ptr,  # [N], contiguous
    out_ptr,  # [M, N], contiguous
    rows,  # M
    columns,  # N
    width,  # K
    groups,  # G
    size,  # K / G
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "none" or its name
    ONE: tl.constexpr,  # BLOCK_K is a group
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    here = tl.minimum(down - first, GROUP)
    tile = first + tl.program_id(0) % (GROUP * across) % here
    m = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64: M * K, M * N
    n = tl.program_id(0) % (GROUP * across) // here * BLOCK_N + tl.arange(0, BLOCK_N)
    n = n.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    live, keep = m < rows, n < columns
    q_rows, w_rows = q_ptr + m * width, values_ptr + n * width
    ACC: tl.constexpr = tl.int32 if q_ptr.dtype.element_ty == tl.int8 else tl.float32

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ONE:
        for g in range(0, groups):
            at = g * BLOCK_K + k
            q = tl.load(q_rows[:, None] + at[None, :], mask=live[:, None], other=0.0)
            w = tl.load(w_rows[None, :] + at[:, None], mask=keep[None, :], other=0.0)
            sums = tl.dot(q, w, tl.zeros([BLOCK_M, BLOCK_N], ACC), out_dtype=ACC)
            scale = tl.load(scale_ptr + n * groups + g, mask=keep, other=0.0)[None, :]
            total = tl.fma(sums.to(tl.float32), tl.zeros_like(total) + scale, total)
    else:
        for g in range(0, groups):
            sums = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            for start in range(0, size, BLOCK_K):
                at, inside = g * size + start + k, start + k < size
                q = tl.load(
                    q_rows[:, None] + at[None, :], mask=live[:, None] & inside[None, :], other=0.0
                )
                w = tl.load(
                    w_rows[None, :] + at[:, None], mask=inside[:, None] & keep[None, :], other=0.0
                )
                sums = tl.dot(q, w, sums, max_num_imprecise_acc=BLOCK_K, out_dtype=ACC)
            scale = tl.load(scale_ptr + n * groups + g, mask=keep, other=0.0)[None, :]
            total = tl.fma(sums.to(tl.float32), tl.zeros_like(total) + scale, total)

    s = tl.load(s_ptr + m, mask=live, other=0.0)[:, None] + tl.zeros_like(total)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=keep, other=0.0).to(tl.float32)[None, :]
        total = tl.fma(s, total, tl.zeros_like(total) + bias)
    else:
        total = s * total
    out = activated(total, ACTIVATION).to(out_ptr.dtype.element_ty)
    mask = live[:, None] & keep[None, :]
    tl.store(out_ptr + m[:, None] * columns + n[None, :], out, mask=mask)


def quant_linear(
    q: Tensor,
    s: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    *,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.quant_linear``."""
    (N, K), G, M = values.shape, scale.shape[1], s.numel()
    out = torch.empty(*q.shape[:-1], N, dtype=dtype, device=q.device)
    if out.numel():
        size = K // G if G else 0
        config = config or _config(M, G, size)
        block = config.kwargs
        tiles = triton.cdiv(M, block["BLOCK_M"]) * triton.cdiv(N, block["BLOCK_N"])
        _quant_linear_kernel[(tiles,)](
            q, s, values, scale, s if bias is None else bias.contiguous(), out,
            M, N, K, G if K else 0, size,
            HAS_BIAS=bias is not None, ACTIVATION=activation or "none",
            ONE=size == block["BLOCK_K"], GROUP=8, **block,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
