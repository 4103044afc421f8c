"""Heads on demand: which ones run, on what; the shifted noising; the loss of what is known."""

import pytest
import torch
from torch import nn

from fastdiff import samplers
from fastdiff.methods.multitask import MultiHead, multitask, noised, shifts, task_loss
from fastdiff.samplers import alphas_cumprod

C, SIZE = 2, 3


class Backbone(nn.Module):
    num_classes = 4

    def __init__(self):
        super().__init__()
        self.first, self.kind = nn.Conv2d(C, 6, 3, padding=1), nn.Embedding(5, 6)
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((x, t, y))
        h = torch.tanh(self.first(x) + self.kind(y)[..., None, None])
        return h + 0.001 * t.view(-1, 1, 1, 1)


class Head(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.layer, self.calls = nn.Conv2d(6, out, 1), 0

    def forward(self, h):
        self.calls += 1
        return self.layer(h)


def network():
    torch.manual_seed(0)
    heads = dict(depth=Head(1), normals=Head(3), classes=Head(7))
    return MultiHead(Backbone(), Head(C), heads)


SETTINGS = dict(steps=5, seed=2, clip=3.0)
SHAPE = (2, C, SIZE, SIZE + 1)
Y = torch.tensor([1, 3])


def reset(net):
    net.backbone.calls.clear()
    for head in (net.denoise, *net.heads.values()):
        head.calls = 0


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("heads", [[], ["depth"], ["classes", "depth"]])
def test_only_requested_heads_run_and_sampling_is_the_same(heads, guidance):
    net = network()
    settings = dict(classes=Y, guidance=guidance, **SETTINGS)
    want = samplers.sample(net, SHAPE, **settings)
    last = net.backbone.calls[-1]
    reset(net)
    found = multitask(net, SHAPE, heads, **settings)
    assert torch.equal(found.x, want)
    assert list(found.tasks) == heads
    assert len(net.backbone.calls) == net.denoise.calls == 5  # no call more
    assert {n: h.calls for n, h in net.heads.items()} == {n: int(n in heads) for n in net.heads}
    with torch.no_grad():
        h = net.backbone(*(v[-2:] for v in last))  # of guidance the conditional half
        for name in heads:
            assert torch.allclose(found.tasks[name], net.heads[name](h), atol=1e-6)
            assert len(found.tasks[name]) == 2
    assert not net.backbone._forward_hooks


def test_batch_of_samples_is_each_alone():
    net, x, seeds = network(), torch.randn(SHAPE), torch.tensor([4, 5])
    settings = dict(steps=5, sampler="ddpm", clip=3.0)
    whole = multitask(net, x, ["depth"], classes=Y, seed=seeds, **settings)
    for b in range(2):
        part = slice(b, b + 1)
        alone = multitask(net, x[part], ["depth"], classes=Y[part], seed=seeds[part], **settings)
        assert (whole.x[part] - alone.x).abs().max() < 1e-5
        assert (whole.tasks["depth"][part] - alone.tasks["depth"]).abs().max() < 1e-5


def test_head_or_backbone_that_raises_leaves_no_hook():
    net = network()
    calls = net.backbone.forward

    def broken(x, t, y):
        if len(net.backbone.calls) == 4:
            raise RuntimeError("no features today")
        return calls(x, t, y)

    net.backbone.forward = broken
    with pytest.raises(RuntimeError, match="no features today"):
        multitask(net, SHAPE, ["depth"], classes=Y, **SETTINGS)
    assert not net.backbone._forward_hooks
    reset(net)
    net.backbone.forward = calls
    net.heads["depth"].forward = lambda h: 1 / 0
    with pytest.raises(ZeroDivisionError):
        multitask(net, SHAPE, ["depth"], classes=Y, **SETTINGS)
    assert not net.backbone._forward_hooks


def test_outputs_of_training():
    net = network()
    x, t = torch.randn(SHAPE), torch.tensor([10.0, 500.0])
    m, tasks = net.outputs(x, t, Y, ["normals"])
    assert len(net.backbone.calls) == 1 and torch.equal(m, net(x, t, Y))
    assert torch.equal(tasks["normals"], net.heads["normals"](net.backbone(x, t, Y)))


BAR = alphas_cumprod(train_steps=50, low=0.01, high=0.2)


def test_closed_form_is_the_chain():
    """Mean and variance of the chain, step by step in float64."""
    w = torch.linspace(0.3, -0.1, 50).double()
    c = shifts(BAR, w)
    z0, e = torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    mean, variance = z0.clone(), torch.zeros(())
    a = BAR / torch.cat((torch.ones(1).double(), BAR[:-1]))
    zero = torch.zeros_like(z0)
    for t in range(50):
        mean = a[t].sqrt() * (mean + w[t] * e)
        variance = a[t] * variance + (1 - a[t])
        at = torch.full((2,), t)
        assert torch.allclose(noised(z0, e, at, BAR, c, zero), mean, atol=1e-12)
        spread = noised(zero, zero, at, BAR, c, torch.ones_like(z0))
        assert torch.allclose(spread**2, variance.expand(SHAPE), atol=1e-12)


def test_without_weights_it_is_ddpm():
    c = shifts(BAR, torch.zeros(50))
    assert (c == 0).all()
    z0, e, eps = (torch.randn(SHAPE) for _ in range(3))
    levels = torch.tensor([3, 40])
    bar = BAR[levels].float().view(2, 1, 1, 1)
    want = bar.sqrt() * z0 + (1 - bar).sqrt() * eps
    assert torch.equal(noised(z0, e, levels, BAR, c, eps), want)


def test_shift_of_the_level_before_would_be_seen():
    """Without the decay of what was added before, c is the sum of the weights."""
    w = torch.full((50,), 0.1)
    assert (shifts(BAR, w) - w.cumsum(0)).abs().max() > 1


def test_unknown_modalities_have_no_gradient():
    net = network()
    x, t = torch.randn(SHAPE), torch.tensor([10.0, 500.0])
    _, tasks = net.outputs(x, t, Y, ["depth", "normals"])
    targets = {n: torch.randn_like(v) for n, v in tasks.items()}
    targets["depth"][1] = float("nan")  # unknown
    present = dict(depth=torch.tensor([True, False]), normals=torch.tensor([False, False]))
    total, parts = task_loss(tasks, targets, present)
    want = (tasks["depth"][0] - targets["depth"][0]).square().mean()
    assert torch.allclose(parts["depth"], want) and parts["normals"] == 0
    assert torch.allclose(total, want)
    g = torch.autograd.grad(total, list(tasks.values()), retain_graph=True)
    assert (g[0][1] == 0).all() and (g[0][0] != 0).any() and (g[1] == 0).all()
    total.backward()
    assert (net.heads["normals"].layer.weight.grad == 0).all()
    assert net.heads["classes"].layer.weight.grad is None
    assert net.backbone.first.weight.grad.isfinite().all()


def test_mask_by_a_product_would_be_seen():
    out = torch.zeros(2, 3, requires_grad=True)
    target, known = torch.full((2, 3), float("nan")), torch.tensor([True, False])
    target[0] = 1
    faulty = ((out - target).square().mean(1) * known).sum()
    assert faulty.isnan()
    total, _ = task_loss({"a": out}, {"a": target}, {"a": known})
    assert total == 1


def test_losses_and_weights():
    out, target = torch.randn(2, 7, 3), torch.tensor([[1, 2, 3], [4, 5, 6]])

    def entropy(a, b):
        return nn.functional.cross_entropy(a, b, reduction="none").mean(1)

    total, parts = task_loss(
        {"classes": out}, {"classes": target}, {"classes": torch.ones(2, dtype=torch.bool)},
        losses={"classes": entropy}, weights={"classes": 0.5},
    )  # fmt: skip
    assert torch.allclose(parts["classes"], nn.functional.cross_entropy(out, target))
    assert torch.allclose(total, 0.5 * parts["classes"])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: multitask(network(), SHAPE, ["sound"]), "heads has 'sound', need of depth, nor"),
        (lambda: multitask(network(), SHAPE, "depth"), "heads is 'depth', need a list"),
        (lambda: multitask(nn.Identity(), SHAPE), "model is Identity, need a MultiHead"),
        (lambda: network().outputs(None, None, None, ["sound"]), "heads has 'sound'"),
        (lambda: shifts(BAR, torch.zeros(3)), r"weights has shape \[3\], need \[50\]"),
        (lambda: task_loss({}, {}, {}), "outputs is empty"),
        (lambda: task_loss({"a": torch.zeros(2, 1)}, {}, {}), "'a' has no target"),
        (
            lambda: task_loss(
                {"a": torch.zeros(2, 1)}, {"a": torch.zeros(2, 1)}, {"a": torch.ones(2)}
            ),
            r"present\['a'\] is torch.float32 \[2\], need torch.bool \[2\]",
        ),
        (
            lambda: task_loss(
                {"a": torch.zeros(2, 1)}, {"a": torch.zeros(3, 1)}, {"a": torch.ones(2).bool()}
            ),
            "'a' has 3 targets, need 2",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
