"""Packed batches: a block of a transformer on ragged tokens equals its samples alone."""

import pytest
import torch

import fastdiff
from fastdiff import ops
from fastdiff.tokens.ragged import packed_attention, packed_index, packed_modulation


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(dtype):
    counts, keys = [3, 0, 11, 1], 20
    q = draw(1, 2, 15, 16, dtype=dtype)
    k, v = draw(4, 2, keys, 16, seed=1, dtype=dtype), draw(4, 2, keys, 16, seed=2, dtype=dtype)
    bias, lengths = draw(4, 1, keys, seed=3), torch.tensor([20, 5, 7, 1])
    for how in ({}, {"bias": bias}, {"bias": bias[:1], "key_lengths": lengths, "scale": 0.3}):
        with fastdiff.record() as ran:
            got = packed_attention(q, k, v, counts, **how)
        assert [op for op, _ in ran] == ["attention"] and ran.total() == 1  # for all samples
        start = 0
        for b, n in enumerate(counts):
            if not n:
                continue
            more = {
                name: t if name == "scale" or (name == "bias" and len(t) == 1) else t[b : b + 1]
                for name, t in how.items()
            }
            rows = q[:, :, start : start + n].contiguous()
            alone = ops.attention(rows, k[b : b + 1], v[b : b + 1], **more)
            assert torch.equal(got[:, :, start : start + n], alone)
            start += n


def test_attention_of_few_samples():
    q, k = draw(1, 2, 7, 16), draw(3, 2, 20, 16, seed=1)
    assert torch.equal(packed_attention(q, k[:1], k[:1], [7]), ops.attention(q, k[:1], k[:1]))
    got = packed_attention(q, k, k, [0, 7, 0])
    assert torch.equal(got, ops.attention(q, k[1:2], k[1:2]))
    assert packed_attention(q[:, :, :0], k, k, [0, 0, 0]).shape == (1, 2, 0, 16)
    assert packed_attention(q[:, :, :0], k[:0], k[:0], []).shape == (1, 2, 0, 16)


def test_a_block_of_packed_tokens():
    """Gathered, normed, modulated and put back, without padding."""
    x, shift, scale = draw(3, 9, 8), draw(3, 8, seed=1), draw(3, 8, seed=2)
    index = [torch.tensor([4, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 8, 3])]
    counts = [len(i) for i in index]
    flat = x.view(1, 27, 8)
    rows = ops.gather_tokens(flat, packed_index(index, 9))
    got = ops.layer_norm_modulate(
        rows, packed_modulation(shift, counts), packed_modulation(scale, counts)
    )
    whole = ops.layer_norm_modulate(x, shift, scale)
    kept = x.clone()
    ops.update_tokens_(kept.view(1, 27, 8), packed_index(index, 9), got)
    for b in range(3):
        want = x[b].clone()
        want[index[b]] = whole[b, index[b]]
        assert torch.allclose(kept[b], want, atol=1e-6)


def test_bad_input():
    q, k = torch.ones(1, 2, 5, 8), torch.ones(2, 2, 3, 8)
    for counts in ([5], [2, 2], [6, -1]):
        with pytest.raises(ValueError, match="packed_attention: counts is .* need 2 integers"):
            packed_attention(q, k, k, counts)
    with pytest.raises(ValueError, match="packed_attention: q_index is given, need scale"):
        packed_attention(q, k, k, [2, 3], q_index=None)
    with pytest.raises(ValueError, match="need a bias per key, 3 dimensions"):
        packed_attention(q, k, k, [2, 3], bias=torch.ones(2, 2, 5, 3))
