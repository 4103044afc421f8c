"""Feed-forwards of experts: route, grouped products over one stack of their weights, combine.

The weights are stacked once, and the experts' parameters become views of the stack: they stay the
objects that they were, hold no second copy, and a write to one is a write to the stack. Where they
have moved since (``.to()``, offloading), the layout is gone and the next call stacks them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.integrations.rules import Rule, class_name, readable, usable

_HIDREAM = "diffusers.models.transformers.transformer_hidream_image."
_MLP = _HIDREAM + "HiDreamImageFeedForwardSwiGLU"


def _experts(module: Any) -> list[tuple[nn.Linear, nn.Linear, nn.Linear]]:
    """gate, up and down of every expert."""
    return [(e.w1, e.w3, e.w2) for e in module.experts]


def why_not(module: Any) -> str | None:
    """Why the experts of ``module`` cannot be stacked, or None."""
    first = module.experts[0].w1.weight
    for expert in module.experts:
        if class_name(expert) != _MLP:
            return f"has {type(expert).__name__} among its experts"
        for layer in (expert.w1, expert.w2, expert.w3):
            w = getattr(layer, "weight", None)
            if (
                type(layer) is not nn.Linear
                or type(w) is not nn.Parameter
                or layer.bias is not None
            ):
                return f"has {class_name(layer)} in its experts, need plain nn.Linear"
            if w.is_meta or (w.dtype, w.device) != (first.dtype, first.device):
                return f"has experts in {w.dtype} on {w.device}, and in {first.dtype}"
    return None


def _stacks(experts: Sequence[tuple[nn.Linear, ...]]) -> tuple[Tensor, Tensor] | None:
    """``[E, 2F, C]`` and ``[E, C, F]`` where the parameters lie so in memory."""
    gate, _, down = (layer.weight for layer in experts[0])
    size = gate.numel()
    width, wide = gate.element_size(), gate.shape
    start, end = gate.data_ptr(), down.data_ptr()
    for e, (g, u, d) in enumerate(experts):
        at = start + 2 * e * size * width
        if (
            g.weight.data_ptr() != at
            or u.weight.data_ptr() != at + size * width
            or d.weight.data_ptr() != end + e * size * width
        ):
            return None
    for weight, copies in ((gate, 2), (down, 1)):  # the storage holds them all
        left = weight.untyped_storage().nbytes() // width - weight.storage_offset()
        if left < copies * len(experts) * size:
            return None
    f, c = wide
    up = gate.as_strided((len(experts), 2 * f, c), (2 * size, c, 1))
    return up, down.as_strided((len(experts), c, f), (size, f, 1))


@torch.inference_mode(False)  # parameters may not become tensors of inference
@torch.no_grad()
def stack(module: Any) -> tuple[Tensor, Tensor]:
    """The experts' weights as two stacks, which their parameters are views of from here on."""
    experts = _experts(module)
    found = _stacks(experts)
    if found is not None:
        return found
    gate = experts[0][0].weight
    f, c = gate.shape
    up, down = gate.new_empty(len(experts), 2 * f, c), gate.new_empty(len(experts), c, f)
    for e, layers in enumerate(experts):
        # One expert after the other: a second copy is never larger than one of them.
        for layer, view in zip(layers, (up[e, :f], up[e, f:], down[e]), strict=True):
            view.copy_(layer.weight)
            layer.weight.data = view
    return up, down


@torch.inference_mode(False)
@torch.no_grad()
def unstack(module: Any) -> None:
    """Every parameter in memory of its own, with the values it has by now."""
    for layers in _experts(module):
        for layer in layers:
            weight = getattr(layer, "weight", None)  # of another module, where someone wrapped it
            if isinstance(weight, Tensor) and weight.untyped_storage().nbytes() > weight.nbytes:
                weight.data = weight.detach().clone()


def _plain(module: Any, x: Tensor) -> bool:
    """Nobody has wrapped or listens to its experts since they were stacked."""
    gate = module.gate
    return (
        class_name(gate) == _HIDREAM + "MoEGate"
        and "forward" not in gate.__dict__
        and not (gate._forward_hooks or gate._forward_pre_hooks)
        and gate.scoring_func == "softmax"
        and type(gate.weight) is nn.Parameter
        and gate.weight.dtype == x.dtype
        and gate.weight.device == x.device
        and all(
            class_name(e) == _MLP
            and "forward" not in e.__dict__
            and not (e._forward_hooks or e._forward_pre_hooks)
            and all(readable(layer, nn.Linear, x) for layer in (e.w1, e.w2, e.w3))
            for e in module.experts
        )
    )


def hidream(self: Any, x: Tensor) -> Tensor:
    """``MOEFeedForwardSwiGLU``: its inference without the wait for the experts' counts."""
    if not usable(self, x) or not x.numel() or not _plain(self, x):
        return type(self).forward(self, x)
    up, down = stack(self)
    gate, tokens = self.gate, x.reshape(-1, x.shape[-1])
    # Logits in the dtype of x, as its own: rounded otherwise, they would choose otherwise.
    routing = ops.moe_route(
        F.linear(tokens, gate.weight), gate.top_k,
        renormalise=gate.norm_topk_prob and gate.top_k > 1,
    )  # fmt: skip
    h = ops.grouped_linear(
        tokens, up, routing.offsets, index=routing.tokens, activation="swiglu"
    )  # fmt: skip
    y = ops.grouped_linear(h, down, routing.offsets)
    y = ops.moe_combine(y, routing.weights, routing.position).view(x.shape)
    out: Tensor = y + self.shared_experts(x)
    return out


RULES: dict[str, tuple[str, Rule]] = {
    _HIDREAM + "MOEFeedForwardSwiGLU": ("moe_route, grouped_linear and moe_combine", hidream),
}
