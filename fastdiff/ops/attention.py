r"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) with additive
log-weights, ragged keys, and computation of chosen query rows only.

    s[i, j] = scale * q[i] . k[j] + bias[i, j],   j < key_length
    lse[i]  = log sum_j exp(s[i, j]),   out[i] = sum_j exp(s[i, j] - lse[i]) v[j]

A bias per key, or one per (query group, key group), is never laid out at S x T by the kernels
(online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).

Samples of unequal numbers of queries may be packed: the rows of q lie one after another, and
``q_starts`` says where each sample's begin. One launch still, no row is padding.

Non-finite values: a bias of -inf masks its key; a row with no key left gives 0 and lse -inf. NaN
in q, k or v reaches every row that reads it; keys at or past ``key_lengths`` are not read at all.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import (
    check_finite,
    check_index,
    check_like,
    check_range,
    check_shape,
    check_starts,
    check_tensor,
    wide,
)

# Of a head: above, the smallest tile spills registers (tests/test_testing_compile.py).
TRITON_MAX_DIM = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
CUDA_MAX_DIM = 256


class GroupBias(NamedTuple):
    """A log-weight per (group of the query, group of the key): regional prompts, masks, boosts."""

    query_group: Tensor  # [B|1, S] int64 in [0, Gq)
    key_group: Tensor  # [B|1, T] int64 in [0, Gk)
    table: Tensor  # [B|1, H|1, Gq, Gk] float32; -inf masks


def _group_scores(query_group: Tensor, key_group: Tensor, table: Tensor, batch: int) -> Tensor:
    """table[b, h, query_group[b, i], key_group[b, j]] as [B, H|1, S, T]."""
    heads, groups = table.shape[1], table.shape[3]
    table = table.expand(batch, -1, -1, -1)
    rows = query_group.expand(batch, -1)[:, None, :, None].expand(-1, heads, -1, groups)
    cols = key_group.expand(batch, -1)[:, None, None, :]
    rows = table.gather(2, rows)
    return rows.gather(3, cols.expand(-1, heads, rows.shape[2], -1))


def _packed_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    q_starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Every sample's rows from a call for all rows: no value is read, at B times the work."""
    row = torch.arange(q.shape[2], device=q.device)
    out, lse = torch.zeros_like(q), wide(q).new_zeros(q.shape[:3])
    lse = lse if q.dtype == torch.float64 else lse.float()
    for b in range(k.shape[0]):
        of = slice(b, b + 1)
        one = bias if bias is None or bias.shape[0] == 1 else bias[of]
        length = None if key_lengths is None else key_lengths[of]
        rest = (None, None, None, length, None, None, True)
        found, total = attention_ref(q, k[of], v[of], scale, one, *rest)
        own = (row >= q_starts[b]) & (row < q_starts[b + 1])
        out, lse = torch.where(own[:, None], found, out), torch.where(own, total, lse)
    return out, lse


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    table: Tensor | None,
    key_lengths: Tensor | None,
    q_index: Tensor | None,
    q_starts: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    if q_starts is not None:
        check_starts("attention", "q_starts", q_starts, q.shape[2])
        return _packed_ref(q, k, v, scale, bias, key_lengths, q_starts)
    batch, heads, keys = q.shape[0], q.shape[1], k.shape[2]
    value = wide(v)
    if q_index is not None:
        check_range("attention", "q_index", q_index, 0, q.shape[2])
        q = q.gather(2, q_index[:, None, :, None].expand(-1, heads, -1, q.shape[3]))
    score = scale * (wide(q) @ wide(k).transpose(-1, -2))  # [B, H, A, T]
    if bias is not None:
        if bias.dim() == 3:
            bias = bias[:, :, None]
        elif q_index is not None:
            bias = bias.expand(batch, -1, -1, -1)
            index = q_index[:, None, :, None].expand(-1, bias.shape[1], -1, keys)
            bias = bias.gather(2, index)
        score = score + wide(bias)
    if table is not None:
        assert query_group is not None and key_group is not None  # the three come together
        check_range("attention", "bias.query_group", query_group, 0, table.shape[2])
        check_range("attention", "bias.key_group", key_group, 0, table.shape[3])
        if q_index is not None:
            query_group = query_group.expand(batch, -1).gather(1, q_index)
        score = score + _group_scores(query_group, key_group, table, batch).to(score.dtype)
    if key_lengths is not None:
        check_range("attention", "key_lengths", key_lengths, 0, keys + 1)
        past = torch.arange(keys, device=q.device) >= key_lengths[:, None]  # [B, T]
        score = score.masked_fill(past[:, None, None, :], -torch.inf)
        value = value.masked_fill(past[:, None, :, None], 0.0)
    if keys == 0:
        out = score.new_zeros(*score.shape[:3], q.shape[3])
        return out.to(q.dtype), score.new_full(score.shape[:3], -torch.inf).float()
    top = score.detach().amax(-1, keepdim=True)
    dead = top == -torch.inf
    weight = (score - top.masked_fill(dead, 0.0)).exp()
    total = weight.sum(-1, keepdim=True).masked_fill(dead, 1.0)
    out = ((weight @ value) / total).masked_fill(dead, 0.0).to(q.dtype)
    lse = (top + total.log()).squeeze(-1)
    return out, lse if q.dtype == torch.float64 else lse.float()


_native = native("attention")


def _native_row(*args: Any) -> tuple[Tensor, Tensor]:
    return _native(*args[:-1])  # the log-sum-exp costs nothing there: return_lse is left off


def _native_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    table: Tensor | None,
    key_lengths: Tensor | None,
    q_index: Tensor | None,
    q_starts: Tensor | None,
    return_lse: bool,
) -> str | None:
    if q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q.dtype} is none of the tensor cores': torch.bfloat16, torch.float16"
    if q.is_cuda and q.shape[3] > CUDA_MAX_DIM:
        return f"head dimension {q.shape[3]} is above {CUDA_MAX_DIM}, the CUDA kernel's most"
    return why_not_native(q, k, v, bias, gpu="attention") or refuse_grad(q, k, v, bias, table)


def _triton_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    table: Tensor | None,
    key_lengths: Tensor | None,
    q_index: Tensor | None,
    q_starts: Tensor | None,
    return_lse: bool,
) -> str | None:
    reason = why_not_triton(q, k, v, bias)
    if reason is not None:
        return reason
    if q.shape[3] > TRITON_MAX_DIM[q.dtype]:
        return (
            f"head dimension {q.shape[3]} is above {TRITON_MAX_DIM[q.dtype]}: a tile of {q.dtype} "
            "would not stay in the registers of a GPU"
        )
    if table is not None and table.shape[2] * table.shape[3] >= 2**31:
        return f"a table of {list(table.shape[2:])} groups has 2**31 entries or more"
    return refuse_grad(q, k, v, bias, table)


def _torch_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    *_: object,
) -> tuple[Tensor, None]:
    if bias is not None:
        bias = (bias[:, :, None] if bias.dim() == 3 else bias).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None


def _torch_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    table: Tensor | None,
    key_lengths: Tensor | None,
    q_index: Tensor | None,
    q_starts: Tensor | None,
    return_lse: bool,
) -> str | None:
    if table is not None:
        return "a bias by groups would be laid out at S x T"
    if key_lengths is not None:
        return "key_lengths are given, which scaled_dot_product_attention does not take"
    if q_index is not None:
        return "q_index is given, which scaled_dot_product_attention does not take"
    if q_starts is not None:
        return "q_starts is given, which scaled_dot_product_attention does not take"
    if return_lse:
        return "return_lse is given, which scaled_dot_product_attention does not return"
    if bias is not None and bias.dtype != q.dtype:
        return f"bias is {bias.dtype}; scaled_dot_product_attention would round it to {q.dtype}"
    if k.shape[2] == 0 or q.numel() == 0:
        return f"q has shape {list(q.shape)} and {k.shape[2]} keys; need none of them 0"
    return None


IMPLS = (
    Impl("native", _native_row, _native_why_not),
    Impl("triton", triton_row("attention"), _triton_why_not),
    Impl("torch", _torch_row, _torch_why_not),
    Impl("ref", attention_ref, always),
)


def _check_groups(bias: GroupBias, q: Tensor, k: Tensor) -> None:
    batch, heads, rows, keys = *q.shape[:3], k.shape[2]
    check_index("attention", "bias.query_group", bias.query_group, q, "q")
    check_shape("attention", "bias.query_group", bias.query_group, (batch, rows), (1, rows))
    check_index("attention", "bias.key_group", bias.key_group, q, "q")
    check_shape("attention", "bias.key_group", bias.key_group, (batch, keys), (1, keys))
    table = bias.table
    check_tensor("attention", "bias.table", table, dim=4)
    if table.dtype != (torch.float64 if q.dtype == torch.float64 else torch.float32):
        raise ValueError(f"attention: bias.table is {table.dtype}, need torch.float32")
    if table.device != q.device:
        raise ValueError(f"attention: bias.table is on {table.device}, need {q.device}")
    if table.shape[0] not in (1, batch) or table.shape[1] not in (1, heads):
        raise ValueError(
            f"attention: bias.table has shape {list(table.shape)}, "
            f"need [{batch} or 1, {heads} or 1, query groups, key groups]"
        )


def _check_starts(
    q: Tensor,
    k: Tensor,
    bias: Tensor | GroupBias | None,
    q_index: Tensor | None,
    q_starts: Tensor,
) -> None:
    check_index("attention", "q_starts", q_starts, q, "q")
    check_shape("attention", "q_starts", q_starts, (k.shape[0] + 1,))
    if q.shape[0] != 1:
        raise ValueError(
            f"attention: q has shape {list(q.shape)}, need [1, {q.shape[1]}, rows of all samples, "
            f"{q.shape[3]}] where q_starts is given"
        )
    if q_index is not None:
        raise ValueError("attention: q_index is given, need none where q_starts is given")
    if isinstance(bias, GroupBias):
        raise ValueError("attention: bias is a GroupBias, need one per key where q_starts is given")
    if isinstance(bias, Tensor) and bias.dim() == 4 and bias.shape[2] != 1:
        raise ValueError(
            f"attention: bias has shape {list(bias.shape)}, need [{k.shape[0]} or 1, "
            f"{k.shape[1]} or 1, {k.shape[2]}] (per key) where q_starts is given"
        )


def _check_bias(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    batch, heads, rows, keys = k.shape[0], *q.shape[1:3], k.shape[2]
    check_tensor("attention", "bias", bias)
    if bias.dtype not in (q.dtype, torch.float32):
        raise ValueError(f"attention: bias is {bias.dtype}, need {q.dtype} or torch.float32")
    if bias.device != q.device:
        raise ValueError(f"attention: bias is on {bias.device}, need {q.device}, the device of q")
    if bias.dim() == 4 and bias.shape[2] == 1:
        bias = bias[:, :, 0]
    need = (keys,) if bias.dim() == 3 else (rows, keys)
    if (
        bias.dim() not in (3, 4)
        or tuple(bias.shape[2:]) != need
        or bias.shape[0] not in (1, batch)
        or bias.shape[1] not in (1, heads)
    ):
        raise ValueError(
            f"attention: bias has shape {list(bias.shape)}, need [{batch} or 1, {heads} or 1, "
            f"{rows}, {keys}] (full) or [{batch} or 1, {heads} or 1, {keys}] (per key)"
        )
    return bias


def row_args(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | GroupBias | None = None,
    key_lengths: Tensor | None = None,
    q_index: Tensor | None = None,
    q_starts: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[
    Tensor, Tensor, Tensor, float, Tensor | None, Tensor | None, Tensor | None, Tensor | None,
    Tensor | None, Tensor | None, Tensor | None, bool,
]:  # fmt: skip
    """Check the public arguments and give those of a row."""
    check_tensor("attention", "q", q, dim=4)
    for name, t in (("k", k), ("v", v)):
        check_like("attention", name, t, q, "q")
        check_tensor("attention", name, t, dim=4)
    heads, dim = q.shape[1], q.shape[3]
    batch = q.shape[0] if q_starts is None else k.shape[0]
    if dim == 0:
        raise ValueError(f"attention: q has shape {list(q.shape)}, need a head dimension above 0")
    check_shape("attention", "k", k, (batch, heads, k.shape[2], dim))
    check_shape("attention", "v", v, (batch, heads, k.shape[2], dim))
    if scale is None:
        scale = 1.0 / math.sqrt(dim)
    check_finite("attention", "scale", scale)
    if q_starts is not None:
        _check_starts(q, k, bias, q_index, q_starts)
    groups: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if isinstance(bias, GroupBias):
        _check_groups(bias, q, k)
        groups, bias = (bias[0], bias[1], bias[2]), None
    elif bias is not None:
        bias = _check_bias(bias, q, k)
    if key_lengths is not None:
        check_index("attention", "key_lengths", key_lengths, q, "q")
        check_shape("attention", "key_lengths", key_lengths, (batch,))
    if q_index is not None:
        check_index("attention", "q_index", q_index, q, "q")
        if q_index.dim() != 2 or q_index.shape[0] != batch:
            raise ValueError(
                f"attention: q_index has shape {list(q_index.shape)}, need [{batch}, rows]"
            )
    return q, k, v, scale, bias, *groups, key_lengths, q_index, q_starts, bool(return_lse)


TABLES = {"attention": (IMPLS, row_args)}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | GroupBias | None = None,
    key_lengths: Tensor | None = None,
    q_index: Tensor | None = None,
    q_starts: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of ``q`` over ``k`` and ``v``.

    Args:
        q: ``[B, H, S, D]``; float16, bfloat16 or float32 (float64 on the torch and ref rows); any
            strides, no copy is made where the last one is 1.
        k, v: ``[B, H, T, D]``, dtype and device of ``q``.
        scale: factor of the scores; None for ``1/sqrt(D)``.
        bias: added to the scaled scores, natural-log units, -inf masks: ``[B|1, H|1, S, T]`` (full;
            one row in place of S is a bias per key), ``[B|1, H|1, T]`` (per key), dtype of ``q`` or
            float32; or a :class:`GroupBias`. The last two cost memory linear in S + T.
        key_lengths: ``[B]`` int64 in 0..T; sample b attends to its first ``key_lengths[b]`` keys.
        q_index: ``[B, A]`` int64 in 0..S-1; only these rows of ``q`` (and of a full bias or of
            ``query_group``) are computed. Repeats are allowed.
        q_starts: ``[B + 1]`` int64, ascending from 0 to R; then ``q`` is ``[1, H, R, D]``, the
            queries of all samples one after another, and sample b's are the rows ``q_starts[b]``
            to ``q_starts[b + 1] - 1``, which attend to ``k[b]`` and ``v[b]``. With a bias per key
            and ``key_lengths``; not with another bias, nor with ``q_index``.
        return_lse: also give the log of the softmax's denominator.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[B, H, S or A, D]`` in the dtype of ``q`` (``[1, H, R, D]`` with ``q_starts``); from the
        native and triton rows a view of a contiguous ``[B, S or A, H, D]`` buffer, so that
        ``out.transpose(1, 2).flatten(2)`` is free. With ``return_lse`` also float32
        ``[B, H, S or A]`` (float64 for float64 input). Rows with no key left give 0 and -inf. From
        those two rows of the table, packed samples have the bits that each has alone; what lies
        past the last of ``q_starts`` is undefined.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``scale`` is not finite.
        RuntimeError or ValueError: an index or length out of range (from the row that runs, on the
            CPU; not checked on a GPU, nor where the call is compiled into a graph by a Python row).
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(
        q, k, v, scale=scale, bias=bias, key_lengths=key_lengths, q_index=q_index,
        q_starts=q_starts, return_lse=return_lse,
    )  # fmt: skip
    out, lse = pick("attention", IMPLS, impl, *args)(*args)
    return (out, lse) if return_lse else out


if hasattr(torch.ops.fastdiff, "attention"):

    @torch.library.register_fake("fastdiff::attention")
    def _(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        bias: Tensor | None,
        query_group: Tensor | None,
        key_group: Tensor | None,
        table: Tensor | None,
        key_lengths: Tensor | None,
        q_index: Tensor | None,
        q_starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, heads, rows, dim = q.shape
        rows = rows if q_index is None else q_index.shape[1]
        out = q.new_empty(batch, rows, heads, dim).transpose(1, 2)
        return out, q.new_empty(batch, heads, rows, dtype=torch.float32)
