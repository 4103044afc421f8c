"""Masked tokens: the law of a step and of a run, what stays, and steering in closed form."""

import math

import pytest
import torch

from fastdiff.methods import particles as ps
from fastdiff.methods.fk import POTENTIALS
from fastdiff.methods.masked import (
    Levels,
    MaskedRun,
    gumbel_argmax,
    log_categorical,
    log_linear,
    masked_fk,
    masked_sample,
)
from fastdiff.ops.fused_step import Noise

V, L = 4, 3
MASK = V
P = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.01, 0.01]])
WORTH = torch.tensor([[0.0, 1.0, -1.0, 2.0], [0.5, 0.0, 1.0, -1.0], [0.0, 0.0, 3.0, 1.0]])


def model(tokens, t):
    """Tokens that do not depend on each other."""
    return P.log().expand(len(tokens), L, V)


def worth(tokens):
    return WORTH[torch.arange(L), tokens].sum(1)


def masks(batch):
    return torch.full((batch, L), MASK)


def shares(tokens):
    return torch.nn.functional.one_hot(tokens, V).double().mean(0)


def close(found, want, count, sigmas=4.5):
    """Within so many standard errors of a binomial share."""
    error = (want * (1 - want) / count).sqrt()
    assert ((found - want).abs() < sigmas * error + 1e-12).all(), (found, want)


def test_probabilities_of_a_step():
    q = log_categorical(P.log()[None], 0.8, 0.2).exp()[0]
    assert torch.allclose(q[:, :V], P.double() * 0.75, atol=1e-7)
    assert torch.allclose(q[:, V], torch.full((L,), 0.25).double())
    last = log_categorical(P.log()[None], 0.8, 0.0).exp()[0]
    assert (last[:, V] == 0).all() and torch.allclose(last[:, :V], P.double(), atol=1e-7)


def test_gumbel_argmax_draws_by_its_weights():
    count = 40000
    logq = torch.tensor([0.6, 0.3, 0.1, 0.0]).log().expand(count, 2, 4)
    drawn = gumbel_argmax(logq, Noise(1, torch.arange(count), 0, 0))
    close(shares(drawn), torch.tensor([0.6, 0.3, 0.1, 0.0]).double(), count)


def test_largest_gumbel_numbers_exist(monkeypatch):
    """Of float32 uniforms they end at 16.6: values rarer than 1e-7 are drawn too rarely."""
    largest = torch.full((1, 1, 2), math.sqrt(2 * 33 * math.log(2)))  # radius of u = 2^-33
    monkeypatch.setattr(ps, "philox_normal", lambda shape, *noise: largest)
    u = ps.uniform((1, 1, 2), Noise(0))
    assert (-torch.log(-torch.log(u)) > 23).all() and (u < 1).all()
    # One rounded to float32, as it would be drawn there, is 1.
    assert (u.float() == 1).all()


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_law_of_a_run_is_exact_with_any_number_of_steps(steps):
    count = 20000
    found = masked_sample(model, masks(count), mask_id=MASK, steps=steps, seed=2)
    close(shares(found), P.double(), count)
    pair = (found[:, 0] * V + found[:, 1]).bincount(minlength=V * V).double() / count
    close(pair, (P[0, :, None] * P[1]).flatten().double(), count)  # independent


def test_how_many_are_masked():
    count, run_steps = 5000, 5
    run = MaskedRun(model, masks(count), mask_id=MASK, steps=run_steps, seed=3)
    for i in range(run_steps):
        run.step(i, run.predict(i))
        share = (run.x == MASK).double().mean()
        want = torch.tensor(1 - (i + 1) / run_steps).double()
        close(share, want, count * L)


def test_tokens_that_depend_on_each_other():
    """Two tokens that are equal: one at a time is exact, both at once is not."""

    def equal(tokens, t):
        other = tokens.flip(1)
        known = torch.nn.functional.one_hot(other.clamp(max=V - 1), V).double().log()
        unknown = torch.full((V,), 1 / V).double().log().expand(len(tokens), 2, V)
        return torch.where((other == MASK)[..., None], unknown, known)

    start = torch.full((2000, 2), MASK)
    found = masked_sample(equal, start, mask_id=MASK, steps=200)
    # Both are unmasked in one step of 200 with chance 1/200, and then equal by chance 1/4.
    differ = (found[:, 0] != found[:, 1]).double().mean()
    assert differ < 0.75 / 200 + 4 * math.sqrt(0.75 / 200 / 2000)
    at_once = masked_sample(equal, start, mask_id=MASK, steps=1)
    close((at_once[:, 0] == at_once[:, 1]).double().mean(), torch.tensor(0.25).double(), 2000)


def test_tokens_that_are_there_stay():
    x = torch.tensor([[1, MASK, 2], [3, 3, 3], [MASK, MASK, MASK]])
    before = x.clone()
    found = masked_sample(model, x, mask_id=MASK, steps=5)
    assert torch.equal(x, before)
    assert torch.equal(found[x != MASK], x[x != MASK]) and (found != MASK).all()


def test_step_that_redraws_tokens_would_be_seen():
    """Without the copy of what is not masked, given tokens change."""
    run = MaskedRun(model, torch.tensor([[1, MASK, 2]]), mask_id=MASK, steps=5)
    changed = False
    for i in range(5):
        logq = log_categorical(run.predict(i), run.masked[i], run.masked[i + 1])
        run.x = gumbel_argmax(logq, run.noise(0))
        changed |= run.x[0, 0].item() != 1
    assert changed


def test_batch_of_samples_is_each_alone():
    seeds, x = torch.tensor([7, 8, 9]), masks(3)
    settings = dict(mask_id=MASK, steps=6)
    whole = masked_sample(model, x, seed=seeds, **settings)
    steered = masked_fk(model, x, worth, lam=1.0, particles=8, seed=seeds, **settings)
    for b in range(3):
        part = slice(b, b + 1)
        alone = masked_sample(model, x[part], seed=seeds[part], **settings)
        assert torch.equal(whole[part], alone)
        alone = masked_fk(model, x[part], worth, lam=1.0, particles=8, seed=seeds[part], **settings)
        assert torch.equal(steered.x[part], alone.x)
        assert torch.equal(steered.logw[part], alone.logw)


def tilted(lam):
    return (P.double().log() + lam * WORTH.double()).softmax(1)


def estimates(found):
    """Weighted shares of every sample's particles, ``[B, L, V]``."""
    w = ps.normalised(found.logw)
    hot = torch.nn.functional.one_hot(found.x, V).double()
    return torch.einsum("bk,bklv->blv", w, hot)


def within(found, want, sigmas=4.5):
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - want).abs() < sigmas * error + 1e-3).all(), (found.mean(0), want)


@pytest.mark.parametrize("ess_below", [1.0, 0.5, 1e-6], ids=["always", "adaptive", "never"])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_steered_law_is_the_tilted_categorical(potential, ess_below):
    """An additive reward of independent tokens: p(v) exp(lam r(v)) / Z for each. ("add" weighs
    sums of sums of rewards on the way: with a stronger lam 512 particles are too few for it.)"""
    lam = 0.4
    found = masked_fk(
        model, masks(48), worth, particles=512, lam=lam, potential=potential, mask_id=MASK,
        steps=8, at=[1, 4], ess_below=ess_below, seed=4,
    )  # fmt: skip
    within(estimates(found), tilted(lam))
    assert (tilted(lam) - P.double()).abs().max() > 0.05
    often = {1.0: found.resampled > 0, 0.5: found.resampled <= 2, 1e-6: found.resampled == 0}
    assert often[ess_below].all()


@pytest.mark.parametrize("guess", ["sample", "argmax"])
def test_rewards_on_the_way_may_be_garbage(guess):
    calls = []

    def reward(tokens):
        calls.append(tokens)
        assert (tokens != MASK).all()
        return worth(tokens) if len(calls) == 4 else torch.sin(3.0 * tokens[:, 1]) / 2

    found = masked_fk(
        model, masks(48), reward, particles=512, lam=0.7, guess=guess, mask_id=MASK, steps=8,
        at=[1, 3, 5], ess_below=1.0, seed=5,
    )  # fmt: skip
    assert len(calls) == 4
    within(estimates(found), tilted(0.7))


def test_dropped_weights_would_be_seen(monkeypatch):
    keep = ps.resample

    def forgetful(logw, *args, **kwargs):
        found = keep(logw, *args, **kwargs)
        return found._replace(logw=torch.zeros_like(found.logw))

    monkeypatch.setattr(ps, "resample", forgetful)
    found = masked_fk(
        model, masks(48), worth, particles=512, lam=0.7, mask_id=MASK, steps=8, at=[1, 3, 5],
        ess_below=1e-6, seed=4,
    )  # fmt: skip
    mean = estimates(found).mean(0)
    error = estimates(found).std(0) / math.sqrt(48)
    assert ((mean - tilted(0.7)).abs() > 10 * error).any()


@pytest.mark.parametrize("k", [1, 4])
def test_without_strength_it_is_plain_sampling(k):
    found = masked_fk(model, masks(3), worth, particles=k, lam=0.0, mask_id=MASK, steps=6, seed=1)
    plain = masked_sample(model, masks(3 * k), mask_id=MASK, steps=6, seed=1)
    assert torch.equal(found.x.flatten(0, 1), plain) and not found.resampled.any()


def test_children_of_one_parent_differ(monkeypatch):
    def spread(length=40):
        def flat(tokens, t):
            return torch.zeros(len(tokens), length, 8)

        start = torch.full((1, length), 8)
        found = masked_fk(
            flat, start, lambda x: 1.0 * x[:, 0], particles=16, lam=9.0, mask_id=8, steps=6
        )
        return len(found.x[0].unique(dim=0)), found.resampled

    distinct, resampled = spread()
    assert distinct == 16 and (resampled > 0).all()
    # Noise that goes with the parent makes copies of it: that would be seen.
    keep = MaskedRun.permute

    def inherit(self, index):
        keep(self, index)
        self.seeds, self.slots = self.seeds[index], self.slots[index]

    monkeypatch.setattr(MaskedRun, "permute", inherit)
    assert spread()[0] < 16


def test_rewards_without_a_weight():
    def reward(tokens):
        r = worth(tokens).double()
        r[:4] = math.nan
        return r

    with pytest.raises(ps.Degenerate, match="group 0 all 4 rewards"):
        masked_fk(model, masks(2), reward, particles=4, mask_id=MASK, steps=4)

    def half(tokens):
        return torch.where(tokens[:, 0] == 0, math.nan, 0.0)

    found = masked_fk(model, masks(4), half, particles=64, lam=1.0, mask_id=MASK, steps=4)
    assert (ps.normalised(found.logw)[found.x[..., 0] == 0] == 0).all()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(x=torch.zeros(2, 3)), r"x is torch.float32 \[2, 3\], need torch.int64"),
        (dict(mask_id=0), "mask_id is 0"),
        (dict(mask_id=3), "mask_id is 3 and the model gives 4 values"),
        (dict(steps=0), "steps is 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=torch.zeros(3, dtype=torch.int64)), r"seed is torch.int64 \[3\]"),
        (dict(levels=Levels(torch.zeros(1), torch.tensor([1.0, 0.5]))), "levels end in a mask"),
        (dict(levels=Levels(torch.zeros(1), torch.tensor([0.0, 0.0]))), "levels do not fall"),
        (dict(model=lambda x, t: x), r"the model gives \[2, 3\]"),
    ],
)
def test_bad_input(change, words):
    args = dict(model=model, x=masks(2), mask_id=MASK) | change
    with pytest.raises(ValueError, match=words):
        masked_sample(**args)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(particles=0), "particles is 0"),
        (dict(lam=math.inf), "lam is inf"),
        (dict(ess_below=2.0), "ess_below is 2.0"),
        (dict(guess="mean"), "guess is 'mean'"),
        (dict(at=[50]), r"at is \[50\]"),
        (dict(potential="sum"), "potential is 'sum'"),
    ],
)
def test_bad_input_of_steering(change, words):
    with pytest.raises(ValueError, match=words):
        masked_fk(model, masks(2), worth, mask_id=MASK, **change)


def test_levels():
    found = log_linear(4)
    assert found.t.tolist() == [1000.0, 750.0, 500.0, 250.0]
    assert found.masked.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
