"""A quarter of the tokens taken out and put back, at DiT-XL/2's and SDXL's widths, against torch's
gather, scatter and indexing, and against index_select and index_copy of flattened rows."""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor

from fastdiff.ops import gather_tokens, scatter_tokens, update_tokens_

SHAPES = ((2, 1024, 1152), (2, 4096, 640))


def _gather(shape: tuple[int, int, int], x: Tensor, index: Tensor, what: str) -> Case:
    spread = index[:, :, None].expand(-1, -1, shape[2])
    sample = torch.arange(shape[0])[:, None]

    def flat() -> Tensor:
        place = (index + sample * shape[1]).flatten()
        return x.flatten(0, 1).index_select(0, place).view(spread.shape)

    return Case(
        f"gather_tokens {what}",
        lambda: gather_tokens(x, index),
        {
            "eager": lambda: x.gather(1, spread),
            "indexing": lambda: x[sample, index],
            "index_select": flat,
        },
        bytes=2.0 * index.numel() * shape[2] * x.element_size(),
        target=1.2,
    )


def _scatter(shape: tuple[int, int, int], x: Tensor, index: Tensor, what: str) -> list[Case]:
    spread = index[:, :, None].expand(-1, -1, shape[2])
    sample = torch.arange(shape[0])[:, None]
    y = torch.randn(spread.shape).to(x.dtype)
    gate = torch.randn(shape[0], shape[2]).to(x.dtype)
    size = float(x.numel() * x.element_size())

    def flat() -> Tensor:
        place = (index + sample * shape[1]).flatten()
        return x.flatten(0, 1).index_copy(0, place, y.flatten(0, 1)).view(shape)

    return [
        Case(
            f"scatter_tokens {what}",
            lambda: scatter_tokens(x, index, y),
            {
                "eager": lambda: x.scatter(1, spread, y),
                "index_put": lambda: x.index_put((sample, index), y),
                "index_copy": flat,
                "copy of x": lambda: x.clone(),
            },
            bytes=2 * size,
            target=1.2,
        ),
        Case(
            f"scatter_tokens with a gate {what}",
            lambda: scatter_tokens(x, index, y, gate),
            {
                "eager": lambda: x.scatter_add(1, spread, gate[:, None] * y),
                "index_put": lambda: x.index_put((sample, index), gate[:, None] * y, True),
                "copy of x": lambda: x.clone(),
            },
            bytes=2 * size + 2.0 * y.numel() * y.element_size(),
            target=1.2,
        ),
    ]


def _update(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """Keys of heads of 64 inside tokens, in place."""
    batch, tokens, width = shape
    cache = torch.randn(batch, tokens, width // 64, 64).to(dtype).transpose(1, 2)
    index = torch.rand(batch, tokens).argsort(1)[:, : tokens // 4].sort(1).values
    y = torch.randn(batch, tokens // 4, width // 64, 64).to(dtype).transpose(1, 2)
    spread = index[:, None, :, None].expand(y.shape)
    flat = cache.transpose(1, 2).view(batch * tokens, width)
    rows = y.transpose(1, 2).reshape(-1, width)
    place = (index + torch.arange(batch)[:, None] * tokens).flatten()
    return Case(
        f"update_tokens_ 25% of {list(shape)} {str(dtype)[6:]}",
        lambda: update_tokens_(cache, index, y),
        {
            "eager": lambda: cache.scatter_(2, spread, y),
            "index_copy": lambda: flat.index_copy_(0, place, rows),
            "copy of y": lambda: y.clone(),
        },
        bytes=2.0 * y.numel() * y.element_size(),
        target=1.2,
    )


def cases() -> list[Case]:
    result = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            result.append(_update(shape, dtype))
            x = torch.randn(shape).to(dtype)
            index = torch.rand(shape[:2]).argsort(1)[:, : shape[1] // 4].sort(1).values
            what = f"25% of {list(shape)} {str(dtype)[6:]}"
            result.append(_gather(shape, x, index, what))
            result += _scatter(shape, x, index, what)
    return result
