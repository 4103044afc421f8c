"""Triton kernel of lora_add: what a low-rank adapter of each sample adds to a layer's result.

A program owns BLOCK_M rows of one sample and a stretch of the columns of y. It walks K once for the
rows' low-rank product, which stays in registers, rounded to the dtype of x as the tensor cores take
it, then its columns, of which y is read and written once. Where rows alone would leave
multiprocessors idle, columns are shared out, and the product is taken once for every stretch. R is
the rank as a power of two, 16 at least. A sample without adapter, with one that is none, or with a
scale of 0 is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Chosen by compiling (triton 3.9), not by timing: no call of fastdiff/gpu_cases.py spills registers
# on sm_80, sm_90, sm_100, sm_120 or gfx942. The first two are for 16 bits: of 64 rows, as Hopper's
# and Blackwell's tensor cores need.
CONFIGS = [
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=2),
]
_PROGRAMS = 264  # two for each multiprocessor of a large GPU


def _config(rank: int, dtype: torch.dtype) -> triton.Config:
    if dtype == torch.float32:
        return CONFIGS[3 if rank <= 64 else 2]
    return CONFIGS[0 if rank <= 64 else 1]


@triton.jit
def _lora_add_kernel(
    y_ptr,  # [B, T, N], unit last stride
    x_ptr,  # [B, T, K], unit last stride
    down_ptr,  # [A, rank, K], contiguous
    up_ptr,  # [A, N, rank], contiguous
    scale_ptr,  # [A]
    index_ptr,  # [B]
    out_ptr,  # [B, T, N], contiguous
    low_ptr,  # [B, T, rank], contiguous
    tokens,  # T
    adapters,  # A
    columns,  # N
    width,  # K
    rank,
    share,  # columns of a program
    y_b, y_t, x_b, x_t,
    HAS_INDEX: tl.constexpr,
    KEEP: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = t < tokens
    first = tl.program_id(1) * share
    past = tl.minimum(first + share, columns)
    chosen = b * 0 + 1
    if HAS_INDEX:
        chosen = tl.load(index_ptr + b)
    known = (chosen > 0) & (chosen <= adapters)
    a = tl.where(known, chosen - 1, 0)
    scale = tl.where(known, tl.load(scale_ptr + a), 0.0)

    row = t.to(tl.int64)
    r = tl.arange(0, R)
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    low = tl.zeros([BLOCK_M, R], tl.float32)
    needed = known & (scale != 0.0)
    if KEEP:
        needed = known
    if needed:
        x_rows = x_ptr + b * x_b + row * x_t
        down_rows = down_ptr + (a * rank + r) * width
        for at in range(0, width, BLOCK_K):
            in_k = at + k < width
            x = tl.load(
                x_rows[:, None] + (at + k)[None, :], mask=live[:, None] & in_k[None, :], other=0.0
            )
            down = tl.load(
                down_rows[None, :] + (at + k)[:, None],
                mask=in_k[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            low = tl.dot(x, down, low, input_precision="ieee")
    part = low.to(out_ptr.dtype.element_ty)
    if KEEP:
        if tl.program_id(1) == 0:
            place = low_ptr + ((b * tokens + row) * rank)[:, None] + r[None, :]
            tl.store(place, part, mask=live[:, None] & (r < rank)[None, :])
    for at in range(first, past, BLOCK_N):
        in_n = at + n < past
        mask = live[:, None] & in_n[None, :]
        y = tl.load(y_ptr + b * y_b + (row * y_t)[:, None] + (at + n)[None, :], mask=mask)
        if scale != 0.0:
            up = tl.load(
                up_ptr + (a * columns + at + n)[None, :] * rank + r[:, None],
                mask=in_n[None, :] & (r < rank)[:, None],
                other=0.0,
            )
            added = tl.dot(part, up, input_precision="ieee")
            y = (y.to(tl.float32) + scale * added).to(out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + ((b * tokens + row) * columns)[:, None] + (at + n)[None, :], y, mask=mask
        )


def _rows(t: Tensor) -> Tensor:
    """``[B, T, D]``, with a unit last stride."""
    rows = t.reshape(t.shape[0], t.shape[1:-1].numel(), t.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def lora_add(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
    keep: bool,
    *,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; shapes as in ``fastdiff.ops.lora``."""
    A, rank, K = down.shape
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    low = torch.empty(*y.shape[:-1], rank, dtype=y.dtype, device=y.device) if keep else None
    kept = y.new_empty(0) if low is None else low
    if not out.numel() and not kept.numel():
        return out, kept
    if not rank:
        return out.copy_(y), kept
    y, x = _rows(y), _rows(x)
    (B, T, N), config = y.shape, config or _config(rank, y.dtype)
    programs = B * triton.cdiv(T, config.kwargs["BLOCK_M"])
    stretches = max(1, min(triton.cdiv(N, 4 * config.kwargs["BLOCK_N"]), _PROGRAMS // programs))
    share = triton.cdiv(triton.cdiv(N, stretches), config.kwargs["BLOCK_N"])
    share = max(1, share) * config.kwargs["BLOCK_N"]
    _lora_add_kernel[(programs, max(1, triton.cdiv(N, share)))](
        y, x, down.contiguous(), up.contiguous(), scale.contiguous(),
        scale if index is None else index.contiguous(), out, kept,
        T, A, N, K, rank, share, *y.stride()[:2], *x.stride()[:2],
        HAS_INDEX=index is not None, KEEP=keep, R=max(16, triton.next_power_of_2(rank)),
        **config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, kept
