import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import ops, testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import grouped_linear, grouped_weight_grad
from fastdiff.ops.grouped_linear import (
    ACTIVATIONS,
    GATED,
    GRAD_IMPLS,
    IMPLS,
    activate,
    grouped_linear_ref,
    grouped_weight_grad_ref,
)

FUSED = (None, "gelu_tanh", "silu")  # of ops.linear
LAYERS = [row for row in testing.rows_of(IMPLS) if row not in ("single", "torch")]
GRADS = testing.rows_of(GRAD_IMPLS)
# (rows of every group, rows past the last group)
GROUPS = [
    ([0], 0),
    ([1], 0),
    ([65], 0),
    ([77], 0),
    ([0, 0, 0], 0),
    ([1, 0], 2),
    ([3, 0, 4, 0], 0),
    ([0, 0, 37], 0),
    ([64, 65], 3),
    ([1] * 13, 0),
]
DIMS = [(1, 2), (33, 34), (77, 130)]  # (K, N)


def offsets_of(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


def make(sizes, past, k, n, dtype=torch.float32, given=None):
    """x, weight, offsets, bias, index; ``given``: rows of x, None for one a row and no index.

    Few rows are of values whose sums are exact: the largest error of a few numbers is luck, in
    eager torch as well.
    """
    rows = sum(sizes) + past

    def draw(*shape):
        return torch.randint(-4, 5, shape) / 4 if rows < 8 else torch.randn(shape)

    index = None if given is None else torch.randint(given, (rows,))
    x = draw(rows if given is None else given, k)
    weight = draw(len(sizes), n, k) / (8 if rows < 8 else k**0.5)
    bias = draw(len(sizes), n)
    return x.to(dtype), weight.to(dtype), offsets_of(sizes), bias.to(dtype), index


def doubled(args):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args]


def eager(x, weight, offsets, bias, index, activation):
    """Plain torch, group by group, each step rounded to the dtype of x."""
    rows = x if index is None else x[index]
    ends = offsets.tolist()
    parts = [
        F.linear(rows[a:b], weight[e], None if bias is None else bias[e])
        for e, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True))
    ]
    return activate(torch.cat(parts), activation)


def fn_of(row, rows=IMPLS):
    return next(r.fn for r in rows if r.name == row)


def check(got, args, what=""):
    last = int(args[2][-1])
    rows = (args[0] if args[4] is None else args[4]).shape[0]
    width = args[1].shape[1] // (2 if args[5] in GATED else 1)
    assert got.shape == (rows, width) and got.dtype == args[0].dtype and got.is_contiguous()
    exact = grouped_linear_ref(*doubled(args))[:last]
    testing.assert_close(got[:last], exact, eager(*args)[:last], what=what)


def taken(row, sizes, dtype):
    """What a row is made for; torch's refuses a CPU, on which its product runs in bfloat16."""
    return (row != "single" or len(sizes) == 1) and (row != "torch" or dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_matches_float64(row, dtype):
    for i, (sizes, past) in enumerate(GROUPS):
        if not taken(row, sizes, dtype) or (row == "torch" and not sum(sizes)):
            continue
        k, n = DIMS[i % 3] if row != "torch" else (32, 64)
        args = make(sizes, past, k, n, dtype, given=5 if i % 2 else None)
        for bias, activation in ((None, None), (args[3], "swiglu")):
            full = (*args[:3], bias, args[4], activation)
            with testing.unchanged(*full[:5]):
                got = fn_of(row)(*full)
            check(got, full, f"{row} {sizes} {k} {n} {activation}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_activations(row, activation):
    for dtype in testing.DTYPES:
        sizes = [19] if row == "single" else [9, 0, 20]
        if not taken(row, sizes, dtype):
            continue
        for given in (None, 7):
            args = make(sizes, 0, 40, 48, dtype, given)
            for bias in (None, args[3]):
                full = (*args[:3], bias, args[4], activation)
                check(fn_of(row)(*full), full, f"{row} {dtype} {given}")


@pytest.mark.parametrize("row", LAYERS)
def test_sizes_around_tiles_and_widths_of_models(row):
    for sizes, dtype in (
        ([16, 17], torch.float32),
        ([64, 65, 63], torch.float32),
        ([128, 0, 129], torch.bfloat16),
        ([300, 1, 0, 2], torch.float16),
    ):
        full = (*make(sizes, 1, 72, 66, dtype, given=11), "geglu")
        check(fn_of(row)(*full), full, f"{row} {sizes}")
    full = (*make([3, 7], 0, 1152, 128, torch.bfloat16), "gelu_tanh")
    check(fn_of(row)(*full), full, row)


@pytest.mark.parametrize("experts", [1, 2, 3, 16, 100, 256])
@pytest.mark.parametrize("row", LAYERS)
def test_number_of_experts(row, experts):
    """All rows of one expert, the first or last, and rows spread over all."""
    spread = torch.randint(experts, (30,)).bincount(minlength=experts).tolist()
    for sizes in (spread, [21] + [0] * (experts - 1), [0] * (experts - 1) + [21]):
        full = (*make(sizes, 0, 9, 12), "silu")
        check(fn_of(row)(*full), full, f"{row} {experts}")
        if sizes[0] == 21 and experts > 16 and row == "triton":
            continue  # a program for every expert, and the interpreter is slow
        full = (torch.randn(sum(sizes), 12), full[0], full[2], None)
        check_grad(fn_of(row, GRAD_IMPLS)(*full), full)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_layouts(row, layout):
    for dtype in testing.DTYPES:
        sizes = [23] if row == "single" else [11, 12]
        if not taken(row, sizes, dtype) or (row == "torch" and layout != "contiguous"):
            continue  # torch's product wants strides of 16 bytes
        args = make(sizes, 0, 40, 48, dtype, given=9)
        laid = [testing.lay(t, layout) for t in args]
        wide = args[1].new_full((*args[1].shape[:2], 2 * 40), torch.nan)
        strided = wide[..., ::2].copy_(args[1])  # no stride of 1
        for weight in (laid[1], args[1].mT.contiguous().mT, strided)[: 2 if row == "torch" else 3]:
            full = (laid[0], weight, *laid[2:], "gelu")
            with testing.unchanged(*full[:5]):
                check(fn_of(row)(*full), (*args, "gelu"), f"{row} {layout}")


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels(level, dtype):
    with testing.cpu_level(level):
        for sizes, past in GROUPS:
            for k, n in DIMS:
                for activation in ACTIVATIONS:
                    full = (*make(sizes, past, k, n, dtype, given=7), activation)
                    check(fn_of("native")(*full), full, f"{level} {sizes} {activation}")
                    turned = (full[0], full[1].mT.contiguous().mT, *full[2:])
                    check(fn_of("native")(*turned), full, f"{level} {sizes} {activation}")
                full = gradient(sizes, past, k, n, dtype)
                check_grad(fn_of("native", GRAD_IMPLS)(*full), full, level)


@pytest.mark.parametrize("row", LAYERS)
def test_rows_past_the_last_group_reach_nothing(row):
    x, weight, offsets, bias, _ = make([5, 0, 9], 6, 20, 16)
    x[14:] = torch.nan
    check(fn_of(row)(x, weight, offsets, bias, None, "silu"),
          (x, weight, offsets, bias, None, "silu"))  # fmt: skip
    grad = torch.randn(20, 16)
    grad[14:] = torch.nan
    got = fn_of(row, GRAD_IMPLS)(grad, x, offsets, None)
    want = grouped_weight_grad_ref(grad[:14].double(), x[:14].double(), offsets, None)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", LAYERS)
def test_nan_and_infinity_reach_their_rows_only(row):
    x, weight, offsets, bias, _ = make([4, 5], 0, 20, 16)
    plain = grouped_linear(x, weight, offsets, bias=bias, activation="gelu", impl=row)
    x[2, 3], x[6, 0] = torch.nan, torch.inf
    got = grouped_linear(x, weight, offsets, bias=bias, activation="gelu", impl=row)
    assert got[2].isnan().all() and not got[6].isfinite().all()
    kept = [0, 1, 3, 4, 5, 7, 8]
    torch.testing.assert_close(got[kept], plain[kept])


def test_one_expert_is_the_plain_layer_to_the_bit():
    for dtype in testing.DTYPES:
        x, weight, offsets, bias, index = make([33], 0, 40, 24, dtype, given=9)
        for activation in ACTIVATIONS:
            fused = activation if activation in FUSED else None
            with fastdiff.use(), fastdiff.record() as ran:
                got = grouped_linear(
                    x, weight, offsets, bias=bias, index=index, activation=activation
                )
                want = ops.linear(x[index], weight[0], bias[0], activation=fused)
            want = want if fused == activation else activate(want, activation)
            assert torch.equal(got, want) and ran["grouped_linear", "single"] == 1
    why = fastdiff.explain(grouped_linear, *make([1, 2], 0, 4, 4)[:3])
    assert "of 2 experts; this row is for one" in why["single"]
    assert "on a GPU" in why["torch"] and why["ref"] is None


@pytest.mark.parametrize("row", LAYERS)
def test_order_of_rows_and_names_of_experts_do_not_matter(row):
    x, weight, offsets, bias, _ = make([9, 4, 12], 0, 33, 20)
    got = grouped_linear(x, weight, offsets, bias=bias, activation="swishglu", impl=row)
    order = torch.cat([torch.randperm(9), 9 + torch.randperm(4), 13 + torch.randperm(12)])
    turned = grouped_linear(
        x, weight, offsets, bias=bias, index=order, activation="swishglu", impl=row
    )
    torch.testing.assert_close(turned, got[order], rtol=1e-6, atol=1e-6)
    names = [2, 0, 1]
    index = torch.cat([torch.arange(13, 25), torch.arange(13)])
    turned = grouped_linear(
        x, weight[names], offsets_of([12, 9, 4]), bias=bias[names], index=index,
        activation="swishglu", impl=row,
    )  # fmt: skip
    torch.testing.assert_close(turned, got[index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", LAYERS)
def test_twice_the_same_bits(row):
    for dtype in testing.DTYPES:
        full = (*make([9, 0, 30], 0, 77, 34, dtype, given=8), "geglu")
        assert torch.equal(fn_of(row)(*full), fn_of(row)(*full))
        full = gradient([9, 0, 30], 0, 77, 34, dtype)
        one, two = (fn_of(row, GRAD_IMPLS)(*full) for _ in range(2))
        assert torch.equal(one, two)


# ---- the gradient of the weight ------------------------------------------------------------------


def gradient(sizes, past, k, n, dtype=torch.float32, given=5):
    x, _, offsets, _, index = make(sizes, past, k, n, dtype, given)
    return torch.randn(sum(sizes) + past, n).to(dtype), x, offsets, index


def check_grad(got, args, what=""):
    grad, x, offsets, index = args
    rows, ends = x if index is None else x[index], offsets.tolist()
    plain = [grad[a:b].T @ rows[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    exact = grouped_weight_grad_ref(*doubled(args))
    assert got.dtype == x.dtype and got.is_contiguous()
    testing.assert_close(got, exact, torch.stack(plain), what=what)
    empty = offsets.diff() == 0
    assert got[empty].eq(0).all()


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", GRADS)
def test_weight_gradient_matches_float64(row, dtype):
    for i, (sizes, past) in enumerate(GROUPS):
        k, n = DIMS[i % 3]
        full = gradient(sizes, past, k, n, dtype, given=5 if i % 2 else None)
        with testing.unchanged(*full):
            got = grouped_weight_grad(*full[:3], index=full[3], impl=row)
        check_grad(got, full, f"{row} {sizes} {k} {n}")


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("row", GRADS)
def test_weight_gradient_layouts(row, layout):
    for dtype in testing.DTYPES:
        full = gradient([11, 12], 0, 40, 48, dtype)
        laid = [testing.lay(t, layout) for t in full]
        with testing.unchanged(*laid):
            check_grad(grouped_weight_grad(*laid[:3], index=laid[3], impl=row), full, layout)
    grad = torch.ones(()).expand(23, 48)  # as .sum() gives it
    got = grouped_weight_grad(grad, *[t.float() for t in full[1:2]], full[2], index=full[3])
    check_grad(got, (grad, full[1].float(), *full[2:]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation):
    x, weight, offsets, bias, index = make([3, 0, 4], 2, 5, 6, torch.float64, given=4)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def call(x, weight, bias):
        out = grouped_linear(
            x, weight, offsets, bias=bias, index=index, activation=activation, impl="ref"
        )
        return out[:7]

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ["single", *LAYERS])
def test_gradients_match_float64(row, dtype):
    sizes = [13] if row == "single" else [6, 0, 8]
    for activation in ACTIVATIONS:
        for given in (None, 5):
            x, weight, offsets, bias, index = make(sizes, 0, 12, 10, dtype, given)
            towards = torch.randn(sum(sizes), 5 if activation in GATED else 10)
            found = []
            for wanted, impl in ((dtype, row), (torch.float64, "ref")):
                leaves = [t.detach().to(wanted).requires_grad_() for t in (x, weight, bias)]
                out = grouped_linear(
                    leaves[0], leaves[1], offsets, bias=leaves[2], index=index,
                    activation=activation, impl=impl,
                )  # fmt: skip
                out.backward(towards.to(wanted))
                found.append([t.grad.double() for t in leaves])
            for got, want in zip(*found, strict=True):
                error = (got - want).norm() / want.norm()
                assert error < 16 * testing.ROUNDOFF[dtype], (activation, given, error)


def test_rows_without_a_backward_say_so():
    x, weight, offsets, _, _ = make([2, 3], 0, 4, 4)
    why = fastdiff.explain(grouped_linear, x, weight.requires_grad_(), offsets)
    assert all("no backward" in why[name] for name in ("native", "triton")) and why["ref"] is None
    assert "no backward" in fastdiff.explain(grouped_linear, x, weight[:1], offsets[:2])["single"]


# ---- the entries ---------------------------------------------------------------------------------


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import grouped_linear as kernel

    for activation in (None, "swiglu"):
        full = (*make([70, 0, 1, 20], 3, 70, 132, given=30), activation)
        for name, got in testing.run_configs(kernel.grouped_linear, kernel.CONFIGS, *full):
            check(got, full, name)
    full = gradient([70, 0, 1, 20], 3, 70, 132)
    for name, got in testing.run_configs(kernel.grouped_weight_grad, kernel.CONFIGS, *full):
        check_grad(got, full, name)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_triton_touches_nothing_outside():
    """The interpreter raises for an access outside of the arguments, whatever values say."""
    from fastdiff.kernels import grouped_linear as kernel

    x, weight, offsets, bias, index = make([4, 5], 0, 12, 8, given=6)
    grad = torch.randn(9, 8)
    index[[1, 5, 7]] = torch.tensor([6, -1, 2**62])
    kept = [0, 2, 3, 4, 6, 8]
    want = grouped_linear_ref(x, weight, offsets, bias, index.where(index.abs() < 6, 0).abs(), None)
    got = kernel.grouped_linear(x, weight, offsets, bias, index, None)
    torch.testing.assert_close(got[kept], want[kept])
    kernel.grouped_weight_grad(grad, x, offsets, index)
    for bad in ([0, 4, 2**40], [0, -5, 9], [-(2**40), 4, 9], [9, 4, 0], [7, 2, 9]):
        for i in (index, index.clamp(0, 5)):
            kernel.grouped_linear(x, weight, torch.tensor(bad), bias, i, "silu")
            kernel.grouped_weight_grad(grad, x, torch.tensor(bad), i)


@pytest.mark.parametrize("row", ["native", "ref"])
def test_values_out_of_range(row):
    x, weight, offsets, bias, index = make([4, 5], 0, 12, 8, given=6)
    grad = torch.randn(9, 8)
    for bad in (6, -1, 2**62):
        spoilt = index.clone()
        spoilt[3] = bad
        message = f"index has value {bad}, need 0 to 5"
        with pytest.raises(ValueError, match=f"grouped_linear: {message}"):
            grouped_linear(x, weight, offsets, index=spoilt, impl=row)
        with pytest.raises(ValueError, match=f"grouped_weight_grad: {message}"):
            grouped_weight_grad(grad, x, offsets, index=spoilt, impl=row)
    for bad, at in (([0, 4, 10], 2), ([0, -1, 9], 1), ([1, 4, 9], 0), ([0, 5, 4], 2)):
        message = f"offsets has value {bad[at]} at {at}, need ascending values from 0 to at most 9"
        with pytest.raises(ValueError, match=f"grouped_linear: {message}"):
            grouped_linear(x, weight, torch.tensor(bad), index=index, impl=row)
        with pytest.raises(ValueError, match=f"grouped_weight_grad: {message}"):
            grouped_weight_grad(grad, x, torch.tensor(bad), index=index, impl=row)


@pytest.mark.parametrize("row", ["native", "ref"])
def test_compile(row):
    x, weight, offsets, bias, index = make([4, 5], 0, 12, 8, given=6)
    for activation in (None, "geglu"):
        testing.check_compile(
            lambda x, w, o, b, i, a=activation: grouped_linear(
                x, w, o, bias=b, index=i, activation=a, impl=row
            ),
            x, weight, offsets, bias, index,
        )  # fmt: skip
    testing.check_compile(
        lambda *a: grouped_weight_grad(*a, index=index, impl=row), torch.randn(9, 8), x, offsets
    )


@pytest.mark.skipif(not fastdiff.cpu_levels(), reason="the extension is not built here")
def test_opcheck():
    x, weight, offsets, bias, index = make([4, 5], 0, 12, 8, given=6)
    op = torch.ops.fastdiff.grouped_linear.default
    torch.library.opcheck(op, (x, weight, offsets, bias, index, "swiglu"))
    torch.library.opcheck(op, (x[index], weight.mT.contiguous().mT, offsets, None, None, None))
    op = torch.ops.fastdiff.grouped_weight_grad.default
    torch.library.opcheck(op, (torch.randn(9, 8), x, offsets, index))
    torch.library.opcheck(op, (torch.randn(9, 8), x[index], offsets, None))


X, W, O = torch.ones(6, 4), torch.ones(2, 8, 4), torch.tensor([0, 3, 6])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(x="no"), "x is str, need a torch.Tensor"),
        (dict(x=X[0]), r"x has shape \[4\], need 2 dimensions"),
        (dict(x=X.int()), "x is torch.int32, need float16"),
        (dict(weight=W.half()), "weight is torch.float16, need torch.float32"),
        (dict(weight=W[0]), r"weight has shape \[8, 4\], need 3 dimensions"),
        (dict(weight=W[:0]), r"weight has shape \[0, 8, 4\], need at least one expert"),
        (dict(weight=W[..., :3]), r"weight has shape \[2, 8, 3\], need \[2, 8, 4\]"),
        (dict(offsets=O.int()), "offsets is torch.int32, need torch.int64"),
        (dict(offsets=O[:2]), r"offsets has shape \[2\], need \[3\]"),
        (dict(offsets=O[None]), r"offsets has shape \[1, 3\], need \[groups \+ 1\]"),
        (dict(offsets=[0, 3, 6]), "offsets is list, need a torch.Tensor"),
        (dict(bias=torch.ones(2, 4)), r"bias has shape \[2, 4\], need \[2, 8\]"),
        (dict(bias=torch.ones(2, 8).half()), "bias is torch.float16, need torch.float32"),
        (dict(index=O.int()), "index is torch.int32, need torch.int64"),
        (dict(index=O[None]), r"index has shape \[1, 3\], need \[rows\]"),
        (dict(activation="relu"), "activation is 'relu', need one of None, 'gelu'"),
        (dict(weight=W[:, :7], activation="geglu"), r"weight has shape \[2, 7, 4\], need an even"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=f"grouped_linear: {message}"):
        grouped_linear(**{"x": X, "weight": W, "offsets": O, **call})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(grad="no"), "grad is str, need a torch.Tensor"),
        (dict(grad=X.half()), "grad is torch.float16, need torch.float32"),
        (dict(grad=X[0]), r"grad has shape \[4\], need 2 dimensions"),
        (dict(grad=X[:5]), r"grad has shape \[5, 4\], need \[6, 4\]"),
        (dict(x=X[0]), r"x has shape \[4\], need 2 dimensions"),
        (dict(offsets=O.int()), "offsets is torch.int32, need torch.int64"),
        (dict(offsets=O[:1]), r"offsets has shape \[1\], need \[groups \+ 1\]"),
        (dict(index=O), r"grad has shape \[6, 4\], need \[3, 4\]"),
        (dict(index=O.float()), "index is torch.float32, need torch.int64"),
        (dict(index=O.view(3, 1)), r"index has shape \[3, 1\], need \[rows\]"),
    ],
)
def test_bad_input_of_the_gradient(call, message):
    with pytest.raises(ValueError, match=f"grouped_weight_grad: {message}"):
        grouped_weight_grad(**{"grad": X, "x": X, "offsets": O, **call})
