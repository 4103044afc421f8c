"""Experts by noise level: who answers for which level, and the two ways of guidance."""

import math

import pytest
import torch
from torch import nn

from fastdiff import models, samplers
from fastdiff.adapters.lora import LoRA
from fastdiff.cache import FirstBlock
from fastdiff.experts.by_noise import uniform_edges
from fastdiff.methods.ppap import AdapterExperts, likelihood_gradient, ppap
from fastdiff.ops.fused_step import Noise, philox_normal
from fastdiff.samplers import DDIM, DDPM, Run
from fastdiff.testing import draw_weights
from fastdiff.testing_gaussian import GaussianModel, affine

STEPS = 12


def mixture():
    mean = torch.tensor([[-1.0, 0.5, 0.0], [1.5, -0.5, 1.0]])
    return GaussianModel(mean, torch.tensor([[0.3, 0.5, 0.8], [0.6, 0.2, 0.4]]), classes=True)


class Posterior:
    """The exact classifier of a mixture at every level."""

    def __init__(self, model):
        self.model, self.times = model, []

    def __call__(self, x, t):
        self.times.append(t)
        alpha, sigma = (v.view(-1, 1, 1) for v in self.model.level(t))
        mean, variance = self.model.mean.double(), self.model.variance.double()
        total = alpha**2 * variance + sigma**2
        away = x.double()[:, None] - alpha * mean
        return -0.5 * (away**2 / total + total.log()).sum(2)


class Quadratic:
    """Two classes, ``log p(0 | x) = -1 - sum (x - c)^2 / (2 r)``: its gradient is linear."""

    def __init__(self, c, r):
        self.c, self.r = c, r

    def __call__(self, x, t):
        logp = -1 - ((x.double() - self.c) ** 2).flatten(1).sum(1) / (2 * self.r)
        return torch.stack([logp, torch.log1p(-logp.exp())], 1)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("count", [1, 5])
def test_exact_classifiers_give_conditional_sampling(count, prediction):
    """eps - sigma d log p(y|x) is the conditional noise where both models are exact."""
    model = mixture()
    model.prediction = prediction
    experts = [Posterior(model) for _ in range(count)]
    y = torch.tensor([0, 1, 1, 0])
    given = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    found = ppap(model, given, experts, y, steps=STEPS)
    want = samplers.sample(model, given, classes=y, steps=STEPS)
    plain = samplers.sample(model, given, steps=STEPS)
    assert (found - want).abs().max() < 2e-5 and (plain - want).abs().max() > 0.1
    times = samplers.Run(model, (1, 3), steps=STEPS).table.t
    for n, expert in enumerate(experts):
        low, high = 1000 * n / count, 1000 * (n + 1) / count
        assert len(expert.times) == ((times >= low) & (times < high)).sum()


@pytest.mark.parametrize(
    "sampler, on", [(DDPM(), None), (DDPM("large"), "mean"), (DDIM(eta=1.0), "eps"), (DDIM(), None)]
)
def test_path_is_the_affine_recursion(sampler, on):
    """Step by step in float64 with the same noise: no statistics are needed."""
    model = GaussianModel(torch.tensor([[0.5, -1.0]]), torch.tensor([[0.5, 1.2]]))
    experts = [Quadratic(0.3 * k, 2.0 + k) for k in range(3)]
    edges, scale, seed = uniform_edges(3), 0.7, 5
    y, x = torch.zeros(4, dtype=torch.int64), torch.randn(4, 2)
    settings = dict(sampler=sampler, steps=STEPS, seed=seed)
    found = ppap(model, x, experts, y, scale=scale, edges=edges, on=on, **settings)

    run = Run(model, x, **settings)
    u = x.double()
    mean = on == "mean" or (on is None and isinstance(sampler, DDPM))
    with torch.no_grad():
        for i, (a, b, s) in enumerate(affine(run.table, run, model)):
            t, sigma = float(run.table.t[i]), float(run.sigma[i])
            k = min(int(t // (1000 / 3)), 2)
            g = (experts[k].c - u) / experts[k].r
            z = philox_normal(x.shape, *Noise(run.seeds, run.slots, i)).double()
            if mean:
                shift = scale * s**2 * g
            else:  # a change of the prediction by d changes the step by its column of m
                c_m = float(run.table.rows[i, 4])
                shift = c_m * (-scale * sigma * g)
            u = a * u + b + s * z + shift
    assert (found - u).abs().max() < 2e-5


class Small(nn.Module):
    """A classifier of [B, 3, 2, 5] that knows nothing of time."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(30, 16), nn.Linear(16, 4)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x.flatten(1))))


def with_adapters(count=4):
    torch.manual_seed(0)
    net = Small()
    adapter = LoRA(net, rank=2, slots=count)
    with torch.no_grad():
        for pair in adapter.pairs.values():
            pair.up.normal_()
    return net, adapter


LEVELS = torch.tensor([0.0, 249.9, 250.0, 499.0, 500.0, 750.0, 999.0, 1000.0])
BINS = [0, 0, 1, 1, 2, 3, 3, 3]


def test_mixed_levels_are_each_row_alone():
    net, adapter = with_adapters()
    experts = AdapterExperts(net, adapter)
    x, y = torch.randn(8, 3, 2, 5), torch.arange(8) % 4
    whole = likelihood_gradient(experts, x, LEVELS, y)
    for b in range(8):
        part = slice(b, b + 1)
        alone = likelihood_gradient(experts, x[part], LEVELS[part], y[part])
        assert torch.allclose(whole[part], alone, atol=1e-6)


def test_a_level_on_an_edge_belongs_to_one_expert():
    net, adapter = with_adapters()
    experts = AdapterExperts(net, adapter)
    x, y = torch.randn(8, 3, 2, 5), torch.arange(8) % 4
    found = likelihood_gradient(experts, x, LEVELS, y)
    adapter.choose(None)
    for n in range(4):  # merged is the same as chosen
        adapter.merge(n)
        rows = [b for b, k in enumerate(BINS) if k == n]
        want = likelihood_gradient(net, x[rows], LEVELS[rows], y[rows])
        assert torch.allclose(found[rows], want, atol=1e-5)
        adapter.unmerge()


def test_first_level_for_the_whole_batch_would_be_seen():
    """Public code takes the range of t[0] for all rows: the comparison row by row finds that."""
    net, adapter = with_adapters()
    x, y = torch.randn(8, 3, 2, 5), torch.arange(8) % 4
    right = AdapterExperts(net, adapter)

    def faulty(x, t):
        return right(x, t[:1].expand(len(t)))

    whole = likelihood_gradient(faulty, x, LEVELS, y)
    rows = torch.cat([likelihood_gradient(faulty, x[b : b + 1], LEVELS[b : b + 1], y[b : b + 1])
                      for b in range(8)])  # fmt: skip
    assert (whole - rows).abs().max() > 1e-2


def test_closed_ranges_would_be_seen():
    """With closed ranges a level on an edge has two experts."""
    edges = torch.tensor(uniform_edges(4))
    inside = (LEVELS[:, None] >= edges[:-1]) & (LEVELS[:, None] <= edges[1:])
    assert inside.sum(1).max() == 2
    model, seen = mixture(), []
    experts = [lambda x, t, n=n: (seen.append(n), Posterior(model)(x, t))[1] for n in range(4)]
    run = Run(model, (1, 3), steps=4)
    edge = [0.0, float(run.table.t[2]), float(run.table.t[1]), 900.0, 1000.0]
    ppap(model, (1, 3), experts, torch.tensor([0]), edges=edge, steps=4)
    assert seen == [3, 2, 1, 0]


def test_one_expert_is_the_single_classifier():
    model = mixture()
    y, x = torch.tensor([1, 0]), torch.randn(2, 3)
    one = ppap(model, x, [Posterior(model)], y, steps=STEPS, sampler="ddpm", scale=2.0)
    single = ppap(model, x, Posterior(model), y, steps=STEPS, sampler="ddpm", scale=2.0)
    assert torch.equal(one, single)


def test_adapters_in_a_run_are_modules_in_a_run():
    net, adapter = with_adapters()
    images = GaussianModel(torch.zeros(1, 3, 2, 5), torch.ones(1, 3, 2, 5))
    y, x = torch.tensor([1, 0]), torch.randn(2, 3, 2, 5)
    found = ppap(images, x, AdapterExperts(net, adapter), y, steps=STEPS, sampler="ddpm", scale=9.0)
    experts = []
    for n in range(4):
        copy, own = with_adapters()
        own.merge(n)
        experts.append(copy)
    want = ppap(images, x, experts, y, steps=STEPS, sampler="ddpm", scale=9.0)
    assert (found - want).abs().max() < 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m"])
def test_without_scale_it_is_plain_sampling(sampler):
    model = mixture()
    y = torch.tensor([1, 0])
    found = ppap(model, (2, 3), [Posterior(model)], y, scale=0.0, steps=STEPS, sampler=sampler)
    assert torch.equal(found, samplers.sample(model, (2, 3), steps=STEPS, sampler=sampler))


def test_batch_of_samples_is_each_alone():
    model = mixture()
    seeds, x, y = torch.tensor([7, 8, 9]), torch.randn(3, 3), torch.tensor([0, 1, 1])
    experts = [Posterior(model)] * 2
    settings = dict(steps=STEPS, sampler="ddpm")
    whole = ppap(model, x, experts, y, seed=seeds, **settings)
    for b in range(3):
        part = slice(b, b + 1)
        alone = ppap(model, x[part], experts, y[part], seed=seeds[part], **settings)
        assert (whole[part] - alone).abs().max() < 1e-6


def test_cache_that_reuses_nothing_changes_nothing():
    torch.manual_seed(0)
    images = models.DiT(
        input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2,
        num_classes=4, learn_sigma=False,
    )  # fmt: skip
    draw_weights(images)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    y = torch.tensor([1, 2])
    args = (images, (2, 1, 8, 8), [lambda x, t: classifier(x)] * 2, y)
    settings = dict(classes=y, guidance=2.0, steps=4, scale=3.0)
    found = ppap(*args, cache=FirstBlock(0.0), **settings)
    assert torch.equal(found, ppap(*args, **settings))


def test_with_classifier_free_guidance_too():
    model = mixture()
    y, x = torch.tensor([1, 0]), torch.randn(2, 3)
    settings = dict(classes=y, guidance=1.5, steps=STEPS)
    found = ppap(model, x, [Posterior(model)], y, scale=0.5, **settings)
    # eps_u + 1.5 (eps_c - eps_u) + 0.5 (eps_c - eps_u) where the classifier is exact
    want = samplers.sample(model, x, **{**settings, "guidance": 2.0})
    assert (found - want).abs().max() < 2e-5


def test_classifier_that_raises_or_gives_nan():
    model = mixture()
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    before = x.clone()

    def broken(x, t):
        raise RuntimeError("no class today")

    with pytest.raises(RuntimeError, match="no class today"):
        ppap(model, x, [broken], y, steps=3)

    def half(x, t):
        logits = Posterior(model)(x, t)
        return logits * torch.tensor([[math.nan], [1.0]], dtype=logits.dtype)

    found = ppap(model, x, [half], y, steps=3)
    assert torch.equal(x, before) and found[0].isnan().all() and found[1].isfinite().all()
    with pytest.raises(ValueError, match=r"a classifier gives \[2\], need logits \[2, K\]"):
        ppap(model, x, [lambda x, t: x[:, 0]], y, steps=3)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(experts=[]), "experts is empty"),
        (dict(edges=[0.0, 1000.0, 500.0]), "edges is .* need 2 ascending"),
        (dict(on="x0"), "on is 'x0'"),
        (dict(on="mean"), "draws no noise"),
        (dict(y=torch.tensor([0.0, 1.0])), r"y is torch.float32 \[2\], need torch.int64 \[2\]"),
        (dict(scale=[1.0]), "scale has 1 entries, need 3"),
    ],
)
def test_bad_input(change, words):
    model = mixture()
    args = dict(experts=[Posterior(model)], y=torch.tensor([0, 1])) | change
    with pytest.raises(ValueError, match=words):
        ppap(model, (2, 3), steps=3, **args)
