import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import Quantized, QuantWeight, quant_linear, quantize, quantize_weight
from fastdiff.ops.linear import ACTIVATIONS
from fastdiff.ops.quant_linear import IMPLS, MOST_COLUMNS
from fastdiff.ops.quantize import unpacked

ROWS = testing.rows_of(IMPLS)
# (rows, K, N, groups): few and many rows, tails of lanes, of vectors and of panels; tiles of rows;
# blocks of a row (1536 and 3072 columns) and more than one of them, within a group or not.
SHAPES = [
    (0, 8, 4, 1), (1, 1, 1, 1), (2, 0, 5, 0), (13, 0, 5, 0), (3, 5, 0, 1), (1, 3, 1, 1),
    (1, 77, 33, 7), (2, 64, 16, 2), (3, 33, 7, 1), (5, 31, 65, 31), (7, 384, 37, 6), (8, 96, 32, 3),
    (9, 31, 17, 1), (9, 4, 16, 4), (15, 12, 31, 6), (64, 33, 33, 3), (65, 65, 65, 13),
    (77, 1152, 97, 1), (77, 1152, 19, 18), (29, 77, 130, 7), (10, 1537, 17, 1), (9, 3200, 33, 2),
    (9, 3073, 5, 1), (300, 20, 17, 5),
]  # fmt: skip


def tokens(rows, k, dtype=torch.float32):
    """Of all 255 integers that quantize makes, with scales around 1 / 127."""
    q = torch.randint(-127, 128, (rows, k), dtype=torch.int8)
    return Quantized(q, (torch.rand(rows) + 0.5) / 127, dtype)


def weight_of(n, k, groups):
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return QuantWeight(values, (torch.rand(n, groups) + 0.5) / (127 * max(k, 1) ** 0.5), 8)


def sums_of(x, weight):
    """int64 [groups][M, N]: the inner sums, without a float."""
    parts = weight.scale.shape[1] or 1
    q, v = (t.long().chunk(parts, -1) for t in (x.values, unpacked(weight)))
    return [a @ b.T for a, b in zip(q, v, strict=True)]


def composed(x, weight, bias, activation, dtype):
    """The docstring in ``dtype``, operation by operation."""
    y = torch.zeros(x.values.shape[0], weight.shape[0], dtype=dtype)
    for g, sums in enumerate(sums_of(x, weight)):
        if weight.shape[1]:
            y = y + sums.float().to(dtype) * weight.scale[:, g].to(dtype)
    y = y * x.scale[:, None].to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation is None:
        return y
    return F.silu(y) if activation == "silu" else F.gelu(y, approximate="tanh")


def to_the_bit(x, weight, bias):
    """What the native row promises at every level: float32 with fused multiply-adds in order.
    float64 holds a product of two float32 exactly, so that these are fused but for a second
    rounding at odds of 2^-29."""
    y = torch.zeros(x.values.shape[0], weight.shape[0])
    for g, sums in enumerate(sums_of(x, weight)):
        if weight.shape[1]:
            y = (sums.float().double() * weight.scale[:, g].double() + y.double()).float()
    y = y.double() * x.scale[:, None].double()
    return (y if bias is None else y + bias.double()).float().to(x.dtype)


def at_levels(row):
    return fastdiff.cpu_levels() if row == "native" else [fastdiff.cpu_level()]


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_matches_float64(row, dtype):
    for rows, k, n, groups in SHAPES:
        x, weight, bias = tokens(rows, k, dtype), weight_of(n, k, groups), torch.randn(n).to(dtype)
        for b in (None, bias):
            for activation in ACTIVATIONS:
                exact = composed(x, weight, b, activation, torch.float64)
                eager = composed(x, weight, b, activation, torch.float32).to(dtype)
                for level in at_levels(row):
                    what = f"{row} {level} {rows} {k} {n} {groups} {activation} {b is not None}"
                    before = (x.values, x.scale, weight.values, weight.scale, b)
                    with testing.cpu_level(level), testing.unchanged(*before):
                        got = quant_linear(x, weight, b, activation=activation, impl=row)
                    assert got.dtype == dtype and got.is_contiguous(), what
                    testing.assert_close(got, exact, eager, what=what)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_every_bit_is_known(level, dtype):
    """The same at every level, on few rows and on many."""
    for rows, k, n, groups in SHAPES:
        x, weight, bias = tokens(rows, k, dtype), weight_of(n, k, groups), torch.randn(n).to(dtype)
        for b in (None, bias):
            with testing.cpu_level(level):
                got = quant_linear(x, weight, b, impl="native")
            assert torch.equal(got, to_the_bit(x, weight, b)), f"{rows} {k} {n} {groups}"


@pytest.mark.parametrize("row", ROWS)
def test_every_column_has_its_place_and_its_scale(row):
    """Tokens of one entry each pick single weights: v[n, k] * scale[n, group of k], to the bit."""
    for k, n, groups in ((77, 37, 7), (131, 35, 1), (40, 33, 40), (66, 18, 11), (1600, 9, 2)):
        weight = weight_of(n, k, groups)
        weight.scale.copy_(2.0 ** torch.randint(-9, 9, (n, groups)))
        entry = torch.randint(1, 128, (k,), dtype=torch.int8)
        x = Quantized(entry.diag(), 2.0 ** torch.randint(-9, 9, (k,)).float(), torch.float32)
        scales = weight.scale.repeat_interleave(k // groups, 1)
        want = (weight.values.float() * scales).T * entry[:, None] * x.scale[:, None]
        for level in at_levels(row):
            with testing.cpu_level(level):
                assert torch.equal(quant_linear(x, weight, impl=row), want), f"{level} {k} {n}"
                for few in (1, 3, 8):
                    for at in range(0, k - few + 1, few if k < 200 else 97):
                        some = Quantized(x.values[at : at + few], x.scale[at : at + few], x.dtype)
                        got = quant_linear(some, weight, impl=row)
                        assert torch.equal(got, want[at : at + few]), f"{level} {k} {n} {at}"


@pytest.mark.parametrize("row", ROWS)
def test_extreme_integers_do_not_saturate(row):
    """All products at once at 127^2, 127 * -127, and -128, which no weight of ours has: sums that
    int16 cannot hold, and at the last size those of int32 at its end."""
    for k, n in ((4, 3), (64, 17), (4096, 17), (4100, 5), (MOST_COLUMNS, 2)):
        for rows in (1, 9):
            for a, b in ((127, 127), (127, -127), (-127, -127), (-127, 127), (127, -128)):
                if k == MOST_COLUMNS and (rows == 9 and row == "ref" or b == -128):
                    continue
                q = torch.full((rows, k), a, dtype=torch.int8)
                values = torch.full((n, k), b, dtype=torch.int8)
                x = Quantized(q, torch.ones(rows), torch.float32)
                want = torch.tensor(float(a * b * k))
                for level in at_levels(row):
                    with testing.cpu_level(level):
                        got = quant_linear(x, QuantWeight(values, torch.ones(n, 1), 8), impl=row)
                    assert (got == want).all(), f"{level} {k} {rows} {a} {b}"


@pytest.mark.parametrize("row", ROWS)
def test_integer_sums_are_exact(row):
    """Every integer of int8 on both sides; below 2^24 a float32 is the sum itself."""
    for rows, k, n in ((3, 515, 9), (29, 515, 37)):
        q = torch.randint(-128, 128, (rows, k), dtype=torch.int8)
        values = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        want = q.long() @ values.long().T
        assert want.abs().max() < 2**24
        x, weight = Quantized(q, torch.ones(rows), torch.float32), torch.ones(n, 1)
        for level in at_levels(row):
            with testing.cpu_level(level):
                got = quant_linear(x, QuantWeight(values, weight, 8), impl=row)
            assert torch.equal(got.long(), want)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_a_row_does_not_depend_on_those_beside_it(level):
    x, weight, bias = tokens(77, 1152), weight_of(65, 1152, 9), torch.randn(65)
    with testing.cpu_level(level):
        whole = quant_linear(x, weight, bias, activation="silu", impl="native")
        for rows in (*range(1, 16), 28, 29):
            some = Quantized(x.values[:rows], x.scale[:rows], x.dtype)
            got = quant_linear(some, weight, bias, activation="silu", impl="native")
            assert torch.equal(got, whole[:rows]), rows


def test_threads_change_no_bit():
    before = torch.get_num_threads()
    for rows in (4, 500):
        for n in (40, 1200):
            args = tokens(rows, 300), weight_of(n, 300, 3), torch.randn(n)
            results = []
            try:
                for threads in (1, 2, 3, 5):
                    torch.set_num_threads(threads)
                    results.append(quant_linear(*args, activation="gelu_tanh", impl="native"))
            finally:
                torch.set_num_threads(before)
            assert all(torch.equal(got, results[0]) for got in results[1:])


@pytest.mark.parametrize("row", ROWS)
def test_four_bits(row):
    for rows in (3, 30):
        for k, n, group in ((64, 33, 16), (66, 17, None), (2, 5, 2)):
            w = quantize_weight(torch.randn(n, k), bits=4, group=group)
            x = quantize(torch.randn(2, rows, k))
            same = QuantWeight(unpacked(w), w.scale, 8)
            got = quant_linear(x, w, impl=row)
            assert got.shape == (2, rows, n) and torch.equal(got, quant_linear(x, same, impl=row))
            flat = Quantized(x.values.flatten(0, 1), x.scale.flatten(), x.dtype)
            exact = composed(flat, w, None, None, torch.float64).view(got.shape)
            eager = composed(flat, w, None, None, torch.float32).view(got.shape)
            testing.assert_close(got, exact, eager)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_nan_tokens_and_zero_tokens(row, dtype):
    for rows in (4, 40):
        data, bias = torch.randn(rows, 40).to(dtype), torch.randn(21).to(dtype)
        weight = quantize_weight(torch.randn(21, 40), group=8)
        clean = quant_linear(data, weight, bias, impl=row)
        data[1, 7], data[2, 39], data[3] = torch.nan, -torch.inf, 0
        for activation in ACTIVATIONS:
            got = quant_linear(data, weight, bias, activation=activation, impl=row)
            assert got[1:3].isnan().all() and got.isnan().sum() == 2 * 21
            zero = quant_linear(data[3:4], weight, bias, activation=activation, impl="ref")
            torch.testing.assert_close(got[3], zero[0])
        assert torch.equal(quant_linear(data, weight, bias, impl=row)[3], bias)
        assert torch.equal(quant_linear(data, weight, bias, impl=row)[0], clean[0])


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64])
def test_floats_are_quantised_here(dtype):
    x, w, smooth = torch.randn(2, 9, 33).to(dtype), torch.randn(17, 33), torch.rand(33) + 0.5
    bias = torch.randn(17).to(dtype)
    plain, scaled = quantize_weight(w), quantize_weight(w, smooth=smooth)
    got = quant_linear(x, plain, bias, activation="silu")
    assert got.dtype == dtype and got.shape == (2, 9, 17)
    assert torch.equal(got, quant_linear(quantize(x), plain, bias, activation="silu"))
    got = quant_linear(x, scaled, bias, smooth=smooth)
    assert torch.equal(got, quant_linear(quantize(x, smooth=smooth), scaled, bias))
    assert quant_linear(x[0, 0], plain).shape == (17,)
    if dtype == torch.float64:
        assert "float64" in fastdiff.explain(quant_linear, x, plain)["native"]


def error_of(got, x, w):
    exact = x.double() @ w.double().T
    return ((got.double() - exact).norm() / exact.norm()).item()


def test_error_of_quantisation():
    """Normal numbers: below 1.5e-2. A channel of 100 times the others spoils every token's scale,
    and smoothing moves it to the weight."""
    for rows, k, n in ((128, 384, 256), (77, 1152, 300), (4, 1152, 512)):
        x, w = torch.randn(rows, k), torch.randn(n, k) / k**0.5
        assert error_of(quant_linear(x, quantize_weight(w)), x, w) < 1.5e-2
        x[:, 5] *= 100
        w[:, 5] /= 100  # so that the others count
        rough = error_of(quant_linear(x, quantize_weight(w)), x, w)
        smooth = (x.abs().amax(0) / w.abs().amax(0)).sqrt()
        fine = error_of(quant_linear(x, quantize_weight(w, smooth=smooth), smooth=smooth), x, w)
        assert fine < 1.5e-2 and rough > 3 * fine, (rough, fine)


def test_finer_groups_err_less_with_four_bits():
    x, w = torch.randn(64, 512), torch.randn(96, 512) * torch.rand(512).exp()
    w[:, ::64] *= 8
    errors = [
        error_of(quant_linear(x, quantize_weight(w, bits=4, group=g)), x, w) for g in (512, 64, 16)
    ]
    assert errors[0] > 1.2 * errors[1] and errors[1] > 1.2 * errors[2], errors


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_levels_and_layouts(level, layout):
    for rows in (5, 65):
        x, weight, bias = tokens(rows, 77), weight_of(33, 77, 7), torch.randn(33)
        laid = Quantized(testing.lay(x.values, layout), testing.lay(x.scale, layout), x.dtype)
        w = weight
        if layout == "misaligned":
            w = QuantWeight(*(testing.lay(t, layout) for t in weight[:2]), 8)
        with testing.cpu_level(level):
            got = quant_linear(laid, w, testing.lay(bias, layout), impl="native")
        assert torch.equal(got, to_the_bit(x, weight, bias))
        scattered = [testing.lay(t, layout) for t in (*x[:2], *weight[:2], bias)]
        with testing.cpu_level(level):  # the entry takes what the public function refuses
            got = torch.ops.fastdiff.quant_linear(*scattered, None, torch.float32)
        assert torch.equal(got, to_the_bit(x, weight, bias))


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    """Products of groups that a block of k divides, and that it does not."""
    from fastdiff.kernels import quant_linear as kernel

    for rows, k, n, groups in ((70, 256, 130, 2), (20, 96, 33, 3), (9, 77, 17, 1)):
        x, weight, bias = tokens(rows, k), weight_of(n, k, groups), torch.randn(n)
        given = (x.values, x.scale, *weight[:2], bias, "silu", torch.float32)
        exact = composed(x, weight, bias, "silu", torch.float64)
        eager = composed(x, weight, bias, "silu", torch.float32)
        for name, got in testing.run_configs(kernel.quant_linear, kernel.CONFIGS, *given):
            testing.assert_close(got, exact, eager, what=name)


@pytest.mark.parametrize("row", [row for row in ROWS if row in ("triton", "ref")])
def test_float8(row):
    """Products of float8_e4m3fn are exact in float32; a sum of K of them is one of float32."""
    dtype = torch.float8_e4m3fn
    x, weight, bias = torch.randn(19, 96), torch.randn(33, 96), torch.randn(33)
    for groups in (None, 32):
        q, w = (
            quantize(x, dtype=dtype, impl="ref"),
            quantize_weight(weight, dtype=dtype, group=groups),
        )
        got = quant_linear(q, w, bias, activation="silu", impl=row)
        size = groups or 96
        parts = [
            (a.double() @ b.double().T) * w.scale[:, g].double()
            for g, (a, b) in enumerate(
                zip(q.values.float().split(size, -1), w.values.float().split(size, -1), strict=True)
            )
        ]
        exact = F.silu(sum(parts) * q.scale[:, None].double() + bias.double())
        assert (got.double() - exact).abs().max() < 2e-5
        plain = F.silu(F.linear(x, weight, bias))
        assert (got - plain).norm() < 0.06 * plain.norm()  # 3 bits of fraction
    with pytest.raises(ValueError, match="weight.values is torch.int8, x is"):
        quant_linear(q, quantize_weight(weight), bias)
    with pytest.raises(fastdiff.NoImpl, match="native refuses: native kernels for the cpu take"):
        quant_linear(q, w, bias, impl="native")
    with pytest.raises(RuntimeError, match="q is Float8_e4m3fn, need Char"):
        torch.ops.fastdiff.quant_linear(*q[:2], *w[:2], bias, None, torch.float32)


def test_opcheck_and_compile():
    x, weight, bias = tokens(5, 33), weight_of(17, 33, 3), torch.randn(17)
    for dtype, b in ((torch.float32, bias), (torch.bfloat16, None)):
        args = (x.values[None], x.scale[None], *weight[:2], b, "silu", dtype)
        torch.library.opcheck(torch.ops.fastdiff.quant_linear.default, args)
    data, four = torch.randn(6, 32), quantize_weight(torch.randn(17, 32), bits=4, group=8)
    for row in ROWS:
        if row == "triton":
            continue  # a launch is no part of a graph, as of all ops
        testing.check_compile(
            lambda x, b, row=row: quant_linear(x, four, b, activation="silu", impl=row), data, bias
        )


def test_gradients():
    """None of x, which is rounded; the bias's is the reference's."""
    x, weight = torch.randn(5, 12), quantize_weight(torch.randn(7, 12))
    bias = torch.randn(7, requires_grad=True)
    why = fastdiff.explain(quant_linear, x, weight, bias)
    assert "no backward" in why["native"] and why["ref"] is None
    quant_linear(x, weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((7,), 5.0))
    with pytest.raises(fastdiff.NoImpl, match="requires a gradient"):
        quant_linear(x.requires_grad_(), weight)


X, W, T = torch.ones(2, 8), quantize_weight(torch.ones(4, 8), group=4), quantize(torch.ones(2, 8))
V, S = W.values, W.scale
BIG = QuantWeight(torch.ones(1, 133145, dtype=torch.int8), torch.ones(1, 1), 8)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (("no", W), {}, "x is str, need a tensor, or Quantized of quantize"),
        ((X.int(), W), {}, "x is torch.int32, need float16"),
        ((X, torch.ones(4, 8)), {}, "weight is Tensor, need a QuantWeight of quantize_weight"),
        ((X[:, :7], W), {}, r"weight is \[4, 8\], need \[N, 7\]"),
        ((X, W._replace(bits=2)), {}, "weight has 2 bits, need 8 or 4"),
        ((X, W._replace(bits=4)), {}, r"weight.values is torch.int8 .*, need torch.uint8 \[N, .\]"),
        ((X, W._replace(values=V.int())), {}, "weight.values is torch.int32 .*, need torch.int8"),
        ((X, W._replace(values=[1])), {}, "weight.values is list, need torch.int8"),
        ((X, W._replace(values=V[None])), {}, r"weight.values is torch.int8 \[1, 4, 8\] on cpu"),
        ((X, W._replace(values=V.to("meta"))), {}, r"weight.values is .* on meta, need .* on cpu"),
        ((X, W._replace(values=V.T.contiguous().T)), {}, "weight.values has strides .* contiguous"),
        ((X, W._replace(scale=S.double())), {}, "weight.scale is torch.float64 .* torch.float32"),
        ((X, W._replace(scale=S[:3])), {}, r"weight.scale is \[3, 2\], need \[4, G\] with G a div"),
        ((X, W._replace(scale=torch.ones(4, 3))), {}, r"weight.scale is \[4, 3\], need \[4, G\]"),
        ((X, W._replace(scale=torch.ones(4, 0))), {}, r"weight.scale is \[4, 0\], need \[4, G\]"),
        ((torch.ones(1, 133145), BIG), {}, "133145 columns in 1 groups, need groups of at most"),
        ((X, W, torch.ones(3)), {}, r"bias has shape \[3\], need \[4\]"),
        ((X, W, torch.ones(4).half()), {}, "bias is torch.float16, need torch.float32"),
        ((X, W), {"activation": "relu"}, "activation is 'relu', need None, 'gelu_tanh' or 'silu'"),
        ((X, W), {"smooth": torch.ones(7)}, r"smooth has shape \[7\], need \[8\]"),
        ((T, W), {"smooth": torch.ones(8)}, "smooth is given with tokens that are quantised alre"),
        ((T._replace(values=X), W), {}, r"x is torch.float32 \[2, 8\] with scale torch.float32"),
        ((T._replace(scale=T.scale.half()), W), {}, "with scale torch.float16, need torch.int8"),
        ((T._replace(scale=torch.ones(3)), W), {}, r"x.scale has shape \[3\], need \[2\]"),
        ((T._replace(scale=T.scale.to("meta")), W), {}, "x.scale is on meta, need cpu"),
    ],
)
def test_bad_input(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^quant_linear: .*{message}"):
        quant_linear(*args, **kwargs)
