"""Query-key norm and rotation on views of a joint projection, with the heads of Flux and DiT-XL."""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import axial_rope, qk_norm_rope


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs as diffusers' apply_rotary_emb does it: tables of full width, float32."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-b, a), -1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _case(batch: int, heads: int, side: int, dim: int, dtype: torch.dtype, norm: bool) -> Case:
    qkv = torch.randn(batch, side * side, 3, heads, dim).to(dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    weight = torch.rand(dim).to(dtype) if norm else None
    cos, sin = axial_rope(side, side, dim)
    wide = cos.repeat_interleave(2, 1), sin.repeat_interleave(2, 1)

    def eager() -> tuple[Tensor, Tensor]:
        qn, kn = q, k
        if weight is not None:
            qn, kn = (F.rms_norm(t, (dim,), weight, 1e-6) for t in (q, k))
        return _rotated(qn, *wide), _rotated(kn, *wide)

    dense = qkv[:, :, :2].contiguous()
    return Case(
        f"[{batch}, {heads}, {side * side}, {dim}] {str(dtype)[6:]}{' norm' if norm else ''}",
        lambda: qk_norm_rope(q, k, weight, weight, cos=cos, sin=sin),
        {"eager": eager, "copy of q and k": lambda: dense.clone()},
        bytes=2.0 * dense.numel() * dense.element_size(),
        target=2.0,
    )


def cases() -> list[Case]:
    shapes = [(1, 24, 32, 128), (2, 16, 16, 72)]
    dtypes = torch.float32, torch.bfloat16
    return [_case(*s, d, norm) for s in shapes for d in dtypes for norm in (True, False)]
