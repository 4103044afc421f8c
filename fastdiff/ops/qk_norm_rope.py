r"""Query-key normalisation (Henry et al. 2020, arXiv:2010.04245; as RMS norm: Dehghani et al. 2023,
arXiv:2302.05442) and rotary position embedding (Su et al. 2021, arXiv:2104.09864), what diffusion
transformers do to queries and keys before attention.

    n[d] = x[d] / sqrt(mean_d x[d]^2 + eps) * weight[d]                      where a weight is given
    y[a_i] = n[a_i] cos[p, i] - n[b_i] sin[p, i]                             i < R/2, p = position
    y[b_i] = n[b_i] cos[p, i] + n[a_i] sin[p, i]
    (a_i, b_i) = (2i, 2i + 1) interleaved, (i, i + R/2) otherwise;   y[d] = n[d],  d >= R
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import (
    check_finite,
    check_index,
    check_last,
    check_like,
    check_range,
    check_shape,
    check_tensor,
    wide,
)


def token_major(x: Tensor) -> bool:
    """``x [B, H, S, D]`` has its heads inside its tokens in memory, as a projection leaves them."""
    return x.stride(1) < x.stride(2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, S, D], cos and sin [B|1, 1, S, R/2]: the first R channels of x rotated."""
    turned = 2 * cos.shape[-1]
    head, rest = x[..., :turned], x[..., turned:]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        head = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = head.chunk(2, -1)
        head = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((head, rest), -1)


def qk_norm_rope_ref(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    if cos is not None and sin is not None:
        if position is None:
            cos, sin = cos[: q.shape[2]], sin[: q.shape[2]]
        else:
            check_range("qk_norm_rope", "position", position, 0, cos.shape[0])
            cos, sin = cos[position].unsqueeze(1), sin[position].unsqueeze(1)

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        y = wide(x)
        if weight is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * wide(weight)
        if cos is not None and sin is not None:
            y = _rotate(y, cos.to(y.dtype), sin.to(y.dtype), interleaved)
        y = y.to(x.dtype, copy=True)
        return y.transpose(1, 2).contiguous().transpose(1, 2) if token_major(x) else y.contiguous()

    return one(q, q_weight), one(k, k_weight)


def _tables_why_not(cos: Tensor | None) -> str | None:
    if cos is not None and cos.dtype != torch.float32:
        return f"cos is {cos.dtype}, this row needs torch.float32"
    return None


def _native_why_not(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *_: object,
) -> str | None:
    tensors = q, k, q_weight, k_weight
    return why_not_native(*tensors) or _tables_why_not(cos) or refuse_grad(*tensors, cos, sin)


def _triton_why_not(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *_: object,
) -> str | None:
    tensors = q, k, q_weight, k_weight
    return why_not_triton(*tensors) or _tables_why_not(cos) or refuse_grad(*tensors, cos, sin)


IMPLS = (
    Impl("native", native("qk_norm_rope"), _native_why_not),
    Impl("triton", triton_row("qk_norm_rope"), _triton_why_not),
    Impl("ref", qk_norm_rope_ref, always),
)


def row_args(
    q,
    k,
    q_weight=None,
    k_weight=None,
    *,
    cos=None,
    sin=None,
    position=None,
    eps=1e-6,
    interleaved=True,
):
    """Check the public arguments and give those of a row."""
    op = "qk_norm_rope"
    check_tensor(op, "q", q, dim=4)
    check_tensor(op, "k", k, dim=4)
    check_like(op, "k", k, q, "q")
    batch, _, length, dim = q.shape
    check_shape(op, "k", k, (batch, k.shape[1], length, dim))
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_like(op, name, weight, q, "q")
            check_last(op, name, weight, q)
    if (cos is None) != (sin is None):
        given, missing = ("sin", "cos") if cos is None else ("cos", "sin")
        raise ValueError(f"{op}: {given} is given and {missing} is None, need both or neither")
    if cos is None and position is not None:
        raise ValueError(f"{op}: position is given, need cos and sin as well")
    if cos is not None:
        for name, table in (("cos", cos), ("sin", sin)):
            check_tensor(op, name, table, dim=2)
            if table.device != q.device:
                raise ValueError(
                    f"{op}: {name} is on {table.device}, need {q.device}, the device of q"
                )
            if table.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{op}: {name} is {table.dtype}, need torch.float32")
        check_like(op, "sin", sin, cos, "cos")
        check_shape(op, "sin", sin, cos.shape)
        if 2 * cos.shape[1] > dim:
            raise ValueError(
                f"{op}: cos has shape {list(cos.shape)}, need at most D/2 = {dim // 2} columns"
            )
        if position is None and cos.shape[0] < length:
            raise ValueError(
                f"{op}: cos has shape {list(cos.shape)}, "
                f"need at least S = {length} rows or a position"
            )
        if position is not None:
            check_index(op, "position", position, q, "q")
            check_shape(op, "position", position, (batch, length), (1, length))
    check_finite(op, "eps", eps, positive=True)
    return q, k, q_weight, k_weight, cos, sin, position, float(eps), bool(interleaved)


TABLES = {"qk_norm_rope": (IMPLS, row_args)}


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    position: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS norm of every head of ``q`` and ``k``, then rotation of their first R channels.

    Args:
        q: ``[B, H, S, D]``, any strides (a view of a joint projection is read in place); float16,
            bfloat16 or float32 (float64 on the reference row).
        k: ``[B, Hk, S, D]``, dtype and device of ``q``; Hk may differ from H.
        q_weight, k_weight: ``[D]``, dtype and device of ``q``; None leaves that one unnormalised.
        cos, sin: ``[P, R/2]`` float32 with R <= D (:func:`axial_rope`, :func:`rope_table`); None
            for no rotation.
        position: ``[B|1, S]`` int64, the row of ``cos`` of each token, so that a subset of the
            tokens keeps its positions; None for 0 .. S-1 (then P >= S).
        eps: added to the mean square, so in units of ``q**2``; above 0.
        interleaved: pairs are channels (2i, 2i+1); False: (i, i + R/2), the "rotate half" form.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        The new q and k: shapes, dtype and device of theirs; each is a ``[B, H, S, D]`` view of a
        ``[B, S, H, D]`` buffer where its input has heads inside tokens in memory, else contiguous;
        never views of the inputs.

    Raises:
        ValueError: a shape, dtype, device or position differs from the above; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(
        q, k, q_weight, k_weight,
        cos=cos, sin=sin, position=position, eps=eps, interleaved=interleaved,
    )  # fmt: skip
    return pick("qk_norm_rope", IMPLS, impl, *args)(*args)


def rope_table(
    position: Tensor, dims: Sequence[int], theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """cos and sin of axial rotary embedding: channels are shared out over the axes of ``position``.

    Args:
        position: ``[P, A]``, a coordinate per token and axis (row and column; time, row, column),
            whole or fractional.
        dims: A even numbers of channels, one per axis; their sum is R.
        theta: base of the frequencies ``theta ** (-2i / dim)``, i < dim/2 (arXiv:2104.09864, 3.3).

    Returns:
        cos, sin: ``[P, R/2]`` float32 on the device of ``position``, computed in float64.

    Raises:
        ValueError: ``position`` is not ``[P, len(dims)]``, a dim is odd, or ``theta`` not above 0.
    """
    if position.dim() != 2 or position.shape[1] != len(dims):
        raise ValueError(
            f"rope_table: position has shape {list(position.shape)}, need [P, {len(dims)}]"
        )
    check_finite("rope_table", "theta", theta, positive=True)
    for dim in dims:
        if not isinstance(dim, int) or dim < 0 or dim % 2:
            raise ValueError(f"rope_table: dims has {dim!r}, need even numbers of channels")
    angles = []
    for coordinate, dim in zip(position.double().unbind(1), dims, strict=True):
        i = torch.arange(dim // 2, dtype=torch.float64, device=position.device)
        angles.append(coordinate[:, None] * theta ** (-2 * i / max(dim, 1)))
    angle = torch.cat(angles, 1)
    return angle.cos().float(), angle.sin().float()


def axial_rope(height: int, width: int, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of a ``height x width`` grid of tokens, row by row: half of the channels turn
    with the row, half with the column.

    Args:
        height, width: tokens of the grid.
        dim: channels R that turn; a multiple of 4.
        theta: base of the frequencies.

    Returns:
        cos, sin: ``[height * width, dim / 2]`` float32 on the CPU, for :func:`qk_norm_rope`.

    Raises:
        ValueError: ``dim`` is not a multiple of 4, a size is negative, or ``theta`` is not above 0.
    """
    if not isinstance(dim, int) or dim < 0 or dim % 4:
        raise ValueError(f"axial_rope: dim is {dim!r}, need a multiple of 4")
    for name, size in (("height", height), ("width", width)):
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"axial_rope: {name} is {size!r}, need a number of tokens")
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)
    return rope_table(grid, (dim // 2, dim // 2), theta)


if hasattr(torch.ops.fastdiff, "qk_norm_rope"):

    @torch.library.register_fake("fastdiff::qk_norm_rope")
    def _(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        def like(x: Tensor) -> Tensor:
            if not token_major(x):
                return x.new_empty(x.shape)
            return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)

        return like(q), like(k)
