"""Adapters on whole networks of diffusers: a training step, eight adapters in a batch, a swap.

A DiT (width 384, 8 blocks, 256 tokens) and a U-Net in Stable Diffusion's layout (128, 256, 384
channels on 32 x 32 latents, a context of 77 tokens), batch 4, seeded weights. A step is the forward
and backward passes and the optimiser. "masked" is the common recipe of sparse fine-tuning: dense
gradients times masks, AdamW on the dense weights. "peft" is PEFT's LoRA with as many parameters as
SaRA's 5 % of the layers that both adapt, and AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from _case import Case
from torch import Tensor, nn

from fastdiff.adapters import LoRA, SaRA, SparseAdamW
from fastdiff.models.baseline import PlainDiT

RATIO = 0.05
BATCH = 4
SLOTS = 8


def _redraw(model: nn.Module) -> nn.Module:
    """Small draws in the place of zeros, so that no branch is closed."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=g))
    return model


def networks() -> dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    """Each with a call that gives its output for one batch."""
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=8,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(128, 256, 384),
        layers_per_block=1, cross_attention_dim=384, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    x, t = torch.randn(BATCH, 4, 32, 32), torch.tensor([10, 300, 600, 999])
    y, text = torch.tensor([1, 7, 0, 3]), torch.randn(BATCH, 77, 384)

    def run_dit(net: nn.Module) -> Tensor:
        out: Tensor = net(x, timestep=t, class_labels=y).sample
        return out

    def run_unet(net: nn.Module) -> Tensor:
        out: Tensor = net(x, t, text).sample
        return out

    return {"DiT": (_redraw(dit), run_dit), "U-Net": (_redraw(unet), run_unet)}


def _training(net: nn.Module, run: Callable[[nn.Module], Tensor], optimizer: Any) -> Any:
    def step() -> float:
        loss = run(net).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _masked(net: nn.Module, places: dict[str, Any]) -> Any:
    """Dense gradients times masks, dense AdamW without decay."""
    net.requires_grad_(False)
    layers = dict(net.named_modules())
    weights: list[Tensor] = []
    for name, entries in places.items():
        weight: Any = layers[name].weight
        weight.requires_grad_(True)
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        mask.view(-1)[entries.index.linear] = True
        weight.register_hook(mask.mul)
        weights.append(weight)
    return torch.optim.AdamW(weights, 1e-6, weight_decay=0.0)


def _peft(net: nn.Module, places: dict[str, Any], count: int) -> Any:
    from peft import LoraConfig, get_peft_model

    layers = dict(net.named_modules())
    each = 0
    for name in places:
        w = layers[name].weight
        each += w.shape[0] + w[0].numel()
    config = LoraConfig(r=max(1, round(count / each)), target_modules=list(places))
    net = get_peft_model(net, config)
    weights = [p for p in net.parameters() if p.requires_grad]
    return net, torch.optim.AdamW(weights, 1e-6, weight_decay=0.0)


def _steps() -> list[Case]:
    found = []
    for name, (net, run) in networks().items():
        masked, peft, ours = (copy.deepcopy(net) for _ in range(3))
        sara = SaRA(net, ratio=RATIO)
        places = {n: sara.of(n) for n in sara.places if sara.of(n).index.count}
        arms: dict[str, Any] = {}
        arms["masked"] = _training(masked, run, _masked(masked, places))
        peft, adam = _peft(peft, places, sara.count)
        arms["peft"] = _training(peft, run, adam)
        each = sum(w.weight.shape[0] + w.weight[0].numel() for w in sara.places.values())
        lora = LoRA(ours, max(1, round(sara.count / each)), targets=list(places), convolutions=True)
        adam = torch.optim.AdamW(lora.trainable(), 1e-6, weight_decay=0.0)
        arms["our LoRA"] = _training(ours, run, adam)
        found.append(
            Case(
                f"training step of SaRA, {name}, batch {BATCH} float32",
                _training(net, run, SparseAdamW(sara, 1e-6, weight_decay=0.0)),
                arms,
                target=1.3,
                vs="masked",
                also={"peft": 0.9},
                comparable=False,  # after a step each goes its own way
            )
        )
    return found


def _many(size: int, width: int, depth: int) -> Case:
    """Eight samples with an adapter each, of rank 16 on every layer of a block."""
    torch.manual_seed(0)
    net = _redraw(
        PlainDiT(
            input_size=size, patch_size=2, in_channels=4, hidden_size=width, depth=depth,
            num_heads=width // 64, num_classes=10, learn_sigma=False,
        )
    ).eval()  # fmt: skip
    x, t = torch.randn(SLOTS, 4, size, size), torch.linspace(10, 990, SLOTS)
    y = torch.arange(SLOTS)
    plain = copy.deepcopy(net)
    merged = LoRA(plain, 16, targets=r"^blocks\.\d+\.(attn|mlp)\.")
    one = copy.deepcopy(net)
    single = LoRA(one, 16, targets=r"^blocks\.\d+\.(attn|mlp)\.", slots=SLOTS)
    lora = LoRA(net, 16, targets=r"^blocks\.\d+\.(attn|mlp)\.", slots=SLOTS)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for a, b in zip(lora.parameters(), single.parameters(), strict=True):
            a.copy_(0.02 * torch.randn(a.shape, generator=g))
            b.copy_(a)
    lora.choose(range(1, SLOTS + 1))
    merged.merge()

    def separate() -> Tensor:
        parts = []
        with torch.inference_mode():
            for i in range(SLOTS):
                single.choose([i + 1])
                parts.append(one(x[i : i + 1], t[i : i + 1], y[i : i + 1]))
        return torch.cat(parts)

    @torch.inference_mode()
    def together() -> Tensor:
        out: Tensor = net(x, t, y)
        return out

    @torch.inference_mode()
    def one_merged() -> Tensor:
        out: Tensor = plain(x, t, y)
        return out

    tokens = (size // 2) ** 2
    return Case(
        f"{SLOTS} samples, {SLOTS} LoRAs of rank 16, DiT width {width}, {tokens} tokens float32",
        together,
        {"separate": separate, "merged": one_merged},
        target=2.0,
        vs="separate",
        also={"merged": 0.8},
    )


def cases() -> list[Case]:
    return [*_steps(), _many(8, 384, 8), _many(16, 384, 8), _many(32, 384, 8)]
