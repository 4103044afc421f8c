r"""Group normalisation (Wu & He 2018, arXiv:1803.08494) with the SiLU after it, as in the residual
blocks of diffusion U-Nets (Ho et al. 2020, arXiv:2006.11239; with scale and shift: Nichol &
Dhariwal 2021, arXiv:2102.09672).

    h = (x - mean_g x) / sqrt(var_g x + eps)      over the C/G channels and all positions of a group
    y = silu((h weight + bias) (1 + scale) + shift),   silu(u) = u / (1 + exp(-u))

The native row has a backward, for every argument, which keeps only inputs; second derivatives take
the reference's. On one thread of an AMD EPYC (Zen 5), 2 x 320 x 64 x 64, 2 x 1280 x 16 x 16 and
8 x 64 x 32 x 32, forward and backward took 0.2 to 0.9 of the reference's time in bfloat16 or
channels last, and about that time (0.7 to 1.1) in contiguous float32
(``bench/run.py group_norm_silu``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_finite, check_like, check_shape, check_tensor, wide


def _channels_last(x: Tensor) -> bool:
    """Dense with the channels innermost in memory, and not contiguous as well."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _empty_like(x: Tensor) -> Tensor:
    if _channels_last(x):
        return torch.empty_like(x.movedim(1, -1)).movedim(-1, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def group_norm_silu_ref(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    silu: bool,
) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    w = None if weight is None else wide(weight)
    b = None if bias is None else wide(bias)
    y = torch.group_norm(wide(x), num_groups, w, b, eps)
    channels = (*x.shape[:2], *[1] * (x.dim() - 2))
    if scale is not None:
        y = y * (1 + wide(scale).reshape(channels))
    if shift is not None:
        y = y + wide(shift).reshape(channels)
    y = (F.silu(y) if silu else y).to(x.dtype)
    return y.movedim(1, -1).contiguous().movedim(-1, 1) if _channels_last(x) else y.contiguous()


def _native_why_not(x, num_groups, weight, bias, shift, scale, eps, silu) -> str | None:
    return why_not_native(x, weight, bias, shift, scale, gpu="group_norm_silu")


def _triton_why_not(x, num_groups, weight, bias, shift, scale, eps, silu) -> str | None:
    tensors = (x, weight, bias, shift, scale)
    return why_not_triton(*tensors) or refuse_grad(*tensors)


IMPLS = (
    Impl("native", native("group_norm_silu"), _native_why_not),
    Impl("triton", triton_row("group_norm_silu"), _triton_why_not),
    Impl("ref", group_norm_silu_ref, always),
)


def row_args(x, num_groups, weight=None, bias=None, *, shift=None, scale=None, eps=1e-5, silu=True):
    """Check the public arguments and give those of a row."""
    op = "group_norm_silu"
    check_tensor(op, "x", x, min_dim=2)
    C = x.shape[1]
    if not isinstance(num_groups, int) or num_groups < 1 or C % num_groups:
        raise ValueError(f"{op}: num_groups is {num_groups!r}, need a divisor of C = {C}")
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None:
            check_like(op, name, w, x)
            check_shape(op, name, w, (C,))
    for name, m in (("shift", shift), ("scale", scale)):
        if m is not None:
            check_like(op, name, m, x)
            check_shape(op, name, m, x.shape[:2])
    check_finite(op, "eps", eps, positive=True)
    return x, num_groups, weight, bias, shift, scale, float(eps), bool(silu)


TABLES = {"group_norm_silu": (IMPLS, row_args)}


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Group norm, per-sample scale and shift, SiLU: ``silu(group_norm(x) * (1 + scale) + shift)``.

    Args:
        x: ``[B, C, *]`` with any number of positions' dimensions; float16, bfloat16 or float32
            (float64 on the reference row); contiguous or channels last, other layouts are copied.
        num_groups: G, a divisor of C.
        weight, bias: ``[C]``, dtype and device of ``x``; None for 1 and 0.
        shift, scale: ``[B, C]``, dtype and device of ``x``; None for 0.
        eps: added to the variance, so in units of ``x**2``; above 0.
        silu: False gives the group norm without its activation.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        Shape, dtype and device of ``x``; channels last where ``x`` is, else contiguous; never a
        view of it.

    Raises:
        ValueError: ``num_groups`` does not divide C, or a shape, dtype or device differs from the
            above; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, num_groups, weight, bias, shift=shift, scale=scale, eps=eps, silu=silu)
    return pick("group_norm_silu", IMPLS, impl, *args)(*args)


if hasattr(torch.ops.fastdiff, "group_norm_silu"):

    @torch.library.register_fake("fastdiff::group_norm_silu")
    def _(x, num_groups, weight, bias, shift, scale, eps, silu):
        return _empty_like(x)

    @torch.library.register_fake("fastdiff::group_norm_silu_backward")
    def _(grad, x, num_groups, weight, bias, shift, scale, eps, silu):
        sums = x.new_empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32)
        return _empty_like(x), sums

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.num_groups, weight, bias, shift, scale, ctx.eps, ctx.silu = inputs
        ctx.save_for_backward(x, weight, bias, shift, scale)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, shift, scale = ctx.saved_tensors
        dx, sums = torch.ops.fastdiff.group_norm_silu_backward(
            grad, x, ctx.num_groups, weight, bias, shift, scale, ctx.eps, ctx.silu
        )
        sum_u, sum_un = sums.unbind(1)
        grads = {"x": dx, "shift": sum_u}
        grads["scale"] = sum_un if weight is None else sum_un * weight.float()
        if bias is not None:
            grads["scale"] = grads["scale"] + sum_u * bias.float()
        gain = 1.0 if scale is None else 1 + scale.float()
        grads["weight"] = (sum_un * gain).sum(0)
        grads["bias"] = (sum_u * gain).sum(0)
        names = ("x", "num_groups", "weight", "bias", "shift", "scale", "eps", "silu")
        needs = zip(names, ctx.needs_input_grad, strict=True)
        return tuple(grads[name].to(x.dtype) if need else None for name, need in needs)

    def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            "group_norm_silu: the native row has no second derivative; force the row ref for it"
        )

    torch.library.register_autograd(
        "fastdiff::group_norm_silu", _backward, setup_context=_setup_context
    )
    torch.library.register_autograd("fastdiff::group_norm_silu_backward", _no_second_derivative)
