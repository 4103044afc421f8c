r"""GELU in its tanh form, with the bias of the linear layer before it (Hendrycks & Gimpel 2016,
arXiv:1606.08415).

    y = h/2 * (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3))),   h = x + bias
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_last, check_like, check_tensor, wide


def gelu_tanh_ref(x: Tensor, bias: Tensor | None) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    h = wide(x) if bias is None else wide(x) + wide(bias)
    return F.gelu(h, approximate="tanh").to(x.dtype)


def _native_why_not(x: Tensor, bias: Tensor | None) -> str | None:
    return why_not_native(x, bias) or refuse_grad(x, bias)


def _triton_why_not(x: Tensor, bias: Tensor | None) -> str | None:
    return why_not_triton(x, bias) or refuse_grad(x, bias)


IMPLS = (
    Impl("native", native("gelu_tanh"), _native_why_not),
    Impl("triton", triton_row("gelu_tanh"), _triton_why_not),
    Impl("ref", gelu_tanh_ref, always),
)


def row_args(x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Check the public arguments and give those of a row."""
    check_tensor("gelu_tanh", "x", x)
    if bias is not None:
        check_like("gelu_tanh", "bias", bias, x)
        check_last("gelu_tanh", "bias", bias, x)
    return x, bias


TABLES = {"gelu_tanh": (IMPLS, row_args)}


def gelu_tanh(x: Tensor, bias: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """GELU (tanh form) of ``x + bias``.

    Args:
        x: ``[..., D]``; float16, bfloat16 or float32 (float64 on the reference row).
        bias: ``[D]``, dtype and device of ``x``; None for 0.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        Same shape, dtype and device as ``x``, contiguous; never a view of it.

    Raises:
        ValueError: ``x`` is not floating point, or ``bias`` is not ``[D]`` of its dtype and device.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, bias)
    return pick("gelu_tanh", IMPLS, impl, *args)(*args)


if hasattr(torch.ops.fastdiff, "gelu_tanh"):

    @torch.library.register_fake("fastdiff::gelu_tanh")
    def _(x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
