"""The CUDA kernel of quantize, in the model: bits of the reference without an activation."""

import math

import pytest
import torch

from fastdiff import testing, testing_simt
from fastdiff.ops.quantize import TINY, quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A block a row or a warp; eight elements at once or one; more than a block or a warp has at once.
SHAPES = (
    (1, 1), (3, 7), (9, 64), (2, 3, 261), (3, 1152), (2, 2312), (8,), (2, 0), (0, 8), (1060, 24),
    (1057, 37), (1059, 264),
)  # fmt: skip


def inputs(shape, dtype):
    """Rows of every kind, as many as there are; and a smoothing."""
    x = torch.randn(shape) * 3
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    if rows.numel():
        for row, value in zip(rows[1:], (math.nan, math.inf, -math.inf), strict=False):
            row[-1] = value
        if len(rows) > 5:
            rows[5], rows[-1] = 0.0, -0.0
    return x.to(dtype), torch.rand(shape[-1]) + 0.5


def run(x, smooth=None, activation=None, mode=(0, False, False)):
    with testing.unchanged(x, *(t for t in (smooth,) if t is not None)):
        with testing_simt.emulated(*mode):
            return quantize(x, smooth=smooth, activation=activation, impl="native")


def same(got, want):
    assert got.values.dtype == torch.int8 and torch.equal(got.values, want.values)
    assert torch.equal(got.scale.nan_to_num(-1.0), want.scale.nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_reference(shape, dtype):
    x, smooth = inputs(shape, dtype)
    same(run(x), quantize(x, impl="ref"))
    same(run(x, smooth), quantize(x, smooth=smooth, impl="ref"))


@pytest.mark.parametrize("activation", ("gelu_tanh", "silu"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations(shape, dtype, activation):
    """exp and the reciprocal of a GPU are not the reference's: a value may round the other way."""
    x, smooth = inputs(shape, dtype)
    got = run(x, smooth, activation)
    want = quantize(x.double(), smooth=smooth, activation=activation, impl="ref")
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=0, equal_nan=True)
    apart = (got.values.int() - want.values.int()).abs()
    assert not apart.numel() or (apart.max() <= 1 and (apart > 0).sum() <= 1 + apart.numel() // 500)


@pytest.mark.parametrize("width", (40, 37))
def test_rows_at_the_ends_of_the_range(width):
    """Below TINY a row is 0; the largest values; halves go to the even neighbour."""
    rows = torch.ones(8, width)
    rows[0] *= TINY
    rows[1] *= TINY * (1 - 2.0**-23)
    rows[2] *= 3.4e38
    rows[3] = torch.linspace(-127, 127, width)
    rows[4] = torch.arange(width) - 20.5
    rows[4, 0] = 127
    rows[5] = 1e-45
    rows[6, 1:] = 2.0**-140
    rows[7] = -rows[4]
    got = run(rows)
    same(got, quantize(rows, impl="ref"))
    assert got.scale[0] > 0 and got.scale[1] == 0 and not got.values[1].any()
    for activation in ("gelu_tanh", "silu"):  # of -inf both are NaN; of -3e38 neither
        got = run(-rows[2:4] * math.inf, activation=activation)
        assert got.scale.isnan().all() and not got.values.any()
        assert not run(-rows[2:3], activation=activation).scale.isnan().any()


def test_strided_rows():
    wide = torch.randn(9, 80)
    for view in (
        wide[:, :64],
        wide[:, 3:67],
        wide[:, :37],
        wide[::2, 8:72],
        wide.t(),
        wide[:, ::2],
    ):
        smooth = (torch.rand(view.shape[1] + 1) + 0.5)[1:]
        same(run(view, smooth), quantize(view, smooth=smooth, impl="ref"))
    view = torch.randn(9, 81)[:, :64]  # eight elements fit, and rows are not aligned
    same(run(view), quantize(view, impl="ref"))
    image = torch.randn(2, 8, 5, 7).permute(0, 2, 3, 1)
    same(run(image), quantize(image, impl="ref"))


@pytest.mark.parametrize("shape", ((3, 1152), (3, 261), (1059, 264)), ids=str)
def test_same_bits_in_every_order(shape):
    x, smooth = inputs(shape, torch.bfloat16)
    want = run(x, smooth, "gelu_tanh")
    for mode in testing_simt.MODES[1:]:
        same(run(x, smooth, "gelu_tanh", mode), want)


@pytest.mark.parametrize("shape", ((7, 64), (5, 37)), ids=str)
def test_reads_nothing_outside(shape):
    x, smooth = inputs(shape, torch.float32)
    x = x.nan_to_num(1.0, 1.0, 1.0)
    with testing.guarded(x, smooth) as copies:
        got = run(*copies)
    same(got, quantize(x, smooth=smooth, impl="ref"))
