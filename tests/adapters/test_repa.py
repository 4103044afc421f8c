"""REPA: its loss, its tap, and a network that does not notice it."""

import copy

import diffusers
import pytest
import torch
from torch.nn import functional as F

from fastdiff import adapters
from fastdiff.adapters import Repa, alignment_loss
from fastdiff.models import DiT
from fastdiff.models.baseline import PlainDiT
from fastdiff.testing import draw_weights

OURS = dict(
    input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=10,
    learn_sigma=False,
)  # fmt: skip


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ours(kind=PlainDiT):
    t, y = torch.tensor([10.0, 900.0]), torch.tensor([3, 5])
    return draw_weights(kind(**OURS)), (draw(2, 4, 8, 12), t, y)


def theirs():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return draw_weights(model), (draw(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([3, 5]))


NETWORKS = {"PlainDiT": ours, "DiT": lambda: ours(DiT), "diffusers": theirs}


def call(model, args):
    out = model(*args)
    return out if isinstance(out, torch.Tensor) else out.sample


def test_cosine_of_proportional_tokens():
    z = draw(2, 5, 7, dtype=torch.float64)
    scale = draw(2, 5, 1, seed=2, dtype=torch.float64).abs() + 0.1
    assert abs(alignment_loss(scale * z, z) + 1) < 1e-12
    assert abs(alignment_loss(-scale * z, z) - 1) < 1e-12
    other = draw(2, 5, 7, seed=3, dtype=torch.float64)
    want = -F.cosine_similarity(z, other, dim=-1).mean()
    assert abs(alignment_loss(z, other) - want) < 1e-12
    assert abs(alignment_loss(scale * z, 3 * other) - want) < 1e-12


def test_gradient_is_orthogonal_to_the_token():
    z = draw(2, 5, 7, dtype=torch.float64).requires_grad_()
    target = draw(2, 5, 7, seed=2, dtype=torch.float64).requires_grad_()
    alignment_loss(z, target).backward()
    assert (z.grad * z).sum(-1).abs().max() < 1e-15
    assert z.grad.abs().max() > 1e-3 and target.grad is None
    assert torch.autograd.gradcheck(lambda a: alignment_loss(a, target), z)


def test_half_precision_and_tokens_of_length_0():
    z = draw(2, 5, 7).bfloat16()
    loss = alignment_loss(z, z)
    assert loss.dtype == torch.float32 and abs(loss + 1) < 1e-6
    z = torch.zeros(2, 3, requires_grad=True)
    loss = alignment_loss(z, torch.ones(2, 3))
    loss.backward()
    assert loss == 0 and z.grad.isfinite().all()


@pytest.mark.parametrize("kind", NETWORKS)
def test_tap_is_a_forward_hook_and_the_output_the_same(kind):
    model, args = NETWORKS[kind]()
    with torch.no_grad():
        want = call(model, args)
    heard = []
    blocks = model.transformer_blocks if kind == "diffusers" else model.blocks
    handle = blocks[1].register_forward_hook(lambda m, a, out: heard.append(out))
    repa = Repa(model, 1, 24, hidden=40)
    with torch.no_grad():
        assert torch.equal(call(model, args), want)
    with pytest.raises(ValueError, match="nothing was kept"):
        repa.take()
    call(model, args)
    h = repa.take()
    assert torch.equal(h, heard[-1]) and h.shape[-1] == 32
    call(model, args)
    repa.loss(draw(*h.shape[:2], 24)).backward()
    assert all(p.grad is not None for p in repa.parameters())
    handle.remove()
    repa.detach()
    with torch.no_grad():
        assert not blocks[1]._forward_hooks and torch.equal(call(model, args), want)


def test_tokens_after_a_block_are_those_of_the_plain_network():
    fused, args = ours(DiT)
    plain, _ = ours()
    taps = Repa(fused, 1, 8, hidden=8), Repa(plain, 1, 8, hidden=8)
    call(fused, args), call(plain, args)
    assert (taps[0].take() - taps[1].take()).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [DiT, PlainDiT])
def test_a_hook_may_change_the_tokens_after_a_block(kind):
    """What comes after reads the changed ones: its norm too."""
    model, args = ours(kind)
    with torch.no_grad():
        plain, _ = ours()
        keep = plain.blocks[1].register_forward_hook(lambda m, a, h: h + 0.5 * h.roll(1, 1))
        want = plain(*args)
        keep.remove()
        model.blocks[1].register_forward_hook(lambda m, a, h: h + 0.5 * h.roll(1, 1))
        out = model(*args)
        assert (out - plain(*args)).abs().max() > 1e-3 and (out - want).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["PlainDiT", "diffusers"])
def test_lambda_0_is_the_plain_gradient(kind):
    model, args = NETWORKS[kind]()
    twin = copy.deepcopy(model)
    call(twin, args).square().mean().backward()
    repa = Repa(model, 0, 24, hidden=40)
    loss = call(model, args).square().mean()
    tokens = repa._kept.shape[1]
    (loss + 0.0 * repa.loss(draw(2, tokens, 24))).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def test_alignment_alone_reaches_only_what_comes_before_the_block():
    model, args = ours()
    repa = Repa(model, 1, 24, hidden=40)
    call(model, args)
    repa.loss(draw(2, 24, 24)).backward()
    assert model.blocks[1].mlp.fc2.weight.grad.abs().max() > 0
    assert model.blocks[2].mlp.fc2.weight.grad is None


def test_training_brings_the_loss_down():
    model, args = ours()
    repa = Repa(model, 1, 6, hidden=32)
    target = draw(2, 24, 6, seed=9)
    rate = torch.optim.Adam([*model.parameters(), *repa.trainable()], 3e-3)
    losses = []
    for _ in range(40):
        call(model, args)
        loss = repa.loss(target)
        rate.zero_grad()
        loss.backward()
        rate.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_bf16_network_and_file(tmp_path):
    model, args = ours()
    model.bfloat16()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    repa = Repa(model, "blocks.2", 24, hidden=40)
    call(model, args)
    assert repa.loss(draw(2, 24, 24)).isfinite()
    repa.save(tmp_path / "a")
    other, _ = ours()
    twin = adapters.load(other, tmp_path / "a")
    assert isinstance(twin, Repa) and twin.settings == repa.settings
    for a, b in zip(repa.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    repa.detach()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert "_fastdiff_adapters" not in model.__dict__


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(block=3), "block is 3, need a number 0 to 2"),
        (dict(block="blocks.7"), "block is 'blocks.7', need a module's name"),
        (dict(encoder_dim=0), "encoder_dim is 0"),
        (dict(hidden=True), "hidden is True"),
        (dict(block="blocks.0.mlp"), "does not say its width"),
        (dict(dim=-1), "dim is -1"),
    ],
)
def test_errors_leave_the_network_alone(settings, words):
    model, _ = ours()
    with pytest.raises(ValueError, match=words):
        Repa(model, **{**dict(block=1, encoder_dim=8), **settings})
    assert "_fastdiff_adapters" not in model.__dict__
    with pytest.raises(ValueError, match="need that of z"):
        alignment_loss(draw(2, 3), draw(2, 4))
