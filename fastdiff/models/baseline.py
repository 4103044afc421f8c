"""The same networks in ordinary torch: the baseline to compare against, and what training runs.

``PlainDiT``, ``PlainDiTMoE`` and ``PlainUNet`` hold the parameters of the network of that name
(state dicts interchange) and compute with ``F.linear``,
``F.scaled_dot_product_attention``, ``F.layer_norm`` and ``F.group_norm`` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.models._embed import check_inputs, timestep_embedding, weight_dtype
from fastdiff.models.dit import EPS, FREQUENCIES, DiT
from fastdiff.models.dit_moe import DiTMoE
from fastdiff.models.unet import Attention, Resnet, Transformer, UNet


class PlainDiT(DiT):
    """:class:`~fastdiff.models.DiT` in plain torch.

    ``window``: int64 ``[B, 2]``, the row and column of the stored position table where each sample
    begins, for training on parts of pictures; the places of a layout are then those in the part,
    and may lie outside of it.
    """

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, window: Tensor | None = None) -> Tensor:
        check_inputs(
            "DiT",
            x,
            t,
            y if window is None else None,
            channels=self.in_channels,
            multiple=self.patch_size,
            classes=self.num_classes,
            layout=self.box_size > 0,
        )
        dtype, p = weight_dtype(self), self.patch_size
        rows, columns = x.shape[2] // p, x.shape[3] // p
        c = self.t_embedder.mlp(timestep_embedding(t, FREQUENCIES).to(dtype))
        h = self.x_embedder.proj(x.to(dtype)).flatten(2).transpose(1, 2)
        if window is None:
            h = h + self.positions(rows, columns)
        else:
            row = window[:, 0, None, None] + torch.arange(rows)[:, None]
            place = row * (self.input_size // p) + window[:, 1, None, None] + torch.arange(columns)
            h = h + self.pos_embed[0][place.flatten(1)]
        if self.box_size:
            h = h + self.layout(y, rows, columns)
        else:
            c = c + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            mods = block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = mods
            h = h + gate_1 * self._attention(block, self._norm(h, shift_1, scale_1))
            h = block(h + gate_2 * self._mlp(block, self._norm(h, shift_2, scale_2)))
        shift, scale = self.final_layer.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        out = self.final_layer.linear(self._norm(h, shift, scale))
        return self.unpatchify(out, x.shape[2], x.shape[3]).to(x.dtype)

    @staticmethod
    def _norm(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale) + shift

    def _attention(self, block: Any, h: Tensor) -> Tensor:
        q, k, v = self._heads(block, h)
        return block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, block: Any, h: Tensor) -> Any:
        return block.attn.qkv(h).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def _mlp(self, block: Any, h: Tensor) -> Tensor:
        return block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))


class PlainDiTMoE(PlainDiT, DiTMoE):
    """:class:`~fastdiff.models.DiTMoE` in plain torch: expert after expert, on the tokens that
    chose it, whose number the host waits for."""

    def _heads(self, block: Any, h: Tensor) -> Any:
        q, k, v = super()._heads(block, h)
        return *self.norm_heads(block, q, k), v

    def _mlp(self, block: Any, h: Tensor) -> Tensor:
        moe, tokens = block.moe, h.flatten(0, 1)
        routing = moe.route(tokens)
        out = tokens.new_zeros(tokens.shape, dtype=routing.weights.dtype)
        # Not moe.up[e], whose gradient is as large as all experts'.
        for e, (up, down) in enumerate(zip(moe.up.unbind(), moe.down.unbind(), strict=True)):
            token, j = (routing.experts == e).nonzero(as_tuple=True)
            found = F.linear(_swiglu(F.linear(tokens[token], up)), down)
            out = out.index_add(0, token, routing.weights[token, j, None] * found)
        shared = moe.shared
        every = F.linear(_swiglu(F.linear(tokens, shared.up)), shared.down)
        return (out.to(every.dtype) + every).view(h.shape)


class PlainUNet(UNet):
    """:class:`~fastdiff.models.UNet` in plain torch."""

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, context: Tensor | None = None
    ) -> Tensor:
        self.check(x, t, y, context)
        dtype = weight_dtype(self)
        context = self.tokens(y, context)
        time = self.time_embedding.linear_1(
            timestep_embedding(t, self.conv_in.out_channels).to(dtype)
        )
        time = F.silu(self.time_embedding.linear_2(F.silu(time)))
        h = self.conv_in(x.to(dtype)).contiguous(memory_format=torch.channels_last)
        skips = [h]
        for stage in self.down_blocks:
            for i in range(len(stage.resnets)):
                h = self._layer(stage, i, h, time, context)
                skips.append(h)
            if stage.downsamplers is not None:
                h = stage.downsamplers[0].conv(h)
                skips.append(h)
        h = self._layer(self.mid_block, 0, h, time, context)
        h = _resnet(self.mid_block.resnets[1], h, time)
        for stage in self.up_blocks:
            for i in range(len(stage.resnets)):
                h = self._layer(stage, i, torch.cat([h, skips.pop()], dim=1), time, context)
            if stage.upsamplers is not None:
                h = stage.upsamplers[0].conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(h))).to(x.dtype)

    @staticmethod
    def _layer(stage: Any, i: int, h: Tensor, time: Tensor, context: Tensor) -> Tensor:
        h = _resnet(stage.resnets[i], h, time)
        return _transformer(stage.attentions[i], h, context) if len(stage.attentions) else h


def plain(model: DiT | UNet) -> DiT | UNet:
    """The network of ``model`` in plain torch, on the same parameter tensors."""
    kind: type[DiT | UNet] = PlainDiT if isinstance(model, DiT) else PlainUNet
    with torch.device("meta"):
        twin = (PlainDiTMoE if isinstance(model, DiTMoE) else kind)(**model.config)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return twin.train(model.training)


def _swiglu(u: Tensor) -> Tensor:
    gate, h = u.chunk(2, dim=-1)
    return F.silu(gate) * h


def _resnet(block: Resnet, x: Tensor, time: Tensor) -> Tensor:
    h = block.conv1(F.silu(block.norm1(x)))
    time = block.time_emb_proj(time)[:, :, None, None]
    if block.scale_shift:
        scale, shift = time.chunk(2, dim=1)
        h = block.norm2(h) * (1 + scale) + shift
    else:
        h = block.norm2(h + time)
    h = block.conv2(F.silu(h))
    return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + h


def _transformer(block: Transformer, x: Tensor, context: Tensor) -> Tensor:
    h = block.proj_in(block.norm(x).flatten(2).transpose(1, 2))
    for layer in block.transformer_blocks:
        n = layer.norm1(h)
        h = h + _attention(layer.attn1, n, n)
        h = h + _attention(layer.attn2, layer.norm2(h), context)
        value, gate = layer.ff.net[0].proj(layer.norm3(h)).chunk(2, dim=-1)
        h = h + layer.ff.net[2](value * F.gelu(gate))
    return x + block.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


def _attention(attn: Attention, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = (
        project(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for project, source in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
    )
    return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
