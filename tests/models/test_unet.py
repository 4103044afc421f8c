"""UNet: equality with diffusers' on the same state dict, plain twin, sizes, errors."""

import pytest
import torch

import fastdiff
from fastdiff.models import PlainUNet, UNet, plain
from fastdiff.testing import assert_close

TINY = dict(
    in_channels=3,
    out_channels=3,
    block_out_channels=(16, 32, 32),
    layers_per_block=1,
    transformer_depth=(1, 1, 0),
    heads=2,
    groups=8,
    cross_attention_dim=24,
)
CLASSES = dict(num_classes=5, class_tokens=3)


def random_weights(model, std=0.1):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=std)
        if "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    return model.eval()


def inputs(model, batch=2, height=8, width=8, tokens=7):
    torch.manual_seed(2)
    x = torch.randn(batch, model.in_channels, height, width)
    context = torch.randn(batch, tokens, model.cross_attention_dim)
    return x, torch.rand(batch) * 999, context


def relative(got, need):
    return ((got.double() - need.double()).abs().max() / need.double().abs().max()).item()


def diffusers_twin(model, linear=True):
    diffusers = pytest.importorskip("diffusers")
    c = model.config
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in c["transformer_depth"]]
    up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(c["transformer_depth"])]
    return diffusers.UNet2DConditionModel(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        down_block_types=down,
        up_block_types=up,
        block_out_channels=c["block_out_channels"],
        layers_per_block=c["layers_per_block"],
        norm_num_groups=c["groups"],
        cross_attention_dim=c["cross_attention_dim"],
        attention_head_dim=c["heads"],  # diffusers' name for the number of heads
        use_linear_projection=linear,
        resnet_time_scale_shift="scale_shift" if c["scale_shift"] else "default",
    ).eval()


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_equals_diffusers(scale_shift, size):
    model = random_weights(UNet(**TINY, scale_shift=scale_shift))
    twin = diffusers_twin(model)
    twin.load_state_dict(model.state_dict())
    x, t, context = inputs(model, 2, *size)
    with torch.no_grad():
        exact = twin.double()(x.double(), t, context.double()).sample
        eager = twin.float()(x, t, context).sample
        assert relative(eager, exact) < 1e-4
        assert relative(model(x, t, context=context), exact) < 1e-4
        assert relative(plain(model)(x, t, context=context), exact) < 1e-4
        with fastdiff.use("ref", "torch"):
            double = model.double()(x.double(), t, context=context.double())
        assert relative(double, exact) < 1e-6  # the sinusoids of the time are float32


def test_loads_projections_stored_as_convolutions():
    model = random_weights(UNet(**TINY))
    twin = diffusers_twin(model, linear=False)
    model.load_state_dict(twin.state_dict())
    x, t, context = inputs(model)
    with torch.no_grad():
        assert relative(model(x, t, context=context), twin(x, t, context).sample) < 1e-4


def test_stable_diffusion_1_size():
    with torch.device("meta"):
        model = UNet()
    assert sum(p.numel() for p in model.parameters()) == 859_520_964


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_classes_and_plain_twin(size):
    model = random_weights(UNet(**TINY, **CLASSES))
    x, t, _ = inputs(model, 3, *size)
    y = torch.tensor([0, 5, 2])
    with torch.no_grad():
        got = model(x, t, y)
        assert relative(got, plain(model)(x, t, y)) < 1e-5
        assert relative(got, model(x, t, context=model.tokens(y, None))) < 1e-6
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
        assert relative(got, alone) < 1e-5
        assert model(x[:0], t[:0], y[:0]).shape == (0, 3, *size)


def test_bfloat16_as_close_as_plain_torch():
    model = random_weights(UNet(**TINY))
    x, t, context = inputs(model)
    with torch.no_grad():
        exact = plain(model).double()(x.double(), t, context=context.double())
        model.bfloat16()
        x, context = x.bfloat16(), context.bfloat16()
        eager = plain(model)(x, t, context=context)
        assert_close(model(x, t, context=context), exact, eager, what="UNet bf16")


def test_gradients_flow():
    model = random_weights(UNet(**TINY, **CLASSES))
    twin = plain(model)
    x, t, _ = inputs(model)
    y = torch.tensor([0, 5])
    model(x, t, y).square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    twin(x, t, y).square().mean().backward()
    largest = max(p.grad.abs().max() for p in twin.parameters())
    for name, parameter in twin.named_parameters():
        # A bias before a GroupNorm has gradient 0 up to rounding, hence the common scale.
        assert (grads[name] - parameter.grad).abs().max() < 1e-4 * largest, name


def test_compiles_whole():
    small = {**TINY, "block_out_channels": (8, 8), "transformer_depth": (0, 1)}
    model = random_weights(UNet(**small))
    x, t, context = inputs(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, context=context)
        assert relative(compiled, model(x, t, context=context)) < 1e-4


@pytest.mark.parametrize("kind", [UNet, PlainUNet])
def test_bad_input(kind):
    model = kind(**TINY, **CLASSES)
    x, t, context = inputs(model)
    y = torch.tensor([0, 5])
    for args, named, message in (
        ((x[:, :2], t, y), {}, "x has 2 channels, need 3"),
        ((x[..., :6], t, y), {}, "x is 8x6, need a height and width divisible by 4"),
        ((x, t[:1], y), {}, r"t is \[1\], need a tensor \[2\]"),
        ((x, t, y + 1), {}, "y has value 6, need 0 to 5"),
        ((x, t, y.float()), {}, "need an int64 tensor"),
        ((x, t), {}, "need exactly one of y and context"),
        ((x, t, y), dict(context=context), "need exactly one of y and context"),
        (
            (x, t),
            dict(context=context[..., :5]),
            r"context has shape \[2, 7, 5\], need \[2, L, 24\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(*args, **named)
    with pytest.raises(ValueError, match="this network has no classes, need context"):
        kind(**TINY)(x, t, y * 0)


def test_bad_config():
    for change, message in (
        (dict(heads=(1, 2)), "heads has 2 and transformer_depth 3 entries, need 3"),
        (dict(groups=5), "block_out_channels has 16, need multiples of groups 5"),
        (dict(prediction="x"), "prediction is 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            UNet(**{**TINY, **change})
