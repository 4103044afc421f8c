"""Triton kernel of qk_norm_rope: one program per TOKENS tokens of one head, all channels at once.

The partner channel of each pair is a second load, which the first has brought into L1; a token's
cos and sin come from L2 for all heads but one. Values are not checked, for that would need a sync:
a position out of range reads nothing and gives NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [triton.Config({"TOKENS": t}, num_warps=w) for t, w in ((16, 4), (4, 2), (32, 8))]


@triton.jit
def _qk_norm_rope_kernel(
    x_ptr,  # [B, H, S, D], unit last stride
    y_ptr,  # [B, H, S, D], unit last stride
    weight_ptr,  # [D]
    cos_ptr,  # [P, R/2], contiguous
    sin_ptr,  # [P, R/2], contiguous
    position_ptr,  # [B|1, S], contiguous
    length,  # S
    positions,  # P
    dim,  # D
    half,  # R/2
    x_b, x_h, x_s,
    y_b, y_h, y_s,
    position_b,  # 0 where broadcast
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    token = s < length
    keep = token[:, None] & (d < dim)[None, :]
    x_ptr += batch * x_b + head * x_h + s[:, None] * x_s
    y_ptr += batch * y_b + head * y_h + s[:, None] * y_s
    y = tl.load(x_ptr + d[None, :], mask=keep, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        scale = tl.rsqrt(tl.sum(y * y, 1) / dim + eps)[:, None]
        weight = tl.load(weight_ptr + d, mask=d < dim, other=0.0).to(tl.float32)
        y = y * scale * weight[None, :]
    if HAS_ROPE:
        turns = d < 2 * half
        if INTERLEAVED:
            first, partner, pair = d % 2 == 0, d ^ 1, d // 2
        else:
            first = d < half
            partner, pair = tl.where(first, d + half, d - half), tl.where(first, d, d - half)
        both = token[:, None] & turns[None, :]
        other = tl.load(x_ptr + partner[None, :], mask=both, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + partner, mask=turns, other=0.0).to(tl.float32)
            other = other * scale * weight[None, :]
        p = s
        if HAS_POSITION:
            p = tl.load(position_ptr + batch * position_b + s, mask=token, other=0)
        both = both & ((p >= 0) & (p < positions))[:, None]
        at = p[:, None] * half + pair[None, :]
        cos = tl.load(cos_ptr + at, mask=both, other=float("nan"))
        sin = tl.load(sin_ptr + at, mask=both, other=float("nan"))
        turned = y * cos + tl.where(first[None, :], -other, other) * sin
        y = tl.where(turns[None, :], turned, y)
    tl.store(y_ptr + d[None, :], y.to(y_ptr.dtype.element_ty), mask=keep)


def _one(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    eps: float,
    interleaved: bool,
    config: triton.Config,
) -> Tensor:
    batch, heads, length, dim = x.shape
    if x.stride(1) < x.stride(2):  # heads inside tokens in memory: so in the result
        y = x.new_empty(batch, length, heads, dim).transpose(1, 2)
    else:
        y = x.new_empty(x.shape)
    if x.stride(3) != 1:
        x = x.contiguous()
    if y.numel():
        grid = (triton.cdiv(length, config.kwargs["TOKENS"]), heads, batch)
        _qk_norm_rope_kernel[grid](
            x, y, x if weight is None else weight.contiguous(),
            x if cos is None else cos, x if sin is None else sin,
            x if position is None else position,
            length, 0 if cos is None else cos.shape[0], dim, 0 if cos is None else cos.shape[1],
            *x.stride()[:3], *y.stride()[:3],
            0 if position is None or position.shape[0] == 1 else length, eps,
            HAS_WEIGHT=weight is not None, HAS_POSITION=position is not None,
            HAS_ROPE=cos is not None, INTERLEAVED=interleaved,
            BLOCK_D=triton.next_power_of_2(dim), **config.kwargs, num_warps=config.num_warps,
        )  # fmt: skip
    return y


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    eps: float,
    interleaved: bool,
    *,
    config: triton.Config = CONFIGS[0],
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; shapes as in ``fastdiff.ops.qk_norm_rope``."""
    cos, sin, position = (None if t is None else t.contiguous() for t in (cos, sin, position))
    rest = cos, sin, position, eps, interleaved, config
    return _one(q, q_weight, *rest), _one(k, k_weight, *rest)
