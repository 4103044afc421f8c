"""The CUDA kernel of select_tokens, in the model: the reference's choice, to the bit."""

import math

import pytest
import torch

from fastdiff import testing_simt
from fastdiff.ops import select_tokens

SETTINGS = [dict(), dict(high=0.3, most=2), dict(high=1.0, starvation=1.0),
            dict(high=0.4, compatible=True)]  # fmt: skip


def inputs(batch, tokens, seed=0, ties=False):
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(batch, tokens, generator=g)
    drops = torch.randint(9, (batch, tokens), generator=g, dtype=torch.int32)
    return ((score * 5).floor() if ties else score - 0.1), drops


def compare(score, count, drops, mode=(0, False, False), **settings):
    want = select_tokens(score, count, drops, impl="ref", **settings)
    with testing_simt.emulated(*mode):
        got = select_tokens(score, count, drops, impl="native", **settings)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    return got


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_against_the_reference(settings, ties):
    """Fewer tokens than a block has threads, as many, several passes; none and all chosen."""
    for batch, tokens, count in (
        (2, 1, 1),
        (2, 37, 12),
        (1, 512, 511),
        (2, 700, 1),
        (1, 1200, 600),
    ):
        score, drops = inputs(batch, tokens, ties=ties)
        score[0, ::9], score[0, 1::9] = math.nan, -0.0
        drops[:, ::4] *= 40  # past the table of factors
        compare(score, count, drops, **settings)


def test_forced_tokens():
    score, drops = inputs(2, 600)
    forced = torch.zeros(2, 600, dtype=torch.bool)
    forced[0, ::2], forced[1, 550:] = True, True
    for count in (40, 300, 590):
        compare(score, count, drops, forced=forced, most=7)


@pytest.mark.parametrize("mode", testing_simt.MODES)
def test_same_bits_in_every_order(mode):
    score, drops = inputs(1, 530, ties=True)
    compare(score, 200, drops, mode, high=0.5)


def test_nan_of_either_sign_is_one_value():
    score, drops = inputs(1, 40)
    score[:] = math.nan
    score[:, ::3].neg_()
    compare(score, 15, drops, high=0.4)
