"""Stochastic interpolants: mixtures to mixtures with fields that are known exactly."""

import math

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import samplers
from fastdiff.cache import Forecast
from fastdiff.methods.interpolant import Velocity, drawn, interpolate, losses
from fastdiff.models.dit import DiT
from fastdiff.samplers import DDIM, Flow
from fastdiff.samplers.interpolant import GAMMAS, PATHS, Drift, Interpolant

START = (torch.tensor([[-2.0, 0.5], [1.0, -1.0]]).double(), torch.tensor([0.3, 0.6]).double())
END = (
    torch.tensor([[2.0, 2.0], [-1.0, 1.0], [0.5, -2.5]]).double(),
    torch.tensor([0.2, 0.4, 0.3]).double(),
)


class Mixtures(nn.Module):
    """Exact fields between mixtures (means ``[K, C]``, variances ``[K]``, equal shares): x_t is a
    mixture of all pairs, x0, x1 and z jointly Gaussian within each."""

    def __init__(self, path, first=START, last=END, fields="b,s"):
        super().__init__()
        self.path, self.first, self.last, self.kind = path, first, last, fields

    def forward(self, x, t, y=None):
        t, wide = t.double() / 1000, x.double()
        (m0, v0), (m1, v1) = self.first, self.last
        p = len(m0) * len(m1)
        m0, v0 = m0.repeat_interleave(len(m1), 0), v0.repeat_interleave(len(m1))
        m1, v1 = m1.repeat(p // len(m1), 1), v1.repeat(p // len(v1))
        a, b = (c[:, None] for c in self.path.ends(t))
        da, db = (c[:, None] for c in self.path.slopes(t))
        gamma, product = self.path.noise(t)[:, None], self.path.product(t)[:, None]
        total = a**2 * v0 + b**2 * v1 + gamma**2  # [B, P]
        away = wide[:, None] - a[..., None] * m0 - b[..., None] * m1
        logp = -0.5 * (away.square().sum(2) / total + x.shape[1] * total.log())
        share = logp.softmax(1)[..., None]
        flow = (a * da * v0 + b * db * v1)[..., None] / total[..., None] * away
        v = (share * (flow + da[..., None] * m0 + db[..., None] * m1)).sum(1)
        score = -(share * away / total[..., None]).sum(1)
        if self.kind == "v,eta":
            out = (v, -gamma * score)
        else:
            out = (v - product * score, score)
        return torch.cat(out, 1).to(x.dtype)


def samples(law, n, seed):
    rng = torch.Generator().manual_seed(seed)
    means, variances = law
    pick = torch.randint(len(means), (n,), generator=rng)
    z = torch.randn(n, means.shape[1], generator=rng, dtype=torch.float64)
    return means[pick] + variances[pick, None].sqrt() * z


def distance(x, y):
    """Wasserstein-1 of each coordinate and of two projections, the largest."""
    turns = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.7, -0.7]]).double()
    a, b = ((v.double() @ turns.T).sort(0).values for v in (x, y))
    return (a - b).abs().mean(0).max()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_law_is_that_of_the_other_end_whatever_the_noise(epsilon, backward):
    """Within 1.5 of the distance between two sets of the law itself, and a step's bias."""
    n, path = 2000, Interpolant()
    first, last = (END, START) if backward else (START, END)
    steps = 20 if epsilon == 0 else 60
    found = interpolate(
        Mixtures(path), samples(first, n, 1), backward=backward, epsilon=epsilon, steps=steps
    )
    floor = max(distance(samples(last, n, 2 + i), samples(last, n, 3 + i)) for i in range(4))
    assert distance(found, samples(last, n, 9)) < 1.5 * floor + 0.02


def test_a_wrong_sign_of_the_score_would_be_seen():
    path, n = Interpolant(), 2000
    model = Mixtures(path)

    class Wrong(nn.Module):
        def forward(self, x, t, y=None):
            b, s = model(x, t).chunk(2, 1)
            return torch.cat((b, -s), 1)

    found = interpolate(Wrong(), samples(START, n, 1), epsilon=0.5, steps=50)
    assert distance(found, samples(END, n, 9)) > 0.3


@pytest.mark.parametrize("path", PATHS)
def test_all_paths_arrive(path):
    kind = Interpolant(path, "sin2" if path == "encdec" else "brownian")
    found = interpolate(Mixtures(kind), samples(START, 2000, 1), steps=60)
    floor = max(distance(samples(END, 2000, 2 + i), samples(END, 2000, 3 + i)) for i in range(4))
    assert distance(found, samples(END, 2000, 9)) < 1.5 * floor + 0.03


def test_steps_are_the_affine_recursion():
    """One Gaussian at each end: mean and variance of the discretised equation, within 4 standard
    errors of 50000 samples. The law at the end itself is another, by a step's bias."""
    first = (torch.tensor([[1.0, -1.0]]).double(), torch.tensor([0.5]).double())
    last = (torch.tensor([[-2.0, 3.0]]).double(), torch.tensor([2.0]).double())
    path, steps, n = Interpolant(), 8, 50000
    model = Mixtures(path, first, last)
    x = samples(first, n, 1)
    found = interpolate(model, x, epsilon=0.7, steps=steps, heun=False)
    drift = Velocity(model, path, epsilon=0.7)
    m, v = first[0], first[1].expand(1, 2)
    for i in range(steps):
        t = torch.full((1,), 1000 * i / steps)
        zero = drift(torch.zeros(1, 2).double(), t)
        slope = drift(torch.ones(1, 2).double(), t) - zero
        m = m + (slope * m + zero) / steps
        v = (1 + slope / steps) ** 2 * v + 2 * 0.7 / steps
    assert ((found.mean(0) - m[0]).abs() < 4 * (v[0] / n).sqrt()).all()
    assert ((found.var(0) - v[0]).abs() < 4 * v[0] * math.sqrt(2 / n)).all()
    assert (v - 2.0).abs().max() > 4 * 2.0 * math.sqrt(2 / n)  # the data's law would not pass


@pytest.mark.parametrize("path", [Interpolant(), Interpolant("trig"), Interpolant("trig", "sin2")])
def test_orthogonality(path):
    """E[(I' + gamma' z - b) phi(x_t)] = 0 and E[(z + gamma s) phi(x_t)] = 0 within 4 errors."""
    n = 40000
    x0, x1 = samples(START, n, 1), samples(END, n, 2)
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t = torch.rand(n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    t = 0.05 + 0.9 * t
    at = drawn(path, x0, x1, t, z)
    b, s = Velocity(Mixtures(path), path).fields(at.x, 1000 * t)
    gamma = path.noise(t)[:, None]
    for phi in (torch.ones_like(at.x), at.x, torch.sin(2 * at.x) * t[:, None]):
        for rest in ((at.velocity - b) * phi, (z + gamma * s) * phi):
            assert (rest.mean(0).abs() < 4 * rest.std(0) / math.sqrt(n)).all()
    wrong = (at.slope - b) * at.x * (t[:, None] - 0.5)  # gamma' z left out: odd about the middle
    assert (wrong.mean(0).abs() > 4 * wrong.std(0) / math.sqrt(n)).any()


def test_losses_are_lowest_at_the_true_fields():
    path, n = Interpolant(), 20000
    x0, x1 = samples(START, n, 1), samples(END, n, 2)
    z = torch.randn(n, 2, dtype=torch.float64)
    t = 0.1 + 0.8 * torch.rand(n, dtype=torch.float64)

    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale, self.model = scale, Mixtures(path)

        def forward(self, x, t, y=None):
            return self.scale * self.model(x, t)

    def found(scale):
        return torch.stack(losses(Velocity(Scaled(scale), path), x0, x1, t, z))

    assert (found(1.0) < found(0.8)).all() and (found(1.0) < found(1.2)).all()


def test_forward_then_backward_is_the_identity_to_second_order():
    path, x = Interpolant("trig"), samples(START, 64, 1)
    errors = []
    for steps in (20, 40, 80):
        there = interpolate(Mixtures(path), x, steps=steps)
        back = interpolate(Mixtures(path), there, steps=steps, backward=True)
        errors.append((back - x).abs().max())
    assert (there - x).abs().max() > 1 and errors[-1] < 2e-2
    order = math.log2(errors[0] / errors[-1]) / 2
    assert 1.6 < order < 3.5, errors


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_fields_in_either_form(epsilon):
    path, x = Interpolant(), samples(START, 5, 1)
    settings = dict(epsilon=epsilon, steps=9, start=0.1, stop=0.9, seed=3)
    by_b = interpolate(Mixtures(path), x, **settings)
    by_v = interpolate(Mixtures(path, fields="v,eta"), x, fields="v,eta", **settings)
    assert torch.allclose(by_b, by_v, atol=1e-5)


def test_straight_paths_from_noise_are_flow_matching():
    """A one-sided path without gamma and a Gaussian start: the sampler of flow models, turned."""
    end = (torch.tensor([[1.0, -0.5]]).double(), torch.tensor([0.5]).double())
    noise = (torch.zeros(1, 2).double(), torch.ones(1).double())
    path = Interpolant(gamma="none")
    x = torch.randn(6, 2, dtype=torch.float64)
    found = interpolate(Mixtures(path, noise, end), x, steps=10, heun=False, fields="b,s")

    class Turned(nn.Module):
        prediction, schedule = "flow", Flow()

        def forward(self, x, t, y=None):
            return -Mixtures(path, noise, end)(x, 1000 - t)[:, :2]

    plain = samplers.sample(Turned(), x, sampler=DDIM(), steps=10)
    assert torch.allclose(found, plain, atol=1e-5)


def test_a_batch_is_its_singles_and_neutral_noise_is_none():
    path, x, seeds = Interpolant(), samples(START, 3, 1), torch.tensor([5, 6, 7])
    whole = interpolate(Mixtures(path), x, epsilon=0.5, steps=7, seed=seeds)
    for b in range(3):
        one = slice(b, b + 1)
        alone = interpolate(Mixtures(path), x[one], epsilon=0.5, steps=7, seed=seeds[one])
        assert torch.allclose(alone, whole[one], atol=1e-12)
    ode = interpolate(Mixtures(path), x, steps=7, heun=False)
    assert torch.equal(ode, interpolate(Mixtures(path), x, steps=7, heun=False, seed=9))


def test_other_shapes_and_guidance():
    class Two(nn.Module):
        num_classes = 2

        def forward(self, x, t, y=None):
            y = y.view(-1, 1, 1, 1)
            return torch.cat((y - x, -x), 1)

    x, y = torch.randn(2, 3, 2, 5), torch.tensor([0, 1])
    found = interpolate(Two(), x, classes=y, guidance=2.0, steps=4, heun=False)
    expected = x
    for _ in range(4):  # guidance 2: 2 (y - x) - (2 - x)
        expected = expected + 0.25 * (2 * y.view(-1, 1, 1, 1) - 2 - expected)
    assert torch.allclose(found, expected, atol=1e-5)


def dit(**more):
    torch.manual_seed(0)
    model = DiT(
        input_size=4, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2,
        num_classes=3, prediction="eps", **more,
    )  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize("heun", [False, True])
def test_caches_are_those_of_the_network(heun):
    model, x, y = dit(learn_sigma=True), torch.randn(2, 1, 4, 4), torch.tensor([0, 2])
    settings = dict(classes=y, steps=6, heun=heun, guidance=1.5)
    plain = interpolate(model, x, **settings)
    assert torch.equal(plain, interpolate(model, x, cache=Forecast(interval=1), **settings))
    cached = interpolate(model, x, cache=Forecast(interval=3), **settings)
    assert not torch.equal(plain, cached)
    fastdiff.accelerate(model, cache=Forecast(interval=3))
    for _ in range(2):  # the second run starts without what the first has kept
        assert torch.equal(cached, interpolate(model, x, **settings))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_slopes_are_those_of_the_coefficients(path, gamma):
    kind, t, h = Interpolant(path, gamma), torch.linspace(0.03, 0.98, 20).double(), 1e-6
    for f, slope in (
        (lambda s: kind.ends(s)[0], kind.slopes(t)[0]),
        (lambda s: kind.ends(s)[1], kind.slopes(t)[1]),
        (kind.noise, kind.noise_slope(t)),
    ):
        assert torch.allclose((f(t + h) - f(t - h)) / (2 * h), slope, atol=1e-6)
    assert torch.allclose(kind.product(t), kind.noise(t) * kind.noise_slope(t))
    ends = torch.tensor([0.0, 1.0]).double()
    a, b = kind.ends(ends)
    assert torch.allclose(a, 1 - ends, atol=1e-12) and torch.allclose(b, ends, atol=1e-12)
    assert (kind.noise(ends) < 1e-12).all() and torch.isfinite(kind.product(ends)).all()


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(fields="b,x"), "fields is 'b,x'"),
        (dict(fields="b", epsilon=0.5), "epsilon is 0.5 and fields 'b'"),
        (dict(epsilon=-1.0), "epsilon is -1.0"),
        (dict(epsilon=math.nan), "epsilon is nan"),
        (dict(epsilon=0.5, heun=True), "epsilon is 0.5"),
        (dict(start=0.5, stop=0.5), "start and stop are 0.5 and 0.5"),
        (dict(fields="v,eta"), "where gamma is 0 and eta means no score"),
        (dict(clip=1.0), "clip is 1.0"),
        (dict(steps=0), "steps is 0"),
    ],
)
def test_bad_input(settings, words):
    x = samples(START, 2, 1)
    before = x.clone()
    with pytest.raises(ValueError, match=words):
        interpolate(Mixtures(Interpolant()), x, **settings)
    assert torch.equal(x, before)


def test_more_bad_input():
    with pytest.raises(ValueError, match="path is 'round'"):
        Interpolant("round")
    with pytest.raises(ValueError, match="width is 0"):
        Interpolant(width=0)
    with pytest.raises(ValueError, match=r"network gives \[2, 2\], need 4 channels"):
        interpolate(lambda x, t, y: x, samples(START, 2, 1))
    with pytest.raises(ValueError, match="x is tuple"):
        interpolate(Mixtures(Interpolant()), (2, 2))
    assert Drift().times(2).tolist() == [0.0, 0.5, 1.0]
