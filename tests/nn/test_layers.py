"""Layers that somebody listens to are called; all others run on our operations."""

import copy

import pytest
import torch
from torch import nn

from fastdiff import adapters, models
from fastdiff.models.baseline import plain
from fastdiff.nn import layers
from fastdiff.testing import draw_weights

X, T, Y = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0]), torch.tensor([1, 5])


def dit():
    return models.DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10)


def dit_moe():
    return models.DiTMoE(
        input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10, experts=4, qk_norm=True
    )


def unet(scale_shift=False):
    return models.UNet(
        4, 4, (16, 32), 1, (1, 1), 1, heads=2, groups=8, cross_attention_dim=24, num_classes=10,
        scale_shift=scale_shift,
    )  # fmt: skip


def unet_scale_shift():
    return unet(True)


def mode():
    return models.MoDE(5, 6, 3, width=32, depth=2, num_heads=2)


NETWORKS = [dit, dit_moe, unet, unet_scale_shift]
KINDS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


def inputs(network):
    if not isinstance(network, models.MoDE):
        return X, T, Y
    g = torch.Generator().manual_seed(1)
    shapes = (2, 10, 3), (2,), (2, 2, 5), (2, 1, 6)
    x, sigma, state, goal = (torch.randn(s, generator=g) for s in shapes)
    return x, sigma.exp(), state, goal


def drawn(make):
    return draw_weights(make()).eval()


def fill(adapter, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return adapter


@torch.no_grad()
@pytest.mark.parametrize("make", [*NETWORKS, mode])
def test_every_layer_is_called_where_somebody_listens(make):
    """Once a call, with values within rounding; and to the bit as before when they have left."""
    network = drawn(make)
    args = inputs(network)
    before, heard, handles = network(*args), [], []
    for name, module in network.named_modules():
        if isinstance(module, KINDS):
            handles.append(module.register_forward_hook(lambda *_, n=name: heard.append(n)))
    listened = network(*args)
    names = [n for n, m in network.named_modules() if isinstance(m, KINDS)]
    assert sorted(heard) == sorted(names)
    torch.testing.assert_close(listened, before, rtol=2e-5, atol=2e-5)
    for handle in handles:
        handle.remove()
    assert torch.equal(network(*args), before)


@torch.no_grad()
@pytest.mark.parametrize("make", [*NETWORKS, mode])
def test_what_a_hook_gives_goes_on(make):
    """For every layer alone: a hook that changes its output changes the network's."""
    network = drawn(make)
    args = inputs(network)
    before = network(*args)
    for name, module in network.named_modules():
        if isinstance(module, KINDS):
            handle = module.register_forward_hook(lambda m, a, out: out * 1.5 + 0.1)
            assert not torch.equal(network(*args), before), name
            handle.remove()
            early = module.register_forward_pre_hook(lambda m, a: (a[0] * 1.5 + 0.1 * a[0].sin(),))
            changed = not torch.equal(network(*args), before)
            assert changed or isinstance(module, nn.GroupNorm | nn.LayerNorm), name
            early.remove()


class Other(nn.Linear):
    """A class of its own: what it does is not known."""

    def forward(self, x):
        return super().forward(x) + 1


def test_a_class_of_its_own_and_a_forward_of_its_own_are_called():
    x, layer = torch.randn(3, 4), Other(4, 4)
    assert not layers.quiet(layer, nn.Linear)
    assert torch.equal(layers.linear(layer, x), layer(x))
    plain_layer = nn.Linear(4, 4)
    assert layers.quiet(plain_layer, nn.Linear)
    plain_layer.forward = lambda x: x + 1
    assert torch.equal(layers.linear(plain_layer, x), x + 1)
    backward = nn.Linear(4, 4)
    backward.register_full_backward_hook(lambda *_: None)
    assert not layers.quiet(backward, nn.Linear)


@torch.no_grad()
def test_activations_and_what_is_fused_beside_a_layer():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=g)
    pixels, add = torch.randn(2, 8, 6, 6, generator=g), torch.randn(2, 8, 12, 12, generator=g)
    bias = torch.randn(2, 8, generator=g)
    layer, conv, one = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
    group, norm = nn.GroupNorm(2, 8), nn.LayerNorm(8)
    cases = [
        *[(layer, lambda a=a: layers.linear(layer, x, a)) for a in (None, "silu", "gelu_tanh")],
        (layer, lambda: layers.geglu(layer, x)),
        (conv, lambda: layers.conv3x3(conv, pixels, bias, add=add, upsample=True)),
        (one, lambda: layers.pointwise(one, pixels)),
        (group, lambda: layers.group_norm(group, pixels, shift=bias, scale=bias)),
        (group, lambda: layers.group_norm(group, pixels, silu=False)),
        (norm, lambda: layers.layer_norm(norm, x)),
        (norm, lambda: layers.gate_norm(norm, x, 2 * x, bias)[1]),
    ]
    for module, call in cases:
        want = call()
        handle = module.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(call(), want, rtol=1e-5, atol=1e-5)
        handle.remove()


@pytest.mark.parametrize("make", NETWORKS)
def test_low_rank_adapters_are_those_of_the_plain_network(make):
    """Outputs and gradients, with adapters that differ from sample to sample."""
    ours = drawn(make)
    twin = plain(copy.deepcopy(ours))
    found = []
    for network in (ours, twin):
        lora = fill(adapters.LoRA(network, 4, convolutions=True, slots=2))
        lora.choose([2, 1])
        out = network(*inputs(network))
        out.square().mean().backward()
        grads = {n: p.grad for n, p in lora.named_parameters()}
        with torch.no_grad():
            found.append((out.detach(), network(*inputs(network)), grads))
    (trained, run, ours_grads), (want, want_run, grads) = found
    torch.testing.assert_close(trained, want, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(run, want_run, rtol=1e-4, atol=2e-5)
    assert ours_grads.keys() == grads.keys() and len(grads) > 10
    for name, grad in grads.items():
        bound = 1e-4 * grad.abs().max().item() + 1e-9
        assert ours_grads[name].shape == grad.shape
        assert (ours_grads[name] - grad).abs().max() <= bound, name


def test_low_rank_adapters_of_a_policy():
    """No plain twin: against the policy with its weights merged, and by finite differences."""
    network = drawn(mode).double()
    args = [a.double() for a in inputs(network)]
    lora = fill(adapters.LoRA(network, 2)).double()
    lora.scale = lora.scale.float()
    with torch.no_grad():
        run = network(*args)
        lora.merge()
        torch.testing.assert_close(network(*args), run, rtol=1e-6, atol=1e-6)
        lora.unmerge()
    loss = network(*args).square().mean()
    loss.backward()
    pair = lora.pairs["blocks/0/qkv"]
    step = torch.zeros_like(pair.up)
    step[0, 5, 1] = 1e-6
    with torch.no_grad():
        sides = []
        for sign in (1, -1):
            pair.up.add_(sign * step)
            sides.append(network(*args).square().mean())
            pair.up.sub_(sign * step)
    slope = (sides[0] - sides[1]) / 2e-6
    torch.testing.assert_close(pair.up.grad[0, 5, 1], slope, rtol=1e-4, atol=1e-9)


@torch.no_grad()
def test_a_merged_adapter_costs_nothing():
    """Its hooks are there but silent: weights are read, to the bit as without any."""
    network = drawn(dit)
    other = copy.deepcopy(network)
    lora = fill(adapters.LoRA(network, 4))
    lora.merge()
    other.load_state_dict(network.state_dict())
    assert layers.quiet(network.blocks[0].attn.qkv, nn.Linear)
    assert torch.equal(network(X, T, Y), other(X, T, Y))


@torch.no_grad()
def test_kept_experts_know_of_adapters_of_their_router():
    network = drawn(mode)
    x, _, state, goal = inputs(network)
    aside = adapters.LoRA(network, 2, targets="qkv$")
    kept = network.cache([1.5])
    want = network(x, 1.5, state, goal)
    assert torch.equal(network(x, 1.5, state, goal, cache=kept), want)
    fill(aside)
    assert torch.equal(
        network(x, 1.5, state, goal, cache=kept), network(x, 1.5, state, goal)
    )  # other layers' adapters do not matter
    lora = fill(adapters.LoRA(network, 2, targets="router"))
    for change in (lambda: None, lambda: lora.scale.mul_(2), lora.merge, lora.unmerge, lora.detach):
        change()
        with pytest.raises(ValueError, match="has changed since the cache"):
            network(x, 1.5, state, goal, cache=kept)
        kept = network.cache([1.5])
        torch.testing.assert_close(
            network(x, 1.5, state, goal, cache=kept), network(x, 1.5, state, goal)
        )
