"""Samples that change places take everything along that caches keep of them."""

import pytest
import torch

import fastdiff
from fastdiff import models, samplers
from fastdiff.accelerate import programs as programs_of
from fastdiff.cache import (
    AccumulatedDistance,
    Broadcast,
    DeepCache,
    EncoderPropagation,
    FirstBlock,
    Forecast,
    GuidanceReuse,
)
from fastdiff.engine.request import Request
from fastdiff.methods.trajectory import running
from fastdiff.testing import draw_weights
from fastdiff.tokens import RegionAdaptive

STEPS, AT = 12, 5
INDEX = torch.tensor([2, 0, 2])


def dit():
    torch.manual_seed(0)
    model = models.DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    return draw_weights(model).eval()


def unet():
    model = models.UNet(
        4, 4, (16, 32), 1, (0, 1), 1, heads=2, groups=8, cross_attention_dim=24, num_classes=10
    )
    return draw_weights(model).eval()


CASES = [
    (dit, DeepCache(3)),
    (dit, DeepCache(3, order=1)),
    (dit, Forecast(3)),
    (dit, FirstBlock(9.0, most=2)),
    (dit, AccumulatedDistance(0.6)),
    (dit, Broadcast(2, 3)),
    (dit, GuidanceReuse(2, compare=False)),
    (dit, RegionAdaptive(0.5, start=2, resets=(8,))),
    (unet, DeepCache(3)),
    (unet, EncoderPropagation(3)),
    (unet, FirstBlock(9.0, most=2)),
]


def draw(model, cache, index=None, programs=False, size=(8, 12)):
    """A run without noise of its own whose samples change places before level AT."""
    net = model
    if programs:
        fastdiff.accelerate(model, cache=cache, exact=False)
        net, cache = programs_of(model), None
    try:
        with running(
            net, (3, 4, *size), cache=cache, steps=STEPS, seed=4, prediction="flow",
            classes=torch.tensor([1, 5, 2]), guidance=torch.tensor([2.0, 1.5, 3.0]),
        ) as run:  # fmt: skip
            for i in range(STEPS):
                if i == AT and index is not None:
                    run.permute(index)
                run.step(i, run.predict(i))
            return run.x, run.request
    finally:
        if programs:
            fastdiff.restore(model)


def away(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


def test_what_cannot_change_places_is_dropped():
    request = Request()
    request.state = {"rows": torch.arange(6.0), "table": torch.arange(7.0), "none": None}
    request.permute(torch.tensor([1, 1, 0]), 3)
    assert request.state["rows"].tolist() == [1, 1, 0, 4, 4, 3]  # both branches of guidance
    assert set(request.state) == {"rows", "none"}


@pytest.mark.parametrize("programs", [False, True], ids=["calls", "programs"])
@pytest.mark.parametrize("make, cache", CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_sample_goes_on_from_its_parents_state(make, cache, programs):
    model = make()
    if programs and isinstance(cache, FirstBlock | AccumulatedDistance):
        pytest.skip("waits for features, so no program")
    plain, request = draw(model, cache, programs=programs)
    moved, _ = draw(model, cache, INDEX, programs)
    assert request is not None and any(not all(e.computed) for e in request.trace)
    assert away(moved, plain[INDEX]) < 1e-5


@pytest.mark.parametrize("make, cache", CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_state_left_behind_would_be_seen(make, cache, monkeypatch):
    model = make()
    plain, _ = draw(model, cache)
    monkeypatch.setattr(Request, "permute", lambda *args: None)
    moved, _ = draw(model, cache, INDEX)
    assert away(moved, plain[INDEX]) > 2e-5


def test_plain_moves_are_the_plain_sampler():
    model = dit()
    settings = dict(steps=STEPS, seed=4, classes=torch.tensor([1, 5, 2]), guidance=2.0)
    for sampler in samplers.SAMPLERS.values():
        prediction = "eps"
        shape = (3, 4, 8, 12)
        with running(model, shape, sampler=sampler, prediction=prediction, **settings) as run:
            run.start()
            for i in range(len(run)):
                run.renoise(i, i)
                run.step(i, run.predict(i))
        plain = fastdiff.sample(model, shape, sampler=sampler, **settings)
        assert torch.equal(run.x, plain)


def test_renoising_is_a_semigroup():
    with running(dit(), (1, 4, 8, 8), steps=STEPS) as run:
        for i, j, k in ((9, 6, 2), (STEPS, 4, 1), (5, 5, 0)):
            (c1, s1), (c2, s2) = run.jump(i, j), run.jump(j, k)
            c, s = run.jump(i, k)
            assert abs(c1 * c2 - c) < 1e-7
            assert abs((c2 * s1) ** 2 + s2**2 - s**2) < 1e-7
        with pytest.raises(ValueError, match="level 5 is cleaner than level 3"):
            run.jump(3, 5)


def test_renoised_states_have_the_levels_law():
    with running(dit(), (1, 100_000), steps=STEPS) as run:
        run.x = torch.full((1, 100_000), 0.7)  # clean
        run.renoise(STEPS, 6)
        first = run.x
        run.renoise(6, 2)
        for x, level in ((first, 6), (run.x, 2)):
            assert abs(x.mean() - 0.7 * run.alpha[level]) < 4 * run.sigma[level] / 100_000**0.5
            assert abs(x.std() - run.sigma[level]) < 0.01
        assert not torch.equal(first, run.x)


def test_noise_after_a_jump_is_new():
    with running(dit(), (1, 4, 8, 8), sampler="ddpm", steps=STEPS) as run:
        x = torch.zeros(1, 4, 8, 8)
        m = torch.zeros(1, 4, 8, 8)
        seen = [run.step(3, m, x=x) for _ in range(3 * STEPS)]
        for a, b in zip(seen, seen[1:], strict=False):
            assert not torch.equal(a, b)
        flat = torch.stack(seen).flatten(1)
        assert (torch.corrcoef(flat).fill_diagonal_(0).abs() < 0.3).all()


def test_paste_is_exact_and_begins_histories_anew():
    settings = dict(sampler="dpmpp_2m", steps=STEPS, classes=torch.tensor([1, 2]))
    with running(dit(), (2, 4, 8, 8), cache=DeepCache(3), **settings) as run:
        for i in range(4):
            run.step(i, run.predict(i))
        before, ref = run.x, torch.randn(2, 4, 8, 8)
        mask = torch.zeros(1, 1, 8, 8)
        mask[..., :4], mask[..., 4] = 1, 0.5
        run.paste(mask, ref)
        assert torch.equal(run.x[..., :4], before[..., :4])
        assert torch.equal(run.x[..., 5:], ref[..., 5:])
        assert torch.allclose(run.x[..., 4], (before[..., 4] + ref[..., 4]) / 2)
        assert not run.history and not run.request.state
        with pytest.raises(ValueError, match="history is 'drop'"):
            run.paste(mask, ref, history="drop")


def test_independent_calls_keep_and_read_nothing():
    model = dit()
    with running(model, (2, 4, 8, 8), cache=DeepCache(3), steps=STEPS) as run:
        for i in range(4):
            plain = run.predict(i, independent="levels are drawn at random")
        assert not run.request.bytes()
        assert all("levels are drawn at random" in e.how for e in run.request.trace)
    with running(model, (2, 4, 8, 8), steps=STEPS) as run:
        assert torch.equal(run.predict(3), plain)


def test_two_runs_in_turns_are_two_runs():
    model = dit()
    settings = dict(steps=STEPS, classes=torch.tensor([1, 2]), sampler="ddpm")
    fastdiff.accelerate(model, cache=DeepCache(3), exact=False)

    def steps(seed):
        with running(model, (2, 4, 8, 8), seed=seed, **settings) as run:
            for i in range(STEPS):
                run.step(i, run.predict(i))
            return run.x

    alone = [steps(seed) for seed in (1, 2)]
    again = [steps(seed) for seed in (1, 2)]
    fastdiff.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_shifted_predictions_mean_shifted_noise(prediction):
    settings = dict(steps=STEPS, prediction=prediction)
    with running(dit(), (2, 4, 8, 8), **settings) as run:
        m, more = torch.randn(2, 2, 4, 8, 8).unbind(0)
        for i in range(STEPS):
            moved = run.eps(i, run.shifted(i, m, eps=more))
            if run.alpha[i] == 0:  # pure noise: its noise is x itself, whatever is predicted
                assert prediction == "flow" and torch.equal(moved, run.x)
            else:
                torch.testing.assert_close(moved, run.eps(i, m) + more, rtol=1e-4, atol=1e-4)
