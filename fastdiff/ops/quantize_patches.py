r"""What a convolution multiplies, as int8 with one scale for each pixel of its result.

    patch[b, h, w] = up(x)[b, :, h s - p + i, w s - p + j]  for i, j in 0 .. k - 1; 0 outside
    values, scale  = quantize(patch), a row of k k C: tap by tap, the channels of one tap together

With ``weight.permute(0, 2, 3, 1).flatten(1)`` the convolution is then ``quant_linear``. A pixel is
rounded once for each patch that it is in, with that patch's scale: as exact as a linear layer's
tokens, and a rounding is little beside the products of all output channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, _has_tangent, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_tensor
from fastdiff.ops.quantize import Quantized, quantize_ref


def result_size(n: int, size: int, stride: int, padding: int, upsample: bool) -> int:
    """Pixels of the result along a dimension of ``n`` pixels."""
    return ((2 * n if upsample else n) + 2 * padding - size) // stride + 1


def quantize_patches_ref(
    x: Tensor, size: int, stride: int, padding: int, upsample: bool
) -> tuple[Tensor, Tensor]:
    """The specification: the patches as :func:`quantize_ref` rounds rows."""
    if upsample:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    patches = F.pad(x, (padding,) * 4).unfold(2, size, stride).unfold(3, size, stride)
    return quantize_ref(patches.permute(0, 2, 3, 4, 5, 1).flatten(3).contiguous(), None, None)


def _native_why_not(x: Tensor, *_: Any) -> str | None:
    return why_not_native(x, gpu="quantize_patches") or refuse_grad(x)


def _triton_why_not(x: Tensor, *_: Any) -> str | None:
    return why_not_triton(x) or refuse_grad(x)


def _ref_why_not(x: Tensor, *_: Any) -> str | None:
    if _has_tangent((x,)):
        return "an input has a tangent, and rounding has no derivative"
    return refuse_grad(x)


IMPLS = (
    Impl("native", native("quantize_patches"), _native_why_not),
    Impl("triton", triton_row("quantize_patches"), _triton_why_not),
    Impl("ref", quantize_patches_ref, _ref_why_not),
)


def row_args(
    x: Tensor, size: int, *, stride: int = 1, padding: int = 0, upsample: bool = False
) -> tuple[Tensor, int, int, int, bool]:
    """Check the public arguments and give those of a row."""
    check_tensor("quantize_patches", "x", x, dim=4)
    for name, value, least in (("size", size, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"quantize_patches: {name} is {value!r}, need an integer of at least {least}"
            )
    if not isinstance(upsample, bool):
        raise ValueError(f"quantize_patches: upsample is {upsample!r}, need True or False")
    if any(result_size(n, size, stride, padding, upsample) < 1 for n in x.shape[2:]):
        raise ValueError(
            f"quantize_patches: x has shape {list(x.shape)}, need {size} pixels or more in both "
            f"directions with padding {padding}, upsample {upsample}"
        )
    return x, size, stride, padding, upsample


TABLES = {"quantize_patches": (IMPLS, row_args)}


def quantize_patches(
    x: Tensor,
    size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    upsample: bool = False,
    impl: str | None = None,
) -> Quantized:
    """The patches of a convolution as int8, with one scale each.

    Args:
        x: ``[B, C, H, W]``; float16, bfloat16 or float32 (float64 on the reference row). Copied
            where its channels are not the innermost in memory (``torch.channels_last``).
        size: of the kernel, k x k.
        stride, padding: in both directions; the padding is zeros.
        upsample: the convolution is of ``x`` with every pixel doubled in both directions.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        :class:`~fastdiff.ops.Quantized`: values ``[B, H', W', k k C]`` and scale ``[B, H', W']``,
        contiguous.

    Raises:
        ValueError: a shape or dtype differs from the above; the message names it.
        NoImpl: the forced row refuses, or a gradient is asked for; the message says why.
    """
    args = row_args(x, size, stride=stride, padding=padding, upsample=upsample)
    values, scale = pick("quantize_patches", IMPLS, impl, *args)(*args)
    return Quantized(values, scale, x.dtype)


if hasattr(torch.ops.fastdiff, "quantize_patches"):

    @torch.library.register_fake("fastdiff::quantize_patches")
    def _(x: Tensor, size: int, stride: int, padding: int, upsample: bool) -> tuple[Tensor, Tensor]:
        rows, columns = (result_size(n, size, stride, padding, upsample) for n in x.shape[2:])
        shape = (x.shape[0], rows, columns)
        q = x.new_empty(*shape, size * size * x.shape[1], dtype=torch.int8)
        return q, x.new_empty(shape, dtype=torch.float32)
