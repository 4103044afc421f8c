"""A program over static buffers: the same results in every way, and the fastest way by its cost."""

from __future__ import annotations

import sys

import pytest
import torch

import fastdiff
from fastdiff import methods
from fastdiff.cache import FirstBlock, Forecast
from fastdiff.methods.compiled import compiled
from fastdiff.models import DiT
from fastdiff.testing import draw_weights

SIZE = (4, 8, 12)
STEPS = 6


@pytest.fixture
def model():
    return draw_weights(
        DiT(
            input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4,
            num_classes=10, learn_sigma=False,
        )
    )  # fmt: skip


def start(batch=3, seed=5):
    g = torch.Generator().manual_seed(seed)
    return dict(
        x=torch.randn(batch, *SIZE, generator=g),
        classes=torch.tensor([1, 5, 2][:batch]),
        seed=torch.tensor([11, 12, 13][:batch]) + seed,
    )


def brightness(x):
    return x.flatten(1).mean(1)


def steer(model, **how):
    return methods.fk_steering(model, reward=brightness, particles=2, check=False, **how)


def guide(model, x, **how):
    energy = lambda x0: (x0 - 1).square().flatten(1).mean(1)  # noqa: E731
    return methods.steered(model, x, energy, scale=0.1, **how)


@pytest.mark.parametrize("cache", [None, Forecast(2)])
@pytest.mark.parametrize("way", ["loop", "steps", "eager"])
@pytest.mark.parametrize("program", [fastdiff.sample, steer], ids=["sample", "fk"])
def test_every_way_gives_what_the_program_gives(program, way, cache, model):
    how = dict(sampler="ddpm", steps=STEPS, guidance=1.5)
    fastdiff.accelerate(model, cache=cache, exact=False)
    own = compiled(program, model, start(), ways=[way], **how)
    assert own.way == way and not own.refused and own.measured.keys() == {way}
    for inputs in (start(), start(seed=6), start()):
        want = program(model, **inputs, **how)
        for got, need in zip(
            *map(torch.utils._pytree.tree_leaves, (own(**inputs), want)), strict=True
        ):
            assert torch.equal(got, need)
    fastdiff.restore(model)


def test_the_cheapest_way_is_taken(model, monkeypatch):
    """Of what the clock says: preparing is shared by the runs to come."""
    clock = {"loop": (10.0, 1.0), "eager": (0.0, 1.5)}
    now, asked = [0.0], []

    def seconds():
        asked.append(0)
        i = len(asked) - 1  # two readings for each: prepare loop, prepare eager, then runs
        order = ["loop", "eager"]
        way = order[(i // 2) % 2]
        if i % 2:
            now[0] += clock[way][i >= 4]
        return now[0]

    module = sys.modules["fastdiff.methods.compiled"]
    monkeypatch.setattr(module.time, "perf_counter", seconds)
    for runs, best in ((10, "eager"), (1000, "loop")):
        asked.clear()
        own = compiled(
            fastdiff.sample, model, start(), sampler="ddim", steps=2, ways=["loop", "eager"],
            runs=runs,
        )  # fmt: skip
        assert own.way == best, str(own)
        assert own.measured["loop"] == (10.0, 1.0) and own.measured["eager"] == (0.0, 1.5)


def test_a_way_that_cannot_run_says_why(model):
    own = compiled(fastdiff.sample, model, start(), sampler="ddim", steps=2, rounds=1)
    assert "not accelerated" in own.refused["steps"] and own.way in ("loop", "eager")
    assert "not steps: the model is not accelerated" in str(own) and "s a run" in str(own)
    # What waits for the device cannot be one graph: the check of weights on the host, a cache that
    # decides from features.
    how = dict(reward=brightness, particles=2, steps=3)
    own = compiled(methods.fk_steering, model, start(), sampler="ddpm", rounds=1, **how)
    assert own.way == "eager" and own.refused["loop"]
    fastdiff.accelerate(model, cache=FirstBlock(0.1), exact=False)
    own = compiled(fastdiff.sample, model, start(), sampler="ddim", steps=4, rounds=1)
    assert own.way == "eager" and "decides from features" in own.refused["steps"]
    assert own.refused["loop"]
    fastdiff.restore(model)


def test_gradients_run_as_a_loop(model):
    own = compiled(guide, model, start(), sampler="ddim", steps=3, ways=["loop"], guidance=1.0)
    assert torch.equal(own(), guide(model, sampler="ddim", steps=3, guidance=1.0, **start()))


def test_bad_inputs_are_refused_and_nothing_is_written(model):
    good = start()
    own = compiled(fastdiff.sample, model, good, sampler="ddim", steps=2, ways=["eager"])
    before = {name: t.clone() for name, t in own.inputs.items()}
    more = torch.zeros(2, *SIZE)
    for bad, words in (
        (dict(y=good["classes"]), "no input is called 'y', need one of x, classes, seed"),
        (dict(classes=good["classes"] + 1, x=more), "x is torch.float32"),
        (dict(x=good["x"].double()), "need torch.float32"),
        (dict(x=3), "x is int"),
    ):
        with pytest.raises(ValueError, match=words):
            own(**bad)
        assert all(torch.equal(own.inputs[name], t) for name, t in before.items())
    for bad, words in (
        (dict(ways=["graph"]), "ways is"),
        (dict(ways=[]), "ways is"),
        (dict(runs=0), "runs is 0"),
        (dict(rounds=True), "rounds is True"),
        (dict(sampler="none"), "sampler is 'none'"),
        (dict(ways=["steps"]), "every way is refused: steps: the model is not accelerated"),
    ):
        with pytest.raises(ValueError, match=words):
            compiled(fastdiff.sample, model, good, **{"sampler": "ddim", "steps": 2, **bad})
    with pytest.raises(ValueError, match="inputs is empty"):
        compiled(fastdiff.sample, model, {}, sampler="ddim")
