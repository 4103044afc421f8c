"""The CUDA kernel of quantize_patches, in the model: bits of the reference."""

import math

import pytest
import torch

from fastdiff import testing, testing_simt
from fastdiff.ops.quantize import TINY
from fastdiff.ops.quantize_patches import quantize_patches, quantize_patches_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# x; size, stride, padding, upsample. Eight elements at once or one; more than a warp has at once;
# more pixels than a block has warps.
CASES = (
    ((2, 8, 5, 7), (3, 1, 1, False)),
    ((1, 5, 4, 6), (3, 2, 1, False)),
    ((2, 16, 3, 4), (3, 1, 1, True)),
    ((1, 72, 3, 3), (3, 1, 1, False)),
    ((1, 7, 4, 3), (2, 3, 2, True)),
    ((2, 24, 4, 5), (1, 2, 0, False)),
    ((1, 1, 3, 3), (3, 1, 1, False)),
    ((1, 3, 9, 8), (4, 4, 0, False)),
    ((2, 0, 3, 3), (3, 1, 1, False)),
    ((0, 8, 3, 3), (3, 1, 1, False)),
)


def inputs(shape, dtype):
    x = torch.randn(shape) * 3
    if x.numel() > 40:
        x[0, 0, 0, 0], x[0, -1, -1, 0], x[-1, 0, -1, -1] = math.nan, math.inf, -math.inf
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def run(x, size, stride, padding, upsample, mode=(0, False, False)):
    with testing.unchanged(x), testing_simt.emulated(*mode):
        return quantize_patches(
            x, size, stride=stride, padding=padding, upsample=upsample, impl="native"
        )


def same(got, want):
    assert got.values.dtype == torch.int8 and torch.equal(got.values, want[0])
    assert torch.equal(got.scale.nan_to_num(-1.0), want[1].nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_the_reference(case, dtype):
    shape, how = case
    x = inputs(shape, dtype)
    same(run(x, *how), quantize_patches_ref(x, *how))


@pytest.mark.parametrize("channels", (8, 5))
def test_pictures_at_the_ends_of_the_range(channels):
    """Below TINY a patch is 0; the largest values; halves go to the even neighbour."""
    pictures = torch.ones(6, channels, 3, 3)
    pictures[0] *= TINY
    pictures[1] *= TINY * (1 - 2.0**-23)
    pictures[2] *= 3.4e38
    pictures[3] = 1e-45
    pictures[4] = torch.arange(channels * 9).view(channels, 3, 3) % 40 - 20.5
    pictures[4, :, 1, 1] = 127
    pictures[5] = 0.0
    x = pictures.contiguous(memory_format=torch.channels_last)
    got = run(x, 3, 1, 1, False)
    same(got, quantize_patches_ref(x, 3, 1, 1, False))
    assert (got.scale[0] > 0).all() and not got.scale[1].any() and not got.values[1].any()


def test_strides():
    wide = torch.randn(2, 5, 6, 32)
    for view in (
        wide[..., :16],  # channels of a wider picture
        wide[..., 3:19],  # not aligned
        wide[:, ::2, 1:, :8],
        wide.transpose(1, 2)[..., :24],
        wide[..., :12],  # eight fit where a tap ends
        torch.randn(2, 8, 8, 9)[:, :5, :6, :8],  # eight fit, and pixels are not aligned
        torch.randn(2, 8, 49)[:, :5, :48].unflatten(-1, (6, 8)),  # nor are rows of pixels
        torch.randn(2, 241)[..., :240].unflatten(-1, (5, 6, 8)),  # nor pictures
    ):
        x = view.permute(0, 3, 1, 2)
        same(run(x, 3, 1, 1, False), quantize_patches_ref(x, 3, 1, 1, False))
    x = torch.randn(2, 8, 5, 6)  # channels apart: copied
    same(run(x, 3, 2, 1, True), quantize_patches_ref(x, 3, 2, 1, True))


def test_same_bits_in_every_order():
    x = inputs((2, 24, 5, 4), torch.bfloat16)
    want = run(x, 3, 1, 1, False)
    for mode in testing_simt.MODES[1:]:
        same(run(x, 3, 1, 1, False, mode), want)


@pytest.mark.parametrize("channels", (8, 5))
def test_reads_nothing_outside(channels):
    x = torch.randn(2, 4, 5, channels)
    with testing.guarded(x) as (copy,):
        got = run(copy.permute(0, 3, 1, 2), 3, 1, 1, False)
    same(got, quantize_patches_ref(x.permute(0, 3, 1, 2), 3, 1, 1, False))
