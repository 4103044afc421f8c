"""DeepCache's plumbing on every kind of U-Net: parts, residuals of others, odd sizes."""

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.cache import DeepCache
from fastdiff.models import UNet
from fastdiff.testing import draw_weights

SIZES = dict(
    block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8, in_channels=4,
    out_channels=4,
)  # fmt: skip
DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def sd15(**more):
    kind = dict(
        down_block_types=DOWN, up_block_types=UP, cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    return draw_weights(diffusers.UNet2DConditionModel(**{**SIZES, **kind, **more}))


def sdxl():
    return sd15(
        down_block_types=DOWN[::-1], up_block_types=UP[::-1], attention_head_dim=(2, 2, 4),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,
    )  # fmt: skip


def classes_only():
    return draw_weights(
        diffusers.UNet2DModel(
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=5,
            sample_size=16, **SIZES,
        )
    )  # fmt: skip


def ours():
    return draw_weights(
        UNet(
            block_out_channels=(16, 32, 32), layers_per_block=2, transformer_depth=(1, 1, 0),
            heads=2, groups=8, cross_attention_dim=24, num_classes=5, class_tokens=3,
        )
    )  # fmt: skip


def inputs(name, height=16, width=16, batch=2):
    torch.manual_seed(1)
    x = torch.randn(batch, 4, height, width)
    if name == "ours":
        return x, dict(t=torch.full((batch,), 400.0), y=torch.arange(batch))
    more = dict(timestep=torch.tensor(400), return_dict=False)
    if name == "classes_only":
        return x, dict(more, class_labels=torch.arange(batch))
    more["encoder_hidden_states"] = torch.randn(batch, 5, 16)
    if name == "sdxl":
        added = dict(text_embeds=torch.randn(batch, 8), time_ids=torch.rand(batch, 6) * 64)
        more["added_cond_kwargs"] = added
    return x, more


MODELS = {f.__name__: f for f in (sd15, sdxl, classes_only, ours)}
BRANCHES = 9  # 3 levels of 2 layers and a join


def out_of(result):
    return result[0] if isinstance(result, tuple) else result


@torch.no_grad()
def same_input_twice(model, policy, x, more):
    """Plain, then a full and a reuse step on one input."""
    plain = out_of(model(x, **more()))
    with fastdiff.accelerated(model, cache=policy, exact=False), fastdiff.request(20, 1) as run:
        full, again = (out_of(model(x, **more())) for _ in range(2))
    assert [e.how for e in run.trace] == ["full", "reuse"]
    assert torch.equal(full, plain)
    return plain, again


@pytest.mark.parametrize("branch", range(BRANCHES))
@pytest.mark.parametrize("name", MODELS)
def test_reuse_of_the_same_input_is_the_full_step(name, branch):
    x, more = inputs(name)
    plain, again = same_input_twice(MODELS[name](), DeepCache(3, branch), x, lambda: dict(more))
    assert torch.equal(again, plain)


@pytest.mark.parametrize("name", MODELS)
def test_no_such_branch(name):
    model = MODELS[name]()
    with pytest.raises(ValueError, match="branch is 9, this network has branches 0 to 8"):
        fastdiff.accelerate(model, cache=DeepCache(3, BRANCHES), exact=False)
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("branch", range(BRANCHES))
def test_odd_sizes_and_masks(branch):
    model = sd15()
    x, more = inputs("sd15", 13, 22)
    more["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    plain, again = same_input_twice(model, DeepCache(2, branch), x, lambda: dict(more))
    assert torch.equal(again, plain)


def controlnet_residuals(model, scale=1.0):
    x, more = inputs("sd15")
    torch.manual_seed(5)
    net = draw_weights(diffusers.ControlNetModel.from_unet(model))
    more.pop("return_dict")
    down, mid = net(x, controlnet_cond=torch.randn(2, 3, 128, 128), return_dict=False, **more)
    return [scale * d for d in down], scale * mid


@torch.no_grad()
@pytest.mark.parametrize("branch", range(BRANCHES))
def test_controlnet_acts_at_reuse_steps(branch):
    model = sd15()
    x, more = inputs("sd15")
    down, mid = controlnet_residuals(model)

    def call(scale=1.0):
        return model(
            x, down_block_additional_residuals=[scale * d for d in down],
            mid_block_additional_residual=scale * mid, **more,
        )[0]  # fmt: skip

    plain, scaled = call(), call(1.5)
    with (
        fastdiff.accelerated(model, cache=DeepCache(3, branch), exact=False),
        fastdiff.request(20, 1),
    ):
        assert torch.equal(call(), plain) and torch.equal(call(), plain)
        assert not torch.equal(call(1.5), plain)
    assert not torch.equal(scaled, plain)


@pytest.mark.parametrize("branch", range(BRANCHES))
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_t2i_adapter(name, branch):
    """A residual a stage of the way down, and one more for the middle."""
    x, more = inputs(name)
    shapes = [(16, 16), (32, 8), (32, 4), (32, 4)]
    if name == "sdxl":  # stages without attention add it after their change of size
        shapes[0] = (16, 8)
    residuals = [torch.randn(2, c, n, n) for c, n in shapes]

    def call():
        return dict(more, down_intrablock_additional_residuals=[r.clone() for r in residuals])

    plain, again = same_input_twice(MODELS[name](), DeepCache(3, branch), x, call)
    assert torch.equal(again, plain)
    without, _ = same_input_twice(MODELS[name](), DeepCache(3, branch), x, lambda: dict(more))
    assert not torch.equal(without, plain)


@pytest.mark.parametrize("branch", range(BRANCHES))
def test_freeu_writes_into_nothing_that_is_kept(branch):
    model = sd15()
    for block in model.up_blocks:
        for name, value in dict(s1=0.9, s2=0.2, b1=1.2, b2=1.4).items():
            setattr(block, name, value)
    x, more = inputs("sd15")
    plain = model(x, **more)[0].detach()
    with torch.no_grad(), fastdiff.accelerated(model, cache=DeepCache(4, branch), exact=False):
        with fastdiff.request(20, 1):
            for _ in range(3):
                assert torch.equal(model(x, **more)[0], plain)


def test_what_is_no_unet():
    for model, need in (
        (torch.nn.Linear(2, 2), "Linear is none of UNet2DModel"),
        (
            draw_weights(
                diffusers.UNet2DModel(
                    down_block_types=("DownBlock2D", "SkipDownBlock2D"),
                    up_block_types=("SkipUpBlock2D", "UpBlock2D"), sample_size=8,
                    block_out_channels=(32, 32),
                )
            ),
            "block SkipDownBlock2D is none of",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=need):
            fastdiff.accelerate(model, cache=DeepCache(3), exact=False)
        assert "forward" not in model.__dict__
