"""Diffscaler: neutral, the equation, gradients, tasks in a batch, merged, and files."""

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdiff import adapters
from fastdiff.adapters import Diffscaler
from fastdiff.models import DiT, UNet
from fastdiff.testing import draw_weights


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dit():
    model = DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    return draw_weights(model), lambda x: model(x, _t(x), _t(x).long() % 7)


def unet():
    model = UNet(4, 4, (16, 32), 1, (1, 0), 1, heads=2, groups=8, cross_attention_dim=16,
                 num_classes=10)  # fmt: skip
    return draw_weights(model), lambda x: model(x, _t(x), _t(x).long() % 7)


def sd15():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24,
        attention_head_dim=4,
    )  # fmt: skip
    text = draw(1, 7, 24, seed=2)
    return draw_weights(
        model
    ), lambda x: model(x, _t(x), text.to(x.dtype).expand(len(x), -1, -1)).sample


def _t(x):
    return 10.0 + 100 * x[:, 0, 0, 0].abs()  # a sample's own, wherever it stands


NETWORKS = {"DiT": dit, "UNet": unet, "sd15": sd15}
X = draw(4, 4, 8, 8)


def state_of(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in state)


def called(model, places, call, x):
    """The base, its layers called and not read by fused kernels, as with an adapter's hooks."""
    layers = dict(model.named_modules())
    handles = [layers[n].register_forward_hook(lambda *_: None) for n in places]
    with torch.no_grad():
        out = call(x)
    for handle in handles:
        handle.remove()
    return out


def fill(adapter, seed=1, size=0.1):
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(size * draw(*p.shape, seed=100 * seed + i).to(p.dtype))
    return adapter


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_neutral_tasks_files_and_taken_back(name, rank, tmp_path):
    model, call = NETWORKS[name]()
    with torch.no_grad():
        base, plain = state_of(model), call(X)
    tuner = Diffscaler(model, rank, tasks=2)
    tuner.detach()
    before = called(model, tuner.places, call, X)
    torch.testing.assert_close(before, plain, rtol=1e-4, atol=1e-4)
    tuner.attach()
    with torch.no_grad():
        for ids in (None, [1, 2, 0, 1]):
            tuner.choose(ids)
            assert torch.equal(call(X), before)
        fill(tuner)
        runs = {}
        for a in (0, 1, 2, 1):
            tuner.choose([a] * 4)
            out = call(X)
            assert a not in runs or torch.equal(out, runs[a])  # A -> B -> A
            runs[a] = out
        assert torch.equal(runs[0], before) and (runs[1] - runs[2]).abs().max() > 1e-3
        tuner.choose([2, 0, 1, 2])
        mixed = call(X)
        for i, a in enumerate((2, 0, 1, 2)):
            torch.testing.assert_close(mixed[i], runs[a][i], rtol=1e-5, atol=1e-5)
        tuner.choose([2, 1])
        torch.testing.assert_close(call(X)[1], runs[1][1], rtol=1e-5, atol=1e-5)
        path = tuner.save(tmp_path / "a.safetensors")
        other, call_other = NETWORKS[name]()
        loaded = adapters.load(other, path)
        loaded.choose([2, 0, 1, 2])
        assert torch.equal(call_other(X), mixed)
        assert tuner.detach() is model and same(model, base) and torch.equal(call(X), plain)
    assert all(p.requires_grad or n == "pos_embed" for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def layers():
    return {
        "linear": (nn.Linear(5, 7), draw(3, 4, 5)),
        "no bias": (nn.Linear(5, 7, bias=False), draw(3, 5)),
        "conv": (nn.Conv2d(4, 6, 3, 2, 1), draw(3, 4, 7, 8)),
        "1x1": (nn.Conv2d(4, 6, 1), draw(3, 4, 5, 5)),
    }


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("name", layers())
def test_it_is_the_equation_and_gradients_are_its_own(name, chosen):
    layer, x = layers()[name]
    net, x = nn.Sequential(layer).double(), x.double().requires_grad_()
    tuner = fill(Diffscaler(net, 2, tasks=3).double(), size=0.5)
    ids = [3, 0, 1] if chosen else [1, 1, 1]
    tuner.choose(ids)
    own = tuner.affiners["0"]
    conv = isinstance(layer, nn.Conv2d)

    def equation(x):
        rows = []
        for i, a in enumerate(ids):
            one = x[i : i + 1]
            if not a:
                rows.append(_plain(layer, one))
                continue
            k = a - 1
            shape = (-1, 1, 1) if conv else (-1,)
            bias = 0 if layer.bias is None else layer.bias.view(shape)
            wx = _plain(layer, one) - bias
            if conv:
                down = own.down[k].view(2, *layer.weight.shape[1:])
                low = F.conv2d(one, down, None, layer.stride, layer.padding)
                branch = F.conv2d(F.relu(low), own.up[k][:, :, None, None])
            else:
                branch = F.linear(F.relu(F.linear(one, own.down[k])), own.up[k])
            scale, shift, gain = (t[k].view(shape) for t in (own.scale, own.shift, own.gain))
            rows.append((1 + scale) * wx + bias + shift + gain * branch)
        return torch.cat(rows)

    out, want = net(x), equation(x)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    g = draw(*out.shape, seed=9, dtype=torch.float64)
    every = (x, *own.parameters())
    for a, b in zip(
        torch.autograd.grad(out, every, g), torch.autograd.grad(want, every, g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def _plain(layer, x):
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
    return F.linear(x, layer.weight, layer.bias)


def test_one_task_needs_no_choice():
    net, x = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), draw(6, 5)
    tuner = fill(Diffscaler(net, 2))
    out = net(x)
    tuner.choose([1])
    torch.testing.assert_close(net(x), out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net(x[0]), net(x)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_without_a_branch(name):
    model, call = NETWORKS[name]()
    tuner = Diffscaler(model, 0, tasks=2)
    for layer in (tuner.affiners[n.replace(".", "/")] for n, m in tuner.places.items()):
        with torch.no_grad():
            layer.scale.copy_(0.1 * draw(*layer.scale.shape))
    with torch.no_grad():
        for n, m in tuner.places.items():
            if m.bias is not None:
                own = tuner.affiners[n.replace(".", "/")]
                own.shift.copy_(0.1 * draw(*own.shift.shape, seed=2))
        base = state_of(model)
        tuner.choose([2])
        want = call(X)
        tuner.merge(1)
        assert (call(X) - want).abs().max() < 2e-6 * want.abs().max()
        tuner.unmerge()
        assert same(model, base) and torch.equal(call(X), want)


def test_what_cannot_be_merged():
    net = nn.Sequential(nn.Linear(5, 7, bias=False))
    base = state_of(net)
    tuner = Diffscaler(net, 2)
    with pytest.raises(ValueError, match="rank is 2, whose relu"):
        tuner.merge()
    tuner.detach()
    tuner = fill(Diffscaler(net, 0))
    with pytest.raises(ValueError, match="layer 0 has no bias"):
        tuner.merge()
    with pytest.raises(ValueError, match="task is 1, need"):
        tuner.merge(1)
    assert same(net, base) and not tuner.merged


def test_a_bfloat16_base():
    model, call = unet()
    model.bfloat16()
    x = X.bfloat16()
    tuner = Diffscaler(model, 2, tasks=2)
    tuner.detach()
    before = called(model, tuner.places, call, x)
    tuner.attach()
    tuner.choose([1, 2])
    with torch.no_grad():
        assert torch.equal(call(x), before)
    call(x).float().square().sum().backward()
    assert all(p.dtype == torch.float32 for p in tuner.parameters())
    assert all(p.grad.isfinite().all() for p in tuner.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in tuner.parameters()) > 50


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(rank=-1), "rank is -1, need a whole number 0 to 256"),
        (dict(tasks=0), "tasks is 0"),
        (dict(targets=["nothing"]), "no layer's name ends in"),
    ],
)
def test_bad_settings(how, message):
    model, _ = dit()
    base = state_of(model)
    with pytest.raises(ValueError, match=message):
        Diffscaler(model, **how)
    assert same(model, base) and not adapters.attached(model)


def test_grouped_convolutions():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(ValueError, match="layer 0 has groups 2"):
        Diffscaler(net)
    x = draw(2, 4, 5, 5)
    before = net(x)
    tuner = Diffscaler(net, 0)
    assert torch.equal(net(x), before)
    fill(tuner)
    assert not torch.equal(net(x), before)


def test_bad_choices_and_foreign_files(tmp_path):
    model, call = dit()
    tuner = Diffscaler(model, 2, tasks=2)
    for ids in ([3], [-1], [0.5], []):
        with pytest.raises(ValueError, match="need whole numbers"):
            tuner.choose(ids)
    tuner.choose([1, 2, 0])
    with pytest.raises(ValueError, match="a batch has 4 rows, need a multiple of the 3"):
        call(X)
    path = tuner.save(tmp_path / "a.safetensors")
    other, _ = unet()
    base = state_of(other)
    with pytest.raises(ValueError, match="a.safetensors"):
        adapters.load(other, path)
    assert same(other, base) and not adapters.attached(other)
    mine = Diffscaler(other, 2)
    with pytest.raises(ValueError, match="a.safetensors"):
        mine.load(path)
