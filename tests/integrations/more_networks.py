"""More networks of diffusers, of which caches know the modules; small, drawn from seeds."""

import diffusers
import torch

from fastdiff.testing import draw_weights


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HEADS = dict(num_attention_heads=2, attention_head_dim=16)
VIDEO = dict(in_channels=4, out_channels=4, num_layers=2)
T = torch.tensor([10, 900])


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS, **VIDEO, time_embed_dim=8, text_embed_dim=24, sample_width=8, sample_height=8,
        sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=7,
    )  # fmt: skip
    kwargs = {"encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": T}
    return draw_weights(model), (draw(2, 2, 4, 8, 8),), kwargs


def latte():
    model = diffusers.LatteTransformer3DModel(
        **HEADS, **VIDEO, cross_attention_dim=32, sample_size=8, patch_size=2, caption_channels=24,
        norm_type="ada_norm_single", num_embeds_ada_norm=1000, video_length=3, attention_bias=True,
        norm_elementwise_affine=False, activation_fn="gelu-approximate",
    )  # fmt: skip
    kwargs = {"encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": T}
    return draw_weights(model), (draw(2, 4, 3, 8, 8),), kwargs


def animatediff():
    model = diffusers.UNetMotionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=24,
        num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=4,
    )  # fmt: skip
    kwargs = {"encoder_hidden_states": draw(6, 7, 24, seed=2)}  # a prompt for each frame
    return draw_weights(model), (draw(2, 4, 3, 8, 8), T), kwargs


def svd():
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=24, num_attention_heads=2, num_frames=3,
        projection_class_embeddings_input_dim=24, addition_time_embed_dim=8,
    )  # fmt: skip
    kwargs = {
        "encoder_hidden_states": draw(2, 1, 24, seed=2),
        "added_time_ids": torch.arange(6.0).view(2, 3),
    }
    return draw_weights(model), (draw(2, 3, 8, 8, 8), T), kwargs


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        **HEADS, **VIDEO, cross_attention_dim=32, caption_channels=24
    )
    kwargs = {
        "encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": T,
        "encoder_attention_mask": torch.ones(2, 7), "num_frames": 2, "height": 4, "width": 4,
    }  # fmt: skip
    return draw_weights(model), (draw(2, 32, 4),), kwargs


def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS, **VIDEO, num_single_layers=2, num_refiner_layers=1, text_embed_dim=24,
        pooled_projection_dim=20, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    kwargs = {
        "encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": T,
        "encoder_attention_mask": torch.ones(2, 7), "pooled_projections": draw(2, 20, seed=3),
        "guidance": torch.tensor([3000.0, 2000.0]),
    }  # fmt: skip
    return draw_weights(model), (draw(2, 4, 2, 8, 8),), kwargs


def mochi():
    model = diffusers.MochiTransformer3DModel(
        **HEADS, **VIDEO, pooled_projection_dim=20, text_embed_dim=24, time_embed_dim=8
    )
    kwargs = {
        "encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": T,
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
    }  # fmt: skip
    return draw_weights(model), (draw(2, 4, 2, 8, 8),), kwargs


def qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        **HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    kwargs = {
        "encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": torch.tensor([0.1, 0.9]),
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.bool),
        "img_shapes": [[(1, 3, 5)]] * 2,
    }  # fmt: skip
    return draw_weights(model), (draw(2, 15, 16),), kwargs


def allegro():
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, **VIDEO, cross_attention_dim=48,
        sample_height=8, sample_width=8, sample_frames=2, caption_channels=24,
    )  # fmt: skip
    kwargs = {"encoder_hidden_states": draw(2, 1, 7, 24, seed=2), "timestep": T}
    return draw_weights(model), (draw(2, 4, 2, 8, 8),), kwargs


def sana():
    model = diffusers.SanaTransformer2DModel(
        **HEADS, **VIDEO, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=24, sample_size=8,
    )  # fmt: skip
    kwargs = {"encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": T}
    return draw_weights(model), (draw(2, 4, 8, 8),), kwargs


def chroma():
    model = diffusers.ChromaTransformer2DModel(
        **HEADS, in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(5.0))
    kwargs = {
        "encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": grid, "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip
    return draw_weights(model), (draw(2, 15, 4),), kwargs


def cogview4():
    model = diffusers.CogView4Transformer2DModel(
        **HEADS, **VIDEO, text_embed_dim=24, time_embed_dim=8, condition_dim=4, rope_axes_dim=(8, 8)
    )
    size = torch.tensor([[64.0, 64.0]] * 2)
    kwargs = {
        "encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": T, "original_size": size,
        "target_size": size, "crop_coords": 0 * size,
    }  # fmt: skip
    return draw_weights(model), (draw(2, 4, 8, 8),), kwargs


def flux2():
    model = diffusers.Flux2Transformer2DModel(
        **HEADS, in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=24,
        timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    grid = torch.cartesian_prod(*(torch.arange(n) for n in (1.0, 3.0, 5.0, 1.0)))
    kwargs = {
        "encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": grid, "txt_ids": torch.zeros(7, 4), "guidance": torch.tensor([3.5, 2.0]),
    }  # fmt: skip
    return draw_weights(model), (draw(2, 15, 4),), kwargs


def lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 8),
        axes_lens=(20, 20, 20), cap_feat_dim=24,
    )  # fmt: skip
    kwargs = {
        "encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": torch.tensor([0.1, 0.9]),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
    }  # fmt: skip
    return draw_weights(model), (draw(2, 4, 8, 8),), kwargs


def aura_flow():
    model = diffusers.AuraFlowTransformer2DModel(
        **HEADS, sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, joint_attention_dim=24,
        caption_projection_dim=32, pos_embed_max_size=32,
    )  # fmt: skip
    kwargs = {"encoder_hidden_states": draw(2, 7, 24, seed=2), "timestep": torch.tensor([0.1, 0.9])}
    return draw_weights(model), (draw(2, 4, 8, 8),), kwargs


def hunyuan_dit():
    model = diffusers.HunyuanDiT2DModel(
        **HEADS, in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=2,
        cross_attention_dim=24, cross_attention_dim_t5=24, pooled_projection_dim=16, text_len=3,
        text_len_t5=4, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    kwargs = {
        "timestep": T.float(), "encoder_hidden_states": draw(2, 3, 24, seed=2),
        "text_embedding_mask": torch.ones(2, 3), "text_embedding_mask_t5": torch.ones(2, 4),
        "encoder_hidden_states_t5": draw(2, 4, 24, seed=3),
        "image_rotary_emb": list(draw(2, 16, 16, seed=4)),
    }  # fmt: skip
    return draw_weights(model), (draw(2, 4, 8, 8),), kwargs


def wan_vace():
    model = diffusers.WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=24, freq_dim=16, ffn_dim=48, num_layers=2, vace_layers=[0],
        vace_in_channels=8,
    )  # fmt: skip
    kwargs = {
        "timestep": T, "encoder_hidden_states": draw(2, 7, 24, seed=2),
        "control_hidden_states": draw(2, 8, 2, 8, 12, seed=3),
    }  # fmt: skip
    return draw_weights(model), (draw(2, 4, 2, 8, 12),), kwargs


def z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=24, axes_dims=[4, 4, 8], axes_lens=[64, 16, 16],
    )  # fmt: skip
    return draw_weights(model), (
        list(draw(2, 4, 1, 8, 8)), torch.tensor([0.1, 0.9]), list(draw(2, 7, 24, seed=2)),
    ), {}  # fmt: skip


NETWORKS = (
    cogvideox, latte, animatediff, svd, ltx, hunyuan_video, mochi, qwen_image, allegro, sana,
    chroma, cogview4, flux2, lumina2, aura_flow, hunyuan_dit, wan_vace, z_image,
)  # fmt: skip
