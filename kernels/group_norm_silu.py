"""Triton kernels of group_norm_silu, for both memory layouts: x is read twice and y written once.

``_group_moments_kernel``: one program per group and piece of its positions walks tiles of all the
group's channels by TILE_P positions, measures each in two passes over registers and merges them
(Chan, Golub & LeVeque 1983). ``_group_norm_silu_kernel``: one program per tile of any channels
by positions, wide along the dimension that is contiguous; it merges the pieces of its channels'
groups. Both compute relative to the group's first element, so mean >> deviation stays exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((2048, 4), (8192, 8))]
PIECE = 32768  # elements of one program of the first kernel
MAX_PIECES = 32  # of a group: the second kernel merges them one by one


@triton.jit
def _group_moments_kernel(
    x_ptr,  # [B, C, P], strides x_b, x_c, x_p
    moments_ptr,  # [B * groups, pieces, 2] float32: mean and sum of squared deviations
    positions,  # P
    groups,
    per_group,  # C / groups
    piece,  # positions
    pieces,
    x_b, x_c, x_p,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    i = tl.program_id(1)
    # int64 offsets: B * C * P passes 2**31 for video latents
    base = x_ptr + (g // groups).to(tl.int64) * x_b + (g % groups).to(tl.int64) * per_group * x_c
    origin = tl.load(base).to(tl.float32)
    c = tl.arange(0, TILE_C).to(tl.int64)
    at_p = tl.arange(0, TILE_P)
    stop = tl.minimum((i + 1) * piece, positions)
    n = 0.0
    mean = 0.0
    m2 = 0.0
    for start in range(i * piece, stop, TILE_P):
        p = (start + at_p).to(tl.int64)
        live = (c < per_group)[:, None] & (p < stop)[None, :]
        e = tl.load(base + c[:, None] * x_c + p[None, :] * x_p, mask=live, other=0.0)
        e = tl.where(live, e.to(tl.float32) - origin, 0.0)
        count = (tl.minimum(stop - start, TILE_P) * per_group).to(tl.float32)
        m = tl.sum(tl.sum(e, 1), 0) / count
        d = tl.where(live, e - m, 0.0)
        delta = m - mean
        total = n + count
        m2 += tl.sum(tl.sum(d * d, 1), 0) + delta * delta * (n * count / total)
        mean += delta * (count / total)
        n = total
    at = (g.to(tl.int64) * pieces + i) * 2
    tl.store(moments_ptr + at, mean)
    tl.store(moments_ptr + at + 1, m2)


@triton.jit
def _group_norm_silu_kernel(
    x_ptr,  # [B, C, P], strides x_b, x_c, x_p
    moments_ptr,  # [B * groups, pieces, 2] float32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    shift_ptr,  # [B, C], unit last stride
    scale_ptr,  # [B, C], unit last stride
    y_ptr,  # [B, C, P], strides y_b, y_c, y_p
    channels,  # C
    positions,  # P
    groups,
    per_group,
    piece,
    pieces,
    eps,
    x_b, x_c, x_p, y_b, y_c, y_p, shift_b, scale_b,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SILU: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(channels, TILE_C)  # one grid axis: the others end at 65535 tiles
    tiles_p = tl.cdiv(positions, TILE_P)
    tile = tl.program_id(0) // tiles_p
    b = (tile // tiles_c).to(tl.int64)
    c = ((tile % tiles_c) * TILE_C + tl.arange(0, TILE_C)).to(tl.int64)
    p = ((tl.program_id(0) % tiles_p) * TILE_P + tl.arange(0, TILE_P)).to(tl.int64)
    live_c = c < channels
    live = live_c[:, None] & (p < positions)[None, :]
    group = tl.where(live_c, c, 0) // per_group

    n = 0.0
    mean = tl.zeros([TILE_C], tl.float32)
    m2 = tl.zeros([TILE_C], tl.float32)
    for i in range(0, pieces):
        at = ((b * groups + group) * pieces + i) * 2
        count = (tl.minimum(positions - i * piece, piece) * per_group).to(tl.float32)
        delta = tl.load(moments_ptr + at) - mean
        total = n + count
        m2 += tl.load(moments_ptr + at + 1) + delta * delta * (n * count / total)
        mean += delta * (count / total)
        n = total
    mul = 1.0 / tl.sqrt(m2 / n + eps)
    if HAS_WEIGHT:
        mul *= tl.load(weight_ptr + c, mask=live_c, other=0.0).to(tl.float32)
    add = tl.zeros([TILE_C], tl.float32)
    if HAS_BIAS:
        add += tl.load(bias_ptr + c, mask=live_c, other=0.0).to(tl.float32)
    if HAS_SCALE:
        gain = 1.0 + tl.load(scale_ptr + b * scale_b + c, mask=live_c, other=0.0).to(tl.float32)
        mul *= gain
        add *= gain
    if HAS_SHIFT:
        add += tl.load(shift_ptr + b * shift_b + c, mask=live_c, other=0.0).to(tl.float32)

    origin = tl.load(x_ptr + b * x_b + group * per_group * x_c).to(tl.float32)
    x = tl.load(x_ptr + b * x_b + c[:, None] * x_c + p[None, :] * x_p, mask=live, other=0.0)
    u = ((x.to(tl.float32) - origin[:, None]) - mean[:, None]) * mul[:, None] + add[:, None]
    if SILU:
        u *= tl.sigmoid(u)
    to = y_ptr + b * y_b + c[:, None] * y_c + p[None, :] * y_p
    tl.store(to, u.to(y_ptr.dtype.element_ty), mask=live)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    silu: bool,
    *,
    config: triton.Config = CONFIGS[0],
) -> Tensor:
    """Launch on the current stream; shapes and layouts as in ``fastdiff.ops.group_norm_silu``."""
    B, C = x.shape[:2]
    channels_last = x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    if channels_last:
        flat = x.movedim(1, -1).reshape(B, -1, C).mT if x.numel() else x
        y = torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format)
        out, y = y.movedim(-1, 1), y.view(B, -1, C).mT if x.numel() else y
    else:
        flat = x.reshape(B, C, -1).contiguous() if x.numel() else x
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        y = out.view(B, C, -1) if x.numel() else out
    if x.numel() == 0:
        return out
    P, per_group = flat.shape[2], C // num_groups
    pieces = min(MAX_PIECES, triton.cdiv(P * per_group, PIECE), P)
    piece = triton.cdiv(triton.cdiv(P, pieces), 16) * 16  # keeps a tile's loads 16-byte ones
    pieces = triton.cdiv(P, piece)
    moments = torch.empty(B * num_groups, pieces, 2, dtype=torch.float32, device=x.device)
    block, wide = config.kwargs["BLOCK"], triton.next_power_of_2
    tile_c = wide(per_group)
    _group_moments_kernel[(B * num_groups, pieces)](
        flat, moments, P, num_groups, per_group, piece, pieces, *flat.stride(),
        TILE_C=tile_c, TILE_P=max(1, min(block // tile_c, wide(piece))), num_warps=config.num_warps,
    )  # fmt: skip
    if channels_last:
        tile_c = min(block, wide(C))
        tile_p = min(block // tile_c, wide(P))
    else:
        tile_p = min(block, wide(P))
        tile_c = min(block // tile_p, wide(C))
    parts = [x if t is None else t if t.stride(-1) == 1 else t.contiguous()
             for t in (weight, bias, shift, scale)]  # fmt: skip
    _group_norm_silu_kernel[(B * triton.cdiv(C, tile_c) * triton.cdiv(P, tile_p),)](
        flat, moments, *parts, y, C, P, num_groups, per_group, piece, pieces, eps,
        *flat.stride(), *y.stride(), parts[2].stride(0), parts[3].stride(0),
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        HAS_SHIFT=shift is not None, HAS_SCALE=scale is not None, SILU=silu,
        TILE_C=tile_c, TILE_P=tile_p, num_warps=config.num_warps,
    )  # fmt: skip
    return out
