"""Single layers: linear, the activations of feed-forwards, GroupNorm, adaptive LayerNorms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdiff import ops
from fastdiff.integrations.rules import Rule, modulate, readable, usable
from fastdiff.nn.layers import with_activation


def linear(self: Any, input: Tensor) -> Tensor:
    """``nn.Linear``."""
    if not usable(self, input) or not input.numel() or not readable_weights(self, input):
        return nn.Linear.forward(self, input)
    return ops.linear(input, self.weight, self.bias)


def readable_weights(module: Any, x: Tensor) -> bool:
    """Its weight is a plain parameter of the dtype of x (hooks do not matter to its own rule)."""
    w, b = module.weight, module.bias
    return (
        type(w) is nn.Parameter
        and w.dtype == x.dtype
        and w.device == x.device
        and (b is None or (type(b) is nn.Parameter and b.dtype == x.dtype))
    )


def gelu(self: Any, hidden_states: Tensor) -> Tensor:
    """Linear and GELU in its tanh form; the erf form stays."""
    if not usable(self, hidden_states) or self.approximate != "tanh":
        return type(self).forward(self, hidden_states)
    proj = self.proj
    own = with_activation(proj)
    if own is not None:
        return own(hidden_states, "gelu_tanh")
    if not readable(proj, nn.Linear, hidden_states):
        return type(self).forward(self, hidden_states)
    return ops.linear(hidden_states, proj.weight, proj.bias, activation="gelu_tanh")


def geglu(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Linear, its bias and the gate with GELU."""
    proj = self.proj
    if args or kwargs or not usable(self, hidden_states):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    if not readable(proj, nn.Linear, hidden_states):
        return ops.geglu(proj(hidden_states))
    return ops.geglu(ops.linear(hidden_states, proj.weight), proj.bias)


def group_norm(self: Any, input: Tensor) -> Tensor:
    """``nn.GroupNorm``."""
    if not usable(self, input) or not self.affine or not readable_weights(self, input):
        return nn.GroupNorm.forward(self, input)
    return ops.group_norm_silu(
        input, self.num_groups, self.weight, self.bias, eps=self.eps, silu=False
    )


def ada_zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: Any = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """adaLN-Zero: the modulated norm and four of its six modulations."""
    if not usable(self, x):
        return type(self).forward(self, x, timestep, class_labels, hidden_dtype, emb)
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, gate, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
    return modulate(self.norm, x, shift, scale), gate, *rest


def ada_zero_single(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """adaLN-Zero of a block with one gate."""
    if not usable(self, x):
        return type(self).forward(self, x, emb)
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return modulate(self.norm, x, shift, scale), gate


def ada_zero_twice(self: Any, hidden_states: Tensor, emb: Tensor | None = None) -> Any:
    """adaLN-Zero of a block with two attentions on one stream."""
    if not usable(self, hidden_states):
        return type(self).forward(self, hidden_states, emb)
    m = self.linear(self.silu(emb)).chunk(9, dim=1)
    first = modulate(self.norm, hidden_states, m[0], m[1])
    second = modulate(self.norm, hidden_states, m[6], m[7])
    return first, m[2], m[3], m[4], m[5], second, m[8]


def ada_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """adaLN before a network's or stream's last layer."""
    if not usable(self, x):
        return type(self).forward(self, x, conditioning_embedding)
    emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
    scale, shift = emb.chunk(2, dim=1)
    return modulate(self.norm, x, shift, scale)


RULES: dict[str, tuple[str, Rule]] = {
    "torch.nn.modules.linear.Linear": ("linear", linear),
    "torch.nn.modules.normalization.GroupNorm": ("group_norm_silu", group_norm),
    "diffusers.models.activations.GELU": ("linear with gelu_tanh", gelu),
    "diffusers.models.activations.GEGLU": ("geglu", geglu),
    "diffusers.models.normalization.AdaLayerNormZero": ("layer_norm_modulate", ada_zero),
    "diffusers.models.normalization.AdaLayerNormZeroSingle": (
        "layer_norm_modulate",
        ada_zero_single,
    ),
    "diffusers.models.normalization.SD35AdaLayerNormZeroX": (
        "layer_norm_modulate",
        ada_zero_twice,
    ),
    "diffusers.models.normalization.AdaLayerNormContinuous": (
        "layer_norm_modulate",
        ada_continuous,
    ),
}
