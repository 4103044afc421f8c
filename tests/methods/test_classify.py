"""Features of a denoiser: taps against hooks, how much runs, and what is left of it."""

import math

import pytest
import torch
from torch import nn

from fastdiff import data, models
from fastdiff.accelerate import accelerated, request
from fastdiff.cache import FirstBlock
from fastdiff.methods.classify import (
    Probe,
    blocks_of,
    classify,
    features,
    linear_probe,
    tapped,
)
from fastdiff.ops.fused_step import Noise, philox_normal
from fastdiff.samplers import VP, Flow
from fastdiff.samplers.run import START_STREAM
from fastdiff.testing import draw_weights


def dit():
    torch.manual_seed(0)
    net = models.DiT(
        input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=3, num_heads=2,
        num_classes=4, learn_sigma=False,
    )  # fmt: skip
    draw_weights(net)
    return net.eval()


def unet():
    torch.manual_seed(0)
    net = models.UNet(**UNET)
    draw_weights(net)
    return net.eval()


UNET = dict(
    in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
    transformer_depth=(0, 1), cross_attention_dim=8, heads=2, groups=4, num_classes=4,
)  # fmt: skip
NETWORKS = {"dit": dit, "unet": unet}
X = torch.randn(3, 1, 8, 16, generator=torch.Generator().manual_seed(1))
T = torch.tensor([50.0, 90.0, 500.0])
Y = torch.tensor([0, 4, 2])


def by_hooks(net, *args):
    """Outputs of all blocks in one whole call, in the order in which they came."""
    found, hooks = [], []
    for block in blocks_of(net):
        hooks.append(block.register_forward_hook(lambda m, a, out: found.append((m, out))))
    with torch.no_grad():
        net(*args)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_in_their_order(name):
    net = NETWORKS[name]()
    found = by_hooks(net, X, T, Y)
    assert [m for m, _ in found] == blocks_of(net)
    assert len(found) == {"dit": 3, "unet": 2 + 2 + 4}[name]


def test_block_of_a_unet_ends_after_its_attention():
    net = unet()
    down, mid, up = net.down_blocks, net.mid_block, net.up_blocks
    want = [down[0].resnets[0], down[1].attentions[0], mid.attentions[0], mid.resnets[1]]
    want += [*up[0].attentions, *up[1].resnets]
    assert blocks_of(net) == want


@pytest.mark.parametrize("name", NETWORKS)
def test_tap_is_the_hook_bit_for_bit_and_b_blocks_run(name):
    net = NETWORKS[name]()
    want = by_hooks(net, X, T, Y)
    ran = []
    for block in blocks_of(net):
        block.register_forward_pre_hook(lambda m, a: ran.append(m))
    with torch.no_grad():
        for b, (_, out) in enumerate(want, 1):
            ran.clear()
            (found,) = tapped(net, [b], X, T, Y)
            assert torch.equal(found, out) and len(ran) == b
        ran.clear()
        several = tapped(net, [3, 1], X, T, Y)
        assert len(ran) == 3
        assert torch.equal(several[0], want[2][1]) and torch.equal(several[1], want[0][1])
        ran.clear()
        whole = tapped(net, [1], X, T, Y, stop=False)
        assert len(ran) == len(want) and torch.equal(whole[0], want[0][1])


@pytest.mark.parametrize("noise", [True, False])
def test_what_the_network_sees(noise):
    net, seen = dit(), []
    net.register_forward_pre_hook(lambda m, args: seen.append(args))
    features(net, X, block=1, t=T, noise=noise, seed=5)
    x, t, y = seen[0]
    assert torch.equal(t, T) and (y == 4).all()
    if not noise:
        assert torch.equal(x, X)
        return
    alpha, sigma, _ = VP().at_timesteps(T.double())
    eps = philox_normal(X.shape, *Noise(5, None, 0, START_STREAM))
    want = alpha[:3].view(3, 1, 1, 1) * X + sigma[:3].view(3, 1, 1, 1) * eps
    assert torch.allclose(x, want.float(), atol=1e-6)
    features(net, X, block=1, t=250.0, seed=5, schedule=Flow())
    assert torch.allclose(seen[1][0], 0.75 * X + 0.25 * eps, atol=1e-6)
    features(net, X, block=1, t=0.0, seed=5, schedule=Flow())  # no noise at all
    assert torch.equal(seen[2][0], X)


def test_pooling():
    net = unet()
    full = features(net, X, block=2, pool=None)
    assert full.dim() == 4
    assert torch.allclose(features(net, X, block=2), full.mean((2, 3)), atol=1e-6)
    two = features(net, X, block=2, pool=2)
    assert two.shape == (3, full.shape[1] * 4)
    corner = full[:, :, : full.shape[2] // 2, : full.shape[3] // 2].mean((2, 3))
    assert torch.allclose(two.view(3, -1, 4)[..., 0], corner, atol=1e-6)
    tokens = features(dit(), X, block=2, pool=None)
    assert torch.allclose(features(dit(), X, block=2), tokens.mean(1), atol=1e-6)
    with pytest.raises(ValueError, match="pool is 2 of tokens"):
        features(dit(), X, block=2, pool=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_of_images_is_each_alone(name):
    net, seeds = NETWORKS[name](), torch.tensor([3, 4, 5])
    whole = features(net, X, block=2, t=T, seed=seeds)
    for b in range(3):
        part = slice(b, b + 1)
        alone = features(net, X[part], block=2, t=T[part], seed=seeds[part])
        assert (whole[part] - alone).abs().max() < 1e-5
    order = torch.tensor([2, 0, 1])
    other = features(net, X[order], block=2, t=T[order], seed=seeds[order])
    assert (whole[order] - other).abs().max() < 1e-5


def state(net):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    return hooks, [m.training for m in net.modules()], {k: v.clone() for k, v in
                                                        net.state_dict().items()}  # fmt: skip


def same(a, b):
    return a[:2] == b[:2] and all(torch.equal(v, b[2][k]) for k, v in a[2].items())


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_afterwards_what_it_was(name):
    net = NETWORKS[name]().train()
    blocks_of(net)[1].eval()  # modes may be mixed
    before, x = state(net), X.clone()
    with torch.no_grad():
        out = net(X, T, Y)
        features(net, X, block=2)
        assert same(before, state(net)) and torch.equal(X, x)
        assert torch.equal(net(X, T, Y), out)


def test_network_that_raises_is_what_it_was():
    net = dit().train()

    def broken(module, args):
        raise RuntimeError("no block today")

    hook = net.blocks[1].register_forward_pre_hook(broken)
    before = state(net)
    with pytest.raises(RuntimeError, match="no block today"):
        features(net, X, block=3)
    assert same(before, state(net))
    hook.remove()
    assert features(net, X, block=3).isfinite().all()
    features(net, X, block=1)


def test_within_a_request_caches_are_off():
    net = dit()
    want = features(net, X, block=2)
    with accelerated(net, cache=FirstBlock(1e9), exact=False), request(2):
        for _ in range(2):
            assert torch.equal(features(net, X, block=2), want)


def test_hook_that_is_left_would_be_seen():
    net = dit()
    before = state(net)
    net.blocks[0].register_forward_hook(lambda m, a, out: None)
    assert not same(before, state(net))


def test_blocks_by_name():
    net = dit()
    assert torch.equal(features(net, X, block="blocks.1"), features(net, X, block=2))
    assert features(net, X, block="t_embedder.mlp.0", pool=None).shape == (3, 16)
    with pytest.raises(ValueError, match="block 'y_embedder' did not run"):
        features(net, X, block="y_embedder")


def clouds(count, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=g)
    centre = torch.tensor([[2.0, 0, 0, 5], [0, 2.0, 0, 5], [0, 0, 2.0, 5]])
    f = centre[labels] + torch.randn(count, 4, generator=g) * torch.tensor([0.4, 0.4, 0.4, 0.0])
    return f, labels


def test_probe_learns_and_its_gradient_is_zero():
    f, labels = clouds(300, 0)  # one feature never changes
    probe = linear_probe(f, labels, 3, decay=1e-2)
    other, truth = clouds(300, 1)
    assert (probe.logits(other).argmax(1) == truth).double().mean() > 0.97
    z = ((f - probe.mean) / probe.std).double()
    weight, bias = probe.weight.double().requires_grad_(), probe.bias.double().requires_grad_()
    loss = nn.functional.cross_entropy(z @ weight.T + bias, labels)
    (loss + 0.5e-2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-5 and bias.grad.abs().max() < 1e-5
    again = linear_probe(f, labels, 3, decay=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(probe, again, strict=True))


def test_classify():
    net = unet()
    f = features(net, X, block=3)
    probe = Probe(torch.randn(4, f.shape[1]), torch.randn(4), f.mean(0), f.std(0))
    assert torch.equal(classify(net, X, probe, block=3), probe.logits(f))


@pytest.mark.slow
def test_features_tell_digits_apart_better_than_pixels_do():
    """A probe on 240 digits: 0.77 of 125 others right from pixels, 0.88 from the fourth block."""
    net, found = models.load("unet-digits")[0], data.digits()
    x, y = found.x[::16][:240], found.y[::16][:240]
    held_x, held_y = found.held_x[::4], found.held_y[::4]
    pixels = linear_probe(x.flatten(1), y, 10, decay=1e-2).logits(held_x.flatten(1))
    settings = dict(block=4, t=50.0, pool=2)
    probe = linear_probe(features(net, x, **settings), y, 10, decay=1e-2)
    share = (classify(net, held_x, probe, **settings).argmax(1) == held_y).double().mean()
    assert share > (pixels.argmax(1) == held_y).double().mean() + 0.05


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(block=0), "block is 0, need 1 to 3"),
        (dict(block=4), "block is 4, need 1 to 3"),
        (dict(block="nothing"), "block is 'nothing'"),
        (dict(t=1001.0), "t is 1001.0, need 0 to 1000"),
        (dict(t=torch.zeros(2)), r"t is .* one or \[3\]"),
        (dict(pool=0), "pool is 0"),
        (dict(x=torch.zeros(3)), r"x is torch.float32 \[3\]"),
        (dict(model=nn.Linear(2, 2)), "Linear has no list of blocks"),
    ],
)
def test_bad_input(change, words):
    args = dict(model=dit(), x=X, block=1) | change
    with pytest.raises(ValueError, match=words):
        features(**args)


@pytest.mark.parametrize(
    "f, labels, words",
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), r"f is \[3\]"),
        (torch.zeros(3, 2), torch.zeros(3), "labels torch.float32"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "labels are not 0 to 1"),
        (torch.full((3, 2), math.nan), torch.tensor([0, 1, 1]), "not finite"),
    ],
)
def test_bad_input_of_the_probe(f, labels, words):
    with pytest.raises(ValueError, match=words):
        linear_probe(f, labels, 2)
