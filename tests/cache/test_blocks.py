"""Caches of transformer blocks: neutral settings, per-sample decisions, schedules, requests."""

from pathlib import Path

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

import fastdiff
from fastdiff import models
from fastdiff.cache import (
    AccumulatedDistance,
    DeepCache,
    FirstBlock,
    Forecast,
    MagnitudeRatio,
)
from fastdiff.cache.extrapolate import METHODS, weights
from fastdiff.engine import rows as rows_of
from fastdiff.testing import load_file

networks = load_file(Path(__file__).parents[1] / "integrations" / "networks.py")

TRANSFORMERS = [networks.dit, networks.pixart, networks.sd3, networks.flux, networks.wan]
every = pytest.mark.parametrize("make", TRANSFORMERS, ids=lambda f: f.__name__)


def ours():
    torch.manual_seed(0)
    model = models.DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def inputs(batch, step, seed=0):
    """Samples that change little (even) or much (odd) from step to step."""
    g = torch.Generator().manual_seed(seed)
    x, d = (torch.randn(batch, 4, 8, 8, generator=g) for _ in range(2))
    pace = torch.tensor([0.01, 0.8]).repeat(batch)[:batch].view(-1, 1, 1, 1)
    return x + pace * step * d, torch.full((batch,), 900.0 - 2 * step), torch.arange(batch) % 10


@torch.no_grad()
def run(model, calls, steps=None):
    with fastdiff.request(steps=steps) as request:
        return [model(*args) for args in calls], request


@torch.no_grad()
def call(model, args, kwargs):
    return model(*args, **kwargs, return_dict=False)[0]


@every
@pytest.mark.parametrize(
    "policy",
    (FirstBlock(0), Forecast(interval=1), AccumulatedDistance(0), MagnitudeRatio(), DeepCache(1)),
    ids=str,
)
def test_neutral_settings_are_the_plain_model(make, policy):
    model, args, kwargs = make()
    want = call(model, args, kwargs)
    fastdiff.accelerate(model, cache=policy, exact=False)
    with fastdiff.request(steps=3) as request:
        for _ in range(3):
            assert torch.equal(call(model, args, kwargs), want)
        assert all(all(e.computed) for e in request.trace) and request.syncs == 0
        assert request.bytes() == 0
    fastdiff.restore(model)
    assert torch.equal(call(model, args, kwargs), want)


@every
@pytest.mark.parametrize(
    "policy",
    (
        FirstBlock(0.5),
        Forecast(interval=5, warmup=1),
        AccumulatedDistance(0.5),
        MagnitudeRatio((1.0, 1.0), retention=0),
        DeepCache(5),
    ),
    ids=str,
)
def test_the_same_input_again_is_reused_and_gives_the_same(make, policy):
    model, args, kwargs = make()
    with fastdiff.accelerated(model, cache=policy), fastdiff.request(steps=9) as request:
        first = call(model, args, kwargs)
        second = call(model, args, kwargs)
        computed = [e.computed for e in request.trace]
    assert all(computed[0]) and not any(computed[1])
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)  # x + (y - x) rounds
    batch = len(computed[0])
    assert request.syncs == hasattr(policy, "distance") and batch >= 2


@every
def test_samples_decide_alone(make):
    """Half of a batch changes a lot: it computes, as it would alone, and the others reuse."""
    model, args, kwargs = make()
    name = next(iter(kwargs)) if not args else None
    x = args[0] if args else kwargs[name]
    other = x.clone()
    other[1] += 2 * torch.randn_like(other[1])

    def given(value):
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, name: value})

    want = call(model, *given(other))
    with fastdiff.accelerated(model, cache=FirstBlock(1e-6), exact=False):
        with fastdiff.request() as request:
            first = call(model, *given(x))
            got = call(model, *given(other))
            computed = request.trace[1].computed
    assert computed[1] and not computed[0]
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[0], first[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "policy",
    (
        FirstBlock(0.15),
        FirstBlock(0.3, order=1, warmup=2, most=2),
        AccumulatedDistance(0.3),
        AccumulatedDistance(0.5, order=2),
    ),
    ids=str,
)
def test_a_batch_gives_what_its_samples_give_alone(policy):
    model, steps, batch = ours(), 9, 8
    calls = [inputs(batch, s) for s in range(steps)]
    fastdiff.accelerate(model, cache=policy)
    together, request = run(model, calls)
    decisions = [e.computed for e in request.trace]
    assert any(any(d) and not all(d) for d in decisions)
    for b in range(batch):
        alone, single = run(model, [tuple(a[b : b + 1] for a in args) for args in calls])
        assert [e.computed[0] for e in single.trace] == [d[b] for d in decisions]
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[b : b + 1], want, rtol=1e-4, atol=1e-5)


def test_interleaved_requests_and_a_broken_one_leave_no_trace():
    model = fastdiff.accelerate(ours(), cache=Forecast(interval=3, order=1, warmup=2))
    small = [inputs(2, s) for s in range(7)]
    large = [(torch.randn(1, 4, 16, 12), t[:1], y[:1]) for _, t, y in small]
    want = [run(model, calls)[0] for calls in (small, large)]

    @torch.no_grad()
    def steps(calls):
        request = fastdiff.engine.request.Request(calls_per_step=1)
        for args in calls:
            with request.active():
                out = model(*args)
            yield out

    for a, b, wa, wb in zip(steps(small), steps(large), *want, strict=True):
        assert torch.equal(a, wa) and torch.equal(b, wb)
    with pytest.raises(ValueError, match="DiT: t is"):
        run(model, [*small[:3], (small[0][0], None, small[0][2])])
    assert all(map(torch.equal, run(model, small)[0], want[0]))


def test_forecasts_are_exact_where_they_should_be():
    def f(s):
        return 2.0 - 3.0 * s + 0.5 * s * s

    def forecast(method, nodes, f, step):
        return sum(w * f(s) for w, s in zip(weights(method, nodes, step), nodes, strict=True))

    assert forecast("lagrange", (4, 1, 0), f, 6) == pytest.approx(f(6))
    for method in METHODS:
        assert weights(method, (4,), 6) == (1.0,)
        assert sum(weights(method, (7, 5, 2, 0), 9)) == pytest.approx(1.0) or method == "hermite"
        if method != "hermite":  # all have the same line
            assert forecast(method, (4, 1), lambda s: 3 * s - 1, 6) == pytest.approx(17)
    # Two-step Adams-Bashforth on slopes: h (3/2 g_0 - 1/2 g_1) at even steps.
    slopes = (f(4) - f(2)) / 2, (f(2) - f(0)) / 2
    want = f(4) + 2 * (1.5 * slopes[0] - 0.5 * slopes[1])
    assert forecast("adams", (4, 2, 0), f, 6) == pytest.approx(want)
    # sigma H_1(sigma x) = x / 2 and sigma^2 H_2(sigma x) = x^2 / 4 - 1 / 2, on differences.
    first, second = (f(4) - f(2)) / 2, ((f(4) - f(2)) / 2 - (f(2) - f(0)) / 2) / 4
    want = f(4) + first * 1 + second * (4 / 4 - 1 / 2)
    assert forecast("hermite", (4, 2, 0), f, 6) == pytest.approx(want)


def test_magnitudes_decide_a_schedule():
    ratios = (1.0, 0.9, 0.95, 0.99, 0.99, 0.99, 0.99, 0.99, 0.99, 0.8)
    policy = MagnitudeRatio(ratios, threshold=0.06, most=3, retention=0.2)
    # From step 3 on: |1 - .99|, |1 - .99^2|, |1 - .99^3| add up to 0.0596, then four are too many.
    assert [policy.full(s, 10) for s in range(10)] == [1, 1, 0, 1, 0, 0, 0, 1, 0, 1]
    assert policy.full(0, 5) and not policy.neutral and MagnitudeRatio().neutral
    with pytest.raises(ValueError, match="need the number of steps"):
        policy.full(1, None)


def test_forecast_keeps_its_schedule():
    policy = Forecast(interval=3, warmup=2)
    assert [policy.full(s, 10) for s in range(9)] == [1, 1, 0, 0, 1, 0, 0, 1, 0]
    assert [Forecast(schedule=(0, 4)).full(s, 9) for s in range(6)] == [1, 0, 0, 0, 1, 0]
    model = fastdiff.accelerate(ours(), cache=policy)
    _, request = run(model, [inputs(2, s) for s in range(9)])
    assert [all(e.computed) for e in request.trace] == [policy.full(s, 9) for s in range(9)]
    assert {e.how for e in request.trace} == {"full", "forecast"} and request.syncs == 0


def test_first_block_is_diffusers_first_block_cache():
    model, args, kwargs = networks.flux()
    x = kwargs["hidden_states"][:1] if not args else args[0][:1]
    single = {
        k: v[:1] if isinstance(v, torch.Tensor) and v.dim() and v.shape[0] == 2 else v
        for k, v in kwargs.items()
    }
    noise, threshold = torch.randn_like(x), 0.05
    calls = [{**single, "hidden_states": x + 0.02 * s * s * noise} for s in range(8)]
    with fastdiff.accelerated(model, cache=FirstBlock(threshold), exact=False):
        with fastdiff.request() as request, torch.no_grad():
            got = [model(**c, return_dict=False)[0] for c in calls]
            hits = [not e.computed[0] for e in request.trace]
    assert any(hits) and not all(hits[1:])
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))
    with torch.no_grad(), model.cache_context("run"):
        want = [model(**c, return_dict=False)[0] for c in calls]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_nan_computes_and_is_told_and_gradients_turn_caches_off():
    model = fastdiff.accelerate(ours(), cache=FirstBlock(10.0))
    good = inputs(2, 0)
    bad = (good[0].clone(), *good[1:])
    bad[0][0, 0, 0, 0] = float("nan")
    _, request = run(model, [good, bad])
    assert request.trace[1].computed == (True, False) and "NaN" in request.trace[1].how
    with fastdiff.request() as request:
        for _ in range(2):
            model(*good)
    assert [e.how for e in request.trace] == ["off: gradients are recorded"] * 2


@torch.no_grad()
def test_a_call_that_breaks_off_within_a_run_keeps_the_pair_before_it():
    model, calls = ours(), [inputs(2, s) for s in (0, 3, 3)]
    want = model(*calls[2])
    fastdiff.accelerate(model, cache=FirstBlock(1e-6), exact=False)
    plain = model.attend
    with fastdiff.request() as request:
        for first in (True, False):
            if not first:
                model(*calls[0])

            def fail(block, h):
                if block is model.blocks[-1]:
                    raise RuntimeError("broken off")
                return plain(block, h)

            model.attend = fail
            with pytest.raises(RuntimeError, match="broken off"):
                model(*calls[1])
            model.attend = plain
        assert torch.equal(model(*calls[2]), want)
        assert all(request.trace[-1].computed)


@torch.no_grad()
def test_steps_with_one_or_two_calls_keep_their_slots():
    """Guidance that ends: the conditional branch is compared with itself to the last step."""
    model, (x, t, y) = fastdiff.accelerate(ours(), cache=FirstBlock(1e-6)), inputs(2, 0)
    with fastdiff.request(calls_per_step=None) as run_:
        for step in range(5):
            model(x, t, y)
            if step < 2:
                model(x + 1, t, y)
            run_.advance()
    assert [e.slot[1] for e in run_.trace] == [0, 1, 0, 1, 0, 0, 0]
    assert [any(e.computed) for e in run_.trace] == [True, True] + [False] * 5


@torch.no_grad()
def test_a_call_that_failed_is_no_call():
    model, (x, t, y) = fastdiff.accelerate(ours(), cache=FirstBlock(1e-6)), inputs(2, 0)
    with fastdiff.request() as run_:
        model(x, t, y)
        with pytest.raises(ValueError, match="DiT: t is"):
            model(x, None, y)
        model(x, t, y)
    assert [(e.step, e.slot[1], any(e.computed)) for e in run_.trace] == [
        (0, 0, True),
        (1, 0, False),
    ]


def test_tensors_of_samples_are_taken_out_of_dicts_and_lists():
    rows, t, table = torch.tensor([2, 0]), torch.arange(6.0).view(3, 2), (torch.zeros(3, 2),)
    found = rows_of.taken({"a": t, "b": [t[:, 0]], "c": table, "d": "x"}, rows, 3)
    assert torch.equal(found["a"], t[rows]) and torch.equal(found["b"][0], t[rows, 0])
    assert found["c"] is table and found["d"] == "x"


def test_sd3_with_skipped_layers_runs_plain_and_says_so():
    model, args, kwargs = networks.sd3()
    kwargs = {**kwargs, "skip_layers": [0]}
    want = call(model, args, kwargs)
    with fastdiff.accelerated(model, cache=FirstBlock(9.0), exact=False):
        with fastdiff.request() as run_:
            for _ in range(2):
                assert torch.equal(call(model, args, kwargs), want)
    assert [e.how for e in run_.trace] == ["off: skip_layers leaves out blocks"] * 2


def test_bad_settings():
    for make in (lambda: FirstBlock(-1), lambda: FirstBlock(float("nan")), lambda: Forecast(0),
                 lambda: Forecast(order=5), lambda: Forecast(warmup=0),
                 lambda: Forecast(method="spline"), lambda: Forecast(schedule=[1]),
                 lambda: AccumulatedDistance(coefficients=()), lambda: FirstBlock(most=0),
                 lambda: MagnitudeRatio(retention=2), lambda: MagnitudeRatio((-1,))):  # fmt: skip
        with pytest.raises(ValueError, match="need"):
            make()
    with pytest.raises(ValueError, match="does not run on Linear"):
        fastdiff.accelerate(torch.nn.Linear(2, 2), cache=FirstBlock())


def test_small_changes_add_up_in_half_precision():
    """bfloat16 has three digits: a sum of 0.5 would not grow by 0.001 any more."""
    policy, memory = AccumulatedDistance(9.0), {}
    signal = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    memory = policy.update(memory, signal, None, None)
    for i in range(1000):
        signal = signal.clone()
        signal[0, i] += 1.0  # mean change 1 / 4096
        distance = policy.distance(memory, signal)
        memory = policy.update(memory, signal, torch.tensor([], dtype=torch.int64), distance)
    want = sum(1 / (4096 + i) for i in range(1000))
    assert memory["sum"].item() == pytest.approx(want, rel=1e-3)
