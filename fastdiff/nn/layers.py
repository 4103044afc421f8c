"""Layers of torch on our operations, unless somebody listens to them.

A network of ours reads the weights of its layers, so that products, activations, residuals and
norms share kernels. A layer that has hooks (an adapter's), is of a class of its own (a layer of
PEFT, a parametrised one) or has a ``forward`` of somebody's is called instead, and what its kernel
would have done beside it is done around it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType, NoneType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.ops import Quantized


class Attention(nn.Module):
    """Whose scores may have another format: its network asks :func:`attention`."""


def heard(module: Any) -> bool:
    """Somebody listens to the calls of ``module``; an adapter that is merged does not."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return bool(module._forward_hooks) and any(
        (adapter := getattr(hook, "adapter", None)) is None or not adapter.merged
        for hook in module._forward_hooks.values()
    )


def quiet(module: Any, cls: type[nn.Module]) -> bool:
    """Reading the weights of ``module`` is the same as calling it: it is exactly a ``cls``, and
    nobody listens. (A method as its own ``forward`` is a rule of the exact mode.)"""
    return (
        type(module) is cls
        and not heard(module)
        and isinstance(module.__dict__.get("forward"), NoneType | MethodType)
    )


def with_activation(module: Any) -> Callable[[Tensor, str | None], Tensor] | None:
    """The ``forward`` of a linear layer in another format, which takes an activation as well; None
    where it has none, or somebody listens to what comes before the activation."""
    found = getattr(module.__dict__.get("forward"), "activated", None)
    return None if heard(module) else found


def other_format(module: Any) -> Callable[..., Tensor | None] | None:
    """``convolve`` of a convolution in another format, which gives None for a call in floats; None
    where it has none, or somebody listens."""
    found = getattr(module.__dict__.get("forward"), "convolve", None)
    return None if heard(module) else found


def linear(module: Any, x: Tensor | Quantized, activation: str | None = None) -> Tensor:
    """``act(module(x))``; ``x [..., K]``, ``activation`` as in ``ops.linear``."""
    if isinstance(x, Quantized):  # of gate_norm_modulate, for this module
        out: Tensor = module.forward.activated(x, activation)
        return out
    if quiet(module, nn.Linear):
        return ops.linear(x, module.weight, module.bias, activation=activation)
    own = with_activation(module)
    if own is not None:
        return own(x, activation)
    y: Tensor = module(x)
    if activation is None:
        return y
    return F.silu(y) if activation == "silu" else F.gelu(y, approximate="tanh")


def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """``ops.attention``, in the format that the scores of ``module`` have; its operands."""
    scores = module.__dict__.get("scores")
    if scores is None:
        out: Any = ops.attention(q, k, v, bias=bias)
    else:
        out = scores(q, k, v, bias)
    result: Tensor = out
    return result


def reads_int8(reader: Any, x: Tensor) -> Any:
    """The ``forward`` of ``reader``, the one layer that reads what is made, where it multiplies
    int8 and may have that in the place of floats like ``x``; else None."""
    own: Any = None if reader is None or heard(reader) else reader.__dict__.get("forward")
    takes = getattr(own, "takes_tokens", None)
    return own if takes is not None and takes(x) else None


def geglu(module: Any, x: Tensor, reader: Any = None) -> Any:
    """GEGLU of ``module(x)``: ``[..., K]`` -> ``[..., N / 2]``; int8 where ``reader``, the one
    layer that reads it (or None), multiplies int8."""
    own = reads_int8(reader, x)
    if own is not None:
        return ops.quantize(linear(module, x), activation="geglu", smooth=own.smooth)
    if quiet(module, nn.Linear):
        return ops.geglu(ops.linear(x, module.weight), module.bias)
    return ops.geglu(module(x))


def conv3x3(
    module: Any,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """``module(up(x)) + bias + add``: a 3x3 convolution of stride 1 and padding 1.

    Args:
        module: a convolution.
        x: ``[B, C, H, W]``.
        bias: ``[B, N]``, one of each sample, beside the layer's own.
        add: ``[B, N, H, W]``, sizes of the result.
        upsample: every pixel of ``x`` is doubled in both directions before.
    """
    own = other_format(module)
    y = None if own is None else own(x, upsample)
    if y is None and (own is not None or quiet(module, nn.Conv2d)):
        each = module.bias
        both = each if bias is None else bias if each is None else each + bias
        return ops.conv3x3(x, module.weight, both, add=add, upsample=upsample)
    if y is None:
        if upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        y = module(x)
    if bias is not None:
        y = y + bias[:, :, None, None]
    return y if add is None else add + y


def pointwise(module: Any, x: Tensor) -> Tensor:
    """A 1x1 convolution of ``x [B, C, H, W]``: a linear layer over pixels."""
    own = other_format(module)
    y = None if own is None else own(x)
    if y is None and (own is not None or quiet(module, nn.Conv2d)):
        pixels = x.permute(0, 2, 3, 1)
        return ops.linear(pixels, module.weight.flatten(1), module.bias).permute(0, 3, 1, 2)
    return module(x) if y is None else y


def group_norm(
    module: Any,
    x: Tensor,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``silu(module(x) (1 + scale) + shift)``; ``x [B, C, H, W]``, shift and scale ``[B, C]`` or
    both None."""
    if quiet(module, nn.GroupNorm):
        return ops.group_norm_silu(
            x, module.num_groups, module.weight, module.bias,
            shift=shift, scale=scale, eps=module.eps, silu=silu,
        )  # fmt: skip
    y: Tensor = module(x)
    if shift is not None and scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if silu else y


def layer_norm(module: Any, x: Tensor) -> Tensor:
    """``module(x)``, a LayerNorm of ``x [B, N, D]`` over its last dimension."""
    if quiet(module, nn.LayerNorm):
        return ops.layer_norm_modulate(x, weight=module.weight, bias=module.bias, eps=module.eps)
    out: Tensor = module(x)
    return out


def gate_norm_modulate(
    reader: Any,
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Any]:
    """``ops.gate_residual_norm_modulate``, whose second output is int8 where ``reader``, the one
    layer that reads it (or None), multiplies int8."""
    own = reads_int8(reader, x)
    if own is None:
        return ops.gate_residual_norm_modulate(x, update, gate, shift, scale, eps=eps)
    smooth = own.smooth
    return ops.gate_residual_norm_quantize(x, update, gate, shift, scale, smooth=smooth, eps=eps)


def gate_norm(module: Any, x: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """``r = x + gate * update`` and ``module(r)``; ``[B, N, D]``, gate ``[B, D]``."""
    if quiet(module, nn.LayerNorm):
        return ops.gate_residual_norm_modulate(
            x, update, gate, weight=module.weight, bias=module.bias, eps=module.eps
        )
    r = ops.gate_residual(x, update, gate)
    return r, module(r)
