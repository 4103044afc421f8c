"""Score distillation: the expected gradient in closed form, through renderers, without caches."""

import math

import pytest
import torch

import fastdiff
from fastdiff.methods.sds import WEIGHTS, Distilled, score_distillation
from fastdiff.methods.trajectory import running
from fastdiff.models import DiT
from fastdiff.ops.fused_step import philox_normal
from fastdiff.samplers import DDIM, Run
from fastdiff.testing import draw_weights, unchanged
from fastdiff.testing_gaussian import GaussianModel

SHAPE = (3, 2, 4, 5)
SETTINGS = dict(sampler=DDIM(), steps=10)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian(prediction="eps", **kwargs):
    mean, variance = draw(1, *SHAPE[1:], seed=2), 0.2 + draw(1, *SHAPE[1:], seed=3).square()
    return GaussianModel(mean, variance, prediction=prediction, **kwargs)


def expected(model, run, x, levels, weight):
    """``w sigma alpha (x - m) / (alpha^2 S + sigma^2)`` in float64."""
    alpha, sigma = (v[levels].view(-1, 1, 1, 1) for v in (run.alpha, run.sigma))
    total = alpha**2 * model.variance.double() + sigma**2
    away = x.double() - model.mean.double()
    return WEIGHTS[weight](alpha, sigma) * sigma * alpha * away / total


@pytest.mark.parametrize("weight", ["sigma2", "const"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_expected_gradient_is_the_closed_form(prediction, weight):
    """The model is linear, so a pair of noise and its negative has no randomness left; levels of
    their own for the samples, the noisiest and the cleanest among them."""
    model, x = gaussian(prediction), draw(*SHAPE, seed=4)
    for seed, levels in enumerate(([0, 4, 9], [9, 3, 3])):
        levels = torch.tensor(levels)
        with running(model, x, **SETTINGS) as run:
            distilled, eps = Distilled(run, weight), draw(*SHAPE, seed=5 + seed)
            with unchanged(x, eps, levels):
                g = 0.5 * (distilled(x, levels, eps) + distilled(x, levels, -eps))
        want = expected(model, run, x, levels, weight)
        assert (g - want).abs().max() < 2e-6


def test_it_is_the_mean_over_noise():
    model, n = gaussian(), 4000
    x = draw(1, *SHAPE[1:], seed=4).expand(n, -1, -1, -1)
    levels = torch.full((n,), 6)
    with running(model, x, **SETTINGS) as run:
        g = Distilled(run)(x, levels, draw(*x.shape, seed=5)).double()
        want = expected(model, run, x[:1], levels[:1], "sigma2")
    error = g.std(0) / math.sqrt(n)
    assert ((g.mean(0) - want[0]).abs() < 4.5 * error + 1e-7).all()


def test_through_a_linear_renderer_it_is_the_transpose():
    """x = A theta, B views of one theta: A^T of the gradients, summed."""
    a, theta = draw(math.prod(SHAPE), 6, seed=7) / 5, draw(6, seed=8)
    model, found = gaussian(), []
    with unchanged(theta):
        score_distillation(
            model, theta, lambda p, k: (a @ p).view(SHAPE), updates=3, antithetic=True, lr=0.1,
            callback=lambda k, p, g: found.append((p, g)), **SETTINGS,
        )  # fmt: skip
    levels = [t.view(-1) for t in model.calls]
    run = Run(model, SHAPE, **SETTINGS)
    before = theta
    for k, (after, g) in enumerate(found):
        pair = levels[2 * k : 2 * k + 2]
        assert torch.equal(*pair)
        index = torch.stack([(run.times == t).nonzero()[0, 0] for t in pair[0]])
        want = (
            a.T.double() @ expected(model, run, (a @ before).view(SHAPE), index, "sigma2").flatten()
        )
        assert torch.allclose(g.double(), want, atol=2e-6)
        before = after


def test_a_gradient_through_the_model_would_be_seen():
    """Of 1/2 |eps_hat - eps|^2 it has one more Jacobian of the network."""
    model, x = gaussian(), draw(*SHAPE, seed=4)
    levels = torch.tensor([2, 5, 8])
    run = Run(model, x, **SETTINGS)
    alpha, sigma = (v[levels].view(-1, 1, 1, 1) for v in (run.alpha, run.sigma))
    jacobian = sigma / (alpha**2 * model.variance.double() + sigma**2)
    want = expected(model, run, x, levels, "const")
    assert (jacobian * alpha * want - want).abs().max() > 1e-2


def test_levels_are_uniform_over_those_asked_for():
    model = gaussian()
    theta = draw(200, *SHAPE[1:])
    score_distillation(model, theta, lambda p, k: p, updates=50, levels=(2, 7), **SETTINGS)
    run = Run(model, SHAPE, **SETTINGS)
    times = torch.cat(model.calls)
    counts = torch.stack([(times == t).sum() for t in run.times]).double()
    assert counts.sum() == 10000 and counts[:2].sum() == 0 and counts[7:].sum() == 0
    assert ((counts[2:7] - 2000).abs() < 4 * math.sqrt(10000 * 0.2 * 0.8)).all()


def test_it_finds_the_mode():
    """For identity renders of Gaussian data the mean, to the size of the last steps."""
    model = gaussian()
    start = model.mean.detach() + 0.5 * draw(*SHAPE)
    found = score_distillation(
        model, start, lambda p, k: p, updates=300, antithetic=True, weight="const",
        lr=lambda k: 0.1 * 0.985**k, **SETTINGS,
    )  # fmt: skip
    assert (found - model.mean).abs().max() < 1e-2


def test_guidance_is_that_of_samplers():
    model = gaussian(classes=True)
    x, levels, eps = draw(*SHAPE, seed=4), torch.tensor([5, 5, 5]), draw(*SHAPE, seed=5)
    classes = torch.tensor([0, 1, 0])
    settings = dict(classes=classes, guidance=torch.tensor([7.5, 1.0, 3.0]), **SETTINGS)
    with running(model, x, **settings) as run:
        distilled = Distilled(run, "const")
        g = distilled(x, levels, eps)
        noisy = float(run.alpha[5]) * x + float(run.sigma[5]) * eps
        m = run.combined(run.predict(5, noisy))
    assert torch.allclose(g, m - eps, atol=1e-6)


def test_batch_of_samples_is_each_alone():
    model, theta, seeds = gaussian(), draw(*SHAPE), torch.tensor([4, 5, 6])
    run = dict(updates=5, **SETTINGS)
    whole = score_distillation(model, theta, lambda p, k: p, seed=seeds, **run)
    for b in range(3):
        s = slice(b, b + 1)
        alone = score_distillation(model, theta[s], lambda p, k: p, seed=seeds[s], **run)
        assert torch.equal(whole[s], alone)


@torch.no_grad()
def test_caches_are_off():
    net = draw_weights(
        DiT(input_size=8, hidden_size=32, depth=4, num_heads=2, in_channels=2, num_classes=3)
    ).eval()
    theta = draw(2, 2, 8, 8)
    run = dict(updates=6, steps=10)
    plain = score_distillation(net, theta, lambda p, k: p, **run)
    cached = score_distillation(
        net, theta, lambda p, k: p, cache=fastdiff.cache.DeepCache(3), **run
    )
    assert torch.allclose(plain, cached, atol=1e-5)


def test_nan_stays_in_its_sample():
    model, theta = gaussian(), draw(*SHAPE)
    good = score_distillation(model, theta, lambda p, k: p, updates=3, **SETTINGS)
    theta[1] = math.nan
    found = score_distillation(model, theta, lambda p, k: p, updates=3, **SETTINGS)
    assert found[1].isnan().all()
    assert torch.equal(found[0], good[0]) and torch.equal(found[2], good[2])


def test_noise_is_the_run_s():
    with running(gaussian(), SHAPE, seed=torch.tensor([1, 2, 3]), **SETTINGS) as run:
        one, two = (philox_normal(SHAPE, *run.noise(17)) for _ in range(2))
    assert not torch.isclose(one, two).any(-1).all()


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(updates=0), "updates is 0"),
        (dict(weight="snr"), "weight is 'snr'"),
        (dict(levels=(3, 11)), r"levels is \(3, 11\), need \(first, stop\)"),
        (dict(lr=[0.1, 0.1]), "scale has 2 entries, need 100"),
        (dict(guidance_rescale=0.5), "guidance_rescale is 0.5, need 0"),
        (dict(render=lambda p, k: p[: 3 - k]), r"render gives \[2, 2, 4, 5\] at update 1"),
    ],
)
def test_bad_input(settings, words):
    settings = dict(render=lambda p, k: p) | settings
    theta = draw(*SHAPE)
    with unchanged(theta), pytest.raises(ValueError, match=words):
        score_distillation(gaussian(), theta, **SETTINGS, **settings)


def test_a_renderer_that_raises_leaves_everything_alone():
    def broken(p, k):
        raise RuntimeError("no view today")

    with pytest.raises(RuntimeError, match="no view today"):
        score_distillation(gaussian(), draw(*SHAPE), broken, **SETTINGS)
    assert torch.is_grad_enabled()
