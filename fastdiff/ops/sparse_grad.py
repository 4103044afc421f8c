r"""Gradients of a weight at its trainable positions alone (SaRA: Hu et al. 2024, arXiv:2409.06633,
section 3.4, "unstructural backpropagation").

Of y = x W^T + b only the entries W[o_n, i_n], n < nnz, are trained. With g the gradient of y, what
they need is

    dv_n = sum_t g[t, o_n] x[t, i_n]

and of y = conv2d(x, W), with (c, i, j) the column of an entry in W.view(O, -1), stride s, padding p
and dilation d,

    dv_n = sum_{b, h, w} g[b, o_n, h, w] x[b, c_n, h s_h - p_h + i_n d_h, w s_w - p_w + j_n d_w]

No row but "dense" forms all O I of them. Entries are in the order of W's rows, then columns: a
:class:`SparseIndex` is the CSR of W, or of its blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, needs_grad, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_like, check_shape, check_tensor, wide
from fastdiff.ops._sparse_index import SparseIndex, rows_of_entries

Pair = int | tuple[int, int] | list[int]
_DENSE = 0.5  # share of a dense product's multiply-adds from which it is the faster way
_CHUNK = 2**18  # elements of the references' products at a time


# ---- references ----------------------------------------------------------------------------------


def sparse_weight_grad_ref(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """The specification: products and sums in float32 (float64 for float64 input)."""
    tokens, count = x.shape[0], col.shape[0]
    g = wide(grad).unflatten(1, (grad.shape[1] // block_rows, block_rows))
    v = wide(x).unflatten(1, (x.shape[1] // block_cols, block_cols))
    row, column = rows_of_entries(crow, count), col.long()
    step = max(1, _CHUNK // max(1, tokens * max(block_rows, block_cols)))
    parts = [v.new_empty(0, block_rows, block_cols)]
    for n in range(0, count, step):
        of_g, of_x = g[:, row[n : n + step]], v[:, column[n : n + step]]
        if block_rows == block_cols == 1:
            parts.append((of_g * of_x).sum(0)[..., None])
        else:
            parts.append(torch.einsum("tni,tnj->nij", of_g, of_x))
    out = torch.cat(parts)
    return out.view(count) if block_rows == block_cols == 1 else out


def sparse_conv2d_weight_grad_ref(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """The specification: products and sums in float32 (float64 for float64 input)."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
    g, padded = wide(grad), F.pad(wide(x), (pw, pw, ph, ph))
    count, column = col.shape[0], col.long()
    row = rows_of_entries(crow, count)
    down = sh * torch.arange(g.shape[2], device=x.device)[:, None]
    across = sw * torch.arange(g.shape[3], device=x.device)
    step = max(1, _CHUNK // max(1, g[:, :1].numel()))
    parts = [padded.new_empty(0)]
    for n in range(0, count, step):
        at = column[n : n + step, None, None]
        i, j = at // kw % kh * dh, at % kw * dw
        seen = padded[:, at // (kh * kw), down + i, across + j]  # [B, n, Ho, Wo]
        parts.append((g[:, row[n : n + step]] * seen).sum((0, 2, 3)))
    return torch.cat(parts)


# ---- rows ----------------------------------------------------------------------------------------


def _unit_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _pictures(t: Tensor) -> Tensor:
    """``t`` contiguous or channels-last."""
    last = t.is_contiguous(memory_format=torch.channels_last)
    return t if last or t.is_contiguous() else t.contiguous()


def _picked(dense: Tensor, crow: Tensor, col: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """float32 (float64) entries of ``[O, I]``, all of them without a gather."""
    whole = dense.numel() == col.shape[0] * block_rows * block_cols
    blocks = dense.unflatten(1, (-1, block_cols)).unflatten(0, (-1, block_rows)).transpose(1, 2)
    blocks = blocks.flatten(0, 1) if whole else blocks[rows_of_entries(crow, len(col)), col.long()]
    out = wide(blocks)
    return out.reshape(-1) if block_rows == block_cols == 1 else out.contiguous()


def _dense_row(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    return _picked(grad.t() @ x, crow, col, block_rows, block_cols)  # as autograd of F.linear


def _rows_row(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    some = grad.index_select(1, rows_of_entries(crow, col.shape[0]))
    out = wide(some.t() @ x)
    return out[:, None] if block_cols > 1 else out.view(-1)


def _native_row(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    out: Tensor = native("sparse_weight_grad")(_unit_last(grad), _unit_last(x), *rest)
    return out


def _conv_dense_row(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    weight = x.new_empty(grad.shape[1], x.shape[1], *kernel)  # for its sizes
    dense = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [False, True, False]
    )[1]
    return _picked(dense.reshape(grad.shape[1], -1), crow, col, 1, 1)


def _conv_native_row(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    out: Tensor = native("sparse_conv2d_weight_grad")(_pictures(grad), _pictures(x), *rest)
    return out


def _share_why_not(entries: int, of: int) -> str | None:
    if entries <= _DENSE * of or not of:
        return f"the index has {entries} of {of} entries, too few for a dense product"
    return None


def _dense_why_not(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, block_rows: int, block_cols: int
) -> str | None:
    count, of = col.shape[0] * block_rows * block_cols, grad.shape[1] * x.shape[1]
    if _rows_why_not(grad, x, crow, col, block_rows, block_cols) is None and count != of:
        return "the index is of whole rows, whose product alone is the smaller one"
    return _share_why_not(count, of)


def _rows_why_not(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, block_rows: int, block_cols: int
) -> str | None:
    if block_rows != 1 or block_cols != x.shape[1]:
        return f"blocks are {block_rows} x {block_cols}; this row is for whole rows"
    return None


def _no_tensor_cores(x: Tensor) -> str | None:
    if x.is_cuda and x.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {x.dtype} is none of the tensor cores': torch.bfloat16, torch.float16"
    return None


def _native_why_not(grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, *_: object) -> str | None:
    why = why_not_native(grad, x, gpu="sparse_weight_grad") or refuse_grad(grad, x)
    return why or _no_tensor_cores(x)


def _conv_native_why_not(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, *_: object
) -> str | None:
    why = why_not_native(grad, x, gpu="sparse_conv2d_weight_grad") or refuse_grad(grad, x)
    return why or _no_tensor_cores(x)


def _triton_why_not(grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, *_: object) -> str | None:
    return why_not_triton(grad, x) or refuse_grad(grad, x)


def _conv_dense_why_not(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, kernel: list[int], *_: object
) -> str | None:
    return _share_why_not(col.shape[0], grad.shape[1] * x.shape[1] * kernel[0] * kernel[1])


IMPLS = (
    Impl("dense", _dense_row, _dense_why_not),
    Impl("rows", _rows_row, _rows_why_not),
    Impl("native", _native_row, _native_why_not),
    Impl("triton", triton_row("sparse_grad", "sparse_weight_grad"), _triton_why_not),
    Impl("ref", sparse_weight_grad_ref, always),
)
CONV_IMPLS = (
    Impl("dense", _conv_dense_row, _conv_dense_why_not),
    Impl("native", _conv_native_row, _conv_native_why_not),
    Impl("triton", triton_row("sparse_grad", "sparse_conv2d_weight_grad"), _triton_why_not),
    Impl("ref", sparse_conv2d_weight_grad_ref, always),
)


# ---- arguments -----------------------------------------------------------------------------------


def _check_index(op: str, index: SparseIndex, dim: int, x: Tensor) -> None:
    if not isinstance(index, SparseIndex):
        raise ValueError(f"{op}: index is {type(index).__name__}, need a SparseIndex")
    if len(index.shape) != dim:
        raise ValueError(
            f"{op}: index is of a weight of shape {list(index.shape)}, need {dim} dimensions"
        )
    if index.crow.device != x.device:
        raise ValueError(f"{op}: index is on {index.crow.device}, need {x.device}, the device of x")


def _check_pair(op: str, name: str, value: Any, least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else value
    good = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not good or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{op}: {name} is {value!r}, need one or two integers of at least {least}")
    return list(pair)


def row_args(
    grad: Tensor, x: Tensor, index: SparseIndex
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Check the public arguments and give those of a row."""
    op = "sparse_weight_grad"
    check_tensor(op, "grad", grad, dim=2)
    check_like(op, "x", x, grad, "grad")
    check_tensor(op, "x", x, dim=2)
    _check_index(op, index, 2, x)
    check_shape(op, "grad", grad, (grad.shape[0], index.shape[0]))
    check_shape(op, "x", x, (grad.shape[0], index.shape[1]))
    return grad, x, index.crow, index.col, *index.block


def _sizes(
    op: str, x: Tensor, index: SparseIndex, stride: Pair, padding: Pair | str, dilation: Pair
) -> tuple[list[int], list[int], list[int], list[int], tuple[int, ...]]:
    """Kernel, stride, padding and dilation, and the shape of the convolution's result."""
    check_tensor(op, "x", x, dim=4)
    _check_index(op, index, 4, x)
    out, channels, *kernel = index.shape
    s, d = _check_pair(op, "stride", stride, 1), _check_pair(op, "dilation", dilation, 1)
    if isinstance(padding, str):
        total = [d[i] * (kernel[i] - 1) if padding == "same" else 0 for i in range(2)]
        if padding not in ("same", "valid") or any(n % 2 for n in total):
            raise ValueError(
                f"{op}: padding is {padding!r} with a kernel of {kernel}, need integers, 'valid', "
                "or 'same' for as much on either side"
            )
        padding = (total[0] // 2, total[1] // 2)
    p = _check_pair(op, "padding", padding, 0)
    if x.shape[1] != channels:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, need [B, {channels}, H, W]; a convolution in "
            "groups has no sparse gradient here"
        )
    side = [(x.shape[2 + i] + 2 * p[i] - d[i] * (kernel[i] - 1) - 1) // s[i] + 1 for i in range(2)]
    if min(side) < 1:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, need pictures as large as the kernel, which is "
            f"{kernel} in dilation {d} with padding {p}"
        )
    return kernel, s, p, d, (x.shape[0], out, *side)


def _check_block(op: str, index: SparseIndex, whole: tuple[int, int]) -> None:
    if index.block not in ((1, 1), whole):
        raise ValueError(
            f"{op}: index has blocks of {index.block[0]} x {index.block[1]}, need single entries "
            "or whole rows"
        )


def _of_rows(
    grad: Tensor, crow: Tensor, col: Tensor, columns: int, whole: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole rows as single entries: all those of a convolution into fewer channels."""
    if not whole or columns == 1:
        return grad, crow, col
    count = col.shape[0]
    if count != grad.shape[1]:
        grad = grad.index_select(1, rows_of_entries(crow, count))
    crow = columns * torch.arange(count + 1, dtype=torch.int32, device=grad.device)
    every = torch.arange(columns, dtype=torch.int32, device=grad.device)
    return grad, crow, every.repeat(count)


def conv_args(
    grad: Tensor,
    x: Tensor,
    index: SparseIndex,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
) -> tuple[Any, ...]:
    """Check the public arguments and give those of a row."""
    op = "sparse_conv2d_weight_grad"
    check_tensor(op, "grad", grad, dim=4)
    check_like(op, "x", x, grad, "grad")
    kernel, s, p, d, shape = _sizes(op, x, index, stride, padding, dilation)
    check_shape(op, "grad", grad, shape)
    whole = (1, x.shape[1] * kernel[0] * kernel[1])
    _check_block(op, index, whole)
    grad, crow, col = _of_rows(grad, index.crow, index.col, whole[1], index.block == whole)
    return grad, x, crow, col, kernel, s, p, d


TABLES = {
    "sparse_weight_grad": (IMPLS, row_args),
    "sparse_conv2d_weight_grad": (CONV_IMPLS, conv_args),
}


def sparse_weight_grad(
    grad: Tensor, x: Tensor, index: SparseIndex, *, impl: str | None = None
) -> Tensor:
    """The gradient of a linear layer's weight at the positions of ``index``.

    Rows: "dense" (above half of all multiply-adds; with a full index to the bit what autograd gives
    for ``F.linear``), "rows" (whole rows, by torch's product), "native", "triton" and "ref". The
    first two round a 16-bit product to 16 bits, as torch does; the others do not.

    Args:
        grad: ``[T, O]``, of the layer's output; float16, bfloat16, float32 (or float64: not on the
            native and Triton rows).
        x: ``[T, I]``, the layer's input; dtype and device of ``grad``.
        index: of a weight ``[O, I]``.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[nnz]``, or ``[nnz, block_rows, block_cols]``, as ``index.values_shape``; float32, sums
        too (float64 for float64); zeros without tokens.

    Raises:
        ValueError: a shape, dtype or device differs from the above.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(grad, x, index)
    out: Tensor = pick("sparse_weight_grad", IMPLS, impl, *args)(*args)
    return out


def sparse_conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    index: SparseIndex,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    impl: str | None = None,
) -> Tensor:
    """The gradient of a convolution's weight at the positions of ``index``; groups 1, zero padding.

    Rows as of :func:`sparse_weight_grad`, but for "rows": whole rows are a dense product into fewer
    channels.

    Args:
        grad: ``[B, O, Ho, Wo]``, of the convolution's output.
        x: ``[B, C, H, W]``; dtype and device of ``grad``.
        index: of a weight ``[O, C, kh, kw]``, of single entries or whole rows.
        stride: one or two integers, as ``padding`` and ``dilation``.
        padding: also "valid", or "same" where that is as much on either side.
        dilation: of the kernel.
        impl: row of ``CONV_IMPLS`` to force; None takes the first that accepts.

    Returns:
        As ``index.values_shape``; float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype or device differs from the above.
        NoImpl: the forced row refuses; the message says why.
    """
    args = conv_args(grad, x, index, stride=stride, padding=padding, dilation=dilation)
    out: Tensor = pick("sparse_conv2d_weight_grad", CONV_IMPLS, impl, *args)(*args)
    return out.view(index.values_shape)


# ---- layers --------------------------------------------------------------------------------------


class _Tap(torch.autograd.Function):
    """y as it is; keeps x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        values: Tensor,
        crow: Tensor,
        col: Tensor,
        static: tuple[Any, ...],
        impl: str | None,
    ) -> Tensor:
        ctx.save_for_backward(x, crow, col)
        ctx.static, ctx.impl, ctx.dtype = static, impl, values.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found = None
        if ctx.needs_input_grad[2]:
            x, crow, col = ctx.saved_tensors
            (out, *rest), block, shape, conv = ctx.static
            args: tuple[Any, ...]
            if conv is None:
                args = grad.reshape(-1, out), x.reshape(-1, *rest), crow, col, *block
                found = pick("sparse_weight_grad", IMPLS, ctx.impl, *args)(*args)
            else:
                columns = rest[0] * rest[1] * rest[2]
                some = _of_rows(grad, crow, col, columns, block == (1, columns))
                args = some[0], x, *some[1:], *conv
                found = pick("sparse_conv2d_weight_grad", CONV_IMPLS, ctx.impl, *args)(*args)
                found = found.view(shape)
            found = found.to(ctx.dtype)
        return grad, None, found, None, None, None, None


def sparse_grad_tap(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    index: SparseIndex,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    impl: str | None = None,
) -> Tensor:
    """``y``, the output of somebody's frozen layer for ``x``, with a gradient to its ``values``.

    For a forward hook: the backward passes the gradient of ``y`` on as it is, and gives ``values``
    theirs from it and ``x``. What is kept for it is ``x`` and the index. An ``x`` of another dtype
    than ``y``, as under autocast, counts as rounded to that of ``y``, in which the layer took it.

    Args:
        y: ``[..., O]``, or ``[B, O, Ho, Wo]`` with an index of four dimensions: a convolution's.
        x: ``[..., I]`` or ``[B, C, H, W]``; any float dtype.
        values: entries of the layer's weight, of shape ``index.values_shape``; any float dtype.
        index: of the layer's weight. Without entries ``values`` get an empty gradient.
        stride: of a convolution, as ``padding`` and ``dilation``; groups are 1, padding is zeros.
        padding: integers, "valid" or "same".
        dilation: of the kernel.
        impl: row of the gradient's table to force.

    Returns:
        ``y``, not to be changed in place, which torch refuses; the very same object where no
        gradient is asked for.

    Raises:
        ValueError: a shape or device does not fit; the message names it.
    """
    op = "sparse_grad_tap"
    check_tensor(op, "y", y)
    check_tensor(op, "x", x)
    check_tensor(op, "values", values, min_dim=0)
    conv = None
    if isinstance(index, SparseIndex) and len(index.shape) == 4:
        kernel, s, p, d, shape = _sizes(op, x, index, stride, padding, dilation)
        conv = (kernel, s, p, d)
        _check_block(op, index, (1, x.shape[1] * kernel[0] * kernel[1]))
    else:
        _check_index(op, index, 2, x)
        check_shape(op, "x", x, (*x.shape[:-1], index.shape[1]))
        shape = (*x.shape[:-1], index.shape[0])
    check_shape(op, "y", y, shape)
    check_shape(op, "values", values, index.values_shape)
    for name, t in (("y", y), ("values", values)):
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, need {x.device}, the device of x")
    if not needs_grad(values):
        return y
    static = (index.shape, index.block, index.values_shape, conv)
    x = x if x.dtype == y.dtype else x.to(y.dtype)
    args = y, x, values, index.crow, index.col, static, impl
    out: Tensor = _Tap.apply(*args)  # type: ignore[no-untyped-call]
    return out


def sparse_grad_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    index: SparseIndex,
    *,
    impl: str | None = None,
) -> Tensor:
    """``F.linear(x, weight, bias)``, of whose weight only ``values`` are trained.

    Args:
        x: ``[..., I]``.
        weight: ``[O, I]``, with ``values`` at their positions already; gets no gradient.
        bias: ``[O]`` or None; gets its gradient where it asks for one.
        values: of shape ``index.values_shape``; of any float dtype, such as float32 for a bfloat16
            weight.
        index: of ``weight``. With all positions of a contiguous weight, gradients are to the bit
            those of ``F.linear``.
        impl: row of ``IMPLS`` for the gradient of ``values``.

    Returns:
        ``[..., O]``, not to be changed in place.

    Raises:
        ValueError: a shape or device does not fit; the message names it.
    """
    _check_weight("sparse_grad_linear", weight, index)
    y = F.linear(x, weight.detach(), bias)
    return sparse_grad_tap(y, x, values, index, impl=impl)


def sparse_grad_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    index: SparseIndex,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """``F.conv2d`` of ``weight`` in one group, of which only ``values`` are trained.

    Arguments and result as of :func:`sparse_grad_linear`, with ``x`` ``[B, C, H, W]``, ``weight``
    ``[O, C, kh, kw]``, and ``stride``, ``padding``, ``dilation`` as of ``F.conv2d``.

    Raises:
        ValueError: a shape or device does not fit; the message names it.
    """
    _check_weight("sparse_grad_conv2d", weight, index)
    _sizes("sparse_grad_conv2d", x, index, stride, padding, dilation)
    y = F.conv2d(x, weight.detach(), bias, stride, padding, dilation)
    return sparse_grad_tap(
        y, x, values, index, stride=stride, padding=padding, dilation=dilation, impl=impl
    )


def _check_weight(op: str, weight: Tensor, index: SparseIndex) -> None:
    check_tensor(op, "weight", weight)
    if not isinstance(index, SparseIndex):
        raise ValueError(f"{op}: index is {type(index).__name__}, need a SparseIndex")
    if weight.shape != index.shape:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}, need {list(index.shape)}, the index's"
        )


if hasattr(torch.ops.fastdiff, "sparse_weight_grad"):

    @torch.library.register_fake("fastdiff::sparse_weight_grad")
    def _(
        grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, block_rows: int, block_cols: int
    ) -> Tensor:
        shape = col.shape if block_rows == block_cols == 1 else (*col.shape, block_rows, block_cols)
        return x.new_empty(shape, dtype=torch.float32)

    @torch.library.register_fake("fastdiff::sparse_conv2d_weight_grad")
    def _(
        grad: Tensor,
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        kernel: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> Tensor:
        return x.new_empty(col.shape, dtype=torch.float32)
