import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import (
    ExpertWeight,
    Quantized,
    QuantWeight,
    dequantize_experts,
    dequantize_weight,
    grouped_quant_linear,
    quant_linear,
    quantize,
    quantize_experts,
    quantize_weight,
)
from fastdiff.ops.grouped_linear import ACTIVATIONS, GATED, activate
from fastdiff.ops.grouped_quant_linear import IMPLS, grouped_quant_linear_ref
from fastdiff.ops.quant_linear import MOST_COLUMNS

ROWS = testing.rows_of(IMPLS)
# Rows of every expert, rows past the last, K, N, groups: empty experts, few and many rows, tails of
# lanes, vectors and panels.
CASES = [
    ([0], 0, 8, 4, 1),
    ([0, 0, 0], 3, 8, 4, 2),
    ([1], 0, 1, 2, 1),
    ([2, 0, 5], 1, 0, 4, 0),
    ([3, 0, 4, 0], 0, 5, 0, 1),
    ([1, 0], 2, 77, 34, 7),
    ([0, 9, 8], 0, 33, 66, 1),
    ([1] * 13, 0, 31, 18, 31),
    ([7, 0, 29, 14], 5, 96, 130, 3),
    ([0, 0, 77], 0, 384, 38, 6),
    ([65, 1, 64], 0, 40, 34, 5),
    ([10, 3], 0, 3202, 18, 2),
]


def make(sizes, past, k, n, groups, dtype=torch.float32, given=None):
    """Arguments of a row but the activation; ``given``: tokens, None for one a row and no index."""
    rows, experts = sum(sizes) + past, len(sizes)
    count = rows if given is None else given
    q = torch.randint(-127, 128, (count, k), dtype=torch.int8)
    values = torch.randint(-127, 128, (experts, n, k), dtype=torch.int8)
    scale = (torch.rand(experts, n, groups) + 0.5) / (127 * max(k, 1) ** 0.5)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    index = None if given is None else torch.randint(given, (rows,))
    s, bias = (torch.rand(count) + 0.5) / 127, torch.randn(experts, n).to(dtype)
    return q, s, values, scale, offsets, bias, index


def call(args, activation=None, dtype=torch.float32, **how):
    q, s, values, scale, offsets, bias, index = args
    return grouped_quant_linear(
        Quantized(q, s, dtype), ExpertWeight(values, scale, 8), offsets, bias=bias, index=index,
        activation=activation, **how,
    )  # fmt: skip


def composed(args, activation, dtype):
    """The docstring expert by expert, operation by operation in ``dtype``; inner sums as int64."""
    q, s, values, scale, offsets, bias, index = args
    if index is not None:
        q, s = q[index], s[index]
    parts, ends = [], offsets.tolist()
    for e, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        y = torch.zeros(b - a, values.shape[1], dtype=dtype)
        if values.shape[2]:
            groups = scale.shape[2]
            pairs = zip(
                q[a:b].long().chunk(groups, 1), values[e].long().chunk(groups, 1), strict=True
            )
            for g, (x, w) in enumerate(pairs):
                y = y + (x @ w.T).float().to(dtype) * scale[e, :, g].to(dtype)
        y = y * s[a:b, None].to(dtype)
        parts.append(y if bias is None else y + bias[e].to(dtype))
    return activate(torch.cat(parts), activation)


def expert_by_expert(args, activation, dtype, row="native"):
    """Each expert's rows through quant_linear."""
    q, s, values, scale, offsets, bias, index = args
    if index is not None:
        q, s = q[index], s[index]
    ends = offsets.tolist()
    return torch.cat(
        [
            quant_linear(
                Quantized(q[a:b], s[a:b], dtype), QuantWeight(values[e], scale[e], 8),
                None if bias is None else bias[e], activation=activation, impl=row,
            )
            for e, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True))
        ]
    )  # fmt: skip


def at_levels(row):
    return fastdiff.cpu_levels() if row == "native" else [fastdiff.cpu_level()]


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_matches_float64(row, dtype):
    for i, (sizes, *more) in enumerate(CASES):
        args = make(sizes, *more, dtype, given=7 if i % 2 else None)
        last = sum(sizes)
        for bias in (None, args[5]):
            given = (*args[:5], bias, args[6])
            some = ("gelu" if bias is None else "swiglu",)  # the interpreter is slow
            for activation in ACTIVATIONS if row != "triton" else some:
                if activation in GATED and more[2] % 2:
                    continue
                exact = composed(given, activation, torch.float64)
                eager = composed(given, activation, torch.float32).to(dtype)
                for level in at_levels(row):
                    what = f"{row} {level} {sizes} {more} {activation} {bias is not None}"
                    with testing.cpu_level(level), testing.unchanged(*given):
                        got = call(given, activation, dtype, impl=row)
                    width = more[2] // (2 if activation in GATED else 1)
                    assert got.dtype == dtype and got.is_contiguous(), what
                    assert got.shape == (last + more[0], width), what
                    testing.assert_close(got[:last], exact, eager, what=what)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_every_bit_is_that_of_the_plain_layer(level, dtype):
    """At every level, on few rows and on many; gates are of the plain layer's columns."""
    for i, (sizes, *more) in enumerate(CASES):
        args, last = make(sizes, *more, dtype, given=9 if i % 2 else None), sum(sizes)
        with testing.cpu_level(level):
            for activation in (None, "gelu_tanh", "silu"):
                want = expert_by_expert(args, activation, dtype)
                got = call(args, activation, dtype, impl="native")[:last]
                assert torch.equal(got, want), f"{sizes} {more} {activation}"
            h, g = expert_by_expert(args, None, dtype).float().chunk(2, 1)
            same = torch.ones_like(args[5])
            plain = (*args[:5], args[5], args[6])
            got = call(plain, "swiglu", dtype, impl="native")[:last]
            if dtype == torch.float32 and got.numel():
                silu = expert_by_expert(args, "silu", dtype)[:, : same.shape[1] // 2]
                assert torch.equal(got, silu * g), f"{sizes} {more}"


@pytest.mark.parametrize("row", ROWS)
def test_integer_sums_are_exact(row):
    """Every integer of int8 on both sides; below 2^24 a float32 is the sum itself."""
    sizes = [3, 0, 29, 9]
    q = torch.randint(-128, 128, (41, 515), dtype=torch.int8)
    values = torch.randint(-128, 128, (4, 37, 515), dtype=torch.int8)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    args = (q, torch.ones(41), values, torch.ones(4, 37, 1), offsets, None, None)
    expert = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    want = torch.einsum("rk,rnk->rn", q.long(), values[expert].long())
    assert want.abs().max() < 2**24
    for level in at_levels(row):
        with testing.cpu_level(level):
            assert torch.equal(call(args, impl=row).long(), want)


@pytest.mark.parametrize("row", ROWS)
def test_extreme_integers_do_not_saturate(row):
    for k in (64, 4100, *([MOST_COLUMNS] if row == "native" else [])):
        for a, b in ((127, 127), (127, -127), (-127, 127)):
            q = torch.full((10, k), a, dtype=torch.int8)
            values = torch.full((2, 4, k), b, dtype=torch.int8)
            offsets = torch.tensor([0, 1, 10])
            args = (q, torch.ones(10), values, torch.ones(2, 4, 1), offsets, None, None)
            for level in at_levels(row):
                with testing.cpu_level(level):
                    assert (call(args, impl=row) == float(a * b * k)).all(), (level, k, a, b)


def test_threads_change_no_bit():
    """However uneven experts are: one with all rows, many with few, all sizes at once."""
    before = torch.get_num_threads()
    for sizes in ([1500], [0, 700, 0, 3], [1] * 40, [5, 900, 0, 64, 8, 9, 300]):
        for k, n in ((300, 40), (64, 512)):
            args, results = make(sizes, 2, k, n, 1, given=50), []
            try:
                for threads in (1, 2, 3, 5):
                    torch.set_num_threads(threads)
                    results.append(call(args, "swiglu", impl="native")[: sum(sizes)])
            finally:
                torch.set_num_threads(before)
            assert all(torch.equal(got, results[0]) for got in results[1:])


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_a_row_does_not_depend_on_those_beside_it(level):
    q, s, values, scale, _, bias, _ = make([77], 0, 384, 66, 3)
    with testing.cpu_level(level):
        whole = call((q, s, values, scale, torch.tensor([0, 77]), bias, None), "geglu")
        for rows in (*range(1, 16), 29):
            ends = torch.tensor([0, rows])
            got = call((q[:rows], s[:rows], values, scale, ends, bias, None), "geglu")
            assert torch.equal(got, whole[:rows]), rows


@pytest.mark.parametrize("row", ROWS)
def test_order_of_rows_and_names_of_experts_do_not_matter(row):
    q, s, values, scale, offsets, bias, _ = make([9, 4, 12], 0, 33, 20, 3)
    got = call((q, s, values, scale, offsets, bias, None), "swishglu", impl=row)
    order = torch.cat([torch.randperm(9), 9 + torch.randperm(4), 13 + torch.randperm(12)])
    turned = call((q, s, values, scale, offsets, bias, order), "swishglu", impl=row)
    torch.testing.assert_close(turned, got[order], rtol=1e-6, atol=1e-6)
    names, index = [2, 0, 1], torch.cat([torch.arange(13, 25), torch.arange(13)])
    ends = torch.tensor([0, 12, 21, 25])
    turned = call((q, s, values[names], scale[names], ends, bias[names], index), "swishglu",
                  impl=row)  # fmt: skip
    torch.testing.assert_close(turned, got[index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_nan_tokens_and_zero_tokens(row, dtype):
    for sizes in ([4, 0, 5], [30, 12, 0]):
        rows = sum(sizes)
        weight = quantize_experts(torch.randn(3, 22, 40), group=8)
        data, bias = torch.randn(rows, 40).to(dtype), torch.randn(3, 22).to(dtype)
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        clean = grouped_quant_linear(data, weight, offsets, bias=bias, impl=row)
        data[1, 7], data[2, 39], data[3] = torch.nan, -torch.inf, 0
        for activation in ACTIVATIONS if row != "triton" else ("geglu",):
            got = grouped_quant_linear(
                data, weight, offsets, bias=bias, activation=activation, impl=row
            )
            assert got[1:3].isnan().all() and got.isnan().sum() == 2 * got.shape[1]
        got = grouped_quant_linear(data, weight, offsets, bias=bias, impl=row)
        assert torch.equal(got[3], bias[0])
        kept = [0, *range(4, rows)]
        assert torch.equal(got[kept], clean[kept])


@pytest.mark.parametrize("row", ROWS)
def test_rows_past_the_last_expert_reach_nothing(row):
    q, s, *rest = make([5, 0, 9], 6, 20, 16, 1)
    want = call((q, s, *rest), "silu", impl=row)[:14]
    s[14:] = torch.nan
    assert torch.equal(call((q, s, *rest), "silu", impl=row)[:14], want)


@pytest.mark.parametrize("row", ROWS)
def test_four_bits(row):
    w = torch.randn(3, 34, 64)
    x, offsets = torch.randn(33, 64), torch.tensor([0, 3, 3, 33])
    for group in (None, 16):
        four = quantize_experts(w, bits=4, group=group)
        wide = dequantize_experts(four)
        for e in range(3):
            one = quantize_weight(w[e], bits=4, group=group)
            assert torch.equal(wide[e], dequantize_weight(one))
            assert torch.equal(four.values[e], one.values)
        got = grouped_quant_linear(x, four, offsets, activation="gelu", impl=row)
        eight = quantize_experts(wide, group=group)
        want = grouped_quant_linear(x, eight, offsets, activation="gelu", impl=row)
        assert (got - want).norm() < 2e-2 * want.norm()
        assert four.shape == (3, 34, 64) and four.values.shape == (3, 34, 32)


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64])
def test_floats_are_quantised_here(dtype):
    x, w, smooth = torch.randn(9, 33).to(dtype), torch.randn(2, 18, 33), torch.rand(33) + 0.5
    bias, index = torch.randn(2, 18).to(dtype), torch.randint(9, (14,))
    offsets = torch.tensor([0, 5, 14])
    plain, scaled = quantize_experts(w), quantize_experts(w, smooth=smooth)
    how = dict(bias=bias, index=index, activation="geglu")
    got = grouped_quant_linear(x, plain, offsets, **how)
    assert got.dtype == dtype and got.shape == (14, 9)
    assert torch.equal(got, grouped_quant_linear(quantize(x), plain, offsets, **how))
    got = grouped_quant_linear(x, scaled, offsets, smooth=smooth, **how)
    tokens = quantize(x, smooth=smooth)
    assert torch.equal(got, grouped_quant_linear(tokens, scaled, offsets, **how))
    if dtype == torch.float64:
        why = fastdiff.explain(grouped_quant_linear, x, plain, offsets, index=index)
        assert "float64" in why["native"]


def test_error_of_quantisation():
    """Normal numbers: below 1.5e-2 of the product in floats."""
    x, w = torch.randn(200, 384), torch.randn(4, 256, 384) / 384**0.5
    offsets = torch.tensor([0, 90, 90, 93, 200])
    exact = fastdiff.ops.grouped_linear(x.double(), w.double(), offsets)
    got = grouped_quant_linear(x, quantize_experts(w), offsets)
    assert (got - exact).norm() < 1.5e-2 * exact.norm()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_levels_and_layouts(level, layout):
    for sizes in ([3, 0, 5], [20, 0, 45]):
        args = make(sizes, 0, 77, 34, 7, given=11)
        want = composed(args, "swiglu", torch.float64)
        eager = composed(args, "swiglu", torch.float32)
        laid = [testing.lay(t, layout) for t in args]
        with testing.cpu_level(level):  # the entry takes what the public function refuses
            got = torch.ops.fastdiff.grouped_quant_linear(*laid, "swiglu", torch.float32)
        testing.assert_close(got, want, eager)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import grouped_quant_linear as kernel

    for (k, groups), activation in (((256, 2), None), ((96, 3), "swiglu"), ((77, 1), "geglu")):
        args = make([70, 0, 1, 20], 3, k, 132, groups, given=30)
        exact = composed(args, activation, torch.float64)
        eager = composed(args, activation, torch.float32)
        given = (*args, activation, torch.float32)
        launch = kernel.grouped_quant_linear
        for name, got in testing.run_configs(launch, kernel.CONFIGS, *given):
            testing.assert_close(got[:91], exact, eager, what=name)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_triton_touches_nothing_outside():
    """The interpreter raises for an access outside of the arguments, whatever values say."""
    from fastdiff.kernels import grouped_quant_linear as kernel

    *args, index = make([4, 5], 0, 12, 8, 2, given=6)
    index[[1, 5, 7]] = torch.tensor([6, -1, 2**62])
    kept = [0, 2, 3, 4, 6, 8]
    good = index.where(index.abs() < 6, 0).abs()
    want = grouped_quant_linear_ref(*args, good, None, torch.float32)
    got = kernel.grouped_quant_linear(*args, index, None, torch.float32)
    torch.testing.assert_close(got[kept], want[kept])
    for bad in ([0, 4, 2**40], [0, -5, 9], [-(2**40), 4, 9], [9, 4, 0], [7, 2, 9]):
        for i in (index, good):
            given = (*args[:4], torch.tensor(bad), args[5], i)
            kernel.grouped_quant_linear(*given, "silu", torch.float32)


@pytest.mark.parametrize("row", ["native", "ref"])
def test_values_out_of_range(row):
    *args, index = make([4, 5], 0, 12, 8, 2, given=6)
    for bad in (6, -1, 2**62):
        spoilt = index.clone()
        spoilt[3] = bad
        message = f"grouped_quant_linear: index has value {bad}, need 0 to 5"
        with pytest.raises(ValueError, match=message):
            call((*args, spoilt), impl=row)
    for bad, at in (([0, 4, 10], 2), ([0, -1, 9], 1), ([1, 4, 9], 0), ([0, 5, 4], 2)):
        message = f"offsets has value {bad[at]} at {at}, need ascending values from 0 to at most 9"
        with pytest.raises(ValueError, match=f"grouped_quant_linear: {message}"):
            call((*args[:4], torch.tensor(bad), args[5], index), impl=row)


@pytest.mark.parametrize("row", ["native", "ref"])
def test_compile(row):
    args = make([4, 5], 0, 12, 8, 2, given=6)
    for activation in (None, "geglu"):
        testing.check_compile(
            lambda *a, act=activation: call(a, act, impl=row), *args
        )  # fmt: skip


@pytest.mark.skipif(not fastdiff.cpu_levels(), reason="the extension is not built here")
def test_opcheck():
    op = torch.ops.fastdiff.grouped_quant_linear.default
    args = make([4, 5], 0, 12, 8, 2, given=6)
    torch.library.opcheck(op, (*args, "swiglu", torch.bfloat16)[:5] + (None, args[6], "swiglu",
                                                                      torch.bfloat16))  # fmt: skip
    torch.library.opcheck(op, (*make([4, 5], 0, 12, 8, 2)[:6], None, None, torch.float32))


def test_gradients_are_refused():
    w, offsets = quantize_experts(torch.randn(2, 4, 8)), torch.tensor([0, 1, 3])
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(fastdiff.NoImpl, match="quantize"):
        grouped_quant_linear(x, w, offsets)


X, W, O = torch.ones(6, 4), quantize_experts(torch.ones(2, 8, 4)), torch.tensor([0, 3, 6])


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(x=[1]), "x is list, need a tensor, or Quantized"),
        (dict(x=X[None]), r"x is torch.int8 \[1, 6, 4\]"),
        (dict(x=X[:, :3]), r"weight is \[2, 8, 4\], need \[E, N, 3\]"),
        (dict(x=quantize(X), smooth=torch.ones(4)), "quantised already"),
        (dict(weight=torch.ones(2, 8, 4)), "weight is Tensor, need an ExpertWeight"),
        (dict(weight=W._replace(values=W.values[0])), r"weight.values is torch.int8 \[8, 4\]"),
        (dict(weight=W._replace(scale=W.scale[:1])), "need .E, N, .. of the same experts"),
        (dict(weight=W._replace(scale=torch.ones(2, 8, 3))), "G a divisor of K 4"),
        (dict(weight=W._replace(bits=4)), "need torch.uint8"),
        (dict(weight=W._replace(values=W.values.mT.contiguous().mT)), "need contiguous"),
        (dict(weight=W._replace(values=W.values.float())), "torch.float32, need torch.int8"),
        (dict(offsets=O[:2]), r"offsets has shape \[2\], need \[3\]"),
        (dict(offsets=O.int()), "offsets is torch.int32"),
        (dict(bias=torch.ones(2, 7)), r"bias has shape \[2, 7\], need \[2, 8\]"),
        (dict(bias=torch.ones(2, 8).half()), "bias is torch.float16, need torch.float32"),
        (dict(index=torch.ones(6)), "index is torch.float32, need torch.int64"),
        (dict(index=torch.ones(6, 1).long()), r"index has shape \[6, 1\]"),
        (dict(activation="tanh"), "activation is 'tanh', need one of None"),
        (
            dict(weight=quantize_experts(torch.ones(2, 7, 4)), activation="geglu"),
            "need an even number of rows for geglu",
        ),
    ],
    ids=str,
)
def test_bad_input(given, words):
    with pytest.raises(ValueError, match=f"grouped_quant_linear: .*{words}"):
        grouped_quant_linear(**{**dict(x=X, weight=W, offsets=O), **given})
    for bad, words in (
        (dict(weight=torch.ones(2, 4)), "weight has shape"),
        (dict(weight=torch.ones(2, 4, 4), bits=3), "bits is 3"),
        (dict(weight=torch.ones(2, 4, 4), group=3), "group is 3"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize_experts(**bad)
