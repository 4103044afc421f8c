"""Block-sparse attention: against full attention with a mask, calibration, cost."""

import pytest
import torch

from fastdiff.ops import attention
from fastdiff.tokens.block_mask import (
    BLOCK,
    BlockMask,
    block_attention,
    block_mass,
    calibrate_block_mask,
)


def qkv(rows=200, keys=300, dim=16, heads=2, batch=2, local=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, n, dim, generator=g) for n in (rows, keys, keys))
    if local:  # a token looks at those near it
        at = torch.linspace(0, 3, keys)
        k[..., 0], k[..., 1] = 60 * at.cos(), 60 * at.sin()
        q[..., 0], q[..., 1] = (60 * f(torch.linspace(0, 3, rows)) for f in (torch.cos, torch.sin))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def as_bias(mask, rows, keys):
    """-inf on all keys of blocks that do not stay, ``[1, H, S, T]``."""
    bias = torch.full((1, mask.blocks.shape[0], rows, keys), -torch.inf)
    for h in range(mask.blocks.shape[0]):
        for i in range(mask.blocks.shape[1]):
            for j in mask.blocks[h, i, : mask.counts[h, i]].tolist():
                here = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
                bias[0, h, here[0], here[1]] = 0
    return bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys"), [(64, 64), (200, 300), (1, 130), (256, 256)])
def test_against_a_full_mask(rows, keys, dtype):
    q, k, v = qkv(rows, keys, dtype=dtype)
    mass = block_mass(q, k)
    assert torch.allclose(mass.sum(2), torch.ones_like(mass[..., 0]), atol=1e-5)
    for keep in (0.0, 0.4, 0.8, 1.0):
        mask = calibrate_block_mask(mass, keys, keep)
        got = block_attention(q, k, v, mask)
        want = attention(q.float(), k.float(), v.float(), bias=as_bias(mask, rows, keys))
        assert got.dtype == dtype and got.shape == q.shape
        assert torch.allclose(got.float(), want, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert mask.share == 1


def test_what_is_left_out_is_little_and_a_local_head_gets_a_band():
    q, k, v = qkv(512, 512, local=True)
    for keep in (0.8, 0.95):
        mask = calibrate_block_mask(block_mass(q, k), 512, keep)
        p = (q.double() @ k.double().mT / 4).softmax(-1)  # [B, H, S, T]
        inside = (as_bias(mask, 512, 512) == 0).double()
        kept = (p * inside).sum(-1).unflatten(2, (-1, BLOCK)).mean((0, 3))  # by block of queries
        assert (kept >= keep - 1e-6).all()
    assert mask.share < 0.5
    for h in range(2):
        for i in range(8):
            assert i in mask.blocks[h, i, : mask.counts[h, i]].tolist()  # the diagonal
    full, sparse = attention(q, k, v), block_attention(q, k, v, mask)
    assert (full - sparse).norm() / full.norm() < 0.3


def test_fewest_blocks_and_bad_input():
    mass = torch.tensor([[[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.03, 0.02]]])
    mask = calibrate_block_mask(mass, 256, 0.8)
    assert mask.counts.tolist() == [[2, 1]] and mask.blocks.tolist() == [[[0, 1], [1, 1]]]
    assert calibrate_block_mask(mass, 256, 0.81).counts.tolist() == [[3, 1]]
    with pytest.raises(ValueError, match="keep is 1.5, need a number from 0 to 1"):
        calibrate_block_mask(mass, 256, 1.5)
    with pytest.raises(ValueError, match=r"mass is \[1, 2, 4\], need \[heads, query blocks, 5\]"):
        calibrate_block_mask(mass, 257)
    q = torch.ones(1, 1, 128, 8)
    assert isinstance(mask, BlockMask)
    with pytest.raises(ValueError, match="256 keys, need .* and 128"):
        block_attention(q, q, q, mask)
