r"""Linear layers of experts over ragged groups of rows, with the activation between them (the
grouped products of MegaBlocks: Gale et al. 2022, arXiv:2211.15841; gated forms: Shazeer 2020,
arXiv:2002.05202).

    u[r] = W_e x[index_r] + bias_e,   offsets_e <= r < offsets_(e + 1)
    y[r] = act(u[r])                  None, "gelu", "gelu_tanh", "silu"
    y[r] = h * act(g)                 "geglu": [h, g] = u[r], GELU's erf form
    y[r] = act(g) * h                 "swiglu": [g, h] = u[r], SiLU (DiT-MoE, Llama)
    y[r] = h * act(g)                 "swishglu": [h, g] = u[r], SiLU (MoDE)

Rows past the last group are not computed. The gradient of the weight is another grouped product,
dW_e = sum_r dy[r] x[index_r]^T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

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
from fastdiff.ops.linear import linear

GATED = ("geglu", "swiglu", "swishglu")
ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu", *GATED)


def activate(u: Tensor, activation: str | None) -> Tensor:
    """``act(u)``: of ``[..., N]``, or ``[..., N / 2]`` where the activation gates."""
    if activation in GATED:
        a, b = u.chunk(2, -1)
        if activation == "geglu":
            return a * F.gelu(b)
        return F.silu(a) * b if activation == "swiglu" else a * F.silu(b)
    if activation == "silu":
        return F.silu(u)
    if activation is None:
        return u
    return F.gelu(u, approximate="tanh" if activation == "gelu_tanh" else "none")


def _groups(offsets: Tensor, rows: int) -> Tensor:
    """int64 ``[R]``: the group of every row, E past the last."""
    at = torch.arange(rows, device=offsets.device)
    return (at[:, None] >= offsets[1:]).sum(1)


def _check_ascending(op: str, offsets: Tensor, rows: int) -> None:
    """For reference rows, where values cost no sync: as ``check_range``."""
    fake = torch.compiler.is_compiling() or isinstance(offsets, FakeTensor)
    if fake or offsets.device.type != "cpu":
        return
    last = 0
    for e, value in enumerate(map(int, offsets)):
        if not last <= value <= rows or (value and not e):
            raise ValueError(
                f"{op}: offsets has value {value} at {e}, need ascending values from 0 to at most "
                f"{rows}"
            )
        last = value


def grouped_linear_ref(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end. Every
    expert computes every row, so that no size depends on values; rows past the last group are 0."""
    if index is not None:
        check_range("grouped_linear", "index", index, 0, x.shape[0])
        x = x[index]
    _check_ascending("grouped_linear", offsets, x.shape[0])
    rows, group = wide(x), _groups(offsets, x.shape[0])
    out = rows.new_zeros(x.shape[0], weight.shape[1])
    for e in range(weight.shape[0]):
        found = F.linear(rows, wide(weight[e]), None if bias is None else wide(bias[e]))
        out = torch.where((group == e)[:, None], found, out)
    live = (group < weight.shape[0])[:, None]
    return torch.where(live, activate(out, activation), 0.0).to(x.dtype)


def grouped_weight_grad_ref(
    grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor | None
) -> Tensor:
    """The specification: sums over the rows of each group in float32."""
    if index is not None:
        check_range("grouped_weight_grad", "index", index, 0, x.shape[0])
        x = x[index]
    _check_ascending("grouped_weight_grad", offsets, grad.shape[0])
    group, count = _groups(offsets, grad.shape[0]), offsets.shape[0] - 1
    out = [
        torch.where((group == e)[:, None], wide(grad), 0.0).T
        @ torch.where((group == e)[:, None], wide(x), 0.0)
        for e in range(count)
    ]
    return torch.stack(out).to(x.dtype)


# ---- one expert: the plain layer -----------------------------------------------------------------


def _single_row(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
) -> Tensor:
    rows = x if index is None else x[index]
    fused = activation if activation in ("gelu_tanh", "silu") else None
    u = linear(rows, weight[0], None if bias is None else bias[0], activation=fused)
    return u if fused == activation else activate(u, activation)


def _single_why_not(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
) -> str | None:
    if weight.shape[0] != 1:
        return f"weight is of {weight.shape[0]} experts; this row is for one"
    return refuse_grad(x, weight, bias)


# ---- torch's grouped product ---------------------------------------------------------------------


def _torch_row(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
) -> Tensor:
    rows = x if index is None else x[index]
    u = F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets[1:].int())
    if bias is not None:
        group = _groups(offsets, rows.shape[0]).clamp(max=weight.shape[0] - 1)
        u = u + bias[group]
    return activate(u, activation)


def _torch_why_not(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return f"x is {x.dtype} on {x.device}; torch groups products of torch.bfloat16 on a GPU"
    if weight.shape[1] % 8 or weight.shape[2] % 8:
        return f"weight is {list(weight.shape)}; torch needs multiples of 16 bytes"
    return refuse_grad(x, weight, bias)


def _native_why_not(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
) -> str | None:
    why = why_not_native(x, weight, bias, gpu="grouped_linear") or refuse_grad(x, weight, bias)
    return why or _no_tensor_cores(x)


def _no_tensor_cores(x: Tensor) -> str | None:
    if x.is_cuda and x.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {x.dtype} is none of the tensor cores': torch.bfloat16, torch.float16"
    return None


def _triton_why_not(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    activation: str | None,
) -> str | None:
    return why_not_triton(x, weight, bias) or refuse_grad(x, weight, bias)


def _grad_native_why_not(
    grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor | None
) -> str | None:
    why = why_not_native(grad, x, gpu="grouped_weight_grad") or refuse_grad(grad, x)
    return why or _no_tensor_cores(x)


def _grad_triton_why_not(
    grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor | None
) -> str | None:
    return why_not_triton(grad, x) or refuse_grad(grad, x)


IMPLS = (
    Impl("single", _single_row, _single_why_not),
    Impl("native", native("grouped_linear"), _native_why_not),
    Impl("triton", triton_row("grouped_linear"), _triton_why_not),
    Impl("torch", _torch_row, _torch_why_not),
    Impl("ref", grouped_linear_ref, always),
)
GRAD_IMPLS = (
    Impl("native", native("grouped_weight_grad"), _grad_native_why_not),
    Impl("triton", triton_row("grouped_linear", "grouped_weight_grad"), _grad_triton_why_not),
    Impl("ref", grouped_weight_grad_ref, always),
)


def _check_offsets(op: str, offsets: Tensor, x: Tensor, groups: int | None) -> None:
    check_index(op, "offsets", offsets, x)
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"{op}: offsets has shape {list(offsets.shape)}, need [groups + 1]")
    if groups is not None:
        check_shape(op, "offsets", offsets, (groups + 1,))


def _check_rows(op: str, index: Tensor | None, x: Tensor) -> None:
    if index is not None:
        check_index(op, "index", index, x)
        if index.dim() != 1:
            raise ValueError(f"{op}: index has shape {list(index.shape)}, need [rows]")


def row_args(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, str | None]:
    """Check the public arguments and give those of a row."""
    op = "grouped_linear"
    check_tensor(op, "x", x, dim=2)
    check_like(op, "weight", weight, x)
    check_tensor(op, "weight", weight, dim=3)
    groups, out = weight.shape[:2]
    if not groups:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, need at least one expert")
    check_shape(op, "weight", weight, (groups, out, x.shape[1]))
    _check_offsets(op, offsets, x, groups)
    if bias is not None:
        check_like(op, "bias", bias, x)
        check_shape(op, "bias", bias, (groups, out))
    _check_rows(op, index, x)
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(a) for a in ACTIVATIONS)
        raise ValueError(f"{op}: activation is {activation!r}, need one of {names}")
    if activation in GATED and out % 2:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}, need an even number of rows for "
            f"{activation}"
        )
    return x, weight, offsets, bias, index, activation


def grad_args(
    grad: Tensor, x: Tensor, offsets: Tensor, *, index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check the public arguments and give those of a row."""
    op = "grouped_weight_grad"
    check_tensor(op, "x", x, dim=2)
    check_like(op, "grad", grad, x)
    check_tensor(op, "grad", grad, dim=2)
    _check_offsets(op, offsets, x, None)
    _check_rows(op, index, x)
    rows = x.shape[0] if index is None else index.shape[0]
    check_shape(op, "grad", grad, (rows, grad.shape[1]))
    return grad, x, offsets, index


TABLES = {
    "grouped_linear": (IMPLS, row_args),
    "grouped_weight_grad": (GRAD_IMPLS, grad_args),
}


def grouped_weight_grad(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    index: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """The gradient of a grouped linear layer's weight.

    Args:
        grad: ``[R, N]``, of the layer's output without activation; float16, bfloat16 or float32
            (float64 on the reference row).
        x: ``[R, K]``, or ``[T, K]`` with ``index``; dtype and device of ``grad``.
        offsets: int64 ``[E + 1]``, ascending from 0 to at most R.
        index: int64 ``[R]``, the row of ``x`` of every row.
        impl: row of ``GRAD_IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[E, N, K]``, dtype and device of ``x``; 0 for a group without rows. Sums are taken in
        float32 in the order of rows.

    Raises:
        ValueError: a shape, dtype or device differs from the above.
        NoImpl: the forced row refuses; the message says why.
    """
    args = grad_args(grad, x, offsets, index=index)
    return pick("grouped_weight_grad", GRAD_IMPLS, impl, *args)(*args)


def _activation_grad(u: Tensor | None, grad: Tensor, activation: str | None) -> Tensor:
    """The gradient of ``u`` from that of ``activate(u)``."""
    if u is None:
        return grad
    if activation not in GATED:
        if activation == "silu":
            return torch.ops.aten.silu_backward(grad, u)
        form = "tanh" if activation == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward(grad, u, approximate=form)
    first = activation == "swiglu"  # the half that the activation takes
    halves, out = u.chunk(2, -1), torch.empty_like(u)
    gate, other = halves[not first], halves[first]
    to_gate, to_other = (out.chunk(2, -1)[i] for i in (not first, first))
    if activation == "geglu":
        to_other.copy_(grad * F.gelu(gate))
        to_gate.copy_(torch.ops.aten.gelu_backward(grad * other, gate))
    else:
        to_other.copy_(grad * F.silu(gate))
        to_gate.copy_(torch.ops.aten.silu_backward(grad * other, gate))
    return out


def _clear(y: Tensor, offsets: Tensor) -> Tensor:
    """``y`` with 0 in the rows past the last group."""
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        y[int(offsets[-1]) :] = 0.0  # there is nothing to wait for
        return y
    live = torch.arange(y.shape[0], device=y.device) < offsets[-1]
    return torch.where(live[:, None], y, 0.0)


class _Grouped(torch.autograd.Function):
    """Keeps x and u; what the activation gives is computed again where the gradient needs it."""

    @staticmethod
    def forward(ctx: Any, impl: str | None, activation: str | None, *args: Any) -> Tensor:
        x, weight, offsets, bias, index = args
        plain = (x, weight, offsets, bias, index, None)
        u: Tensor = pick("grouped_linear", IMPLS, impl, *plain)(*plain)
        ctx.activation, ctx.impl = activation, impl
        ctx.save_for_backward(x, weight, offsets, bias, index, u if activation else None)
        return activate(u, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets, bias, index, u = ctx.saved_tensors
        grad = _activation_grad(u, grad, ctx.activation)
        groups = weight.shape[0]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            args = (grad, weight.transpose(1, 2), offsets, None, None, None)
            grad_x = _clear(pick("grouped_linear", IMPLS, ctx.impl, *args)(*args), offsets)
            if index is not None:
                grad_x = torch.zeros_like(x).index_add_(0, index, grad_x)
        if ctx.needs_input_grad[3]:
            rows_of_grad = {row.name for row in GRAD_IMPLS}
            impl = ctx.impl if ctx.impl in rows_of_grad else None
            grad_weight = grouped_weight_grad(grad, x, offsets, index=index, impl=impl)
        if bias is not None and ctx.needs_input_grad[5]:
            sums = wide(grad).new_zeros(groups + 1, grad.shape[1])
            sums.index_add_(0, _groups(offsets, grad.shape[0]), wide(grad))
            grad_bias = sums[:groups].to(bias.dtype)
        return None, None, grad_x, grad_weight, None, grad_bias, None


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    activation: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Each group of rows through its expert's linear layer, and an activation.

    Args:
        x: ``[R, K]``, rows group after group; or ``[T, K]`` in any order with ``index``. float16,
            bfloat16 or float32 (float64 on the reference row).
        weight: ``[E, N, K]``, dtype and device of ``x``; any strides, no copy is made where one of
            the last two is 1.
        offsets: int64 ``[E + 1]``, ascending from 0 to at most R; a group may be empty.
        bias: ``[E, N]``.
        index: int64 ``[R]``: row r is ``x[index[r]]``. Repeats are allowed.
        activation: None, "gelu", "gelu_tanh", "silu"; or "geglu", "swiglu" (the first half gates),
            "swishglu" (the second half gates), which halve N.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[R, N]`` or ``[R, N / 2]``, dtype and device of ``x``. Rows past the last group have no
        defined value. With one expert all rows are its, to the bit those of ``ops.linear``.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or, on the CPU, an index is
            outside of x, or offsets are not ascending from 0 to at most R. On a GPU nothing waits
            for that: such rows have no defined value.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, weight, offsets, bias=bias, index=index, activation=activation)
    if needs_grad(x, weight, bias):
        out: Tensor = _Grouped.apply(impl, activation, *args[:5])  # type: ignore[no-untyped-call]
        return out
    return pick("grouped_linear", IMPLS, impl, *args)(*args)


if hasattr(torch.ops.fastdiff, "grouped_linear"):

    @torch.library.register_fake("fastdiff::grouped_linear")
    def _(
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        activation: str | None,
    ) -> Tensor:
        rows = x.shape[0] if index is None else index.shape[0]
        out = weight.shape[1] // 2 if activation in GATED else weight.shape[1]
        return x.new_empty(rows, out)

    @torch.library.register_fake("fastdiff::grouped_weight_grad")
    def _(grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor | None) -> Tensor:
        return x.new_empty(offsets.shape[0] - 1, grad.shape[1], x.shape[1])
