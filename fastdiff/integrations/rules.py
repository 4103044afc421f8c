"""What rules share: when one of ours may stand in for a module, and one that reads its weights.

A rule is a function with the signature of a module's ``forward``, first argument the module. It
runs in inference only; where something is not what it was written for (training, gradients,
autocast, a dtype of its own, a layer that an adapter wraps, hooks) it calls the class's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.dispatch import note
from fastdiff.nn.layers import quiet

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Rule = Callable[..., Any]


def class_name(thing: object) -> str:
    """``"diffusers.models.attention.FeedForward"``: rules know classes by name, import none."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def usable(module: nn.Module, x: Any) -> bool:
    """Inference on a plain tensor, with no autocast to decide on other dtypes. Where it is not,
    the module's own forward runs, and a summary says so."""
    good = (
        type(x) is Tensor
        and x.dtype in DTYPES
        and not module.training
        and not torch.is_grad_enabled()
        and not (
            torch.amp.is_autocast_available(x.device.type)
            and torch.is_autocast_enabled(x.device.type)
        )
    )
    if not good:
        note("exact mode", "own forward")
    return good


def _weight_fits(w: Any, x: Tensor) -> bool:
    return w is None or (type(w) is nn.Parameter and w.dtype == x.dtype and w.device == x.device)


def weights_fit(module: Any, x: Tensor) -> bool:
    """Weight and bias, where it has them, are parameters of the dtype and device of ``x``."""
    return _weight_fits(module.weight, x) and _weight_fits(module.bias, x)


def readable(module: Any, cls: type[nn.Module], x: Tensor) -> bool:
    """``module`` is exactly a ``cls`` and nobody listens to its calls, so that reading its weight
    and bias is the same as calling it; they have the dtype and device of ``x``. A ``forward`` of
    its own is a rule of ours, a method, or else it is someone's who wants to be called."""
    return quiet(module, cls) and weights_fit(module, x)


def norm_readable(module: Any, x: Tensor) -> bool:
    """A LayerNorm over the last dimension whose weights may be read."""
    return readable(module, nn.LayerNorm, x) and len(module.normalized_shape) == 1


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift``; x ``[B, N, D]``, shift and scale ``[B, D]``."""
    if norm_readable(norm, x) and x.dim() == 3 and shift.dtype == scale.dtype == x.dtype:
        n: Any = norm
        return ops.layer_norm_modulate(x, shift, scale, weight=n.weight, bias=n.bias, eps=n.eps)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y``; x and y ``[B, N, D]``, gate ``[B, D]``."""
    if x.dtype == y.dtype == gate.dtype and x.shape == y.shape:
        return ops.gate_residual(x, y, gate)
    return x + gate[:, None] * y


def chain(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    norm: nn.Module,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = x + gate * y`` and ``norm(r)``, modulated where shift and scale are given."""
    tensors = [t for t in (y, gate, shift, scale) if t is not None]
    if (
        norm_readable(norm, x)
        and x.shape == y.shape
        and x.dim() == 3
        and all(t.dtype == x.dtype for t in tensors)
    ):
        n: Any = norm
        return ops.gate_residual_norm_modulate(
            x, y, gate, shift, scale, weight=n.weight, bias=n.bias, eps=n.eps
        )
    r = add_gated(x, y, gate)
    if shift is None or scale is None:
        return r, norm(r)
    return r, modulate(norm, r, shift, scale)
