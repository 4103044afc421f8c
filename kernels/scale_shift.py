"""Triton kernels of scale_shift and its backward.

The backward takes pieces of positions, a program each, and leaves their sums in a buffer; programs
of rows and channels then add the pieces up in their order: no atomics, the same bits in every run.
A sample whose index is outside of 0 to A - 1 gives NaN and adds to no row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# OUTER: planes or positions of a program, INNER: elements that are neighbours in memory.
CONFIGS = [
    triton.Config({"OUTER": o, "INNER": i}, num_warps=w)
    for o, i, w in ((4, 512, 4), (8, 256, 4), (2, 1024, 8))
]


@triton.jit
def _rows_of(index_ptr, b, index_s, rows, live, HAS_INDEX: tl.constexpr):
    if HAS_INDEX:
        row = tl.load(index_ptr + b * index_s, mask=live, other=-1)
        row = tl.where((row >= 0) & (row < rows), row, -1)
    else:
        row = tl.zeros_like(b)
    return row


@triton.jit
def _channels(ptr, row, c, stride, mask):
    known = mask & (row >= 0)
    value = tl.load(ptr + row * stride + c, mask=known, other=0.0).to(tl.float32)
    return tl.where(known, value, float("nan"))


@triton.jit
def _scale_shift_kernel(
    x_ptr,  # [B, P, C], unit last stride; with PLANES [B, C, P], contiguous
    scale_ptr,  # [A, C], unit last stride
    shift_ptr,
    index_ptr,  # [B]
    out_ptr,  # contiguous
    outer,  # B * P, or B * C
    count,  # P, or C: of them in a sample
    inner,  # C, or P
    rows,  # A
    x_b, x_o, scale_s, shift_s, index_s,
    PLANES: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * OUTER + tl.arange(0, OUTER)  # int64: B * P * C
    i = tl.program_id(1) * INNER + tl.arange(0, INNER)
    live = o < outer
    b, n = o // count, o % count
    mask = live[:, None] & (i < inner)[None, :]
    row = _rows_of(index_ptr, b, index_s, rows, live, HAS_INDEX)[:, None]
    if PLANES:
        c, known = n[:, None], live[:, None]
    else:
        c, known = i[None, :], mask
    at = (b * x_b + n * x_o)[:, None] + i[None, :]
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y *= _channels(scale_ptr, row, c, scale_s, known)
    if HAS_SHIFT:
        y += _channels(shift_ptr, row, c, shift_s, known)
    to = o[:, None] * inner + i[None, :]
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_shift_backward_rows_kernel(
    grad_ptr,  # [B, P, C], unit last stride
    x_ptr,
    scale_ptr,  # [A, C], unit last stride
    index_ptr,  # [B]
    grad_x_ptr,  # [B, P, C], contiguous
    parts_ptr,  # float32 [B, pieces, 2, C]
    positions,  # P
    dim,  # C
    rows,  # A
    pieces,
    grad_b, grad_p, x_b, x_p, scale_s, index_s,
    HAS_INDEX: tl.constexpr,
    PIECE: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    b = task // pieces
    first = (task % pieces) * PIECE
    c = tl.program_id(1) * INNER + tl.arange(0, INNER)
    live = c < dim
    bs = b + tl.zeros([1], tl.int64)
    row = _rows_of(index_ptr, bs, index_s, rows, bs >= 0, HAS_INDEX)
    scale = _channels(scale_ptr, row, c, scale_s, live)[None, :]
    sum_gx, sum_g = tl.zeros([INNER], tl.float32), tl.zeros([INNER], tl.float32)
    for start in range(0, PIECE, OUTER):
        p = first + start + tl.arange(0, OUTER)
        mask = (p < positions)[:, None] & live[None, :]
        at = (b * grad_b + p * grad_p)[:, None] + c[None, :]
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = (b * x_b + p * x_p)[:, None] + c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        sum_gx += tl.sum(g * x, 0)
        sum_g += tl.sum(g, 0)
        to = (b * positions + p)[:, None] * dim + c[None, :]
        tl.store(grad_x_ptr + to, (g * scale).to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(parts_ptr + task * 2 * dim + c, sum_gx, mask=live)
    tl.store(parts_ptr + (task * 2 + 1) * dim + c, sum_g, mask=live)


@triton.jit
def _scale_shift_backward_planes_kernel(
    grad_ptr,  # [B, C, P], contiguous
    x_ptr,
    scale_ptr,  # [A, C], unit last stride
    index_ptr,  # [B]
    grad_x_ptr,  # [B, C, P], contiguous
    parts_ptr,  # float32 [B, pieces, 2, C]
    planes,  # B * C
    dim,  # C
    positions,  # P
    rows,  # A
    pieces,
    scale_s, index_s,
    HAS_INDEX: tl.constexpr,
    PIECE: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * OUTER + tl.arange(0, OUTER)
    live = o < planes
    b, c = o // dim, o % dim
    row = _rows_of(index_ptr, b, index_s, rows, live, HAS_INDEX)
    scale = _channels(scale_ptr, row, c, scale_s, live)[:, None]
    sum_gx, sum_g = tl.zeros([OUTER], tl.float32), tl.zeros([OUTER], tl.float32)
    for start in range(0, PIECE, INNER):
        p = tl.program_id(1) * PIECE + start + tl.arange(0, INNER)
        mask = live[:, None] & (p < positions)[None, :]
        at = o[:, None] * positions + p[None, :]
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        sum_gx += tl.sum(g * x, 1)
        sum_g += tl.sum(g, 1)
        tl.store(grad_x_ptr + at, (g * scale).to(grad_x_ptr.dtype.element_ty), mask=mask)
    to = (b * pieces + tl.program_id(1)) * 2 * dim + c
    tl.store(parts_ptr + to, sum_gx, mask=live)
    tl.store(parts_ptr + to + dim, sum_g, mask=live)


@triton.jit
def _scale_shift_add_parts_kernel(
    parts_ptr,  # float32 [B, pieces, 2, C]
    index_ptr,  # [B]
    out_ptr,  # float32 [2, A, C]
    batch,
    pieces,
    rows,  # A
    dim,  # C
    index_s,
    HAS_INDEX: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    which, row = task // rows, task % rows
    c = tl.program_id(1) * INNER + tl.arange(0, INNER)
    live = c < dim
    total = tl.zeros([INNER], tl.float32)
    for b in range(0, batch):
        mine = row
        if HAS_INDEX:
            mine = tl.load(index_ptr + b * index_s)
        if mine == row:
            for start in range(0, pieces, OUTER):
                n = start + tl.arange(0, OUTER)
                at = ((b * pieces + n).to(tl.int64) * 2 + which)[:, None] * dim + c[None, :]
                mask = (n < pieces)[:, None] & live[None, :]
                total += tl.sum(tl.load(parts_ptr + at, mask=mask, other=0.0), 0)
    tl.store(out_ptr + task * dim + c, total, mask=live)


def _order(x: Tensor, dim: int) -> str:
    """Where the channels of ``x`` are: in "rows", the last dimension; "inner", dimension 1 but
    innermost in memory; in "planes"."""
    if dim == -1 or x.dim() == 2:
        return "rows"
    dense = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return "inner" if dense else "planes"


def _place(t: Tensor, order: str) -> Tensor:
    """``[B, P, C]`` with unit last stride, or contiguous ``[B, C, P]`` of planes."""
    if order == "planes":
        return t.contiguous().flatten(2)
    t = t.movedim(1, -1) if order == "inner" else t
    t = t[:, None] if t.dim() == 2 else t.flatten(1, -2)
    return t if t.stride(-1) == 1 else t.contiguous()


def _back(out: Tensor, x: Tensor, order: str) -> Tensor:
    if order == "inner":
        return out.view(x.movedim(1, -1).shape).movedim(-1, 1)
    return out.view(x.shape)


def _rows(t: Tensor) -> Tensor:
    t = t[None] if t.dim() == 1 else t
    return t if t.stride(-1) == 1 else t.contiguous()


def scale_shift(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    index: Tensor | None,
    dim: int,
    *,
    config: triton.Config = CONFIGS[0],
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.scale_shift``."""
    if not x.numel():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    order = _order(x, dim)
    placed, planes = _place(x, order), order == "planes"
    out = torch.empty(placed.shape, dtype=x.dtype, device=x.device)
    (B, count, size), scale = placed.shape, _rows(scale)
    add = scale if shift is None else _rows(shift)
    which = x if index is None else index
    grid = (
        triton.cdiv(B * count, config.kwargs["OUTER"]),
        triton.cdiv(size, config.kwargs["INNER"]),
    )
    _scale_shift_kernel[grid](
        placed, scale, add, which, out, B * count, count, size, scale.shape[0],
        placed.stride(0), placed.stride(1), scale.stride(0), add.stride(0), which.stride(0),
        PLANES=planes, HAS_SHIFT=shift is not None, HAS_INDEX=index is not None,
        **config.kwargs, num_warps=config.num_warps,
    )  # fmt: skip
    return _back(out, x, order)


def scale_shift_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    index: Tensor | None,
    dim: int,
    *,
    config: triton.Config = CONFIGS[0],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on the current stream; shapes as in ``fastdiff.ops.scale_shift_backward``."""
    scale = _rows(scale)
    A, C = scale.shape
    how = dict(dtype=torch.float32, device=x.device)
    if not x.numel():
        sums = torch.zeros(2, A, C, **how)
        return torch.empty_like(x, memory_format=torch.contiguous_format), sums[0], sums[1]
    order = _order(x, dim)
    placed, g, planes = _place(x, order), _place(grad, order), order == "planes"
    B, P = placed.shape[0], placed.shape[2 if planes else 1]
    which = x if index is None else index
    outer, block = config.kwargs["OUTER"], config.kwargs["INNER"]
    piece = max(1024, block) if planes else 64
    pieces = triton.cdiv(P, piece)
    grad_x = torch.empty(placed.shape, dtype=x.dtype, device=x.device)
    parts, sums = torch.empty(B, pieces, 2, C, **how), torch.empty(2, A, C, **how)
    given = dict(HAS_INDEX=index is not None, **config.kwargs, num_warps=config.num_warps)
    if planes:
        _scale_shift_backward_planes_kernel[(triton.cdiv(B * C, outer), pieces)](
            g, placed, scale, which, grad_x, parts, B * C, C, P, A, pieces,
            scale.stride(0), which.stride(0), PIECE=piece, **given,
        )  # fmt: skip
    else:
        _scale_shift_backward_rows_kernel[(B * pieces, triton.cdiv(C, block))](
            g, placed, scale, which, grad_x, parts, P, C, A, pieces,
            g.stride(0), g.stride(1), placed.stride(0), placed.stride(1),
            scale.stride(0), which.stride(0), PIECE=piece, **given,
        )  # fmt: skip
    _scale_shift_add_parts_kernel[(2 * A, triton.cdiv(C, block))](
        parts, which, sums, B, pieces, A, C, which.stride(0), **given
    )
    return _back(grad_x, x, order), sums[0], sums[1]
