r"""Sums over a sample: what norms, distances, scalar products and Gaussian densities of sampling
programs are made of.

    square:      s_b = sum_i x[b, i]^2
    product:     s_b = sum_i x[b, i] y[b, i]
    difference:  s_b = sum_i (x[b, i] - y[b, i])^2

Gradients, with g that of s:

    square:      dx = 2 g x
    product:     dx = g y,              dy = g x
    difference:  dx = 2 g (x - y),      dy = -dx
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, needs_grad, pick
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_like, check_shape, check_tensor, wide

KINDS = ("square", "product", "difference")


def sample_sums_ref(x: Tensor, y: Tensor | None, difference: bool) -> Tensor:
    """The specification: products and sums in float64, rounded once to float32 (float64 for
    float64 input). The other rows add products of float32 in float32 within a piece of a sample
    and the pieces in float64."""
    first = x.double()
    if y is None:
        terms = first.square()
    elif difference:
        terms = (first - y.double()).square()
    else:
        terms = first * y.double()
    sums = terms[..., None].flatten(1).sum(1)
    return sums if x.dtype == torch.float64 else sums.float()


def _native_why_not(x: Tensor, y: Tensor | None, difference: bool) -> str | None:
    return why_not_native(x, y, gpu="sample_sums")


def _triton_why_not(x: Tensor, y: Tensor | None, difference: bool) -> str | None:
    return why_not_triton(x, y)


IMPLS = (
    Impl("native", native("sample_sums"), _native_why_not),
    Impl("triton", triton_row("sample_sums"), _triton_why_not),
    Impl("ref", sample_sums_ref, always),
)


def row_args(
    x: Tensor, y: Tensor | None = None, *, kind: str = "square"
) -> tuple[Tensor, Tensor | None, bool]:
    """Check the public arguments and give those of a row."""
    op = "sample_sums"
    check_tensor(op, "x", x)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind is {kind!r}, need one of {', '.join(KINDS)}")
    if kind == "square" and y is not None:
        raise ValueError(f"{op}: y is given with kind 'square', need None")
    if kind != "square":
        if y is None:
            raise ValueError(f"{op}: y is None with kind {kind!r}, need a tensor like x")
        check_like(op, "y", y, x)
        check_shape(op, "y", y, x.shape, (1, *x.shape[1:]))
    return x, y, kind == "difference"


TABLES = {"sample_sums": (IMPLS, row_args)}


class _SampleSums(torch.autograd.Function):
    """Keeps inputs alone; its backward is of torch's ops, and so has derivatives itself."""

    @staticmethod
    def forward(ctx: Any, row: Callable[..., Tensor], *args: Any) -> Tensor:
        x, y, ctx.difference = args
        ctx.save_for_backward(x, y)
        return row(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        _, wants_x, wants_y, _ = ctx.needs_input_grad
        g = grad.view(-1, *[1] * (x.dim() - 1))
        of_x = of_y = None
        if y is None:
            of_x = 2 * g * x
        elif ctx.difference:
            of_x = 2 * g * (wide(x) - wide(y))
            of_y = -of_x
        else:
            of_x = g * y if wants_x else None
            of_y = g * x if wants_y else None
        if of_y is not None and wants_y:
            of_y = (of_y.sum(0, keepdim=True) if y.shape != x.shape else of_y).to(y.dtype)
        return (
            None,
            of_x.to(x.dtype) if of_x is not None and wants_x else None,
            of_y if wants_y else None,
            None,
        )


def sample_sums(
    x: Tensor, y: Tensor | None = None, *, kind: str = "square", impl: str | None = None
) -> Tensor:
    """The sum of squares, of products or of squared differences over every sample.

    Args:
        x: ``[B, ...]``; float16, bfloat16 or float32 (float64 on the reference row). Samples that
            are not contiguous are copied.
        y: like ``x``, or ``[1, ...]``: one for all samples. None with kind "square".
        kind: "square", "product" or "difference".
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        float32 ``[B]`` (float64 for float64). The order of additions depends on the size of a
        sample alone: the same bits in every run, with any number of threads, whatever the memory
        layout, and whether a sample comes alone or in a batch. 0 for samples without elements.
        Gradients go to ``x`` and ``y`` and have derivatives themselves.

    Raises:
        ValueError: a shape, dtype or device differs from the above; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, y, kind=kind)
    row = pick("sample_sums", IMPLS, impl, *args)
    if row is sample_sums_ref or not needs_grad(x, y):
        return row(*args)
    out: Tensor = _SampleSums.apply(row, *args)  # type: ignore[no-untyped-call]
    return out


if hasattr(torch.ops.fastdiff, "sample_sums"):

    @torch.library.register_fake("fastdiff::sample_sums")
    def _(x: Tensor, y: Tensor | None, difference: bool) -> Tensor:
        return x.new_empty(x.shape[:1], dtype=torch.float32)
