"""Several networks as one: every identity of Adaptive Feature Aggregation, on every network."""

import copy

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import models
from fastdiff.adapters import LoRA
from fastdiff.adapters.afa import SABW, Ensemble, places
from fastdiff.models.baseline import plain
from fastdiff.testing import draw_weights

diffusers = pytest.importorskip("diffusers")


def unet():
    net = models.UNet(
        in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
        transformer_depth=(0, 1), heads=2, groups=8, cross_attention_dim=16,
    )  # fmt: skip
    given = dict(x=torch.randn(2, 3, 8, 8), t=torch.tensor([10.0, 700.0]))
    return net, given | dict(context=torch.randn(2, 5, 16))


def classes():
    net = models.UNet(
        in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=2,
        transformer_depth=(1, 0), heads=2, groups=8, cross_attention_dim=16, num_classes=4,
        scale_shift=True,
    )  # fmt: skip
    return net, dict(x=torch.randn(2, 3, 8, 8), t=torch.rand(2), y=torch.tensor([1, 4]))


def dit():
    net = models.DiT(
        input_size=8, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=4
    )
    return net, dict(x=torch.randn(2, 3, 8, 8), t=torch.rand(2), y=torch.tensor([1, 4]))


def dit_moe():
    net = models.DiTMoE(
        input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=4,
        experts=4,
    )  # fmt: skip
    return net, dict(x=torch.randn(2, 3, 8, 8), t=torch.rand(2), y=torch.tensor([1, 4]))


def plain_unet():
    net, given = unet()
    return plain(net), given


def plain_dit():
    net, given = dit()
    return plain(net), given


def diffusers_dit():
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    given = dict(timestep=torch.tensor([10, 900]), class_labels=torch.tensor([3, 5]))
    return net, dict(hidden_states=torch.randn(2, 4, 8, 8), return_dict=False) | given


def diffusers_unet():
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64),
        layers_per_block=2, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    return net, dict(sample=torch.randn(2, 3, 8, 8), timestep=17)


def diffusers_conditional():
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    given = dict(timestep=torch.tensor(300), encoder_hidden_states=torch.randn(2, 5, 16))
    return net, dict(sample=torch.randn(2, 4, 8, 8)) | given


NETWORKS = (
    unet, classes, dit, dit_moe, plain_unet, plain_dit, diffusers_dit, diffusers_unet,
    diffusers_conditional,
)  # fmt: skip


def several(make, count, equal=False):
    """``count`` networks with weights of their own, and what they are called with."""
    net, given = make()
    draw_weights(net)
    found = [net]
    for seed in range(1, count):
        other = copy.deepcopy(net)
        if not equal:
            torch.manual_seed(seed)
            with torch.no_grad():
                for p in other.parameters():
                    if p.requires_grad:
                        p.add_(0.05 * torch.randn_like(p))
        found.append(other.eval())
    return found, given


def tensor(out):
    if isinstance(out, torch.Tensor):
        return out
    return out[0] if isinstance(out, tuple) else out.sample


def rows(given, keep):
    batch = next(iter(given.values())).shape[0]
    return {
        k: v[keep] if isinstance(v, torch.Tensor) and v.dim() and v.shape[0] == batch else v
        for k, v in given.items()
    }


class Fixed(nn.Module):
    """Logits that depend on the model alone."""

    def __init__(self, *logits):
        super().__init__()
        self.logits, self.seen = torch.tensor(logits), []

    def condition(self, t, context):
        return None

    def forward(self, place, features, condition):
        self.seen.append((place, features.detach()))
        K, B, _, *rest = features.shape
        return self.logits.view(K, *[1] * (features.dim() - 1)).expand(K, B, 1, *rest)


def close(got, want):
    torch.testing.assert_close(tensor(got), tensor(want), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_one_network_is_itself(make):
    (net,), given = several(make, 1)
    want = tensor(net(**given))
    assert torch.equal(tensor(Ensemble([net])(**given)), want)


@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_equal_networks_give_what_one_does(make):
    nets, given = several(make, 3, equal=True)
    ensemble = Ensemble(nets)
    for p in ensemble.parameters():
        p.add_(0.3 * torch.randn_like(p))
    close(ensemble(**given), nets[0](**given))


@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_one_hot_maps_give_that_network(make):
    nets, given = several(make, 3)
    wants = [net(**given) for net in nets]
    assert not torch.allclose(tensor(wants[0]), tensor(wants[1]), atol=1e-3)
    inf = torch.inf
    for k, want in enumerate(wants):
        for low in (-inf, 0.0):
            logits = [inf if j == k else low for j in range(3)]
            close(Ensemble(nets, Fixed(*logits))(**given), want)


@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_permuted_networks_with_their_maps(make):
    nets, given = several(make, 3)
    logits = (0.3, -0.7, 1.1)
    want = Ensemble(nets, Fixed(*logits))(**given)
    for order in ((2, 0, 1), (1, 0, 2)):
        moved = Ensemble([nets[i] for i in order], Fixed(*(logits[i] for i in order)))
        close(moved(**given), want)
    assert not torch.allclose(tensor(want), tensor(nets[0](**given)), atol=1e-3)


@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_new_maps_are_equal_and_sum_to_one(make):
    nets, given = several(make, 3)
    ensemble, equal = Ensemble(nets), Fixed(0.0, 0.0, 0.0)
    close(ensemble(**given), Ensemble(nets, equal)(**given))
    condition = ensemble.aggregator.condition(torch.rand(2), None)
    for p in ensemble.parameters():
        p.add_(torch.randn_like(p))
    assert [place for place, _ in equal.seen] == list(range(len(places(nets[0]))))
    for place, features in equal.seen:
        assert features.shape[:2] == (3, 2)
        maps = ensemble.aggregator(place, features, condition).softmax(0)
        assert maps.shape == (3, 2, 1, *features.shape[3:])
        torch.testing.assert_close(maps.sum(0), torch.ones_like(maps[0]))
        assert maps.std() > 1e-3


@torch.no_grad()
def test_equal_maps_are_the_mean_after_every_block():
    """Of diffusers' transformer, by hand."""
    nets, given = several(diffusers_dit, 3)
    hidden = [net.pos_embed(given["hidden_states"]) for net in nets]
    how = dict(timestep=given["timestep"], class_labels=given["class_labels"])
    for i in range(3):
        outs = [n.transformer_blocks[i](h, **how) for n, h in zip(nets, hidden, strict=True)]
        hidden = [torch.stack(outs).mean(0)] * 3
    seen = Fixed(0.0, 0.0, 0.0)
    got = Ensemble(nets, seen)(**given)
    torch.testing.assert_close(seen.seen[2][1].movedim(2, -1).mean(0), hidden[0])
    torch.testing.assert_close(got[0], seen.seen[3][1].mean(0))


@torch.no_grad()
def test_skips_are_shared():
    """What a stage of the way up gets is the mean of what the stages on the way down gave."""
    nets, given = several(unet, 2)
    taken, given_down = [], []
    for net in nets:
        net.up_blocks[0].register_forward_pre_hook(lambda m, args: taken.append(args))
        net.down_blocks[1].register_forward_hook(lambda m, args, out: given_down.append(out))
    Ensemble(nets, Fixed(0.0, 0.0))(**given)
    (_, first, *_), (_, second, *_) = taken
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(first[-1], (given_down[0][0] + given_down[1][0]) / 2)


@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_a_row_of_a_batch_is_that_row_alone(make):
    """So branches of guidance, side by side, are combined apart."""
    nets, given = several(make, 2)
    ensemble = Ensemble([net.double() for net in nets])
    for p in ensemble.double().parameters():
        p.add_(0.5 * torch.randn_like(p))
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            given[name] = value.double()
    both = tensor(ensemble(**given))
    assert both.dtype == torch.float64
    for b in range(2):
        alone = tensor(ensemble(**rows(given, slice(b, b + 1))))
        torch.testing.assert_close(alone[0], both[b], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", NETWORKS)
def test_gradients_reach_the_aggregator_alone(make):
    nets, given = several(make, 2)
    flags = [[p.requires_grad for p in net.parameters()] for net in nets]
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    ensemble = Ensemble(nets)
    out = tensor(ensemble(**given))
    out.square().sum().backward()
    assert ensemble.trainable() == list(ensemble.parameters())
    named = dict(ensemble.named_parameters())
    assert all(n.startswith("aggregator.") for n in named)
    # new maps are equal: their last layers see the first gradients
    assert all(named[n].grad.abs().sum() > 0 for n in named if ".leave." in n)
    with torch.no_grad():
        for p in named.values():
            p.add_(0.1 * torch.randn_like(p))
    tensor(ensemble(**given)).square().sum().backward()
    silent = [n for n, p in named.items() if p.grad is None or not p.grad.abs().sum()]
    if "context" not in given and "encoder_hidden_states" not in given:
        silent = [n for n in silent if ".context." not in n]
    if "dit" in make.__name__:  # 3 x 3 positions of pictures alone, as the prediction is
        silent = [n for n in silent if ".look." not in n]
    assert not silent
    for net, was in zip(nets, before, strict=True):
        assert all(p.grad is None and not p.requires_grad for p in net.parameters())
        assert all(torch.equal(t, was[n]) for n, t in net.state_dict().items())
    ensemble.detach()
    for net, flag in zip(nets, flags, strict=True):
        assert [p.requires_grad for p in net.parameters()] == flag
        assert "_fastdiff_adapters" not in net.__dict__


@pytest.mark.parametrize("make", (unet, diffusers_conditional))
def test_training_pays(make):
    """Towards the second network's predictions."""
    nets, given = several(make, 2)
    with torch.no_grad():
        want = tensor(nets[1](**given))
    ensemble = Ensemble(nets, hidden=16)
    optimiser, losses = torch.optim.Adam(ensemble.trainable(), 0.02), []
    for _ in range(25):
        optimiser.zero_grad()
        loss = (tensor(ensemble(**given)) - want).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("make", (dit, diffusers_unet))
@torch.no_grad()
def test_its_file(make, tmp_path):
    nets, given = several(make, 2)
    ensemble = Ensemble(nets, hidden=8)
    for p in ensemble.parameters():
        p.add_(0.5 * torch.randn_like(p))
    want = tensor(ensemble(**given))
    path = ensemble.save(tmp_path / "maps.safetensors")
    ensemble.detach()
    fresh = Ensemble(nets, hidden=8)
    assert not torch.equal(tensor(fresh(**given)), want)
    fresh.load(path)
    assert torch.equal(tensor(fresh(**given)), want)
    with pytest.raises(ValueError, match="has shape"):
        Ensemble(several(make, 2)[0], hidden=16).load(path)


@torch.no_grad()
def test_adapters_of_the_networks_act_and_the_networks_stay():
    """A hook on a layer of one network, the first too, is heard, once a call, for its own rows."""
    nets, given = several(diffusers_dit, 2)
    wants = [tensor(net(**given)) for net in nets]
    ensemble = Ensemble(nets, Fixed(0.0, -torch.inf))
    calls = []
    for net in nets:
        layer = net.transformer_blocks[1].ff.net[2]
        layer.register_forward_hook(lambda m, args, out: calls.append(len(out)) or 2 * out)
    doubled = tensor(nets[0](**given))
    calls.clear()
    close(ensemble(**given), (doubled,))
    assert calls == [2, 2] and not torch.allclose(doubled, wants[0], atol=1e-4)
    for net in nets:
        net.transformer_blocks[1].ff.net[2]._forward_hooks.clear()
    for net, want in zip(nets, wants, strict=True):
        assert torch.equal(tensor(net(**given)), want)


@torch.no_grad()
@pytest.mark.parametrize("before", (True, False))
def test_low_rank_adapters_of_the_networks(before):
    """Each network's own, on layers of diffusers; in ours a merged one, else it is refused."""
    for make in (diffusers_dit, plain_dit):
        nets, given = several(make, 2)
        ensemble = None if before else Ensemble(nets, Fixed(-torch.inf, 0.0))
        bare = tensor(nets[1](**given))
        loras = [LoRA(net, 2, targets=r"ff\.net|mlp") for net in nets]
        for lora in loras:
            for p in lora.parameters():
                p.copy_(0.5 * torch.randn_like(p))
        want = tensor(nets[1](**given))
        assert not torch.allclose(want, bare, atol=1e-3)
        ensemble = ensemble or Ensemble(nets, Fixed(-torch.inf, 0.0))
        if make is plain_dit:
            with pytest.raises(ValueError, match=r"models\[0\] has adapter lora at run time, need"):
                ensemble(**given)
            for lora in loras:
                lora.merge()
        close(ensemble(**given), (want,))
        for lora in loras:
            lora.detach()
        close(ensemble(**given), (bare,))


@torch.no_grad()
def test_the_op_that_combines():
    nets, given = several(dit, 2)
    with fastdiff.dispatch.record() as ran:
        Ensemble(nets)(**given)
    assert ran["aggregate_features", "native"] == 4


def test_errors():
    nets, given = several(dit, 2)
    other = models.DiT(
        input_size=8, in_channels=3, hidden_size=64, depth=3, num_heads=2, num_classes=4
    )
    with pytest.raises(ValueError, match=r"models is \[\], need at least one"):
        Ensemble([])
    with pytest.raises(ValueError, match="models names one network twice"):
        Ensemble([nets[0], nets[0]])
    with pytest.raises(ValueError, match=r"models\[1\] has .* of shape .*, need"):
        Ensemble([nets[0], other])
    with pytest.raises(ValueError, match=r"models\[1\] is UNet, need DiT"):
        Ensemble([nets[0], unet()[0]])
    with pytest.raises(ValueError, match="blocks is .* need None for our networks"):
        Ensemble(nets, blocks=["blocks.0"])
    theirs, _ = several(diffusers_dit, 2)
    with pytest.raises(ValueError, match="blocks has 'middle', need names"):
        Ensemble(theirs, blocks=["middle"])
    with pytest.raises(ValueError, match="hidden is 0, need a whole number above 0"):
        SABW(2, [8], hidden=0)
    with pytest.raises(ValueError, match=r"place 0 has features \[2, 1, 9, 4\], need \[2, B, C"):
        SABW(2, [8])(0, torch.ones(2, 1, 9, 4), torch.ones(1, 64))
    wrong = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Sequential has none of down_blocks, .*, need blocks"):
        Ensemble([wrong, copy.deepcopy(wrong)])
    wrong.out_channels = 2
    with pytest.raises(ValueError, match="need an aggregator made for it"):
        places(wrong)
    normed = [nn.Sequential(nn.BatchNorm1d(2)) for _ in range(2)]
    with pytest.raises(ValueError, match="need weights in layers of their own"):
        Ensemble(normed, Fixed(0.0, 0.0), blocks=["0"])
    assert given
