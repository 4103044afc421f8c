"""Self-guidance and refinement of series: against affine recursions with the same noise."""

import math

import pytest
import torch

from fastdiff import samplers
from fastdiff.methods.tsdiff import (
    LANGEVIN_STREAM,
    NOISE_STREAM,
    observation_loss,
    quantile_levels,
    refine,
    tsdiff,
)
from fastdiff.ops.fused_step import Noise, philox_normal
from fastdiff.samplers import DDIM, DDPM, Run
from fastdiff.testing_gaussian import GaussianModel, affine, recursion

STEPS, C, L = 12, 2, 5
GENERATOR = torch.Generator().manual_seed(2)
OBSERVED = torch.randn(1, C, L, generator=GENERATOR)
MASK = torch.tensor([True, True, False, True, False]).expand(1, C, L)


def series(prediction="eps"):
    g = torch.Generator().manual_seed(1)
    mean, variance = torch.randn(1, C, L, generator=g), torch.rand(1, C, L, generator=g) + 0.2
    return GaussianModel(mean, variance, prediction=prediction)


def clean(model, run, i, u):
    """``f(u)`` at level i and its slope: ``f = slope u + rest``, elementwise in float64."""
    alpha, sigma = float(run.alpha[i]), float(run.sigma[i])
    mean, variance = model.mean.detach().double(), model.variance.detach().double()
    total = alpha**2 * variance + sigma**2
    slope = alpha * variance / total
    return slope * u + sigma**2 * mean / total, slope


def slopes(loss, kappa, away):
    """``-d rho(away) / d f`` for ``away = observed - f``."""
    if loss == "mse":
        return away
    return torch.where(away > 0, kappa.view(-1, 1, 1).double(), kappa.view(-1, 1, 1).double() - 1)


@pytest.mark.parametrize("loss", ["mse", "quantile"])
@pytest.mark.parametrize(
    "sampler, on, at",
    [
        (DDPM(), None, "before"),
        (DDPM(), "mean", "after"),
        (DDIM(), None, "before"),
        (DDIM(eta=0.7), "eps", "before"),
    ],
)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_path_is_the_affine_recursion(prediction, sampler, on, at, loss):
    model, scale, kappa = series(prediction), 0.6, torch.tensor([0.1, 0.5, 0.8])
    x = torch.randn(3, C, L, generator=torch.Generator().manual_seed(4))
    settings = dict(sampler=sampler, steps=STEPS, seed=6)
    found = tsdiff(
        model, x, OBSERVED, MASK, scale=scale, loss=loss, kappa=kappa, on=on, at=at, **settings
    )
    run = Run(model, x, **settings)
    mean = on == "mean" or (on is None and isinstance(sampler, DDPM))

    def push(i, u):  # d log p(y | u) / d u with the time of level i
        f, slope = clean(model, run, i, u)
        return torch.where(MASK, slopes(loss, kappa, OBSERVED.double() - f), 0.0) * slope

    u = x.double()
    with torch.no_grad():
        for i, (a, b, s) in enumerate(affine(run.table, run, model)):
            z = philox_normal(x.shape, *Noise(run.seeds, run.slots, i)).double()
            old, u = u, a * u + b + s * z
            if mean:
                u = u + scale * s**2 * push(i, u if at == "after" else old)
            else:
                alpha, sigma = float(run.alpha[i]), float(run.sigma[i])
                c_m = float(run.table.rows[i, 4])  # of the prediction: v is alpha^-1-scaled noise
                per_eps = 1.0 if prediction == "eps" else (alpha**2 + sigma**2) / alpha
                u = u - c_m * per_eps * scale * sigma * push(i, old)
    assert (found - u).abs().max() < 5e-5


def test_law_is_the_gaussian_recursion():
    """Mean and variance of many forecasts: the noise is right, too."""
    model = GaussianModel(torch.full((1, 1, 2), 1.0), torch.full((1, 1, 2), 0.5))
    settings = dict(sampler=DDPM(), steps=20)
    observed, mask = torch.tensor([[[2.0, 9.0]]]), torch.tensor([[[True, False]]])
    count = 20000
    found = tsdiff(
        model, (count, 1, 2), observed, mask, scale=1.5, loss="mse", seed=8, **settings
    ).double()[:, 0]
    run = Run(model, (1, 1, 2), **settings)
    m = v = torch.zeros(1, 1, 2).double()
    v = v + 1
    with torch.no_grad():
        for i, (a, b, s) in enumerate(affine(run.table, run, model)):
            rest, slope = clean(model, run, i, torch.zeros(1, 1, 2).double())
            k = torch.where(mask, 1.5 * s**2 * slope, 0.0)
            a, b = a - k * slope, b + k * (observed - rest)
            m, v = a * m + b, a**2 * v + s**2
    free = recursion(run, model)
    assert torch.allclose(m[..., 1], free[0][..., 1]) and (m - free[0])[0, 0, 0] > 0.05
    # Four standard errors of a mean and of a variance of normal numbers.
    assert ((found.mean(0) - m[0, 0]).abs() < 4 * (v[0, 0] / count).sqrt()).all()
    assert ((found.var(0) - v[0, 0]).abs() < 4 * v[0, 0] * math.sqrt(2 / count)).all()


@pytest.mark.parametrize("loss", ["mse", "quantile"])
def test_gradient_of_the_loss_is_its_difference(loss):
    kappa = torch.tensor([0.2, 0.9]).double()
    observed = OBSERVED.double()
    energy = observation_loss(observed, MASK, loss, kappa)
    f = torch.randn(2, C, L).double().requires_grad_()
    (g,) = torch.autograd.grad(energy(f).sum(), f)
    assert (g[..., ~MASK[0, 0]] == 0).all()
    for b, c, place in ((0, 0, 0), (1, 1, 3), (0, 1, 1)):
        step = torch.zeros_like(f)
        step[b, c, place] = 1e-6
        with torch.no_grad():
            slope = ((energy(f + step) - energy(f - step)) / 2e-6)[b]
        assert abs(slope - g[b, c, place]) < 1e-6


def test_minimum_of_the_quantile_loss_is_the_quantile():
    data = torch.randn(1, 1, 999, generator=torch.Generator().manual_seed(0)).double()
    for kappa in (0.1, 0.5, 0.9):
        energy = observation_loss(data, torch.ones(1, 1, 999, dtype=torch.bool), kappa=kappa)
        q = data.quantile(kappa)
        best = energy(q.expand(1, 1, 999))
        assert all(energy((q + d).expand(1, 1, 999)) > best for d in (-0.05, 0.05))


def test_levels_of_quantiles():
    assert torch.allclose(quantile_levels(3), torch.tensor([0.25, 0.5, 0.75]))
    assert torch.equal(quantile_levels(2, 2), quantile_levels(2).repeat(2))
    model, x = series(), torch.randn(3, C, L)
    settings = dict(steps=STEPS, sampler="ddpm")
    given = tsdiff(model, x, OBSERVED, MASK, kappa=quantile_levels(3), **settings)
    assert torch.equal(tsdiff(model, x, OBSERVED, MASK, **settings), given)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m"])
def test_without_scale_or_observations_it_is_plain_sampling(sampler):
    model, settings = series(), dict(steps=STEPS, sampler=sampler, seed=3)
    plain = samplers.sample(model, (3, C, L), **settings)
    found = tsdiff(model, (3, C, L), OBSERVED, MASK, scale=0.0, **settings)
    assert torch.equal(found, plain)
    nothing = torch.full_like(OBSERVED, math.nan)  # NaN where nothing was observed is usual
    found = tsdiff(model, (3, C, L), nothing, torch.zeros_like(MASK), **settings)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("loss", ["mse", "quantile"])
def test_missing_values_do_not_count(loss):
    model, x = series(), torch.randn(3, C, L)
    gaps = torch.where(MASK, OBSERVED, math.nan)
    settings = dict(steps=STEPS, sampler="ddpm", scale=2.0, loss=loss)
    found = tsdiff(model, x, gaps, MASK, **settings)
    assert torch.equal(found, tsdiff(model, x, OBSERVED, MASK, **settings))


def test_all_observed_comes_near_to_what_was_observed():
    model = GaussianModel(torch.zeros(1, 1, 4), torch.ones(1, 1, 4))
    observed, mask = torch.randn(1, 1, 4), torch.ones(1, 1, 4, dtype=torch.bool)
    settings = dict(steps=40, loss="mse")
    far = samplers.sample(model, (8, 1, 4), steps=40) - observed
    near = tsdiff(model, (8, 1, 4), observed, mask, scale=5.0, **settings) - observed
    assert near.abs().mean() < 0.5 * far.abs().mean()


def test_batch_of_series_is_each_alone():
    model, x = series(), torch.randn(3, C, L)
    seeds, kappa = torch.tensor([5, 6, 7]), torch.tensor([0.1, 0.5, 0.9])
    observed = torch.randn(3, C, L)
    settings = dict(steps=STEPS, sampler="ddpm", scale=3.0)
    whole = tsdiff(model, x, observed, MASK, kappa=kappa, seed=seeds, **settings)
    again = refine(model, x, observed, MASK, kappa=kappa, seed=seeds, steps=STEPS)
    for b in range(3):
        part = slice(b, b + 1)
        own = dict(kappa=kappa[part], seed=seeds[part])
        alone = tsdiff(model, x[part], observed[part], MASK, **own, **settings)
        assert (whole[part] - alone).abs().max() < 1e-6
        alone = refine(model, x[part], observed[part], MASK, steps=STEPS, **own)
        assert (again[part] - alone).abs().max() < 1e-6


@pytest.mark.parametrize("how", ["langevin", "mle"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_refinement_is_the_affine_recursion(prediction, how):
    model, x = series(prediction), torch.randn(3, C, L)
    eta, gamma, lam, time = 0.05, 0.2, 0.7, 200.0
    found = refine(
        model, x, OBSERVED, MASK, iterations=15, time=time, eta=eta, gamma=gamma, lam=lam,
        loss="mse", how=how, steps=STEPS, seed=2,
    )  # fmt: skip
    run = Run(model, x, steps=STEPS, seed=2)
    i = min(range(STEPS), key=lambda k: abs(float(run.table.t[k]) - time))
    alpha, sigma = float(run.alpha[i]), float(run.sigma[i])
    mean, variance = model.mean.detach().double(), model.variance.detach().double()
    total = alpha**2 * variance + sigma**2
    u = x.double()
    for k in range(15):
        number = k if k < STEPS else k + 1  # that of the first state is left out
        z = philox_normal(x.shape, *Noise(run.seeds, run.slots, number, NOISE_STREAM)).double()
        xi = philox_normal(x.shape, *Noise(run.seeds, run.slots, number, LANGEVIN_STREAM)).double()
        away = (sigma * alpha * (u - mean) - alpha**2 * variance * z) / total
        g = 2 * sigma * alpha / total * away
        g = g - lam * torch.where(MASK, OBSERVED.double() - u, 0.0)
        u = u - eta * g + (math.sqrt(2 * eta * gamma) * xi if how == "langevin" else 0.0)
    assert (found - u).abs().max() < 5e-5


def test_no_refinement():
    x = torch.randn(3, C, L)
    assert torch.equal(refine(series(), x, OBSERVED, MASK, iterations=0), x)


def test_gradient_of_the_batch_mean_would_be_seen():
    """A loss averaged over the batch weakens the guidance of every sample of a larger batch."""
    model, x = series(), torch.randn(3, C, L)
    settings = dict(steps=STEPS, sampler="ddpm", kappa=0.5)
    whole = tsdiff(model, x, OBSERVED, MASK, scale=3.0 / 3, **settings)  # what a mean does
    alone = tsdiff(model, x[:1], OBSERVED, MASK, scale=3.0, **settings)
    assert (whole[:1] - alone).abs().max() > 1e-2


def test_model_that_raises():
    x = torch.randn(2, C, L)
    before = x.clone()

    def broken(x, t, y):
        raise RuntimeError("no series today")

    with pytest.raises(RuntimeError, match="no series today"):
        tsdiff(broken, x, OBSERVED, MASK, steps=3)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(observed=torch.zeros(4)), r"observed is \[4\], need a tensor \[B|1, C, L\]"),
        (dict(mask=MASK.float()), r"mask is torch.float32 .* need bool"),
        (dict(loss="crps"), "loss is 'crps'"),
        (dict(kappa=1.0), "kappa is 1.0"),
        (dict(kappa=torch.ones(3)), r"kappa is torch.float32 \[3\], need floats \[2\]"),
        (dict(on="x"), "on is 'x'"),
        (dict(on="mean"), "draws no noise"),
        (dict(at="during"), "at is 'during'"),
        (dict(at="after"), "at is 'after' and on is 'eps'"),
        (dict(x=(2, C)), r"x is \[2, 2\], need series"),
    ],
)
def test_bad_input(change, words):
    args = dict(x=(2, C, L), observed=OBSERVED, mask=MASK) | change
    with pytest.raises(ValueError, match=words):
        tsdiff(series(), steps=3, **args)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(iterations=-1), "iterations is -1"),
        (dict(eta=0), "eta is 0"),
        (dict(gamma=-1.0), "gamma is -1.0"),
        (dict(how="adam"), "how is 'adam'"),
    ],
)
def test_bad_input_of_refinement(change, words):
    with pytest.raises(ValueError, match=words):
        refine(series(), torch.zeros(2, C, L), OBSERVED, MASK, steps=3, **change)
