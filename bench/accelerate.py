"""Networks of diffusers under ``accelerate``'s exact mode against themselves, eager and (with
``--compile``) compiled.

Configurations of 12-30 M parameters, float32, batch 1, with seeded random weights: 32x32 latents
(256 tokens with patch 2) and 77 text tokens where the network reads text. The shipped networks as
diffusers' classes with their trained weights, at batch 8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from _case import Case
from torch import nn

import fastdiff
from fastdiff.testing import draw_weights, load_file

digits = load_file(Path(__file__).resolve().parent / "_digits.py")


def dit() -> tuple[nn.Module, dict[str, Any]]:
    """Eight blocks of width 384."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=8,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return model, dict(
        hidden_states=torch.randn(1, 4, 32, 32), timestep=torch.tensor([500]),
        class_labels=torch.tensor([7]),
    )  # fmt: skip


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    """Eight blocks of width 384 with masked cross-attention."""
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=8,
        cross_attention_dim=384, sample_size=32, caption_channels=512,
        use_additional_conditions=False,
    )  # fmt: skip
    mask = (torch.arange(77)[None] < 20).float()
    return model, dict(
        hidden_states=torch.randn(1, 4, 32, 32), timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 77, 512), encoder_attention_mask=mask,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )  # fmt: skip


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    """Six joint blocks of width 384 with normed queries and keys."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=64,
        num_attention_heads=6, joint_attention_dim=512, caption_projection_dim=384,
        pooled_projection_dim=256, out_channels=4, pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    return model, dict(
        hidden_states=torch.randn(1, 4, 32, 32), timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 77, 512), pooled_projections=torch.randn(1, 256),
    )  # fmt: skip


def flux() -> tuple[nn.Module, dict[str, Any]]:
    """Four double and eight single blocks of width 384."""
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=4, num_single_layers=8, attention_head_dim=64,
        num_attention_heads=6, joint_attention_dim=512, pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0))
    return model, dict(
        hidden_states=torch.randn(1, 256, 16), timestep=torch.tensor([0.5]), img_ids=grid,
        encoder_hidden_states=torch.randn(1, 77, 512), txt_ids=torch.zeros(77, 3),
        pooled_projections=torch.randn(1, 256),
    )  # fmt: skip


def unet() -> tuple[nn.Module, dict[str, Any]]:
    """Stable Diffusion 1.5's layout in three levels."""
    model = diffusers.UNet2DConditionModel(
        sample_size=32, block_out_channels=(128, 256, 384), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=384, attention_head_dim=8,
    )  # fmt: skip
    return model, dict(
        sample=torch.randn(1, 4, 32, 32), timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 77, 384),
    )  # fmt: skip


def unconditional() -> tuple[nn.Module, dict[str, Any]]:
    """A U-Net on pixels with attention in the lower level."""
    model = diffusers.UNet2DModel(
        sample_size=64, block_out_channels=(64, 128, 256), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), attention_head_dim=64,
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    return model, dict(sample=torch.randn(1, 3, 64, 64), timestep=torch.tensor([500]))


def wan() -> tuple[nn.Module, dict[str, Any]]:
    """Six blocks of width 384 on a clip of three latent frames."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=6, attention_head_dim=64, in_channels=4,
        out_channels=4, text_dim=512, freq_dim=256, ffn_dim=1536, num_layers=6,
        cross_attn_norm=True,
    )  # fmt: skip
    return model, dict(
        hidden_states=torch.randn(1, 4, 3, 16, 24), timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 77, 512),
    )  # fmt: skip


def call(model: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[[], Any]:
    """One forward without gradients, as a pipeline makes it."""

    @torch.no_grad()
    def run() -> Any:
        return model(**kwargs, return_dict=False)[0]

    return run


def run(model: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[[], Any]:
    """One forward of a shipped network."""
    return torch.no_grad()(lambda: model(**kwargs))


def cases() -> list[Case]:
    """One row a network; ``--compile`` adds torch.compile of the plain one."""
    result = []
    for make in (dit, pixart, sd3, flux, unet, unconditional, wan):
        torch.manual_seed(0)
        plain, kwargs = make()
        draw_weights(plain, 0.02).requires_grad_(False)
        ours = fastdiff.accelerate(copy.deepcopy(plain))
        arms = {"eager": call(plain, kwargs)}
        result.append(Case(f"{make.__name__} float32", call(ours, kwargs), arms, target=1.0))
    for name in ("dit-digits", "unet-digits"):
        adapter = digits.Digits(name, 8).plain.to(torch.empty(0).device)
        kwargs = dict(x=torch.randn(8, 1, 32, 32), t=torch.full((8,), 500.0), y=torch.arange(8))
        ours = adapter.twin()
        fastdiff.accelerate(ours.net)
        arms = {"eager": run(adapter, kwargs)}
        result.append(Case(f"{name} float32, batch 8", run(ours, kwargs), arms, target=1.0))
    return result
