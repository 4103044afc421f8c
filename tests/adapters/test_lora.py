"""Low-rank adapters: against their definition and PEFT's layers; slots, ids, files of others."""

import copy
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from fastdiff import adapters
from fastdiff.testing import draw_weights

LoRA = adapters.LoRA


def fill(adapter, seed=0, size=0.1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(size * torch.randn(p.shape, generator=g))
    return adapter


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the definition ----


@pytest.mark.parametrize("shape", [(6,), (3, 6), (3, 5, 6), (3, 2, 4, 6)])
def test_a_linear_layer(shape):
    layer = nn.Linear(6, 7)
    x = draw(*shape).requires_grad_()
    want = layer(x)
    lora = LoRA(nn.ModuleList([layer]), 3, alpha=6.0)
    assert torch.equal(layer(x), want)  # up starts at 0
    pair = fill(lora, size=1).pairs["0"]
    out = layer(x)
    torch.testing.assert_close(out, want + 2.0 * F.linear(F.linear(x, pair.down[0]), pair.up[0]))
    out.square().sum().backward()
    grads = [x.grad, pair.down.grad, pair.up.grad]
    x.grad = None
    again = [x, pair.down, pair.up]
    loss = layer.weight @ torch.eye(6) + 2.0 * pair.up[0] @ pair.down[0]
    F.linear(x, loss, layer.bias).square().sum().backward()
    for got, leaf in zip(grads[:1], again[:1], strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2), dict(kernel_size=1)],
    ids=str,
)
@pytest.mark.parametrize("ids", [None, [2, 0, 1]])
def test_a_convolution(how, ids):
    conv = nn.Conv2d(4, 6, **how)
    x = draw(3, 4, 9, 8)
    want = conv(x)
    lora = fill(LoRA(nn.ModuleList([conv]), 3, convolutions=True, slots=2, alpha=1.5), size=1)
    lora.choose(ids)
    pair, rows = lora.pairs["0"], []
    for b, i in enumerate(ids or [1] * 3):
        delta = (pair.up[i - 1] @ pair.down[i - 1]).view_as(conv.weight) * (0.5 if i else 0.0)
        rows.append(F.conv2d(x[b : b + 1], conv.weight + delta, conv.bias, **_call(how)))
    torch.testing.assert_close(conv(x), torch.cat(rows), rtol=1e-4, atol=1e-4)
    if ids:
        assert torch.equal(conv(x)[1], want[1])
    lora.choose([1])
    out = conv(x)
    lora.merge()
    torch.testing.assert_close(conv(x), out, rtol=1e-4, atol=1e-4)


def _call(how):
    return {k: v for k, v in how.items() if k != "kernel_size"}


@torch.no_grad()
def test_rank_0_and_scale_0_are_neutral_to_the_bit():
    network = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    x = draw(4, 6)
    want, was = network(x), copy.deepcopy(network.state_dict())
    lora = LoRA(network, 0)
    assert torch.equal(network(x), want)
    lora.merge()
    assert torch.equal(network(x), want)
    lora.detach()
    lora = fill(LoRA(network, 4))
    lora.scale.zero_()
    assert torch.equal(network(x), want)
    lora.merge()
    assert all(map(torch.equal, network.state_dict().values(), was.values()))


@torch.no_grad()
def test_every_sample_has_its_own():
    network = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    x = draw(4, 5, 6)
    lora = fill(LoRA(network, 3, slots=3))
    lora.scale.copy_(torch.tensor([1.0, 0.5, -2.0]))
    alone = []
    for i in range(4):
        lora.choose([i])
        alone.append(network(x))
    lora.choose(None)
    torch.testing.assert_close(network(x), alone[1])
    lora.choose([3, 0, 1, 2])
    got = network(x)
    for b, i in enumerate([3, 0, 1, 2]):
        torch.testing.assert_close(got[b], alone[i][b])
    place = lora.ids.data_ptr()
    lora.choose(torch.tensor([0, 2]))  # of each half of the batch, repeated
    got = network(x)
    for b, i in enumerate([0, 2, 0, 2]):
        torch.testing.assert_close(got[b], alone[i][b])
    assert lora.ids.data_ptr() != place
    place = lora.ids.data_ptr()
    lora.choose([1, 1])
    assert lora.ids.data_ptr() == place
    lora.choose([1, 2, 3])
    with pytest.raises(ValueError, match="a batch has 4 rows, need a multiple of the 3 ids"):
        network(x)
    for ids in ([4], [-1], [], [[1]], [0.5], [True]):
        with pytest.raises(ValueError, match="need whole numbers \\[B\\] of 0 to 3"):
            lora.choose(ids)


def test_one_slot_is_merged_with_its_scale():
    network = nn.Sequential(nn.Linear(6, 7))
    base = network[0].weight.detach().clone()
    lora = fill(LoRA(network, 3, slots=2))
    lora.scale[1] = 0.25
    lora.merge(1)
    pair = lora.pairs["0"]
    torch.testing.assert_close(network[0].weight, base + 0.25 * pair.up[1] @ pair.down[1])
    now = network[0].weight.detach().clone()
    with pytest.raises(ValueError, match="merged already"):
        lora.merge(0)
    other = LoRA(network, 1)  # adds 0: writes the weight again, with slot 1
    other.merge()
    assert torch.equal(network[0].weight, now)
    with pytest.raises(ValueError, match="slot is 2, need 0 to 1"):
        lora.merge(2)


def test_dropout_is_of_what_is_added_and_in_training_alone():
    network = nn.Sequential(nn.Linear(6, 500))
    x = draw(3, 6)
    base = network(x)
    lora = fill(LoRA(network, 3, dropout=0.5), size=1)
    lora.eval()
    full = network(x) - base
    lora.train()
    found = (network(x) - base) / full
    dropped = found.abs() < 1e-3
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(
        found[~dropped], torch.full_like(found[~dropped], 2.0), rtol=1e-2, atol=1e-2
    )  # noqa: E501


def test_errors_by_message():
    network = nn.Sequential(nn.Linear(6, 7), nn.Conv2d(4, 4, 3, groups=2))
    for how, text in (
        (dict(rank=-1), "rank is -1, need a whole number 0 to 256"),
        (dict(rank=257), "rank is 257"),
        (dict(rank=2.0), "rank is 2.0"),
        (dict(slots=0), "slots is 0, need a whole number 1 to"),
        (dict(dropout=1.0), "dropout is 1.0, need 0 to below 1"),
        (dict(convolutions=True), "layer 1 has groups 2 and padding zeros, need 1 and zeros"),
        (dict(targets="1"), "fits no Linear"),
    ):
        with pytest.raises(ValueError, match=f"lora: .*{text}"):
            LoRA(network, **how)
        assert not adapters.attached(network)


# ---- PEFT ----


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    t, y = torch.tensor([10, 900]), torch.tensor([3, 5])
    return draw_weights(model).eval(), draw(2, 4, 8, 8), dict(timestep=t, class_labels=y)


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    t = torch.tensor([10, 900])
    kwargs = dict(timestep=t, encoder_hidden_states=draw(2, 5, 24, seed=2))
    return draw_weights(model).eval(), draw(2, 4, 8, 8), kwargs


CASES = [(dit, ["to_q", "to_k", "to_v", "to_out.0"]), (unet, ["to_q", "to_v", "conv1", "proj_in"])]
both = pytest.mark.parametrize("make, targets", CASES, ids=["dit", "unet"])


def out(network, x, kwargs):
    return network(x, **kwargs, return_dict=False)[0]


def with_peft(make, targets, alpha=12):
    """A network of PEFT's layers with values everywhere."""
    peft = pytest.importorskip("peft")
    network, x, kwargs = make()
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets)
    wrapped = peft.get_peft_model(network, config)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return wrapped.eval(), x, kwargs


@both
def test_files_of_peft_give_its_outputs_and_gradients(make, targets, tmp_path):
    wrapped, x, kwargs = with_peft(make, targets)
    wrapped.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    network, _, _ = make()
    lora = LoRA.from_peft(network, path)  # its alpha is in the file of settings
    assert lora.scale.tolist() == [3.0]
    # In float64: of float32 the order of a convolution's sums is a rounding or two.
    wrapped, network, x = wrapped.double(), network.double(), x.double()
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    want, got = out(wrapped, x, kwargs), out(network, x, kwargs)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
    want.square().mean().backward()
    got.square().mean().backward()
    count = 0
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            layer, _, which = name.removeprefix("base_model.model.").partition(".lora_")
            pair = lora.pairs[layer.replace(".", "/")]
            grad = (pair.down if which[0] == "A" else pair.up).grad[0]
            bound = 1e-6 * max(p.grad.abs().max().item(), 1e-3)
            assert (grad.reshape(p.shape) - p.grad).abs().max() <= 10 * bound, name
            count += 1
    assert count == 2 * len(lora.places) > 8
    # And back: what we write is what PEFT loads.
    back = tmp_path / "ours.safetensors"
    lora.to_peft(back)
    from peft import set_peft_model_state_dict

    other = with_peft(make, targets, alpha=4)[0].double()  # alpha = rank: a scale of 1
    found = set_peft_model_state_dict(
        other, {f"base_model.model.{n}": t for n, t in load_file(back).items()}
    )
    assert not found.unexpected_keys
    torch.testing.assert_close(out(other, x, kwargs), want, rtol=1e-5, atol=1e-5)
    again = make()[0].double()
    LoRA.from_peft(again, back)
    torch.testing.assert_close(out(again, x, kwargs), want, rtol=1e-5, atol=1e-5)


@both
@torch.no_grad()
def test_beside_layers_of_peft(make, targets, tmp_path):
    """On a network that has them already, under the names of before, and the other way round."""
    wrapped, x, kwargs = with_peft(make, targets)
    plain, _, _ = make()
    ours = fill(LoRA(plain, 3, targets=targets, convolutions=True), 8)
    path = ours.save(tmp_path / "a.safetensors")
    network = wrapped.base_model.model
    before, was = out(network, x, kwargs), copy.deepcopy(network.state_dict())
    grads = [p.requires_grad for p in network.parameters()]
    lora = adapters.load(network, path)
    assert list(lora.places) == list(ours.places)
    got = out(network, x, kwargs)
    assert (got - before).abs().max() > 1e-3
    lora.merge()
    torch.testing.assert_close(out(network, x, kwargs), got, rtol=1e-4, atol=1e-4)
    lora.detach()
    assert torch.equal(out(network, x, kwargs), before)
    assert all(map(torch.equal, network.state_dict().values(), was.values()))
    assert [p.requires_grad for p in network.parameters()] == grads
    # PEFT after ours
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets), plain)
    state = {n: t for n, t in network.state_dict().items() if "lora_" in n}
    plain.load_state_dict(state, strict=False)
    torch.testing.assert_close(out(plain.eval(), x, kwargs), got, rtol=1e-5, atol=1e-5)
    ours.merge()
    torch.testing.assert_close(out(plain, x, kwargs), got, rtol=1e-4, atol=1e-4)
    ours.detach()
    torch.testing.assert_close(out(plain, x, kwargs), before, rtol=1e-5, atol=1e-5)


def test_put_takes_smaller_ranks_and_other_peoples_names(tmp_path):
    network = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    x = draw(4, 6)
    base = network(x).detach()
    down, up = draw(2, 6, seed=5), draw(7, 2, seed=6)
    lora = fill(LoRA(network, 4, slots=2))
    spellings = (
        ("0.lora_A.weight", "0.lora_B.weight"),
        ("unet.0.lora.down.weight", "unet.0.lora.up.weight"),
        ("base_model.model.0.lora_A.default.weight", "base_model.model.0.lora_B.default.weight"),
        ("transformer.0.lora_down.weight", "transformer.0.lora_up.weight"),
    )
    lora.choose([2])
    found = []
    for a, b in spellings:
        fill(lora, 9)
        lora.put(1, {a: down, b: up}, alpha=4)
        assert lora.scale.tolist() == [1.0, 2.0]
        found.append(network(x).detach())
    want = network[2](torch.tanh(network[0].weight.new_zeros(1) + _affine(network, x, down, up)))
    for got in found:
        assert torch.equal(got, found[0])
    lora.choose([0])
    torch.testing.assert_close(network(x), base)
    lora.detach()
    want = network[2](torch.tanh(_affine(network, x, down, up)))
    torch.testing.assert_close(found[0], want)


def _affine(network, x, down, up):
    weight = network[0].weight + 2.0 * up @ down
    return F.linear(x, weight, network[0].bias)


def test_what_put_refuses_changes_nothing(tmp_path):
    network = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    lora = fill(LoRA(network, 2, targets="0"))
    was = copy.deepcopy(lora.state_dict())
    down, up = torch.ones(2, 6), torch.ones(7, 2)
    bad = torch.full((7, 2), float("inf"))
    big = torch.full((7, 2), 60000.0, dtype=torch.float16)
    pair = {"0.lora_A.weight": down, "0.lora_B.weight": up}
    several = LoRA(nn.Sequential(nn.Linear(6, 7)), 2, slots=2).save(tmp_path / "s.safetensors")
    for source, text in (
        ({"0.lora_A.weight": down}, "tensor 0.lora_B.weight is missing"),
        ({**pair, "0.alpha": torch.ones(1)}, "tensor 0.alpha is not understood"),
        ({}, "tensor of an adapter is not understood"),
        ({**pair, "0.lora_B.weight": bad}, "a value is not finite"),
        ({"2.lora_A.weight": down, "2.lora_B.weight": up}, "layer 2 is none of this adapter's"),
        (
            {"0.lora_A.weight": torch.ones(3, 6), "0.lora_B.weight": torch.ones(7, 3)},
            "need \\[rank, 6\\] and \\[7, rank\\] with rank at most 2",
        ),
        ({"0.lora_A.weight": torch.ones(2, 5), "0.lora_B.weight": up}, "has \\[2, 5\\]"),
        (several, "it has several slots, need a file of one"),
    ):
        with pytest.raises(ValueError, match=text):
            lora.put(0, source)
        assert all(map(torch.equal, lora.state_dict().values(), was.values()))
    with pytest.raises(ValueError, match="slot is 1, need 0 to 0"):
        lora.put(1, pair)
    lora.put(0, {**pair, "0.lora_B.weight": big})  # finite, though its sum in float16 is not
    lora.merge()
    with pytest.raises(ValueError, match="it is merged, need unmerge"):
        lora.put(0, pair)
    with pytest.raises(ValueError, match="slot is 1, need 0 to 0"):
        lora.to_peft(tmp_path / "x", slot=1)
    other = nn.Sequential(nn.Linear(6, 7))
    with pytest.raises(ValueError, match="layer 5 is no linear layer or convolution"):
        LoRA.from_peft(other, {"5.lora_A.weight": down, "5.lora_B.weight": up})
    with pytest.raises(ValueError, match="has \\[2, 5\\]"):
        LoRA.from_peft(other, {"0.lora_A.weight": torch.ones(2, 5), "0.lora_B.weight": up})
    assert not adapters.attached(other)


def test_settings_beside_a_file_that_one_scale_does_not_tell(tmp_path):
    network = nn.Sequential(nn.Linear(6, 7))
    pair = {"0.lora_A.weight": torch.ones(2, 6), "0.lora_B.weight": torch.ones(7, 2)}
    path, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(pair, str(path))
    lora = LoRA(network, 2)
    lora.put(0, path)
    assert lora.scale.tolist() == [1.0]
    beside.write_text(json.dumps({"r": 2, "lora_alpha": 5, "use_rslora": False}))
    lora.put(0, path)
    assert lora.scale.tolist() == [2.5]
    lora.put(0, path, alpha=1)
    assert lora.scale.tolist() == [0.5]
    for facts, text in (
        ({"lora_alpha": 5, "use_rslora": True}, "have use_rslora True"),
        ({"lora_alpha": 5, "alpha_pattern": {"0": 3}}, "have alpha_pattern {'0': 3}"),
        ([], "its settings are not readable"),
    ):
        beside.write_text(json.dumps(facts))
        with pytest.raises(ValueError, match=text):
            lora.put(0, path)
    beside.unlink()
    facts = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}
    save_file(pair, str(path), metadata=facts)  # as diffusers writes it
    lora.put(0, path)
    assert lora.scale.tolist() == [3.0]
