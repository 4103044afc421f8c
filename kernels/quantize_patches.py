"""Triton kernel of quantize_patches: a convolution's patches as int8 with one scale each.

A program takes ROWS pixels of the result, tap by tap, BLOCK channels at a time: once for the
largest values, once more for the integers, the second time from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.quantize import integers, most, scales

# Chosen by compiling (triton 3.9), not by timing: no call of fastdiff/gpu_cases.py spills registers
# on sm_80, sm_90, sm_100, sm_120 or gfx942.
CONFIGS = [
    triton.Config({"ROWS": 8, "BLOCK": 64}, num_warps=4),
    triton.Config({"ROWS": 2, "BLOCK": 512}, num_warps=4),
]


@triton.jit
def _tap(
    x_rows, top, left, live, tap, at, k, size, channels, height, width, x_h, x_w,
    UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """Channels from ``at`` on of one tap of every row, 0 outside of the picture."""
    h, w = top + tap // size, left + tap % size
    inside = live & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    if UPSAMPLE:
        h, w = h // 2, w // 2
    c = at + k
    x = tl.load(
        (x_rows + h * x_h + w * x_w)[:, None] + c[None, :],
        mask=inside[:, None] & (c < channels)[None, :],
        other=0.0,
    )
    return x.to(tl.float32)


@triton.jit
def _patches_kernel(
    x_ptr,  # [B, C, H, W], unit stride of channels
    q_ptr,  # [B, rows, columns, size, size, C], contiguous
    s_ptr,  # [B, rows, columns], contiguous
    count,  # B * rows * columns
    rows,
    columns,
    channels,
    height,  # of the picture, doubled where UPSAMPLE
    width,
    x_b,
    x_h,
    x_w,
    size,
    stride,
    padding,
    UPSAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: count * size^2 * C
    k = tl.arange(0, BLOCK)
    live = m < count
    x_rows = x_ptr + m // columns // rows * x_b
    top, left = m // columns % rows * stride - padding, m % columns * stride - padding
    q_rows = q_ptr + m * (size * size * channels)

    largest = tl.zeros((ROWS,), tl.float32)
    for tap in range(size * size):
        for at in range(0, channels, BLOCK):
            y = _tap(
                x_rows, top, left, live, tap, at, k, size, channels, height, width, x_h, x_w,
                UPSAMPLE,
            )  # fmt: skip
            largest = tl.maximum(largest, most(y))
    inverse, usable, scale = scales(largest, 127.0, 127.0 * 2.0**-126)
    tl.store(s_ptr + m, scale, mask=live)
    for tap in range(size * size):
        for at in range(0, channels, BLOCK):
            y = _tap(
                x_rows, top, left, live, tap, at, k, size, channels, height, width, x_h, x_w,
                UPSAMPLE,
            )  # fmt: skip
            tl.store(
                q_rows[:, None] + (tap * channels + at + k)[None, :],
                integers(y, inverse, usable, 127.0, tl.int8),
                mask=live[:, None] & (at + k < channels)[None, :],
            )


def quantize_patches(
    x: Tensor,
    size: int,
    stride: int,
    padding: int,
    upsample: bool,
    *,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; shapes as in ``fastdiff.ops.quantize_patches``."""
    x = x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)
    B, C, H, W = x.shape
    rows, columns = (((n << upsample) + 2 * padding - size) // stride + 1 for n in (H, W))
    q = torch.empty((B, rows, columns, size * size * C), dtype=torch.int8, device=x.device)
    s = torch.empty((B, rows, columns), dtype=torch.float32, device=x.device)
    if s.numel():
        config = config or next((c for c in CONFIGS if c.kwargs["BLOCK"] >= C), CONFIGS[-1])
        _patches_kernel[(triton.cdiv(s.numel(), config.kwargs["ROWS"]),)](
            x, q, s, s.numel(), rows, columns, C, H << upsample, W << upsample,
            x.stride(0), x.stride(2), x.stride(3), size, stride, padding,
            UPSAMPLE=upsample, **config.kwargs, num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return q, s
