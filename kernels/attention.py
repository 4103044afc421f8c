"""Triton kernel of attention: one program per BLOCK_M query rows of one head, online softmax.

The program holds its rows of q, the float32 sums of BLOCK_M x head dim, the running maximum and the
running sum; it reads k and v once, BLOCK_N keys at a time, up to the sample's length. A bias per
key is a vector load per block, one by groups a gather from the table (which stays in cache):
neither is ever laid out at S x T. Values are not checked, for that would need a sync: an index,
group or length out of range reads nothing and gives NaN. Packed samples have tiles of their own,
one after another: a program looks for its own among their starts, which are moved to the ends of q
where they lie outside, and programs past the last tile have no row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastdiff.kernels import INTERPRET

# Chosen by compiling (triton 3.9), not by timing: no call of fastdiff/gpu_cases.py spills registers
# on sm_80, sm_90, sm_100, sm_120 or gfx942, or has a block above 96 KiB of shared memory.
CONFIGS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=8, num_stages=1),
]


def _on_amd() -> bool:
    return not INTERPRET and driver.active.get_current_target().backend == "hip"


# The largest tile that stays in registers, as an index into CONFIGS. Row: no bias, one per key, one
# per (row, key); column: head dim up to 64, 128, 256.
_TILES_16_BIT = ((0, 1, 2), (1, 1, 2), (2, 2, 2))
_TILES_16_BIT_AMD = ((0, 2, 2), (2, 2, 2), (2, 2, 3))
_TILES_FLOAT32 = ((2, 3), (3, 4), (3, 4))  # an operand is held twice, as two tf32 numbers


def _config(dtype: torch.dtype, block_d: int, bias: str, amd: bool) -> triton.Config:
    """``bias``: BIAS of the kernel."""
    half = _TILES_16_BIT_AMD if amd else _TILES_16_BIT
    tiles: tuple[tuple[int, ...], ...] = _TILES_FLOAT32 if dtype == torch.float32 else half
    row = tiles[{"none": 0, "key": 1}.get(bias, 2)]
    return CONFIGS[row[0 if block_d <= 64 else 1 if block_d <= 128 else 2]]


@triton.jit(do_not_specialize=["samples"])
def _attention_kernel(
    q_ptr,  # [B, H, S, D], unit last stride
    k_ptr,  # [B, H, T, D], unit last stride
    v_ptr,  # [B, H, T, D], unit last stride
    out_ptr,  # [B, A, H, D], contiguous
    lse_ptr,  # [B, H, A], contiguous
    bias_ptr,  # [B|1, H|1, S, T] or [B|1, H|1, T], unit last stride
    query_group_ptr,  # [B|1, S], contiguous
    key_group_ptr,  # [B|1, T], contiguous
    table_ptr,  # [B|1, H|1, Gq, Gk], contiguous in the last two
    key_lengths_ptr,  # [B]
    q_index_ptr,  # [B, A], contiguous
    q_starts_ptr,  # [B + 1]; then q, out and lse have B = 1
    scale,
    samples,  # B
    heads,
    queries,  # S
    rows,  # A, or S
    keys,  # T
    q_b, q_h, q_s,
    k_b, k_h, k_s,
    v_b, v_h, v_s,
    bias_b, bias_h, bias_s,  # 0 where broadcast
    query_group_b, key_group_b,  # 0 where broadcast
    table_b, table_h,  # 0 where broadcast
    query_groups,
    key_groups,
    DIM: tl.constexpr,
    BIAS: tl.constexpr,  # "none", "full", "key" or "group"
    HAS_LENGTHS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    log2e: tl.constexpr = 1.4426950408889634
    ln2: tl.constexpr = 0.6931471805599453
    tiles = tl.num_programs(0) // heads if HAS_STARTS else tl.cdiv(rows, BLOCK_M)
    head = tl.program_id(0) // tiles
    b = (head // heads).to(tl.int64)  # int64 offsets: B * S * T of a full bias passes 2**31
    h = (head % heads).to(tl.int64)
    of = b  # the sample of q, out and lse that has the rows; b is that of the keys
    first = (tl.program_id(0) % tiles) * BLOCK_M
    end = rows
    if HAS_STARTS:
        slot = tl.program_id(0) % tiles
        before = 0  # tiles of the samples before
        first = rows
        for sample in range(0, samples):
            start = tl.load(q_starts_ptr + sample)
            stop = tl.load(q_starts_ptr + sample + 1)
            start = tl.minimum(tl.maximum(start, 0), rows).to(tl.int32)
            stop = tl.minimum(tl.maximum(stop, start), rows).to(tl.int32)
            mine = (slot >= before) & (slot < before + tl.cdiv(stop - start, BLOCK_M))
            b = tl.where(mine, sample, b)
            first = tl.where(mine, start + (slot - before) * BLOCK_M, first)
            end = tl.where(mine, stop, end)
            before += tl.cdiv(stop - start, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M)
    at_d = tl.arange(0, BLOCK_D)
    at_t = tl.arange(0, BLOCK_N)
    live = row < end
    if HAS_INDEX:
        query = tl.load(q_index_ptr + of * rows + row, mask=live, other=0)
        inside = (query >= 0) & (query < queries)
        query = tl.where(inside, query, 0)
    else:
        inside = live
        query = tl.where(live, row, 0).to(tl.int64)
    q = tl.load(
        q_ptr + of * q_b + h * q_h + query[:, None] * q_s + at_d[None, :],
        mask=live[:, None] & (at_d[None, :] < DIM),
        other=0.0,
    )
    length = keys
    fits = True
    if HAS_LENGTHS:
        length = tl.load(key_lengths_ptr + b)
        fits = (length >= 0) & (length <= keys)
        length = tl.where(fits, length, 0).to(tl.int32)
    if HAS_STARTS:
        length = tl.where(first < end, length, 0)  # a program with no row reads no key
    if BIAS == "group":
        query_group = tl.load(query_group_ptr + of * query_group_b + query, mask=live, other=0)
        inside = inside & (query_group >= 0) & (query_group < query_groups)
        query_group = tl.where(inside, query_group, 0)
        table_base = table_ptr + b * table_b + h * table_h
        table_rows = (query_group * key_groups).to(tl.int32)  # the row refuses larger tables

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # int64 where an offset grows with T; inside a tile int32, for registers
    k_base = k_ptr + b * k_b + h * k_h
    v_base = v_ptr + b * v_b + h * v_h
    k_tile = at_t[None, :] * k_s + at_d[:, None]
    v_tile = at_t[:, None] * v_s + at_d[None, :]
    if BIAS != "none":
        bias_base = bias_ptr + b * bias_b + h * bias_h
    if BIAS == "full":
        bias_rows = bias_base + query * bias_s
    if BIAS == "group":
        key_group_base = key_group_ptr + b * key_group_b
    for start in range(0, length, BLOCK_N):
        seen = start + at_t < length
        k = tl.load(k_base + k_tile, mask=seen[None, :] & (at_d[:, None] < DIM), other=0.0)
        v = tl.load(v_base + v_tile, mask=seen[:, None] & (at_d[None, :] < DIM), other=0.0)
        k_base += BLOCK_N * k_s.to(tl.int64)
        v_base += BLOCK_N * v_s.to(tl.int64)
        score = tl.dot(q, k, input_precision=PRECISION) * (scale * log2e)
        if BIAS == "full":
            bias = tl.load(
                bias_rows[:, None] + (start + at_t)[None, :],
                mask=live[:, None] & seen[None, :],
                other=0.0,
            )
            score += bias.to(tl.float32) * log2e
        if BIAS == "key":
            bias = tl.load(bias_base + start + at_t, mask=seen, other=0.0)
            score += bias.to(tl.float32)[None, :] * log2e
        if BIAS == "group":
            key_group = tl.load(key_group_base + start + at_t, mask=seen, other=0)
            known = (key_group >= 0) & (key_group < key_groups)
            at = table_rows[:, None] + key_group.to(tl.int32)[None, :]
            bias = tl.load(table_base + at, mask=known[None, :], other=float("nan"))
            score += bias * log2e
        score = tl.where(seen[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # A row with every key masked so far subtracts 0, so that its weights are 2^-inf = 0.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        acc += tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        top = new_top

    total = tl.where(inside & fits, total, float("nan"))
    dead = total == 0.0
    acc = tl.where(dead[:, None], 0.0, acc / tl.where(dead, 1.0, total)[:, None])
    lse = tl.where(dead, float("-inf"), (top + tl.log2(tl.where(dead, 1.0, total))) * ln2)
    tl.store(lse_ptr + (of * heads + h) * rows + row, lse, mask=live)
    tl.store(
        out_ptr + ((of * rows + row)[:, None] * heads + h) * DIM + at_d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (at_d[None, :] < DIM),
    )


def _broadcast_stride(t: Tensor, dim: int) -> int:
    return 0 if t.shape[dim] == 1 else t.stride(dim)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    table: Tensor | None,
    key_lengths: Tensor | None,
    q_index: Tensor | None,
    q_starts: Tensor | None = None,
    return_lse: bool = True,
    *,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; shapes as in ``fastdiff.ops.attention``."""
    stored, heads, queries, dim = q.shape
    batch, _, keys, _ = k.shape
    rows = queries if q_index is None else q_index.shape[1]
    out = q.new_empty(stored, rows, heads, dim)
    lse = q.new_empty(stored, heads, rows, dtype=torch.float32)
    if lse.numel() == 0 or batch == 0:
        return out.transpose(1, 2), lse
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    kind, bias_strides, group_strides, table_strides = "none", [0, 0, 0], [0, 0], [0, 0]
    if bias is not None:
        kind = "full" if bias.dim() == 4 else "key"
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        bias_strides = [_broadcast_stride(bias, i) for i in range(bias.dim() - 1)] + [0]
    if table is not None:
        kind = "group"
        assert query_group is not None and key_group is not None  # the three come together
        query_group, key_group, table = (t.contiguous() for t in (query_group, key_group, table))
        group_strides = [_broadcast_stride(t, 0) for t in (query_group, key_group)]
        table_strides = [_broadcast_stride(table, i) for i in range(2)]
    block_d = max(16, triton.next_power_of_2(dim))
    amd = _on_amd()
    config = config or _config(q.dtype, block_d, kind, amd)
    block_m = config.kwargs["BLOCK_M"]
    tiles = triton.cdiv(rows, block_m)
    if q_starts is not None:  # every sample that has rows may leave all but one row of a tile empty
        tiles = (rows + min(batch, rows) * (block_m - 1)) // block_m
    _attention_kernel[(stored * heads * tiles,)](
        q, k, v, out, lse,
        q if bias is None else bias,
        q if query_group is None else query_group,
        q if key_group is None else key_group,
        q if table is None else table,
        q if key_lengths is None else key_lengths.contiguous(),
        q if q_index is None else q_index.contiguous(),
        q if q_starts is None else q_starts.contiguous(),
        scale, batch, heads, queries, rows, keys,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *bias_strides[:3], *group_strides, *table_strides,
        0 if table is None else table.shape[2],
        0 if table is None else table.shape[3],
        DIM=dim, BIAS=kind, HAS_LENGTHS=key_lengths is not None, HAS_INDEX=q_index is not None,
        HAS_STARTS=q_starts is not None,
        # Three tf32 products keep float32's bits on tensor cores, where plain float32 runs on none.
        PRECISION="ieee" if amd else "tf32x3",
        BLOCK_D=block_d, **config.kwargs,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out.transpose(1, 2), lse
