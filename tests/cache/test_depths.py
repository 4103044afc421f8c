"""Rules and forecasts on U-Nets: neutral settings, per-sample decisions, what the join keeps."""

from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import models
from fastdiff.cache import (
    AccumulatedDistance,
    DeepCache,
    FirstBlock,
    Forecast,
    MagnitudeRatio,
)
from fastdiff.testing import draw_weights, load_file

networks = load_file(Path(__file__).parents[1] / "integrations" / "networks.py")


def ours():
    model = models.UNet(
        1, 1, (16, 32), 1, (0, 1), 1, heads=2, groups=8, cross_attention_dim=24, num_classes=9
    )
    x = networks.draw(2, 1, 16, 24)
    y = torch.tensor([1, 2])
    return draw_weights(model).eval(), (x, torch.tensor([10.0, 900.0]), y), {}


UNETS = [networks.unet, networks.sd15, networks.sdxl, ours]
every = pytest.mark.parametrize("make", UNETS, ids=lambda f: f.__name__)
NEUTRAL = (FirstBlock(0), AccumulatedDistance(0), Forecast(1), MagnitudeRatio())
ALWAYS = (
    FirstBlock(9.0),
    AccumulatedDistance(9.0),
    Forecast(9, warmup=1),
    MagnitudeRatio((1.0, 1.0), retention=0, most=9),
    DeepCache(9, branch=1, order=2),
)


@torch.no_grad()
def call(model, args, kwargs):
    out = model(*args, **kwargs)
    return out if isinstance(out, torch.Tensor) else out.sample


@every
@pytest.mark.parametrize("policy", NEUTRAL, ids=str)
def test_neutral_settings_are_the_plain_model(make, policy):
    model, args, kwargs = make()
    want = call(model, args, kwargs)
    with fastdiff.accelerated(model, cache=policy, exact=False):
        with fastdiff.request(steps=9) as run:
            assert all(torch.equal(call(model, args, kwargs), want) for _ in range(3))
            assert run.bytes() == 0 and run.syncs == 0
    assert torch.equal(call(model, args, kwargs), want)


@every
@pytest.mark.parametrize("policy", ALWAYS, ids=str)
def test_the_same_input_again_is_reused_and_gives_the_same(make, policy):
    model, args, kwargs = make()
    want = call(model, args, kwargs)
    with fastdiff.accelerated(model, cache=policy, exact=False):
        with fastdiff.request(steps=9) as run:
            assert torch.equal(call(model, args, kwargs), want)
            assert torch.equal(call(model, args, kwargs), want)
    assert [e.computed for e in run.trace] == [(True, True), (False, False)]
    assert run.syncs == hasattr(policy, "distance")


@every
@pytest.mark.parametrize("policy", (FirstBlock(1e-6), AccumulatedDistance(1e-6)), ids=str)
def test_samples_decide_alone(make, policy):
    model, args, kwargs = make()
    other = args[0].clone()
    other[1] += torch.randn_like(other[1])
    want = call(model, args, kwargs)[0], call(model, (other, *args[1:]), kwargs)[1]
    with fastdiff.accelerated(model, cache=policy, exact=False), fastdiff.request() as run:
        call(model, args, kwargs)
        got = call(model, (other, *args[1:]), kwargs)
    assert run.trace[1].computed == (False, True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "policy", (FirstBlock(0.4, order=1), AccumulatedDistance(0.6, most=2)), ids=str
)
def test_a_batch_gives_what_its_samples_give_alone(policy):
    model, _, _ = ours()
    g = torch.Generator().manual_seed(0)
    x, d = (torch.randn(8, 1, 16, 16, generator=g) for _ in range(2))
    pace = torch.tensor([0.02, 0.5]).repeat(4).view(8, 1, 1, 1)
    y = torch.arange(8)
    fastdiff.accelerate(model, cache=policy)

    def run(rows):
        with fastdiff.request() as request:
            outs = [
                call(
                    model, ((x + pace * s * d)[rows], torch.full((8,), 9.0 * s)[rows], y[rows]), {}
                )
                for s in range(7)
            ]
        return outs, [e.computed for e in request.trace]

    together, decisions = run(slice(None))
    assert any(any(d) and not all(d) for d in decisions)
    for b in range(8):
        alone, single = run(slice(b, b + 1))
        assert [c[0] for c in single] == [c[b] for c in decisions]
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[b : b + 1], want, rtol=1e-4, atol=1e-5)


def test_a_forecast_of_order_1_keeps_two_features_at_one_address_each():
    model, (x, t, y), _ = ours()
    seen = set()
    fastdiff.accelerate(model, cache=DeepCache(2, order=1))
    with fastdiff.request(steps=12) as run:
        for step in range(12):
            call(model, (x + 0.1 * step, t, y), {})
            (kept,) = run.state.values()
            seen |= {f.data_ptr() for (f,) in kept.history.values}
    assert len(seen) == 2 and run.peak_bytes == 2 * 2 * 16 * 16 * 24 * 4
    assert [e.how for e in run.trace][:5] == ["full", "reuse", "full", "forecast", "full"]


def test_residuals_from_outside_turn_a_rule_off_and_say_so():
    model, args, kwargs = networks.sd15()
    shapes = [(32, 16, 24), (32, 16, 24), (32, 8, 12), (64, 8, 12)]
    kwargs["down_block_additional_residuals"] = [networks.draw(2, *s) for s in shapes]
    kwargs["mid_block_additional_residual"] = networks.draw(2, 64, 8, 12)
    want = call(model, args, kwargs)
    with fastdiff.accelerated(model, cache=FirstBlock(9.0), exact=False):
        with fastdiff.request() as run:
            assert all(torch.equal(call(model, args, kwargs), want) for _ in range(2))
    assert {e.how for e in run.trace} == {
        "off: residuals are added from outside, which a rule cannot foresee"
    }


def test_a_limit_ends_a_run_in_its_first_call():
    model, args, kwargs = networks.sd15()
    policy = DeepCache(3, order=1)
    need = 2 * 2 * 32 * 16 * 24 * 4  # two values of [2, 32, 16, 24] float32
    with fastdiff.accelerated(model, cache=policy, exact=False, cache_bytes=need):
        with fastdiff.request(steps=9) as run:
            for _ in range(6):
                call(model, args, kwargs)
    assert run.peak_bytes == need
    with fastdiff.accelerated(model, cache=policy, cache_bytes=need - 1):
        with fastdiff.request(steps=9), pytest.raises(ValueError, match=f"hold {need} bytes"):
            call(model, args, kwargs)
