"""Calibrated schedules: ratios by hand, a rule's decisions frozen."""

import pytest
import torch

import fastdiff
from fastdiff import models
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import (
    AccumulatedDistance,
    Broadcast,
    DeepCache,
    FirstBlock,
    Forecast,
    MagnitudeRatio,
)
from fastdiff.calibrate import frozen, magnitude_ratios, module_schedules
from fastdiff.testing import draw_weights


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


def draw(model, **settings):
    y = torch.tensor([1, 5])
    return fastdiff.sample(model, (2, 4, 8, 8), steps=12, classes=y, guidance=2.0, **settings)


@torch.no_grad()
def test_ratios_are_those_of_the_residuals():
    model, residuals = dit(), []
    plain = model.layers

    def layers(h, *args):
        out = plain(h, *args)
        residuals.append(out[0] - h)
        return out

    model.layers = layers
    draw(model)
    del model.layers
    ratios = magnitude_ratios(model, lambda: draw(model))
    sizes = [r.norm(dim=-1) for r in residuals]
    want = [1.0] + [(b / a).mean().item() for a, b in zip(sizes, sizes[1:], strict=False)]
    assert ratios == pytest.approx(want, rel=1e-5) and len(ratios) == 12
    assert acceleration_of(model) is None
    policy = MagnitudeRatio(ratios, threshold=0.3, retention=0.25)
    done = [policy.full(s, 12) for s in range(12)]
    assert all(done[:3]) and not all(done)
    draw(model, cache=policy)


@pytest.mark.parametrize("make", (dit, unet), ids=lambda f: f.__name__)
@pytest.mark.parametrize("rule", (FirstBlock, AccumulatedDistance), ids=lambda c: c.__name__)
def test_frozen_decisions_are_the_rules_of_one_sample(make, rule):
    model, policy = make(), rule(0.4, order=1, most=3)
    static = frozen(model, policy, lambda: draw(model))
    assert isinstance(static, Forecast if make is dit else DeepCache) and static.order == 1
    with fastdiff.accelerated(model, cache=policy, exact=False):
        want = draw(model)
        events = acceleration_of(model).last.trace
        assert 0 < sum(not any(e.computed) for e in events) < 11
        same = all(len(set(e.computed)) == 1 for e in events)
    steps = tuple(e.step for e in events if sum(e.computed) >= len(e.computed) / 2)
    assert static.schedule == steps
    with fastdiff.accelerated(model, cache=static, exact=False):
        got = draw(model)
        run = acceleration_of(model).last
    assert run.syncs == 0
    assert same  # both samples agree: the schedule is then the rule's own run
    if make is unet or rule is AccumulatedDistance:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("most", (1, 3))
def test_module_schedules_follow_the_changes_of_outputs(most):
    model, outs = dit(), []
    plain = model.attend

    def attend(block, h):
        outs.append(plain(block, h))
        return outs[-1]

    model.attend = attend
    draw(model)
    del model.attend
    outs = torch.stack(outs).unflatten(0, (12, 3))  # [steps, blocks, B, N, D]

    def change(t, s):
        size = outs[s].abs().sum((-2, -1))
        return ((outs[s] - outs[t]).abs().sum((-2, -1)) / size).mean().item()

    threshold = 1.5 * sum(change(s - 1, s) for s in range(1, 12)) / 11
    want = [0]
    for s in range(1, 12):
        if s - want[-1] > most or change(want[-1], s) >= threshold:
            want.append(s)
    policy = module_schedules(model, lambda: draw(model), threshold, most)
    assert policy.self_attention == tuple(want) and 2 < len(want) < 12
    assert policy.cross_attention == policy.temporal_attention == 1
    with fastdiff.accelerated(model, cache=policy, exact=False):
        assert draw(model).isfinite().all()
        events = [e for e in acceleration_of(model).last.trace if e.part == "self-attention"]
    assert [e.step for e in events if all(e.computed)] == want
    assert module_schedules(model, lambda: draw(model), 0).neutral
    assert acceleration_of(model) is None
    network = unet()
    policy = module_schedules(network, lambda: draw(network), 1e9)
    assert policy == Broadcast((0, 4, 8), (0, 4, 8), (0, 4, 8), 0, 1, temporal_attention=1)


def test_bad_input():
    model = dit()
    with pytest.raises(ValueError, match="share is 0"):
        frozen(model, FirstBlock(), lambda: draw(model), share=0)
    with pytest.raises(ValueError, match="made no run of target"):
        magnitude_ratios(model, lambda: None)
    with pytest.raises(ValueError, match="made no run of target"):
        module_schedules(model, lambda: None)
    for settings, need in ((dict(most=5), "most is 5, need"), (dict(threshold=-1), "is -1, need")):
        with pytest.raises(ValueError, match=need):
            module_schedules(model, lambda: draw(model), **settings)
    with pytest.raises(ValueError, match="known here are none"):
        module_schedules(torch.nn.Linear(2, 2), lambda: None)
    assert acceleration_of(model) is None
