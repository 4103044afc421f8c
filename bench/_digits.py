"""The shipped digit networks as diffusers' classes, and the sampling loop that all arms share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import models
from fastdiff.models.dit import EPS
from fastdiff.samplers.run import model_times


def to_dit(model: models.DiT) -> nn.Module:
    """``DiTTransformer2DModel`` with the weights of ours."""
    c = model.config
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=c["num_heads"], attention_head_dim=c["hidden_size"] // c["num_heads"],
        in_channels=c["in_channels"], out_channels=c["in_channels"], num_layers=c["depth"],
        sample_size=c["input_size"], patch_size=c["patch_size"],
        num_embeds_ada_norm=c["num_classes"], norm_eps=EPS,
    )  # fmt: skip
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    for i in range(c["depth"]):
        block = f"transformer_blocks.{i}."
        names |= {
            block + "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            block + "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            block + "norm1.linear": f"blocks.{i}.adaLN_modulation.1",
            block + "attn1.to_out.0": f"blocks.{i}.attn.proj",
            block + "ff.net.0.proj": f"blocks.{i}.mlp.fc1",
            block + "ff.net.2": f"blocks.{i}.mlp.fc2",
        }
    ours = model.state_dict()
    state = {f"{theirs}.{p}": ours[f"{name}.{p}"] for theirs, name in names.items()
             for p in ("weight", "bias")}  # fmt: skip
    for i in range(c["depth"]):
        block = f"transformer_blocks.{i}."
        table = "norm1.emb.class_embedder.embedding_table.weight"
        state[block + table] = ours["y_embedder.embedding_table.weight"]
        for p in ("weight", "bias"):
            qkv = ours[f"blocks.{i}.attn.qkv.{p}"].chunk(3)
            for name, value in zip(("to_q", "to_k", "to_v"), qkv, strict=True):
                state[f"{block}attn1.{name}.{p}"] = value
    net.load_state_dict(state)
    net.pos_embed.pos_embed = ours["pos_embed"].clone()  # a buffer that is not saved
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the paper's frequencies
    return net.eval().requires_grad_(False)


def to_unet(model: models.UNet) -> nn.Module:
    """``UNet2DConditionModel`` with the weights of ours; class tokens are its text."""
    c = model.config
    kinds = ["CrossAttn" if depth else "" for depth in c["transformer_depth"]]
    net = diffusers.UNet2DConditionModel(
        in_channels=c["in_channels"], out_channels=c["out_channels"], sample_size=32,
        block_out_channels=c["block_out_channels"], layers_per_block=c["layers_per_block"],
        down_block_types=[f"{k}DownBlock2D" for k in kinds],
        up_block_types=[f"{k}UpBlock2D" for k in reversed(kinds)],
        transformer_layers_per_block=[max(1, d) for d in c["transformer_depth"]],
        attention_head_dim=c["heads"], norm_num_groups=c["groups"],
        cross_attention_dim=c["cross_attention_dim"], use_linear_projection=True,
    )  # fmt: skip
    state = {k: v for k, v in model.state_dict().items() if k != "class_tokens.weight"}
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


class Adapter(nn.Module):
    """A network of diffusers with the signature of ours: ``model(x, t, y)``."""

    def __init__(self, ours: Any, net: nn.Module | None = None):
        super().__init__()
        made = to_dit(ours) if isinstance(ours, models.DiT) else to_unet(ours)
        self.net = made if net is None else net
        self.num_classes, self.prediction = ours.num_classes, ours.prediction
        tokens = None
        if isinstance(ours, models.UNet):
            table = ours.class_tokens.weight.detach()
            tokens = table.view(len(table), -1, ours.config["cross_attention_dim"])
        self.register_buffer("_tokens", tokens)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``[B, C, H, W]``."""
        if self._tokens is None:
            return self.net(x, timestep=t, class_labels=y, return_dict=False)[0]
        return self.net(x, t[0], encoder_hidden_states=self._tokens[y], return_dict=False)[0]

    def twin(self) -> Adapter:
        """Another with weights of its own."""
        return copy.deepcopy(self)


class Digits:
    """A shipped checkpoint with its card's settings.

    Args:
        name: "dit-digits" or "unet-digits".
        batch: pictures, the classes in turn.
    """

    def __init__(self, name: str, batch: int = 20):
        self.model: Any
        self.model, card = models.load(name)
        self.plain = Adapter(self.model)
        self.labels = torch.arange(batch) % self.model.num_classes
        self.how = dict(
            sampler=card.get("sampler", "ddim"), classes=self.labels,
            guidance=card.get("guidance", 1.0), clip=card.get("clip", 0.0) or None,
        )  # fmt: skip
        self.shape = (batch, self.model.in_channels, 32, 32)

    def times(self, steps: int) -> Tensor:
        """Model times of a run."""
        how = {k: v for k, v in self.how.items() if k in ("sampler", "clip")}
        return model_times(self.model, steps=steps, **how)

    def draw(self, model: Callable[..., Tensor], steps: int, seed: int = 0) -> Tensor:
        """Pictures of ``model``, ours or an :class:`Adapter`."""
        return fastdiff.sample(model, self.shape, steps=steps, seed=seed, **self.how)
