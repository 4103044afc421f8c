r"""Backward of the native rows of layer_norm_modulate, gate_residual and their chain.

With n the normalised row, k = weight (1 + scale), dm and dr the gradients of m and r:

    dx = dr + rstd (dm k - mean_d(dm k) - n mean_d(dm k n))        without mean_d(dm k) for rms
    dy = gate dx,    dgate = sum_n dx y
    dshift = sum_n dm,    dscale = weight sum_n dm n + bias sum_n dm
    dweight = sum_b (1 + scale) sum_n dm n,    dbias = sum_b (1 + scale) sum_n dm

The kernel makes dx, dy and the sums over tokens in one pass; nothing but inputs is kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NORM = ("shift", "scale", "weight", "bias", "eps", "rms")
ARGUMENTS = {
    "layer_norm_modulate": ("x", *_NORM),
    "gate_residual": ("x", "y", "gate"),
    "gate_residual_norm_modulate": ("x", "y", "gate", *_NORM),
}
_SAVED = ("x", "y", "gate", "scale", "weight", "bias")


def no_backward(op: str, args: tuple[Any, ...]) -> str | None:
    """The sentence where a gradient is asked for that the kernel does not give."""
    given = dict(zip(ARGUMENTS[op], args, strict=True))
    for name in ("gate", "shift", "scale"):
        m = given.get(name)
        if m is not None and m.dim() == 3:
            return f"this row's backward needs modulations per sample, [B, D]; {name} is [B, N, D]"
    return None


def _gradients(
    dr: Tensor | None,
    dm: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> dict[str, Tensor]:
    dx, dy, sums = torch.ops.fastdiff.layer_norm_modulate_backward(
        dr, dm, x, y, gate, scale, weight, eps, rms
    )
    grads = {"x": dx, "y": dy}
    if y is not None:
        grads["gate"] = sums[:, 2]
    if dm is not None:
        sum_m, sum_mn = sums[:, 0], sums[:, 1]
        grads["shift"] = sum_m
        grads["scale"] = sum_mn if weight is None else sum_mn * weight.float()
        if bias is not None:
            grads["scale"] = grads["scale"] + sum_m * bias.float()
        gain = 1.0 if scale is None else 1 + scale.float()
        grads["weight"] = (sum_mn * gain).sum(0)
        grads["bias"] = (sum_m * gain).sum(0)
    return {name: g.to(x.dtype) for name, g in grads.items()}


def _setup_context(op: str):
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        refusal = no_backward(op, inputs)
        if refusal is not None:
            raise NotImplementedError(f"{op}: {refusal}")
        given = dict(zip(ARGUMENTS[op], inputs, strict=True))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(given.get(name) for name in _SAVED))
        ctx.eps, ctx.rms = given.get("eps", 0.0), given.get("rms", False)

    return setup


def _backward(op: str):
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dr = None if op == "layer_norm_modulate" else grads[0]
        dm = None if op == "gate_residual" else grads[-1]
        made: dict[str, Tensor] = {}
        if dr is not None or dm is not None:
            x, y, gate, scale, weight, bias = ctx.saved_tensors
            made = _gradients(dr, dm, x, y, gate, scale, weight, bias, ctx.eps, ctx.rms)
        needs = zip(ARGUMENTS[op], ctx.needs_input_grad, strict=True)
        return tuple(made.get(name) if need else None for name, need in needs)

    return backward


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "layer_norm_modulate: the native row has no second derivative; force the row ref for it"
    )


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def register() -> None:
    """Attach the backward to the operators of the extension."""
    for op in ARGUMENTS:
        torch.library.register_autograd(
            f"fastdiff::{op}", _backward(op), setup_context=_setup_context(op)
        )
    name = "fastdiff::layer_norm_modulate_backward"
    torch.library.register_autograd(name, _no_second_derivative)

    @torch.library.register_fake(name)
    def _(dr, dm, x, y, gate, scale, weight, eps, rms):
        sums = x.new_empty((x.shape[0], 3, x.shape[2]), dtype=torch.float32)
        return _empty(x), x.new_empty((0,)) if y is None else _empty(x), sums
