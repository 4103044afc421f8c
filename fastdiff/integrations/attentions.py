"""Attention modules with the processors that diffusers gives them. Others stay in force.

The processor is looked at in every call: one that a user sets later (an IP-Adapter, say) runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.engine.reuse_tokens import current_tokens, keys_values, positions
from fastdiff.integrations.rules import Rule, class_name, usable
from fastdiff.integrations.text_kv import project
from fastdiff.nn import layers

_PROCESSORS = "diffusers.models.attention_processor."
_STOCK = {
    _PROCESSORS + "AttnProcessor2_0",
    _PROCESSORS + "JointAttnProcessor2_0",
    "diffusers.models.transformers.transformer_flux.FluxAttnProcessor",
    "diffusers.models.transformers.transformer_wan.WanAttnProcessor",
}
_RMS = {
    "diffusers.models.normalization.RMSNorm",
    "torch.nn.modules.normalization.RMSNorm",
}


def why_left(module: Any) -> str | None:
    """A sentence for an attention whose processor has no rule."""
    processor = getattr(module, "processor", None)
    return None if class_name(processor) in _STOCK else f"has {type(processor).__name__}"


def attentions_of(network: nn.Module) -> list[nn.Module]:
    """Every attention of ``network``."""
    return [
        m
        for m in network.modules()
        if class_name(m) in RULES or (hasattr(m, "processor") and hasattr(m, "to_q"))
    ]


def asking(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attentions that ask :func:`fastdiff.nn.layers.attention`, by name: ours, and those on
    which the exact mode has set a rule."""
    rules = [rule for _, rule in RULES.values()]
    for name, module in network.named_modules():
        rule = getattr(module.__dict__.get("forward"), "__func__", None)
        if isinstance(module, layers.Attention) or rule in rules:
            yield name, module


def why_all_tokens(attentions: Sequence[nn.Module]) -> str:
    """Why one of a network's attentions needs all tokens in every call, "" where none does."""
    for module in attentions:
        if class_name(module) not in RULES:
            return f"{type(module).__name__} has no rule"
        other = why_left(module)
        if other is not None:
            return f"an attention {other}"
        fused = getattr(module, "fused_projections", False)
        if fused and class_name(module) != _PROCESSORS + "Attention":
            return "an attention has fused projections"
    return ""


def _need_all_tokens(module: Any, x: Tensor) -> None:
    """An attention without a rule for this call cannot run on some of the tokens.

    Raises:
        ValueError: it is asked to.
    """
    call = current_tokens()
    if call is not None and call.index is not None and x.shape[1] != call.total:
        raise ValueError(
            f"accelerate: an attention ({type(module).__name__} with "
            f"{type(module.processor).__name__}) was called with arguments that it has no rule "
            f"for, on {x.shape[1]} of {call.total} tokens; need a cache without RegionAdaptive"
        )


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, H*D]`` -> ``[B, H, N, D]``, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(first: Tensor, second: Tensor) -> Tensor:
    """Two ``[B, H, N, D]`` token after token, heads inside tokens in memory."""
    return torch.cat([first.transpose(1, 2), second.transpose(1, 2)], dim=1).transpose(1, 2)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    return layers.attention(module, q, k, v, bias).transpose(1, 2).flatten(2)


def _rms(norm: Any, x: Tensor) -> bool:
    """A root-mean-square norm of the last dimension, whose weight may be read."""
    return (
        class_name(norm) in _RMS
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        and type(norm.weight) is nn.Parameter
        and norm.weight.dtype == x.dtype
        and norm.weight.shape == x.shape[-1:]
        and getattr(norm, "bias", None) is None
        and norm.eps is not None
    )


def _norm_rope(
    q: Tensor,
    k: Tensor,
    norm_q: Any,
    norm_k: Any,
    cos: Any = None,
    sin: Any = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both norms and the rotation in one kernel, where the norms are ours to read."""
    if (
        q.shape[2] == k.shape[2]
        and _rms(norm_q, q)
        and _rms(norm_k, k)
        and norm_q.eps == norm_k.eps
    ):
        weights = norm_q.weight, norm_k.weight
        return ops.qk_norm_rope(q, k, *weights, cos=cos, sin=sin, position=position, eps=norm_q.eps)
    q = q if norm_q is None else norm_q(q)
    k = k if norm_k is None else norm_k(k)
    return (q, k) if cos is None else ops.qk_norm_rope(q, k, cos=cos, sin=sin, position=position)


def _bias(mask: Any, q: Tensor, keys: int) -> Tensor | None:
    """An additive mask ``[B, 1, T]`` or ``[B, S, T]`` as a bias of the operation, if it is one."""
    batch, _, rows, _ = q.shape
    if mask.dtype not in (q.dtype, torch.float32) or mask.dim() != 3 or mask.shape[-1] != keys:
        return None
    if mask.shape[0] != batch or mask.shape[1] not in (1, rows):
        return None
    return mask if mask.shape[1] == 1 else mask[:, None]


def attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """``Attention`` with the processor for one stream or for two."""
    known = kwargs.keys() <= {"temb"} and usable(self, hidden_states)
    processor = class_name(self.processor)
    if known and processor == _PROCESSORS + "AttnProcessor2_0":
        out = _one_stream(self, hidden_states, encoder_hidden_states, attention_mask)
    elif known and not kwargs and processor == _PROCESSORS + "JointAttnProcessor2_0":
        out = _joint(self, hidden_states, encoder_hidden_states)
    else:
        out = None
    if out is not None:
        return out
    _need_all_tokens(self, hidden_states)
    return type(self).forward(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


def _one_stream(self: Any, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if self.spatial_norm is not None or (context is not None and self.norm_cross):
        return None
    h = x
    if self.group_norm is not None:
        h = self.group_norm(h if h.dim() == 4 else h.transpose(1, 2))
        h = h if h.dim() == 4 else h.transpose(1, 2)
    if x.dim() == 4:
        h = h.flatten(2).transpose(1, 2)
    q = _heads(self.to_q(h), self.heads)
    source = h if context is None else context
    bias = None if mask is None else _bias(mask, q, source.shape[1])
    if mask is not None and bias is None:
        return None
    k, v = (self.to_k(h), self.to_v(h)) if context is None else project(self, context)
    k, v = _heads(k, self.heads), _heads(v, self.heads)
    q, k = _norm_rope(q, k, self.norm_q, self.norm_k)
    if context is None:
        k, v = keys_values(self, k, v)
    out = self.to_out[1](self.to_out[0](_attend(self, q, k, v, bias)))
    if x.dim() == 4:
        out = out.transpose(1, 2).unflatten(2, x.shape[2:])
    if self.residual_connection:
        out = out + x
    return out if self.rescale_output_factor == 1 else out / self.rescale_output_factor


def _joint(self: Any, x: Tensor, context: Tensor | None) -> Any:
    n = x.shape[1]
    q, k, v = (_heads(to(x), self.heads) for to in (self.to_q, self.to_k, self.to_v))
    q, k = _norm_rope(q, k, self.norm_q, self.norm_k)
    if context is None:
        return self.to_out[1](self.to_out[0](_attend(self, q, *keys_values(self, k, v))))
    projections = self.add_q_proj, self.add_k_proj, self.add_v_proj
    q2, k2, v2 = (_heads(to(context), self.heads) for to in projections)
    q2, k2 = _norm_rope(q2, k2, self.norm_added_q, self.norm_added_k)
    k, v = keys_values(self, _join(k, k2), _join(v, v2), after=context.shape[1])
    out = _attend(self, _join(q, q2), k, v)
    second = out[:, n:]
    if not self.context_pre_only:
        second = self.to_add_out(second)
    return self.to_out[1](self.to_out[0](out[:, :n])), second


def _native_backend(processor: Any) -> bool:
    """Nobody has chosen another attention kernel or a split over devices."""
    module: Any = sys.modules["diffusers.models.attention_dispatch"]
    active = module._AttentionBackendRegistry._active_backend
    return (
        processor._attention_backend is None
        and processor._parallel_config is None
        and active == module.AttentionBackendName.NATIVE
    )


def flux(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """``FluxAttention``: norms and rotary positions of both streams, joint attention."""
    x, context = hidden_states, encoder_hidden_states
    if (
        kwargs
        or attention_mask is not None
        or not usable(self, x)
        or class_name(self.processor) not in _STOCK
        or self.fused_projections
        or not _native_backend(self.processor)
        or (context is None) != (self.added_kv_proj_dim is None)
    ):
        _need_all_tokens(self, x)
        return type(self).forward(self, x, context, attention_mask, image_rotary_emb, **kwargs)
    cos = sin = None
    if image_rotary_emb is not None:  # every angle stands twice there
        cos, sin = (t[:, ::2].to(x.device, torch.float32) for t in image_rotary_emb)
    n = 0 if context is None else context.shape[1]
    q, k, v = (_heads(to(x), self.heads) for to in (self.to_q, self.to_k, self.to_v))
    tokens = current_tokens()
    # A single block has text and picture in one stream.
    text = 0 if tokens is None or cos is None or context is not None else len(cos) - tokens.total
    place = positions(x.shape[1], before=text)
    of_rows = (None, None) if cos is None or sin is None else (cos[n:], sin[n:])
    q, k = _norm_rope(q, k, self.norm_q, self.norm_k, of_rows[0], of_rows[1], place)
    if context is None:  # a single block projects the output together with its MLP's
        return _attend(self, q, *keys_values(self, k, v, before=text))
    projections = self.add_q_proj, self.add_k_proj, self.add_v_proj
    q2, k2, v2 = (_heads(to(context), self.heads) for to in projections)
    rows = (None, None) if cos is None or sin is None else (cos[:n], sin[:n])
    q2, k2 = _norm_rope(q2, k2, self.norm_added_q, self.norm_added_k, *rows)
    k, v = keys_values(self, _join(k2, k), _join(v2, v), before=n)
    out = _attend(self, _join(q2, q), k, v)
    return self.to_out[1](self.to_out[0](out[:, n:])), self.to_add_out(out[:, :n])


def wan(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """``WanAttention``: the norm spans all heads, then rotary positions."""
    x = hidden_states
    if (
        kwargs
        or attention_mask is not None
        or not usable(self, x)
        or class_name(self.processor) not in _STOCK
        or getattr(self, "fused_projections", False)
        or self.add_k_proj is not None
        or not _native_backend(self.processor)
    ):
        _need_all_tokens(self, x)
        return type(self).forward(
            self, x, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
        )
    source = x if encoder_hidden_states is None else encoder_hidden_states
    q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
    q, k = (
        ops.layer_norm_modulate(t, weight=norm.weight, eps=norm.eps, rms=True)
        if _rms(norm, t)
        else norm(t)
        for t, norm in ((q, self.norm_q), (k, self.norm_k))
    )
    q, k, v = (_heads(t, self.heads) for t in (q, k, v))
    if rotary_emb is not None:
        cos, sin = rotary_emb[0][0, :, 0, 0::2].float(), rotary_emb[1][0, :, 0, 1::2].float()
        q, k = ops.qk_norm_rope(q, k, cos=cos, sin=sin, position=positions(q.shape[2]))
    if encoder_hidden_states is None:
        k, v = keys_values(self, k, v)
    return self.to_out[1](self.to_out[0](_attend(self, q, k, v)))


RULES: dict[str, tuple[str, Rule]] = {
    "diffusers.models.attention_processor.Attention": ("attention", attention),
    "diffusers.models.transformers.transformer_flux.FluxAttention": (
        "attention and qk_norm_rope",
        flux,
    ),
    "diffusers.models.transformers.transformer_wan.WanAttention": (
        "attention and qk_norm_rope",
        wan,
    ),
}
