"""Convolutions in few bits within U-Nets, ours and diffusers'."""

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdiff
from fastdiff import calibrate, stored, target
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import DeepCache, EncoderPropagation
from fastdiff.dispatch import record
from fastdiff.engine.quant_layers import convolutions_of
from fastdiff.models import UNet
from fastdiff.precision import Precision
from fastdiff.testing import draw_weights

SIZE, STEPS = (3, 16, 24), 5
ALL = Precision(convolutions="all", least=256)


@pytest.fixture
def model():
    return draw_weights(
        UNet(
            in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
            transformer_depth=(0, 1), heads=4, groups=8, cross_attention_dim=16, num_classes=5,
        )
    )  # fmt: skip


def inputs(batch=2):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(batch, *SIZE, generator=g)
    return x, torch.tensor([10.0, 900.0, 400.0][:batch]), torch.tensor([1, 2, 3][:batch])


def call(model, *args):
    with torch.no_grad():
        return model(*(args or inputs()))


def run(model, batch=2, **how):
    x, _, y = inputs(batch)
    settings = dict(classes=y, guidance=1.5, steps=STEPS, seed=torch.arange(batch) + 7)
    return fastdiff.sample(model, x, **{**settings, **how})


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def ran(rows, op):
    return sum(n for (name, _), n in rows.items() if name == op)


def convolutions(model, **how):
    return dict(convolutions_of(model, Precision(**how)))


def test_which_they_are(model):
    every = convolutions(model, convolutions="all")
    assert every.keys() == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    one = convolutions(model)
    assert one and all(m.kernel_size == (1, 1) for m in one.values()) and len(one) < len(every)
    assert not convolutions(model, convolutions="none")
    odd = nn.ModuleDict(
        dict(
            groups=nn.Conv2d(8, 8, 3, groups=2), dilated=nn.Conv2d(8, 8, 3, dilation=2),
            circular=nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
            long=nn.Conv2d(8, 8, (1, 3)), same=nn.Conv2d(8, 8, 3, padding="same"),
            good=nn.Conv2d(8, 8, 4, 4),
        )
    )  # fmt: skip
    assert convolutions(odd, convolutions="all").keys() == {"good"}


# Of a layer's output, relative L2; of the network's, sqrt(18) times it: so many follow each other.
@pytest.mark.parametrize(
    "policy, bound",
    [
        (ALL, 2e-2),
        (Precision(least=256), 2e-2),
        (Precision(convolutions="all", least=256, group=8), 2e-2),
        (Precision(convolutions="all", least=256, rotate=16, rank=4), 2e-2),
        (Precision("int4", convolutions="all", least=256, group=8), 0.15),
        (Precision("bfloat16", convolutions="all", least=256), 5e-3),
    ],
    ids=["int8", "pointwise", "groups", "rotated", "int4", "bfloat16"],
)
def test_errors_of_layers_and_networks(policy, bound, model):
    exact = call(model.double(), *(t.double() if t.is_floating_point() else t for t in inputs()))
    model.float()
    plain = call(model)
    fastdiff.accelerate(model, precision=policy, exact=False)
    with fastdiff.request():
        with record() as rows:
            got = call(model)
    assert distance(plain, exact) < 1e-5 < distance(got, exact) < 18**0.5 * bound
    layers = acceleration_of(model).layers
    assert all(0 < own.error() < bound for own in layers.values())
    large = [
        n for n, m in model.named_modules() if n in layers and getattr(m, "padding", 0) == (1, 1)
    ]
    assert bool(large) == (policy.convolutions == "all")
    # two calls of each of the layers: the error is of a part
    patches = 0 if policy.format == "bfloat16" else 2 * len(large)
    assert ran(rows, "quantize_patches") == patches
    words = fastdiff.summary(model)
    if large:
        assert f"{policy.format} 3x3 16 -> 16, error" in words
    assert "conv_in" not in layers and "conv_out" not in layers
    fastdiff.restore(model)
    assert torch.equal(call(model), plain)


def test_a_doubled_picture_is_read_where_it_is(model):
    """The upsampler's patches are of the small picture, and are those of the doubled one."""
    fastdiff.accelerate(model, precision=ALL, exact=False)
    own = acceleration_of(model).layers["up_blocks.0.upsamplers.0.conv"]
    x = torch.randn(2, 32, 4, 6)
    with torch.no_grad():
        got = own.convolve(x, True)
        want = own.convolve(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert got.shape == (2, 32, 8, 12) and torch.equal(got, want)


def test_a_gate_is_rounded_where_it_is_made(model):
    """Outside the call whose errors are looked at, and with the values that two passes give."""
    fastdiff.accelerate(model, precision=Precision(least=256), exact=False)
    block = model.mid_block.attentions[0].transformer_blocks[0].ff
    x = torch.randn(2, 6, 32)
    with torch.no_grad(), record() as rows:
        got = block(x)
        gate = F.gelu(block.net[0].proj(x).chunk(2, -1)[1])
        want = block.net[2](block.net[0].proj(x).chunk(2, -1)[0] * gate)
    assert not ran(rows, "geglu") and distance(got, want) < 2e-3


def test_with_caches_programs_and_steps_in_floats(model):
    plain = run(model)
    for cache in (DeepCache(2), EncoderPropagation(2)):
        one, other = run(model, cache=cache), run(model, cache=[cache, ALL])
        assert 0 < distance(other, one) < 8e-2
        assert torch.equal(run(model, cache=[ALL, cache]), other)
    assert torch.equal(run(model, cache=Precision(convolutions="all", first=STEPS)), plain)
    policy = Precision(convolutions="all", least=256, first=1, last=1)
    want = run(model, cache=policy)
    assert 0 < distance(want, plain) < distance(run(model, cache=ALL), plain)
    fastdiff.accelerate(model, cache=DeepCache(2), precision=policy)
    want = run(model)
    captured = fastdiff.programs(model)
    assert torch.equal(run(captured), want) and torch.equal(run(captured), want)
    assert all(report.ok for report in captured.check(2))
    fastdiff.restore(model)
    assert torch.equal(run(model), plain)


def test_samples_do_not_know_each_other(model):
    fastdiff.accelerate(model, precision=ALL)
    x, t, y = inputs(3)
    order = torch.tensor([2, 0, 1])
    together = call(model, x, t, y)
    assert distance(call(model, x[order], t[order], y[order]), together[order]) < 1e-6


def test_saved_loaded_and_released(model, tmp_path):
    path = tmp_path / "unet.safetensors"
    policy = Precision(convolutions="all", least=256, layers=[("*.conv2", "bfloat16")])
    fastdiff.accelerate(model, precision=policy, exact=False)
    want = call(model)
    stored.save(model, path)
    fastdiff.restore(model)
    fastdiff.accelerate(model, precision=stored.load(path), exact=False)
    assert torch.equal(call(model), want) and stored.release(model) > 0
    assert torch.equal(call(model), want)
    with pytest.raises(RuntimeError, match="has no float weights any more"):
        model(*inputs())


def test_weights_that_change_are_quantised_anew(model):
    fastdiff.accelerate(model, precision=ALL, exact=False)
    before = call(model)
    with torch.no_grad():
        model.mid_block.resnets[0].conv1.weight.mul_(2)
    after = call(model)
    assert distance(after, before) > 1e-3
    fastdiff.restore(model)
    assert distance(after, call(model)) < 8e-2


def test_somebody_who_listens_hears_it(model):
    heard = []
    conv = model.down_blocks[0].resnets[0].conv1
    conv.register_forward_hook(lambda m, args, out: heard.append(out.shape))
    plain = call(model)
    fastdiff.accelerate(model, precision=ALL)
    got = call(model)
    assert len(heard) == 2 and heard[0] == heard[1] and 0 < distance(got, plain) < 8e-2


def test_bfloat16_and_a_unet_of_diffusers():
    net = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        norm_num_groups=8, cross_attention_dim=16, use_linear_projection=False,
    )  # fmt: skip
    net = draw_weights(net).eval()
    for dtype, bound in ((torch.float32, 8e-2), (torch.bfloat16, 9e-2)):
        net.to(dtype)
        args = torch.randn(2, 4, 16, 24).to(dtype), 10, torch.randn(2, 7, 16).to(dtype)
        with torch.no_grad():
            plain = net(*args).sample
            fastdiff.accelerate(net, precision=ALL)
            with record() as rows:
                got = net(*args).sample
        names = acceleration_of(net).layers.keys()
        assert any(n.endswith("proj_in") for n in names)  # a convolution of one pixel
        assert ran(rows, "quantize_patches") == sum(
            n.endswith((".conv", ".conv1", ".conv2")) for n in names
        )
        assert got.dtype == dtype and 0 < distance(got, plain) < bound
        fastdiff.restore(net)
        with torch.no_grad():
            assert torch.equal(net(*args).sample, plain)


def test_what_does_not_pay_stays(model):
    """Every layer is timed both ways; what loses is named so that Precision takes it."""
    slow = calibrate.slower(model, lambda: run(model, steps=2), ALL)
    own = fastdiff.accelerate(model, precision=ALL)
    names = {layer.name for layer in acceleration_of(own).layers.values()}
    fastdiff.restore(model)
    assert {name for name, _ in slow} <= names and {form for _, form in slow} <= {"float"}
    policy = Precision(convolutions="all", least=256, layers=slow)
    fastdiff.accelerate(model, precision=policy)
    assert acceleration_of(model).layers.keys() == names - {name for name, _ in slow}
    fastdiff.restore(model)
    with pytest.raises(ValueError, match="slower: run made no run of target"):
        calibrate.slower(model, lambda: None, ALL)
    assert Precision(convolutions="all") in target.candidates(model)


def test_a_layer_is_timed_both_ways(model, monkeypatch):
    fastdiff.accelerate(model, precision=ALL)
    own = acceleration_of(model).layers["mid_block.resnets.0.conv1"]
    clock = iter([0, 9, 0, 9, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 2])  # the first round warms up
    monkeypatch.setattr("fastdiff.engine.quant_forward.time.perf_counter", lambda: next(clock))
    with torch.no_grad():
        assert own.both(torch.randn(2, 32, 4, 6)) == (1, 2)


def test_bad_input():
    with pytest.raises(
        ValueError, match="convolutions is 'some', need one of none, pointwise, all"
    ):
        Precision(convolutions="some")
