"""Triton kernels of sparse_weight_grad and sparse_conv2d_weight_grad: entries of grad^T x.

A program owns a tile of the dense product, BLOCK_M rows of the weight by BLOCK_N columns. It first
searches the columns of its rows, all rows at once, for the entries that lie in the tile, and leaves
where there are none. Else it forms the tile on tensor cores, its sums in float32, and picks the
entries of every row from them, BLOCK_E at a time: the dense gradient is written nowhere. An entry
lies in one tile, and is written once.

Both factors are read as often as there are tiles beside one another. Of a convolution a row of x
for a token (b, ho, wo) is what its window shows: the loads of x are the im2col.

Values are not checked, for that would need a sync: rows that begin outside of the entries end with
them, and a column outside of the weight is in no tile, so that its value is undefined.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# BLOCK_K: tokens at a time. Chosen by compiling (triton 3.9), not by timing: no call of
# fastdiff/gpu_cases.py spills registers on sm_80, sm_90, sm_100, sm_120 or gfx942, or has a block
# above 64 KiB of shared memory. The first two are for 16 bits: tensor cores have no float32.
CONFIGS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=4, num_stages=2),
]
_ENTRIES = 16  # BLOCK_E


def _config(rows: int, columns: int, dtype: torch.dtype) -> triton.Config:
    if dtype == torch.float32:
        return CONFIGS[2]
    return CONFIGS[0 if rows * columns > 512 * 512 else 1]


@triton.jit
def _first(col_ptr, low, high, column, steps):
    """For every row the first entry from ``low`` to ``high`` at or past ``column``."""
    for _ in range(steps):
        middle = low + (high - low) // 2
        at = tl.load(col_ptr + middle, mask=low < high, other=0)
        below = (low < high) & (at < column)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def _entries(
    crow_ptr, col_ptr, row, live, first, past, nnz, steps, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """Of every row of the tile its entries (blocks) with columns from ``first`` to ``past``."""
    block = row // BLOCK_ROWS
    low = tl.load(crow_ptr + block, mask=live, other=0)
    high = tl.load(crow_ptr + block + 1, mask=live, other=0)
    low = tl.minimum(tl.maximum(low, 0), nnz)
    high = tl.maximum(tl.minimum(high, nnz), low)
    low = _first(col_ptr, low, high, first, steps)
    return low, _first(col_ptr, low, high, past, steps)


@triton.jit
def _write(
    acc, out_ptr, col_ptr, row, low, high, column,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The entries ``low`` to ``high`` of every row, from the tile whose first column that is."""
    at = low.to(tl.int64) * BLOCK_COLS
    end = high.to(tl.int64) * BLOCK_COLS
    most = tl.max(end - at, 0)
    step = tl.arange(0, BLOCK_E)
    for e in range(0, most, BLOCK_E):
        here = (at + e)[:, None] + step[None, :]
        block = here // BLOCK_COLS
        inside = here < end[:, None]
        c = tl.load(col_ptr + block, mask=inside, other=0) * BLOCK_COLS
        c += (here % BLOCK_COLS).to(tl.int32) - column
        inside &= (c >= 0) & (c < BLOCK_N)
        value = tl.gather(acc, tl.where(inside, c, 0), 1)
        place = (block * BLOCK_ROWS + (row % BLOCK_ROWS)[:, None]) * BLOCK_COLS
        tl.store(out_ptr + place + here % BLOCK_COLS, value, mask=inside)


@triton.jit
def _sparse_weight_grad_kernel(
    grad_ptr,  # [T, O], unit last stride
    x_ptr,  # [T, I], unit last stride
    crow_ptr,  # [O / BLOCK_ROWS + 1]
    col_ptr,  # [nnz]
    out_ptr,  # [nnz, BLOCK_ROWS, BLOCK_COLS], contiguous
    tokens,  # T
    rows,  # O
    columns,  # I
    nnz,
    steps,  # of a search
    grad_t,
    x_t,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK_N)
    row = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % across * BLOCK_N
    live = row < rows
    past = tl.cdiv(tl.minimum(column + BLOCK_N, columns), BLOCK_COLS)
    low, high = _entries(
        crow_ptr, col_ptr, row, live, column // BLOCK_COLS, past, nnz, steps, BLOCK_ROWS
    )
    if tl.max(high - low, 0) == 0:
        return

    n = column + tl.arange(0, BLOCK_N)
    in_n = n < columns
    t = tl.arange(0, BLOCK_K)
    grad_tile = grad_ptr + row[:, None] + t[None, :].to(tl.int64) * grad_t
    x_tile = x_ptr + n[None, :] + t[:, None].to(tl.int64) * x_t
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, tokens, BLOCK_K):
        here = at + t < tokens
        g = tl.load(grad_tile, mask=live[:, None] & here[None, :], other=0.0)
        x = tl.load(x_tile, mask=here[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(g, x, acc, input_precision="ieee")
        grad_tile += BLOCK_K * grad_t
        x_tile += BLOCK_K * x_t
    _write(acc, out_ptr, col_ptr, row, low, high, column, BLOCK_ROWS, BLOCK_COLS, BLOCK_N, BLOCK_E)


@triton.jit
def _sparse_conv2d_weight_grad_kernel(
    grad_ptr,  # [B, O, Ho, Wo], any strides
    x_ptr,  # [B, C, H, W], any strides
    crow_ptr,  # [O + 1]
    col_ptr,  # [nnz]
    out_ptr,  # [nnz]
    tokens,  # B Ho Wo
    rows,  # O
    columns,  # C kh kw
    nnz,
    steps,
    Ho, Wo, H, W,
    grad_b, grad_o, grad_h, grad_w,
    x_b, x_c, x_h, x_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, BLOCK_N)
    row = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % across * BLOCK_N
    live = row < rows
    past = tl.minimum(column + BLOCK_N, columns)
    low, high = _entries(crow_ptr, col_ptr, row, live, column, past, nnz, steps, 1)
    if tl.max(high - low, 0) == 0:
        return

    n = column + tl.arange(0, BLOCK_N)
    in_n = n < columns
    down = n // KW % KH * dilation_h - padding_h
    right = n % KW * dilation_w - padding_w
    x_n = (n // (KH * KW)).to(tl.int64) * x_c + down * x_h + right * x_w
    grad_m = row.to(tl.int64) * grad_o
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, tokens, BLOCK_K):
        t = at + tl.arange(0, BLOCK_K)
        here = t < tokens
        b, h, w = (t // (Ho * Wo)).to(tl.int64), t // Wo % Ho, t % Wo
        g = tl.load(
            grad_ptr + grad_m[:, None] + (b * grad_b + h * grad_h + w * grad_w)[None, :],
            mask=live[:, None] & here[None, :],
            other=0.0,
        )
        h, w = h * stride_h, w * stride_w
        of_h, of_w = h[:, None] + down[None, :], w[:, None] + right[None, :]
        seen = (of_h >= 0) & (of_h < H) & (of_w >= 0) & (of_w < W)
        x = tl.load(
            x_ptr + (b * x_b + h * x_h + w * x_w)[:, None] + x_n[None, :],
            mask=seen & here[:, None] & in_n[None, :],
            other=0.0,
        )
        acc = tl.dot(g, x, acc, input_precision="ieee")
    _write(acc, out_ptr, col_ptr, row, low, high, column, 1, 1, BLOCK_N, BLOCK_E)


def _unit_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _grid(rows: int, columns: int, config: triton.Config) -> tuple[int]:
    down = triton.cdiv(rows, config.kwargs["BLOCK_M"])
    return (down * triton.cdiv(columns, config.kwargs["BLOCK_N"]),)


def sparse_weight_grad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    block_rows: int,
    block_cols: int,
    *,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.sparse_grad``."""
    (T, O), I, nnz = grad.shape, x.shape[1], col.shape[0]
    single = block_rows == block_cols == 1
    shape = (nnz,) if single else (nnz, block_rows, block_cols)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    if out.numel():
        grad, x = _unit_last(grad), _unit_last(x)
        config = config or _config(O, I, x.dtype)
        _sparse_weight_grad_kernel[_grid(O, I, config)](
            grad, x, crow.contiguous(), col.contiguous(), out, T, O, I, nnz,
            (I // block_cols).bit_length(), grad.stride(0), x.stride(0),
            BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, BLOCK_E=_ENTRIES, **config.kwargs,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


def sparse_conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.sparse_grad``."""
    (B, O, Ho, Wo), (C, H, W), nnz = grad.shape, x.shape[1:], col.shape[0]
    out = torch.empty(nnz, dtype=torch.float32, device=x.device)
    if nnz:
        columns = C * kernel[0] * kernel[1]
        config = config or _config(O, columns, x.dtype)
        _sparse_conv2d_weight_grad_kernel[_grid(O, columns, config)](
            grad, x, crow.contiguous(), col.contiguous(), out, B * Ho * Wo, O, columns, nnz,
            columns.bit_length(), Ho, Wo, H, W, *grad.stride(), *x.stride(),
            *stride, *padding, *dilation,
            KH=kernel[0], KW=kernel[1], BLOCK_E=_ENTRIES, **config.kwargs,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
