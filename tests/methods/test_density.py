"""Log densities: divergences against Jacobians, paths against closed forms."""

import math

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.methods.density import (
    divergence,
    interpolant_log_density,
    log_density,
    rademacher,
    standard_normal,
    transport,
)
from fastdiff.models.dit import DiT
from fastdiff.ops import Noise
from fastdiff.samplers import Flow
from fastdiff.samplers.interpolant import Interpolant
from fastdiff.samplers.schedule import Levels
from fastdiff.testing_gaussian import GaussianModel


class Late(Flow):
    """Straight paths from s = 0.99 to 0.01."""

    def levels(self, steps, spacing, extra=0):
        ratio = torch.logspace(2, -2, steps, dtype=torch.float64)
        s = ratio / (1 + ratio)
        end = torch.ones(1, dtype=torch.float64)
        return Levels(torch.cat((1 - s, end)), torch.cat((s, 0 * end)), 1000 * s)


def mixture(**more):
    mean = torch.tensor([[1.5, 0.0, -0.5], [-1.0, 1.0, 0.5]], dtype=torch.float64)
    variance = torch.tensor([[0.3, 0.5, 0.4], [0.6, 0.2, 0.3]], dtype=torch.float64)
    return GaussianModel(mean, variance, schedule=Late(), **more)


def true_logp(model, x, extra=0.0):
    total = model.variance + extra
    away = x.double()[:, None] - model.mean
    parts = -0.5 * (away**2 / total + (2 * math.pi * total).log()).sum(2)
    return (parts.logsumexp(1) - math.log(len(model.mean))).detach()


def test_divergence_is_the_trace_of_the_jacobian():
    torch.manual_seed(0)
    w = torch.randn(12, 12, dtype=torch.float64)

    def f(x):
        return torch.tanh(x.flatten(1) @ w.T).view_as(x)

    x = torch.randn(4, 2, 3, 2, dtype=torch.float64)
    value, found = divergence(f, x)
    assert torch.equal(value, f(x))
    for b in range(4):
        one = slice(b, b + 1)
        jacobian = torch.autograd.functional.jacobian(f, x[one]).view(12, 12)
        assert torch.allclose(found[b], jacobian.trace(), atol=1e-12)


def test_probes_are_unbiased_with_their_variance():
    """Mean and variance 2 sum_{i != j} J_ij^2 of a symmetric J, within 4 standard errors."""
    torch.manual_seed(1)
    j = torch.randn(6, 6, dtype=torch.float64)
    j = (j + j.T) / 2
    x, n = torch.zeros(1, 6, dtype=torch.float64), 20000
    rows = x.expand(n, 6)
    v = rademacher((n, 6), Noise(3, None, 0, 16), torch.float64)
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    _, found = divergence(lambda z: z @ j.T, rows, v[None])
    off = 2 * (j.square().sum() - j.diagonal().square().sum())
    error = (off / n).sqrt()
    assert abs(found.mean() - j.trace()) < 4 * error
    assert abs(found.var() - off) < 4 * off * math.sqrt(10 / n)
    gaussian = torch.randn(1, n, 6, dtype=torch.float64)  # another law of probes: more variance
    _, other = divergence(lambda z: z @ j.T, rows, gaussian)
    assert other.var() > found.var() + 4 * off * math.sqrt(10 / n)


def test_probes_are_exact_for_diagonal_jacobians():
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    probes = rademacher((3, 2, 5), Noise(0, None, 0, 16), torch.float64)[None]
    exact = divergence(torch.sin, x)[1]
    assert torch.allclose(exact, divergence(torch.sin, x, probes)[1], atol=1e-12)
    assert torch.allclose(exact, torch.cos(x).flatten(1).sum(1))


def test_kernels_without_forward_mode_do_not_give_zeros():
    """A network of this package: its kernels have no tangents, the reference rows have."""
    model = DiT(
        input_size=4, patch_size=2, in_channels=1, hidden_size=32, depth=1, num_heads=2,
        num_classes=3, learn_sigma=False, prediction="eps",
    )  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    x, t, y = torch.randn(2, 1, 4, 4), torch.tensor([300.0, 20.0]), torch.tensor([1, 2])
    probe = rademacher((2, 1, 4, 4), Noise(0, None, 0, 16))
    with torch.no_grad():
        _, found = divergence(lambda z: model(z, t, y), x, probe[None])
        h = 1e-2
        ahead, back = (model(x + s * h * probe, t, y) for s in (1, -1))
        target = (probe * (ahead - back) / (2 * h)).flatten(1).sum(1).double()
    assert target.abs().min() > 1e-3
    assert torch.allclose(found, target, rtol=2e-2, atol=2e-3)


def test_transport_is_of_second_order():
    """x' = -x t: x(1) = x e^(-1/2), and the integral of the divergence is -D / 2."""
    x = torch.randn(3, 4, dtype=torch.float64)
    errors = []
    for n in (10, 20, 40):
        times = [j / n for j in range(n + 1)]
        end, integral = transport(lambda z, j, times=times: -times[j] * z, x, times)
        assert torch.allclose(integral, torch.full((3,), -2.0, dtype=torch.float64))
        errors.append((end - x * math.exp(-0.5)).abs().max())
    assert 1.8 < math.log2(errors[0] / errors[-1]) / 2 < 2.3


def test_density_of_a_mixture():
    """Against the law of x0 + tau_0 eps, tau_0 = 0.01 of the cleanest level; the start is taken
    for N(0, 1 + tau^2), tau = 100: an error of the order of the data's moments over tau^2."""
    model = mixture()
    x = torch.randn(6, 3, dtype=torch.float64)
    coarse, fine = (log_density(model, x, steps=n) for n in (12, 24))
    true = true_logp(model, x, 1e-4)
    errors = [(found.logp - true).abs().max() for found in (coarse, fine)]
    assert errors[0] > 3 * errors[1], errors
    limit = (4 * fine.logp - coarse.logp) / 3  # of a second-order method, to a higher order
    assert (limit - true).abs().max() < 0.2 * errors[1]
    assert fine.x.shape == x.shape
    flow = log_density(mixture(prediction="flow"), x, steps=12)
    assert torch.allclose(flow.logp, coarse.logp, atol=1e-6)


def test_sum_over_a_grid_is_one():
    model = GaussianModel(
        torch.tensor([[1.0], [-1.5]]).double(),
        torch.tensor([[0.3], [0.6]]).double(),
        schedule=Late(),
    )
    x = torch.linspace(-7, 6, 150, dtype=torch.float64)[:, None]
    coarse, fine = (log_density(model, x, steps=n).logp for n in (12, 24))
    total = ((4 * fine - coarse) / 3).exp().sum() * (x[1] - x[0])
    assert total == pytest.approx(1.0, abs=2e-2)


def test_volume_left_out_would_be_seen():
    model, x = mixture(), torch.randn(4, 3, dtype=torch.float64)
    found = log_density(model, x, steps=8)
    faulty = standard_normal(found.x / float(1 / 101), math.hypot(1.0, 100.0))
    assert ((faulty - true_logp(model, x, 1e-4)).abs() > 5).all()


def test_probes_estimate_the_exact_density():
    model, x = mixture(), torch.randn(4, 3, dtype=torch.float64)
    exact = log_density(model, x, steps=5).logp
    found = torch.stack([log_density(model, x, steps=5, probes=2, seed=s).logp for s in range(8)])
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact).abs() < 6 * error + 1e-9).all()


class Gaussians(nn.Module):
    """b and s of an interpolant between two Gaussians."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x, t, y=None):
        t = t.double() / 1000
        a, b = (c[:, None] for c in self.path.ends(t))
        da, db = (c[:, None] for c in self.path.slopes(t))
        total = a**2 * 0.5 + b**2 * 2.0 + self.path.noise(t)[:, None] ** 2
        rate = a * da * 0.5 + b * db * 2.0 + self.path.product(t)[:, None]
        away = x - (a * 1.0 - b * 3.0)
        return torch.cat((rate / total * away + da * 1.0 - db * 3.0, -away / total), 1)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("path", [Interpolant(), Interpolant("trig", "sin2")])
def test_density_of_an_interpolant(path, backward):
    """N(1, 0.5) to N(-3, 2) in three dimensions: second order towards the closed form."""

    def law(mean, variance):
        return lambda x: standard_normal(x - mean, math.sqrt(variance))

    laws = law(1.0, 0.5), law(-3.0, 2.0)
    base, target = laws[::-1] if backward else laws
    x = torch.randn(5, 3, dtype=torch.float64) + (1.0 if backward else -3.0)
    errors = []
    for steps in (8, 16):
        found = interpolant_log_density(
            Gaussians(path), x, base, interpolant=path, backward=backward, steps=steps
        )
        errors.append((found.logp - target(x)).abs().max())
    assert errors[1] < 0.1 and errors[0] > 2.5 * errors[1], errors


def test_batch_is_its_singles_with_probes():
    model, x, seeds = mixture(), torch.randn(3, 3).double(), torch.tensor([4, 5, 6])
    whole = log_density(model, x, steps=4, probes=1, seed=seeds)
    for b in range(3):
        one = slice(b, b + 1)
        alone = log_density(model, x[one], steps=4, probes=1, seed=seeds[one])
        assert torch.allclose(alone.logp, whole.logp[one], atol=1e-10)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(probes=0), "probes is 0"),
        (dict(clip=1.0), "clip or guidance_rescale is given"),
        (dict(schedule=Flow(), prediction="flow"), "do not fall from a finite sigma / alpha"),
        (dict(sampler="heun"), "do not fall from a finite sigma / alpha"),
    ],
)
def test_bad_input(settings, words):
    x = torch.randn(2, 3).double()
    before = x.clone()
    with pytest.raises(ValueError, match=words):
        log_density(mixture(), x, **settings)
    assert torch.equal(x, before)
    assert fastdiff.dispatch._force_in_effect() == ()


def test_more_bad_input():
    x = torch.randn(2, 3).double()
    with pytest.raises(ValueError, match=r"probes is \[1, 3\]"):
        divergence(torch.sin, x, torch.ones(1, 3))
    with pytest.raises(ValueError, match="f gives"):
        divergence(lambda z: z[:, :2].repeat(1, 2)[:, :1] * z[:, :1].sum(), x)
    with pytest.raises(ValueError, match="steps is 0"):
        interpolant_log_density(Gaussians(Interpolant()), x, standard_normal, steps=0)
    with pytest.raises(ValueError, match=r"base gives \[\]"):
        interpolant_log_density(Gaussians(Interpolant()), x, lambda z: z.sum(), steps=2)
    with pytest.raises(ValueError, match="x is tuple"):
        log_density(mixture(), (2, 3))
