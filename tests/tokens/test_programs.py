"""Sparse runs as programs: regions, two calls a step, other people's networks, errors, bytes."""

from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import models
from fastdiff.cache import Forecast
from fastdiff.engine.programs import Programs
from fastdiff.testing import draw_weights, load_file
from fastdiff.tokens import RegionAdaptive

networks = load_file(Path(__file__).parents[1] / "integrations" / "networks.py")
Tape = load_file(Path(__file__).parents[1] / "engine" / "test_programs.py").Tape
TOKENS = RegionAdaptive(0.5, start=2, resets=(5,))
KINDS = pytest.mark.parametrize("kind", [None, Tape], ids=["eager", "tape"])


def dit(**settings):
    torch.manual_seed(0)
    return draw_weights(models.DiT(8, 2, 4, 32, 3, 2, num_classes=5, **settings)).eval()


def programs_of(net, policies, kind):
    return fastdiff.programs(net) if kind is None else Programs(net, policies, kind)


@torch.no_grad()
def loop(call, net, args, kwargs, steps=8, calls=1, samples=None):
    """Outputs of a loop; with two calls a step the second sees other conditions."""
    x, g, found = args[0], torch.Generator().manual_seed(3), []
    move = 0.1 * torch.randn(x.shape, generator=g)
    with fastdiff.request(steps, calls) as run:
        run.samples = samples
        for i in range(steps):
            for j in range(calls):
                out = call(x + i * move, *args[1:], **kwargs)
                out = out if isinstance(out, torch.Tensor) else out[0]
                found.append(out.clone() + j)
            run.prediction = out[:, : x.shape[1]].clone() if i > 1 else None
    return found, run


@KINDS
@pytest.mark.parametrize("policies", [[TOKENS], [TOKENS, Forecast(2)]], ids=["tokens", "both"])
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "wan"])
def test_networks_of_others(name, policies, kind):
    net, args, kwargs = getattr(networks, name)()
    with fastdiff.accelerated(net, cache=policies):
        want, run = loop(net, net, args, kwargs)
        programs = programs_of(net, policies, kind)
        for _ in range(2):
            got, again = loop(programs, net, args, kwargs)
            assert all(map(torch.equal, got, want))
            assert [e[2:5] for e in again.trace] == [e[2:5] for e in run.trace]
        assert any(e.how.endswith("tokens") for e in again.trace) and again.syncs == 0
        if kind is None:
            reports = programs.check()
            assert len(reports) == programs.kinds and all(r.ok for r in reports), "\n".join(
                map(str, reports)
            )
            assert all(map(torch.equal, loop(programs, net, args, kwargs)[0], want))


@KINDS
def test_calls_of_a_step_share_the_choice(kind):
    """Guidance that calls the network twice; in the end it calls it once."""
    net, y = dit(), torch.tensor([1, 3])
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0)

    @torch.no_grad()
    def go(call):
        found, g = [], torch.Generator().manual_seed(0)
        with fastdiff.request(9, calls_per_step=None) as run:
            for i in range(9):
                z = x + 0.1 * i * torch.randn(x.shape, generator=g)
                for null in (True, False) if i < 6 else (False,):
                    found.append(call(z, t, torch.full_like(y, 5) if null else y).clone())
                run.prediction = found[-1][:, :4]
                run.advance()
        return found, run

    for policy in (TOKENS, RegionAdaptive(0.5, 2, (4,), end_ratio=0.1, metric="std")):
        with fastdiff.accelerated(net, cache=policy):
            want, run = go(net)
            programs = programs_of(net, [policy], kind)
            for _ in range(2):
                got, again = go(programs)
                assert all(map(torch.equal, got, want))
                assert [e[0] for e in again.trace] == [e[0] for e in run.trace]


@KINDS
def test_regions_of_runs_one_after_another(kind):
    net, policy = dit(learn_sigma=False), RegionAdaptive(0.25, 2, (6,))
    masks = torch.zeros(3, 8, 8)
    masks[0, :2], masks[1, 4:, 4:], masks[2] = 1, 1, 1

    def go(model, mask, halo):
        how = dict(steps=10, classes=torch.tensor([1, 2]), guidance=2.0, seed=1)
        if mask is None:
            return fastdiff.sample(model, (2, 4, 8, 8), **how)
        with fastdiff.region(mask, halo):
            return fastdiff.sample(model, (2, 4, 8, 8), **how)

    each = [(None, 0), (masks[0], 0), (masks[1], 1), (masks[:2], 0), (masks[2], 0), (None, 0)]
    with fastdiff.accelerated(net, cache=policy):
        want = [go(net, *which) for which in each]
        assert len({float(w.sum()) for w in want}) == 5
        programs = programs_of(net, [policy], kind)
        for _ in range(2):
            for which, picture in zip(each, want, strict=True):
                assert torch.equal(go(programs, *which), picture)
        with pytest.raises(ValueError, match="mask is of 3 samples, need 2 or 1"):
            go(programs, masks, 0)
        assert torch.equal(go(programs, *each[2]), want[2])  # and leaves nothing behind


def test_sizes_and_batches_have_programs_of_their_own():
    net = dit(learn_sigma=False)
    with fastdiff.accelerated(net, cache=TOKENS):
        programs = fastdiff.programs(net)
        for shape in ((2, 4, 8, 8), (1, 4, 8, 12), (3, 4, 8, 8), (2, 4, 8, 8), (1, 4, 8, 12)):
            how = dict(steps=8, classes=torch.arange(shape[0]), guidance=2.0)
            want = fastdiff.sample(net, shape, **how)
            assert torch.equal(fastdiff.sample(programs, shape, **how), want)


def test_an_error_within_a_step_leaves_the_programs_usable(monkeypatch):
    net = dit(learn_sigma=False)
    how = dict(steps=8, classes=torch.arange(2), guidance=2.0)
    with fastdiff.accelerated(net, cache=TOKENS):
        want = fastdiff.sample(net, (2, 4, 8, 8), **how)
        programs = fastdiff.programs(net)
        plain, calls = net.embed, []

        def fails(x):
            """Tokens without a width, in the middle of a sparse run."""
            calls.append(0)
            return plain(x)[..., :5] if len(calls) == 14 else plain(x)

        with monkeypatch.context() as patch, pytest.raises(Exception, match="5"):
            patch.setattr(net, "embed", fails)
            fastdiff.sample(programs, (2, 4, 8, 8), **how)
        assert len(calls) == 14
        for _ in range(2):
            assert torch.equal(fastdiff.sample(programs, (2, 4, 8, 8), **how), want)


def test_bytes_are_counted_and_limited():
    net = dit(learn_sigma=False)
    how = dict(steps=8, classes=torch.arange(2), guidance=2.0)
    with fastdiff.accelerated(net, cache=TOKENS, cache_bytes=1000):
        with pytest.raises(ValueError, match="cache_bytes is 1000"):
            fastdiff.sample(fastdiff.programs(net), (2, 4, 8, 8), **how)
    keys = 2 * 3 * 4 * 16 * 32 * 4  # k and v of three blocks, 4 rows of 16 tokens of width 32
    with fastdiff.accelerated(net, cache=TOKENS, cache_bytes=keys + 10_000):
        fastdiff.sample(fastdiff.programs(net), (2, 4, 8, 8), **how)
