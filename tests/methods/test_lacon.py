"""LaCon: its gradient from the truncated call, its norm, its truncation."""

import math

import pytest
import torch
from torch import nn

from fastdiff import samplers
from fastdiff.cache import Broadcast, DeepCache, FirstBlock
from fastdiff.methods.lacon import feature_gradient, lacon, matched
from fastdiff.methods.trajectory import running
from fastdiff.models import DiT, UNet
from fastdiff.samplers import Run
from fastdiff.samplers.run import model_times
from fastdiff.testing_gaussian import GaussianModel

SHAPE = (3, 4, 8)
STEPS = 6
SETTINGS = dict(sampler="ddim", steps=STEPS)


class Tapped(GaussianModel):
    """Whose one block gives the state: the gradient of an energy of it is known."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inner = nn.Identity()

    def forward(self, x, t, y=None):
        return super().forward(self.inner(x), t, y)


def gaussian(dtype=torch.float64, prediction="eps"):
    torch.manual_seed(1)
    mean = torch.randn(1, *SHAPE, dtype=dtype)
    return Tapped(mean, torch.full((1, 1, 1, 1), 0.3, dtype=dtype), prediction=prediction)


def dit():
    torch.manual_seed(0)
    model = DiT(8, 2, 3, hidden_size=16, depth=4, num_heads=2, num_classes=3)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model.eval()


def unet():
    torch.manual_seed(0)
    return UNet(
        3, 3, (8, 16), layers_per_block=1, transformer_depth=(0, 1), heads=2, groups=4,
        cross_attention_dim=8, num_classes=3, class_tokens=2,
    ).eval()  # fmt: skip


NETWORKS = {"dit": (dit, ("blocks.0", "blocks.2")), "unet": (unet, ("mid_block", "up_blocks.0"))}
CLASSES = torch.tensor([0, 1, 3])
GUIDED = dict(classes=CLASSES, guidance=3.0, **SETTINGS)


def start(dtype=torch.float32, batch=3):
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(2)).to(dtype)


def energy(features):
    return sum((f.double() - 0.3).square().flatten(1).sum(1) for f in features.values())


@pytest.mark.parametrize("kind", NETWORKS)
def test_truncated_gradient_is_the_whole_one(kind):
    make, taps = NETWORKS[kind]
    with running(make(), start(), **GUIDED) as run:
        g = [feature_gradient(run, 2, energy, taps, stop=stop) for stop in (True, False)]
    assert torch.equal(*g) and (g[0].flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("kind", NETWORKS)
def test_truncated_run_is_the_whole_one(kind):
    make, taps = NETWORKS[kind]
    model, x = make(), start()
    run = dict(taps=taps, **GUIDED)
    found = lacon(model, x, energy, **run)
    assert torch.equal(found, lacon(model, x, energy, stop=False, **run))
    assert torch.isfinite(found).all()
    assert not torch.equal(found, samplers.sample(model, x, **GUIDED))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_run_by_hand(prediction, scope):
    """With E = |x - c|^2 the direction is that of x - c, of norm lam |eps - x|; float32 rows."""
    model, x, lam = gaussian(prediction=prediction), start(torch.float64), 0.4
    found = lacon(
        model, x, energy, taps=["inner"], strength=lam, truncation=300, scope=scope, **SETTINGS
    )
    run = Run(model, x, **SETTINGS)
    mean, variance, guided = model.mean.double(), model.variance.double(), 0
    with torch.no_grad():
        for i in range(STEPS):
            alpha, sigma = run.alpha[i], run.sigma[i]
            eps = sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)
            g = x - 0.3
            rows = 1 if scope == "batch" else len(x)
            length = (eps - x).view(rows, -1).norm(dim=1) / g.view(rows, -1).norm(dim=1)
            if run.table.t[i] > 300:
                eps = eps + lam * length.view(-1, 1, 1, 1) * g
                guided += 1
            x = run.alpha[i + 1] * (x - sigma * eps) / alpha + run.sigma[i + 1] * eps
    assert 0 < guided < STEPS
    assert torch.allclose(found, x, atol=1e-4 * x.abs().max())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_norm_of_guidance(scale):
    """|g| is lam |eps - x| for every sample, to a few roundings of float64."""
    g, like = scale * torch.randn(4, *SHAPE).double(), torch.randn(4, *SHAPE).double()
    g[3] = 0
    found = 2.0 * matched(g, like)
    want = 2.0 * like.flatten(1).norm(dim=1)
    assert torch.allclose(found[:3].flatten(1).norm(dim=1), want[:3], rtol=1e-14)
    assert torch.equal(found[3], torch.zeros(SHAPE).double())


@pytest.mark.parametrize("factor", [2.0**-20, 8.0, 3.7e4])
def test_scale_of_the_energy_does_not_matter(factor):
    """Bit for bit where the factor is a power of 2."""
    model, x = gaussian(), start(torch.float64)
    run = dict(taps=["inner"], strength=0.4, truncation=0, **SETTINGS)
    one = lacon(model, x, energy, **run)
    other = lacon(model, x, lambda f: factor * energy(f), **run)
    if math.log2(factor).is_integer():
        assert torch.equal(one, other)
    assert torch.allclose(one, other, rtol=1e-10)


@pytest.mark.parametrize("settings", [dict(strength=0.0), dict(truncation=1000.0)])
@pytest.mark.parametrize("kind", NETWORKS)
def test_without_guidance_it_is_sample(kind, settings):
    make, taps = NETWORKS[kind]
    model, x = make(), start()
    found = lacon(model, x, energy, taps=taps, **settings, **GUIDED)
    assert torch.equal(found, samplers.sample(model, x, **GUIDED))


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "dpmpp_2m"])
def test_samplers(sampler):
    model, x = dit(), start()
    plain = dict(GUIDED, sampler=sampler)
    off = lacon(model, x, energy, taps=["blocks.1"], strength=0, **plain)
    assert torch.equal(off, samplers.sample(model, x, **plain))
    assert torch.isfinite(lacon(model, x, energy, taps=["blocks.1"], **plain)).all()


def test_steps_below_the_truncation_are_not_guided():
    """From the last guided step on, the run is a plain one, bit for bit."""
    model, states, calls = dit(), [], []

    def counting(features):
        calls.append(1)
        return energy(features)

    lacon(
        model, start(), counting, taps=["blocks.1"], truncation=500,
        callback=lambda i, run: states.append(run.x), **GUIDED,
    )  # fmt: skip
    run = Run(model, start(), **GUIDED)
    late = [i for i in range(STEPS) if run.table.t[i] <= 500]
    assert len(calls) == STEPS - len(late) and 0 < len(late) < STEPS
    run.x = states[late[0] - 1]
    with torch.no_grad():
        for i in late:
            run.step(i, run.predict(i))
            assert torch.equal(run.x, states[i])


def test_a_step_at_the_truncation_is_not_guided():
    model, calls = gaussian(), []

    def counting(features):
        calls.append(1)
        return energy(features)

    time = float(model_times(model, **SETTINGS)[3])
    lacon(model, start(torch.float64), counting, taps=["inner"], truncation=time, **SETTINGS)
    assert len(calls) == 3


def batch_error(scope, model, taps, **settings):
    x, seeds = start(), torch.tensor([4, 5, 6])
    settings = dict(taps=taps, scope=scope, truncation=300, **settings)

    def run(part):
        own = {"classes": CLASSES[part], "guidance": 3.0} if hasattr(model, "num_classes") else {}
        return lacon(model, x[part], energy, seed=seeds[part], **own, **settings, **SETTINGS)

    alone = torch.cat([run(slice(b, b + 1)) for b in range(3)])
    return float((run(slice(None)) - alone).abs().max() / alone.abs().max())


def test_batch_is_each_alone():
    assert batch_error("sample", gaussian(torch.float32), ["inner"]) == 0
    assert batch_error("sample", dit(), ["blocks.1"]) < 1e-4  # products of other batch sizes


def test_norms_of_the_batch_would_be_seen():
    """Public code has them."""
    assert batch_error("batch", gaussian(torch.float32), ["inner"], strength=0.5) > 1e-3
    assert batch_error("batch", dit(), ["blocks.1"]) > 0.01


@pytest.mark.parametrize("kind, cache", [
    ("dit", Broadcast(2, 3, 2, 0, 1)), ("unet", DeepCache(2)),
])  # fmt: skip
def test_features_are_live_under_a_cache(kind, cache):
    """The gradient at a state is that without a cache, at steps that reuse too."""
    make, taps = NETWORKS[kind]
    model, x = make(), start()
    found = []
    with running(model, x, cache=cache, **GUIDED) as run:
        for i in range(STEPS):
            m = run.predict(i)
            found.append((run.x, feature_gradient(run, i, energy, taps)))
            run.step(i, m)
    assert not any(m._forward_hooks for m in model.modules())
    with running(model, x, **GUIDED) as run:
        for i, (state, g) in enumerate(found):
            run.x = state
            assert torch.allclose(g, feature_gradient(run, i, energy, taps), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind, cache", [
    ("dit", FirstBlock(0.0)), ("unet", DeepCache(1)),
])  # fmt: skip
def test_cache_that_reuses_nothing(kind, cache):
    make, taps = NETWORKS[kind]
    model, x = make(), start()
    found = lacon(model, x, energy, taps=taps, cache=cache, **GUIDED)
    plain = lacon(model, x, energy, taps=taps, **GUIDED)
    assert torch.equal(found, plain)


def test_nan_stays_in_its_sample():
    def bad(features):
        value = energy(features)
        return torch.where(torch.arange(len(value)) == 1, math.nan, 1.0) * value

    run = dict(taps=["inner"], strength=0.1, **SETTINGS)
    found = lacon(gaussian(), start(torch.float64), bad, **run)
    good = lacon(gaussian(), start(torch.float64), energy, **run)
    assert found[1].isnan().any() and torch.equal(found[[0, 2]], good[[0, 2]])


def test_energy_that_does_not_depend_on_the_sample_gives_no_guidance():
    model, x = gaussian(), start(torch.float64)
    found = lacon(model, x, lambda f: 0 * energy(f), taps=["inner"], **SETTINGS)
    assert torch.equal(found, samplers.sample(model, x, **SETTINGS))


def test_energy_that_raises_leaves_the_network_alone():
    model, x = dit(), start()
    before, plain = x.clone(), samplers.sample(model, x, **GUIDED)

    def bad(features):
        raise RuntimeError("no energy today")

    with pytest.raises(RuntimeError, match="no energy today"):
        lacon(model, x, bad, taps=["blocks.1"], **GUIDED)
    assert not any(m._forward_hooks for m in model.modules()) and torch.equal(x, before)
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()
    assert torch.equal(samplers.sample(model, x, **GUIDED), plain)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(taps=["blocks.9"]), "taps has 'blocks.9'"),
        (dict(taps=[]), "need a list of different names"),
        (dict(strength=math.inf), "strength is inf, need a finite number"),
        (dict(truncation=None), "truncation is None"),
        (dict(scope="all"), "scope is 'all'"),
        (dict(energy=lambda f: f["blocks.1"].sum()), r"energy gives \[\], need a tensor \[3\]"),
        (dict(energy=lambda f: 1.0), "energy gives float"),
    ],
)
def test_bad_input(settings, words):
    settings = {"energy": energy, "taps": ["blocks.1"], **settings}
    with pytest.raises(ValueError, match=words):
        lacon(dit(), start(), **settings, **GUIDED)


def test_model_that_is_no_network():
    with pytest.raises(ValueError, match="need an nn.Module"):
        lacon(lambda x, t, y: x, start(), energy, taps=["blocks.1"], **SETTINGS)
