"""Triton kernels of gather_tokens, scatter_tokens and update_tokens_: one program per ROWS rows.

Every element of an output is written by one program. A program of scatter_tokens reads its
sample's whole index and keeps, for each of its rows, the largest position that names it: the last
of several wins in any order of programs. An index outside of 0 to N - 1 names no row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [
    triton.Config({"ROWS": r, "CHUNK": c, "BLOCK": b}, num_warps=w)
    for r, c, b, w in ((4, 128, 512, 4), (16, 64, 256, 8), (2, 256, 1024, 4))
]


@triton.jit
def _gather_tokens_kernel(
    x_ptr,  # [B, N, D], unit last stride
    index_ptr,  # [B, A], unit last stride
    out_ptr,  # [B, A, D], contiguous
    rows,  # B * A
    tokens,  # N
    active,  # A
    dim,
    x_b,
    x_n,
    index_b,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: B * A * D
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    b = row // active
    n = tl.load(index_ptr + b * index_b + row % active, mask=live, other=-1)
    inside = (n >= 0) & (n < tokens)
    keep = d < dim
    at = b * x_b + n * x_n
    x = tl.load(x_ptr + at[:, None] + d[None, :], mask=inside[:, None] & keep[None, :], other=0.0)
    tl.store(out_ptr + row[:, None] * dim + d[None, :], x, mask=live[:, None] & keep[None, :])


@triton.jit
def _scatter_tokens_kernel(
    x_ptr,  # [B, N, D], unit last stride
    index_ptr,  # [B, A], unit last stride
    y_ptr,  # [B, A, D], unit last stride
    gate_ptr,  # [B, D] (a stride 0) or [B, A, D], unit last stride
    out_ptr,  # [B, N, D], contiguous
    tokens,  # N
    active,  # A
    dim,
    x_b, x_n, index_b, y_b, y_a, gate_b, gate_a,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    last = tl.full([ROWS], -1, tl.int64)
    for start in range(0, active, CHUNK):
        a = start + tl.arange(0, CHUNK)
        named = tl.load(index_ptr + b * index_b + a, mask=a < active, other=-1)
        found = tl.where(named[None, :] == n[:, None], a[None, :], -1)
        last = tl.maximum(last, tl.max(found, 1))
    live, hit = n < tokens, last >= 0
    x_at, y_at = b * x_b + n * x_n, b * y_b + last * y_a
    gate_at, out_at = b * gate_b + last * gate_a, (b * tokens + n) * dim
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        keep = live[:, None] & (d < dim)[None, :]
        update = keep & hit[:, None]
        y = tl.load(y_ptr + y_at[:, None] + d[None, :], mask=update, other=0.0)
        if GATED:
            x = tl.load(x_ptr + x_at[:, None] + d[None, :], mask=keep, other=0.0)
            gate = tl.load(gate_ptr + gate_at[:, None] + d[None, :], mask=update, other=0.0)
            sum = x.to(tl.float32) + gate.to(tl.float32) * y.to(tl.float32)
            out = tl.where(update, sum.to(x.dtype), x)
        else:
            x = tl.load(x_ptr + x_at[:, None] + d[None, :], mask=keep & ~update, other=0.0)
            out = tl.where(update, y, x)
        tl.store(out_ptr + out_at[:, None] + d[None, :], out, mask=keep)


@triton.jit
def _update_tokens_kernel(
    cache_ptr,  # [B, H, N, D], unit last stride; written in place
    index_ptr,  # [B, A], unit last stride
    y_ptr,  # [B, H, A, D], unit last stride
    tokens,  # N
    active,  # A
    dim,
    heads,  # H
    cache_b, cache_h, cache_n, index_b, y_b, y_h, y_a,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    n = tl.load(index_ptr + b * index_b + a, mask=a < active, other=-1)
    later = tl.zeros([ROWS], tl.int32)  # a row after this one has its place, and counts
    for start in range(0, active, CHUNK):
        i = start + tl.arange(0, CHUNK)
        named = tl.load(index_ptr + b * index_b + i, mask=i < active, other=-1)
        same = (named[None, :] == n[:, None]) & (i[None, :] > a[:, None])
        later = tl.maximum(later, tl.max(same.to(tl.int32), 1))
    live = (n >= 0) & (n < tokens) & (later == 0)
    y_at = b * y_b + h * y_h + a.to(tl.int64) * y_a
    cache_at = b * cache_b + h * cache_h + n * cache_n
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        keep = live[:, None] & (d < dim)[None, :]
        y = tl.load(y_ptr + y_at[:, None] + d[None, :], mask=keep, other=0.0)
        tl.store(cache_ptr + cache_at[:, None] + d[None, :], y, mask=keep)


def _unit_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def gather_tokens(x: Tensor, index: Tensor, *, config: triton.Config = CONFIGS[0]) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.gather_tokens``."""
    (B, N, D), A = x.shape, index.shape[1]
    x, index = _unit_last(x), _unit_last(index)
    out = torch.empty(B, A, D, dtype=x.dtype, device=x.device)
    if out.numel():
        rows, block = config.kwargs["ROWS"], config.kwargs["BLOCK"]
        _gather_tokens_kernel[(triton.cdiv(B * A, rows), triton.cdiv(D, block))](
            x, index, out, B * A, N, A, D, *x.stride()[:2], index.stride(0),
            ROWS=rows, BLOCK=block, num_warps=config.num_warps,
        )  # fmt: skip
    return out


def scatter_tokens(
    x: Tensor,
    index: Tensor,
    y: Tensor,
    gate: Tensor | None,
    *,
    config: triton.Config = CONFIGS[0],
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.scatter_tokens``."""
    (B, N, D), A = x.shape, index.shape[1]
    x, index, y = _unit_last(x), _unit_last(index), _unit_last(y)
    gates = y if gate is None else _unit_last(gate)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        _scatter_tokens_kernel[(triton.cdiv(N, config.kwargs["ROWS"]), B)](
            x, index, y, gates, out, N, A, D,
            *x.stride()[:2], index.stride(0), *y.stride()[:2],
            gates.stride(0), gates.stride(1) if gates.dim() == 3 else 0,
            GATED=gate is not None, **config.kwargs, num_warps=config.num_warps,
        )  # fmt: skip
    return out


def update_tokens_(
    cache: Tensor, index: Tensor, y: Tensor, *, config: triton.Config = CONFIGS[0]
) -> None:
    """Launch on the current stream; shapes as in ``fastdiff.ops.update_tokens_``."""
    if not y.numel():
        return
    index, y = _unit_last(index), _unit_last(y)
    if cache.dim() == 3:
        cache, y = cache[:, None], y[:, None]
    (B, H, N, D), A = cache.shape, index.shape[1]
    _update_tokens_kernel[(triton.cdiv(A, config.kwargs["ROWS"]), B * H)](
        cache, index, y, N, A, D, H,
        *cache.stride()[:3], index.stride(0), *y.stride()[:3],
        **config.kwargs, num_warps=config.num_warps,
    )  # fmt: skip
