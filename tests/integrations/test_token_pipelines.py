"""Sparse steps in pipelines of diffusers: one choice a sample, from what guidance made."""

from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import Forecast
from fastdiff.engine import reuse_tokens
from fastdiff.testing import load_file
from fastdiff.tokens import RegionAdaptive

pipelines = load_file(Path(__file__).parent / "test_pipelines.py")
PIPES = (pipelines.dit, pipelines.pixart, pipelines.sd3, pipelines.flux, pipelines.wan)
POLICY = RegionAdaptive(0.4, start=2, resets=(6,))
every = pytest.mark.parametrize("make", PIPES, ids=lambda f: f.__name__)


def watched(pipe, kwargs, monkeypatch, **more):
    """The result, the network's outputs, and the choices of all steps."""
    outs, chosen = [], []
    plain = reuse_tokens._choose

    def choose(request, choice, *args):
        index = plain(request, choice, *args)
        chosen.append((request.step, choice.index.clone(), index.clone()))
        return index

    def keep(module, args, kwargs, out):
        out = out[0] if isinstance(out, tuple) else out.sample
        outs.append(out.clone())

    monkeypatch.setattr(reuse_tokens, "_choose", choose)
    hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        return pipelines.run(pipe, kwargs, **more), outs, chosen
    finally:
        hook.remove()
        monkeypatch.setattr(reuse_tokens, "_choose", plain)


def as_tokens(pipe, out):
    """``[rows, N, values]`` of a network's output."""
    if out.dim() == 3:
        return out
    size = pipe.transformer.config.patch_size
    patch = [size] * 2 if isinstance(size, int) else size
    for i, p in enumerate(patch):
        out = out.unflatten(2 + 2 * i, (-1, p))
    grid, inside = ([first + 2 * i for i in range(len(patch))] for first in (2, 3))
    return out.permute(0, *grid, *inside, 1).flatten(1, len(patch)).flatten(2)


@every
def test_left_out_tokens_keep_their_noise(make, monkeypatch):
    """To the bit, in every row; the choice is one for the rows of a sample."""
    pipe, kwargs = make()
    plain = pipelines.run(pipe, kwargs)
    fastdiff.accelerate(pipe, cache=POLICY)
    got, outs, chosen = watched(pipe, kwargs, monkeypatch)
    calls = len(outs) // 10  # Wan calls its network for each branch
    assert got.isfinite().all() and 0 < pipelines.error(got, plain) < 1.5
    assert sorted({step for step, _, _ in chosen}) == [2, 3, 4, 5, 7, 8, 9]
    assert len(chosen) == 7 * calls
    for i, (step, of_sample, of_row) in enumerate(chosen):
        tokens = [as_tokens(pipe, o) for o in outs[step * calls + i % calls - calls :: calls][:2]]
        before, now = tokens
        rows, n = now.shape[:2]
        assert of_sample.shape[0] == 2 and of_row.shape[0] == rows
        assert torch.equal(of_row, of_sample.repeat(rows // 2, 1))
        ran = torch.zeros(rows, n, dtype=torch.bool).scatter(1, of_row, True)
        assert torch.equal(now[~ran], before[~ran])
        assert not torch.equal(now[ran], before[ran])
    run = acceleration_of(pipe).last
    assert run.syncs == 0 and "tokens" in fastdiff.summary(pipe)
    again, _, _ = watched(pipe, kwargs, monkeypatch)
    assert torch.equal(again, got)
    fastdiff.restore(pipe)
    assert torch.equal(pipelines.run(pipe, kwargs), plain)


@every
def test_neutral_regions_and_caches(make):
    pipe, kwargs = make()
    fastdiff.accelerate(pipe)
    exact = pipelines.run(pipe, kwargs)
    fastdiff.restore(pipe)
    fastdiff.accelerate(pipe, cache=[RegionAdaptive(1.0), Forecast(1)])
    assert torch.equal(pipelines.run(pipe, kwargs), exact)
    fastdiff.restore(pipe)
    fastdiff.accelerate(pipe, cache=RegionAdaptive(0.0, start=2))
    size = (kwargs.get("height", 16), kwargs.get("width", 16))
    mask = torch.zeros(size)
    mask[: size[0] // 2] = 1
    with fastdiff.region(mask, halo=0):
        half = pipelines.run(pipe, kwargs)
    hows = {e.how for e in acceleration_of(pipe).last.trace}
    counts = [int(h.split()[0]) / int(h.split()[2]) for h in hows if h.endswith("tokens")]
    assert len(counts) == 1 and 0.4 < counts[0] < 0.7 and half.isfinite().all()
    fastdiff.restore(pipe)
    fastdiff.accelerate(pipe, cache=[POLICY, Forecast(2)])
    both = pipelines.run(pipe, kwargs)
    assert both.isfinite().all() and torch.equal(pipelines.run(pipe, kwargs), both)
