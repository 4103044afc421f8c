r"""A 3x3 convolution with what surrounds it in a U-Net: upsampling before, residual after.

    y[n, h, w] = add[n, h, w] + b[n] + sum over c, i, j of W[n, c, i, j] up(x)[c, h+i-1, w+j-1]

The native row is Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, arXiv:1509.09308), 36
products for 16 pixels in place of 144:

    Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A

at the points 0, +-sqrt(1/2), +-sqrt(2) and infinity, where the transforms magnify
float32's rounding half as much as at 0, +-1, +-2: the rms error is about twice the direct form's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.ops._check import check_like, check_shape, check_tensor, wide


def _direct(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, upsample: bool
) -> Tensor:
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    per_sample = bias is not None and bias.dim() == 2
    y = F.conv2d(x, weight, None if per_sample else bias, padding=1)
    if per_sample and bias is not None:
        y = y + bias[:, :, None, None]
    return y if add is None else y + add


def conv3x3_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, upsample: bool
) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    b, a = (None if t is None else wide(t) for t in (bias, add))
    return _direct(wide(x), wide(weight), b, a, upsample).to(x.dtype)


def _native_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, upsample: bool
) -> str | None:
    tensors = x, weight, bias, add
    why = why_not_native(*tensors, dtypes=(torch.float32,)) or refuse_grad(*tensors)
    if why is not None:
        return why
    # Weights are transformed in every call: as much work as a dozen tiles where they stay in the
    # cache, as twice that where not (Zen 5, against oneDNN; par for 2 samples at these bounds). The
    # batch does not count, so that a sample is the same to the bit in any batch.
    rows, columns = (2 * n if upsample else n for n in x.shape[2:])
    tiles, need = -(-rows // 4) * -(-columns // 4), 4 if weight[..., 0, 0].numel() <= 2**15 else 16
    if tiles < need:
        return f"a sample has {tiles} tiles of 4x4 pixels, too few to gain (need {need})"
    return None


IMPLS = (
    Impl("native", native("conv3x3"), _native_why_not),
    Impl("torch", _direct, always),
    Impl("ref", conv3x3_ref, always),
)


def row_args(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    upsample: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]:
    """Check the public arguments and give those of a row."""
    check_tensor("conv3x3", "x", x, dim=4)
    check_tensor("conv3x3", "weight", weight, dim=4)
    check_like("conv3x3", "weight", weight, x)
    n = weight.shape[0]
    check_shape("conv3x3", "weight", weight, (n, x.shape[1], 3, 3))
    if bias is not None:
        check_like("conv3x3", "bias", bias, x)
        check_shape("conv3x3", "bias", bias, (n,), (x.shape[0], n))
    if not isinstance(upsample, bool):
        raise ValueError(f"conv3x3: upsample is {upsample!r}, need True or False")
    if add is not None:
        check_like("conv3x3", "add", add, x)
        check_shape("conv3x3", "add", add, (x.shape[0], n, *(s << upsample for s in x.shape[2:])))
    return x, weight, bias, add, upsample


TABLES = {"conv3x3": (IMPLS, row_args)}


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    upsample: bool = False,
    impl: str | None = None,
) -> Tensor:
    """3x3 convolution of stride 1 and padding 1, with its bias and a residual.

    Rows: "native" (Winograd; float32 on the CPU, no gradient), "torch" and "ref". The native row
    transforms the weights in every call and keeps nothing. A value that is not finite makes its
    whole tile of 4x4 pixels and their neighbours so, where the direct form spoils 3x3 pixels.

    Args:
        x: ``[B, C, H, W]``; float16, bfloat16, float32 or float64.
        weight: ``[N, C, 3, 3]``, dtype and device of ``x``.
        bias: ``[N]``, or ``[B, N]`` for one of each sample; None for 0.
        add: ``[B, N, H, W]`` (sizes of the result), added to it; None for 0.
        upsample: the convolution is of ``x`` with every pixel doubled in both directions.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[B, N, H, W]``, or ``[B, N, 2H, 2W]`` with ``upsample``; channels-last on the native row.

    Raises:
        ValueError: a shape, dtype or device differs from the above; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, weight, bias, add=add, upsample=upsample)
    return pick("conv3x3", IMPLS, impl, *args)(*args)


if hasattr(torch.ops.fastdiff, "conv3x3"):

    @torch.library.register_fake("fastdiff::conv3x3")
    def _(
        x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, upsample: bool
    ) -> Tensor:
        scale = 2 if upsample else 1
        sizes = x.shape[0], weight.shape[0], scale * x.shape[2], scale * x.shape[3]
        return x.new_empty(sizes).to(memory_format=torch.channels_last)
