"""DiT: published parameter names, equality with an independent implementation, sizes, errors."""

import math

import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import data
from fastdiff.models import DiT, PlainDiT, plain
from fastdiff.testing import assert_close

TINY = dict(
    input_size=8, patch_size=2, in_channels=3, hidden_size=48, depth=2, num_heads=3, num_classes=5
)


def random_weights(model, std=0.1):
    """Values everywhere: with adaLN-Zero's own, every output is 0."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def inputs(model, batch=3, height=8, width=8):
    torch.manual_seed(2)
    x = torch.randn(batch, model.in_channels, height, width)
    return x, torch.rand(batch) * 1000, torch.arange(batch) % (model.num_classes + 1)


def oracle(state, cfg, x, t, y):
    """The published network from its state dict alone, in the dtype of ``x``, head by head."""
    d, heads, p = cfg["hidden_size"], cfg["num_heads"], cfg["patch_size"]
    w = {k: v.to(x.dtype) for k, v in state.items()}

    def lin(name, h):
        return h @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(h, shift, scale):
        centred = h - h.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * (1 + scale[:, None]) + shift[:, None]

    omega = torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)], dtype=x.dtype)
    wave = t.to(x.dtype)[:, None] * omega
    c = lin("t_embedder.mlp.0", torch.cat([wave.cos(), wave.sin()], -1))
    c = lin("t_embedder.mlp.2", c * torch.sigmoid(c)) + w["y_embedder.embedding_table.weight"][y]
    c = c * torch.sigmoid(c)
    rows, columns = x.shape[2] // p, x.shape[3] // p
    position = torch.empty(rows * columns, d)  # float32, as published checkpoints store it
    for n in range(rows * columns):
        for half, at in enumerate((n % columns, n // columns)):
            for i in range(d // 4):
                angle = at / 10000 ** (i / (d / 4))
                position[n, half * d // 2 + i] = math.sin(angle)
                position[n, half * d // 2 + d // 4 + i] = math.cos(angle)
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
    h = h.flatten(2).transpose(1, 2) + position
    for i in range(cfg["depth"]):
        b = f"blocks.{i}."
        s1, k1, g1, s2, k2, g2 = lin(b + "adaLN_modulation.1", c).chunk(6, -1)
        q, k, v = lin(b + "attn.qkv", norm(h, s1, k1)).chunk(3, -1)
        out = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d // heads)
            out.append(scores.softmax(-1) @ v[..., part])
        h = h + g1[:, None] * lin(b + "attn.proj", torch.cat(out, -1))
        n = lin(b + "mlp.fc1", norm(h, s2, k2))
        n = 0.5 * n * (1 + torch.tanh(math.sqrt(2 / math.pi) * (n + 0.044715 * n**3)))
        h = h + g2[:, None] * lin(b + "mlp.fc2", n)
    shift, scale = lin("final_layer.adaLN_modulation.1", c).chunk(2, -1)
    out = lin("final_layer.linear", norm(h, shift, scale))
    channels = out.shape[-1] // p**2
    picture = torch.empty(x.shape[0], channels, *x.shape[2:], dtype=x.dtype)
    for n in range(rows * columns):
        r, s = n // columns * p, n % columns * p
        picture[:, :, r : r + p, s : s + p] = out[:, n].view(-1, p, p, channels).permute(0, 3, 1, 2)
    return picture


def relative(got, need):
    return ((got.double() - need.double()).abs().max() / need.double().abs().max()).item()


def test_names_and_size_of_xl_2():
    with torch.device("meta"):
        model = DiT.preset("DiT-XL/2")
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    need = {
        "pos_embed": [1, 256, 1152],
        "x_embedder.proj.weight": [1152, 4, 2, 2],
        "x_embedder.proj.bias": [1152],
        "t_embedder.mlp.0.weight": [1152, 256],
        "t_embedder.mlp.0.bias": [1152],
        "t_embedder.mlp.2.weight": [1152, 1152],
        "t_embedder.mlp.2.bias": [1152],
        "y_embedder.embedding_table.weight": [1001, 1152],
        "final_layer.linear.weight": [32, 1152],
        "final_layer.linear.bias": [32],
        "final_layer.adaLN_modulation.1.weight": [2304, 1152],
        "final_layer.adaLN_modulation.1.bias": [2304],
    }
    for i in range(28):
        for name, rows, columns in (
            ("attn.qkv", 3456, 1152),
            ("attn.proj", 1152, 1152),
            ("mlp.fc1", 4608, 1152),
            ("mlp.fc2", 1152, 4608),
            ("adaLN_modulation.1", 6912, 1152),
        ):
            need[f"blocks.{i}.{name}.weight"] = [rows, columns]
            need[f"blocks.{i}.{name}.bias"] = [rows]
    assert shapes == need
    assert sum(p.numel() for p in model.parameters()) == 675_129_632


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-B/4", "DiT-L/8"])
def test_presets(name):
    with torch.device("meta"):
        model = DiT.preset(name, learn_sigma=False)
    assert model.patch_size == int(name[-1]) and model.out_channels == 4
    with pytest.raises(ValueError, match="preset is 'DiT-M/2', need"):
        DiT.preset("DiT-M/2")


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (2, 2)])
def test_equals_the_published_network(learn_sigma, size):
    model = random_weights(DiT(**TINY, learn_sigma=learn_sigma))
    x, t, y = inputs(model, 3, *size)
    with torch.no_grad():
        need = oracle(model.state_dict(), TINY, x.double(), t.double(), y)
        got = model(x, t, y)
        assert got.shape == (3, 6 if learn_sigma else 3, *size)
        assert relative(got, need) < 1e-4
        assert relative(plain(model)(x, t, y), need) < 1e-4
        with fastdiff.use("ref", "torch"):
            assert relative(model.double()(x.double(), t.double(), y), need) < 1e-12


def test_bfloat16_as_close_as_plain_torch():
    model = random_weights(DiT(**TINY))
    x, t, y = inputs(model)
    with torch.no_grad():
        exact = oracle(model.state_dict(), TINY, x.double(), t, y)
        model.bfloat16()
        eager = plain(model)(x.bfloat16(), t, y)
        assert_close(model(x.bfloat16(), t, y), exact, eager, what="DiT bf16")


def test_a_batch_gives_what_its_samples_give_alone():
    model = random_weights(DiT(**TINY))
    x, t, y = inputs(model, 4)
    with torch.no_grad():
        together = model(x, t, y)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
        assert relative(together, alone) < 1e-5
        assert model(x[:0], t[:0], y[:0]).shape == (0, 6, 8, 8)


def test_starts_as_zero_and_gradients_flow():
    model = DiT(**TINY)
    x, t, y = inputs(model)
    assert not model(x, t, y).any()
    random_weights(model)
    twin = plain(model)
    model(x, t, y).square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    twin(x, t, y).square().mean().backward()
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            assert relative(grads[name], parameter.grad) < 1e-3, name
    assert model.pos_embed.grad is None


def test_compiles_whole():
    model = random_weights(DiT(**{**TINY, "depth": 1}))
    x, t, y = inputs(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(x, t, y)
        assert relative(compiled, model(x, t, y)) < 1e-4


@pytest.mark.parametrize("kind", [DiT, PlainDiT])
def test_bad_input(kind):
    model = kind(**TINY)
    x, t, y = inputs(model)
    for args, message in (
        ((x[:, :2], t, y), "x has 2 channels, need 3"),
        ((x[..., :7], t, y), "x is 8x7, need a height and width divisible by 2"),
        ((x[0], t, y), r"x has shape \[3, 8, 8\], need 4 dimensions"),
        ((x.long(), t, y), "x is torch.int64"),
        ((x, t[:2], y), r"t is \[2\], need a tensor \[3\]"),
        ((x, 3.0, y), "t is float"),
        ((x, t, y[:2]), r"y is \[2\] torch.int64, need an int64 tensor \[3\]"),
        ((x, t, y.int()), "need an int64 tensor"),
        ((x, t, y + 4), "y has value 6, need 0 to 5"),
        ((x, t, y - 1), "y has value -1, need 0 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*args)


def test_bad_config():
    for change, message in (
        (dict(num_heads=5), "hidden_size is 48"),
        (dict(input_size=9), "input_size is 9"),
        (dict(prediction="x"), "prediction is 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            DiT(**{**TINY, **change})


def scenes(**more):
    config = dict(input_size=64, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2,
                  num_classes=10, learn_sigma=False, prediction="flow", box_size=24)  # fmt: skip
    torch.manual_seed(0)
    model = DiT(**config | more)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_layouts(size):
    """As in plain torch; every token of a box, and no other, gets its class and place."""
    model = scenes()
    g = torch.Generator().manual_seed(0)
    y = data.layouts(4, *size, g)
    x, t = torch.randn(4, 1, *size), torch.rand(4) * 1000
    got = model(x, t, y)
    assert torch.allclose(got, plain(model)(x, t, y), atol=2e-5 * got.abs().max())
    rows, columns = size[0] // 2, size[1] // 2
    table, made = model.y_embedder.embedding_table.weight, model.layout(y, rows, columns)
    for b, boxes in enumerate(y.tolist()):
        for r in range(rows):
            for c in range(columns):
                entry = 10 * 144  # none
                for k, top, left in boxes:
                    if k < 10 and top <= 2 * r < top + 24 and left <= 2 * c < left + 24:
                        entry = k * 144 + (r - top // 2) * 12 + c - left // 2
                assert torch.equal(made[b, r * columns + c], table[entry])


@torch.no_grad()
def test_layouts_of_a_run_and_bad_ones():
    model = scenes(depth=1)
    y = data.layouts(2, generator=torch.Generator().manual_seed(0))
    how = dict(sampler="flow_euler", steps=3, seed=1)
    shape = (2, 1, 64, 64)
    plain = fastdiff.sample(model, shape, classes=y, **how)
    guided = fastdiff.sample(model, shape, classes=y, guidance=2.0, **how)
    assert not torch.equal(plain, guided)
    none = torch.tensor([[[10, 0, 0]]] * 2)
    assert torch.equal(
        fastdiff.sample(model, shape, **how), fastdiff.sample(model, shape, classes=none, **how)
    )
    x, t = torch.randn(shape), torch.rand(2) * 1000
    for bad, message in (
        (y[:, 0], r"y is \[2, 3\] torch.int64, need an int64 tensor \[2, 3, 3\] of boxes"),
        (y.float(), r"y is \[2, 3, 3\] torch.float32, need"),
        (y + torch.tensor([9, 0, 0]), "y's class has value"),
        (y + torch.tensor([0, 64, 0]), "y's top has value"),
        (y - torch.tensor([0, 0, 64]), "y's left has value"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, t, bad)
    with pytest.raises(
        ValueError, match=r"sample: classes is torch.int64 \[2\], need torch.int64 \[2, K, 3\]"
    ):
        fastdiff.sample(model, shape, classes=torch.tensor([1, 2]), **how)
    with pytest.raises(ValueError, match="box_size is 9, need a multiple of patch_size 2"):
        scenes(box_size=9)
