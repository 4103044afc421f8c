"""Policy-guided trajectories: against Karras's algorithm 2 in float64, and what is not moved."""

import math
import sys

import pytest
import torch
from torch import nn

from fastdiff import samplers
from fastdiff.methods import guide
from fastdiff.methods.policy_guided import action_gradient, guidance_schedule, policy_guided
from fastdiff.ops.fused_step import Noise, philox_normal
from fastdiff.samplers import EDM, Euler, Heun

O, A, T = 3, 2, 5
D = O + A + 2
STEPS = 7
SCHEDULE = EDM()
CHURN = dict(s_churn=4.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
GENERATOR = torch.Generator().manual_seed(3)
MU, S = torch.randn(T, D, generator=GENERATOR), torch.rand(T, D, generator=GENERATOR) + 0.2


def denoised(u, sigma):
    """The best estimate of Gaussian trajectories with noise ``sigma``."""
    return (S * u + sigma**2 * MU) / (S + sigma**2)


class Behaviour(nn.Module):
    """It in Karras's form: input c_in u, time ln(sigma) / 4, output F."""

    prediction, schedule = "edm", SCHEDULE

    def forward(self, x, t, y=None):
        sigma = (4 * t.double()).exp().view(-1, 1, 1)
        data = SCHEDULE.sigma_data
        norm = sigma**2 + data**2
        u = x.double() * norm.sqrt()
        f = (denoised(u, sigma) - data**2 / norm * u) / (sigma * data / norm.sqrt())
        return f.to(x.dtype)


CENTRE = torch.linspace(-1, 2, A)


def policy(o, a):
    """A Gaussian policy whose mean depends on the observation."""
    return -((a - CENTRE - 0.5 * o[..., :A]) ** 2).sum(-1) / (2 * 0.7)


def karras(x, lam, *, seeds, slots, churn, heun=True, normalise=False, where="noised", base="hat"):
    """Algorithm 2 of Karras et al. in float64, in their units, with guidance before each step.

    base: "hat" as in the algorithm; "before": Euler's base without churn and guidance.
    """
    sigma = torch.cat(
        (samplers.karras_sigmas(STEPS, 0.002, 80.0), torch.zeros(1).double())
    ).tolist()
    rows = 2 * STEPS - 1 if heun else STEPS
    u = x.double() * math.sqrt(sigma[0] ** 2 + SCHEDULE.sigma_data**2)
    for i in range(STEPS):
        inside = churn["s_tmin"] <= sigma[i] <= churn["s_tmax"]
        gamma = min(churn["s_churn"] / STEPS, math.sqrt(2) - 1) if inside else 0.0
        high = sigma[i] * (1 + gamma)
        before = u
        if gamma:
            number = rows if i == 0 else (2 * i - 1 if heun else i - 1)
            z = philox_normal(x.shape, *Noise(seeds, slots, number)).double()
            u = u + churn["s_noise"] * math.sqrt(high**2 - sigma[i] ** 2) * z
        at = u if where == "noised" else denoised(u, high)
        g = torch.zeros_like(u)
        o, a = at[..., :O], at[..., O : O + A]
        g[..., O : O + A] = -(a - CENTRE - 0.5 * o[..., :A]) / 0.7
        if normalise:
            g = g / g.flatten(1).norm(dim=1).view(-1, 1, 1)
        u = u + lam[i] * g
        d = (u - denoised(u, high)) / high
        start = u if base == "hat" else before
        new = start + (sigma[i + 1] - high) * d
        if heun and sigma[i + 1] > 0:
            d2 = (new - denoised(new, sigma[i + 1])) / sigma[i + 1]
            new = start + (sigma[i + 1] - high) * (d + d2) / 2
        u = new
    return u


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("where", ["noised", "denoised"])
@pytest.mark.parametrize("heun", [True, False])
def test_path_is_algorithm_2_with_guidance(heun, where, normalise):
    churn = CHURN | {"s_tmax": 100.0}  # at the first level too
    sampler = (Heun if heun else Euler)(**churn)
    x = torch.randn(3, T, D, generator=torch.Generator().manual_seed(1))
    # Without normalisation a gradient at sigma 80 is of size 100: a step as small as it is stable.
    scale = dict(coef=0.3 if normalise else 0.05, cosine=0.4, delay=1)
    found = policy_guided(
        Behaviour(), x, policy, observations=O, normalise=normalise, at=where, seed=4,
        sampler=sampler, steps=STEPS, **scale,
    )  # fmt: skip
    given = dict(
        seeds=torch.full((3,), 4), slots=torch.arange(3), churn=churn, heun=heun,
        normalise=normalise, where=where,
    )  # fmt: skip
    lam = guidance_schedule(STEPS, **scale)
    want = karras(x, lam, **given)
    assert (found - want).abs().max() < 5e-5  # float32 states of size 80
    # Another base of Euler's step, or the batch's norm for all, are other paths.
    assert (found - karras(x, lam, base="before", **given)).abs().max() > 1e-2


def test_schedule_of_scales():
    root = math.sqrt(0.5)
    golden = [1 + 0.5 * root, 0.75 + 0.5, 0.5 + 0.5 * root, 0.0]
    assert guidance_schedule(4, 1.0, 0.5) == pytest.approx(golden, abs=1e-15)
    assert guidance_schedule(4, 2.0) == [2.0, 1.5, 1.0, 0.0]
    assert guidance_schedule(4, 2.0, delay=2) == [0.0, 0.0, 1.0, 0.0]
    assert guidance_schedule(1) == [0.0]
    assert guidance_schedule(3, delay=3) == [0.0] * 3


def test_only_actions_are_moved():
    tau = torch.randn(2, T, D)
    g = action_gradient(policy, tau, O, torch.zeros(D), torch.ones(D))
    want = -(tau[..., O : O + A] - CENTRE - 0.5 * tau[..., :A]) / 0.7
    assert torch.allclose(g[..., O : O + A], want, atol=1e-6)
    others = torch.cat((g[..., :O], g[..., O + A :]), -1)
    assert (others == 0).all()
    # Here channels are independent: what is not an action is as if there were no guidance.
    x = torch.randn(2, T, D)
    settings = dict(sampler=Heun(**CHURN), steps=STEPS)
    found = policy_guided(Behaviour(), x, policy, observations=O, **settings)
    plain = samplers.sample(Behaviour(), x, **settings)
    same = found == plain
    assert same[..., :O].all() and same[..., O + A :].all() and not same[..., O : O + A].any()


def test_what_the_policy_sees():
    mean, std = torch.arange(float(D)), torch.linspace(0.5, 2.0, D)
    tau, seen = torch.randn(2, T, D), []

    def look(o, a):
        seen.append((o, a.detach()))
        return (a**2).sum((1, 2))

    g = action_gradient(look, tau, O, mean, std, squash=True)
    raw = mean + std * tau
    acts = slice(O, O + A)
    assert torch.allclose(seen[0][0], raw[..., :O])
    assert torch.allclose(seen[0][1], raw[..., acts].tanh())
    squashed = raw[..., acts].tanh()
    assert torch.allclose(g[..., acts], 2 * squashed * (1 - squashed**2) * std[acts], atol=1e-6)


@pytest.mark.parametrize("sampler", ["heun", "euler", Heun(**CHURN)])
def test_without_strength_it_is_plain_sampling(sampler):
    settings = dict(sampler=sampler, steps=STEPS, seed=9)
    found = policy_guided(Behaviour(), (2, T, D), policy, observations=O, coef=0.0, **settings)
    assert torch.equal(found, samplers.sample(Behaviour(), (2, T, D), **settings))
    late = policy_guided(
        Behaviour(), (2, T, D), policy, observations=O, delay=STEPS - 1, **settings
    )
    assert torch.equal(found, late)


def test_batch_of_trajectories_is_each_alone():
    """A norm over the whole batch, as in some public code, would show here."""
    seeds, x = torch.tensor([5, 6, 7]), torch.randn(3, T, D)
    settings = dict(observations=O, sampler=Heun(**CHURN), steps=STEPS)
    whole = policy_guided(Behaviour(), x, policy, seed=seeds, **settings)
    for b in range(3):
        part = slice(b, b + 1)
        alone = policy_guided(Behaviour(), x[part], policy, seed=seeds[part], **settings)
        assert (whole[part] - alone).abs().max() < 1e-6


def test_norm_of_the_batch_would_be_seen(monkeypatch):
    monkeypatch.setattr(
        sys.modules[policy_guided.__module__], "unit", lambda g: guide.unit(g, "batch")
    )
    x = torch.randn(3, T, D)
    settings = dict(observations=O, steps=STEPS)
    whole = policy_guided(Behaviour(), x, policy, **settings)
    alone = policy_guided(Behaviour(), x[:1], policy, **settings)
    assert (whole[:1] - alone).abs().max() > 1e-2


def test_actions_come_nearer_to_the_policy():
    x = (64, T, D)
    plain = samplers.sample(Behaviour(), x, sampler="heun", steps=STEPS)
    found = policy_guided(Behaviour(), x, policy, observations=O, coef=1.0, steps=STEPS)

    def likelihood(tau):
        return policy(tau[..., :O], tau[..., O : O + A]).mean()

    assert likelihood(found) > likelihood(plain) + 0.05


def test_policy_without_a_gradient_changes_nothing():
    """A gradient of 0 has no direction: it stays 0 and is not divided by."""
    x = torch.randn(2, T, D)
    settings = dict(observations=O, steps=STEPS)
    found = policy_guided(Behaviour(), x, lambda o, a: 0 * a.sum((1, 2)), **settings)
    assert torch.equal(found, samplers.sample(Behaviour(), x, sampler="heun", steps=STEPS))


def test_policy_that_raises_or_gives_nan():
    x = torch.randn(2, T, D)
    before = x.clone()

    def broken(o, a):
        raise RuntimeError("no policy today")

    with pytest.raises(RuntimeError, match="no policy today"):
        policy_guided(Behaviour(), x, broken, observations=O, steps=3)

    def half(o, a):
        return policy(o, a) * torch.tensor([[math.nan], [1.0]])

    found = policy_guided(Behaviour(), x, half, observations=O, steps=3)
    assert torch.equal(x, before) and found[1].isfinite().all()
    assert found[0, :, O : O + A].isnan().all() and found[0, :, :O].isfinite().all()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(coef=math.inf), "coef is inf"),
        (dict(delay=-1), "delay is -1"),
        (dict(at="clean"), "at is 'clean'"),
        (dict(sampler="ddim"), "sampler is 'ddim', need Euler or Heun"),
        (dict(observations=5), r"need at least 8 channels for 5 observations"),
        (dict(observations=-1), "observations is -1"),
        (dict(mean=torch.zeros(3)), r"mean is \[3\], need a tensor \[7\]"),
        (dict(policy=lambda o, a: a), r"policy gives \[2, 5, 2\], need a tensor \[2\] or \[2, 5\]"),
    ],
)
def test_bad_input(change, words):
    args = dict(policy=policy, observations=O, steps=3) | change
    with pytest.raises(ValueError, match=words):
        policy_guided(Behaviour(), (2, T, D), **args)
