import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import QuantWeight, dequantize_weight, quantize, quantize_weight
from fastdiff.ops.quantize import ACTIVATIONS, IMPLS, TINY, quantize_ref, unpacked

ROWS = testing.rows_of(IMPLS)
SHAPES = [(rows, dim) for rows in testing.ROWS for dim in (1, 17, 64)]
SHAPES += [(2, 33, 1152), (5,), (3, 0), (0,), (2, 0, 7), (4, 31), (3, 1, 65)]
LARGE, LEAST = torch.finfo(torch.float32).max, 2.0**-149


def activated(x, activation):
    if activation is None:
        return x
    if activation == "geglu":
        return x[..., : x.shape[-1] // 2] * F.gelu(x[..., x.shape[-1] // 2 :])
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def check(got, x, smooth, activation, what):
    """Against float64: the scale, and integers that are nearest to y / s, up to float32's few
    roundings of y and of 127 / max."""
    q, s, dtype = got
    assert q.dtype == torch.int8 and s.dtype == torch.float32 and dtype == x.dtype, what
    y = activated(x.double(), activation)
    assert q.shape == y.shape and s.shape == x.shape[:-1] and q.is_contiguous(), what
    if not x.numel():
        assert not s.any(), what
        return
    y = y if smooth is None else y / smooth.double()
    most = y.abs().amax(-1)
    few = 2e-6 if activation else 2e-7
    torch.testing.assert_close(s.double(), most / 127, rtol=few, atol=0, msg=what)
    exact = y / (most / 127)[..., None]
    assert (q.double() - exact).abs().max() <= 0.5 + 127 * 2 * few, what
    assert (q.abs().amax(-1) == 127).all(), what


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_is_the_nearest(row, dtype):
    """And to the bit the reference, where no activation rounds otherwise."""
    for shape in SHAPES:
        tokens, smooth = (3 * torch.randn(shape)).to(dtype), torch.rand(shape[-1]) + 0.1
        for activation in ACTIVATIONS:
            x = torch.cat((tokens, tokens.flip(-1)), -1) if activation == "geglu" else tokens
            if activation is not None and x.numel():
                x[..., -1] = 2 + x[..., -1].abs()  # float32 keeps few digits of GELU's left tail
            for divisor in (None, smooth):
                what = f"{row} {shape} {activation} {divisor is not None}"
                with testing.unchanged(x, divisor):
                    got = quantize(x, smooth=divisor, activation=activation, impl=row)
                check(got, x, divisor, activation, what)
                want = quantize_ref(x, divisor, activation)
                if activation is None:
                    assert torch.equal(got.values, want[0]) and torch.equal(got.scale, want[1])
                elif x.numel():
                    off = (got.values.int() - want[0].int()).abs()  # ties, by an ulp of y
                    assert off.max() <= 1 and off.sum() <= 1 + x.numel() / 1000, what


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import quantize as kernel

    for shape in ((5, 130), (9, 1100), (2, 2100)):
        x, smooth = torch.randn(shape), torch.rand(shape[-1]) + 0.1
        want = quantize_ref(x, smooth, None)
        for name, got in testing.run_configs(kernel.quantize, kernel.CONFIGS, x, smooth, None):
            if kernel.CONFIGS[0].kwargs["BLOCK"] < shape[-1] and "ROWS: 4" in name:
                continue  # a row of it does not fit; the launcher never takes it there
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), name


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("row", [row for row in ROWS if row != "native"])
def test_float8(row):
    """To the bit the reference's, whose rounding is torch's; 448 at the largest; NaN and zeros as
    int8 has them."""
    x = torch.randn(6, 77) * torch.logspace(-3, 3, 6)[:, None]
    x[3], x[4, 5], x[5, 6] = 0, torch.nan, torch.inf
    for dtype in testing.DTYPES:
        given = x.to(dtype)
        q, s, _ = quantize(given, dtype=FLOAT8, impl=row)
        assert q.dtype == FLOAT8 and (q[:3].float().abs().amax(-1) == 448).all()
        y = given[:3].double() / (given[:3].double().abs().amax(-1, keepdim=True) / 448)
        exact = y.float().to(FLOAT8).float()
        step = (exact.abs() / 8).clamp(min=2.0**-9)
        assert ((q[:3].float() - y).abs() <= step / 2 * 1.0001).all()
        assert s[3] == 0 and not q[3:].float().any() and s[4:].isnan().all()
    with pytest.raises(fastdiff.NoImpl, match="native refuses: native kernels for the cpu give"):
        quantize(x, dtype=FLOAT8, impl="native")
    op = torch.ops.fastdiff.quantize
    with pytest.raises(RuntimeError, match="dtype is Float8_e4m3fn, need Char on cpu"):
        op(x, None, None, FLOAT8)
    with pytest.raises(RuntimeError, match="dtype is Half, need Char or Float8_e4m3fn"):
        op(x, None, None, torch.float16)
    assert op(x.to("meta"), None, None, FLOAT8)[0].dtype == FLOAT8
    with pytest.raises(ValueError, match="dtype is torch.int16, need torch.int8 or"):
        quantize(x, dtype=torch.int16)
    weight = quantize_weight(torch.randn(5, 12), dtype=FLOAT8)
    assert weight.values.dtype == FLOAT8 and weight.shape == (5, 12)
    with pytest.raises(ValueError, match="with 4 bits, need torch.int8"):
        quantize_weight(torch.randn(5, 12), dtype=FLOAT8, bits=4)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_layouts(level, layout, dtype):
    for shape in ((3, 65, 77), (2, 9, 64), (130, 33), (77,)):
        x = testing.lay(torch.randn(shape).to(dtype), layout)
        smooth = testing.lay(torch.rand(shape[-1]) + 0.1, layout)
        for divisor in (None, smooth):
            with testing.cpu_level(level):
                got = quantize(x, smooth=divisor, impl="native")
            want = quantize_ref(x, divisor, None)
            assert torch.equal(got.values, want[0]) and torch.equal(got.scale, want[1])
        with testing.cpu_level(level):
            got = quantize(x, smooth=smooth, activation="gelu_tanh", impl="native")
        check(got, x, smooth, "gelu_tanh", f"{level} {layout} {shape}")
        pair = testing.lay(torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype), layout)
        with testing.cpu_level(level):
            got = quantize(pair, smooth=smooth, activation="geglu", impl="native")
        check(got, pair, smooth, "geglu", f"{level} {layout} {shape}")


def levels_of(row):
    return fastdiff.cpu_levels() if row == "native" else [fastdiff.cpu_level()]


def at_every_level(row, *args, **kwargs):
    for level in levels_of(row):
        if row != "native":
            yield quantize(*args, impl=row, **kwargs)
            continue
        with testing.cpu_level(level):
            yield quantize(*args, impl=row, **kwargs)


@pytest.mark.parametrize("row", ROWS)
def test_constructed_rows(row):
    """Scales that are powers of two, ties, signs, an outlier: every bit is known."""
    x = [127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -125.5, 0.49, 63.0]
    want = [127, -127, 0, 2, 2, 0, -2, 126, -126, 0, 63]
    for power in (0, 1, -20, 90, -126):
        for length in (11, 16, 40):  # whole vectors and tails
            tokens = torch.zeros(2, length)
            tokens[:, :11] = torch.tensor(x) * 2.0**power
            tokens[1] *= -1
            for q, s, _ in at_every_level(row, tokens):
                assert s.tolist() == [2.0**power] * 2
                assert q[0, :11].tolist() == want and not q[:, 11:].any()
                assert torch.equal(q[1], -q[0])
    outlier = torch.ones(33)
    outlier[32] = -127 * 64.0
    for q, s, _ in at_every_level(row, outlier):
        assert s == 64 and q[32] == -127 and not q[:32].any()  # 1 / 64 is nearest to 0
    for q, s, _ in at_every_level(row, outlier, smooth=outlier.abs() * 2):
        assert s == torch.tensor(0.5) / 127 and q.tolist() == [127] * 32 + [-127]


@pytest.mark.parametrize("row", ROWS)
def test_zeros_denormals_and_huge_values(row):
    below = float(torch.tensor(TINY).nextafter(torch.zeros(())))
    cases = [  # largest magnitude, scale, its integer
        (0.0, 0.0, 0), (LEAST, 0.0, 0), (1e-40, 0.0, 0), (2.0**-126, 0.0, 0), (below, 0.0, 0),
        (TINY, 2.0**-126, 127), (1e-35, float(torch.tensor(1e-35) / 127), 127),
        (3e38, float(torch.tensor(3e38) / 127), 127),
        (LARGE, float(torch.tensor(LARGE) / 127), 127),
    ]  # fmt: skip
    for most, scale, level in cases:
        for at in (0, 5, 8, 36):
            x = torch.zeros(3, 37)
            x[1, at], x[2, at] = most, -most
            for q, s, _ in at_every_level(row, x):
                assert s.tolist() == [0.0, scale, scale], most
                assert q[1, at] == level and q[2, at] == -level, most
                assert q.int().abs().sum() == 2 * level, most


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_nan_and_infinity_are_reported(row, dtype):
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        for at in (0, 7, 8, 33, 36):
            x = torch.randn(3, 37).to(dtype)
            clean = quantize(x, impl=row)
            x[1, at] = bad
            for q, s, _ in at_every_level(row, x):
                assert s[1].isnan() and not q[1].any(), (bad, at)
                assert torch.equal(s[::2], clean.scale[::2])
                assert torch.equal(q[::2], clean.values[::2])
            for activation in ACTIVATIONS[1:]:  # of -inf as well: 0 * inf
                gated = activation == "geglu"
                for given in (
                    (torch.cat((x, x.nan_to_num(1, 1, 1)), -1), x.repeat(1, 2)) if gated else (x,)
                ):
                    for q, s, _ in at_every_level(row, given, activation=activation):
                        assert s.isnan().tolist() == [False, True, False] and not q[1].any()


@pytest.mark.parametrize("row", ROWS)
def test_a_smooth_of_zero_or_too_small_is_reported(row):
    x, smooth = torch.randn(3, 37), torch.ones(37)
    x[0] = 0.0
    x[2, 20] = 3e38
    smooth[20] = 1e-3
    for q, s, _ in at_every_level(row, x, smooth=smooth):
        assert s.isnan().tolist() == [False, False, True] and not q[2].any()
    smooth[20] = 0.0
    for _, s, _ in at_every_level(row, x, smooth=smooth):
        assert s.isnan().all()  # 0 / 0 as well


def test_float64_on_the_reference():
    x = torch.randn(3, 17, dtype=torch.float64)
    got = quantize(x, smooth=torch.rand(17, dtype=torch.float64) + 0.5)
    assert got.dtype == torch.float64 and got.scale.dtype == torch.float32
    x[1, 3] = 1e300  # no float32 is its scale
    got = quantize(x)
    assert got.scale.isnan().tolist() == [False, True, False] and not got.values[1].any()
    assert "float64" in fastdiff.explain(quantize, x)["native"]


def test_threads_change_no_bit():
    x, smooth = torch.randn(1000, 77), torch.rand(77) + 0.1
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(quantize(x, smooth=smooth, activation="silu", impl="native"))
    finally:
        torch.set_num_threads(before)
    for got in results[1:]:
        assert torch.equal(got.values, results[0].values)
        assert torch.equal(got.scale, results[0].scale)


def test_opcheck_and_compile():
    x, smooth = torch.randn(4, 5, 33), torch.rand(33) + 0.1
    for args in (
        (x, None, None),
        (x, smooth, "silu"),
        (x[0, 0].bfloat16(), smooth, "gelu_tanh"),
        (x[..., :32], smooth[:16], "geglu"),
    ):
        torch.library.opcheck(torch.ops.fastdiff.quantize.default, args)
    for row in ROWS:
        if row == "triton":
            continue  # a launch is no part of a graph, as of all ops
        testing.check_compile(
            lambda x, s, row=row: quantize(x, smooth=s, activation="silu", impl=row)[:2], x, smooth
        )


def test_rounding_has_no_gradient():
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(fastdiff.NoImpl, match="quantize: every row refuses: .*requires a gradient"):
        quantize(x)
    with pytest.raises(fastdiff.NoImpl, match="requires a gradient"):
        quantize(x.detach(), smooth=torch.ones(8, requires_grad=True))
    with torch.no_grad():
        assert quantize(x).values.shape == (3, 8)
    with pytest.raises(fastdiff.NoImpl, match="rounding has no derivative"):
        torch.func.jvp(lambda t: quantize(t).scale, (x.detach(),), (torch.ones(3, 8),))


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (("no",), {}, "quantize: x is str, need a torch.Tensor"),
        ((X.int(),), {}, "quantize: x is torch.int32, need float16"),
        ((torch.ones(()),), {}, r"quantize: x has shape \[\], need at least 1 dimensions"),
        ((X,), {"smooth": torch.ones(7)}, r"quantize: smooth has shape \[7\], need \[8\]"),
        ((X,), {"smooth": torch.ones(8).to("meta")}, "quantize: smooth is on meta, need cpu"),
        ((X,), {"activation": "relu"}, "activation is 'relu', need None, 'gelu_tanh', 'silu' or"),
        (
            (X[:, :7],),
            {"activation": "geglu"},
            r"x has shape \[2, 7\], need an even last dimension",
        ),
        ((X,), {"activation": "geglu", "smooth": X[0]}, r"smooth has shape \[8\], need \[4\]"),
    ],
)
def test_bad_input(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        quantize(*args, **kwargs)


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_is_within_half_a_step(bits, dtype):
    levels = 127 if bits == 8 else 7
    for rows, columns, group in (
        (5, 12, None), (5, 12, 4), (7, 30, 2), (1, 6, 6), (3, 1152, 64), (0, 8, 4), (2, 0, None),
    ):  # fmt: skip
        w = torch.randn(rows, columns).to(dtype)
        smooth = torch.rand(columns) + 0.5
        for factor in (None, smooth):
            with testing.unchanged(w, factor):
                got = quantize_weight(w, bits=bits, group=group, smooth=factor)
            groups = columns // (group or columns) if columns else 0
            assert got.shape == (rows, columns) and got.scale.shape == (rows, groups)
            assert got.values.dtype == (torch.int8 if bits == 8 else torch.uint8)
            assert got.values.shape == (rows, columns // (8 // bits)) and got.bits == bits
            back = dequantize_weight(got, torch.float64)
            assert back.shape == w.shape and back.dtype == torch.float64
            if not w.numel():
                continue
            want = w.double() if factor is None else w.double() * factor.double()
            steps = got.scale.double().repeat_interleave(columns // groups, 1)
            assert ((back - want).abs() <= steps * (0.5 + 127 * 2e-7)).all()
            of_group = want.view(rows, groups, -1).abs().amax(-1)
            torch.testing.assert_close(got.scale.double(), of_group / levels, rtol=2e-7, atol=0)
            assert unpacked(got).view(rows, groups, -1).abs().amax(-1).eq(levels).all()


def test_four_bits_are_pairs():
    w = torch.tensor([[-7.0, 7.0, 0.0, 3.0], [7.0, 1.0, -1.0, -2.0]])
    got = quantize_weight(w, bits=4)
    assert got.scale.tolist() == [[1.0], [1.0]]
    assert got.values.tolist() == [[1 | 15 << 4, 8 | 11 << 4], [15 | 9 << 4, 7 | 6 << 4]]
    assert torch.equal(unpacked(got), w.to(torch.int8)) and unpacked(got).dtype == torch.int8
    assert torch.equal(dequantize_weight(got), w)
    assert dequantize_weight(got, torch.bfloat16).dtype == torch.bfloat16


def test_weights_of_zeros_and_denormals_are_zero():
    w = torch.zeros(3, 8)
    w[1, 3], w[2, 5] = 1e-40, 127 * 2.0**-126
    got = quantize_weight(w, group=4)
    assert got.scale.tolist() == [[0.0, 0.0], [0.0, 0.0], [0.0, 2.0**-126]]
    assert got.values.sum() == got.values[2, 5] == 127


W = torch.ones(4, 8)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((X[0],), {}, r"quantize_weight: weight has shape \[8\], need 2 dimensions"),
        ((W.int(),), {}, "weight is torch.int32, need float16"),
        ((W,), {"bits": 2}, "bits is 2, need 8 or 4"),
        ((W,), {"bits": 8.0}, "bits is 8.0, need 8 or 4"),
        ((W,), {"group": 3}, "group is 3, need a divisor of K 8"),
        ((W,), {"group": 0}, "group is 0, need a divisor of K 8"),
        ((W,), {"group": -2}, "group is -2, need a divisor of K 8"),
        ((W,), {"group": 16}, "group is 16, need a divisor of K 8"),
        ((W,), {"group": 4.0}, "group is 4.0, need a divisor of K 8"),
        ((W,), {"group": True}, "group is True, need a divisor of K 8"),
        ((W[:, :7],), {"bits": 4}, "group is 7, need an even number with 4 bits"),
        ((W,), {"bits": 4, "group": 1}, "group is 1, need an even number with 4 bits"),
        ((W * torch.nan,), {}, "weight has a value that is not finite"),
        ((W * torch.inf,), {}, "weight has a value that is not finite"),
        ((W.double() * 1e60,), {}, "weight has a value that is not finite as float32"),
        ((W * 3e38,), {"smooth": X[0] * 2}, "weight has a value that is not finite"),
        ((W,), {"smooth": torch.zeros(8)}, "smooth has a value that is not above 0 and finite"),
        ((W,), {"smooth": -X[0]}, "smooth has a value that is not above 0 and finite"),
        ((W,), {"smooth": X[0] * torch.nan}, "smooth has a value that is not above 0 and finite"),
        ((W,), {"smooth": X[0, :7]}, r"smooth has shape \[7\], need \[8\]"),
        ((W,), {"smooth": X[0].to("meta")}, "smooth is on meta, need cpu, the device of weight"),
    ],
)
def test_bad_weight(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(*args, **kwargs)


def test_a_weight_needs_no_graph():
    w = torch.randn(4, 8, requires_grad=True)
    got = quantize_weight(w, smooth=torch.ones(8, requires_grad=True))
    assert isinstance(got, QuantWeight) and not got.scale.requires_grad


def test_a_weight_without_values():
    with torch.device("meta"):
        got = quantize_weight(torch.empty(4, 8), bits=4, group=4, smooth=torch.empty(8))
    assert got.shape == (4, 8) and got.values.is_meta and got.scale.shape == (4, 2)
