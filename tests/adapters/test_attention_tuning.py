"""TryOn-Adapter: attention trained in place, gated patch tokens, residuals of other networks."""

import diffusers
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from fastdiff import adapters
from fastdiff.adapters import GatedTokens, Residuals, TrainAttention
from fastdiff.adapters.attention_tuning import merge_attention
from fastdiff.models import DiT, UNet
from fastdiff.models.baseline import PlainDiT, PlainUNet
from fastdiff.ops import attention
from fastdiff.testing import draw_weights

WIDTH = 20


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sd15():
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24,
        attention_head_dim=4,
    )  # fmt: skip
    text = draw(2, 7, 24, seed=2)

    def call(x):
        times = len(x) // 2
        return model(x, 10, encoder_hidden_states=text.to(x.dtype).repeat(times, 1, 1)).sample

    return draw_weights(model), call, draw(2, 4, 16, 24)


def dit(kind):
    model = kind(
        input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    t, y = torch.tensor([10.0, 900.0]), torch.tensor([3, 5])
    return draw_weights(model), lambda x: model(x, t, y), draw(2, 4, 8, 12)


def unet(kind=UNet):
    model = kind(
        in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        transformer_depth=(1, 1), heads=2, groups=8, cross_attention_dim=16, num_classes=10,
    )  # fmt: skip
    t, y = torch.tensor([10.0, 900.0]), torch.tensor([3, 5])
    return draw_weights(model), lambda x: model(x, t, y), draw(2, 4, 8, 12)


def diffusers_dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    t, y = torch.tensor([10, 900]), torch.tensor([3, 5])
    return draw_weights(model), lambda x: model(x, t, y).sample, draw(2, 4, 8, 8)


NETWORKS = {
    "sd15": sd15,
    "DiT": lambda: dit(DiT),
    "PlainDiT": lambda: dit(PlainDiT),
    "UNet": unet,
    "diffusers.DiT": diffusers_dit,
}


def fill(adapter, seed=1):
    """Values with which it does something; norms around 1."""
    with torch.no_grad():
        for i, (name, p) in enumerate(adapter.named_parameters()):
            p.copy_(0.2 * draw(*p.shape, seed=100 * seed + i))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
            if "alpha" in name:
                p.fill_(0.7 + 0.1 * seed)
    return adapter


def state_of(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model, state):
    return all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


# ---- in place ----


@pytest.mark.parametrize("kind", ["sd15", "PlainDiT"])
def test_attention_alone_is_trained_and_comes_off(kind, tmp_path):
    model, call, x = NETWORKS[kind]()
    base = state_of(model)
    with torch.no_grad():
        want = call(x)
    tuned = TrainAttention(model)
    assert torch.equal(call(x), want)
    attn = {n for n, _ in model.named_parameters() if ".attn" in n}
    assert set(tuned.trains) == attn
    assert {n for n, p in model.named_parameters() if p.requires_grad} == attn
    rate = torch.optim.Adam(tuned.trainable(), 1e-2)
    losses = []
    for _ in range(6):
        loss = (call(x) - draw(*x.shape, seed=5)).square().mean()
        rate.zero_grad()
        loss.backward()
        rate.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, base[n])}
    assert changed and changed <= attn
    with torch.no_grad():
        out = call(x)
    tuned.save(tmp_path / "a")
    tuned.detach()
    assert same(model, base)
    twin = adapters.load(model, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(call(x), out)
    twin.detach()
    assert same(model, base) and all(p.requires_grad == (n != "pos_embed") for n, p in
                                     model.named_parameters())  # fmt: skip


def test_chosen_projections_and_conflicts():
    model, _, _ = sd15()
    tuned = TrainAttention(model, targets=r"attn2\.to_[kv]$")
    assert len(tuned.trains) == 2 * 4 and all(".attn2." in n for n in tuned.trains)
    with pytest.raises(ValueError, match="written by another adapter"):
        TrainAttention(model)
    assert adapters.attached(model) == [tuned]
    with pytest.raises(ValueError, match="targets has 'to_x'"):
        TrainAttention(model, targets=["to_x"])


def test_attention_without_a_transformer():
    model = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, attention_head_dim=16,
    )  # fmt: skip
    tuned = TrainAttention(model)
    assert len(tuned.trains) == 8 * 4
    assert all(".attentions." in n and "norm" not in n for n in tuned.trains)


def test_attention_in_bf16():
    model, call, x = sd15()
    model.bfloat16()
    base = state_of(model)
    tuned = TrainAttention(model)
    call(x.bfloat16()).float().square().mean().backward()
    torch.optim.SGD(tuned.trainable(), 1.0).step()
    assert not same(model, base)
    tuned.detach()
    assert same(model, base)


# ---- gated tokens ----


class Blocks(nn.Module):
    """Two of diffusers' blocks with its own fuser of GLIGEN, called or not."""

    def __init__(self):
        super().__init__()
        how = dict(cross_attention_dim=WIDTH, attention_type="gated")
        self.blocks = nn.ModuleList(BasicTransformerBlock(32, 4, 8, **how) for _ in range(2))

    def forward(self, x, text, patches=None):
        kwargs = None if patches is None else {"gligen": {"objs": patches}}
        for block in self.blocks:
            x = block(x, encoder_hidden_states=text, cross_attention_kwargs=kwargs)
        return x


def copy_fuser(theirs, ours):
    with torch.no_grad():
        for name, module in (
            ("linear", theirs.linear), ("norm1", theirs.norm1), ("norm2", theirs.norm2),
            ("to_q", theirs.attn.to_q), ("to_k", theirs.attn.to_k), ("to_v", theirs.attn.to_v),
            ("to_out", theirs.attn.to_out[0]), ("gate", theirs.ff.net[0].proj),
            ("out", theirs.ff.net[2]),
        ):  # fmt: skip
            getattr(ours, name).load_state_dict(module.state_dict())
        ours.alpha_attn.copy_(theirs.alpha_attn)
        ours.alpha_dense.copy_(theirs.alpha_dense)


@pytest.mark.parametrize("merge", [False, True])
@torch.no_grad()
def test_fuser_is_that_of_gligen_on_concatenated_tokens(merge):
    model = draw_weights(Blocks(), std=0.2)
    for i, block in enumerate(model.blocks):
        block.fuser.alpha_attn.fill_(0.5 + i), block.fuser.alpha_dense.fill_(-0.7)
    x, text, patches = draw(2, 33, 32), draw(2, 7, WIDTH, seed=2), draw(2, 11, WIDTH, seed=3)
    model.double()
    x, text, patches = x.double(), text.double(), patches.double()
    want = model(x, text, patches)
    gated = GatedTokens(model, WIDTH, heads=4, merge=merge)
    for block, fuser in zip(model.blocks, gated.fusers.values(), strict=True):
        copy_fuser(block.fuser, fuser)
    gated.see(patches)
    out = model(x, text)
    assert (out - want).abs().max() < 1e-6
    assert (model(x, text) - model(x, text, patches * 0)).abs().max() > 1e-2
    gated.scale.zero_()
    assert torch.equal(model(x, text), (gated.detach(), model(x, text))[1])


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_gates_of_0_and_no_patches_are_the_base(kind):
    model, call, x = NETWORKS[kind]()
    want, base = call(x), state_of(model)
    gated = GatedTokens(model, WIDTH, heads=2)
    assert torch.equal(call(x), want)
    gated.see(draw(2, 5, WIDTH))
    assert torch.equal(call(x), want)
    fill(gated)
    found = call(x)
    assert (found - want).abs().max() > 1e-3
    gated.merges = True
    assert (call(x) - found).abs().max() < 1e-5 * max(1, found.abs().max())
    gated.see(None)
    assert torch.equal(call(x), want)
    gated.see(draw(2, 5, WIDTH))
    gated.detach()
    assert torch.equal(call(x), want) and same(model, base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_fused_and_plain_networks_agree():
    found = []
    for kind in (DiT, PlainDiT):
        model, call, x = dit(kind)
        fill(GatedTokens(model, WIDTH, heads=2)).see(draw(2, 5, WIDTH))
        found.append(call(x))
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_attention_is_that_over_all_keys(dtype):
    q, k, v = (draw(2, 3, n, 16, seed=n).to(dtype) for n in (9, 14, 15))
    v = v[:, :, :14]
    parts = [attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in
             ((0, 5), (5, 6), (6, 14))]  # fmt: skip
    want = attention(q.double(), k.double(), v.double())
    error = (merge_attention(*parts) - want).abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 2e-2)
    none = attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert torch.equal(merge_attention(none, none), torch.zeros_like(q))
    assert torch.equal(merge_attention(none, parts[0]), parts[0][0])


@torch.no_grad()
def test_keys_are_computed_once_and_never_stale():
    model, call, x = sd15()
    gated = fill(GatedTokens(model, WIDTH, heads=2))
    calls = []
    for fuser in gated.fusers.values():
        plain = fuser.of_patches
        fuser.of_patches = lambda p, plain=plain: calls.append(1) or plain(p)
    gated.see(draw(2, 5, WIDTH))
    first = call(x)
    blocks = len(gated.fusers)
    assert len(calls) == blocks and torch.equal(call(x), first) and len(calls) == blocks
    where = [k.data_ptr() for _, k, _ in gated._known.values()]
    gated.see(draw(2, 5, WIDTH, seed=2))
    assert len(calls) == 2 * blocks  # at once, for programs that are captured
    second = call(x)
    assert len(calls) == 2 * blocks and not torch.equal(second, first)
    assert where == [k.data_ptr() for _, k, _ in gated._known.values()]
    for fuser in gated.fusers.values():
        fuser.to_v.weight.mul_(2)
    third = call(x)
    assert not torch.equal(third, second)
    fresh = GatedTokens((gated.detach(), model)[1], WIDTH, heads=2)
    fresh.load_state_dict(gated.state_dict())
    fresh.see(draw(2, 5, WIDTH, seed=2))
    assert torch.equal(call(x), third)
    with torch.inference_mode():
        for seed in (1, 2):
            fresh.see(draw(2, 6, WIDTH, seed=seed))
            out = call(x)
    fresh.see(draw(2, 6, WIDTH, seed=2))
    assert torch.equal(call(x), out)


@torch.no_grad()
def test_batches_repeat_the_patches():
    model, call, x = sd15()
    gated = fill(GatedTokens(model, WIDTH, heads=2))
    gated.see(draw(2, 5, WIDTH))
    want = call(x)
    assert (call(torch.cat([x, x])) - torch.cat([want, want])).abs().max() < 1e-5
    gated.see(draw(2, 5, WIDTH)[1:])
    assert (call(x)[1] - want[1]).abs().max() < 1e-5
    gated.see(draw(3, 5, WIDTH))
    with pytest.raises(ValueError, match="2 rows, need a multiple of the 3"):
        call(x)


@pytest.mark.parametrize(
    "kind, merge", [("sd15", False), ("sd15", True), ("UNet", False), ("DiT", True)]
)
def test_tokens_train(kind, merge):
    model, call, x = NETWORKS[kind]()
    gated = GatedTokens(model, WIDTH, heads=2, merge=merge)
    patches = draw(2, 5, WIDTH).requires_grad_()
    base = state_of(model)
    rate = torch.optim.Adam(gated.trainable(), 1e-2)
    losses = []
    for _ in range(8):
        gated.see(patches)
        loss = (call(x) - draw(*x.shape, seed=5)).square().mean()
        rate.zero_grad()
        loss.backward()
        rate.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and same(model, base)
    assert patches.grad.abs().max() > 0
    assert all(p.grad is not None and p.grad.any() for p in gated.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_both_forms_are_equal():
    model, call, x = sd15()
    gated, grads = fill(GatedTokens(model, WIDTH, heads=2)), []
    gated.see(draw(2, 5, WIDTH))
    for merge in (False, True):
        gated.merges = merge
        gated.zero_grad()
        call(x).square().mean().backward()
        grads.append([p.grad.clone() for p in gated.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(a.abs().max(), 1e-3)


def test_gated_file_and_bf16(tmp_path):
    model, call, x = sd15()
    model.bfloat16()
    gated = fill(GatedTokens(model, WIDTH, heads=2, head_dim=6, merge=True))
    patches = draw(2, 5, WIDTH).bfloat16()
    gated.see(patches)
    with torch.no_grad():
        want = call(x.bfloat16())
    assert want.isfinite().all()
    call(x.bfloat16()).float().sum().backward()
    gated.save(tmp_path / "a")
    gated.detach()
    twin = adapters.load(model, tmp_path / "a")
    assert isinstance(twin, GatedTokens) and twin.settings == gated.settings
    twin.see(patches)
    with torch.no_grad():
        assert torch.equal(call(x.bfloat16()), want)


def test_gated_errors():
    model, call, x = sd15()
    for words, settings in {
        "width is 0": dict(width=0),
        "heads is 5, need a divisor of 32": dict(width=4, heads=5),
        "fits no Module": dict(width=4, targets="nothing"),
        "does not say its width": dict(width=4, targets=["conv_in"]),
    }.items():
        with pytest.raises(ValueError, match=words):
            GatedTokens(model, **settings)
        assert "_fastdiff_adapters" not in model.__dict__
    with pytest.raises(ValueError, match="no transformer block"):
        GatedTokens(nn.Sequential(nn.Linear(2, 2)), 4)
    gated = GatedTokens(model, 4)
    with pytest.raises(ValueError, match=r"need \[B, P, 4\]"):
        gated.see(draw(2, 5, 3))
    with pytest.raises(ValueError, match="nothing to merge"):
        gated.merge()
    assert not gated.merged


def test_a_network_that_calls_none_of_the_layers_says_so():
    """The plain U-Net runs its blocks itself."""
    model, call, x = unet(PlainUNet)
    with torch.no_grad():
        want = call(x)
    gated = GatedTokens(model, WIDTH, heads=2)
    with pytest.raises(ValueError, match="has called none of the layers"):
        call(x)
    gated.detach()
    with torch.no_grad():
        assert torch.equal(call(x), want)


@torch.no_grad()
def test_programs_know_where_values_lie():
    """Values change in place; a new shape, or none, is another layout."""
    model, _, _ = sd15()
    gated, residuals = GatedTokens(model, WIDTH, heads=2), Residuals(model, PLACES)
    for adapter, values in (
        (gated, [draw(2, 5, WIDTH), draw(2, 5, WIDTH, seed=2), draw(2, 6, WIDTH), None]),
        (residuals, [maps(), maps(seed=3), maps(1), None]),
    ):
        found = [(adapters.layout(model), adapters.version(model))]
        for value in values:
            adapter.see(value)
            found.append((adapters.layout(model), adapters.version(model)))
        places = [layout for layout, _ in found]
        assert places[1] == places[2] and len(set(places)) >= 3 and places[2] != places[3]
        assert len({version for _, version in found}) == 5


# ---- residuals ----

PLACES = ["down_blocks.0.attentions.0", "down_blocks.1.resnets.0"]


def maps(count=2, seed=1):
    return [draw(count, 32, 16, 24, seed=seed), draw(count, 64, 8, 12, seed=seed + 1)]


@torch.no_grad()
def test_residuals_are_those_of_t2i_adapters():
    """diffusers adds them at these places by an argument of its own."""
    model, call, x = sd15()
    want, base = call(x), state_of(model)
    text = draw(2, 7, 24, seed=2)
    added = model(
        x, 10, encoder_hidden_states=text, down_intrablock_additional_residuals=maps()
    ).sample
    residuals = Residuals(model, PLACES)
    assert torch.equal(call(x), want)
    residuals.see(maps())
    assert torch.equal(call(x), added) and not torch.equal(added, want)
    where = [r.data_ptr() for r in residuals.residuals]
    residuals.see(maps(seed=5))
    assert where == [r.data_ptr() for r in residuals.residuals]
    assert not torch.equal(call(x), added)
    residuals.scale.zero_()
    assert torch.equal(call(x), want)
    residuals.scale.fill_(1)
    residuals.see(maps(count=1))
    one = call(torch.cat([x, x]))
    assert (one[2:] - one[:2]).abs().max() < 1e-5
    residuals.detach()
    assert torch.equal(call(x), want) and same(model, base)


def test_residuals_pass_gradients_and_files(tmp_path):
    model, call, x = sd15()
    residuals = Residuals(model, PLACES)
    given = [m.requires_grad_() for m in maps()]
    residuals.see(given)
    call(x).square().mean().backward()
    assert all(m.grad.abs().max() > 0 for m in given)
    residuals.save(tmp_path / "a")
    residuals.detach()
    twin = adapters.load(model.bfloat16(), tmp_path / "a")
    assert isinstance(twin, Residuals) and list(twin.blocks) == PLACES
    twin.see(maps())
    assert call(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_residual_errors():
    model, call, x = sd15()
    for words, blocks in {
        "blocks is": [],
        "'down_blocks.9' is none": ["down_blocks.9"],
        "each once": PLACES[:1] * 2,
    }.items():
        with pytest.raises(ValueError, match=words):
            Residuals(model, blocks)
        assert "_fastdiff_adapters" not in model.__dict__
    residuals = Residuals(model, PLACES)
    for wrong in (maps()[:1], [*maps(), draw(1)]):
        with pytest.raises(ValueError, match=f"residuals has {len(wrong)} entries, need 2"):
            residuals.see(wrong)
    residuals.see(maps()[::-1])
    with pytest.raises(ValueError, match="residual 0 has shape"):
        call(x)
