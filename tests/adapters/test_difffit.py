"""DiffFit: neutral, gradients, what is saved for backward, merged, and how much is trained."""

import diffusers
import pytest
import torch

from fastdiff import adapters
from fastdiff.adapters import DiffFit, LoRA
from fastdiff.models import DiT, UNet
from fastdiff.testing import draw_weights


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dit():
    model = DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    t, y = torch.tensor([10.0, 900.0]), torch.tensor([3, 5])
    return draw_weights(model), lambda x: model(x, t, y)


def unet():
    model = UNet(4, 4, (16, 32), 1, (1, 0), 1, heads=2, groups=8, cross_attention_dim=16,
                 num_classes=10)  # fmt: skip
    t, y = torch.tensor([10.0, 900.0]), torch.tensor([3, 5])
    return draw_weights(model), lambda x: model(x, t, y)


def sd15():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24,
        attention_head_dim=4,
    )  # fmt: skip
    return draw_weights(model), lambda x: model(x, 10, draw(2, 7, 24, seed=2).to(x.dtype)).sample


def theirs():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, dropout=0.0,
    )  # fmt: skip
    t, y = torch.tensor([10, 900]), torch.tensor([3, 5])
    return draw_weights(model).eval(), lambda x: model(x, t, class_labels=y).sample


NETWORKS = {"DiT": dit, "UNet": unet, "sd15": sd15, "diffusers.DiT": theirs}
X = draw(2, 4, 8, 8)


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


def fill(adapter, seed=1):
    with torch.no_grad():
        for i, p in enumerate(adapter.trainable()):
            p.add_(0.1 * draw(*p.shape, seed=100 * seed + i).to(p.dtype))
    return adapter


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_neutral_then_trained_merged_and_taken_back(name, tmp_path):
    model, call = NETWORKS[name]()
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    base, before = state_of(model), call(X).detach()
    tuner = DiffFit(model)
    own = call(X).detach()
    tuner.detach()
    assert torch.equal(own, called(model, tuner.places, call, X)) and same(model, base)
    torch.testing.assert_close(own, before, rtol=1e-4, atol=1e-4)
    fill(tuner.attach())
    after = call(X).detach()
    assert (after - before).abs().max() > 1e-3
    path = tuner.save(tmp_path / "a.safetensors")
    tuner.merge()
    merged = tuner.save(tmp_path / "b.safetensors")
    for (_, a), (_, b) in zip(
        *(sorted(adapters.base.read(p)[1].items()) for p in (path, merged)), strict=True
    ):
        assert torch.equal(a, b)
    tuner.unmerge()
    assert torch.equal(call(X), after)
    assert tuner.detach() is model and same(model, base) and torch.equal(call(X), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    tuner.attach()
    assert torch.equal(call(X), after)
    tuner.detach()
    other, call_other = NETWORKS[name]()
    adapters.load(other, path)
    assert torch.equal(call_other(X), after)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_merged_is_unmerged(name):
    model, call = NETWORKS[name]()
    model.double()
    tuner = fill(DiffFit(model))
    want = call(X.double())
    tuner.merge()
    assert (call(X.double()) - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("name", ["DiT", "sd15"])
def test_gradients_are_those_of_training_all(name):
    model, call = NETWORKS[name]()
    model.double()
    x = X.double()
    call(x).square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    tuner = DiffFit(model)
    loss = call(x).square().sum()
    loss.backward()
    found = dict(model.named_parameters())
    assert tuner.trains and all(found[n].grad is None for n in found.keys() - set(tuner.trains))
    for n in set(tuner.trains) & want.keys():
        torch.testing.assert_close(found[n].grad, want[n], rtol=1e-9, atol=1e-10)
    for place, layer in tuner.places.items():  # d/dgamma = sum_k W_k dL/dW_k + b dL/db
        own = (layer.weight.detach() * want[f"{place}.weight"]).sum(1)
        own = own + layer.bias.detach() * want[f"{place}.bias"]
        grad = tuner.gammas[place.replace(".", "/")].grad
        torch.testing.assert_close(grad.double(), own, rtol=1e-5, atol=1e-6)


def saved(call):
    """Bytes of storages kept for backward that are no parameter's."""
    kept = {}

    def pack(t):
        if not isinstance(t, torch.nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(X)
    return sum(kept.values()), out


def test_frozen_layers_keep_no_input():
    model, call = dit()
    full, out = saved(call)
    del out
    DiffFit(model)
    mine, out = saved(call)
    rows, depth, d = 2 * 16, 2, 32
    inputs = d + d + 4 * d  # of qkv, fc1 and fc2; attention keeps its own result, proj's
    assert full - mine >= 4 * rows * depth * (inputs - 2 * d)  # y of the two with a gamma


def test_a_bfloat16_base():
    model, call = dit()
    model.bfloat16()
    before = call(X.bfloat16())
    tuner = DiffFit(model)
    assert torch.equal(call(X.bfloat16()), before)
    assert all(g.dtype == torch.float32 for g in tuner.gammas.values())
    call(X.bfloat16()).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuner.gammas.values())


def test_wrapped_by_peft_it_is_the_same():
    peft = pytest.importorskip("peft")
    model, call = sd15()
    plain = DiffFit(model)
    names, places = plain.trains, list(plain.places)
    plain.detach()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "ff.net.2"])
    before = call(X)
    peft.inject_adapter_in_model(config, model)
    tuner = DiffFit(model)
    assert sorted(tuner.trains) == sorted(names) and list(tuner.places) == places
    assert torch.equal(call(X), before)


FAMILIES = {
    "pixart": (
        diffusers.PixArtTransformer2DModel,
        dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16,
             caption_channels=12, sample_size=8, in_channels=4),
        2 * 3,
    ),
    "sd3": (
        diffusers.SD3Transformer2DModel,
        dict(sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
             joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
             pos_embed_max_size=8),
        2 + 4,  # the last block has no projections of text
    ),
    "flux": (
        diffusers.FluxTransformer2DModel,
        dict(in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
             num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
             axes_dims_rope=(4, 4, 8)),
        4 + 2,
    ),
    "unet2d": (
        diffusers.UNet2DModel,
        dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
             down_block_types=("DownBlock2D", "AttnDownBlock2D"),
             up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8),
        1 + 1 + 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_projections_of_families(name):
    kind, config, count = FAMILIES[name]
    model = kind(**config)
    tuner = DiffFit(model)
    assert len(tuner.places) == count, list(tuner.places)
    assert not any(n.endswith("weight") and p.dim() > 1
                   for n, p in model.named_parameters() if p.requires_grad)  # fmt: skip


def test_how_much_of_dit_xl_2():
    with torch.device("meta"):
        model = DiT.preset("DiT-XL/2", num_classes=101)
    total = sum(p.numel() for n, p in model.named_parameters())
    d, depth = 1152, 28
    biases = depth * (3 + 1 + 4 + 1 + 6) * d + (1 + 2 + 2) * d + 32
    assert DiffFit(model).count == biases + depth * 2 * d == 554_144
    adapters.attached(model)[0].detach()
    embedded = DiffFit(model, embedder=True)
    assert embedded.count == 554_144 + 102 * d
    embedded.detach()
    paper = DiffFit(model, targets=["attn.qkv", "mlp.fc1"], embedder=True)
    assert paper.count == biases + 102 * d + depth * 7 * d == 832_928  # 0.83 M
    assert round(100 * paper.count / total, 2) == 0.12
    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
            num_layers=28, sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        )  # fmt: skip
    # It has an embedder of times in each block, and none outside of blocks.
    assert DiffFit(theirs).count == 554_144 + (depth - 1) * 2 * d


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(targets=["nothing"]), "no layer's name ends in"),
        (dict(targets="["), "targets is"),
        (dict(embedder=True), "no class embedder"),
    ],
)
def test_bad_settings(how, message):
    model, _ = sd15()
    base = state_of(model)
    with pytest.raises(ValueError, match=message):
        DiffFit(model, **how)
    assert same(model, base) and not adapters.attached(model)
    assert all(p.requires_grad for p in model.parameters())


def test_foreign_files_and_neighbours(tmp_path):
    model, call = dit()
    base = state_of(model)
    path = DiffFit(model).save(tmp_path / "a.safetensors")
    adapters.attached(model)[0].detach()
    other, _ = unet()
    kept = state_of(other)
    with pytest.raises(ValueError, match="a.safetensors"):
        adapters.load(other, path)
    assert same(other, kept) and not adapters.attached(other)
    lora = LoRA(model, 2, targets=["attn.proj"])
    tuner = fill(DiffFit(model))
    with torch.no_grad():
        for pair in lora.pairs.values():
            pair.up.copy_(draw(*pair.up.shape))
    after = call(X)
    with pytest.raises(ValueError, match="need that merged before"):
        tuner.merge()
    lora.merge()
    tuner.merge()
    torch.testing.assert_close(call(X), after, rtol=1e-4, atol=1e-4)
    lora.detach()
    tuner.detach()
    assert same(model, base)
