"""Triton kernel of resample: one program per group, whose particles it holds in registers.

Reads 4 or 8 bytes a particle and writes 12 or 16. A scan of the compiler's own order makes the
cumulative weights; a point finds its parent in them by bisection, which a parent without weight
(whose edge may be a rounding past the one before it) hands to the one before it that has some.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [triton.Config({}, num_warps=w) for w in (1, 2, 4, 8)]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _resample_kernel(
    logw_ptr,  # [G, K] float32 or float64
    u_ptr,  # [G] float64
    parents_ptr,  # [G, K] int64
    after_ptr,  # [G, K], like logw
    did_ptr,  # [G] uint8
    particles,  # K
    least_high,  # the effective sample size to stay, in two float32 parts
    least_low,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,  # log2 of BLOCK
):
    g = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    live = n < particles
    at = g * particles + n
    given = tl.load(logw_ptr + at, mask=live, other=float("-inf"))
    logw = given.to(tl.float64)
    logw = tl.where(logw == logw, logw, float("-inf"))
    most = tl.max(logw, 0)
    # Equal weights where all are -inf or NaN; of infinite ones each has 1.
    w = tl.where(logw == most, 1.0, tl.exp(logw - most))
    w = tl.where(live, w, 0.0)
    edges = tl.cumsum(w, 0)
    total = tl.sum(tl.where(n == particles - 1, edges, 0.0), 0)
    zero = total * 0.0  # of float64, as is what it is added to
    did = total * total / tl.sum(w * w, 0) < zero + least_high + least_low
    count = zero + particles
    point = (tl.load(u_ptr + g) + n) / count
    low = n * 0
    high = low + particles - 1
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        past = tl.gather(edges, middle, 0) / total > point
        searching = low < high
        low = tl.where(searching & (past == 0), middle + 1, low)
        high = tl.where(searching & past, middle, high)
    known = tl.associative_scan(tl.where(w > 0.0, n, 0), 0, _larger)
    parent = tl.where(did, tl.gather(known, low, 0), n)
    mean = most + (tl.log(total) - tl.log(count))
    after = tl.where(did, mean.to(given.dtype), given)
    tl.store(parents_ptr + at, parent.to(tl.int64), mask=live)
    tl.store(after_ptr + at, after, mask=live)
    tl.store(did_ptr + g, did.to(tl.uint8))


def _parts(value: float) -> tuple[float, float]:
    """Two float32 whose sum has 48 bits of ``value``: a launch takes no float64."""
    high = torch.tensor(value, dtype=torch.float64).float().double()
    return float(high), value - float(high)


def resample(
    logw: Tensor, u: Tensor, least: float, *, config: triton.Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on the current stream; arguments of ``fastdiff.ops.resample.row_args``."""
    groups, particles = logw.shape
    parents = torch.empty(logw.shape, dtype=torch.int64, device=logw.device)
    after = torch.empty_like(logw)
    did = torch.empty(groups, dtype=torch.bool, device=logw.device)
    if groups:
        block = max(16, triton.next_power_of_2(particles))
        high, low = _parts(least)
        _resample_kernel[(groups,)](
            logw, u, parents, after, did.view(torch.uint8), particles, high, low,
            BLOCK=block, STEPS=block.bit_length() - 1,
            num_warps=min(8, max(1, block // 128)) if config is None else config.num_warps,
        )  # fmt: skip
    return parents, after, did
