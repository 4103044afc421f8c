"""Value-based decoding: the law of what is chosen, shared calls, what goes wrong."""

import math

import pytest
import torch

from fastdiff import samplers
from fastdiff.methods import particles as ps
from fastdiff.methods.svdd import svdd
from fastdiff.samplers import DDIM, Run
from fastdiff.testing_gaussian import GaussianModel, affine, recursion

STEPS = 12
SETTINGS = dict(sampler=DDIM(eta=1.0), steps=STEPS)


def gaussian(channels=1):
    return GaussianModel(torch.full((1, channels), 1.0), torch.full((1, channels), 0.5))


def reward(x):
    return x[:, 0]


def exact_value(model):
    """``log E[exp(x_0) | x_s]`` of the sampler itself: affine steps make it ``A x_s + B``."""
    steps = affine(Run(model, (1, 1), **SETTINGS).table, Run(model, (1, 1), **SETTINGS), model)
    table, a, b = {}, 1.0, 0.0
    times = Run(model, (1, 1), **SETTINGS).times.tolist()
    for i in range(STEPS - 1, 0, -1):  # from x_i on
        scale, shift, spread = (float(v) for v in steps[i])
        b = b + a * shift + 0.5 * (a * spread) ** 2
        a = a * scale
        table[times[i]] = a, b

    def value(x, t):
        a, b = table[float(t[0])]
        return a * x[:, 0].double() + b

    return value


def test_soft_selection_by_the_exact_value_tends_to_the_tilt():
    model = gaussian()
    m, s = (float(v) for v in recursion(Run(model, (1, 1), **SETTINGS), model))
    value, away = exact_value(model), []
    for k in (2, 8, 64):
        x = svdd(
            model, (4000, 1), reward, candidates=k, value=value, seed=k, **SETTINGS
        )  # fmt: skip
        away.append(abs(float(x.double().mean()) - (m + s)))
    error = math.sqrt(s / 4000)
    assert away[0] > 3 * error and away[0] > away[1] and away[2] < 4 * error, away


def test_argmax_is_another_law():
    """What the public code does in the place of a draw: far beyond the tilt."""
    model = gaussian()
    m, s = (float(v) for v in recursion(Run(model, (1, 1), **SETTINGS), model))
    x = svdd(model, (500, 1), reward, candidates=64, select="argmax", **SETTINGS)
    assert float(x.mean()) > m + 3 * s


def test_one_candidate_is_plain_sampling():
    model = gaussian(3)
    x = torch.randn(2, 3)
    found = svdd(model, x, reward, candidates=1, **SETTINGS)
    assert torch.equal(found, samplers.sample(model, x, **SETTINGS))


@pytest.mark.parametrize("select", ["soft", "argmax"])
def test_shared_calls_give_the_same_bits(select):
    model = gaussian(3)
    found = {}
    for share in (True, False):
        model.calls.clear()
        out = svdd(model, (2, 3), reward, candidates=5, select=select, share=share, **SETTINGS)
        found[share] = out, sum(len(t) for t in model.calls)
    assert torch.equal(found[True][0], found[False][0])
    assert found[True][1] == 2 * 5 * STEPS  # K rows a sample and step
    assert found[False][1] == 2 * 5 * (2 * STEPS - 1)


def test_a_value_of_its_own_needs_no_candidate_calls():
    model = gaussian()
    value = exact_value(model)
    model.calls.clear()
    svdd(model, (2, 1), reward, candidates=5, value=value, **SETTINGS)
    assert [len(t) for t in model.calls] == [2] * STEPS  # rows do not grow with K


def test_batch_of_samples_is_each_alone():
    model, seeds, x = gaussian(2), torch.tensor([7, 8, 9]), torch.randn(3, 2)
    whole = svdd(model, x, reward, candidates=4, seed=seeds, **SETTINGS)
    for b in range(3):
        part = slice(b, b + 1)
        alone = svdd(model, x[part], reward, candidates=4, seed=seeds[part], **SETTINGS)
        assert torch.equal(whole[part], alone)


def test_some_candidates_without_a_value():
    def bad(x):
        return torch.where(x[:, 0] > 1.0, math.nan, x[:, 0])

    x = svdd(gaussian(), (50, 1), bad, candidates=32, **SETTINGS)
    assert torch.isfinite(x).all() and (x <= 1.0).all()


def test_no_candidate_with_a_value():
    with pytest.raises(ps.Degenerate, match="all 4 candidates"):
        svdd(gaussian(), (2, 1), lambda x: x[:, 0] * math.nan, candidates=4, **SETTINGS)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(candidates=0), "candidates is 0"),
        (dict(alpha=0.0), "alpha is 0.0"),
        (dict(select="best"), "select is 'best'"),
    ],
)
def test_bad_input(settings, words):
    with pytest.raises(ValueError, match=words):
        svdd(gaussian(), (2, 1), reward, **settings, **SETTINGS)
