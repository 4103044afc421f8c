"""Triton kernels of grouped_linear and grouped_weight_grad: products over groups of rows whose
sizes only the device knows.

Rows fill at most cdiv(R, BLOCK_M) + E tiles, each of one expert: that many programs start for every
BLOCK_N columns, find their tile in the offsets, which a program reads whole, and those without one
leave. GROUP tiles of rows share a stretch of programs, so that an expert's weight comes from the
cache. A program holds BLOCK_M x BLOCK_N sums in float32; of a gated activation half the columns are
of the first half of u and half of the second, at the same places, and the output is BLOCK_N / 2
wide. Rows of x are read through the index, the weight through its strides.

The weight's gradient is one program per expert and tile of the weight, over its rows in order.

Values are not checked, for that would need a sync: an index out of range reads zeros, and offsets
outside of the rows end with them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of the weight's gradient, BLOCK_M are rows of the weight, BLOCK_N its columns, and BLOCK_K rows of
# x. Chosen by compiling (triton 3.9), not by timing: no call of fastdiff/gpu_cases.py spills
# registers on sm_80, sm_90, sm_100, sm_120 or gfx942, or has a block above 64 KiB of shared memory.
# The first three are for 16 bits: with float32, which no tensor core multiplies, they spill.
CONFIGS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2),
]
_GATED = ("geglu", "swiglu", "swishglu")


def _config(rows: int, groups: int, dtype: torch.dtype) -> triton.Config:
    """By the mean rows of a group: the values of the offsets are the device's."""
    mean = rows / groups
    if dtype == torch.float32:
        return CONFIGS[3 if mean > 16 else 4]
    return CONFIGS[0 if mean >= 128 else 1 if mean > 16 else 2]


@triton.jit
def _bounds(offsets_ptr, groups, rows, BLOCK_E: tl.constexpr):
    """int64 first and last row (exclusive) of every group, 0 and 0 past the last."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < groups, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < groups, other=0)
    start = tl.minimum(tl.maximum(start, 0), rows)
    return start, tl.maximum(tl.minimum(end, rows), start)


@triton.jit
def _silu(u):
    return u * tl.sigmoid(u)


@triton.jit
def _gelu(u):
    return 0.5 * u * (1.0 + tl.erf(0.7071067811865476 * u))


@triton.jit
def _grouped_linear_kernel(
    x_ptr,  # [R, K] or [T, K], unit last stride
    weight_ptr,  # [E, N, K], any strides
    offsets_ptr,  # [E + 1]
    bias_ptr,  # [E, N], contiguous
    index_ptr,  # [R], contiguous
    out_ptr,  # [R, N] or [R, N / 2], contiguous
    rows,  # R
    width,  # K
    groups,  # E
    columns,  # of out
    given,  # T
    x_r,
    w_e, w_n, w_k,
    HAS_BIAS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "none" or its name
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    across = tl.cdiv(columns, COLUMNS)
    most = tl.cdiv(rows, BLOCK_M) + groups
    first = tl.program_id(0) // (GROUP * across) * GROUP
    here = tl.minimum(most - first, GROUP)
    tile = first + tl.program_id(0) % (GROUP * across) % here
    n = tl.program_id(0) % (GROUP * across) // here * COLUMNS + tl.arange(0, COLUMNS)

    start, end = _bounds(offsets_ptr, groups, rows, BLOCK_E)
    tiles = tl.cdiv(end - start, BLOCK_M)
    upto = tl.cumsum(tiles, 0)
    if tile >= tl.sum(tiles, 0):
        return
    mine = (upto > tile) & (upto - tiles <= tile)
    expert = tl.sum(tl.where(mine, tl.arange(0, BLOCK_E), 0), 0).to(tl.int64)
    past = tl.sum(tl.where(mine, end, 0), 0)
    row = tl.sum(tl.where(mine, start + (tile - upto + tiles) * BLOCK_M, 0), 0)
    row += tl.arange(0, BLOCK_M)  # int64: R * N
    live = row < past
    if HAS_INDEX:
        source = tl.load(index_ptr + row, mask=live, other=-1)
        inside = (source >= 0) & (source < given)
    else:
        source = row
        inside = live

    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + source * x_r
    w_base = weight_ptr + expert * w_e
    w_first = n.to(tl.int64) * w_n
    keep = n < columns
    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    if GATED:
        w_second = (n + columns).to(tl.int64) * w_n
        other = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for at in range(0, width, BLOCK_K):
        in_k = at + k < width
        x_mask = inside[:, None] & in_k[None, :]
        w_mask = in_k[:, None] & keep[None, :]
        w_tile = w_base + (at + k)[:, None].to(tl.int64) * w_k
        x = tl.load(x_rows[:, None] + (at + k)[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_tile + w_first[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if GATED:
            w = tl.load(w_tile + w_second[None, :], mask=w_mask, other=0.0)
            other = tl.dot(x, w, other, input_precision="ieee")

    if HAS_BIAS:
        bias_ptr += expert * columns * (2 if GATED else 1)
        acc += tl.load(bias_ptr + n, mask=keep, other=0.0).to(tl.float32)[None, :]
        if GATED:
            b = tl.load(bias_ptr + columns + n, mask=keep, other=0.0)
            other += b.to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        acc = _gelu(acc)
    if ACTIVATION == "gelu_tanh":
        acc = acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))
    if ACTIVATION == "silu":
        acc = _silu(acc)
    if ACTIVATION == "geglu":
        acc = acc * _gelu(other)
    if ACTIVATION == "swiglu":
        acc = _silu(acc) * other
    if ACTIVATION == "swishglu":
        acc = acc * _silu(other)
    out = acc.to(out_ptr.dtype.element_ty)
    mask = live[:, None] & keep[None, :]
    tl.store(out_ptr + row[:, None] * columns + n[None, :], out, mask=mask)


@triton.jit
def _grouped_weight_grad_kernel(
    grad_ptr,  # [R, N], unit last stride
    x_ptr,  # [R, K] or [T, K], unit last stride
    offsets_ptr,  # [E + 1]
    index_ptr,  # [R], contiguous
    out_ptr,  # [E, N, K], contiguous
    rows,  # R
    columns,  # N
    width,  # K
    given,  # T
    grad_r,
    x_r,
    HAS_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(width, BLOCK_N)
    tiles = tl.cdiv(columns, BLOCK_M) * across
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    n = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.minimum(tl.maximum(tl.load(offsets_ptr + expert), 0), rows)
    end = tl.minimum(tl.load(offsets_ptr + expert + 1), rows)
    in_n, in_k = n < columns, k < width
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    r = tl.arange(0, BLOCK_K)
    grad_tile = n[:, None] + r[None, :] * grad_r  # int32, for registers
    for at in range(start, end, BLOCK_K):
        row = at + r.to(tl.int64)  # int64: R * N
        live = row < end
        source = row
        inside = live
        if HAS_INDEX:
            source = tl.load(index_ptr + row, mask=live, other=-1)
            inside = (source >= 0) & (source < given)
        grad = tl.load(
            grad_ptr + at * grad_r + grad_tile,
            mask=in_n[:, None] & live[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + (source * x_r)[:, None] + k[None, :],
            mask=inside[:, None] & in_k[None, :],
            other=0.0,
        )
        acc = tl.dot(grad, x, acc, input_precision="ieee")
    out_ptr += expert * columns * width
    place = n.to(tl.int64)[:, None] * width + k[None, :]
    mask = in_n[:, None] & in_k[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _unit_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
    *,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.grouped_linear``."""
    (E, N, K), R = weight.shape, (x if index is None else index).shape[0]
    gated = activation in _GATED
    columns = N // 2 if gated else N
    out = torch.empty(R, columns, dtype=x.dtype, device=x.device)
    if out.numel():
        x = _unit_last(x)
        weight = weight if 1 in weight.stride()[1:] else weight.contiguous()
        config = config or _config(R, E, x.dtype)
        tiles = triton.cdiv(R, config.kwargs["BLOCK_M"]) + E
        across = triton.cdiv(columns, config.kwargs["BLOCK_N"] // (2 if gated else 1))
        _grouped_linear_kernel[(tiles * across,)](
            x, weight, offsets.contiguous(),
            x if bias is None else bias.contiguous(),
            offsets if index is None else index.contiguous(),
            out, R, K, E, columns, x.shape[0], x.stride(0), *weight.stride(),
            HAS_BIAS=bias is not None, HAS_INDEX=index is not None,
            ACTIVATION=activation or "none", GATED=gated, BLOCK_E=triton.next_power_of_2(E),
            GROUP=8, **config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


def grouped_weight_grad(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    index: Tensor | None,
    *,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.grouped_weight_grad``."""
    (R, N), K, E = grad.shape, x.shape[1], offsets.shape[0] - 1
    out = torch.empty(E, N, K, dtype=x.dtype, device=x.device)
    if out.numel():
        grad, x = _unit_last(grad), _unit_last(x)
        config = config or _config(N, 1, x.dtype)
        tiles = triton.cdiv(N, config.kwargs["BLOCK_M"])
        tiles *= triton.cdiv(K, config.kwargs["BLOCK_N"])
        _grouped_weight_grad_kernel[(E * tiles,)](
            grad, x, offsets.contiguous(), offsets if index is None else index.contiguous(),
            out, R, N, K, x.shape[0], grad.stride(0), x.stride(0),
            HAS_INDEX=index is not None, **config.kwargs,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
