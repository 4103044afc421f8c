"""The CUDA kernel of quantize, in the model: bits of the reference without an activation."""

import math

import pytest
import torch

from fastdiff import testing, testing_simt
from fastdiff.ops.quantize import FLOAT8, TINY, TINY_FLOAT8, quantize

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


def run(x, smooth=None, activation=None, mode=(0, False, False), dtype=torch.int8):
    with testing.unchanged(x, *(t for t in (smooth,) if t is not None)):
        with testing_simt.emulated(*mode):
            return quantize(x, smooth=smooth, activation=activation, dtype=dtype, impl="native")


def same(got, want):
    assert got.values.dtype == want.values.dtype and got.values.shape == want.values.shape
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    assert torch.equal(got.scale.nan_to_num(-1.0), want.scale.nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_reference(shape, dtype):
    x, smooth = inputs(shape, dtype)
    for to in (torch.int8, FLOAT8):
        same(run(x, dtype=to), quantize(x, dtype=to, impl="ref"))
        same(run(x, smooth, dtype=to), quantize(x, smooth=smooth, dtype=to, impl="ref"))


@pytest.mark.parametrize("activation", ("gelu_tanh", "silu", "geglu"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations(shape, dtype, activation):
    """exp and the reciprocal of a GPU are not the reference's: a value may round the other way."""
    x, smooth = inputs(shape, dtype)
    if activation == "geglu":
        x = torch.cat((x, torch.randn(shape).to(dtype)), -1)
    got = run(x, smooth, activation)
    want = quantize(x.double(), smooth=smooth, activation=activation, impl="ref")
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=0, equal_nan=True)
    apart = (got.values.int() - want.values.int()).abs()
    assert not apart.numel() or (apart.max() <= 1 and (apart > 0).sum() <= 1 + apart.numel() // 500)
    got = run(x, smooth, activation, dtype=FLOAT8)
    want = quantize(x.double(), smooth=smooth, activation=activation, dtype=FLOAT8, impl="ref")
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=0, equal_nan=True)
    a, b = got.values.float(), want.values.float()
    step = (b.abs() / 8).clamp(min=2.0**-9)  # between neighbours, or two
    assert ((a - b).abs() <= step).all() and (a != b).sum() <= 1 + a.numel() // 500


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


@pytest.mark.parametrize("width", (40, 37))
def test_float8_of_known_rows(width):
    """Scales of a power of two, so known bits; ties, denormals, an outlier, the range's ends."""
    given = [448.0, -448.0, 1.0, 17.0, 19.0, -17.0, 2.0**-6, 2.0**-9, 2.0**-10, -(2.0**-10),
             3 * 2.0**-10, 2.0**-11, 432.0, 431.99, 0.0, -0.0]  # fmt: skip
    want = [0x7E, 0xFE, 0x38, 0x58, 0x5A, 0xD8, 0x08, 0x01, 0x00, 0x80, 0x02, 0x00, 0x7E, 0x7D,
            0x00, 0x80]  # fmt: skip
    for power in (0, 3, -20, 100, -126):
        rows = torch.zeros(5, width)
        rows[0, : len(given)] = torch.tensor(given) * 2.0**power
        got = run(rows, dtype=FLOAT8)
        if power > -100:  # else denormals of float32 are rounded themselves
            assert got.values[0, : len(given)].view(torch.uint8).tolist() == want
        assert got.scale.tolist() == [2.0**power] + [0.0] * 4
        assert not got.values.view(torch.uint8)[1:].any()
        same(got, quantize(rows, dtype=FLOAT8, impl="ref"))
    rows = torch.ones(6, width)
    rows[0, -1] = -448 * 2.0**10  # all else is 2^-10, which goes to 0
    rows[1] *= TINY_FLOAT8
    rows[2] *= TINY_FLOAT8 * (1 - 2.0**-23)
    rows[3] *= 3.4e38
    rows[4] = 1e-45
    rows[5, 0] = 0.3  # the largest times its inverse is above 1
    got = run(rows, dtype=FLOAT8)
    same(got, quantize(rows, dtype=FLOAT8, impl="ref"))
    assert got.scale[0] == 2.0**10 and not got.values.float()[0, :-1].any()
    assert got.values.float()[0, -1] == -448
    assert got.scale[1] > 0 and got.scale[2] == got.scale[4] == 0
    assert (got.values.float()[3] == 448).all()


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
        for to in (torch.int8, FLOAT8):
            same(run(view, dtype=to), quantize(view, dtype=to, impl="ref"))
    view = torch.randn(9, 81)[:, :64]  # eight elements fit, and rows are not aligned
    same(run(view), quantize(view, impl="ref"))
    image = torch.randn(2, 8, 5, 7).permute(0, 2, 3, 1)
    same(run(image), quantize(image, impl="ref"))


@pytest.mark.parametrize("shape", ((3, 1152), (3, 261), (1059, 264)), ids=str)
def test_same_bits_in_every_order(shape):
    x, smooth = inputs(shape, torch.bfloat16)
    for to in (torch.int8, FLOAT8):
        want = run(x, smooth, "gelu_tanh", dtype=to)
        for mode in testing_simt.MODES[1:]:
            same(run(x, smooth, "gelu_tanh", mode, to), want)


@pytest.mark.parametrize("shape", ((7, 64), (5, 37)), ids=str)
def test_reads_nothing_outside(shape):
    x, smooth = inputs(shape, torch.float32)
    x = x.nan_to_num(1.0, 1.0, 1.0)
    for to in (torch.int8, FLOAT8):
        with testing.guarded(x, smooth) as copies:
            got = run(*copies, dtype=to)
        same(got, quantize(x, smooth=smooth, dtype=to, impl="ref"))
