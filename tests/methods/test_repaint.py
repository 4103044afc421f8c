"""Inpainting by replacement: what is known, what is generated, and where levels are seen again."""

import pytest
import torch

from fastdiff import samplers
from fastdiff.cache import Forecast
from fastdiff.methods.repaint import repaint, timeline
from fastdiff.methods.trajectory import running
from fastdiff.models import DiT
from fastdiff.ops import philox_normal
from fastdiff.samplers import DDIM, DPMpp2M, Run
from fastdiff.samplers.run import REGION_STREAM
from fastdiff.testing_gaussian import GaussianModel, affine

SHAPE = (2, 3, 5, 7)


def gaussian(classes=False):
    g = torch.Generator().manual_seed(0)
    k = 3 if classes else 1
    mean = torch.randn(k, *SHAPE[1:], generator=g)
    return GaussianModel(mean, torch.full((1, *SHAPE[1:]), 0.4), classes=classes)


def reference(shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def half(soft=0.0):
    mask = torch.zeros(1, 1, *SHAPE[2:])
    mask[..., 3:] = 1.0
    mask[..., 2] = soft
    return mask


@pytest.mark.parametrize("history", ["reset", "keep"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
def test_all_generated_is_plain_sampling(sampler, history):
    model, y = gaussian(True), torch.tensor([0, 2])
    settings = dict(sampler=sampler, steps=8, seed=3, classes=y, guidance=3.0)
    mask = torch.ones(1, 1, *SHAPE[2:])
    found = repaint(model, SHAPE, reference(), mask, history=history, **settings)
    assert torch.equal(found, samplers.sample(model, SHAPE, **settings))


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("until", [None, 6, 0])
def test_known_region_is_q_at_every_level(sampler, until):
    """Every call sees ``alpha ref + sigma z`` there, with fresh z, bit for bit what the run
    noises."""
    model, ref, seen = gaussian(), reference(), []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    settings = dict(sampler=sampler, steps=6, seed=5)
    found = repaint(model, SHAPE, ref, half(), until=until, **settings)
    hook.remove()
    known = (half() == 0).expand(SHAPE)
    run, visit = Run(model, SHAPE, **settings), 0
    two = sampler == "heun"
    for i, x in enumerate(seen):
        if (until is None or i < until) and not (two and run.table.reads[i]):
            a, s = float(run.alpha[i]), float(run.sigma[i])
            z = philox_normal(SHAPE, run.seeds, run.slots, visit, REGION_STREAM)
            visit += 1
            assert (x - (a * ref + s * z))[known].abs().max() < 1e-6
    assert torch.equal(found[known], ref[known]) == (until is None)
    plain = samplers.sample(model, SHAPE, **settings)
    assert torch.equal(found[~known], plain[~known])  # this model looks at each number alone


def test_soft_mask_is_in_between():
    ref, mask = reference(), half(0.25)
    found = repaint(gaussian(), SHAPE, ref, mask, steps=6, until=7)
    with running(gaussian(), SHAPE, steps=6) as run:
        for i in range(6):
            run.paste(mask, run.noised(ref, i))
            run.step(i, run.predict(i))
        expected = mask * run.x + (1 - mask) * ref
    assert torch.allclose(found, expected, atol=1e-6)


def test_timeline_of_one_walk():
    assert list(timeline(5, 2, 1)) == [(i, i + 1) for i in range(5)]
    assert list(timeline(3, 10, 4)) == [(0, 1), (1, 2), (2, 3)]  # no jump fits in


def test_timeline_jumps():
    moves = list(timeline(5, 2, 2))
    steps = [i for i, j in moves if j > i]
    jumps = [(i, j) for i, j in moves if j < i]
    assert jumps == [(3, 1), (5, 3)] and steps == [0, 1, 2, 1, 2, 3, 4, 3, 4]
    for (_, end), (begin, _) in zip(moves, moves[1:], strict=False):
        assert end == begin
    # RePaint's 250 steps with jump 10 and 10 walks: 24 jumps, 9 times each.
    moves = list(timeline(250, 10, 10))
    assert sum(j < i for i, j in moves) == 24 * 9
    assert sum(j > i for i, j in moves) == 250 + 24 * 9 * 10


@pytest.mark.parametrize("repeats", [1, 3])
def test_law_of_what_is_generated(repeats):
    """Steps and jumps are affine maps with noise: mean and variance from their products, 4 sigma
    of 8192 samples."""
    model = GaussianModel(torch.full((1, 2), 1.0), torch.full((1, 2), 0.5))
    settings = dict(sampler=DDIM(eta=1.0), steps=8)
    run = Run(model, (1, 2), **settings)
    maps = affine(run.table, run, model)
    m, v = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    for i, j in timeline(8, 3, repeats):
        if j > i:
            a, b, s = maps[i]
        else:
            a, s = run.jump(i, j)
            b = 0.0
        m, v = a * m + b, a**2 * v + s**2
    mask = torch.tensor([[1.0, 0.0]])
    n = 8192
    ref = torch.full((n, 2), -2.0)
    found = repaint(model, (n, 2), ref, mask, jump=3, repeats=repeats, seed=2, **settings)
    x = found[:, 0].double()
    assert torch.equal(found[:, 1], ref[:, 1])
    assert abs(x.mean() - m[0, 0]) < 4 * (v[0, 0] / n) ** 0.5
    assert abs(x.var() / v[0, 0] - 1) < 4 * (2 / n) ** 0.5


def test_jumps_without_fresh_noise_would_be_seen(monkeypatch):
    """Noise numbered by level and not by visit repeats: the variance is another."""
    model = GaussianModel(torch.full((1, 1), 1.0), torch.full((1, 1), 0.5))
    settings = dict(sampler=DDIM(eta=1.0), steps=8, seed=2)
    n, mask = 8192, torch.ones(1, 1)
    own = repaint(model, (n, 1), torch.zeros(n, 1), mask, jump=1, repeats=6, **settings)
    fresh = Run.noise

    def by_level(run, stream):
        noise = fresh(run, stream)
        return noise._replace(step=run.visits[-1] if run.visits else 0)

    monkeypatch.setattr(Run, "noise", by_level)
    bad = repaint(model, (n, 1), torch.zeros(n, 1), mask, jump=1, repeats=6, **settings)
    assert abs(bad.var() / own.var() - 1) > 8 * (2 / n) ** 0.5


@pytest.mark.parametrize("history", ["reset", "keep"])
@pytest.mark.parametrize("sde", [False, True])
def test_history_of_a_pasted_state(history, sde):
    """All is known up to the last call but two. After a paste a step of first order is DDIM's (or,
    with noise, its ancestral form); what is kept of another state makes it another."""
    model, ref, n = gaussian(), reference(), 8
    sampler = DPMpp2M(sde=sde)
    mask = torch.zeros(1, 1, *SHAPE[2:])
    settings = dict(steps=n, seed=4)
    after = {}
    repaint(
        model, SHAPE, ref, mask, history=history, sampler=sampler, until=n - 2, **settings,
        callback=lambda i, run: after.update({i: run.x.clone()}),
    )  # fmt: skip
    first = DDIM(eta=1.0 if sde else 0.0, spacing="linspace")
    with running(model, SHAPE, sampler=sampler, **settings) as run:
        i = n - 3
        for k in range(i + 1):
            x = run.noised(ref, k)
        run.draws.clear()
        other = Run(model, SHAPE, sampler=first, schedule=Levels(run), **settings)
        other.draws[0] = i
        expected = other.step(i, other.predict(i, x), x=x)
    close = (after[i] - expected).abs().max()
    assert close < 1e-5 if history == "reset" else close > 1e-2


class Levels:
    """A schedule of a run's own levels."""

    def __init__(self, run):
        self.run = run

    def levels(self, steps, spacing, extra=0):
        return samplers.schedule.Levels(self.run.alpha, self.run.sigma, self.run.table.t.double())


def test_multistep_after_a_jump_begins_anew():
    found = repaint(
        gaussian(), SHAPE, reference(), half(), sampler="dpmpp_2m", steps=9, jump=3, repeats=2
    )
    assert torch.isfinite(found).all()
    assert torch.equal(found[..., :2], reference()[..., :2])


def test_caches_follow_levels_and_forget_at_a_paste():
    torch.manual_seed(0)
    net = DiT(8, 2, 3, 32, 3, 2, num_classes=3, prediction="flow").eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    shape = (2, 3, 8, 12)
    ref, mask = reference(shape), torch.zeros(1, 1, 8, 12)
    mask[..., 5:] = 1
    seen = []

    def callback(i, run):
        seen.append((i, run.request.trace[-1].step, run.request.trace[-1].how))

    run = dict(steps=6, jump=2, repeats=2)
    cached = repaint(net, shape, ref, mask, cache=Forecast(interval=3), callback=callback, **run)
    order = [i for i, j in timeline(6, 2, 2) if j > i]
    assert [s[:2] for s in seen] == [(i, i) for i in order]
    assert {how for _, _, how in seen} == {"full"}
    assert torch.equal(cached, repaint(net, shape, ref, mask, **run))
    seen.clear()  # without pastes the same levels are forecast
    repaint(net, shape, ref, mask, cache=Forecast(interval=3), callback=callback, steps=6, until=0)
    assert "forecast" in {how for _, _, how in seen}


def test_batch_is_each_alone():
    model, ref, seeds = gaussian(), reference(), torch.tensor([6, 7])
    x = torch.randn(SHAPE)
    before = x.clone()
    settings = dict(sampler="ddpm", steps=8, jump=2, repeats=2)
    whole = repaint(model, x, ref, half(0.5), seed=seeds, **settings)
    assert torch.equal(x, before)
    for b in range(2):
        p = slice(b, b + 1)
        one = repaint(model, x[p], ref[p], half(0.5), seed=seeds[p], **settings)
        assert torch.equal(one, whole[p])


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(history="drop"), "history is 'drop', need 'reset' or 'keep'"),
        (dict(jump=0), "jump is 0, need an integer of at least 1"),
        (dict(repeats=True), "repeats is True"),
        (dict(until=8), "until is 8, need a level from 0 to 7"),
        (dict(mask=torch.ones(5, 7)), r"mask is \[5, 7\], need \[B\|1, C\|1, ...\]"),
        (dict(reference=torch.ones(1, 3, 5, 7)), r"reference is \[1, 3, 5, 7\], need"),
        (dict(reference=None), "reference is NoneType"),
        (dict(sampler="heun", repeats=2), "repeats is 2, but the sampler has two calls a step"),
    ],
)
def test_bad_input(settings, words):
    settings = dict(reference=reference(), mask=half(), steps=6) | settings
    with pytest.raises(ValueError, match=words):
        repaint(gaussian(), SHAPE, **settings)
