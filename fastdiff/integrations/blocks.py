"""Transformer blocks: every gated residual in one pass with the norm and modulation after it.

The blocks call their own submodules, so that adapters, hooks and other rules keep their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.integrations.rules import Rule, add_gated, chain, modulate, readable, usable
from fastdiff.nn.layers import with_activation

_F16_MAX = 65504.0  # what the networks clip float16 streams to


def _clip(x: Tensor) -> Tensor:
    return x.clip(-_F16_MAX, _F16_MAX) if x.dtype == torch.float16 else x


def basic(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """``BasicTransformerBlock`` of U-Nets (layer_norm), DiT (ada_norm_zero), PixArt (.._single)."""
    x = hidden_states
    kind = self.norm_type
    if (
        kind not in ("layer_norm", "ada_norm_zero", "ada_norm_single")
        or (kind == "ada_norm_zero" and self.attn2 is not None)
        or not usable(self, x)
        or x.dim() != 3
        or self.pos_embed is not None
        or self._chunk_size is not None
        or cross_attention_kwargs
    ):
        return type(self).forward(
            self, x, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    gate: Tensor | None = None
    gate_mlp: Tensor | None = None
    shift = scale = None
    if kind == "ada_norm_zero":
        normed, gate, shift, scale, gate_mlp = self.norm1(
            x, timestep, class_labels, hidden_dtype=x.dtype
        )
    elif kind == "ada_norm_single":
        assert timestep is not None
        table = self.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
        first, second, gate, shift, scale, gate_mlp = table.unbind(1)
        normed = modulate(self.norm1, x, first, second)
    else:
        normed = self.norm1(x)
    one = x.new_ones(x.shape[0], x.shape[2])
    self_context = encoder_hidden_states if self.only_cross_attention else None
    y = self.attn1(normed, encoder_hidden_states=self_context, attention_mask=attention_mask)
    cross = dict(encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    if kind == "ada_norm_single" and self.attn2 is not None:  # no norm before cross-attention
        assert gate is not None
        x = add_gated(x, y, gate)
        x, normed = chain(x, self.attn2(x, **cross), one, self.norm2, shift, scale)
    elif kind == "ada_norm_single":
        assert gate is not None
        x, normed = chain(x, y, gate, self.norm2, shift, scale)
    elif self.attn2 is not None:
        x, normed = chain(x, y, one, self.norm2)
        x, normed = chain(x, self.attn2(normed, **cross), one, self.norm3)
    else:
        x, normed = chain(x, y, one if gate is None else gate, self.norm3, shift, scale)
    y = self.ff(normed)
    return x + y if gate_mlp is None else add_gated(x, y, gate_mlp)


def joint(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """``JointTransformerBlock`` of SD3 and SD3.5."""
    x, context = hidden_states, encoder_hidden_states
    if not usable(self, x) or self._chunk_size is not None:
        return type(self).forward(self, x, context, temb, joint_attention_kwargs)
    kwargs = joint_attention_kwargs or {}
    normed, gate, shift, scale, gate_mlp, *dual = self.norm1(x, emb=temb)
    if self.context_pre_only:
        context_normed, *rest = (self.norm1_context(context, temb),)
    else:
        context_normed, *rest = self.norm1_context(context, emb=temb)
    y, context_y = self.attn(hidden_states=normed, encoder_hidden_states=context_normed, **kwargs)
    if self.use_dual_attention:
        second, gate_2 = dual
        x = add_gated(x, y, gate)
        y, gate = self.attn2(hidden_states=second, **kwargs), gate_2
    x, normed = chain(x, y, gate, self.norm2, shift, scale)
    x = add_gated(x, self.ff(normed), gate_mlp)
    if self.context_pre_only:
        return None, x
    gate, shift, scale, gate_mlp = rest
    context, normed = chain(context, context_y, gate, self.norm2_context, shift, scale)
    return add_gated(context, self.ff_context(normed), gate_mlp), x


def flux_double(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``FluxTransformerBlock``."""
    x, context = hidden_states, encoder_hidden_states
    if not usable(self, x):
        return type(self).forward(self, x, context, temb, image_rotary_emb, joint_attention_kwargs)
    normed, gate, shift, scale, gate_mlp = self.norm1(x, emb=temb)
    context_normed, *rest = self.norm1_context(context, emb=temb)
    y, context_y, *more = self.attn(
        hidden_states=normed,
        encoder_hidden_states=context_normed,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x, normed = chain(x, y, gate, self.norm2, shift, scale)
    x = add_gated(x, self.ff(normed), gate_mlp)
    for update in more:  # of an IP-Adapter
        x = x + update
    gate, shift, scale, gate_mlp = rest
    context, normed = chain(context, context_y, gate, self.norm2_context, shift, scale)
    return _clip(add_gated(context, self.ff_context(normed), gate_mlp)), x


def flux_single(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``FluxSingleTransformerBlock``: attention and MLP side by side."""
    if not usable(self, hidden_states):
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
            joint_attention_kwargs,
        )  # fmt: skip
    n = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = self.norm(x, emb=temb)
    proj = self.proj_mlp
    tanh = type(self.act_mlp) is nn.GELU and self.act_mlp.approximate == "tanh"
    own = with_activation(proj)
    if tanh and own is not None:
        mlp = own(normed, "gelu_tanh")
    elif tanh and readable(proj, nn.Linear, normed):
        mlp = ops.linear(normed, proj.weight, proj.bias, activation="gelu_tanh")
    else:
        mlp = self.act_mlp(proj(normed))
    y = self.attn(
        hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    x = _clip(add_gated(x, self.proj_out(torch.cat([y, mlp], dim=2)), gate))
    return x[:, :n], x[:, n:]


def wan(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Tensor:
    """``WanTransformerBlock`` in float32 (others keep float32 modulations: its own forward)."""
    x = hidden_states
    if not usable(self, x) or x.dtype != torch.float32 or temb.dim() != 3:
        return type(self).forward(self, x, encoder_hidden_states, temb, rotary_emb)
    table = self.scale_shift_table + temb.float()
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)
    normed = ops.layer_norm_modulate(x, shift, scale, eps=self.norm1.eps)
    y = self.attn1(normed, None, None, rotary_emb)
    x = add_gated(x, y, gate)
    x = x + self.attn2(self.norm2(x), encoder_hidden_states, None, None)
    normed = ops.layer_norm_modulate(x, shift_mlp, scale_mlp, eps=self.norm3.eps)
    return add_gated(x, self.ffn(normed), gate_mlp)


_FLUX = "diffusers.models.transformers.transformer_flux."
RULES: dict[str, tuple[str, Rule]] = {
    "diffusers.models.attention.BasicTransformerBlock": ("gate_residual_norm_modulate", basic),
    "diffusers.models.attention.JointTransformerBlock": ("gate_residual_norm_modulate", joint),
    _FLUX + "FluxTransformerBlock": ("gate_residual_norm_modulate", flux_double),
    _FLUX + "FluxSingleTransformerBlock": ("gate_residual", flux_single),
    "diffusers.models.transformers.transformer_wan.WanTransformerBlock": (
        "layer_norm_modulate and gate_residual",
        wan,
    ),
}
