"""Scale by entropy, weights of references: closed forms, and attention with them."""

import math

import pytest
import torch

from fastdiff.ops import attention
from fastdiff.tokens.attention_scale import entropy_scale, parabola, reference_bias, region_bias


def qkv(tokens, references, dim=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, 2, n, dim) for n in (tokens, tokens + references, tokens + references)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def test_scale():
    for dim in (1, 40, 64, 72, 128):
        assert entropy_scale(4096, 4096, dim) == 1 / math.sqrt(dim)
    for tokens, ratio in ((784, 0.895), (1024, 0.913), (9216, 1.048), (16384, 1.080)):
        assert entropy_scale(tokens, 4096, 64) * 8 == pytest.approx(ratio, abs=6e-4)
    assert entropy_scale(1, 4096, 64) == 0


def test_entropies_come_nearer_to_that_of_training():
    """Random q and k of 64 channels, trained with 1,024 tokens."""
    g = torch.Generator().manual_seed(0)

    def entropy(tokens, scale):
        q, k = (torch.randn(16, n, 64, generator=g) for n in (64, tokens))
        p = (q @ k.mT * scale).double().softmax(2)
        return -(p * p.clamp(min=1e-300).log()).sum(2).mean().item()

    want = {256: (5.041, 5.139), 1024: (6.432, 6.432), 4096: (7.810, 7.708)}
    for tokens, (fixed, scaled) in want.items():
        assert entropy(tokens, 1 / 8) == pytest.approx(fixed, abs=0.02)
        assert entropy(tokens, entropy_scale(tokens, 1024, 64)) == pytest.approx(scaled, abs=0.02)


def test_parabola_is_low_at_both_ends():
    w = parabola(9, 0.25, 2.0)
    assert w[0] == w[-1] == 0.25 and w[4] == 2.0 and torch.equal(w, w.flip(0))
    assert (w[:4].diff() > 0).all() and torch.equal(
        parabola(28, 0.1, 3.0), parabola(28, 0.1, 3.0).flip(0)
    )
    assert parabola(1, 0.0, 1.5).tolist() == [1.5]


def test_weights_multiply_what_softmax_adds_up():
    q, k, v = qkv(9, 5, dtype=torch.float64)
    for w in (0.3, 1.0, 4.0):
        bias = reference_bias(torch.tensor(w), 9, 5)
        got = attention(q, k, v, bias=bias.double())
        e = (q @ k.transpose(2, 3) / 4).exp()
        e[..., 9:] *= bias[0, 0, -1].double().exp()
        torch.testing.assert_close(got, e @ v / e.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)


def test_weight_1_changes_nothing_and_weight_0_leaves_them_out():
    q, k, v = qkv(9, 5)
    one = attention(q, k, v, bias=reference_bias(torch.tensor(1.0), 9, 5))
    assert torch.equal(one, attention(q, k, v, bias=torch.zeros(1, 1, 14)))
    torch.testing.assert_close(one, attention(q, k, v), rtol=1e-5, atol=1e-6)
    none = attention(q, k, v, bias=reference_bias(torch.zeros(2), 9, 5))
    torch.testing.assert_close(none, attention(q, k[:, :, :9], v[:, :, :9]), rtol=1e-5, atol=1e-6)
    each = attention(q, k, v, bias=reference_bias(torch.tensor([0.0, 1.0]), 9, 5))
    assert torch.equal(each[0], none[0]) and torch.equal(each[1], one[1])


def test_regions():
    q, k, v = qkv(9, 5)
    region = torch.zeros(2, 9, dtype=torch.bool)
    region[0, 2:5], region[1] = True, True
    w = torch.tensor([0.5, 2.0])
    plain = attention(q, k, v, bias=reference_bias(w, 9, 5))
    got = attention(q, k, v, bias=region_bias(w, region, 0.0, 5))
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)
    got = attention(q, k, v, bias=region_bias(w, region, 0.7, 5))
    more = attention(q, k, v, bias=reference_bias(w * math.exp(0.7), 9, 5))
    torch.testing.assert_close(got[1], more[1], rtol=1e-5, atol=1e-6)  # all of it is the region
    torch.testing.assert_close(got[0, :, 2:5], more[0, :, 2:5], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[0, :, 5:], plain[0, :, 5:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: entropy_scale(0, 9, 4),
            "entropy_scale: tokens is 0, need an integer of at least 1",
        ),
        (lambda: entropy_scale(9, 1, 4), "entropy_scale: trained is 1, need"),
        (lambda: entropy_scale(9, 9, 4.0), "entropy_scale: dim is 4.0, need"),
        (lambda: parabola(0, 1, 1), "parabola: steps is 0, need"),
        (lambda: parabola(3, -1, 1), "parabola: low is -1, need a finite number of at least 0"),
        (
            lambda: region_bias(torch.ones(1), torch.ones(1, 3), 0.0, 2),
            r"region_bias: region is torch.float32 \[1, 3\], need torch.bool",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
