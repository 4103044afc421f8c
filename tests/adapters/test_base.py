"""The frame of adapters: on and off in any order, weights to the bit, files, errors by message."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastdiff import adapters
from fastdiff.adapters.base import Adapter, site


class Whole(Adapter):
    """Trains parameters of the network itself."""

    method = "whole"

    def __init__(self, network, names):
        super().__init__(network, names=names)
        self.trains = list(names)
        self.attach()


class Stuck(Adapter):
    """One that cannot be merged."""

    method = "stuck"

    def __init__(self, network):
        super().__init__(network)
        self.attach()

    def parts(self):
        raise ValueError("stuck: it depends on the input, need it at run time")


def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))
    made[2].bias.requires_grad_(False)
    return made


def fill(adapter, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return adapter


def state(network):
    return {n: t.clone() for n, t in network.state_dict().items()}


def same(network, was):
    now = network.state_dict()
    return now.keys() == was.keys() and all(torch.equal(now[n], t) for n, t in was.items())


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


# ---- on and off ----


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_merged_adapters_come_off_in_any_order_to_the_bit(order):
    network = net()
    was, out, addresses = state(network), network(X), [p.data_ptr() for p in network.parameters()]
    loras = [fill(adapters.LoRA(network, 2, targets=t), i) for i, t in enumerate((None, "0", None))]
    at_run_time = network(X)
    for lora in loras:
        lora.merge()
    torch.testing.assert_close(network(X), at_run_time, rtol=1e-5, atol=1e-5)
    merged = state(network)
    for i in order:
        loras[i].unmerge()
    assert same(network, was) and torch.equal(network(X), at_run_time)
    for i in order:  # merged in another order: the same weights
        loras[i].merge()
    assert same(network, merged)
    for i in order:
        loras[i].detach()  # unmerges
    assert same(network, was) and torch.equal(network(X), out)
    assert [p.data_ptr() for p in network.parameters()] == addresses
    assert not adapters.attached(network) and "_fastdiff_adapters" not in network.__dict__
    assert not any(m._forward_hooks for m in network.modules())


@torch.no_grad()
def test_what_is_left_merged_is_what_it_gives_alone():
    network = net()
    first, second = fill(adapters.LoRA(network, 2), 1), fill(adapters.LoRA(network, 3), 2)
    second.merge()
    alone = state(network)
    first.merge()
    assert not same(network, alone)
    first.unmerge()
    assert same(network, alone)


@torch.no_grad()
def test_merging_rounds_once():
    """bfloat16 weights: base and what is added are summed in float32, whoever else is merged."""
    network = net().bfloat16()
    base = network[0].weight.detach().clone()
    loras = [fill(adapters.LoRA(network, 2, targets="0"), i) for i in range(3)]
    for lora in loras:
        lora.merge()
    want = base.float() + sum(lora.pairs["0"].delta(0) for lora in loras)
    error = (network[0].weight.float() - want).abs()
    assert (error <= want.abs() * 2**-8 * 1.01).all()


def test_gradients_are_asked_for_by_what_is_trained_and_come_back_as_they_were():
    network = net()
    was = [p.requires_grad for p in network.parameters()]
    assert not all(was)
    lora = adapters.LoRA(network, 2)
    assert not any(p.requires_grad for p in network.parameters())
    assert all(p.requires_grad for p in lora.parameters()) and len(lora.trainable()) == 6
    whole = Whole(network, ["0.bias"])
    assert [n for n, p in network.named_parameters() if p.requires_grad] == ["0.bias"]
    lora.detach()
    assert [n for n, p in network.named_parameters() if p.requires_grad] == ["0.bias"]
    assert whole.trainable() == [network[0].bias]
    whole.detach()
    assert [p.requires_grad for p in network.parameters()] == was


@torch.no_grad()
def test_values_trained_in_the_network_leave_and_come_back():
    network = net()
    was = state(network)
    whole = Whole(network, ["0.bias", "4.weight"])
    network[0].bias.add_(1)
    network[4].weight.mul_(2)
    trained = state(network)
    whole.detach()
    assert same(network, was)
    assert torch.equal(whole.value("0.bias"), trained["0.bias"])
    whole.attach()
    assert same(network, trained)


def test_two_do_not_write_one_parameter():
    network = net()
    whole = Whole(network, ["0.weight"])
    with pytest.raises(ValueError, match=r"parameter 0.weight is written by another adapter"):
        Whole(network, ["0.bias", "0.weight"])
    lora = fill(adapters.LoRA(network, 2))
    was = state(network)
    with pytest.raises(ValueError, match=r"0.weight is written by another adapter, need that det"):
        lora.merge()
    assert same(network, was) and not lora.merged
    whole.detach()
    lora.merge()
    with pytest.raises(ValueError, match="detached or unmerged before"):
        whole.attach()
    assert adapters.attached(network) == [lora]
    lora.unmerge()
    whole.attach()
    assert adapters.attached(network) == [lora, whole]


def test_errors_of_on_and_off():
    network = net()
    lora = adapters.LoRA(network, 2)
    with pytest.raises(ValueError, match="lora: it is attached already, need detach"):
        lora.attach()
    with pytest.raises(ValueError, match="lora: it is not merged"):
        lora.unmerge()
    lora.merge()
    with pytest.raises(ValueError, match="lora: it is merged already, need it attached and not"):
        lora.merge()
    lora.detach()
    for act, text in (
        (lora.detach, "it is not attached"),
        (lora.merge, "it is not attached, need"),
    ):
        with pytest.raises(ValueError, match=text):
            act()
    stuck = Stuck(network)
    with pytest.raises(ValueError, match="stuck: it depends on the input"):
        stuck.merge()
    assert not stuck.merged
    with pytest.raises(ValueError, match="network is str, need an nn.Module"):
        adapters.LoRA("network")
    with pytest.raises(ValueError, match="has adapters attached, which a copy would share"):
        copy.deepcopy(network)
    stuck.detach()
    assert copy.deepcopy(network) is not None
    assert "not attached" in stuck.state()


def test_layers_by_name():
    network = net()
    assert list(adapters.select("x", network)) == ["0", "2", "4"]
    assert list(adapters.select("x", network, ["4", "0"])) == ["0", "4"]
    assert list(adapters.select("x", network, "^[24]$")) == ["2", "4"]
    nested = nn.ModuleDict(
        {"a": nn.ModuleDict({"to_q": nn.Linear(2, 2), "bto_q": nn.Linear(2, 2)})}
    )
    assert list(adapters.select("x", nested, ["to_q"])) == ["a.to_q"]
    for targets, text in (
        ("(", "targets is '\\(', "),
        ("9", "targets is '9', which fits no Linear of the network; its layers are 0, 2, 4"),
        (["0", "to_k"], "targets has 'to_k', which no layer's name ends in"),
        ([], "targets is \\[\\], which fits no Linear"),
    ):
        with pytest.raises(ValueError, match=f"x: {text}"):
            adapters.select("x", network, targets)


def test_an_adapter_that_nothing_calls_says_so():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return x @ self.layer.weight.T

    network = Reads()
    lora = fill(adapters.LoRA(network, 2))
    with pytest.raises(ValueError, match="a call of Reads has called none of the layers"):
        network(X)
    lora.merge()
    network(X)


def test_the_version_moves_with_every_change(tmp_path):
    network = net()
    lora = fill(adapters.LoRA(network, 2, slots=2))
    path = fill(adapters.LoRA(net(), 2)).save(tmp_path / "a.safetensors")
    own = lora.save(tmp_path / "b.safetensors")
    seen = {adapters.version(network)}
    for change in (
        lambda: lora.merge(1), lora.unmerge, lambda: lora.put(0, path), lambda: lora.load(own),
        lambda: lora.choose([1]), lambda: lora.choose([2]), lambda: lora.choose([1, 2]),
        lambda: lora.ids.fill_(0), lambda: lora.scale.fill_(2.0), lora.detach, lora.attach,
        lambda: fill(lora, 3), lambda: adapters.LoRA(network, 1),
    ):  # fmt: skip
        change()
        assert adapters.version(network) not in seen
        seen.add(adapters.version(network))


# ---- files ----


def test_a_file_gives_the_adapter_again(tmp_path):
    network = net()
    lora = fill(adapters.LoRA(network, 3, targets=["0", "4"], alpha=6.0, slots=2))
    lora.scale[1] = 0.5
    path = lora.save(tmp_path / "a.safetensors")
    want = network(X)
    assert not list(tmp_path.glob("*.tmp"))
    other = net()
    again = adapters.load(other, path)
    assert torch.equal(other(X), want) and again.settings == lora.settings
    assert torch.equal(again.scale, torch.tensor([2.0, 0.5]))
    half = lora.save(tmp_path / "h.safetensors", torch.bfloat16)
    assert load_file(half)["adapter.pairs.0.down"].dtype == torch.bfloat16
    again.load(half)
    torch.testing.assert_close(other(X), want, rtol=0.05, atol=0.05)


def test_the_file_of_what_is_trained_in_the_network(tmp_path):
    network = net()
    whole = Whole(network, ["0.bias"])
    with torch.no_grad():
        network[0].bias.fill_(3.0)
    path = whole.save(tmp_path / "a.safetensors")
    assert list(load_file(path)) == ["network.0.bias"]
    with torch.no_grad():
        network[0].bias.fill_(4.0)
    whole.load(path)
    assert (network[0].bias == 3).all()
    whole.detach()
    whole.load(path)  # off: into what it keeps
    assert (whole.value("0.bias") == 3).all() and not (network[0].bias == 3).any()


def damaged(tmp_path):
    lora = fill(adapters.LoRA(net(), 2))
    path = lora.save(tmp_path / "good.safetensors")
    tensors = load_file(path)
    facts = {
        "format": "fastdiff.adapter", "method": "lora", "settings": json.dumps(lora.settings),
    }  # fmt: skip

    def write(name, tensors, facts=facts):
        save_file(tensors, str(tmp_path / name), metadata=facts)
        return tmp_path / name

    key = "adapter.pairs.2.up"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-9])
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors at all")
    nan = tensors[key].clone()
    nan[0, 0, 0] = float("nan")
    without = {k: v for k, v in tensors.items() if k != key}
    return {
        cut: "not a readable safetensors file",
        text: "not a readable safetensors file",
        tmp_path / "none.safetensors": "not a readable safetensors file",
        write("f", {"x": torch.ones(1)}, {}): "no adapter of fastdiff; its tensors are x",
        write("n", {**tensors, key: nan}): f"tensor {key} has values that are not finite",
        write("m", without): f"tensor {key} is missing",
        write("u", {**tensors, "more": torch.ones(1)}): "tensor more is not part of this adapter",
        write(
            "s", {**tensors, key: torch.ones(1, 8, 3)}
        ): r"has shape \[1, 8, 3\], need \[1, 5, 2\]",
        write("o", tensors, {**facts, "method": "other"}): "its method is '?other",
    }


def test_files_that_do_not_fit_change_nothing(tmp_path):
    network = net()
    lora = fill(adapters.LoRA(network, 2), 5)
    want, bare = network(X), net()
    out = bare(X)
    for path, text in damaged(tmp_path).items():
        with pytest.raises(ValueError, match=text):
            lora.load(path)
        assert torch.equal(network(X), want)
        with pytest.raises(ValueError, match=text):
            adapters.load(bare, path)
        assert torch.equal(bare(X), out) and not adapters.attached(bare)
        assert not any(m._forward_hooks for m in bare.modules())
    with pytest.raises(ValueError, match="it does not fit this network: lora: targets"):
        path = adapters.LoRA(net(), 2, targets=["4"]).save(tmp_path / "t.safetensors")
        adapters.load(nn.Sequential(nn.Linear(2, 2)), path)
    good = tmp_path / "good.safetensors"
    lora.merge()
    with pytest.raises(ValueError, match="it is merged, need unmerge"):
        lora.load(good)


def test_a_site_is_of_one_network():
    first, second = net(), net()
    adapters.LoRA(first, 2)
    assert site(first) is not site(second) and not adapters.attached(second)
    assert adapters.version(second) == ()
