"""AnimateLCM: the consistency sampler is exact at any number of steps; guidance frame by frame."""

import math

import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.methods.animate_lcm import animate_lcm
from fastdiff.models import DiT
from fastdiff.ops.fused_step import COLUMNS
from fastdiff.samplers import LCM, VP, Run
from fastdiff.testing import draw_weights, unchanged

MEAN, VARIANCE = 1.0, 0.5
SHAPE = (2, 3, 5, 4, 6)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Consistency:
    """The solution of the probability-flow ODE from any level to the clean end, for N(m, v):

        f(x, t) = m + sqrt(v / (alpha^2 v + sigma^2)) (x - alpha m)

    as the x0 prediction of which c_skip x + c_out x0 is that map."""

    prediction = "x0"

    def __call__(self, x, t, y=None):
        alpha, sigma, _ = VP().at_timesteps(t.double())
        alpha, sigma = (v[: len(t)].view(-1, *[1] * (x.dim() - 1)) for v in (alpha, sigma))
        wide = x.double()
        f = MEAN + (VARIANCE / (alpha**2 * VARIANCE + sigma**2)).sqrt() * (wide - alpha * MEAN)
        scaled = (10 * t.double()).view(-1, *[1] * (x.dim() - 1))
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return ((f - c_skip * wide) / c_out).to(x.dtype)


def law(model, steps, mean, variance):
    """Mean and variance after a run, by its rows in float64."""
    run = Run(model, (1, 1, 1, 1, 1), sampler="lcm", steps=steps)
    for i, row in enumerate(run.rows.double()):

        def step(x, i=i, row=row):
            m = model(x, run.times[i].expand(1), None)
            return row[2] * x + row[3] * (row[0] * x + row[1] * m) + row[4] * m

        b = step(torch.zeros(1, 1).double())
        a = step(torch.ones(1, 1).double()) - b
        mean, variance = float(a * mean + b), float(a**2 * variance + row[7] ** 2)
    return mean, variance


def first(steps):
    """Mean and variance of the first level, for data N(m, v): not quite standard noise."""
    run = Run(Consistency(), (1, 1), sampler="lcm", steps=steps)
    alpha, sigma = float(run.alpha[0]), float(run.sigma[0])
    return alpha * MEAN, alpha**2 * VARIANCE + sigma**2


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_any_number_of_steps_gives_the_data_s_law(steps):
    """The affine maps of the table, exactly: float32 coefficients are all that is lost."""
    mean, variance = law(Consistency(), steps, *first(steps))
    assert abs(mean - MEAN) < 1e-6 and abs(variance - VARIANCE) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_samples_have_it(steps):
    mean, variance = first(steps)
    start = mean + math.sqrt(variance) * draw(4, 5, 10, 20, 20, seed=steps)
    with unchanged(start):
        x = animate_lcm(Consistency(), start, steps=steps, seed=2).double()
    n = x.numel()
    assert abs(x.mean() - MEAN) < 4 * math.sqrt(VARIANCE / n)
    assert abs(x.var() / VARIANCE - 1) < 4 * math.sqrt(2 / n)


def test_noise_left_out_or_one_more_would_be_seen():
    """A sampler that goes on with f itself, and one that draws noise at the clean end too."""
    run = Run(Consistency(), (1, 1), sampler="lcm", steps=4)
    _, variance = first(4)
    for left_out in (True, False):
        v = variance
        for i in range(4):
            alpha, sigma = float(run.alpha[i]), float(run.sigma[i])
            slope = math.sqrt(VARIANCE / (alpha**2 * VARIANCE + sigma**2))
            noise = run.sigma[i + 1] if i < 3 else 0.1
            v = (slope * run.alpha[i + 1]) ** 2 * v + (0 if left_out else noise**2)
        assert abs(v - VARIANCE) > 5e-3


def test_one_step_is_what_the_model_predicts():
    model, x = Consistency(), draw(*SHAPE)
    found = animate_lcm(model, x, steps=1)
    run = Run(model, x, sampler="lcm", steps=1)
    t = run.times[0].expand(2)
    alpha, sigma = float(run.alpha[0]), float(run.sigma[0])
    f = MEAN + math.sqrt(VARIANCE / (alpha**2 * VARIANCE + sigma**2)) * (x - alpha * MEAN)
    assert torch.allclose(found, f, atol=1e-6)
    assert torch.allclose(found, model(x, t), atol=1e-5)  # c_skip is 2.5e-9 there


def test_the_clean_end_is_a_fixed_point():
    """f(x, 0) = x: the last of all levels is timestep 0, where c_skip = 1 and c_out = 0."""
    table = LCM(original_steps=1000).table(VP(), 1000, "eps", None)
    assert float(table.t[-1]) == 0
    row = dict(zip(COLUMNS, table.rows[-1].tolist(), strict=True))
    assert row["c_x"] == 1 and row["c_m"] == 0 and row["c_0"] == 0 and row["sigma"] == 0


class Classed:
    """N(m_y, v) for two classes, elementwise, so that frames are apart; the null class says the
    mean of what both say."""

    num_classes, prediction = 2, "eps"
    mean = draw(2, 3, 1, 4, 6)

    def __call__(self, x, t, y):
        alpha, sigma, _ = VP().at_timesteps(t.double())
        alpha, sigma = (v[: len(t)].view(-1, 1, 1, 1, 1) for v in (alpha, sigma))
        mean = torch.cat((self.mean, self.mean.mean(0, keepdim=True)))[y].double()
        eps = sigma * (x.double() - alpha * mean) / (alpha**2 * 0.4 + sigma**2)
        return eps.to(x.dtype)


def classed():
    return Classed()


CLASSES = dict(classes=torch.tensor([0, 1]))


def test_without_weights_it_is_plain_sampling():
    for settings in ({}, CLASSES | dict(guidance=2.0), dict(steps=8)):
        found = animate_lcm(classed(), SHAPE, seed=3, **settings)
        plain = samplers.sample(classed(), SHAPE, sampler="lcm", seed=3, **{"steps": 4} | settings)
        assert torch.equal(found, plain)
    ones = animate_lcm(classed(), SHAPE, weights=torch.ones(5), seed=3, **CLASSES)
    plain = samplers.sample(classed(), SHAPE, sampler="lcm", seed=3, steps=4, **CLASSES)
    assert torch.equal(ones, plain)


@pytest.mark.parametrize("per_sample", [False, True])
def test_every_frame_has_its_own_weight(per_sample):
    """The model sees frames apart: frame f is that of a run guided with w_f throughout."""
    w = torch.stack((torch.linspace(1, 3, 5), torch.linspace(2.5, 0, 5)))
    weights = w if per_sample else w[0]
    found = animate_lcm(classed(), SHAPE, weights=weights, seed=3, **CLASSES)
    for f in range(5):
        g = w[:, f] if per_sample else w[0, f].expand(2)
        plain = samplers.sample(
            classed(), SHAPE, sampler="lcm", steps=4, seed=3, guidance=g, **CLASSES
        )
        assert torch.allclose(found[:, :, f], plain[:, :, f], atol=1e-5)
    assert (
        found - animate_lcm(classed(), SHAPE, seed=3, guidance=1.0, **CLASSES)
    ).abs().max() > 0.1


def test_batch_of_videos_is_each_alone():
    w, seeds = torch.stack((torch.linspace(1, 3, 5), torch.linspace(2, 0, 5))), torch.tensor([7, 8])
    whole = animate_lcm(classed(), SHAPE, weights=w, seed=seeds, **CLASSES)
    for b in range(2):
        s = slice(b, b + 1)
        alone = animate_lcm(
            classed(), (1, *SHAPE[1:]), weights=w[s], seed=seeds[s], classes=CLASSES["classes"][s]
        )
        assert torch.equal(whole[s], alone)


@torch.no_grad()
def test_caches_are_off_in_few_steps():
    net = draw_weights(
        DiT(input_size=8, hidden_size=32, depth=4, num_heads=2, in_channels=2, num_classes=3)
    ).eval()

    class Frames(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, y):
            b, c, f = x.shape[:3]
            rows = x.movedim(2, 1).flatten(0, 1)
            y = torch.zeros(b * f, dtype=torch.int64)
            out = self.net(rows, t.repeat_interleave(f), y)[:, :c]
            return out.view(b, f, c, *x.shape[3:]).movedim(1, 2)

    model, shape = Frames(), (1, 2, 3, 8, 8)
    for steps, same in ((4, True), (8, True), (12, False)):
        plain = animate_lcm(model, shape, steps=steps)
        with fastdiff.accelerated(net, cache=fastdiff.cache.DeepCache(3)):
            with fastdiff.request(steps, calls_per_step=1):
                cached = animate_lcm(net_of(net, model), shape, steps=steps)
        assert torch.allclose(plain, cached, atol=1e-5) == same


def net_of(net, model):
    """The frames' model with the acceleration of its network, as a run looks for it."""
    model._fastdiff = net._fastdiff
    return model


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(weights=torch.ones(4)), r"weights is \[4\], need \[5\] or \[2, 5\]"),
        (dict(weights=2.0), "weights is no tensor of floats"),
        (dict(weights=torch.ones(5), guidance=2.0), "guidance and weights are given"),
        (dict(weights=torch.ones(5), classes=None), "weights is given, which needs classes"),
    ],
)
def test_bad_input(settings, words):
    with pytest.raises(ValueError, match=words):
        animate_lcm(classed(), SHAPE, **CLASSES | settings)


def test_states_have_frames():
    with pytest.raises(ValueError, match=r"x is \[2, 3, 4, 6\], need \[B, C, F, H, W\]"):
        animate_lcm(Consistency(), (2, 3, 4, 6))
