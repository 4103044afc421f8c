"""Networks of diffusers, small and complete, with weights and inputs drawn from a seed."""

import diffusers
import torch

from fastdiff.testing import draw_weights


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    t, y = torch.tensor([10, 900]), torch.tensor([3, 5])
    return draw_weights(model), (draw(2, 4, 8, 8),), {"timestep": t, "class_labels": y}


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=8, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip
    mask = torch.ones(2, 7)
    mask[1, 3:] = 0
    kwargs = dict(
        encoder_hidden_states=draw(2, 7, 24, seed=2), timestep=torch.tensor([10, 900]),
        encoder_attention_mask=mask,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )  # fmt: skip
    return draw_weights(model), (draw(2, 4, 8, 12),), kwargs


def sd3(dual=(), qk_norm=None):
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32,
        pooled_projection_dim=20, out_channels=4, pos_embed_max_size=16,
        dual_attention_layers=dual, qk_norm=qk_norm,
    )  # fmt: skip
    kwargs = dict(
        encoder_hidden_states=draw(2, 7, 24, seed=2), pooled_projections=draw(2, 20, seed=3),
        timestep=torch.tensor([10.0, 900.0]),
    )  # fmt: skip
    return draw_weights(model), (draw(2, 4, 8, 12),), kwargs


def sd35():
    return sd3(dual=(0, 1), qk_norm="rms_norm")


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(5.0))
    kwargs = dict(
        encoder_hidden_states=draw(2, 7, 24, seed=2), pooled_projections=draw(2, 20, seed=3),
        timestep=torch.tensor([0.1, 0.9]), img_ids=grid, txt_ids=torch.zeros(7, 3),
        guidance=torch.tensor([3.5, 2.0]),
    )  # fmt: skip
    return draw_weights(model), (draw(2, 15, 4),), kwargs


def unet(scale_shift="default"):
    model = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, attention_head_dim=16,
        resnet_time_scale_shift=scale_shift,
    )  # fmt: skip
    return draw_weights(model), (draw(2, 3, 16, 24), torch.tensor([10, 900])), {}


def unet_scale_shift():
    return unet("scale_shift")


def sd15():
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24,
        attention_head_dim=4,
    )  # fmt: skip
    mask = torch.ones(2, 7)
    mask[1, 3:] = 0
    kwargs = {"encoder_hidden_states": draw(2, 7, 24, seed=2), "encoder_attention_mask": mask}
    return draw_weights(model), (draw(2, 4, 16, 24), torch.tensor([10, 900])), kwargs


def sdxl():
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=24,
        attention_head_dim=(2, 4), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=68,
    )  # fmt: skip
    added = {"text_embeds": draw(2, 20, seed=3), "time_ids": torch.arange(12.0).view(2, 6)}
    kwargs = {"encoder_hidden_states": draw(2, 7, 24, seed=2), "added_cond_kwargs": added}
    return draw_weights(model), (draw(2, 4, 16, 16), torch.tensor([10, 900])), kwargs


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=24, freq_dim=16, ffn_dim=48, num_layers=2, cross_attn_norm=True,
    )  # fmt: skip
    kwargs = {
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": draw(2, 7, 24, seed=2),
    }
    return draw_weights(model), (draw(2, 4, 2, 8, 12),), kwargs


def hidream(**more):
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[24, 20], text_emb_dim=12, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(16, 16),
        llama_layers=[0, 1, 1], **more,
    )  # fmt: skip
    kwargs = dict(
        timesteps=torch.tensor([10, 900]), encoder_hidden_states_t5=draw(2, 5, 24, seed=2),
        encoder_hidden_states_llama3=draw(2, 2, 7, 20, seed=3), pooled_embeds=draw(2, 12, seed=4),
    )  # fmt: skip
    return draw_weights(model), (draw(2, 4, 16, 16),), kwargs


NETWORKS = (dit, pixart, sd3, sd35, flux, unet, unet_scale_shift, sd15, sdxl, wan)
