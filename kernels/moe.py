"""Triton kernels of moe_route and moe_combine.

Routing is three launches over blocks of TOKENS tokens, which see their tokens as rows of a tile
[token, expert] in registers: `_moe_choose` takes the k largest keys of every row and counts each
column; `_moe_scan` turns the counts into those of the blocks before, one program per 16 experts;
`_moe_place` counts down the columns. A token takes an expert at most once, so the order of a column
is that of slots, and no result hangs on the order of programs. Reads the logits once, writes 28
bytes a slot, and moves 16 bytes a block and expert.

Combining is one program per ROWS tokens and BLOCK channels, which adds rows in the order of j.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# TILE: the most elements of a tile [token, expert]; ROWS and BLOCK are moe_combine's.
CONFIGS = [
    triton.Config({"TOKENS": t, "TILE": tile, "ROWS": r, "BLOCK": b}, num_warps=w)
    for t, tile, r, b, w in ((64, 2048, 4, 512, 4), (16, 2048, 16, 128, 4), (128, 4096, 2, 1024, 8))
]


@triton.jit
def _ordered(value):
    """int64 of 32 bits in the order of floats: one zero, NaN below all."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True).to(tl.int64)
    up = tl.where(bits < 0, -1 - bits, bits + 0x80000000) & 0xFFFFFFFF
    return tl.where(value != value, 0, up)


@triton.jit
def _moe_choose_kernel(
    logits_ptr,  # [T, E]
    sample_ptr,  # [B, E]
    weights_ptr,  # [T, K] float32
    experts_ptr,  # [T, K] int64
    count_ptr,  # [blocks, E] int32
    tokens,
    experts,
    k,
    share,  # T / B
    SAMPLE: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # int64: T * E
    e = tl.arange(0, BLOCK_E)
    live = (t < tokens)[:, None] & (e < experts)[None, :]
    none = float("-inf")
    value = tl.load(logits_ptr + t[:, None] * experts + e[None, :], mask=live, other=none)
    value = value.to(tl.float32)
    if SAMPLE:
        at = (t // share)[:, None] * experts + e[None, :]
        value += tl.load(sample_ptr + at, mask=live, other=0.0).to(tl.float32)

    key = (_ordered(value) << 16) | (0xFFFF - e)[None, :]  # the highest, then the lowest expert
    key = tl.where(live, key, -1)
    rank = tl.full([TOKENS, BLOCK_E], -1, tl.int32)
    for j in range(0, k):
        top = tl.max(key, 1)[:, None]
        first = (key == top) & live
        rank = tl.where(first, j, rank)
        key = tl.where(first, -1, key)
    taken = rank >= 0

    if SIGMOID:
        gate = 1.0 / (1.0 + tl.exp(-value))
        nan = tl.max((live & (value != value)).to(tl.int32), 1) > 0
        gate = tl.where(nan[:, None], float("nan"), gate)
    else:
        weight = tl.where(live, tl.exp(value - tl.max(value, 1)[:, None]), 0.0)
        gate = weight / tl.sum(weight, 1)[:, None]
    if RENORMALISE:
        gate = gate / tl.sum(tl.where(taken, gate, 0.0), 1)[:, None]
    slot = t[:, None] * k + rank
    tl.store(weights_ptr + slot, gate, mask=taken)
    tl.store(experts_ptr + slot, (e[None, :] + 0 * rank).to(tl.int64), mask=taken)
    count_ptr += tl.program_id(0).to(tl.int64) * experts
    tl.store(count_ptr + e, tl.sum(taken.to(tl.int32), 0), mask=e < experts)


@triton.jit
def _moe_scan_kernel(
    count_ptr,  # [blocks, E] int32; becomes the sum of the blocks before
    counts_ptr,  # [E] int64
    blocks,
    experts,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, blocks, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        live = (b < blocks)[:, None] & (e < experts)[None, :]
        at = count_ptr + b[:, None] * experts + e[None, :]
        count = tl.load(at, mask=live, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=live)
        total += tl.sum(count, 0)
    tl.store(counts_ptr + e, total.to(tl.int64), mask=e < experts)


@triton.jit
def _moe_place_kernel(
    weights_ptr,  # [T, K] float32; 0 where dropped
    experts_ptr,  # [T, K] int64
    before_ptr,  # [blocks, E] int32
    counts_ptr,  # [E] int64
    order_ptr,  # [T K] int64
    position_ptr,  # [T, K] int64
    offsets_ptr,  # [E + 1] int64
    tokens,
    experts,
    k,
    capacity,
    CAPPED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, BLOCK_E)
    kept = tl.load(counts_ptr + e, mask=e < experts, other=0)
    if CAPPED:
        kept = tl.minimum(kept, capacity)
    end = tl.cumsum(kept, 0)
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + e, end - kept, mask=e < experts)
        tl.store(offsets_ptr + experts, tl.sum(kept, 0))

    rank = tl.full([TOKENS, BLOCK_E], -1, tl.int32)
    for j in range(0, k):
        chosen = tl.load(experts_ptr + t * k + j, mask=t < tokens, other=-1)
        rank = tl.where(chosen[:, None] == e[None, :], j, rank)
    taken = rank >= 0
    before_ptr += tl.program_id(0).to(tl.int64) * experts
    before = tl.load(before_ptr + e, mask=e < experts, other=0)
    place = before[None, :] + tl.cumsum(taken.to(tl.int32), 0) - 1  # among the expert's slots
    row = (end - kept)[None, :] + place
    slot = t[:, None] * k + rank
    if CAPPED:
        drop = taken & (place >= capacity)
        taken = taken & (place < capacity)
        each = tl.sum(drop.to(tl.int32), 1)
        # Dropped rows come after all kept ones: of blocks before, of tokens before, of lower j.
        after = tl.sum(kept, 0) + tl.sum(tl.maximum(before - capacity, 0), 0)
        after = after + tl.cumsum(each, 0) - each
        for j in range(0, k):
            here = drop & (rank == j)
            row = tl.where(here, after[:, None], row)
            after += tl.sum(here.to(tl.int32), 1)
        tl.store(order_ptr + row, slot, mask=drop)
        tl.store(position_ptr + slot, tl.full([TOKENS, BLOCK_E], -1, tl.int64), mask=drop)
        tl.store(weights_ptr + slot, tl.zeros([TOKENS, BLOCK_E], tl.float32), mask=drop)
    tl.store(order_ptr + row, slot, mask=taken)
    tl.store(position_ptr + slot, row, mask=taken)


@triton.jit
def _moe_combine_kernel(
    y_ptr,  # [R, C]
    weights_ptr,  # [T, K] float32
    position_ptr,  # [T, K] int64
    out_ptr,  # [T, C]
    rows,  # R
    tokens,
    k,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: T * C
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live, keep = t < tokens, c < channels
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for j in range(0, k):
        at = tl.load(position_ptr + t * k + j, mask=live, other=-1)
        found = (at >= 0) & (at < rows)
        weight = tl.load(weights_ptr + t * k + j, mask=found, other=0.0)
        mask = found[:, None] & keep[None, :]
        y = tl.load(y_ptr + at[:, None] * channels + c[None, :], mask=mask, other=0.0)
        total += weight[:, None] * y.to(tl.float32)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + t[:, None] * channels + c[None, :], out, mask=live[:, None] & keep[None, :])


def moe_route(
    logits: Tensor,
    sample: Tensor | None,
    k: int,
    sigmoid: bool,
    renormalise: bool,
    capacity: int,
    *,
    config: triton.Config = CONFIGS[0],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch on the current stream; arguments of ``fastdiff.ops.moe.route_args``, and what a
    ``Routing`` has."""
    tokens, experts = logits.shape
    device = logits.device
    weights = torch.empty(tokens, k, dtype=torch.float32, device=device)
    chosen = torch.empty(tokens, k, dtype=torch.int64, device=device)
    order = torch.empty(tokens * k, dtype=torch.int64, device=device)
    position = torch.empty_like(chosen)
    if not tokens:
        offsets = torch.zeros(experts + 1, dtype=torch.int64, device=device)
        return weights, chosen, order, position, offsets, torch.zeros_like(offsets[1:])
    offsets = torch.empty(experts + 1, dtype=torch.int64, device=device)
    counts = torch.empty(experts, dtype=torch.int64, device=device)
    block_e = max(16, triton.next_power_of_2(experts))
    block_t = min(config.kwargs["TOKENS"], config.kwargs["TILE"] // block_e)
    tile = {"TOKENS": block_t, "BLOCK_E": block_e, "num_warps": config.num_warps}
    blocks = triton.cdiv(tokens, block_t)
    before = torch.empty(blocks, experts, dtype=torch.int32, device=device)
    share = 1 if sample is None else tokens // sample.shape[0]
    _moe_choose_kernel[(blocks,)](
        logits, logits if sample is None else sample, weights, chosen, before,
        tokens, experts, k, share,
        SAMPLE=sample is not None, SIGMOID=sigmoid, RENORMALISE=renormalise, **tile,
    )  # fmt: skip
    _moe_scan_kernel[(triton.cdiv(experts, 16),)](
        before, counts, blocks, experts, BLOCK_B=128, BLOCK_E=16, num_warps=4
    )
    _moe_place_kernel[(blocks,)](
        weights, chosen, before, counts, order, position, offsets,
        tokens, experts, k, capacity, CAPPED=capacity >= 0, **tile,
    )  # fmt: skip
    return weights, chosen, order, position, offsets, counts


def moe_combine(
    y: Tensor, weights: Tensor, position: Tensor, *, config: triton.Config = CONFIGS[0]
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.moe_combine``."""
    (R, C), (T, K) = y.shape, position.shape
    out = torch.empty(T, C, dtype=y.dtype, device=y.device)
    if out.numel():
        rows, block = config.kwargs["ROWS"], config.kwargs["BLOCK"]
        _moe_combine_kernel[(triton.cdiv(T, rows), triton.cdiv(C, block))](
            y, weights, position, out, R, T, K, C,
            ROWS=rows, BLOCK=block, num_warps=config.num_warps,
        )  # fmt: skip
    return out
