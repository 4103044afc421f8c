"""The CUDA kernel of quant_linear, in the model: integer sums are exact, float8's are Ada's."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from fastdiff import testing, testing_simt
from fastdiff.ops.quant_linear import quant_linear
from fastdiff.ops.quantize import FLOAT8, Quantized, QuantWeight, quantize_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = (torch.int8, FLOAT8)
# Rows, columns, K, group: tiles are of 64 or 128 rows and 128 columns, slices of 64 of k. The last
# three have tiles of 128 rows.
CASES = (
    (1, 1, 1, None), (3, 5, 7, None), (65, 77, 96, 32), (17, 130, 128, 64), (33, 40, 256, 128),
    (9, 72, 240, 40), (20, 12, 90, 10), (66, 129, 200, None), (3, 4, 0, None), (5, 6, 36, 6),
    (7, 24, 192, 96), (70, 136, 1152, None), (129, 8449, 80, None), (1, 16889, 32, None),
    (2, 16890, 37, None),
)  # fmt: skip


def make(rows, columns, width, group=None, dtype=torch.float32, bits=8, of=torch.int8):
    """Tokens of which the second has a NaN for its scale, a weight, a bias."""
    if of == FLOAT8:
        values = (torch.randn(rows, width) * 100).clamp(-448, 448).to(FLOAT8)
    else:
        values = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    scale = torch.rand(rows) + 0.5
    scale[1:2] = math.nan
    weight = quantize_weight(torch.randn(columns, width), group=group, bits=bits, dtype=of)
    return Quantized(values, scale, dtype), weight, torch.randn(columns).to(dtype)


def run(x, weight, bias=None, activation=None, mode=(0, False, False)):
    given = [t for t in (*x[:2], *weight[:2], bias) if t is not None]
    with testing.unchanged(*given), testing_simt.emulated(*mode):
        return quant_linear(x, weight, bias, activation=activation, impl="native")


def compare(x, weight, bias=None, activation=None, mode=(0, False, False)):
    """Against float64; sums after the inner ones are float32, and the activation's exp is."""
    got = run(x, weight, bias, activation, mode)
    wide = None if bias is None else bias.double()
    exact = quant_linear(x._replace(dtype=torch.float64), weight, wide, activation=activation,
                         impl="ref")  # fmt: skip
    assert got.dtype == x.dtype and got.shape == exact.shape
    terms = x.scale.double()[:, None] * dequantized(x.values, weight)
    size = terms + (0.0 if bias is None else bias.double().abs())
    unit = testing.ROUNDOFF[x.dtype] if x.dtype != torch.float32 else 0.0
    bound = 2.02 * unit * exact.abs() + 2.0**-21 * size + 1e-6
    off = (got.double() - exact).abs()
    assert (got.isnan() == exact.isnan()).all()
    assert (off <= bound)[~exact.isnan()].all(), (off / bound).nan_to_num().max()
    return got


def dequantized(values, weight, products=False):
    """Sums over groups of the absolute inner sums (or products) times their scale, [M, N]."""
    groups = weight.scale.shape[1]
    if not groups:
        return torch.zeros(len(values), len(weight.values), dtype=torch.float64)
    x = values.view(len(values), groups, -1).double()
    w = weight.values.view(len(weight.values), groups, -1).double()
    x, w = (x.abs(), w.abs()) if products else (x, w)
    return (torch.einsum("mgk,ngk->mng", x, w).abs() * weight.scale.double()).sum(-1)


def cut(x, top):
    """To 13 bits of fraction of the exponent of ``top``, towards zero."""
    shift = 14 - torch.frexp(top).exponent
    return torch.ldexp(torch.ldexp(x, shift).trunc(), -shift)


def adas(x, weight, bias=None):
    """float64 of what is made of sums as Ada's tensor cores add them: 32 products and an addend by
    the largest one's exponent, slices of 64 columns of a group; these go to a float32 total."""
    rows, groups = len(x.values), weight.scale.shape[1]
    total = torch.zeros(rows, len(weight.values))
    size = x.values.shape[1] // groups if groups else 0
    for g in range(groups):
        own = slice(g * size, (g + 1) * size)
        q, v = (F.pad(t[:, own].double(), (0, -size % 64)) for t in (x.values, weight.values))
        for first in range(0, q.shape[1], 64):
            sums = torch.zeros(rows, len(v), dtype=torch.float64)
            for k in (first, first + 32):
                terms = torch.cat(
                    (q[:, None, k : k + 32] * v[None, :, k : k + 32], sums[..., None]), -1
                )
                sums = cut(terms, terms.abs().amax(-1, keepdim=True)).sum(-1)
                sums = cut(sums, sums)
            total = (total.double() + sums * weight.scale[:, g].double()).float()
    y = x.scale.double()[:, None] * total.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in CASES if c[0] * c[1] < 20000], ids=str)
def test_float8_sums_are_adas(case, dtype):
    """To float32's last places, which tells their order; and near to the reference."""
    x, weight, bias = make(*case, dtype, of=FLOAT8)
    got, want = run(x, weight, bias).double(), adas(x, weight, bias)
    assert got.shape == want.shape and (got.isnan() == want.isnan()).all()
    size = x.scale.double()[:, None] * dequantized(x.values, weight) + bias.double().abs()
    unit = testing.ROUNDOFF[dtype] if dtype != torch.float32 else 0.0
    off = (got - want).abs()
    assert (off <= 2.02 * unit * want.abs() + 2.0**-22 * size)[~want.isnan()].all()
    exact = quant_linear(x._replace(dtype=torch.float64), weight, bias.double(), impl="ref")
    sums = x.scale.double()[:, None] * dequantized(x.values, weight, True)
    off = ((got - exact).abs() - 2.02 * unit * exact.abs())[~want.isnan()]
    assert (off <= 2.0**-11 * (sums + size)[~want.isnan()]).all()


@pytest.mark.parametrize("activation", ("gelu_tanh", "silu"))
def test_float8_activations(activation):
    for case in ((65, 77, 96, 32), (66, 129, 200, None)):
        x, weight, bias = make(*case, of=FLOAT8)
        act = F.silu if activation == "silu" else functools.partial(F.gelu, approximate="tanh")
        want = act(adas(x, weight, bias))
        got = run(x, weight, bias, activation)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("columns", (130, 5))
def test_float8_sums_that_are_exact(columns):
    """A sum of 64 products 1.875^2 has 13 bits of fraction to its end, one of 128 has not: the
    totals of any number of them are exact."""
    for width, group in ((1024, None), (1024, 256), (1000, None), (384, 96), (33, None)):
        groups = 1 if group is None else width // group
        x = Quantized(torch.full((67, width), 1.875).to(FLOAT8), torch.ones(67), torch.float32)
        weight = QuantWeight(torch.full((columns, width), -1.875).to(FLOAT8),
                             torch.ones(columns, groups), 8)  # fmt: skip
        assert (run(x, weight) == -width * 1.875**2).all()
    x = Quantized(torch.zeros(5, 200).to(FLOAT8), torch.ones(5), torch.float32)
    x.values[1, 70] = x.values[2, 199] = x.values[3, 0] = 448.0
    x.values[4] = 2.0**-9
    weight = QuantWeight((2.0 ** -(torch.arange(200) % 9)).repeat(columns, 1).to(FLOAT8),
                         torch.ones(columns, 1), 8)  # fmt: skip
    got = run(x, weight)
    want = x.values.double() @ weight.values.double().t()
    assert torch.equal(got.double(), want) and not got[0].any()


def test_float8_of_the_largest_and_of_nan():
    x = Quantized(torch.full((3, 300), 448.0).to(FLOAT8), torch.ones(3), torch.float32)
    weight = QuantWeight(torch.full((9, 300), 448.0).to(FLOAT8), torch.ones(9, 1), 8)
    assert torch.equal(run(x, weight).double(), adas(x, weight))
    x.scale[1] = math.nan
    weight.values[4, 299] = math.nan
    got = run(x, weight).isnan()
    assert got[1].all() and got[:, 4].all() and got.sum() == 9 + 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    x, weight, bias = make(*case, dtype)
    compare(x, weight, bias, "gelu_tanh")
    if case[1] < 1000:
        compare(x, weight, bias, "silu")
        compare(x, weight)


@pytest.mark.parametrize("width, group", ((1100, None), (1040, None), (260, 130), (33, None)))
def test_integer_sums_are_exact(width, group):
    """Of the largest values, whose sums are no float32; where scales are 1 the sum is one rounding
    away."""
    values = torch.full((67, width), 127, dtype=torch.int8)
    values[::2, width // 2] = -126
    values[:, -1] = torch.arange(67) - 33
    weight = torch.full((130, width), -127, dtype=torch.int8)
    weight[::3] = 127
    weight[:, -1] = torch.arange(130) - 65
    groups = 1 if group is None else width // group
    given = QuantWeight(weight, torch.ones(130, groups), 8)
    got = run(Quantized(values, torch.ones(67), torch.float32), given)
    parts = torch.einsum("mgk,ngk->mng", values.view(67, groups, -1).long(),
                         weight.view(130, groups, -1).long())  # fmt: skip
    want = torch.zeros(67, 130)
    for g in range(groups):
        want = (want.double() + parts[..., g].float().double()).float()
    assert torch.equal(got, want)


def test_one_scale_is_that_of_equal_groups():
    """The same numbers with a scale of 1 and sums below 2^24: groups change no bit."""
    x, weight, bias = make(66, 130, 256)
    one = weight._replace(scale=torch.ones(130, 1))
    for groups in (2, 4, 16):
        many = weight._replace(scale=torch.ones(130, groups))
        a, b = run(x, one, bias), run(x, many, bias)
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_leading_dimensions_and_four_bits():
    x, weight, bias = make(6, 40, 64, 32, bits=4)
    got = run(x, weight, bias)
    lead = Quantized(x.values.view(2, 3, 64), x.scale.view(2, 3), x.dtype)
    assert torch.equal(run(lead, weight, bias).nan_to_num(7.0), got.view(2, 3, 40).nan_to_num(7.0))
    want = quant_linear(x, weight, bias, impl="ref")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4, equal_nan=True)
    for rows, columns in ((0, 8), (4, 0)):
        x, weight, bias = make(rows, columns, 16)
        assert run(x, weight, bias).shape == (rows, columns)


@pytest.mark.parametrize("case", ((33, 40, 128, None), (9, 72, 96, 32), (5, 13, 37, None)), ids=str)
@pytest.mark.parametrize("of", VALUES, ids=str)
def test_misaligned_tensors(case, of):
    """Each of them in turn begins a byte, or an element, past 16 bytes."""
    x, weight, bias = make(*case, of=of)
    want = run(x, weight, bias).nan_to_num(7.0)

    def off(t):
        wide = torch.empty(t.numel() + 1, dtype=t.dtype)
        return wide[1:].view(t.shape).copy_(t)

    for given in (
        (x._replace(values=off(x.values)), weight, bias),
        (x._replace(scale=off(x.scale)), weight, bias),
        (x, weight._replace(values=off(weight.values)), bias),
        (x, weight._replace(scale=off(weight.scale)), bias),
        (x, weight, off(bias)),
    ):
        assert torch.equal(run(*given).nan_to_num(7.0), want)


@pytest.mark.parametrize("case", ((70, 136, 192, None), (65, 130, 128, 32)), ids=str)
@pytest.mark.parametrize("of", VALUES, ids=str)
def test_same_bits_in_every_order(case, of):
    given = make(*case, torch.bfloat16, of=of)
    want = run(*given, "silu").nan_to_num(7.0)
    for mode in testing_simt.MODES[1:]:
        assert torch.equal(run(*given, "silu", mode).nan_to_num(7.0), want)


@pytest.mark.parametrize("of", VALUES, ids=str)
def test_no_bank_conflicts(of):
    given = make(70, 136, 192, of=of)
    testing_simt.counters()
    run(*given)
    seen = testing_simt.counters()
    assert seen["mma"] and not seen["bank_conflicts"]


@pytest.mark.parametrize("case", ((65, 136, 96, 32), (3, 45, 37, None)), ids=str)
@pytest.mark.parametrize("of", VALUES, ids=str)
def test_reads_nothing_outside(case, of):
    x, weight, bias = make(*case, of=of)
    want = run(x, weight, bias)
    with testing.guarded(x.values, x.scale, weight.values, weight.scale, bias) as copies:
        q, s, values, scale, b = copies
        got = run(Quantized(q, s, x.dtype), QuantWeight(values, scale, 8), b)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
