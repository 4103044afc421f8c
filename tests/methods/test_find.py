"""FIND: the gradient of a reward with respect to the law of the first noise."""

import math

import pytest
import torch

import fastdiff
from fastdiff.methods.find import InitialNoise, advantages, clipped_loss, find
from fastdiff.samplers import DDIM, Run
from fastdiff.testing_gaussian import GaussianModel, affine

SETTINGS = dict(sampler=DDIM(), steps=8)
SHAPE = (3, 1, 2)


def gaussian(**more):
    mean = torch.tensor([0.5, -1.0, 0.2]).view(1, 3, 1, 1)
    variance = torch.tensor([0.5, 1.0, 0.2]).view(1, 3, 1, 1)
    return GaussianModel(mean, variance, **more)


def test_at_the_start_it_is_the_default_noise():
    noise, model = InitialNoise(2, SHAPE), gaussian()
    prompt = torch.tensor([0, 1, 0, 1, 1])
    x = noise.draw(prompt, 7)
    assert torch.equal(x, Run(model, (5, *SHAPE), seed=7, **SETTINGS).x)
    found = fastdiff.sample(model, x, seed=7, **SETTINGS)
    assert torch.equal(found, fastdiff.sample(model, (5, *SHAPE), seed=7, **SETTINGS))
    seeds = torch.tensor([3, 4, 5, 6, 7])
    whole = noise.draw(prompt, seeds)
    assert torch.equal(whole[2:3], noise.draw(prompt[2:3], seeds[2:3]))


def test_log_probability_is_that_of_torch():
    noise = InitialNoise(2, SHAPE)
    with torch.no_grad():
        noise.mu.normal_()
        noise.log_sigma.normal_(std=0.3)
    prompt = torch.tensor([1, 0, 1])
    x = noise.draw(prompt)
    normal = torch.distributions.Normal(noise.mu[prompt], noise.log_sigma[prompt].exp())
    assert torch.allclose(
        noise.log_prob(x, prompt).float(), normal.log_prob(x).flatten(1).sum(1), rtol=1e-5
    )


def score_function(model, noise, c, n):
    """Gradient estimates of E[c x0] with respect to mu ``[n, ...]``, one for each sample."""
    prompt = torch.zeros(n, dtype=torch.int64)
    x = noise.draw(prompt, 3)
    with torch.no_grad():
        r = (c * fastdiff.sample(model, x, **SETTINGS)).flatten(1).sum(1).double()
    z = (x - noise.mu[0]) / noise.log_sigma[0].exp().square()
    return advantages(r, n).view(-1, 1, 1, 1) * z.detach().double(), x, r


def test_gradient_is_the_closed_form():
    """x0 = M x_T + const of an affine sampler: the gradient of E[c x0] is c M, by score functions
    within 4 standard errors of 40000 samples; that of the loss is the mean of those samples."""
    model, noise, n = gaussian(), InitialNoise(1, SHAPE), 40000
    with torch.no_grad():
        noise.mu.fill_(0.3)
        noise.log_sigma.fill_(-0.2)
    c = torch.randn(SHAPE)
    run = Run(model, (1, *SHAPE), **SETTINGS)
    total = torch.ones(1, 3, 1, 1).double()
    with torch.no_grad():
        for a, _, _ in affine(run.table, run, model):
            total = a * total
    each, x, r = score_function(model, noise, c, n)
    error = each.std(0) / math.sqrt(n)
    assert ((each.mean(0) - c * total[0]).abs() < 4 * error).all()
    prompt = torch.zeros(n, dtype=torch.int64)
    logp = noise.log_prob(x, prompt)
    (g,) = torch.autograd.grad(clipped_loss(logp, logp.detach(), advantages(r, n)), noise.mu)
    assert torch.allclose(-g[0].double(), each.mean(0), rtol=1e-4, atol=1e-6)


def test_baseline_lowers_the_variance_and_leaves_the_mean():
    model, noise, n = gaussian(), InitialNoise(1, SHAPE), 20000
    c = torch.ones(SHAPE)
    each, x, r = score_function(model, noise, c, n)
    bare = (r + 10.0).view(-1, 1, 1, 1) * x.double()
    assert (bare.var(0) > 5 * each.var(0)).all()
    assert ((bare - each).mean(0).abs() < 4 * (bare - each).std(0) / math.sqrt(n)).all()


def test_outside_the_clip_there_is_no_gradient():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.1], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 1.0], dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    loss = clipped_loss(logp, torch.zeros(6), advantage, 0.2)
    (g,) = torch.autograd.grad(loss, logp)
    assert g[0] == 0 and g[3] == 0  # above with a gain, below with a loss: clipped
    assert (g[[1, 2, 4, 5]] != 0).all()
    target = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    assert torch.allclose(loss, -target.mean())


def test_advantages_leave_out_their_own_and_what_is_no_number():
    r = torch.tensor([1.0, 2.0, 6.0, math.nan, 4.0, 2.0])
    assert torch.allclose(advantages(r, 3), torch.tensor([-3.0, -1.5, 4.5, 0, 2, -2]).double())
    alone = torch.tensor([1.0, math.nan, math.inf])
    assert torch.equal(advantages(alone, 3), torch.zeros(3).double())


def test_it_finds_noise_of_high_reward():
    model, noise = gaussian(), InitialNoise(2, SHAPE)
    sign = []

    def reward(x):
        half = len(x) // 2  # prompt 0 likes large values, prompt 1 small ones
        s = torch.ones(len(x))
        s[half:] = -1
        return s * x.flatten(1).sum(1)

    find(
        model, noise, reward, samples=32, rounds=12, lr=0.1,
        callback=lambda k, r: sign.append(r.mean()), **SETTINGS,
    )  # fmt: skip
    assert sign[-1] > sign[0] + 2
    mean = noise.mu.mean((1, 2, 3))
    assert mean[0] > 0.3 and mean[1] < -0.3
    assert all(p.grad is None for p in model.parameters())


def test_only_the_prompts_that_are_asked_for_move():
    noise = InitialNoise(3, SHAPE)
    find(
        gaussian(), noise, lambda x: x.flatten(1).sum(1), prompt=torch.tensor([1]), samples=8,
        rounds=2, **SETTINGS,
    )  # fmt: skip
    moved = noise.mu.detach().abs().flatten(1).sum(1)
    assert moved[1] > 0 and moved[0] == 0 and moved[2] == 0


def test_constant_rewards_and_no_rounds_change_nothing():
    noise = InitialNoise(1, SHAPE)
    find(gaussian(), noise, lambda x: torch.full((len(x),), math.nan), rounds=2, **SETTINGS)
    find(gaussian(), noise, lambda x: torch.ones(len(x)), rounds=2, **SETTINGS)
    find(gaussian(), noise, lambda x: x.flatten(1).sum(1), rounds=0, **SETTINGS)
    assert not noise.mu.any() and not noise.log_sigma.any()


def test_classes_and_guidance():
    model = GaussianModel(
        torch.tensor([2.0, -2.0]).view(2, 1, 1, 1), torch.full((2, 1, 1, 1), 0.3), classes=True
    )
    rewards = []
    noise = InitialNoise(2, SHAPE)
    find(
        model, noise, lambda x: x.flatten(1).mean(1), classes=torch.tensor([1, 0]), samples=4,
        rounds=1, guidance=1.5, callback=lambda k, r: rewards.append(r), **SETTINGS,
    )  # fmt: skip
    assert (rewards[0][:4] < 0).all() and (rewards[0][4:] > 0).all()


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(samples=1), "samples is 1"),
        (dict(rounds=-1), "rounds is -1"),
        (dict(epochs=0), "epochs is 0"),
        (dict(clip=1.0), "clip is 1.0"),
        (dict(lr=math.nan), "lr is nan"),
        (dict(prompt=torch.tensor([2])), "need int64"),
        (dict(classes=torch.tensor([1])), r"classes is \[1\], need \[2\]"),
    ],
)
def test_bad_input(settings, words):
    noise = InitialNoise(2, SHAPE)
    with pytest.raises(ValueError, match=words):
        find(gaussian(), noise, lambda x: x.flatten(1).sum(1), **settings)
    assert not noise.mu.any()


def test_more_bad_input():
    with pytest.raises(ValueError, match="prompts is 0"):
        InitialNoise(0, SHAPE)
    with pytest.raises(ValueError, match="shape is"):
        InitialNoise(1, ())
    with pytest.raises(ValueError, match="reward gives"):
        find(gaussian(), InitialNoise(1, SHAPE), lambda x: x.sum(), **SETTINGS)
    with pytest.raises(RuntimeError, match="planted"):

        def fail(x):
            raise RuntimeError("planted")

        find(gaussian(), InitialNoise(1, SHAPE), fail, **SETTINGS)
