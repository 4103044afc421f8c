"""Taps: the same features from the whole call and from the one that stops, and no traces."""

import pytest
import torch
from torch import nn

from fastdiff.methods.taps import blocks_of, network_of, tapped
from fastdiff.models import DiT, UNet


def dit():
    torch.manual_seed(0)
    model = DiT(8, 2, 3, hidden_size=16, depth=4, num_heads=2, num_classes=3)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model


def unet():
    torch.manual_seed(0)
    model = UNet(
        3, 3, (8, 16), layers_per_block=1, transformer_depth=(0, 1), heads=2, groups=4,
        cross_attention_dim=8, num_classes=3, class_tokens=2,
    )  # fmt: skip
    return model


NETWORKS = {"dit": dit, "unet": unet}
TAPS = [
    ("dit", ["blocks.0"]),
    ("dit", ["blocks.2", "blocks.1"]),
    ("dit", ["blocks.1.attn.proj"]),
    ("unet", ["down_blocks.0"]),
    ("unet", ["mid_block", "up_blocks.0"]),
    ("unet", ["up_blocks.0.resnets.0"]),
    ("unet", ["up_blocks.1"]),
]


def inputs(batch=2):
    x = torch.randn(batch, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(900, 100, batch), torch.arange(batch) % 4


def hooks(network):
    return [
        (name, table)
        for name, m in network.named_modules()
        for table in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        if table
    ]


def gradient(model, taps, stop):
    x, t, y = inputs()
    x.requires_grad_()
    found = tapped(model, taps, lambda: model(x, t, y), stop=stop)
    assert list(found) == list(taps)
    value = sum((f.float().square() * (j + 1)).sum() for j, f in enumerate(found.values()))
    (g,) = torch.autograd.grad(value, x)
    return found, g


@pytest.mark.parametrize("kind, taps", TAPS)
def test_stopped_call_is_the_whole_one(kind, taps):
    model = NETWORKS[kind]()
    x, t, y = inputs()
    before = model(x, t, y)
    (whole, g), (stopped, h) = gradient(model, taps, False), gradient(model, taps, True)
    assert torch.equal(g, h) and g.abs().sum() > 0
    assert all(torch.equal(whole[name], stopped[name]) for name in taps)
    assert not hooks(model)
    assert torch.equal(model(x, t, y), before)


@pytest.mark.parametrize("kind, tap, later", [
    ("dit", "blocks.1", "blocks.2"), ("unet", "mid_block", "up_blocks.0"),
])  # fmt: skip
def test_blocks_after_the_last_tap_are_not_called(kind, tap, later):
    model, calls = NETWORKS[kind](), []
    handle = model.get_submodule(later).register_forward_hook(lambda *_: calls.append(1))
    x, t, y = inputs()
    tapped(model, [tap], lambda: model(x, t, y))
    assert not calls
    tapped(model, [tap], lambda: model(x, t, y), stop=False)
    assert calls == [1]
    assert len(hooks(model)) == 1  # that of this test
    handle.remove()


def test_tapped_block_is_what_comes_next():
    """The feature is what the next block gets: a hook there sees the same numbers."""
    model, seen = unet(), []
    model.up_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, t, y = inputs()
    found = tapped(model, ["mid_block"], lambda: model(x, t, y), stop=False)
    assert torch.equal(found["mid_block"], seen[0])


@pytest.mark.parametrize("stop", [True, False])
def test_exception_leaves_no_hooks(stop):
    model = dit()
    inputs_ = inputs()

    def broken(*_):
        raise RuntimeError("broken")

    handle = model.blocks[2].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        tapped(model, ["blocks.0", "blocks.3"], lambda: model(*inputs_), stop=stop)
    assert [name for name, _ in hooks(model)] == ["blocks.2"]
    handle.remove()

    def call():
        model(*inputs_)
        raise RuntimeError("after the call")

    with pytest.raises(RuntimeError, match="after the call"):
        tapped(model, ["blocks.0"], call, stop=False)
    assert not hooks(model)


def test_a_call_within_a_call():
    """Each ends its own."""
    model = dit()
    x, t, y = inputs()
    inner = []

    def once(module, args, output):
        if not inner:
            inner.append(None)
            inner[0] = tapped(model, ["blocks.1"], lambda: model(x + 1, t, y))

    handle = model.blocks[0].register_forward_hook(once)
    outer = tapped(model, ["blocks.3"], lambda: model(x, t, y))
    handle.remove()
    plain = tapped(model, ["blocks.3", "blocks.1"], lambda: model(x, t, y))
    assert torch.equal(outer["blocks.3"], plain["blocks.3"])
    assert inner[0]["blocks.1"].shape == plain["blocks.1"].shape
    assert not torch.equal(inner[0]["blocks.1"], plain["blocks.1"])


def test_block_that_is_not_called():
    model = dit()
    with pytest.raises(ValueError, match="block 'blocks.1' was not called"):
        tapped(model, ["blocks.1"], lambda: None)
    assert not hooks(model)


@pytest.mark.parametrize(
    "taps, words",
    [
        ([], "need a list of different names"),
        ("blocks.1", "taps is 'blocks.1', need a list"),
        (["blocks.1", "blocks.1"], "different names"),
        (["blocks.4"], "taps has 'blocks.4', need names of modules below"),
        ([""], "taps has ''"),
    ],
)
def test_bad_taps(taps, words):
    with pytest.raises(ValueError, match=words):
        blocks_of(dit(), taps)


def test_model_without_modules():
    with pytest.raises(ValueError, match="model is function, need an nn.Module"):
        network_of(lambda x, t, y: x)
