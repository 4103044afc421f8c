"""Experts in few bits within whole networks: as tests/engine/test_quant_layers.py has it for linear
layers."""

from __future__ import annotations

import pytest
import torch

import fastdiff
from fastdiff import calibrate, nn, ops, stored
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import FirstBlock, Forecast
from fastdiff.models import DiTMoE
from fastdiff.precision import Precision
from fastdiff.testing import draw_weights
from fastdiff.tokens import RegionAdaptive
from fastdiff.tune import describe

SIZE, STEPS = (4, 8, 12), 6
PARTS = ("up", "down", "shared.up", "shared.down")
EXPERTS = [f"blocks.{i}.moe.{part}" for i in (0, 1) for part in PARTS]
ONLY = dict(format="float", layers=[("*.moe.*", "int8")])


@pytest.fixture
def model():
    return draw_weights(
        DiTMoE(
            input_size=8, patch_size=2, hidden_size=64, depth=2, num_heads=4, num_classes=10,
            experts=4, learn_sigma=False,
        )
    )  # fmt: skip


def inputs(batch=2):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(batch, *SIZE, generator=g)
    return x, torch.tensor([10.0, 900.0, 400.0][:batch]), torch.tensor([1, 2, 3][:batch])


def call(model, *args):
    with torch.no_grad():
        return model(*(args or inputs()))


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def run(model, batch=2, **how):
    x, _, y = inputs(batch)
    settings = dict(classes=y, guidance=1.5, steps=STEPS, seed=torch.arange(batch) + 7)
    return fastdiff.sample(model, x, **{**settings, **how})


@pytest.mark.parametrize(
    "policy",
    [
        Precision("float"),
        Precision(keep=["*"]),
        Precision(first=STEPS),
        Precision(layers=[("*.moe.*", "float"), ("*", "float")]),
    ],
    ids=describe,
)
def test_neutral_is_exact(policy, model):
    plain = run(model)
    assert torch.equal(run(model, cache=policy), plain)


BOUNDS = [  # of a layer's output and of the network's, relative L2
    (Precision(), 3e-2),
    (Precision(group=16), 3e-2),
    (Precision(rank=8), 3e-2),
    (Precision(rotate=64), 3e-2),
    (Precision("int4", group=16), 0.15),
    (Precision("int4", group=16, rank=16), 0.15),
    (Precision("bfloat16"), 6e-3),
]


@pytest.mark.parametrize(
    "policy, bound", BOUNDS, ids=lambda v: describe(v) if isinstance(v, Precision) else ""
)
def test_errors_of_layers_and_networks(policy, bound, model):
    plain = call(model)
    fastdiff.accelerate(model, precision=policy, exact=False)
    with fastdiff.request():
        got = call(model)
    layers = acceleration_of(model).layers
    assert set(EXPERTS) < set(layers)
    errors = {name: layers[name].error() for name in EXPERTS}
    assert all(0 < error < bound for error in errors.values()), errors
    assert 0 < distance(got, plain) < bound
    words = fastdiff.summary(model)
    assert "blocks.0.moe.up: " in words and "blocks.1.moe.shared.down: " in words
    fastdiff.restore(model)
    assert torch.equal(call(model), plain)


def test_a_layer_against_its_operations():
    """To the bit: routing is of floats, both products are int8."""
    moe = nn.MoE(32, 48, 4, 2, bias=True, capacity=9, activation="geglu").eval()
    for bias in (moe.up_bias, moe.down_bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        plain = moe(x)
        fastdiff.accelerate(moe, precision=Precision(least=0), exact=False)
        got = moe(x)
        up, down = ops.quantize_experts(moe.up), ops.quantize_experts(moe.down)
        tokens = x.view(21, 32)
        r = moe.route(tokens)
        h = ops.grouped_quant_linear(
            tokens, up, r.offsets, bias=moe.up_bias, index=r.tokens, activation="geglu"
        )
        y = ops.grouped_quant_linear(h, down, r.offsets, bias=moe.down_bias)
        want = ops.moe_combine(y, r.weights, r.position).view(x.shape)
        assert torch.equal(got, want) and 0 < distance(got, plain) < 2e-2
        x[1, 2, 3] = torch.nan
        again = moe(x)
        assert again[1, 2].isnan().all() and again.isnan().sum() == 32
        assert moe(x[:0]).shape == (0, 7, 32)
    fastdiff.restore(moe)


def test_patterns_choose_weights(model):
    policy = Precision(
        layers=[("*.moe.shared.*", "float"), ("*.moe.down", "int4"), ("*.moe.up", "bfloat16")]
    )
    fastdiff.accelerate(model, precision=policy, exact=False)
    forms = {name: own.format for name, own in acceleration_of(model).layers.items()}
    assert forms["blocks.0.moe.down"] == "int4" and forms["blocks.1.moe.up"] == "bfloat16"
    assert not any("shared" in name for name in forms) and forms["blocks.0.attn.qkv"] == "int8"
    fastdiff.restore(model)
    fastdiff.accelerate(model, precision=Precision(keep=["*.moe.up"]), exact=False)
    assert "blocks.0.moe.up" not in acceleration_of(model).layers
    fastdiff.restore(model)
    with pytest.raises(ValueError, match="no layer is called '\\*.moe.none'"):
        fastdiff.accelerate(model, precision=Precision(layers=[("*.moe.none", "int8")]))


@pytest.mark.parametrize(
    "cache", [Forecast(2), FirstBlock(0.2), RegionAdaptive(0.5, start=1)], ids=describe
)
def test_with_caches_and_tokens(cache, model):
    plain = run(model)
    one, other = run(model, cache=cache), run(model, cache=[cache, Precision(**ONLY)])
    assert 0 < distance(other, one) < 5e-2
    assert distance(other, plain) < distance(one, plain) + 5e-2
    assert torch.equal(run(model, cache=[Precision(**ONLY), cache]), other)
    assert torch.equal(run(model), plain)


def test_first_and_last_steps_are_in_floats(model):
    policy = Precision(**ONLY, first=1, last=2)
    want = run(model, cache=policy)
    assert not torch.equal(want, run(model, cache=Precision(**ONLY)))
    assert torch.equal(run(model, steps=3, cache=policy), run(model, steps=3))
    fastdiff.accelerate(model, precision=policy, exact=False)
    captured = fastdiff.programs(model)
    assert torch.equal(run(captured), want) and torch.equal(run(captured), want)
    fastdiff.restore(model)


def test_weights_that_change_are_quantised_anew(model):
    fastdiff.accelerate(model, precision=Precision(**ONLY), exact=False)
    before = call(model)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.down.mul_(-20)
            block.moe.shared.up.mul_(-1)
    after = call(model)
    fastdiff.restore(model)
    assert distance(after, call(model)) < 2e-2 < distance(before, after)


def test_gradients_training_and_autocast_take_the_floats(model):
    x, t, y = inputs()
    x.requires_grad_()

    def grads():
        model.zero_grad()
        out = model(x, t, y)
        out.sum().backward()
        return out.detach(), model.blocks[0].moe.up.grad, model.blocks[1].moe.shared.down.grad

    moe, tokens = model.blocks[0].moe, torch.randn(5, 64)

    def cast():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return moe(tokens)

    want, half = grads(), cast()
    fastdiff.accelerate(model, precision=Precision(**ONLY), exact=False)
    assert all(torch.equal(a, b) for a, b in zip(grads(), want, strict=True))
    assert torch.equal(cast(), half)
    assert not torch.equal(call(model), want[0])
    with torch.no_grad():
        few = moe(tokens)
        moe.train()
        floats = moe(tokens)
        moe.eval()
    fastdiff.restore(model)
    with torch.no_grad():
        assert torch.equal(floats, moe(tokens)) and not torch.equal(floats, few)


def ends():
    return torch.tensor([0, 0, 1, 1, 2])


def test_given_weights_are_in_floats(model):
    moe = model.blocks[0].moe
    x, offsets = torch.randn(2, 64), ends()
    with torch.no_grad():
        plain = moe.layer("down", x.repeat(1, 4), offsets)
        fastdiff.accelerate(model, precision=Precision(**ONLY), exact=False)
        given = moe.layer("down", x.repeat(1, 4), offsets, weights=moe.weights())
        assert torch.equal(given, plain)
        assert not torch.equal(moe.layer("down", x.repeat(1, 4), offsets), plain)
    fastdiff.restore(model)


def test_bfloat16_and_samples(model):
    model.to(torch.bfloat16)
    x, t, y = inputs(3)
    x = x.to(torch.bfloat16)
    plain = call(model, x, t, y)
    fastdiff.accelerate(model, precision=Precision(**ONLY), exact=False)
    got = call(model, x, t, y)
    assert got.dtype == torch.bfloat16 and 0 < distance(got, plain) < 3e-2
    for b in range(3):
        alone = call(model, x[b : b + 1], t[b : b + 1], y[b : b + 1])
        assert distance(got[b : b + 1], alone) < 2e-2
    fastdiff.restore(model)


def test_saved_loaded_and_released(model, tmp_path):
    path = tmp_path / "moe.safetensors"
    policy = Precision(group=16, layers=[("*.moe.down", "int4"), ("*.shared.up", "bfloat16")])
    fastdiff.accelerate(model, precision=policy, exact=False)
    want = call(model)
    stored.save(model, path)
    fastdiff.restore(model)
    given = stored.load(path)
    assert given.layers["blocks.0.moe.down"].format == "int4"
    fastdiff.accelerate(model, precision=given, exact=False)
    assert torch.equal(call(model), want)
    before = sum(p.numel() for p in model.parameters() if not p.is_meta)
    freed = stored.release(model)
    assert freed == 4 * (before - sum(p.numel() for p in model.parameters() if not p.is_meta)) > 0
    moe = model.blocks[0].moe
    assert moe.up.is_meta and moe.shared.down.is_meta and not moe.router.is_meta
    assert torch.equal(call(model), want)
    with pytest.raises(RuntimeError, match="released, blocks.0"):
        fastdiff.restore(model)
    with pytest.raises(RuntimeError, match="has no float weights any more"):
        model(*inputs())  # gradients
    assert torch.equal(call(model), want)
    with torch.no_grad():
        none = torch.zeros(5, dtype=torch.int64)
        assert moe.layer("down", torch.zeros(0, 256), none).shape == (0, 64)
    more = DiTMoE(
        input_size=8, patch_size=2, hidden_size=64, depth=2, num_heads=4, num_classes=10,
        experts=8, learn_sigma=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"moe.up is int8 \[4096, 64\] and what is given has int8"):
        fastdiff.accelerate(more, precision=stored.load(path))


def test_calibration_reaches_experts(model):
    maxima = dict(calibrate.activation_maxima(model, lambda: call(model)))
    assert set(EXPERTS) < set(maxima)
    assert len(maxima["blocks.0.moe.down"]) == 256 and "layer" not in vars(model.blocks[0].moe)
    with torch.no_grad():  # an outlier channel in the tokens of every expert
        for block in model.blocks:
            block.moe.up[:, 256 + 5].mul_(60)
    plain = call(model)
    maxima = calibrate.activation_maxima(model, lambda: call(model))

    def error(policy):
        with fastdiff.accelerated(model, precision=policy, exact=False):
            return distance(call(model), plain)

    only = dict(layers=[("*.moe.down", "int8")], format="float")
    base, smooth = error(Precision(**only)), error(Precision(**only, smooth=0.5, maxima=maxima))
    assert smooth < base, (base, smooth)
    errors = calibrate.layer_errors(model, lambda: run(model), Precision())
    assert set(EXPERTS) < set(errors)


def test_bad_input(model):
    good = call(model)
    with pytest.raises(ValueError, match="layer blocks.0.moe.up: quantize_weight: group is 24"):
        fastdiff.accelerate(model, precision=Precision(**ONLY, group=24))
    short = [("blocks.0.moe.up", [1.0, 2.0])]
    with pytest.raises(ValueError, match="maxima of blocks.0.moe.up has 2 values, need 64"):
        fastdiff.accelerate(model, precision=Precision(**ONLY, smooth=0.5, maxima=short))
    with torch.no_grad():
        model.blocks[1].moe.down[3, 4, 5] = float("nan")
    with pytest.raises(ValueError, match="layer blocks.1.moe.down: quantize_weight: weight has a"):
        fastdiff.accelerate(model, precision=Precision())
    with torch.no_grad():
        model.blocks[1].moe.down[3, 4, 5] = 0.0
    assert "layer" not in vars(model.blocks[0].moe) and good.isfinite().all()
