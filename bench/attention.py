"""Attention at the shapes of DiT-XL/2, PixArt and Stable Diffusion: dense, with a bias per key or
by regions, and on a quarter of the query rows, against scaled_dot_product_attention."""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import GroupBias, attention

# (B, H, N, D): DiT-XL/2 at 512 px is D 72; SD 1.5 at 512 px has D 40 on its finest level.
SHAPES = ((2, 16, 1024, 64), (2, 24, 4096, 64), (1, 8, 4096, 40), (1, 16, 256, 72))
BIASED = (2, 16, 1024, 64)


def _qkv(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, dim = shape  # in memory [B, N, H, D], as projections leave them
    q, k, v = (torch.randn(batch, rows, heads, dim).to(dtype).transpose(1, 2) for _ in range(3))
    return q, k, v


def _flops(shape: tuple[int, ...]) -> float:
    batch, heads, rows, dim = shape
    return 4.0 * batch * heads * rows * rows * dim


def _dense() -> list[Case]:
    result = []
    for dtype, target in ((torch.float32, 1.15), (torch.bfloat16, 1.6)):
        for shape in SHAPES:
            q, k, v = _qkv(shape, dtype)
            result.append(
                Case(
                    f"dense {list(shape)} {str(dtype)[6:]}",
                    lambda q=q, k=k, v=v: attention(q, k, v),
                    {"eager": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)},
                    flops=_flops(shape),
                    target=target,
                )
            )
    return result


def _biased() -> list[Case]:
    batch, heads, rows, _ = BIASED
    q, k, v = _qkv(BIASED, torch.float32)
    per_key = torch.randn(batch, 1, rows)
    group = torch.randint(4, (1, rows))
    table = torch.randn(1, heads, 4, 4)
    regions = GroupBias(group, group, table)
    by_region = table[:, :, group[0]][..., group[0]]
    full = {
        "per key": per_key[:, :, None].expand(-1, -1, rows, -1).contiguous(),
        "4 x 4 regions": by_region.expand(batch, -1, -1, -1).contiguous(),
    }

    def sdpa(mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    result = []
    for name, bias in (("per key", per_key), ("4 x 4 regions", regions)):
        result.append(
            Case(
                f"bias {name} {list(BIASED)} float32",
                lambda b=bias: attention(q, k, v, bias=b),
                {
                    "eager": lambda m=full[name]: sdpa(m),
                    "ours, full bias": lambda m=full[name]: attention(q, k, v, bias=m),
                },
                flops=_flops(BIASED),
                target=1.2,
            )
        )
        result.append(  # a bias may cost 5 % of the dense time
            Case(
                f"bias {name} {list(BIASED)} float32, against no bias",
                lambda b=bias: attention(q, k, v, bias=b),
                {"ours, dense": lambda: attention(q, k, v)},
                target=1 / 1.05,
                vs="ours, dense",
                comparable=False,
            )
        )
    return result


def _rows() -> list[Case]:
    batch, heads, rows, dim = BIASED
    q, k, v = _qkv(BIASED, torch.float32)
    index = torch.stack([torch.randperm(rows)[: rows // 4].sort().values for _ in range(batch)])
    spread = index[:, None, :, None].expand(-1, heads, -1, dim)
    kept = torch.zeros_like(q)

    def fast() -> Tensor:
        return kept.scatter(2, spread, attention(q, k, v, q_index=index))

    def eager() -> Tensor:
        return kept.scatter(2, spread, F.scaled_dot_product_attention(q.gather(2, spread), k, v))

    return [
        Case(
            f"25% of the rows of {list(BIASED)} float32, with the scatter",
            fast,
            {"eager": eager},
            flops=_flops(BIASED) / 4,
            target=1.15,
        )
    ]


def cases() -> list[Case]:
    return _dense() + _biased() + _rows()
