"""FK steering: the law of its particles, what travels with them, and what goes wrong."""

import math

import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.methods import particles as ps
from fastdiff.methods.fk import POTENTIALS, fk_steering
from fastdiff.methods.trajectory import Trajectory
from fastdiff.samplers import DDIM, Run
from fastdiff.testing_gaussian import GaussianModel, recursion

STEPS = 20
SETTINGS = dict(sampler=DDIM(eta=1.0), steps=STEPS)


def gaussian(mean=1.0, variance=0.5, channels=1):
    return GaussianModel(torch.full((1, channels), mean), torch.full((1, channels), variance))


def moments(found, pick=0):
    w = ps.normalised(found.logw)
    x = found.x[..., pick].double()
    mean = (w * x).sum(1)
    return mean, (w * (x - mean[:, None]) ** 2).sum(1)


def within(values, target, sigmas=4.0):
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - target) < sigmas * error, (values.mean(), target, error)


@pytest.mark.parametrize("ess_below", [1.0, 0.5, 1e-6], ids=["always", "adaptive", "never"])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_law_is_the_tilt_of_what_the_sampler_gives(potential, ess_below):
    """With r = c x and x0 ~ N(m, s) of the sampler, exp(lam r) makes it N(m + lam c s, s)."""
    model = gaussian()
    run = Run(model, (1, 1), **SETTINGS)
    m, s = (float(v) for v in recursion(run, model))
    found = fk_steering(
        model, (64, 1), lambda x: x[:, 0], particles=1024, lam=1.0, potential=potential,
        ess_below=ess_below, at=range(2, STEPS, 4), seed=3, **SETTINGS,
    )  # fmt: skip
    mean, variance = moments(found)
    within(mean, m + s)
    within(variance, s)
    often = {1.0: found.resampled > 1, 0.5: found.resampled <= 3, 1e-6: found.resampled == 0}
    assert often[ess_below].all()


def test_rewards_on_the_way_may_be_garbage():
    model = gaussian()
    m, s = (float(v) for v in recursion(Run(model, (1, 1), **SETTINGS), model))
    calls = []

    def reward(x):
        calls.append(len(calls))
        last = len(calls) == STEPS // 4 + 1
        return x[:, 0] if last else 0.5 * torch.sin(3 * x[:, 0])

    at = range(0, STEPS - 1, 4)
    found = fk_steering(
        model, (64, 1), reward, particles=1024, lam=1.0, at=at, seed=5, ess_below=1.0, **SETTINGS
    )
    assert len(calls) == len(list(at)) + 1
    mean, variance = moments(found)
    within(mean, m + s)
    within(variance, s)


def test_dropped_weights_would_be_seen(monkeypatch):
    """The public code forgets weights where it does not resample: this test would find that."""
    keep = ps.resample

    def forgetful(logw, *args, **kwargs):
        found = keep(logw, *args, **kwargs)
        return found._replace(logw=torch.zeros_like(found.logw))

    model = gaussian()
    m, s = (float(v) for v in recursion(Run(model, (1, 1), **SETTINGS), model))
    monkeypatch.setattr(ps, "resample", forgetful)
    found = fk_steering(
        model, (64, 1), lambda x: x[:, 0], particles=256, lam=1.0, ess_below=1e-6,
        at=range(2, STEPS, 4), **SETTINGS,
    )  # fmt: skip
    mean, _ = moments(found)
    assert abs(mean.mean() - (m + s)) > 10 * mean.std() / 8


@pytest.mark.parametrize("k", [1, 4])
def test_without_strength_it_is_plain_sampling(k):
    model = gaussian(channels=3)
    found = fk_steering(model, (2, 3), lambda x: x.sum(1), particles=k, lam=0.0, **SETTINGS)
    plain = samplers.sample(model, (2 * k, 3), **SETTINGS)
    assert torch.equal(found.x.flatten(0, 1), plain)
    assert not found.resampled.any()


def test_children_of_one_parent_differ():
    model = gaussian()
    start = torch.zeros(2, 1)  # one state, given: all particles begin in it
    found = fk_steering(model, start, lambda x: x[:, 0], particles=32, lam=50.0, **SETTINGS)
    for own in found.x:
        assert len(own.unique()) == 32
    assert (found.resampled > 0).all()


def test_noise_that_children_inherit_would_be_seen(monkeypatch):
    """Slots belong to places: where they travel with the samples, a parent's children stay one."""
    plain = Trajectory.permute

    def inherited(run, index):
        plain(run, index)
        run.slots = run.slots[index]

    monkeypatch.setattr(Trajectory, "permute", inherited)
    start = torch.zeros(2, 1)
    found = fk_steering(
        gaussian(), start, lambda x: x[:, 0], particles=32, lam=50.0, ess_below=1.0, **SETTINGS
    )
    for own in found.x:
        assert len(own.unique()) < 16


def test_the_datas_law_is_not_what_steering_gives():
    """A sampler of few steps has a bias that no number of particles removes: the exact target is
    its own law, not the data's N(1, 1/2)."""
    model = gaussian()
    m, s = (float(v) for v in recursion(Run(model, (1, 1), **SETTINGS), model))
    found = fk_steering(
        model,
        (64, 1),
        lambda x: x[:, 0],
        particles=1024,
        lam=1.0,
        at=range(2, STEPS, 4),
        **SETTINGS,
    )
    mean, variance = moments(found)
    within(variance, s)
    assert abs(variance.mean() - 0.5) > 20 * variance.std() / 8
    assert abs(mean.mean() - (1.0 + 0.5)) > 20 * mean.std() / 8


def test_batch_of_samples_is_each_alone():
    model = gaussian(channels=2)
    seeds = torch.tensor([7, 8, 9])
    x = torch.randn(3, 2)
    run = dict(particles=8, lam=2.0, **SETTINGS)
    whole = fk_steering(model, x, lambda x: x[:, 0], seed=seeds, **run)
    for b in range(3):
        part = slice(b, b + 1)
        alone = fk_steering(model, x[part], lambda x: x[:, 0], seed=seeds[part], **run)
        assert torch.equal(whole.x[part], alone.x) and torch.equal(whole.logw[part], alone.logw)


@pytest.mark.parametrize("w", [[0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.0, 0.5]])
def test_systematic_counts(w):
    w = torch.tensor(w, dtype=torch.float64)
    k = len(w)
    u = torch.linspace(0.001, 0.999, 997, dtype=torch.float64)
    parents = ps.systematic(w.log().expand(len(u), k), u)
    counts = torch.stack([(parents == j).sum(1) for j in range(k)], 1)
    assert ((counts - k * w).abs() < 1).all()
    assert torch.allclose(counts.double().mean(0), k * w, atol=2e-3)  # unbiased


def test_weights_of_groups_that_are_not_resampled_stay():
    logw = torch.tensor([[0.0, 0.0, 0.0, 0.1], [0.0, -50.0, -50.0, -50.0]], dtype=torch.float64)
    noise = fastdiff.ops.Noise(0, torch.arange(2), 0, 9)
    found = ps.resample(logw, noise, ess_below=0.5)
    assert found.did.tolist() == [False, True]
    assert torch.equal(found.logw[0], logw[0]) and found.rows.tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert torch.allclose(found.logw.logsumexp(1), logw.logsumexp(1))  # Z stays


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_no_weight_at_all(bad):
    def reward(x):
        r = x[:, 0].double().clone()
        r[:4] = bad  # the first sample's
        return r

    x = torch.randn(2, 1)
    before = x.clone()
    with pytest.raises(ps.Degenerate, match="group 0 all 4 rewards are -inf or NaN"):
        fk_steering(gaussian(), x, reward, particles=4, **SETTINGS)
    assert torch.equal(x, before)


def test_one_particle_without_a_weight_dies():
    def reward(x):
        return torch.where(x[:, 0] > 1.0, math.nan, 0.0)

    found = fk_steering(
        gaussian(), (4, 1), reward, particles=64, lam=1.0, ess_below=1.0, **SETTINGS
    )
    assert (ps.normalised(found.logw)[found.x[..., 0] > 1.0] == 0).all()


def test_reward_that_raises_leaves_the_model_alone():
    model = gaussian()

    def reward(x):
        raise RuntimeError("no reward today")

    with pytest.raises(RuntimeError, match="no reward today"):
        fk_steering(model, (2, 1), reward, **SETTINGS)
    again = fk_steering(model, (2, 1), lambda x: x[:, 0], **SETTINGS)
    assert torch.equal(again.x, fk_steering(model, (2, 1), lambda x: x[:, 0], **SETTINGS).x)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(particles=0), "particles is 0"),
        (dict(lam=math.nan), "lam is nan"),
        (dict(potential="sum"), "potential is 'sum'"),
        (dict(ess_below=0.0), "ess_below is 0.0"),
        (dict(at=[STEPS]), r"at is \[20\], need calls from 0 to 19"),
        (dict(scheme="best"), "scheme is 'best'"),
    ],
)
def test_bad_input(settings, words):
    with pytest.raises(ValueError, match=words):
        fk_steering(gaussian(), (2, 1), lambda x: x[:, 0], **settings, **SETTINGS)


@pytest.mark.parametrize("value", [1.0, torch.zeros(3), torch.zeros(8, 1)])
def test_reward_of_a_wrong_shape(value):
    with pytest.raises(ValueError, match=r"reward gives .*, need a tensor \[8\]"):
        fk_steering(gaussian(), (2, 1), lambda x: value, particles=4, **SETTINGS)


def test_a_sampler_without_noise_keeps_its_copies_equal():
    found = fk_steering(
        gaussian(), torch.randn(3, 1), lambda x: x[:, 0], particles=4, lam=2.0, steps=STEPS,
        sampler="ddim", ess_below=1.0,
    )  # fmt: skip
    assert torch.equal(found.x, found.x[:, :1].expand_as(found.x))
    assert not found.resampled.any() and (found.logw == found.logw[:, :1]).all()


def test_no_samples_at_all():
    found = fk_steering(gaussian(), torch.zeros(0, 1), lambda x: x[:, 0], particles=4, **SETTINGS)
    assert (
        found.x.shape == (0, 4, 1) and found.logw.shape == (0, 4) and found.best().shape == (0, 1)
    )
