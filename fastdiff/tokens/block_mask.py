r"""Block-sparse attention without training: which blocks of keys matter is read from calibration.

Queries and keys are cut into blocks of 64. For every head and block of queries the share of softmax
mass that falls on each block of keys, averaged over the rows and the calibration inputs,

    p[h, i, j] = mean over rows r of block i of  sum over keys t of block j of  softmax(s q_r . k)_t

is added up from the largest on; the fewest blocks that reach ``keep`` stay, and the diagonal one.
Attention then runs on the gathered blocks: its cost follows their number. (The attention maps of
diffusion transformers are alike from step to step and from prompt to prompt; Sparse VideoGen, Xi et
al. 2025, arXiv:2502.01776, section 3, profiles them likewise.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.cache._check import number, whole

BLOCK = 64  # rows of a block: a tile of the attention kernels


class BlockMask(NamedTuple):
    """Blocks of keys for every head and block of queries; the same for all samples.

    Attributes:
        blocks: int64 ``[H, S/64, m]``, ascending, then repeats of the last.
        counts: int64 ``[H, S/64]``, how many of the m are meant.
        keys: T, the keys that it was made for.
    """

    blocks: Tensor
    counts: Tensor
    keys: int

    @property
    def share(self) -> float:
        """Of the blocks that stay."""
        return float(self.counts.sum()) / (self.counts.numel() * -(-self.keys // BLOCK))


def _blocks(x: Tensor) -> Tensor:
    """``[..., N, D] -> [..., N/64, 64, D]``, the last block filled up with zeros."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % BLOCK))
    return x.unflatten(-2, (-1, BLOCK))


def block_mass(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """p above, float32 ``[H, S/64, T/64]``, of q ``[B, H, S, D]`` and k ``[B, H, T, D]``.

    A head and block of queries at a time: S x T is never laid out.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
    mass = q.new_zeros(heads, -(-rows // BLOCK), -(-keys // BLOCK), dtype=torch.float32)
    for h in range(heads):
        for i in range(mass.shape[1]):
            part = q[:, h, i * BLOCK : (i + 1) * BLOCK].float()
            p = (scale * part @ k[:, h].float().mT).softmax(-1).mean((0, 1))
            mass[h, i] = F.pad(p, (0, -keys % BLOCK)).unflatten(0, (-1, BLOCK)).sum(1)
    return mass


def calibrate_block_mask(mass: Tensor, keys: int, keep: float = 0.95) -> BlockMask:
    """The blocks that hold ``keep`` of the mass.

    Args:
        mass: of :func:`block_mass`; of several inputs their mean.
        keys: T.
        keep: share of the mass, 0 to 1; at 1 all blocks stay.

    Raises:
        ValueError: ``mass`` does not fit ``keys``, or ``keep`` is no share.
    """
    number("calibrate_block_mask", "keep", keep, 0, 1, "a number from 0 to 1")
    whole("calibrate_block_mask", "keys", keys, 1)
    blocks = -(-keys // BLOCK)
    if mass.dim() != 3 or mass.shape[2] != blocks:
        raise ValueError(
            f"calibrate_block_mask: mass is {list(mass.shape)}, "
            f"need [heads, query blocks, {blocks}]"
        )
    ordered, order = mass.sort(dim=2, descending=True, stable=True)
    before = ordered.cumsum(2) - ordered
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    chosen.scatter_(2, order, before < keep if keep < 1 else torch.ones_like(chosen))
    diagonal = torch.arange(mass.shape[1], device=mass.device).clamp(max=blocks - 1)
    chosen[:, torch.arange(mass.shape[1], device=mass.device), diagonal] = True
    counts = chosen.sum(2)
    most = int(counts.max())
    first = chosen.byte().sort(dim=2, descending=True, stable=True).indices[..., :most]
    last = first.gather(2, counts[..., None] - 1)
    place = torch.arange(most, device=mass.device)
    return BlockMask(torch.where(place < counts[..., None], first, last), counts, keys)


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **how: Any) -> Tensor:
    """Attention over the blocks of keys that stay.

    Args:
        q, k, v: ``[B, H, S, D]``, ``[B, H, T, D]`` twice.
        mask: for H heads, S rows and T keys.
        how: ``scale`` and ``impl`` of :func:`fastdiff.ops.attention`.

    Returns:
        ``[B, H, S, D]``, the dtype of q.

    Raises:
        ValueError: ``mask`` was made for other sizes.
    """
    batch, heads, rows, dim = q.shape
    need = heads, -(-rows // BLOCK)
    if tuple(mask.blocks.shape[:2]) != need or k.shape[2] != mask.keys:
        raise ValueError(
            f"block_attention: mask is of {list(mask.blocks.shape[:2])} heads and blocks and "
            f"{mask.keys} keys, need {list(need)} and {k.shape[2]}"
        )
    most = mask.blocks.shape[2]
    head = torch.arange(heads, device=q.device)[:, None, None]
    # [B, H, query blocks, m, 64, D]: a copy of m / T of the keys for 64 rows that read them
    keys, values = (_blocks(t)[:, head, mask.blocks].flatten(3, 4) for t in (k, v))
    lengths = mask.counts * BLOCK
    ends = mask.blocks.gather(2, mask.counts[..., None] - 1)[..., 0] == -(-mask.keys // BLOCK) - 1
    lengths = lengths - ends * (-mask.keys % BLOCK)
    out: Any = ops.attention(
        _blocks(q).reshape(-1, 1, BLOCK, dim),
        keys.reshape(-1, 1, most * BLOCK, dim),
        values.reshape(-1, 1, most * BLOCK, dim),
        key_lengths=lengths.expand(batch, -1, -1).reshape(-1),
        scale=dim**-0.5 if how.get("scale") is None else how["scale"],
        impl=how.get("impl"),
    )
    return out.reshape(batch, heads, -1, dim)[:, :, :rows]
