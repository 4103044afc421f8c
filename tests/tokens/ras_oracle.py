"""Facts of microsoft/RAS (commit a9c5ec8) on a seeded SD3; float32, CPU, batch 1 with guidance."""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

FILE = Path(__file__).parents[1] / "data" / "ras_sd3.safetensors"
STEPS, SHIFT, GUIDANCE, START, END, RESETS, STARVATION = 28, 3.0, 5.0, 4, 28, (12, 20), 0.1
RUNS = {"std": (0.5, 0.3), "l2norm": (0.25, 0.1)}  # metric: (sample_ratio, high_ratio)


def network():
    """The network, weights of seed 1 in the order of sorted names; all that is 1-d is 0.02 randn,
    and weights of norms have 1 added (this network has none)."""
    net = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=128,
        pooled_projection_dim=64, out_channels=16, pos_embed_max_size=32,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(net.named_parameters()):
            scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.02
            p.copy_(torch.randn(p.shape, generator=g) * scale)
            if "norm" in name and name.endswith("weight") and p.dim() == 1:
                p.add_(1)
    return net.eval()


def inputs():
    """Latents [1, 16, 32, 32], prompt embeds [2, 20, 64] (uncond, cond), pooled [2, 64]; seed 2."""
    g = torch.Generator().manual_seed(2)
    return tuple(torch.randn(s, generator=g) for s in ((1, 16, 32, 32), (2, 20, 64), (2, 64)))


def expected(run):
    """Facts of ``run`` ("std" or "l2norm"): active [28, n] int16 (-1: dense), final, noise0, ..."""
    return {k.split(".")[1]: v for k, v in load_file(FILE).items() if k.startswith(run + ".")}
