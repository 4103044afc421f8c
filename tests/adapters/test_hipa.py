"""HiPA: one step, bands of frequencies, the loss, and how many parameters it trains."""

import diffusers
import pytest
import torch
import transformers
from torch.nn import functional as F

from fastdiff import adapters
from fastdiff.adapters import HiPA, high_frequency_loss, one_step
from fastdiff.adapters.hipa import edges, high_pass, low_pass, share
from fastdiff.testing import draw_weights


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24,
        attention_head_dim=4,
    )  # fmt: skip
    text = draw(2, 7, 24, seed=2)

    def call(x, t=999):
        return model(x, t, encoder_hidden_states=text.to(x.dtype)).sample

    return draw_weights(model), call


def fill(lora):
    with torch.no_grad():
        for i, pair in enumerate(lora.pairs.values()):
            pair.up.copy_(0.1 * draw(*pair.up.shape, seed=i))
    return lora


def scheduler(**settings):
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="trailing", **settings,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_one_step_is_the_last_step_of_ddim(kind):
    rule = scheduler(prediction_type={"eps": "epsilon", "v": "v_prediction"}[kind])
    rule.set_timesteps(1)
    (t,) = rule.timesteps
    assert t == 999
    x, out = draw(2, 4, 8, 12), draw(2, 4, 8, 12, seed=2)
    want = rule.step(out, t, x, eta=0.0).prev_sample
    a = rule.alphas_cumprod[t]
    found = one_step(x, out, a.sqrt(), (1 - a).sqrt(), kind)
    assert (found - want).abs().max() < 1e-6 * want.abs().max()
    levels = a.sqrt().expand(2), (1 - a).sqrt().expand(2)
    assert torch.equal(one_step(x, out, *levels, kind), found)


def test_division_is_in_float32():
    x, out = 100 * draw(2, 4, 8, 12), draw(2, 4, 8, 12, seed=2)
    found = one_step(x.half(), out.half(), 1e-3, 1.0)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert found.abs().max() > torch.finfo(torch.float16).max
    want = (x.half().double() - out.half().double()) / 1e-3
    assert (found - want).abs().max() < 1e-6 * want.abs().max()


def test_level_without_signal():
    rule = scheduler(rescale_betas_zero_snr=True)
    a = rule.alphas_cumprod[-1]
    x, out = draw(2, 4, 8, 12), draw(2, 4, 8, 12, seed=2)
    with pytest.raises(ValueError, match="alpha is 0"):
        one_step(x, out, 0.0, 1.0)
    with pytest.raises(ValueError, match="alpha is 0"):
        one_step(x, out, torch.tensor([0.5, 0.0]), torch.tensor([0.8, 1.0]))
    assert a < 1e-10 and torch.equal(one_step(x, out, 0.0, 1.0, "v"), -out)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 8, 13), (1, 1, 7, 6), (5, 1)])
@pytest.mark.parametrize("radius", [0.0, 0.25, 0.7, 1.0, 1.4])
def test_bands_are_the_image_and_orthogonal(shape, radius):
    x = draw(*shape)
    high, low = high_pass(x, radius), low_pass(x, radius)
    assert (high + low - x).abs().max() < 1e-6 * max(1, x.abs().max())
    energy = x.square().sum()
    assert abs(high.square().sum() + low.square().sum() - energy) < 1e-5 * energy
    assert (high_pass(high, radius) - high).abs().max() < 1e-5
    assert low_pass(high, radius).abs().max() < 1e-5
    if radius == 0:
        assert not low.any()
    else:
        assert high.mean((-2, -1)).abs().max() < 1e-6  # of channels


def test_bands_hold_the_frequencies_they_should():
    n = torch.arange(24, dtype=torch.float64)
    waves = {f: torch.cos(torch.pi * f * n) for f in (0.25, 0.5)}  # over half a cycle a pixel
    for f, wave in waves.items():
        for x in (wave.expand(16, 24), wave[:, None].expand(24, 10)):
            assert (low_pass(x, f + 0.01) - x).abs().max() < 1e-12
            assert (high_pass(x, f - 0.01) - x).abs().max() < 1e-12


def test_edges_are_slopes():
    row, column = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    x = torch.stack([3 * column - 2 * row, row * 0 + 5])[None]
    across, down = edges(x)[0]
    assert torch.equal(across[0, :, 1:-1], torch.full((7, 7), 3.0))
    assert torch.equal(down[0, 1:-1], torch.full((5, 9), -2.0))
    assert not across[1].any() and not down[1].any()
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    x = draw(2, 3, 7, 9)
    for found, kernel in zip(edges(x).unbind(1), (sobel, sobel.T), strict=True):
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        want = F.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3)
        assert (found - want).abs().max() < 1e-6


def test_loss_is_0_where_equal_and_nowhere_else():
    x = draw(2, 3, 8, 12)
    assert high_frequency_loss(x, x.clone()) == 0
    for other in (x + 1, x.roll(1, -1), x + 0.01 * draw(2, 3, 8, 12, seed=2)):
        assert high_frequency_loss(x, other) > 1e-3
    one = x.clone()
    one[1, 2, 3, 4] += 1e-3
    assert high_frequency_loss(one, x) > 0
    # Only the spatial term sees the mean.
    assert high_frequency_loss(x, x + 1, spatial=0) < 1e-6


def test_loss_is_the_sum_of_its_terms_and_differentiable():
    x, y = draw(2, 3, 6, 7, dtype=torch.float64), draw(2, 3, 6, 7, seed=2, dtype=torch.float64)
    want = (
        2 * (x - y).abs().mean()
        + 3 * (high_pass(x, 0.4) - high_pass(y, 0.4)).abs().mean()
        + 5 * (edges(x) - edges(y)).abs().mean()
    )
    found = high_frequency_loss(x, y, radius=0.4, spatial=2, fourier=3, edge=5)
    assert abs(found - want) < 1e-12
    own = high_frequency_loss(
        x, y, fourier=0, edge=0, distance=lambda a, b: (a - b).square().mean((1, 2, 3))
    )
    assert abs(own - F.mse_loss(x, y)) < 1e-12
    x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: high_frequency_loss(a, y), x)
    high_frequency_loss(x, y).backward()
    assert y.grad is None
    assert high_frequency_loss(x.detach().bfloat16(), y.detach().bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_scale_0_is_the_base_and_merged_what_runs():
    model, call = unet()
    x, alpha, sigma = draw(2, 4, 16, 24), 0.068, 0.998
    base = {n: t.clone() for n, t in model.state_dict().items()}
    want = one_step(x, call(x), alpha, sigma)
    lora = fill(HiPA(model, 4))
    assert all(".attn" in n for n in lora.places) and len(lora.places) == 8 * 4
    out = one_step(x, call(x), alpha, sigma)
    assert (out - want).abs().max() > 1e-2
    lora.merge()
    assert (one_step(x, call(x), alpha, sigma) - out).abs().max() < 1e-5 * out.abs().max()
    lora.unmerge()
    lora.scale.zero_()
    assert torch.equal(one_step(x, call(x), alpha, sigma), want)
    lora.detach()
    assert torch.equal(one_step(x, call(x), alpha, sigma), want)
    assert all(torch.equal(base[n], t) for n, t in model.state_dict().items())


def test_training_against_many_steps():
    """From the same noise, the frozen network in many steps is the target."""
    model, call = unet()
    rule, x = scheduler(), draw(2, 4, 16, 16)
    rule.set_timesteps(8)
    target = x
    with torch.no_grad():
        for t in rule.timesteps:
            target = rule.step(call(target, t), t, target).prev_sample
    a = rule.alphas_cumprod[-1]
    lora = HiPA(model, 8)
    rate = torch.optim.Adam(lora.trainable(), 1e-2)
    losses = []
    for _ in range(12):
        out = one_step(x, call(x), a.sqrt(), (1 - a).sqrt())
        loss = high_frequency_loss(out, target)
        rate.zero_grad()
        loss.backward()
        rate.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for p in model.parameters())


def test_parameters_on_stable_diffusion_21():
    """By the published configurations; no weight is made."""
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(
            sample_size=96, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024,
            use_linear_projection=True,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                projection_dim=512,
                hidden_act="gelu",
            )  # fmt: skip
        )
    lora = HiPA(model)
    assert len(lora.places) == 16 * 8
    count = sum(p.numel() for p in lora.parameters())
    assert round(count / 1e6, 1) == 3.3
    unet_count = sum(p.numel() for p in model.parameters())
    assert round(unet_count / 1e6) == 866
    assert round(100 * share(lora, model), 2) == 0.38
    assert round(100 * share(lora, model, text, vae), 2) == 0.26
    assert round(count / 0.0004 / 1e9, 1) == 8.3  # the base of which it would be 0.04 %


def test_file_and_bf16(tmp_path):
    model, call = unet()
    model.bfloat16()
    lora = fill(HiPA(model, 2, alpha=4.0))
    with torch.no_grad():
        want = call(draw(2, 4, 16, 24).bfloat16())
    lora.save(tmp_path / "a")
    lora.detach()
    twin = adapters.load(model, tmp_path / "a")
    assert isinstance(twin, HiPA)
    with torch.no_grad():
        assert torch.equal(call(draw(2, 4, 16, 24).bfloat16()), want)


def test_errors():
    x = draw(2, 3, 8, 12)
    for words, do in {
        "need that of x": lambda: one_step(x, x[:1], 0.5, 0.5),
        "kind is 'x0'": lambda: one_step(x, x, 0.5, 0.5, "x0"),
        r"alpha has shape \[3\]": lambda: one_step(x, x, torch.ones(3), 0.5),
        "radius is 2": lambda: high_pass(x, 2),
        "x is torch.int64": lambda: low_pass(x.long()),
        "edges: x has shape": lambda: edges(x[0]),
        "target has shape": lambda: high_frequency_loss(x, x[:1]),
        "weights are": lambda: high_frequency_loss(x, x, spatial=0, fourier=0, edge=0),
        "'edge': -1": lambda: high_frequency_loss(x, x, edge=-1),
        "have no parameters": lambda: share(torch.nn.Linear(2, 2)),
        "fits no Linear": lambda: HiPA(torch.nn.Sequential(torch.nn.Linear(2, 2))),
    }.items():
        with pytest.raises(ValueError, match=words):
            do()
