r"""What low-rank adapters add to a layer's result (LoRA: Hu et al. 2021, arXiv:2106.09685, section
4.1), with an adapter for every sample of a batch (S-LoRA: Sheng et al. 2023, arXiv:2311.03285).

    low[b] = x[b] down[a]^T,    out[b] = y[b] + scale[a] low[b] up[a]^T,    a = index[b] - 1

and out[b] = y[b], to the bit, where index[b] or scale[a] is 0. Gradients, with g that of out:

    dy = g,    u[b] = g[b] up[a],    dx[b] = scale[a] u[b] down[a]
    ddown[a] = scale[a] sum_b u[b]^T x[b],    dup[a] = scale[a] sum_b g[b]^T low[b]
    dscale[a] = sum_b <u[b], low[b]>,         over the samples b of adapter a
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, needs_grad, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import (
    check_index,
    check_like,
    check_range,
    check_shape,
    check_tensor,
    wide,
)
from fastdiff.ops.grouped_linear import GRAD_IMPLS
from fastdiff.ops.linear import linear

MOST_RANK = 256


def _rows(t: Tensor) -> Tensor:
    """``[B, T, D]`` of ``[B, ..., D]``."""
    return t.reshape(t.shape[0], t.shape[1:-1].numel(), t.shape[-1])


def _kept(low: Tensor, y: Tensor) -> Tensor:
    return low.reshape(*y.shape[:-1], low.shape[-1])


def _adapters(scale: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of every sample (or once for all) its adapter, and whether it has one."""
    if index is None:
        at = torch.zeros(1, dtype=torch.int64, device=scale.device)
        return at, at == 0
    count = scale.shape[0]
    return (index - 1).clamp(0, count - 1), (index > 0) & (index <= count)


def lora_add_ref(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    if index is not None:
        check_range("lora_add", "index", index, 0, scale.shape[0] + 1)
    at, on = _adapters(scale, index)
    gain = torch.where(on, scale[at], 0.0)[:, None, None]
    low = _rows(wide(x)) @ wide(down)[at].mT
    low = torch.where(on[:, None, None], low, 0.0)
    base = _rows(y)
    out = (wide(base) + gain * (low @ wide(up)[at].mT)).to(y.dtype)
    neutral = (gain == 0) | (down.shape[1] == 0)
    out = torch.where(neutral, base, out).contiguous().view(y.shape)
    return out, _kept(low.to(x.dtype), y) if keep else x.new_empty(0)


def _torch_row(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    if index is not None:
        check_range("lora_add", "index", index, 0, scale.shape[0] + 1)
    at, on = _adapters(scale, index)
    gain = torch.where(on, scale[at], 0.0)[:, None, None]
    base, rows, rank = _rows(y), _rows(x), down.shape[1]
    if index is None:
        low = rows @ down[0].t()
        some = (gain * low).to(x.dtype).flatten(0, 1)
        out = torch.addmm(base.flatten(0, 1), some, up[0].t()).view(base.shape)
    else:
        low = torch.bmm(rows, torch.where(on[:, None, None], down[at], 0.0).mT)
        out = torch.baddbmm(base, (gain * low).to(x.dtype), up[at].mT)
    neutral = (gain == 0) | (rank == 0)
    out = torch.where(neutral, base, out).contiguous().view(y.shape)
    return out, _kept(low, y) if keep else x.new_empty(0)


def _torch_why_not(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
    keep: bool,
) -> str | None:
    return refuse_grad(y, x, down, up, scale)


def _native_why_not(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
    keep: bool,
) -> str | None:
    if y.is_cuda and y.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {y.dtype} is none of the tensor cores': torch.bfloat16, torch.float16"
    why = why_not_native(y, x, down, up, scale, gpu="lora_add")
    return why or refuse_grad(y, x, down, up, scale)


def _triton_why_not(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
    keep: bool,
) -> str | None:
    return why_not_triton(y, x, down, up, scale) or refuse_grad(y, x, down, up, scale)


IMPLS = (
    Impl("native", native("lora_add"), _native_why_not),
    Impl("triton", triton_row("lora", "lora_add"), _triton_why_not),
    Impl("torch", _torch_row, _torch_why_not),
    Impl("ref", lora_add_ref, always),
)


def row_args(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, bool]:
    """Check the public arguments and give those of a row."""
    op = "lora_add"
    check_tensor(op, "y", y, min_dim=2)
    check_tensor(op, "x", x, min_dim=2)
    check_like(op, "x", x, y, "y")
    check_shape(op, "x", x, (*y.shape[:-1], x.shape[-1]))
    check_tensor(op, "down", down, dim=3)
    check_like(op, "down", down, y, "y")
    count, rank, inner = down.shape
    if not count or (index is None and count != 1) or rank > MOST_RANK or inner != x.shape[-1]:
        adapters = "1" if index is None else "at least 1"
        raise ValueError(
            f"{op}: down has shape {list(down.shape)}, need [adapters, rank, {x.shape[-1]}] with "
            f"{adapters} adapter{'' if index is None else 's'} and a rank of at most {MOST_RANK}"
        )
    check_like(op, "up", up, y, "y")
    check_shape(op, "up", up, (count, y.shape[-1], rank))
    check_tensor(op, "scale", scale)
    if scale.dtype not in (torch.float32, wide(x).dtype):
        raise ValueError(f"{op}: scale is {scale.dtype}, need {wide(x).dtype}")
    if scale.device != y.device:
        raise ValueError(f"{op}: scale is on {scale.device}, need {y.device}, the device of y")
    check_shape(op, "scale", scale, (count,))
    if index is not None:
        check_index(op, "index", index, y, "y")
        check_shape(op, "index", index, y.shape[:1])
    return y, x, down, up, scale, index, False


TABLES = {"lora_add": (IMPLS, row_args)}


def _weight_grads(
    pairs: list[tuple[Tensor, Tensor]], index: Tensor, count: int, impl: str | None
) -> list[Tensor]:
    """Of ``(a, b)``, ``[B, T, r]`` and ``[B, T, D]``: ``[A, r, D]``, a^T b of the samples of each
    adapter, summed in the order of samples."""
    tokens = pairs[0][0].shape[1]
    group = torch.where((index > 0) & (index <= count), index - 1, count)
    order = group.argsort(stable=True)
    of = (group == torch.arange(count, device=index.device)[:, None]).sum(1)
    offsets = torch.cat((of.new_zeros(1), tokens * of.cumsum(0)))
    rows = (tokens * order[:, None] + torch.arange(tokens, device=index.device)).view(-1)
    if impl not in {row.name for row in GRAD_IMPLS}:
        impl = None
    found = []
    for a, b in pairs:
        flat = a[order].flatten(0, 1)
        args = flat, b.flatten(0, 1), offsets, rows
        found.append(pick("grouped_weight_grad", GRAD_IMPLS, impl, *args)(*args))
    return found


class _LoraAdd(torch.autograd.Function):
    """Keeps x where ``down`` is trained, the low-rank product where ``up`` or ``scale`` is, and no
    y."""

    @staticmethod
    def forward(
        ctx: Any, impl: str | None, wants: tuple[bool, ...], *args: Any
    ) -> tuple[Tensor, Tensor]:
        y, x, down, up, scale, index = args
        _, _, of_down, of_up, of_scale = wants
        row_of = (y, x, down, up, scale, index, of_up or of_scale)
        out, low = pick("lora_add", IMPLS, impl, *row_of)(*row_of)
        ctx.impl, ctx.wants, ctx.shape = impl, wants, x.shape
        ctx.save_for_backward(
            x if of_down else None,
            low if of_up or of_scale else None,
            down,
            up,
            scale,
            index,
        )
        ctx.mark_non_differentiable(low)
        return out, low

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError("lora_add: there is no second derivative")
        x, low, down, up, scale, index = ctx.saved_tensors
        if low is not None:
            low = _rows(low)
        of_y, of_x, of_down, of_up, of_scale = ctx.wants
        at, on = _adapters(scale, index)
        gain = torch.where(on, scale[at], 0.0)[:, None, None]
        adds = gain != 0  # the factors of an adapter that adds nothing are not looked at
        g = _rows(grad)
        grad_x = grad_down = grad_up = grad_scale = None
        if of_x or of_down or of_scale:
            u = g @ up[0] if index is None else g @ torch.where(on[:, None, None], up[at], 0.0)
        if of_x or of_down:
            scaled = (gain * u).to(u.dtype)
        if of_x:
            factor, own = torch.where(adds, down[at], 0.0), torch.where(adds, scaled, 0.0)
            grad_x = (own @ (factor[0] if index is None else factor)).view(ctx.shape)
        if not down.shape[1]:
            grad_down, grad_up = torch.zeros_like(down), torch.zeros_like(up)
        elif index is None:
            if of_down:
                grad_down = (scaled.flatten(0, 1).t() @ _rows(x).flatten(0, 1))[None]
            if of_up:
                grad_up = (g.flatten(0, 1).t() @ (gain * low).to(low.dtype).flatten(0, 1))[None]
        elif of_down or of_up:
            pairs = [(scaled, _rows(x))] if of_down else []
            pairs += [((gain * low).to(low.dtype), g)] if of_up else []
            found = _weight_grads(pairs, index, scale.shape[0], ctx.impl)
            grad_down = found[0] if of_down else None
            grad_up = found[-1].mT if of_up else None
        if of_scale:
            each = (wide(u) * wide(low)).sum((1, 2)).to(scale.dtype)  # [B]
            mine = at == torch.arange(scale.shape[0], device=at.device)[:, None]
            grad_scale = torch.where(mine & on, each, 0.0).sum(1)
        return (
            None,
            None,
            grad if of_y else None,
            grad_x,
            grad_down if of_down else None,
            grad_up if of_up else None,
            grad_scale,
            None,
        )


def lora_add(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """``y`` and what the adapter of each sample adds to it.

    Args:
        y: ``[B, ..., N]``, the layer's result; float16, bfloat16 or float32 (float64 on the rows
            "torch" and "ref").
        x: ``[B, ..., K]``, its input; dtype and device of ``y``, as both factors.
        down: ``[A, r, K]`` with r from 0 to 256.
        up: ``[A, N, r]``.
        scale: float32 ``[A]``, on the device of ``y``: read when the op runs, so a captured program
            sees a change.
        index: int64 ``[B]``: 0 for a sample without adapter, a + 1 for one with adapter a. None: A
            is 1, and all samples have it.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        Shape, dtype and device of ``y``, contiguous; never a view of it. Samples without adapter,
        or with a scale of 0, and all with r 0, have the bits of ``y``. Sums are float32. The
        low-rank product is not rounded by the native row on a CPU and "ref"; it is rounded to the
        dtype of ``x``, as tensor cores take it, by the native row on a GPU and "triton", and by
        "torch", which does so once more with its scale. On the native row no sample's bits depend
        on the others.

        Gradients go to ``y`` (as it comes), ``x``, ``down``, ``up`` and ``scale``, the last also
        where it is 0. For them ``x`` is kept where ``down`` is trained, the low-rank product, in
        the dtype of ``x``, where ``up`` or ``scale`` is, and neither where all three are frozen.
        Those of factors are summed in the order of samples, with no atomic additions.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or, on the CPU, an index is
            outside of 0 to A. On a GPU nothing waits for that: such a sample gets ``y``.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(y, x, down, up, scale, index)
    parts = args[:5]
    if needs_grad(*parts):
        wants = tuple(t.requires_grad for t in parts)
        out: Tensor = _LoraAdd.apply(impl, wants, *args[:6])[0]  # type: ignore[no-untyped-call]
        return out
    out, _ = pick("lora_add", IMPLS, impl, *args)(*args)
    return out


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None = None,
) -> Tensor:
    """``ops.linear(x, weight, bias)`` and what :func:`lora_add` adds to it.

    Args:
        x: ``[B, ..., K]``.
        weight: ``[N, K]``, dtype and device of ``x``.
        bias: ``[N]``; None for 0.
        down, up, scale, index: as in :func:`lora_add`.

    Returns:
        ``[B, ..., N]``.

    Raises:
        ValueError: as :func:`linear` and :func:`lora_add` do.
    """
    return lora_add(linear(x, weight, bias), x, down, up, scale, index)


if hasattr(torch.ops.fastdiff, "lora_add"):

    @torch.library.register_fake("fastdiff::lora_add")
    def _(
        y: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        scale: Tensor,
        index: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        low = x.new_empty(*y.shape[:-1], down.shape[1]) if keep else x.new_empty(0)
        return torch.empty_like(y, memory_format=torch.contiguous_format), low
