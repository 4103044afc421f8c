"""SaRA: what is trained, what is not, its optimiser, its file."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdiff
from fastdiff import adapters
from fastdiff.adapters import LoRA, SaRA, SparseAdamW
from fastdiff.adapters.sara import polar, threshold_of
from fastdiff.models import UNet
from fastdiff.models.baseline import PlainDiT, PlainUNet
from fastdiff.ops import SparseIndex


def mlp(dtype=torch.float32, width=80):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(24, width), nn.GELU(), nn.Linear(width, width), nn.Linear(width, 8)
    )
    return net.to(dtype)


def images():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.SiLU(), nn.Conv2d(12, 8, 3, 2, 1), nn.Conv2d(8, 4, 1)
    )


def dit():
    torch.manual_seed(0)
    net = PlainDiT(
        input_size=8, patch_size=2, in_channels=2, hidden_size=32, depth=2, num_heads=2,
        num_classes=5, learn_sigma=False, prediction="flow",
    )  # fmt: skip
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return net.eval()


def unet():
    torch.manual_seed(0)
    net = PlainUNet(
        in_channels=2, out_channels=2, block_out_channels=(16, 24), layers_per_block=1,
        transformer_depth=(0, 1), heads=(1, 2), groups=4, cross_attention_dim=16, num_classes=5,
        class_tokens=2, prediction="eps",
    )  # fmt: skip
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net.eval()


def states(net):
    return {n: p.detach().clone() for n, p in net.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a) and a.keys() == b.keys()


def call(net):
    g = torch.Generator().manual_seed(3)
    if isinstance(net, PlainDiT | UNet):
        x = torch.randn(3, 2, 8, 12, generator=g)
        return net(x, torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 4, 5]))
    if isinstance(net[0], nn.Conv2d):
        return net(torch.randn(2, 3, 9, 14, generator=g))
    x = torch.randn(5, 7, 24, generator=g)
    return net(x.to(next(net.parameters()).dtype))


@pytest.mark.parametrize("make", [mlp, images, dit, unet])
def test_attached_it_is_the_base_and_gradients_are_the_dense_ones_at_its_entries(make):
    net = make()
    before = call(net).detach()
    dense = copy.deepcopy(net).requires_grad_(True)
    call(dense).square().sum().backward()
    sara = SaRA(net, ratio=0.3)
    assert torch.equal(call(net), before)
    call(net).square().sum().backward()
    compared = 0
    for name in sara.places:
        entries = sara.of(name)
        if not entries.index.count:
            continue
        want = entries.index.take(dense.get_parameter(f"{name}.weight").grad)
        compared += want.numel()
        scale = want.abs().max().clamp(min=1e-3)
        assert ((entries.values.grad - want) / scale).abs().max() < 2e-5
    assert compared == sara.count > 0
    assert all(p.grad is None for p in net.parameters())


def test_only_entries_below_the_threshold_are_trained_and_the_rest_stays_to_the_bit():
    net = mlp()
    base = states(net)
    sara = SaRA(net, threshold=0.02)
    for name in sara.places:
        small = base[f"{name}.weight"].abs() < 0.02
        assert torch.equal(sara.of(name).index.linear, small.flatten().nonzero()[:, 0])
    optimizer = SparseAdamW(sara, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        call(net).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in net.state_dict().items():
        changed = p != base[name]
        if name.endswith("weight"):
            small = base[name].abs() < 0.02
            assert not changed[~small].any() and changed[small].float().mean() > 0.9
        else:
            assert not changed.any()
    tuned = states(net)
    assert sara.detach() is net and same(states(net), base)
    assert all(p.requires_grad for p in net.parameters())
    sara.attach()
    assert same(states(net), tuned)


@pytest.mark.parametrize("make", [mlp, images])
def test_every_entry_trained_is_dense_training_to_the_bit(make):
    net, dense = make(), make()
    sara = SaRA(net, ratio=1.0)
    sparse = SparseAdamW(sara, lr=3e-3, weight_decay=0.05)
    weights = [m.weight for m in dense if hasattr(m, "weight")]
    adam = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.05)
    for _ in range(10):
        for model, optimizer in ((net, sparse), (dense, adam)):
            optimizer.zero_grad()
            call(model).square().mean().backward()
            optimizer.step()
    for a, b in zip(net, dense, strict=True):
        if hasattr(a, "weight"):
            assert torch.equal(a.weight, b.weight)


def test_neutral_settings_change_nothing():
    net = mlp()
    before, base = call(net), states(net)
    for how in (dict(ratio=0.0), dict(threshold=0.0), dict(index={})):
        if how == dict(index={}):
            with pytest.raises(ValueError, match="index"):
                SaRA(net, index={"0": SparseIndex.of_mask(torch.zeros(2, 2, dtype=torch.bool))})
            continue
        sara = SaRA(net, **how)
        assert sara.count == 0 and torch.equal(call(net), before)
        SparseAdamW(sara).step()
        sara.detach()
        assert same(states(net), base)


def test_gradients_accumulate_as_of_one_batch():
    net = mlp()
    sara = SaRA(net, ratio=0.2)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 24, generator=g)
    net(x).square().sum().backward()
    whole = [sara.of(n).values.grad.clone() for n in sara.places]
    for n in sara.places:
        sara.of(n).values.grad = None
    for part in x.split(3):
        net(part).square().sum().backward()
    for n, want in zip(sara.places, whole, strict=True):
        torch.testing.assert_close(sara.of(n).values.grad, want, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_base_keeps_float32_values():
    net = mlp(torch.bfloat16)
    base = states(net)
    sara = SaRA(net, ratio=0.25)
    assert same(states(net), base)
    optimizer = SparseAdamW(sara, lr=1e-5)  # less than a step of bfloat16
    for _ in range(2):
        call(net).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in sara.places.items():
        entries = sara.of(name)
        assert entries.values.dtype == torch.float32
        assert torch.equal(entries.values.bfloat16(), entries.index.take(layer.weight))
        assert not torch.equal(entries.values, entries.index.take(layer.weight).float())
    sara.detach()
    assert same(states(net), base)


def test_selecting_again_keeps_a_part_and_what_left_stays():
    net = mlp()
    base = states(net)
    sara = SaRA(net, threshold=0.05)
    optimizer = SparseAdamW(sara, lr=2e-2, reselect_at=4)
    first = {n: sara.of(n).index for n in sara.places}
    seen = None
    for step in range(1, 7):
        call(net).square().sum().backward()
        if step == 4:
            seen = states(net)
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            assert same(states(net), seen)  # this one updates nothing
            assert not optimizer.state
    for name in sara.places:
        now, then = sara.of(name).index.linear, first[name].linear
        assert set(now.tolist()) < set(then.tolist())
        kept = seen[f"{name}.weight"].flatten()[now].abs()
        assert (kept < 0.05).all()
        left = torch.tensor(sorted(set(then.tolist()) - set(now.tolist())))
        after = net.state_dict()[f"{name}.weight"].flatten()
        assert torch.equal(after[left], seen[f"{name}.weight"].flatten()[left])
        assert not torch.equal(after[now], seen[f"{name}.weight"].flatten()[now])
    tuned = states(net)
    sara.detach()
    assert same(states(net), base)
    sara.attach()
    assert same(states(net), tuned)


def test_a_file_has_the_values_alone_and_gives_them_back(tmp_path):
    net, other = dit(), dit()
    sara = SaRA(net, ratio=0.05)
    optimizer = SparseAdamW(sara, lr=1e-2, reselect_at=3)
    for _ in range(4):
        call(net).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    path = sara.save(tmp_path / "a.safetensors")
    whole = sum(sara.of(n).whole.count for n in sara.places)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert path.stat().st_size == 4 * whole + header and header < 120 * len(sara.places) + 400
    loaded = adapters.load(other, path)
    assert torch.equal(call(other), call(net)) and same(states(other), states(net))
    loaded.detach()
    assert same(states(other), states(dit()))
    half = sara.save(tmp_path / "b.safetensors", dtype=torch.bfloat16)
    assert half.stat().st_size == 2 * whole + int.from_bytes(half.read_bytes()[:8], "little") + 8


def test_a_file_on_another_base_is_an_error_and_leaves_it_alone(tmp_path):
    net = mlp()
    path = SaRA(net, ratio=0.1).save(tmp_path / "a.safetensors")
    other = mlp()
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    base = states(other)
    with pytest.raises(ValueError, match="does not fit this network.*checksum"):
        adapters.load(other, path)
    assert same(states(other), base) and not adapters.attached(other)
    with pytest.raises(ValueError, match="does not fit"):
        adapters.load(images(), path)


@pytest.mark.parametrize("kind", ["entries", "blocks", "rows"])
def test_positions_of_ones_own(kind, tmp_path):
    net, dense = mlp(), mlp()
    g = torch.Generator().manual_seed(4)
    shape = net[2].weight.shape
    if kind == "entries":
        index = SparseIndex.of_mask(torch.rand(shape, generator=g) < 0.1)
    elif kind == "blocks":
        index = SparseIndex.of_blocks(torch.rand(5, 5, generator=g) < 0.4, (16, 16))
    else:
        index = SparseIndex.of_rows(torch.tensor([1, 40, 79]), shape)
    sara = SaRA(net, index={"2": index})
    call(net).square().sum().backward()
    call(dense).square().sum().backward()
    want = index.take(dense[2].weight.grad)
    torch.testing.assert_close(sara.of("2").values.grad, want, rtol=1e-4, atol=1e-5)
    base = states(net)
    SparseAdamW(sara, lr=1e-2).step()
    assert not same(states(net), base)
    other = mlp()
    path = sara.save(tmp_path / "a.safetensors")
    adapters.load(other, path)
    assert same(states(other), states(net))
    with pytest.raises(ValueError, match="need a threshold"):
        sara.reselect()


def test_the_nuclear_term_is_the_polar_factor_at_the_entries():
    net = mlp(width=100)
    sara = SaRA(net, ratio=0.3, targets=["2"])
    name, found = sara.nuclear(steps=None)
    assert name == "2"
    entries = sara.of("2")
    matrix = torch.zeros(100, 100, requires_grad=True)
    with torch.no_grad():
        entries.index.put_(matrix, entries.values)
    torch.linalg.matrix_norm(matrix, "nuc").backward()
    torch.testing.assert_close(found, entries.index.take(matrix.grad), rtol=1e-3, atol=1e-4)
    u, _, v = torch.linalg.svd(torch.randn(70, 90, dtype=torch.float64), full_matrices=False)
    sizes = torch.linspace(0.05, 1, 70, dtype=torch.float64)
    assert (polar((u * sizes) @ v, 16) - u @ v).abs().max() < 1e-3
    call(net).square().sum().backward()
    plain = entries.values.grad.clone()
    optimizer = SparseAdamW(sara, rank_weight=0.5)
    optimizer.step()
    moved = entries.values.grad - plain
    torch.testing.assert_close(moved, 0.5 * sara_polar(matrix, entries), rtol=0.05, atol=0.05)
    assert SaRA(mlp(width=32), ratio=0.5).nuclear() is None


def sara_polar(matrix, entries):
    return entries.index.take(polar(matrix.detach(), 12))


def test_memory_of_gradients_and_moments_is_that_of_the_entries():
    net = mlp(width=400)
    sara = SaRA(net, ratio=0.05)
    optimizer = SparseAdamW(sara)
    call(net).square().sum().backward()
    grads = [sara.of(n).values.grad for n in sara.places]
    optimizer.step()
    moments = [
        t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
    ]
    held = sum(t.numel() * t.element_size() for t in (*grads, *moments))
    weights = sum(m.weight.numel() for m in sara.places.values())
    assert held <= 0.10 * 3 * 4 * weights
    assert held == 3 * 4 * sara.count


def test_thresholds():
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(30, 20, generator=g), torch.randn(400, generator=g)]
    every = torch.cat([w.flatten() for w in weights]).abs()
    for ratio in (0.0, 0.001, 0.05, 0.5, 0.999):
        theta = threshold_of(weights, ratio)
        assert (every < theta).sum() == round(ratio * 1000)
    assert threshold_of(weights, 1.0) == math.inf
    assert threshold_of([torch.ones(10)], 0.5) <= 1  # ties: none rather than all


def test_caches_begin_anew_and_programs_go_on(tmp_path):
    net = dit()
    sara = SaRA(net, ratio=0.1)
    before = adapters.version(net)
    call(net).square().sum().backward()
    SparseAdamW(sara, lr=1e-2).step()
    assert adapters.version(net) != before
    path = sara.save(tmp_path / "a.safetensors")
    at = {n: p.data_ptr() for n, p in net.named_parameters()}
    sara.load(path)
    assert at == {n: p.data_ptr() for n, p in net.named_parameters()}


def test_two_adapters_on_one_weight_are_an_error():
    net = mlp()
    lora = LoRA(net, 2)
    lora.merge()
    base = states(net)
    with pytest.raises(ValueError, match="written by another adapter"):
        SaRA(net, ratio=0.1)
    lora.unmerge()
    sara = SaRA(net, ratio=0.1)
    with pytest.raises(ValueError, match="written by another adapter"):
        lora.merge()
    with pytest.raises(ValueError, match="written by another adapter"):
        SaRA(net, ratio=0.1)
    sara.detach()
    lora.detach()
    assert same(states(net), base) and not adapters.attached(net)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(), "need one of them"),
        (dict(ratio=0.1, threshold=1.0), "need one of them"),
        (dict(ratio=1.5), "ratio is 1.5, need 0 to 1"),
        (dict(threshold=-1.0), "threshold is -1.0, need 0 or more"),
        (dict(threshold=math.nan), "threshold is nan"),
        (dict(ratio=0.1, targets=["nothing"]), "no layer's name ends in"),
        (dict(index={"9": SparseIndex.of_mask(torch.ones(2, 2) > 0)}), "layer 9"),
        (dict(index={"0": SparseIndex.of_mask(torch.ones(2, 2) > 0)}), r"need a SparseIndex of"),
    ],
)
def test_bad_settings(how, message):
    net = mlp()
    base = states(net)
    with pytest.raises(ValueError, match=message):
        SaRA(net, **how)
    assert same(states(net), base) and not adapters.attached(net)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(lr=-1.0), "lr is -1.0"),
        (dict(betas=(0.9, 1.0)), "betas is"),
        (dict(rank_every=0), "rank_every is 0"),
    ],
)
def test_bad_settings_of_the_optimiser(how, message):
    sara = SaRA(mlp(), ratio=0.1)
    with pytest.raises(ValueError, match=message):
        SparseAdamW(sara, **how)
    assert SparseAdamW(SaRA(mlp(), threshold=2e-3)).param_groups[0]["lr"] == pytest.approx(
        4.966e-4, rel=1e-3
    )


def test_under_checkpointing_and_autocast():
    net = mlp()
    sara = SaRA(net, ratio=0.2)
    x = torch.randn(4, 24)
    net(x).square().sum().backward()
    want = sara.of("2").values.grad.clone()
    sara.of("2").values.grad = None
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(sara.of("2").values.grad, want)
    sara.of("2").values.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).float().square().sum()
    loss.backward()
    got = sara.of("2").values.grad
    assert got.dtype == torch.float32
    assert F.cosine_similarity(got, want, dim=0) > 0.99


def test_on_a_network_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    base = states(net)
    x, t, text = torch.randn(2, 4, 8, 12), torch.tensor([3, 700]), torch.randn(2, 5, 24)
    before = net(x, t, text).sample.detach()
    sara = SaRA(net, ratio=0.05)
    fastdiff.accelerate(net)
    assert torch.equal(net(x, t, text).sample, before)  # training: the network's own layers
    net(x, t, text).sample.square().sum().backward()
    SparseAdamW(sara, lr=1e-2).step()
    with torch.no_grad():
        after = net.eval()(x, t, text).sample
    assert not torch.equal(after, before)
    fastdiff.restore(net)
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, text).sample, after, rtol=1e-3, atol=1e-4)
    sara.detach()
    assert same(states(net), base)
