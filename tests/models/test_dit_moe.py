"""DiT-MoE: published parameter names, equality with a loop over tokens, sampling, training."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import cache, nn
from fastdiff.engine import capture_check
from fastdiff.models import DiT, DiTMoE, PlainDiT, PlainDiTMoE, load, plain, save
from fastdiff.models.dit_moe import from_published, to_published
from fastdiff.testing import assert_close, load_file

dits = load_file(Path(__file__).with_name("test_dit.py"))
TINY = dict(dits.TINY, experts=4)
SIZES = [(8, 8), (4, 12), (2, 2)]


def made(**more):
    return dits.random_weights(DiTMoE(**{**TINY, **more}))


class Loop(PlainDiT):
    """The published network: experts by their names, token after token."""

    def __init__(self, model):
        super().__init__(**{k: model.config[k] for k in (*dits.TINY, "learn_sigma")})
        state = to_published(model.state_dict())
        own = self.state_dict()
        self.load_state_dict({k: state.get(k, own[k]) for k in own})
        self.state, self.k = {k: v for k, v in state.items() if ".moe." in k}, model.config["k"]
        self.index = {block: i for i, block in enumerate(self.blocks)}

    def expert(self, name, x):
        gate, up, down = (
            self.state[f"{name}.{w}_proj.weight"].to(x.dtype) for w in ("gate", "up", "down")
        )
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _mlp(self, block, h):
        moe = f"blocks.{self.index[block]}.moe"
        out = []
        for x in h.flatten(0, 1):
            gates = (self.state[f"{moe}.gate.weight"].to(x.dtype) @ x).softmax(0)
            weights, chosen = gates.topk(self.k)
            y = sum(
                w * self.expert(f"{moe}.experts.{e}", x)
                for w, e in zip(weights, chosen.tolist(), strict=True)
            )
            out.append(y + self.expert(f"{moe}.shared_experts", x))
        return torch.stack(out).view(h.shape)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("S/2-8E2A", (384, 12, 6, 8)),
        ("B/2-8E2A", (768, 12, 12, 8)),
        ("XL/2-8E2A", (1152, 28, 16, 8)),
        ("DiT-MoE-G/2-16E2A", (1408, 40, 16, 16)),
    ],
)
def test_presets_have_the_published_names_and_shapes(name, size):
    width, depth, heads, experts = size
    with torch.device("meta"):
        model = DiTMoE.preset(name)
        dense = DiT(hidden_size=width, depth=depth, num_heads=heads)
    assert model.num_heads == heads and model.config["k"] == 2
    shapes = {k: list(v.shape) for k, v in to_published(model.state_dict()).items()}
    need = {k: list(v.shape) for k, v in dense.state_dict().items() if ".mlp.fc" not in k}
    for i in range(depth):
        moe = f"blocks.{i}.moe"
        need[f"{moe}.gate.weight"] = [experts, width]
        mlps = {f"{moe}.experts.{e}": 4 * width for e in range(experts)}
        for mlp, hidden in {**mlps, f"{moe}.shared_experts": 2 * width}.items():
            need[f"{mlp}.gate_proj.weight"] = need[f"{mlp}.up_proj.weight"] = [hidden, width]
            need[f"{mlp}.down_proj.weight"] = [width, hidden]
    assert shapes == need
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    if "G" in name:
        assert 16 < billions < 17  # 16.5 of the paper


@pytest.mark.parametrize("qk_norm", [False, True])
def test_published_state_round_trip(qk_norm):
    model = made(qk_norm=qk_norm)
    state = model.state_dict()
    public = to_published(state)
    assert not any(".up" in k and "up_proj" not in k for k in public)
    back = from_published({k: v.clone() for k, v in public.items()})
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    other = DiTMoE(**TINY, qk_norm=qk_norm)
    other.load_state_dict(back)
    x, t, y = dits.inputs(model)
    with torch.no_grad():
        assert torch.equal(other(x, t, y), model(x, t, y))
    del public["blocks.1.moe.experts.2.up_proj.weight"]
    with pytest.raises(ValueError, match=r"blocks.1.moe.experts.2.up_proj.weight is missing"):
        from_published(public)


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_equals_the_published_network(learn_sigma, size):
    model = made(learn_sigma=learn_sigma)
    x, t, y = dits.inputs(model, 3, *size)
    want = Loop(model).double()(x.double(), t.double(), y)
    got = model(x, t, y)
    assert got.shape == (3, 6 if learn_sigma else 3, *size)
    assert dits.relative(got, want) < 1e-4
    assert dits.relative(plain(model)(x, t, y), want) < 1e-4
    with fastdiff.use("ref", "torch"):
        assert dits.relative(model.double()(x.double(), t.double(), y), want) < 1e-12


@torch.no_grad()
def test_norms_of_heads_and_unit_times():
    model = made(qk_norm=True)
    x, t, y = dits.inputs(model)
    want = model(x, t, y)
    assert dits.relative(plain(model)(x, t, y), want) < 1e-4
    model.qk_norm = False
    assert dits.relative(model(x, t, y), want) > 1e-3
    model.qk_norm, model.unit_time = True, True
    assert dits.relative(model(x, 1000 * t, y), want) < 1e-5


@torch.no_grad()
def test_bfloat16_as_close_as_plain_torch():
    model = made(k=4)  # all experts: no choice for a rounding to change
    x, t, y = dits.inputs(model)
    exact = Loop(model).double()(x.double(), t.double(), y)
    model.bfloat16()
    eager = plain(model)(x.bfloat16(), t, y)
    assert_close(model(x.bfloat16(), t, y), exact, eager, what="DiTMoE bf16")
    assert made().bfloat16()(x.bfloat16(), t, y).isfinite().all()


@torch.no_grad()
def test_a_batch_gives_what_its_samples_give_alone():
    model = made()
    x, t, y = dits.inputs(model, 4)
    together = model(x, t, y)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    assert dits.relative(together, alone) < 1e-5
    assert model(x[:0], t[:0], y[:0]).shape == (0, 6, 8, 8)


def test_gradients_are_those_of_plain_torch():
    model = made()
    twin = plain(model)
    assert isinstance(twin, PlainDiTMoE)
    x, t, y = dits.inputs(model)
    grads = []
    for net in (model, twin):
        with nn.routes() as found:
            loss = net(x, t, y).square().mean()
        (loss + 0.01 * nn.balance_loss(found)).backward()
        grads.append({n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad})
        net.zero_grad()
    for name, grad in grads[0].items():
        assert dits.relative(grad, grads[1][name]) < 1e-3, name
        assert grad.any(), name


@torch.no_grad()
def test_sampling_with_guidance_and_neutral_caches():
    model = made(learn_sigma=False, prediction="flow")
    how = dict(sampler="flow_euler", steps=3, classes=torch.tensor([1, 2]), seed=0, guidance=2.0)
    shape = (2, 3, 4, 8)
    want = fastdiff.sample(model, shape, **how)
    unguided = fastdiff.sample(model, shape, **{**how, "guidance": 1.0})
    assert want.isfinite().all() and not torch.equal(want, unguided)
    for policy in (
        cache.FirstBlock(0),
        cache.Broadcast(1, 1, 1, temporal_attention=1),
        cache.Forecast(1),
    ):
        assert torch.equal(fastdiff.sample(model, shape, cache=policy, **how), want), policy
    with fastdiff.use("ref"), nn.routes() as found:
        assert dits.relative(fastdiff.sample(model, shape, **how), want) < 1e-4
    assert len(found) == 3 * 2  # both halves of guidance in one call


@torch.no_grad()
def test_a_step_can_be_captured():
    model = made(learn_sigma=False)
    x, t, y = dits.inputs(model)
    found = capture_check.check(lambda x: model(x, t, y), (x,))
    assert found.ok, str(found)


@torch.no_grad()
def test_checkpoint(tmp_path):
    model = made(qk_norm=True)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())
    card = save(model, tmp_path / "moe.safetensors", sampler="ddim")
    assert card["model"] == "dit-moe" and card["config"]["experts"] == 4
    again, _ = load(tmp_path / "moe.safetensors")
    twin, _ = load(tmp_path / "moe.safetensors", plain=True)
    assert type(again) is DiTMoE and type(twin) is PlainDiTMoE
    x, t, y = dits.inputs(model)
    assert torch.equal(again(x, t, y), model(x, t, y))
    save(DiT(**dits.TINY), tmp_path / "dit.safetensors")
    assert type(load(tmp_path / "dit.safetensors")[0]) is DiT


def test_starts_as_zero():
    model = DiTMoE(**TINY)
    x, t, y = dits.inputs(model)
    assert not model(x, t, y).any()
    bound = (6 / (48 + 4 * 48)) ** 0.5
    assert model.blocks[0].moe.up.abs().max() <= bound
    assert model.blocks[0].moe.up.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_bad_arguments():
    for change, message in (
        (dict(experts=0), "experts is 0, need an integer of at least 1"),
        (dict(experts=65), "experts is 65, need at most 64"),
        (dict(k=5), "k is 5, need at most 4, the experts"),
        (dict(shared=1.5), "shared is 1.5, need an integer"),
        (dict(num_heads=5), "hidden_size is 48"),
    ):
        with pytest.raises(ValueError, match=message):
            DiTMoE(**{**TINY, **change})
    for name in ("XL/2", "M/2-8E2A", "XL/3-8E2A", "XL/2-8E"):
        with pytest.raises(ValueError, match=f"preset is {name!r}"):
            DiTMoE.preset(name)
    model = DiTMoE(**TINY)
    x, t, y = dits.inputs(model)
    for kind in (model, plain(model)):
        for args, message in (
            ((x[:, :2], t, y), "x has 2 channels, need 3"),
            ((x[..., :7], t, y), "x is 8x7"),
            ((x, t[:2], y), r"t is \[2\], need a tensor \[3\]"),
            ((x, t, y + 4), "y has value 6"),
        ):
            with pytest.raises(ValueError, match=message):
                kind(*args)


@torch.no_grad()
def test_the_shipped_model_as_in_plain_torch():
    """Whole runs, guided, of both; every expert of every layer is used."""
    model, card = load("dit-moe-digits")
    twin, _ = load("dit-moe-digits", plain=True)
    how = dict(steps=6, classes=torch.arange(10), guidance=2.0, sampler="flow_euler")
    with nn.routes() as found:
        got = fastdiff.sample(model, (10, 1, 32, 32), **how)
    want = fastdiff.sample(twin, (10, 1, 32, 32), **how)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    layers = len(model.blocks)
    used = torch.stack([layer.counts for layer in found]).unflatten(0, (-1, layers)).sum(0)
    assert len(found) == 6 * layers and (used > 0).all()
    assert card["config"]["experts"] == 8 and card["training"]["evenness"] < 1.2
