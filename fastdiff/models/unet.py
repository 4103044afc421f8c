r"""U-Net of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, appendix E.2.1).

Residual blocks (GroupNorm, SiLU, 3x3 convolution, the time embedding between) and transformers
(self-attention, cross-attention to context tokens, GEGLU) on the way down and up, with skips.
Parameter names are those of diffusers' ``UNet2DConditionModel``, so Stable Diffusion's state dicts
fit; ``class_tokens`` is ours: context tokens learned per class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.models._embed import check_inputs, timestep_embedding, weight_dtype
from fastdiff.nn import layers

TRANSFORMER_EPS = 1e-6  # of the GroupNorm before a transformer, as in Stable Diffusion


class Resnet(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1 x)) + time))); or time scales and shifts norm2."""

    def __init__(self, c_in: int, c_out: int, time_dim: int, groups: int, scale_shift: bool):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, c_out * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None
        self.scale_shift = scale_shift

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = layers.linear(self.time_emb_proj, time)
        h = layers.group_norm(self.norm1, x)
        scale = shift = bias = None
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=-1)
        else:
            bias = time
        h = layers.conv3x3(self.conv1, h, bias)
        h = layers.group_norm(self.norm2, h, shift=shift, scale=scale)
        if self.conv_shortcut is not None:
            x = layers.pointwise(self.conv_shortcut, x)
        return layers.conv3x3(self.conv2, h, add=x)


class Attention(layers.Attention):
    to_out: Any

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.heads = heads

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = layers.linear(self.to_q, x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = layers.linear(self.to_k, context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = layers.linear(self.to_v, context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = layers.attention(self, q, k, v).transpose(1, 2).flatten(2)
        return layers.linear(self.to_out[0], out)


class _FeedForward(nn.Module):
    net: Any

    def __init__(self, dim: int):
        super().__init__()
        gate = nn.Module()
        gate.proj = nn.Linear(dim, 8 * dim)
        self.net = nn.ModuleList([gate, nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return layers.linear(self.net[2], layers.geglu(self.net[0].proj, x, self.net[2]))


class _TransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = _FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        one = x.new_ones(x.shape[0], x.shape[2])  # no gates here: residual and norm stay one kernel
        h = layers.layer_norm(self.norm1, x)
        x, h = layers.gate_norm(self.norm2, x, self.attn1(h, h), one)
        x, h = layers.gate_norm(self.norm3, x, self.attn2(h, context), one)
        return x + self.ff(h)


class Transformer(nn.Module):
    """Transformer blocks over the pixels, between two 1x1 projections, around a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int, depth: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks: Any = nn.ModuleList(
            _TransformerBlock(dim, context_dim, heads) for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, dim)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("proj_in.weight", "proj_out.weight"):  # a 1x1 convolution in SD 1.x
            if (w := state.get(prefix + name)) is not None and w.dim() == 4:
                state[prefix + name] = w.flatten(1)
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        h = layers.group_norm(self.norm, x, silu=False)
        h = h.flatten(2).transpose(1, 2)  # [B, H*W, C]: free where h is channels-last
        h = layers.linear(self.proj_in, h)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = layers.linear(self.proj_out, h)
        return x + h.transpose(1, 2).unflatten(2, (height, -1))


class _Stage(nn.Module):
    """One resolution: residual blocks, each with a transformer or none, then a change of size."""

    downsamplers: Any
    upsamplers: Any

    def __init__(self, resnets: list[Resnet], attentions: list[Transformer]):
        super().__init__()
        self.downsamplers = self.upsamplers = None
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)


class _Down(_Stage):
    def forward(
        self, h: Tensor, time: Tensor, context: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, and the skips: of every layer, and the result where it is smaller."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, time)
            if len(self.attentions):
                h = self.attentions[i](h, context)
            skips.append(h)
        if self.downsamplers is not None:
            h = self.downsamplers[0].conv(h)
            skips.append(h)
        return h, tuple(skips)


class _Mid(_Stage):
    def forward(self, h: Tensor, time: Tensor, context: Tensor) -> Tensor:
        h = self.resnets[0](h, time)
        for attention in self.attentions:
            h = attention(h, context)
        return self.resnets[1](h, time)


class _Up(_Stage):
    def forward(
        self, h: Tensor, skips: tuple[Tensor, ...], time: Tensor, context: Tensor
    ) -> Tensor:
        """The first layer takes the last of ``skips``, one for each layer."""
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips[-1 - i]], dim=1), time)
            if len(self.attentions):
                h = self.attentions[i](h, context)
        if self.upsamplers is not None:
            h = layers.conv3x3(self.upsamplers[0].conv, h, upsample=True)
        return h


def _sampler(channels: int, stride: int) -> nn.ModuleList:
    holder = nn.Module()
    holder.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
    return nn.ModuleList([holder])


class UNet(nn.Module):
    """Text- or class-conditional U-Net.

    Args:
        in_channels, out_channels: C of the input and of the prediction.
        block_out_channels: channels per level; each level but the last halves the size.
        layers_per_block: residual blocks per level (one more on the way up).
        transformer_depth: transformer blocks after each residual block of a level; 0 for none.
        mid_depth: transformer blocks in the middle; None takes the deepest level that has any.
        heads: attention heads, one number or one per level.
        groups: groups of every GroupNorm.
        cross_attention_dim: width Dc of the context tokens.
        num_classes: learned context for classes 0..num_classes (the last is the null class of
            guidance); 0 for a network that is given ``context``.
        class_tokens: context tokens per class.
        scale_shift: the time embedding scales and shifts the second norm, in place of being added.
        prediction: what the output is: "eps" (noise) or "flow" (noise - data).
    """

    time_embedding: Any
    down_blocks: Any
    mid_block: Any
    up_blocks: Any

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        transformer_depth: Sequence[int] = (1, 1, 1, 0),
        mid_depth: int | None = None,
        heads: int | Sequence[int] = 8,
        groups: int = 32,
        cross_attention_dim: int = 768,
        num_classes: int = 0,
        class_tokens: int = 4,
        scale_shift: bool = False,
        prediction: str = "eps",
    ):
        super().__init__()
        levels = len(block_out_channels)
        per_level = [heads] * levels if isinstance(heads, int) else list(heads)
        depths = list(transformer_depth)
        if mid_depth is None:
            mid_depth = next((d for d in reversed(depths) if d), 0)
        if len(per_level) != levels or len(depths) != levels:
            raise ValueError(
                f"UNet: heads has {len(per_level)} and transformer_depth {len(depths)} entries, "
                f"need {levels}, one per entry of block_out_channels"
            )
        for c, n in zip(block_out_channels, per_level, strict=True):
            if c % groups or c % n:
                raise ValueError(
                    f"UNet: block_out_channels has {c}, "
                    f"need multiples of groups {groups} and heads {n}"
                )
        if prediction not in ("flow", "eps"):
            raise ValueError(f"UNet: prediction is {prediction!r}, need 'flow' or 'eps'")
        self.config: dict[str, Any] = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=list(block_out_channels),
            layers_per_block=layers_per_block,
            transformer_depth=depths,
            mid_depth=mid_depth,
            heads=per_level,
            groups=groups,
            cross_attention_dim=cross_attention_dim,
            num_classes=num_classes,
            class_tokens=class_tokens,
            scale_shift=scale_shift,
            prediction=prediction,
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_classes, self.prediction = num_classes, prediction
        self.cross_attention_dim, self.downsampling = cross_attention_dim, 2 ** (levels - 1)
        channels, first = list(block_out_channels), block_out_channels[0]
        time_dim = 4 * first

        def resnet(c_in: int, c_out: int) -> Resnet:
            return Resnet(c_in, c_out, time_dim, groups, scale_shift)

        def transformers(level: int, count: int) -> list[Transformer]:
            args = (channels[level], cross_attention_dim, per_level[level], depths[level], groups)
            return [Transformer(*args) for _ in range(count)] if depths[level] else []

        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1 = nn.Linear(first, time_dim)
        self.time_embedding.linear_2 = nn.Linear(time_dim, time_dim)
        if num_classes:
            self.class_tokens = nn.Embedding(num_classes + 1, class_tokens * cross_attention_dim)
        self.down_blocks = nn.ModuleList()
        skips, c = [first], first
        for level, c_out in enumerate(channels):
            stage: _Stage = _Down([], transformers(level, layers_per_block))
            for _ in range(layers_per_block):
                stage.resnets.append(resnet(c, c_out))
                c = c_out
                skips.append(c)
            if level < levels - 1:
                stage.downsamplers = _sampler(c, stride=2)
                skips.append(c)
            self.down_blocks.append(stage)
        mid = (
            [Transformer(c, cross_attention_dim, per_level[-1], mid_depth, groups)]
            if mid_depth
            else []
        )
        self.mid_block = _Mid([resnet(c, c), resnet(c, c)], mid)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            stage = _Up([], transformers(level, layers_per_block + 1))
            for _ in range(layers_per_block + 1):
                stage.resnets.append(resnet(c + skips.pop(), channels[level]))
                c = channels[level]
            if level > 0:
                stage.upsamplers = _sampler(c, stride=1)
            self.up_blocks.append(stage)
        self.conv_norm_out = nn.GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1)

    def condition(self, t: Tensor) -> Tensor:
        """silu of the time embedding, ``[B, 4 C_0]``: what every residual block projects."""
        first, second = self.time_embedding.linear_1, self.time_embedding.linear_2
        wave = timestep_embedding(t, self.conv_in.out_channels).to(weight_dtype(self))
        return F.silu(layers.linear(second, F.silu(layers.linear(first, wave))))

    def tokens(self, y: Tensor | None, context: Tensor | None) -> Tensor:
        """``context``, or where it is None the learned tokens of the classes y: ``[B, L, Dc]``."""
        if context is None:
            context = self.class_tokens(y).unflatten(-1, (-1, self.cross_attention_dim))
        return context.to(weight_dtype(self))

    def check(self, x: Tensor, t: Tensor, y: Tensor | None, context: Tensor | None) -> None:
        """One error for what does not fit."""
        check_inputs(
            "UNet", x, t, y, channels=self.in_channels, multiple=self.downsampling,
            classes=self.num_classes,
        )  # fmt: skip
        if (y is None) == (context is None):
            raise ValueError("UNet: need exactly one of y and context")
        if context is None:
            if not self.num_classes:
                raise ValueError("UNet: this network has no classes, need context in place of y")
        elif context.dim() != 3 or (context.shape[0], context.shape[2]) != (
            x.shape[0],
            self.cross_attention_dim,
        ):
            raise ValueError(
                f"UNet: context has shape {list(context.shape)}, "
                f"need [{x.shape[0]}, L, {self.cross_attention_dim}]"
            )

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, context: Tensor | None = None
    ) -> Tensor:
        """Predict from noisy ``x``.

        Args:
            x: ``[B, C, H, W]``; H and W multiples of ``downsampling``.
            t: ``[B]``, times in 0..1000.
            y: ``[B]`` int64, classes; ``num_classes`` for none.
            context: ``[B, L, Dc]``, tokens to attend to in place of ``y``.

        Returns:
            ``[B, out_channels, H, W]``, the dtype of ``x``.

        Raises:
            ValueError: a shape, dtype or class (checked on the CPU) does not fit.
        """
        self.check(x, t, y, context)
        context = self.tokens(y, context)
        time = self.condition(t)
        # Channels-last: oneDNN's and cuDNN's layout, and pixels are then tokens without a copy. The
        # result is laid out, not x: of one channel both layouts are the same to torch.
        h = self.conv_in(x.to(time.dtype)).contiguous(memory_format=torch.channels_last)
        skips: tuple[Tensor, ...] = (h,)
        for stage in self.down_blocks:
            h, more = stage(h, time, context)
            skips += more
        h = self.mid_block(h, time, context)
        for stage in self.up_blocks:
            count = len(stage.resnets)
            h = stage(h, skips[-count:], time, context)
            skips = skips[:-count]
        h = layers.conv3x3(self.conv_out, layers.group_norm(self.conv_norm_out, h))
        return h.contiguous().to(x.dtype)
