"""One model as variance-preserving, variance-exploding and in continuous time: the same samples."""

import math

import pytest
import torch

from fastdiff import samplers
from fastdiff.samplers import DDIM, DDPM, VP, DPMpp2M, Euler, Given, Heun, Run
from fastdiff.samplers.ve import VE, VPSDE

SHAPE = (3, 2, 4, 5)
METHODS = {
    "ddim": DDIM(),
    "ddim eta": DDIM(eta=1.0),
    "ddpm": DDPM(),
    "dpmpp_2m": DPMpp2M(),
    "dpmpp_2m_sde": DPMpp2M(sde=True),
    "euler": Euler(),
    "heun": Heun(),
}


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise_of(u, ratio):
    """A network that is not linear: the noise in ``u = x / alpha`` at ``ratio = sigma / alpha``."""
    ratio = ratio.view(-1, 1, 1, 1)
    scaled = u / (1 + ratio**2).sqrt()
    neighbours = scaled.roll(1, 2) + scaled.roll(1, 3)
    return (ratio / (0.4 + ratio)) * (scaled + 0.3 * torch.tanh(neighbours))


class Network:
    """The same network behind the conventions of a schedule: what it sees, how it counts time."""

    def __init__(self, schedule):
        self.schedule, self.prediction = schedule, "eps"

    def __call__(self, x, t, y=None):
        alpha, ratio = self.level(t.double() / 1000)
        u = x.double() / alpha.view(-1, 1, 1, 1)
        return noise_of(u, ratio).to(x.dtype)

    def level(self, t):
        s = self.schedule
        if isinstance(s, VE):
            return torch.ones_like(t), s.low * (s.high / s.low) ** t
        alpha = (-((s.b1 - s.b0) * t**2 / 4 + s.b0 * t / 2)).exp()
        return alpha, (1 - alpha**2).sqrt() / alpha


class Discrete(Network):
    def level(self, t):
        alpha, sigma, _ = self.schedule.at_timesteps((t * 1000).round().cpu())
        alpha, sigma = (v[: len(t)] for v in (alpha, sigma))
        return alpha, sigma / alpha


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("name", METHODS)
def test_three_parametrisations_give_the_same_samples(name, steps):
    """Model times are rounded to float32 on their way, which moves levels by 1e-6 of themselves."""
    vp = VP()
    levels = vp.levels(steps, "trailing")
    ratios = (levels.sigma / levels.alpha)[:-1]
    noise, method = draw(*SHAPE), METHODS[name]
    run = dict(sampler=method, steps=steps, seed=5)
    want = samplers.sample(Discrete(vp), noise, schedule=Given(ratios, vp), **run)
    ve, sde = VE(0.005, 200.0), VPSDE()
    # The state is x / alpha here, the first one too.
    start = noise / levels.alpha[0].float()
    exploding = samplers.sample(Network(ve), start, schedule=Given(ratios, ve), **run)
    continuous = samplers.sample(Network(sde), noise, schedule=Given(ratios, sde), **run)
    size = want.abs().max()
    assert (exploding - want).abs().max() < 1e-5 * size
    assert (continuous - want).abs().max() < 1e-5 * size


def test_a_first_state_without_its_scale_would_be_seen():
    """Given standard noise, a variance-exploding run begins where there is hardly any."""
    ve = VE()
    noise = draw(*SHAPE)
    right = samplers.sample(Network(ve), ve.start * noise, schedule=ve, steps=20)
    wrong = samplers.sample(Network(ve), noise, schedule=ve, steps=20)
    assert (right - wrong).abs().max() > 0.1


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("schedule", [VE(), VE(0.1, 3.0), VPSDE(), VPSDE(0.0, 5.0)], ids=str)
def test_levels_and_their_inverse(schedule, spacing):
    alpha, sigma, t = schedule.levels(9, spacing)
    assert alpha.shape == sigma.shape == (10,) and t.shape == (9,) and alpha.dtype == torch.float64
    assert float(t[0]) == 1000 and (t[1:] < t[:-1]).all()
    assert float(alpha[-1]) == 1 and float(sigma[-1]) == 0
    found = schedule.at((sigma / alpha)[:-1])
    for one, other in zip(found, (alpha[:-1], sigma[:-1], t), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-9)


def test_levels_are_the_papers():
    alpha, sigma, t = VE(0.01, 50.0).levels(5, "linspace")
    geometric = [0.01 * 5000 ** (k / 4) for k in (4, 3, 2, 1, 0)]
    assert torch.allclose(sigma[:-1], torch.tensor(geometric, dtype=torch.float64), rtol=1e-12)
    assert (alpha == 1).all()
    sde = VPSDE(0.1, 20.0)
    alpha, sigma, t = sde.levels(4, "trailing")
    integral = 0.1 + 19.9 / 2  # of beta over [0, 1]
    assert math.isclose(alpha[0], math.exp(-integral / 2), rel_tol=1e-12)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(5, dtype=torch.float64))


def test_continuous_time_is_the_limit_of_the_discrete():
    """Betas from 1e-4 to 0.02 in 1000 steps are the rates 0.1 to 20 over [0, 1]."""
    discrete = VP().levels(1000, "trailing")
    # Step k of the discrete ends at t = k / 1000. It has prod (1 - beta) in the place of
    # exp(-sum beta): ln alpha differs by sum beta^2 / 4 = 1000 * 0.02^2 / 3 / 4 = 0.033.
    alpha, _, _ = VPSDE().levels(1000, "trailing")
    away = (alpha[:-1] / discrete.alpha[:-1]).log()
    assert away.abs().max() < 0.036 and abs(away[0] - 0.0336) < 1e-3


def test_the_step_of_a_run_adds_variance():
    """Ancestral sampling of the VE equation: noise of variance s^2 (t^2 - s^2) / t^2."""
    run = Run(Network(VE()), SHAPE, sampler=DDPM(), steps=6, schedule=VE())
    t2, s2 = run.sigma[:-2] ** 2, run.sigma[1:-1] ** 2
    want = (s2 * (t2 - s2) / t2).sqrt()
    assert torch.allclose(run.rows[:-1, 7].double(), want, rtol=1e-6)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: VE(0.0, 1.0), "low, high are 0.0, 1.0"),
        (lambda: VE(2.0, 1.0), "need 0 < low < high"),
        (lambda: VPSDE(-1.0, 1.0), "b0, b1 are -1.0, 1.0"),
        (lambda: VPSDE(last=0.0), "last is 0.0"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
