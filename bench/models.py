"""Whole forwards in exact mode against the same weights in plain torch, eager and compiled.

DiT-S/2 (hidden 384, 12 blocks, 6 heads) on 32x32x4 latents: 256 tokens. U-Net: the Stable Diffusion
layout in three levels on 32x32x4 latents with a text-like context of 77 tokens. Batch 2 (guidance).
Weights are seeded and random; zero-initialised layers are re-drawn, or every output is equal. The
last row of each model is its bfloat16 copy against its own float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from _case import Case
from torch import nn

from fastdiff.models import DiT, UNet
from fastdiff.models.baseline import PlainDiT, PlainUNet

COMPILE = "compile"


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every all-zero parameter a small normal draw, so that no branch is closed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return model.eval().requires_grad_(False)


def networks() -> list[tuple[str, nn.Module, nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """(name, ours, plain torch with the same weights, inputs, keyword inputs)."""
    torch.manual_seed(0)
    x, t, y = torch.randn(2, 4, 32, 32), torch.tensor([999.0, 500.0]), torch.tensor([1, 7])
    dit = redraw(DiT.preset("DiT-S/2"))
    plain_dit = PlainDiT(**dit.config).eval().requires_grad_(False)
    plain_dit.load_state_dict(dit.state_dict())
    unet = redraw(
        UNet(
            in_channels=4,
            block_out_channels=(128, 256, 384),
            layers_per_block=1,
            transformer_depth=(1, 1, 1),
            heads=(2, 4, 6),
            cross_attention_dim=384,
        )
    )
    plain_unet = PlainUNet(**unet.config).eval().requires_grad_(False)
    plain_unet.load_state_dict(unet.state_dict())
    context = torch.randn(2, 77, 384)
    return [
        ("DiT-S/2 (2,4,32,32)", dit, plain_dit, (x, t, y), {}),
        ("U-Net (2,4,32,32)", unet, plain_unet, (x, t), {"context": context}),
    ]


def call(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any]:
    """One forward without gradients."""

    @torch.inference_mode()
    def run() -> Any:
        return model(*args, **kwargs)

    return run


def cases() -> list[Case]:
    """Targets: 1.15 over eager, 1.05 over torch.compile, bfloat16 no slower than float32."""
    result, device = [], torch.get_default_device()
    with torch.device("cpu"):  # the same weights for every device
        made = networks()
    for name, ours, plain, args, kwargs in made:
        ours, plain = ours.to(device), plain.to(device)
        args = tuple(a.to(device) for a in args)
        kwargs = {key: value.to(device) for key, value in kwargs.items()}
        fast = call(ours, args, kwargs)
        arms = {"eager": call(plain, args, kwargs)}
        arms[COMPILE] = call(torch.compile(plain), args, kwargs)
        result.append(Case(f"{name} float32", fast, arms, target=1.15, also={COMPILE: 1.05}))
        half = copy.deepcopy(ours).bfloat16()
        rest = {"float32": fast, "eager": call(copy.deepcopy(plain).bfloat16(), args, kwargs)}
        bf16 = call(half, args, kwargs)
        title = f"{name} bfloat16"
        result.append(Case(title, bf16, rest, target=1.0, vs="float32", comparable=False))
    return result
