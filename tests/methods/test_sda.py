"""Adaptation of inputs (DDA, SDA): filter, closed-form gradient, independence of the batch."""

import math

import pytest
import torch
from torch import nn

from fastdiff import samplers
from fastdiff.cache import Broadcast, FirstBlock
from fastdiff.methods.guide import norms
from fastdiff.methods.sda import low_pass, sda
from fastdiff.models import DiT
from fastdiff.samplers import DDIM, Run
from fastdiff.testing_gaussian import GaussianModel

SHAPE = (2, 8, 12)  # C, H, W
SETTINGS = dict(sampler="ddim", steps=10)


def gaussian(dtype=torch.float32, variance=0.3):
    torch.manual_seed(1)
    mean = torch.randn(1, *SHAPE, dtype=dtype)
    return GaussianModel(mean, torch.full((1, 1, 1, 1), variance, dtype=dtype))


def reference(batch=3, dtype=torch.float32):
    return torch.randn(batch, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_box_filter_is_a_projection(factor):
    phi = low_pass(factor)
    x = reference(dtype=torch.float64)
    low = phi(x)
    assert torch.allclose(phi(low), low, atol=1e-15, rtol=0)
    assert torch.allclose(phi(x - low), torch.zeros_like(x), atol=1e-15, rtol=0)
    if factor == 1:
        assert torch.equal(low, x)
    # Symmetric, so that its transpose in the gradient is itself.
    y = reference(dtype=torch.float64).flip(0)
    assert math.isclose(float((low * y).sum()), float((x * phi(y)).sum()), rel_tol=1e-12)


def test_bicubic_filter_keeps_constants_and_sizes():
    phi = low_pass(4, "bicubic")
    x = torch.full((2, 3, 9, 14), 0.7)
    assert torch.allclose(phi(x), x, atol=1e-6)
    waves = torch.where(torch.arange(14) % 2 == 0, 1.0, -1.0).expand(1, 1, 9, 14)
    assert phi(waves).abs().mean() < 0.1


def by_hand(model, x, scale, *, phi, scope="sample", start=5):
    """The algorithm in float64 with the gradient of a Gaussian model in closed form."""
    run = Run(model, x, **SETTINGS)
    alpha, sigma = run.alpha, run.sigma
    mean, variance = model.mean.double(), model.variance.double()
    state = run.noised(x, start).double()
    for i in range(start, len(run)):
        total = alpha[i] ** 2 * variance + sigma[i] ** 2
        eps = sigma[i] * (state - alpha[i] * mean) / total
        x0 = (state - sigma[i] * eps) / alpha[i]
        jacobian = alpha[i] * variance / total  # d x0 / d x_t
        d = phi(x.double()) - phi(x0)
        norm = d.flatten(1).norm(dim=1).view(-1, 1, 1, 1) if scope == "sample" else d.norm()
        state = alpha[i + 1] * x0 + sigma[i + 1] * eps + scale * jacobian * phi(d) / norm
    return state


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_gradient_in_closed_form(scope):
    """-grad ||phi(ref - x0)|| = J phi^T phi d / ||d||, at every step. float32 rows: 1e-5."""
    model, x = gaussian(torch.float64), reference(dtype=torch.float64)
    found = sda(model, x, scale=0.3, scope=scope, **SETTINGS)
    assert torch.allclose(found, by_hand(model, x, 0.3, phi=low_pass(), scope=scope), atol=1e-5)


def test_what_the_filter_drops_is_not_guided():
    """The Jacobian of this model is a number, so nothing of the guidance is in the kernel of phi,
    at the first guided step and, as the model is pointwise with one variance, at all."""
    model, x, phi = gaussian(torch.float64), reference(dtype=torch.float64), low_pass()
    change = sda(model, x, scale=2.0, **SETTINGS) - sda(model, x, scale=0.0, **SETTINGS)
    assert change.abs().max() > 0.1
    assert torch.allclose(phi(change), change, atol=1e-6)


def test_guidance_brings_the_coarse_content_nearer():
    model, x, phi = gaussian(), reference(), low_pass()
    run = dict(sampler="ddpm", steps=40)
    far, near = ((phi(sda(model, x, scale=s, **run) - x)).norm() for s in (0.0, 0.5))
    assert near < 0.7 * far


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", DDIM(eta=0.5)], ids=str)
def test_without_scale_it_is_plain_from_the_noised_reference(sampler):
    model, x = gaussian(), reference()
    found = sda(model, x, scale=0.0, sampler=sampler, steps=10, seed=4)
    run = Run(model, x, sampler=sampler, steps=10, seed=4)
    run.x = run.noised(x, 5)
    with torch.no_grad():
        for i in range(5, 10):
            run.step(i, run.predict(i))
    assert torch.equal(found, run.x)


def test_from_the_noisiest_level_it_is_sample():
    model, x = gaussian(), reference()
    run = Run(model, x, sampler="ddpm", steps=10, seed=4)
    plain = samplers.sample(model, run.noised(x, 0), sampler="ddpm", steps=10, seed=4)
    assert torch.equal(sda(model, x, scale=0, start=0, sampler="ddpm", steps=10, seed=4), plain)


def batch_error(scope):
    model, x = gaussian(), reference()
    seeds = torch.tensor([7, 8, 9])
    run = dict(scale=1.0, scope=scope, sampler="ddpm", steps=10)
    whole = sda(model, x, seed=seeds, **run)
    alone = [sda(model, x[b : b + 1], seed=seeds[b : b + 1], **run) for b in range(3)]
    return float((whole - torch.cat(alone)).abs().max())


def test_batch_is_each_alone():
    assert batch_error("sample") == 0


def test_one_norm_for_the_batch_would_be_seen():
    """Public code has it: guidance then shrinks with the batch."""
    assert batch_error("batch") > 0.05
    model, x = gaussian(torch.float64), reference(1, torch.float64)
    plain = sda(model, x, scale=0.0, seed=torch.tensor([3]), steps=2, start=1, sampler="ddim")
    found = []
    for copies in (1, 4):
        xs = x.expand(copies, *SHAPE).clone()
        seeds = torch.full((copies,), 3)
        run = dict(scale=1.0, seed=seeds, steps=2, start=1, sampler="ddim")
        found.append((sda(model, xs, scope="batch", **run)[0] - plain[0]).norm())
        assert torch.equal(sda(model, xs, **run)[0], sda(model, xs, **run)[-1])
    assert math.isclose(float(found[1] / found[0]), 0.5, rel_tol=1e-6)  # 1 / sqrt(4)


def test_guidance_of_classes():
    """With classifier-free guidance the gradient goes through both branches."""
    torch.manual_seed(1)
    model = GaussianModel(
        torch.randn(2, *SHAPE).double(), torch.full((2, 1, 1, 1), 0.3).double(), classes=True
    )
    x, classes = reference(dtype=torch.float64), torch.tensor([0, 1, 2])
    run = dict(classes=classes, guidance=3.0, **SETTINGS)
    found = sda(model, x, scale=0.5, **run)
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, sda(model, x, scale=0.5, classes=classes, **SETTINGS))


def dit(channels):
    torch.manual_seed(0)
    model = DiT(8, 2, channels, hidden_size=16, depth=4, num_heads=2, num_classes=3)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize("scale", [0.0, lambda i: 2.0 * (i == 6)], ids=["plain", "once"])
def test_caches(scale):
    """One that reuses nothing changes nothing; one that reuses begins half way as at the start,
    and calls for a gradient are computed."""
    model, x = dit(2), reference()
    run = dict(scale=scale, classes=torch.tensor([0, 1, 3]), guidance=2.0, **SETTINGS)
    plain = sda(model, x, **run)
    assert torch.equal(sda(model, x, cache=FirstBlock(0.0), **run), plain)
    cached = sda(model, x, cache=Broadcast(3, 3, 3, 0, 1), **run)
    assert 0 < (cached - plain).abs().max() < 0.5 * plain.abs().max()


def test_reference_that_is_met_gives_no_gradient():
    """A distance of 0 has no direction; nothing becomes NaN."""
    model, x = gaussian(), reference()
    found = sda(model, x, scale=1.0, phi=lambda v: 0 * v, **SETTINGS)
    assert torch.equal(found, sda(model, x, scale=0.0, **SETTINGS))


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(start=10), "start is 10, need a call from 0 to 9"),
        (dict(start=-1), "start is -1"),
        (dict(scope="all"), "scope is 'all'"),
        (dict(scale=[1.0]), "scale has 1 entries, need 10"),
        (dict(sampler="dpmpp_2m"), "sampler is 'dpmpp_2m', need one of single steps"),
        (dict(sampler="heun"), "need one of single steps"),
        (dict(phi=low_pass(5)), r"x is \[3, 2, 8, 12\], need H and W that are multiples of"),
        (dict(phi=low_pass(16, "bicubic")), "H and W of at least 16"),
    ],
)
def test_bad_input(settings, words):
    x = reference()
    before = x.clone()
    with pytest.raises(ValueError, match=words):
        sda(gaussian(), x, **SETTINGS | settings)
    assert torch.equal(x, before)


def test_bad_filter():
    with pytest.raises(ValueError, match="factor is 0"):
        low_pass(0)
    with pytest.raises(ValueError, match="mode is 'nearest'"):
        low_pass(2, "nearest")
    with pytest.raises(ValueError, match="need a tensor"):
        sda(gaussian(), (2, *SHAPE))


def test_norms_of_zero_and_nan():
    """0 where a sample is 0, with no gradient there; NaN stays in its sample."""
    g = torch.randn(4, 2, 3, 3)
    g[1], g[2, 0, 0, 0] = 0, math.nan
    g.requires_grad_()
    found = norms(g)
    want = torch.linalg.vector_norm(g.flatten(1), dim=1).view(4, 1, 1, 1)
    torch.testing.assert_close(found, want, equal_nan=True)
    (grad,) = torch.autograd.grad(found[[0, 1, 3]].sum(), g)
    (plain,) = torch.autograd.grad(want[[0, 1, 3]].sum(), g)
    torch.testing.assert_close(grad[[0, 1, 3]], plain[[0, 1, 3]])
    assert not grad[1].any() and norms(g.detach().half()).dtype == torch.float16
