import sys

import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.ops.linear import ACTIVATIONS, IMPLS, linear, linear_ref

# Rows below and above the size from which oneDNN gains; batches of rows; one row.
SHAPES = [((r,), 33, 17) for r in testing.ROWS] + [
    ((2, 77), 96, 257),
    ((3, 1, 65), 64, 1152),
    ((), 33, 17),
    ((4, 64), 1, 1),
]
LARGE = (128, 192, 768)  # large enough for every row


def make(batch, k, n, dtype):
    x, weight = torch.randn(*batch, k), torch.randn(n, k) / k**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(n).to(dtype)


def exact(x, weight, bias, activation):
    b = None if bias is None else bias.double()
    return linear_ref(x.double(), weight.double(), b, activation)


def eager(x, weight, bias, activation):
    """The steps of plain torch, each rounded to the dtype of x."""
    y = F.linear(x, weight, bias)
    if activation is None:
        return y
    return F.silu(y) if activation == "silu" else F.gelu(y, approximate="tanh")


def cannot(row, dtype):
    """Row "onednn" has no float16, and bfloat16 on some processors alone."""
    own = sys.modules["fastdiff.ops.linear"]  # the name is that of the function too
    lacks = dtype == torch.bfloat16 and not own._onednn_bfloat16()
    return row == "onednn" and (dtype == torch.float16 or lacks)


def fn_of(row):
    return next(r.fn for r in IMPLS if r.name == row)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_matches_float64(row, dtype):
    if cannot(row, dtype):
        pytest.skip(f"refuses {dtype} here")
    for batch, k, n in [*SHAPES, ((LARGE[0],), *LARGE[1:])]:
        x, weight, bias = make(batch, k, n, dtype)
        if row in ("few_rows", "onednn", "upcast") and not x.numel():
            continue
        for activation in ACTIVATIONS:
            for b in (bias, None):
                with torch.no_grad(), testing.unchanged(x, weight, b):
                    got = fn_of(row)(x, weight, b, activation)
                    want = eager(x, weight, b, activation)
                what = f"{row} {batch} {k} {n} {activation}"
                testing.assert_close(got, exact(x, weight, b, activation), want, what=what)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_few_rows(level, dtype):
    """At every level; a row's result does not depend on the rows beside it."""
    with testing.cpu_level(level):
        for k, n in ((1, 1), (17, 3), (256, 64), (384, 37), (1152, 6)):
            x, weight, bias = make((9,), k, n, dtype)
            for activation in ACTIVATIONS:
                want = exact(x, weight, bias, activation)
                plain = eager(x, weight, bias, activation)
                whole = fn_of("few_rows")(x, weight, bias, activation)
                testing.assert_close(whole, want, plain, what=f"{level} {k} {n} {activation}")
                for rows in range(1, 9):
                    got = fn_of("few_rows")(x[:rows], weight, bias, activation)
                    assert torch.equal(got, whole[:rows]), (rows, k, n, activation)


def test_few_rows_of_a_slice_of_a_larger_weight():
    x, weight, bias = make((2,), 40, 33, torch.float32)
    wide = torch.full((33, 50), torch.nan)
    wide[:, 3:43] = weight
    got = linear(x, wide[:, 3:43], bias, impl="few_rows")
    assert torch.equal(got, linear(x, weight, bias, impl="few_rows"))
    got = linear(x, weight.t().contiguous().t(), bias, impl="few_rows")
    assert torch.equal(got, linear(x, weight, bias, impl="few_rows"))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_layouts(layout, dtype):
    x, weight, bias = make((128,), *LARGE[1:], dtype)
    args = [testing.lay(t, layout) for t in (x, weight, bias)]
    for row in testing.rows_of(IMPLS):
        if cannot(row, dtype):
            continue
        got = fn_of(row)(*args, "gelu_tanh")
        testing.assert_close(
            got, exact(*args, "gelu_tanh"), eager(*args, "gelu_tanh"), what=f"{row} {layout}"
        )


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_public_function_picks_a_row_that_is_right(dtype):
    for batch, k, n in [*SHAPES, ((LARGE[0],), *LARGE[1:])]:
        args = make(batch, k, n, dtype)
        got = linear(*args, activation="silu")
        assert got.shape == (*batch, n) and got.dtype == dtype
        testing.assert_close(got, exact(*args, "silu"), eager(*args, "silu"))


def test_nan_and_infinity_reach_their_rows_only():
    x, weight, bias = make((128,), *LARGE[1:], torch.float32)
    x[3, 0], x[4, 0] = torch.nan, torch.inf
    for activation in ACTIVATIONS:
        got, want = (
            linear(x, weight, bias, activation=activation),
            eager(x, weight, bias, activation),
        )
        torch.testing.assert_close(got.isfinite(), want.isfinite())
        torch.testing.assert_close(got[5:], want[5:], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_which_row_runs():
    few = make((2, 4), *LARGE[1:], torch.float32)
    assert fastdiff.explain(linear, *few)["few_rows"] is None
    assert "no backward" in fastdiff.explain(linear, few[0].requires_grad_(), few[1])["few_rows"]
    assert "has 9 rows" in fastdiff.explain(linear, *make((9,), 5, 4, torch.float32))["few_rows"]
    assert "is empty" in fastdiff.explain(linear, *make((0,), 9, 9, torch.float32))["few_rows"]
    large = make((128,), *LARGE[1:], torch.float32)
    assert fastdiff.explain(linear, *large)["onednn"] is None
    assert (
        "too small to gain" in fastdiff.explain(linear, *make((2,), 9, 9, torch.float32))["onednn"]
    )
    assert "is empty" in fastdiff.explain(linear, *make((0,), 9, 9, torch.float32))["onednn"]
    assert "no backward" in fastdiff.explain(linear, large[0].requires_grad_(), large[1])["onednn"]
    for dtype in (torch.float16, torch.bfloat16):
        why = fastdiff.explain(linear, *make((128,), *LARGE[1:], dtype))
        assert why["onednn"] is None or why["upcast"] is None or "here and through" in why["upcast"]
        assert why["onednn"] is not None or "here and through" in why["upcast"]
    with torch.backends.mkldnn.flags(enabled=False):
        assert "no oneDNN" in fastdiff.explain(linear, *large)["onednn"]
    assert "not float16" in fastdiff.explain(linear, *large)["upcast"]


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_compile(dtype):
    args = make((128,), *LARGE[1:], dtype)
    with torch.no_grad():
        got = torch.compile(linear, fullgraph=True)(*args, activation="gelu_tanh")
    testing.assert_close(got, exact(*args, "gelu_tanh"), eager(*args, "gelu_tanh"))


def test_opcheck():
    x, weight, bias = make((5,), 33, 17, torch.float32)
    for args in ((x, weight, bias, None), (x[None], weight, None, "silu")):
        torch.library.opcheck(torch.ops.fastdiff.linear.default, args)
        torch.library.opcheck(torch.ops.fastdiff.linear_few_rows.default, args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient(activation):
    args = [t.double().requires_grad_() for t in make((3, 2), 5, 4, torch.float32)]
    assert torch.autograd.gradcheck(lambda *a: linear(*a, activation=activation), args)
    args = make((128,), *LARGE[1:], torch.float16)
    leaves = [t.clone().requires_grad_() for t in args]
    linear(*leaves, activation=activation).sum().backward()
    wide = [t.double().requires_grad_() for t in args]
    linear(*wide, activation=activation).sum().backward()
    for leaf, want in zip(leaves, wide, strict=True):
        error = (leaf.grad.double() - want.grad).abs().max() / want.grad.abs().max()
        assert error < 2**-8, error


X, W = torch.ones(2, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (("no", W), {}, "linear: x is str, need a torch.Tensor"),
        ((X, torch.ones(3)), {}, r"weight has shape \[3\], need 2 dimensions"),
        ((X, torch.ones(4, 2)), {}, r"weight has shape \[4, 2\], need \[4, 3\]"),
        ((X, W.half()), {}, "weight is torch.float16, need torch.float32"),
        ((X, W, torch.ones(3)), {}, r"bias has shape \[3\], need \[4\]"),
        ((X, W), {"activation": "relu"}, "activation is 'relu', need None, 'gelu_tanh' or 'silu'"),
        ((torch.ones(()), W), {}, r"x has shape \[\], need at least 1 dimensions"),
    ],
)
def test_bad_input(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        linear(*args, **kwargs)


@pytest.mark.parametrize("apart", [False, True])
def test_gelu_within_onednns_product_or_after_it(monkeypatch, apart):
    """Which of the two runs is timed once per process: both are right."""
    own = sys.modules["fastdiff.ops.linear"]
    if apart and "native" not in testing.rows_of(sys.modules["fastdiff.ops.gelu_tanh"].IMPLS):
        pytest.skip("no extension")
    monkeypatch.setattr(own, "_gelu_apart", lambda: apart)
    for batch, k, n in [*SHAPES, ((LARGE[0],), *LARGE[1:])]:
        x, weight, bias = make(batch, k, n, torch.float32)
        if not x.numel():
            continue
        exact = eager(
            x.double(), weight.double(), None if bias is None else bias.double(), "gelu_tanh"
        )
        got = fn_of("onednn")(x, weight, bias, "gelu_tanh")
        testing.assert_close(got, exact, eager(x, weight, bias, "gelu_tanh"))
