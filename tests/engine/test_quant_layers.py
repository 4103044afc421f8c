"""Linear layers in few bits within whole networks: neutral is exact, errors are small and known,
and they go together with everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import adapters, calibrate, methods, samplers, stored, target
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import DeepCache, FirstBlock, Forecast
from fastdiff.cache.parse import parse
from fastdiff.dispatch import record
from fastdiff.models import DiT
from fastdiff.precision import Precision
from fastdiff.testing import draw_weights, load_file
from fastdiff.tokens import Merge, RegionAdaptive
from fastdiff.tune import Quality, describe, policy_dict, policy_from

networks = load_file(Path(__file__).parents[1] / "integrations" / "networks.py")
SIZE, STEPS = (4, 8, 12), 6


def dit():
    return draw_weights(
        DiT(
            input_size=8, patch_size=2, hidden_size=64, depth=3, num_heads=4, num_classes=10,
            learn_sigma=False,
        )
    )  # fmt: skip


@pytest.fixture
def model():
    return dit()


def inputs(batch=2):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(batch, *SIZE, generator=g)
    return x, torch.tensor([10.0, 900.0, 400.0][:batch]), torch.tensor([1, 2, 3][:batch])


def call(model, *args):
    with torch.no_grad():
        return model(*(args or inputs()))


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def ran(rows, op):
    return sum(n for (name, _), n in rows.items() if name == op)


def run(model, batch=2, **how):
    x, _, y = inputs(batch)
    settings = dict(classes=y, guidance=1.5, steps=STEPS, seed=torch.arange(batch) + 7)
    return fastdiff.sample(model, x, **{**settings, **how})


@pytest.mark.parametrize(
    "policy",
    [
        Precision("float"),
        Precision("int8", keep=["*"]),
        Precision("int8", first=STEPS),
        Precision("int8", layers=[("*", "float")]),
        Precision("int8", attention="int8", layers=[("*", "float")]),
        Precision("float", attention="int8", first=STEPS),
    ],
    ids=["floats", "all kept", "all steps", "every layer", "every attention", "all of those"],
)
def test_neutral_is_exact(policy, model):
    plain = run(model)
    assert torch.equal(run(model, cache=policy), plain)


BOUNDS = [  # of a layer's output and of the network's, relative L2
    (Precision(), 2e-2),
    (Precision(group=16), 2e-2),
    (Precision(rank=8), 2e-2),
    (Precision(rotate=64), 2e-2),
    (Precision("int4", group=16), 0.12),
    (Precision("int4", group=16, rank=16), 0.10),
    (Precision("bfloat16"), 4e-3),
]


@pytest.mark.parametrize(
    "policy, bound", BOUNDS, ids=lambda v: describe(v) if isinstance(v, Precision) else ""
)
def test_errors_of_layers_and_networks(policy, bound, model):
    exact = call(model.double(), *(t.double() if t.is_floating_point() else t for t in inputs()))
    model.float()
    plain = call(model)
    fastdiff.accelerate(model, precision=policy, exact=False)
    with fastdiff.request():
        got = call(model)
    assert distance(plain, exact) < 1e-5 < distance(got, exact) < bound
    layers = acceleration_of(model).layers
    assert len(layers) == 15 and all(0 < own.error() < bound for own in layers.values())
    words = fastdiff.summary(model)
    assert "precision: 15 in" in words and "blocks.0.mlp.fc1: " in words and "ms a call" in words
    fastdiff.restore(model)
    assert torch.equal(call(model), plain)


def test_norms_hand_over_int8(model):
    """After the call whose errors are looked at, norms within the blocks give integers; so they
    do outside runs. A weight's smoothing goes with them, and nothing depends on who rounds."""
    maxima = calibrate.activation_maxima(model, lambda: call(model))
    for policy in (Precision(), Precision(smooth=0.5, maxima=maxima), Precision(group=16)):
        fastdiff.accelerate(model, precision=policy, exact=False)
        with record() as rows:
            got = call(model)
        assert ran(rows, "gate_residual_norm_quantize") == 5, rows
        assert ran(rows, "gate_residual_norm_modulate") == 1, rows
        with fastdiff.request():
            with record() as rows:
                floats = call(model)
            assert not ran(rows, "gate_residual_norm_quantize")
            assert distance(got, floats) < 2e-3
            assert torch.equal(call(model), got)
        fastdiff.restore(model)
    for policy in (Precision(rotate=64), Precision(rank=4), Precision("bfloat16")):
        with fastdiff.accelerated(model, precision=policy, exact=False):
            with record() as rows:
                call(model)
        assert not ran(rows, "gate_residual_norm_quantize")
    with fastdiff.accelerated(model, precision=Precision(first=1), exact=False):
        with fastdiff.request(), record() as rows:
            call(model)
        assert not ran(rows, "quant_linear") and not ran(rows, "gate_residual_norm_quantize")


def test_projections_of_one_input_round_it_once():
    make = {f.__name__: f for f in networks.NETWORKS}["sd3"]
    model, args, kwargs = make()
    fastdiff.accelerate(model, precision=Precision(least=256))
    with torch.no_grad(), record() as rows:
        model(*args, **kwargs)
    assert ran(rows, "quantize") < ran(rows, "quant_linear") * 0.75, rows
    layer = next(one for one in acceleration_of(model).layers.values() if one.stored.plain)
    x = torch.randn(3, layer.stored.shape[1])
    with torch.no_grad():
        first = layer(x)
        x.mul_(-1.0)
        second = layer(x)  # written to since
        bias = layer(torch.zeros_like(x))
    torch.testing.assert_close(first - bias, bias - second)


def test_scores_in_int8(model):
    plain = call(model)
    policy = Precision("float", attention="int8", layers=[("blocks.1.*", "float")])
    fastdiff.accelerate(model, precision=policy, exact=False)
    with fastdiff.request():
        got = call(model)
    assert 1e-7 < distance(got, plain) < 1e-2
    own = acceleration_of(model).attentions
    assert list(own) == ["blocks.0.attn", "blocks.2.attn"]
    assert all(one.calls == 1 and 1e-5 < one.error() < 1e-2 for one in own.values())
    words = fastdiff.summary(model)
    assert "int8 scores in 2 of 3 attentions" in words
    assert "blocks.0.attn: int8 scores, 4 heads of 16, error" in words
    x, t, y = inputs()
    model(x.requires_grad_(), t, y).sum().backward()  # in floats
    assert x.grad.abs().sum() > 0 and own["blocks.0.attn"].calls == 1
    fastdiff.restore(model)
    assert torch.equal(call(model), plain)
    with pytest.raises(ValueError, match="attention is 'fp8', need 'float' or 'int8'"):
        Precision(attention="fp8")


def test_scores_in_int8_beside_a_mask(model):
    """Merged tokens weigh as many as they are: a bias, with which scores are in floats."""
    merge = Merge(0.5)
    want = run(model, cache=merge)
    assert torch.equal(run(model, cache=[merge, Precision("float", attention="int8")]), want)
    merge = Merge(0.5, proportional=False)
    got = run(model, cache=[merge, Precision("float", attention="int8")])
    assert 0 < distance(got, run(model, cache=merge)) < 1e-2


def test_four_bits_are_worse_and_what_helps(model):
    """An outlier channel in the tokens: smoothing, rotation and a rank each win a factor."""
    with torch.no_grad():  # the MLP's inputs get one channel of a hundred times the others
        for block in model.blocks:
            block.mlp.fc1.bias[5] = 40.0
    plain = call(model)
    maxima = calibrate.activation_maxima(model, lambda: call(model))

    def error(policy):
        with fastdiff.accelerated(model, precision=policy, exact=False):
            return distance(call(model), plain)

    only = dict(layers=[("*.fc2", "int8")], format="float")
    base = error(Precision(**only))
    smooth = error(Precision(**only, smooth=0.5, maxima=maxima))
    rotated = error(Precision(**only, rotate=256))
    assert smooth < base / 2 and rotated < base / 2, (base, smooth, rotated)
    four = dict(layers=[("*.qkv", "int4")], format="float")
    grouped = error(Precision(**four, group=16))
    assert grouped < error(Precision(**four)) and error(Precision(**four, rank=24)) < grouped


def test_samples_do_not_know_each_other(model):
    fastdiff.accelerate(model, precision=Precision())
    x, t, y = inputs(3)
    together = call(model, x, t, y)
    for b in range(3):
        alone = call(model, x[b : b + 1], t[b : b + 1], y[b : b + 1])
        assert distance(together[b : b + 1], alone) < 2e-3
    order = torch.tensor([2, 0, 1])
    assert distance(call(model, x[order], t[order], y[order]), together[order]) < 1e-6


@pytest.mark.parametrize("make", networks.NETWORKS, ids=lambda f: f.__name__)
def test_networks_of_diffusers(make):
    model, args, kwargs = make()

    def ask():
        with torch.no_grad():
            return model(*args, **kwargs, return_dict=False)[0]

    plain = ask()
    fastdiff.accelerate(model, precision=Precision(least=256, attention="int8"))
    own = acceleration_of(model)
    changed = len(own.layers), len(own.attentions)
    got = ask()
    if any(changed):
        assert 0 < distance(got, plain) < 5e-2, changed
    assert all(one.calls for one in own.attentions.values())
    fastdiff.restore(model)
    assert torch.equal(ask(), plain)


@pytest.mark.parametrize(
    "cache",
    [Forecast(2), FirstBlock(0.2), RegionAdaptive(0.5, start=1), DeepCache(2)],
    ids=describe,
)
def test_with_caches_and_tokens(cache, model):
    plain, precision = run(model), Precision(attention="int8")
    one, other = run(model, cache=cache), run(model, cache=[cache, precision])
    assert 0 < distance(other, one) < 3e-2
    assert distance(other, plain) < distance(one, plain) + 3e-2
    again = run(model, cache=[precision, cache])
    assert torch.equal(again, other)
    assert torch.equal(run(model), plain)


def test_programs_know_the_steps_in_floats(model):
    policy = Precision(first=1, last=2, attention="int8")
    fastdiff.accelerate(model, cache=Forecast(2), precision=policy, exact=False)
    want = run(model)
    captured = fastdiff.programs(model)
    assert torch.equal(run(captured), want) and torch.equal(run(captured), want)
    assert captured.kinds >= 4 and all(report.ok for report in captured.check(2))
    fastdiff.restore(model)
    every = Precision(attention="int8")
    assert not torch.equal(want, run(model, cache=[Forecast(2), every]))
    first = run(model, steps=1, cache=Precision(first=1))
    assert torch.equal(first, run(model, steps=1))


def test_adapters_are_in_floats_beside_it(model):
    lora = adapters.LoRA(model, 4, slots=1)
    with torch.no_grad():
        for p in lora.parameters():
            p.normal_(0, 0.05)
    lora.choose([1, 1])
    plain = call(model)
    fastdiff.accelerate(model, precision=Precision(), exact=False)
    got = call(model)
    assert 0 < distance(got, plain) < 2e-2
    lora.choose([0, 0])
    assert distance(call(model), got) > 5e-2  # the adapter did count
    fastdiff.restore(model)
    lora.detach()


def test_weights_that_change_are_quantised_anew(model):
    fastdiff.accelerate(model, precision=Precision(), exact=False)
    before = call(model)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.mul_(-1)
    after = call(model)
    fastdiff.restore(model)
    assert distance(after, call(model)) < 2e-2 < distance(before, after)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        own = dit()
        plain = own(*inputs())
        fastdiff.accelerate(own, precision=Precision())
        assert 0 < distance(own(*inputs()), plain) < 2e-2
        fastdiff.restore(own)
        assert torch.equal(own(*inputs()), plain)


def test_an_error_in_a_step_leaves_nothing_behind(model):
    want = run(model, cache=Precision())
    fastdiff.accelerate(model, precision=Precision(), exact=False)
    calls = []

    def fail(*_):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("planted")

    hook = model.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        run(model)
    hook.remove()
    assert torch.equal(run(model), want) and torch.equal(run(model), want)
    fastdiff.restore(model)


def test_gradients_and_training_take_the_floats(model):
    x, t, y = inputs()
    x.requires_grad_()
    (want,) = torch.autograd.grad(model(x, t, y).sum(), x)
    fastdiff.accelerate(model, precision=Precision(), exact=False)
    (got,) = torch.autograd.grad(model(x, t, y).sum(), x)
    assert torch.equal(got, want)
    fastdiff.restore(model)


def test_particles_run_on_it(model):
    how = dict(
        classes=inputs()[2], steps=STEPS, seed=torch.arange(2), sampler=samplers.DDIM(eta=1.0)
    )
    reward = lambda x: x.flatten(1).mean(1)  # noqa: E731
    found = methods.fk_steering(model, inputs()[0], reward, cache=Precision(), **how)
    assert found.x.isfinite().all()


def test_bfloat16_model(model):
    model.to(torch.bfloat16)
    x, t, y = inputs()
    x = x.to(torch.bfloat16)
    plain = call(model, x, t, y)
    fastdiff.accelerate(model, precision=Precision())
    got = call(model, x, t, y)
    assert got.dtype == torch.bfloat16 and distance(got, plain) < 3e-2


def test_saved_loaded_and_released(model, tmp_path):
    path = tmp_path / "dit.safetensors"
    policy = Precision(group=16, layers=[("*.proj", "int4"), ("*.fc2", "bfloat16")])
    fastdiff.accelerate(model, precision=policy, exact=False)
    want = call(model)
    stored.save(model, path)
    weights = sum(
        m.weight.numel()
        for n, m in model.named_modules()
        if "blocks" in n and hasattr(m, "weight") and m.weight is not None
    )
    assert path.stat().st_size < 2 * weights
    fastdiff.restore(model)
    given = stored.load(path)
    assert given.policy == policy and given.layers["blocks.0.attn.proj"].format == "int4"
    fastdiff.accelerate(model, precision=given, exact=False)
    assert torch.equal(call(model), want)
    before = sum(p.numel() for p in model.parameters() if not p.is_meta)
    freed = stored.release(model)
    assert freed == 4 * (before - sum(p.numel() for p in model.parameters() if not p.is_meta)) > 0
    assert torch.equal(call(model), want) and stored.release(model) == 0
    with pytest.raises(RuntimeError, match="released, blocks.0"):
        fastdiff.restore(model)
    with pytest.raises(RuntimeError, match="has no float weights any more"):
        model(*inputs())  # gradients
    assert torch.equal(call(model), want)


def test_foreign_files_are_refused(model, tmp_path):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    fastdiff.accelerate(model, precision=Precision(), exact=False)
    stored.save(model, path)
    fastdiff.restore(model)
    (tmp_path / "text").write_text("not this")
    from safetensors.torch import load_file as tensors_of
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, other)
    for bad, words in (
        (tmp_path / "text", "is no safetensors file"),
        (tmp_path / "none", "is no safetensors file"),
        (other, "has format None"),
    ):
        with pytest.raises(ValueError, match=words):
            stored.load(bad)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = file.metadata()
    name = "blocks.1.attn.qkv"
    for change, words in (
        (lambda t: t.pop(f"{name}:scale"), f"layer {name} has \\['values'\\]"),
        (lambda t: t[f"{name}:scale"].neg_(), "a scale that is below 0"),
        (lambda t: t.update({f"{name}:scale": t[f"{name}:scale"][:-1].clone()}), "weight.scale is"),
        (lambda t: t.update({f"{name}:values": t[f"{name}:values"].short()}), "weight.values is"),
        (lambda t: t.update({f"{name}:more": torch.ones(1)}), "need"),
    ):
        tensors = tensors_of(path)
        change(tensors)
        save_file(tensors, other, meta)
        with pytest.raises(ValueError, match=words):
            stored.load(other)
    small = draw_weights(
        DiT(input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=4, num_classes=10)
    )
    plain = call(small)
    with pytest.raises(ValueError, match="what is given has int8"):
        fastdiff.accelerate(small, precision=stored.load(path))
    assert torch.equal(call(small), plain)
    assert json.loads(meta["policy"])["format"] == "int8"


def test_the_search_has_it_as_an_axis(model):
    every = target.candidates(model)
    assert Precision() in every and [Forecast(2, 1), Precision()] in every

    def once(one, steps):
        return run(model, seed=torch.arange(2) + one, steps=steps)

    report = fastdiff.accelerate(
        model, target=Quality(psnr=15), calibrate=[1, 2], run=once, steps=STEPS, rounds=1,
        candidates=[Precision(), [Forecast(2), Precision()]], fewer=[],
    )  # fmt: skip
    names = [row.name for row in report.rows]
    assert names == ["Precision()", "Forecast(interval=2) + Precision()"]
    assert all(row.psnr > 15 for row in report.rows)
    again = policy_from(json.loads(json.dumps(policy_dict([Forecast(2), Precision(first=1)]))))
    assert again == [Forecast(2), Precision(first=1)]
    fastdiff.restore(model)


def test_sensitive_layers_stay(model):
    errors = calibrate.layer_errors(model, lambda: run(model), Precision())
    assert len(errors) == 15 and list(errors.values()) == sorted(errors.values(), reverse=True)
    kept = calibrate.sensitive(errors, 0.2)
    assert len(kept) == 3 and {form for _, form in kept} == {"float"}
    plain = run(model)
    some = run(model, cache=Precision(layers=kept))
    assert 0 < distance(some, plain) < distance(run(model, cache=Precision()), plain)
    assert calibrate.sensitive(errors, 0) == () and len(calibrate.sensitive(errors, 1)) == 15


def test_as_text():
    assert parse("precision") == Precision() and parse("precision:int4,group=32") == Precision(
        "int4", group=32
    )


def test_bad_input(model):
    good = call(model)
    for bad, words in (
        (dict(format="int2"), "format is 'int2', need one of int8"),
        (dict(layers=[("*", "half")]), "format is 'half'"),
        (dict(layers=["*.fc1"]), "layers is"),
        (dict(first=-1), "first is -1"),
        (dict(rank=1.5), "rank is 1.5"),
        (dict(rotate=12), "rotate is 12, need a power of 2"),
        (dict(group=0), "group is 0"),
        (dict(smooth=0.5), "smooth needs maxima"),
        (dict(smooth=2, maxima=[("a", [1.0])]), "smooth is 2"),
        (dict(smooth=0.5, rotate=8, maxima=[("a", [1.0])]), "need one of them"),
    ):
        with pytest.raises(ValueError, match=words):
            Precision(**bad)
    short = [("blocks.0.attn.qkv", [1.0, 2.0])]
    for policy, words in (
        (Precision(layers=[("*.nothing", "int8")]), "no layer is called '\\*.nothing'"),
        (Precision(group=24), "layer blocks.0.attn.qkv: quantize_weight: group is 24"),
        (Precision(smooth=0.5, maxima=short), "maxima of blocks.0.attn.qkv has 2 values, need 64"),
        ("int8", "precision is 'int8', need a fastdiff.Precision"),
    ):
        with pytest.raises(ValueError, match=words):
            fastdiff.accelerate(model, precision=policy)
        assert torch.equal(call(model), good)
    with pytest.raises(ValueError, match="there are 2 policies of precision"):
        fastdiff.accelerate(model, cache=Precision(), precision=Precision())
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="layer blocks.1.mlp.fc1: quantize_weight: weight has a"):
        fastdiff.accelerate(model, precision=Precision())
    for who, words in (
        (lambda: stored.save(model, "x"), "no layer in another format"),
        (lambda: stored.release(model), "no layer in another format"),
        (lambda: calibrate.activation_maxima(model, lambda: None), "called no linear layer"),
        (lambda: calibrate.layer_errors(dit(), lambda: None, Precision()), "made no run"),
    ):
        with pytest.raises(ValueError, match=words):
            who()
    own = dit()
    fastdiff.accelerate(own, precision=Precision(first=1))
    with pytest.raises(ValueError, match="first 1 and last 0, steps in floats"):
        stored.release(own)
