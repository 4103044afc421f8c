"""SCEdit: neutral, gradients with the way down cut off, control images, and caches beside it."""

import diffusers
import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import adapters
from fastdiff.adapters import CSCTuner, SCTuner
from fastdiff.cache import DeepCache
from fastdiff.models import DiT, UNet
from fastdiff.testing import draw_weights

STEPS = 5


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ours():
    model = UNet(4, 4, (16, 32), 1, (0, 1), 1, heads=2, groups=8, cross_attention_dim=16,
                 num_classes=10)  # fmt: skip
    return draw_weights(model).eval(), lambda x, t=300: model(
        x, torch.full((len(x),), float(t)), torch.arange(len(x)) % 3
    )


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
    ).eval(), lambda x, t=300: model(x, t, text.to(x.dtype).expand(len(x), -1, -1)).sample


def pixels():
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    return draw_weights(model).eval(), lambda x, t=300: model(x, t).sample


NETWORKS = {"UNet": ours, "sd15": sd15, "UNet2D": pixels}
KINDS = {"sc": SCTuner, "csc": CSCTuner}
X, IMAGE = draw(2, 4, 8, 8), draw(1, 3, 64, 64, seed=7)


def state_of(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in state)


def fill(adapter, seed=1):
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.copy_(0.1 * draw(*p.shape, seed=100 * seed + i))
    return adapter


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_neutral_files_and_taken_back(name, kind, tmp_path):
    model, call = NETWORKS[name]()
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    base, before = state_of(model), call(X).detach()
    tuner = KINDS[kind](model)
    if kind == "csc":
        assert torch.equal(call(X), before)
        tuner.see(IMAGE)
    assert torch.equal(call(X), before) and same(model, base)
    fill(tuner)
    after = call(X).detach()
    assert (after - before).abs().max() > 1e-3
    tuner.scale.fill_(0.0)
    assert torch.equal(call(X), before)
    tuner.scale.fill_(1.0)
    path = tuner.save(tmp_path / "a.safetensors")
    assert tuner.detach() is model and same(model, base) and torch.equal(call(X), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    tuner.attach()
    assert torch.equal(call(X), after)
    with pytest.raises(ValueError, match="nothing to merge"):
        tuner.merge()
    other, call_other = NETWORKS[name]()
    loaded = adapters.load(other, path)
    if kind == "csc":
        loaded.see(IMAGE)
    assert torch.equal(call_other(X), after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_with_the_way_down_cut_off(name, kind):
    found, alive = {}, {}
    for frozen in (False, True):
        model, call = NETWORKS[name]()
        tuner = fill(KINDS[kind](model, frozen_encoder=frozen))
        if kind == "csc":
            tuner.see(IMAGE)
        call(X).square().sum().backward()
        found[frozen] = [p.grad.clone() for p in tuner.parameters()]
        x, kept = X.clone().requires_grad_(), {}

        class Kept:
            def __init__(self, t, kept=kept):
                self.t, self.kept = t, kept
                kept[id(self)] = t.numel() * t.element_size()

            def __del__(self):
                del self.kept[id(self)]

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda k: k.t):
            out = call(x)
        alive[frozen] = sum(kept.values())
        out.square().sum().backward()
        assert (x.grad is None) is frozen
        assert all(p.grad is None for p in model.parameters())
        if frozen:
            tuner.eval()
            assert torch.autograd.grad(call(x).sum(), x)[0].any()
    assert all(map(torch.equal, found[False], found[True]))
    assert alive[True] < (0.75 if kind == "sc" else 1) * alive[False]  # hints keep theirs


def test_sc_is_the_equation():
    model, call = sd15()
    model.double()
    tuner = fill(SCTuner(model, 0.5, skips=[1]).double())
    assert list(tuner.tuners) == ["1"] and tuner.tuners["1"].down.out_features == 8
    seen = []
    block = model.up_blocks[-1]
    tuner.detach()
    handle = block.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["res_hidden_states_tuple"]), with_kwargs=True
    )
    call(X.double())
    handle.remove()
    tuner.attach()
    tuner.scale.fill_(0.7)
    handle = block.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["res_hidden_states_tuple"]), with_kwargs=True
    )
    call(X.double())
    handle.remove()
    (s0, s1), (t0, t1) = seen
    own = tuner.tuners["1"]
    p = s1.flatten(2).mT
    want = F.gelu(p @ own.down.weight.T + own.down.bias) @ own.up.weight.T + own.up.bias
    assert torch.equal(s0, t0)
    torch.testing.assert_close(t1, s1 + 0.7 * want.mT.view_as(s1), rtol=1e-6, atol=1e-7)


def test_gradients_of_a_tuner_and_of_hints_in_float64():
    model, call = sd15()
    model.double()
    tuner = fill(CSCTuner(model, 0.25, skips=[1, 2]).double())
    tuner.see(IMAGE.double())
    x, g = X.double(), draw(2, 4, 8, 8, seed=3, dtype=torch.float64)
    (call(x) * g).sum().backward()
    for p in (tuner.encoders[0].first[0].weight, tuner.tuners[0]["2"].up.bias,
              tuner.encoders[0].zero[1].bias):  # fmt: skip
        old, step = p.detach().clone(), draw(*p.shape, seed=4, dtype=torch.float64)
        values = []
        for size in (1e-5, -1e-5):
            with torch.no_grad():
                p.copy_(old + size * step)
                values.append((call(x) * g).sum())
                p.copy_(old)
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((p.grad * step).sum(), slope, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_hints_are_computed_once_for_all_steps():
    model, call = sd15()
    tuner = fill(CSCTuner(model))
    tuner.see(IMAGE)
    first = [call(X, t) for t in (900, 500, 10)]
    assert tuner.computed == 1
    where = [h.data_ptr() for h in tuner._known[0]]
    tuner.see(2 * IMAGE)
    other = call(X, 900)
    assert tuner.computed == 2 and [h.data_ptr() for h in tuner._known[0]] == where
    assert not torch.equal(other, first[0])
    tuner.see(IMAGE)
    assert all(torch.equal(call(X, t), y) for t, y in zip((900, 500, 10), first, strict=True))
    fill(tuner, 2)  # hints of other weights are others
    again = call(X, 900)
    tuner.see(IMAGE)
    assert torch.equal(call(X, 900), again)
    tuner.see(None)
    tuner.detach()
    base = call(X)
    tuner.attach()
    assert torch.equal(call(X), base)


@torch.no_grad()
def test_several_images_and_their_scales():
    model, call = ours()
    tuner = fill(CSCTuner(model, hints=2))
    a, b = draw(2, 3, 64, 64, seed=5), draw(2, 3, 64, 64, seed=6)
    tuner.see([a, b])
    both = call(X)
    tuner.see([a, None])
    one = call(X)
    tuner.see([a, b])
    tuner.scales[1] = 0.0
    assert torch.equal(call(X), one) and not torch.equal(both, one)
    tuner.scales[1] = 1.0
    for i in range(2):  # rows have their own image
        tuner.see([a[i : i + 1].expand(2, -1, -1, -1), b[i : i + 1].expand(2, -1, -1, -1)])
        torch.testing.assert_close(call(X)[i], both[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_beside_deepcache(name, kind):
    model, call = NETWORKS[name]()
    tuner = fill(KINDS[kind](model))
    if kind == "csc":
        tuner.see(IMAGE)

    def loop():
        with fastdiff.request(steps=STEPS), torch.no_grad():
            return [call(X + 0.1 * i, 900 - 100 * i) for i in range(STEPS)]

    fastdiff.accelerate(model)
    plain = loop()
    fastdiff.restore(model)
    fastdiff.accelerate(model, cache=DeepCache(interval=1))
    assert all(map(torch.equal, loop(), plain))
    fastdiff.restore(model)
    fastdiff.accelerate(model, cache=DeepCache(interval=2))
    found = loop()
    assert torch.equal(found[0], plain[0]) and not torch.equal(found[1], plain[1])
    with torch.no_grad():
        tuner.scale.fill_(0.0)
    assert not torch.equal(loop()[1], found[1])  # the skip of a reuse step is tuned
    fastdiff.restore(model)


def test_a_bfloat16_base():
    model, call = sd15()
    model.bfloat16()
    x = X.bfloat16()
    before = call(x)
    tuner = CSCTuner(model)
    tuner.see(IMAGE)
    assert torch.equal(call(x), before)
    fill(tuner)
    call(x).float().square().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in tuner.parameters())


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("sc", dict(ratio=0.0), "ratio is 0.0, need above 0"),
        ("sc", dict(skips=[]), "skips is"),
        ("sc", dict(skips=[0, 0]), "each once"),
        ("sc", dict(skips=[99]), "is 99, need a whole number 0 to 3"),
        ("csc", dict(hints=0), "hints is 0"),
    ],
)
def test_bad_settings(kind, how, message):
    model, _ = sd15()
    base = state_of(model)
    with pytest.raises(ValueError, match=message):
        KINDS[kind](model, **how)
    assert same(model, base) and not adapters.attached(model)
    assert all(p.requires_grad for p in model.parameters())


def test_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="network is DiT, need a U-Net"):
        SCTuner(DiT(input_size=8, hidden_size=32, depth=1, num_heads=2))
    model, call = sd15()
    tuner = CSCTuner(model)
    for images in ([IMAGE, IMAGE], IMAGE[:, :2], IMAGE[0]):
        with pytest.raises(ValueError, match="need"):
            tuner.see(images)
    tuner.see(IMAGE[..., :32])
    with pytest.raises(ValueError, match="need an image of 8 times"):
        call(X)
    tuner.see(IMAGE.repeat(3, 1, 1, 1))
    with pytest.raises(ValueError, match="a part of its batch"):
        call(X)
    path = tuner.save(tmp_path / "a.safetensors")
    other, _ = ours()
    mine = SCTuner(other)
    with pytest.raises(ValueError, match="its method is csc_tuner, need sc_tuner"):
        mine.load(path)
    mine.detach()
    wide = draw_weights(UNet(4, 4, (32, 64), 1, (0, 1), 1, heads=2, groups=8,
                             cross_attention_dim=16, num_classes=10))  # fmt: skip
    base = state_of(wide)
    with pytest.raises(ValueError, match="a.safetensors.*has shape"):
        adapters.load(wide, path)
    assert same(wide, base) and not adapters.attached(wide)
