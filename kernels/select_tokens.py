"""Triton kernel of select_tokens: one program per sample, which it holds in registers.

The threshold of each of the two orders is built bit by bit from the top: a bit is set where fewer
keys lie below than are to be left out. Keys are 63 bits, protection then value; tokens that equal
the threshold are left out in the order of their index. Reads 8 to 9 bytes a token, writes 4 and 8
for each chosen one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [triton.Config({}, num_warps=w) for w in (4, 8, 16, 32)]


@triton.jit
def _ordered(value):
    """int64 of 32 bits in the order of floats; no NaN, and one zero."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 0x80000000) & 0xFFFFFFFF


@triton.jit
def _first_of(key, n, wanted):
    """1 where each of the keys (none negative) is among the ``wanted`` first by (key, n)."""
    low = tl.sum(key * 0, 0)
    for i in range(0, 63):
        trial = low + (tl.full([], 1, tl.int64) << (62 - i))
        below = tl.sum((key < trial).to(tl.int32), 0)
        low = tl.where(below < wanted, trial, low)
    equal = (key == low).to(tl.int32)
    left = wanted - tl.sum((key < low).to(tl.int32), 0)
    rank = tl.cumsum(equal, 0)
    first = (key < low) | ((equal > 0) & (rank <= left))
    return tl.where(first & (wanted > 0), 1, 0)


@triton.jit
def _select_tokens_kernel(
    score_ptr,  # [B, N] float32
    drops_ptr,  # [B, N] int32
    forced_ptr,  # [B, N] bool
    factors_ptr,  # [2, steps] float32
    index_ptr,  # [B, count] int64
    new_drops_ptr,  # [B, N] int32
    tokens,
    steps,
    count,
    low,
    most,
    FORCED: tl.constexpr,
    RESET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    live = n < tokens
    at = b * tokens + n
    score = tl.load(score_ptr + at, mask=live, other=0.0)
    drops = tl.load(drops_ptr + at, mask=live, other=0)
    nan = score != score
    score = tl.where(nan, 0.0, score)
    waited = tl.maximum(tl.minimum(drops, steps - 1), 0)
    up = score * tl.load(factors_ptr + waited)
    down = score * tl.load(factors_ptr + steps + waited)
    guard = tl.where((most >= 0) & (drops >= most), drops, 0).to(tl.int64)
    guard = tl.where(nan, 0x7FFFFFFE, guard)
    if FORCED:
        forced = tl.load(forced_ptr + at, mask=live, other=0)
        guard = tl.where(forced != 0, 0x7FFFFFFF, guard)
    last = 0x7FFFFFFFFFFFFFFF  # after every token that there is
    key = tl.where(live, (guard << 32) | _ordered(up), last)
    out = _first_of(key, n, low)
    key = tl.where(live & (out == 0), (guard << 32) | (0xFFFFFFFF - _ordered(down)), last)
    out = out | _first_of(key, n, tokens - count - low)
    chosen = live & (out == 0)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(index_ptr + b * count + place, n.to(tl.int64), mask=chosen)
    stays = tl.where(chosen, 0, drops + 1) if RESET else drops + out
    tl.store(new_drops_ptr + at, stays, mask=live)


def select_tokens(
    score: Tensor,
    drops: Tensor,
    forced: Tensor | None,
    factors: Tensor,
    count: int,
    low: int,
    most: int,
    reset: bool,
    *,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; arguments of ``fastdiff.ops.select_tokens.row_args``."""
    batch, tokens = score.shape
    index = torch.empty(batch, count, dtype=torch.int64, device=score.device)
    new_drops = torch.empty_like(drops)
    if score.numel():
        block = max(16, triton.next_power_of_2(tokens))
        _select_tokens_kernel[(batch,)](
            score, drops, score if forced is None else forced.view(torch.uint8), factors, index,
            new_drops, tokens, factors.shape[1], count, low, most,
            FORCED=forced is not None, RESET=reset, BLOCK=block,
            num_warps=min(32, max(4, block // 512)) if config is None else config.num_warps,
        )  # fmt: skip
    return index, new_drops
