r"""GEGLU (Shazeer 2020, arXiv:2002.05202, eq. 6): a linear layer's output gated by the GELU of its
other half, with the bias of that linear layer.

    [h, g] = x + bias,   y = h * gelu(g)
    gelu(g) = g/2 * (1 + erf(g / sqrt(2)))                                   approximate = "none"
    gelu(g) = g/2 * (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))                approximate = "tanh"
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_last, check_like, check_tensor, wide


def geglu_ref(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    hidden, gate = (wide(x) if bias is None else wide(x) + wide(bias)).chunk(2, -1)
    return (hidden * F.gelu(gate, approximate="tanh" if tanh else "none")).to(x.dtype)


def _native_why_not(x: Tensor, bias: Tensor | None, tanh: bool) -> str | None:
    return why_not_native(x, bias) or refuse_grad(x, bias)


def _triton_why_not(x: Tensor, bias: Tensor | None, tanh: bool) -> str | None:
    return why_not_triton(x, bias) or refuse_grad(x, bias)


IMPLS = (
    Impl("native", native("geglu"), _native_why_not),
    Impl("triton", triton_row("geglu"), _triton_why_not),
    Impl("ref", geglu_ref, always),
)


def row_args(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> tuple[Tensor, Tensor | None, bool]:
    """Check the public arguments and give those of a row."""
    check_tensor("geglu", "x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"geglu: x has shape {list(x.shape)}, need an even last dimension")
    if bias is not None:
        check_like("geglu", "bias", bias, x)
        check_last("geglu", "bias", bias, x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate is {approximate!r}, need 'none' or 'tanh'")
    return x, bias, approximate == "tanh"


TABLES = {"geglu": (IMPLS, row_args)}


def geglu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    impl: str | None = None,
) -> Tensor:
    """The first half of ``x + bias`` times the GELU of its second half.

    Args:
        x: ``[..., 2F]``; float16, bfloat16 or float32 (float64 on the reference row).
        bias: ``[2F]``, dtype and device of ``x``; None for 0.
        approximate: "none" for the erf form of GELU (diffusers' GEGLU), "tanh" for the tanh form.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[..., F]``, dtype and device of ``x``, contiguous; never a view of it.

    Raises:
        ValueError: ``x`` is not floating point or 2F is odd, ``bias`` is not ``[2F]`` of its dtype
            and device, or ``approximate`` is neither name.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, bias, approximate=approximate)
    return pick("geglu", IMPLS, impl, *args)(*args)


if hasattr(torch.ops.fastdiff, "geglu"):

    @torch.library.register_fake("fastdiff::geglu")
    def _(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
