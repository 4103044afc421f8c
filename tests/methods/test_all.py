"""What holds of every sampling program: neutral caches change nothing, runs leave nothing behind,
samples do not know their place in the batch, and the whole loop can be captured, or not and why."""

import re

import pytest
import torch

import fastdiff
from fastdiff import engine, methods, models, samplers
from fastdiff.cache import DeepCache, Forecast
from fastdiff.engine.capture_check import check
from fastdiff.methods.diffeditor import Term, unlike
from fastdiff.samplers import DDIM, VP
from fastdiff.testing import draw_weights
from fastdiff.tokens import RegionAdaptive

STEPS, SIZE = 6, (8, 12)
ANCESTRAL = DDIM(eta=1.0)
BLOCK = "blocks.1"
MASK = torch.zeros(1, 1, *SIZE)
MASK[..., :6] = 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = models.DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    return draw_weights(network).eval().requires_grad_(False)


def reward(x):
    return x.flatten(1).mean(1)


def energy(x):
    return (x - 0.3).square().flatten(1).sum(1)


def features_energy(features):
    return features[BLOCK].square().flatten(1).mean(1)


def encoded(model, x, **how):
    store = methods.encode(model, x, **how)
    return methods.decode(model, store, **how)


def distilled(model, x, **how):
    return methods.score_distillation(model, x, lambda theta, k: theta, updates=3, **how)


TEMPLATE = dict(sampler=ANCESTRAL)
KNOWN = methods.Mask(1 - MASK)
DIRECTION = torch.full((4, *SIZE), 0.05)
# name: (program(model, x, **settings), settings that it takes besides those of all)
PROGRAMS = {
    "fk": (
        lambda model, x, **how: methods.fk_steering(
            model, x, reward, particles=2, check=False, **how
        ).x[:, 0],
        TEMPLATE,
    ),
    "svdd": (
        lambda model, x, **how: methods.svdd(model, x, reward, candidates=2, check=False, **how),
        TEMPLATE,
    ),
    "steered": (
        lambda model, x, **how: methods.steered(model, x, energy, loops=2, scale=0.01, **how),
        TEMPLATE,
    ),
    "sda": (lambda model, x, **how: methods.sda(model, x, scale=0.1, **how), TEMPLATE),
    "lacon": (
        lambda model, x, **how: methods.lacon(model, x, features_energy, taps=[BLOCK], **how),
        {},
    ),
    "diffeditor": (
        lambda model, x, **how: methods.diffeditor(
            model,
            x,
            [Term(lambda a, b: unlike(a[BLOCK], b[BLOCK]), 0.01)],
            taps=[BLOCK],
            mask=MASK,
            **how,
        ),
        {},
    ),
    "latent guidance": (
        lambda model, x, **how: methods.latent_guidance(model, x, [(energy, 0.01)], **how),
        {},
    ),
    "linear reward": (
        lambda model, x, **how: methods.linear_reward_guidance(
            model, x, DIRECTION, 1.0, noise=1.0, **how
        ),
        {},
    ),
    "direct inversion": (
        lambda model, x, classes=None, **how: (
            methods.direct_inversion(model, x, (classes + 1) % 10, classes=classes, **how).target
        ),
        {},
    ),
    "CycleDiffusion": (encoded, dict(sampler=DDIM(eta=0.5))),
    "Cyclic One-Way": (
        lambda model, x, sampler="ddim", **how: methods.cow(
            model, x, MASK, cycles=2, sampler=sampler, cycle_sampler=sampler, **how
        ),
        {},
    ),
    "RePaint": (
        lambda model, x, **how: methods.repaint(
            model, torch.zeros_like(x), x, MASK, jump=3, repeats=2, **how
        ),
        TEMPLATE,
    ),
    "projection": (
        lambda model, x, **how: methods.projected(
            model, torch.ones_like(x), KNOWN, KNOWN.apply(x), **how
        ),
        TEMPLATE,
    ),
    "RED-Diff": (
        lambda model, x, **how: methods.red_diff(
            model, tuple(x.shape), KNOWN, KNOWN.apply(x), weight="trunc", **how
        ),
        {},
    ),
    "MultiDiffusion": (
        lambda model, x, **how: methods.multi_diffusion(
            model, x, size=(8, 8), stride=(8, 4), **how
        ),
        {},
    ),
    "SuperDiff": (
        lambda model, x, classes=None, **how: (
            methods.superdiff(
                model, x, conditions=[classes, (classes + 1) % 10], kind="and", **how
            ).x
        ),
        dict(sampler=ANCESTRAL, guidance=1.0),
    ),
    "PPAP": (
        lambda model, x, classes=None, **how: methods.ppap(
            model,
            x,
            lambda x, t: x.flatten(1)[:, :10] * t[:, None] / 1000,
            classes,
            classes=classes,
            scale=0.1,
            **how,
        ),
        TEMPLATE,
    ),
    "score distillation": (distilled, {}),
}
# Those that cannot be captured from their first step on, and what the check says of them.
NOT_CAPTURED = {
    "score distillation": "methods/sds.py:58 .* copies from the host",  # its table of levels, once
}


def inputs(batch=3):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(batch, 4, *SIZE, generator=g)
    return x, torch.tensor([1, 5, 2][:batch]), torch.tensor([11, 12, 13][:batch])


def run(name, model, order=None, sampler=None, more=None, **settings):
    program, own = PROGRAMS[name]
    x, y, seed = inputs()
    if order is not None:
        x, y, seed = x[order], y[order], seed[order]
    how = dict(steps=STEPS, classes=y, seed=seed, guidance=1.5) | own | settings
    return program(model, x, **how)


@pytest.mark.parametrize("name", PROGRAMS)
def test_neutral_caches_change_nothing(name, model):
    plain = run(name, model)
    assert plain.isfinite().all()
    for cache in (Forecast(1), DeepCache(1), RegionAdaptive(1.0)):
        if name == "MultiDiffusion" and isinstance(cache, RegionAdaptive):
            continue  # refused: it follows one state's tokens
        assert torch.equal(run(name, model, cache=cache), plain), cache


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_run_leaves_nothing_behind(name, model):
    cache: list[object] = [Forecast(2)]
    if name != "MultiDiffusion":
        cache.append(RegionAdaptive(0.5, start=1))
    fresh = run(name, model, cache=cache)
    fastdiff.accelerate(model, cache=cache, exact=False)
    try:
        assert torch.equal(run(name, model), fresh)
        assert torch.equal(run(name, model), fresh)
    finally:
        fastdiff.restore(model)


@pytest.mark.parametrize("name", PROGRAMS)
def test_samples_do_not_know_their_place(name, model):
    order = torch.tensor([2, 0, 1])
    for cache in (None, Forecast(2), RegionAdaptive(0.5, start=1)):
        if name == "MultiDiffusion" and isinstance(cache, RegionAdaptive):
            continue
        plain, moved = (run(name, model, o, cache=cache) for o in (None, order))
        worst = (moved - plain[order]).abs().max() / plain.abs().max()
        assert worst < 1e-5, (name, cache, float(worst))


@pytest.mark.parametrize("name", PROGRAMS)
def test_whole_loop_is_capturable(name, model):
    program, own = PROGRAMS[name]
    x, y, seed = inputs(2)
    how = dict(sampler="ddim") | own
    ready = samplers.ready(model, sampler=how.pop("sampler"), steps=STEPS)
    how = dict(guidance=1.5) | how

    def step(x, y, seed):
        return program(model, x, classes=y, seed=seed, sampler=ready, steps=STEPS, **how)

    report = check(step, dict(x=x, y=y, seed=seed), 2)
    if name in NOT_CAPTURED:
        assert len(report.violations) == 1 and re.search(NOT_CAPTURED[name], str(report))
    else:
        assert report.ok, str(report)


@pytest.mark.parametrize("name", ["fk", "RePaint", "steered"])
def test_whole_loop_over_static_buffers(name, model):
    """As a runner has it, a CUDA graph on a GPU: new inputs are copied into their places."""
    program, own = PROGRAMS[name]
    how = dict(guidance=1.5) | own
    ready = samplers.ready(model, sampler=how.pop("sampler", "ddim"), steps=STEPS)

    def step(x, y, seed):
        return program(model, x, classes=y, seed=seed, sampler=ready, steps=STEPS, **how)

    x, y, seed = inputs()
    run = engine.runner(step, dict(x=torch.zeros_like(x), y=y, seed=seed))
    for start in (x, x + 1):
        assert torch.equal(run(x=start), step(start, y, seed))


def test_ready_samplers_are_the_same(model):
    x, y, seed = inputs()
    for name in samplers.SAMPLERS:
        made = samplers.ready(model, sampler=name, steps=STEPS, clip=1.0)
        plain = samplers.sample(model, x, sampler=name, steps=STEPS, clip=1.0, seed=seed)
        assert torch.equal(samplers.sample(model, x, sampler=made, clip=1.0, seed=seed), plain)
    with pytest.raises(ValueError, match="made ready for clip 1.0, and it is None"):
        samplers.sample(model, x, sampler=made)
    with pytest.raises(ValueError, match="prediction 'eps', and it is 'v'"):
        samplers.sample(model, x, sampler=made, clip=1.0, prediction="v", schedule=VP())
