import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import (
    SparseIndex,
    sparse_conv2d_weight_grad,
    sparse_grad_linear,
    sparse_weight_grad,
)
from fastdiff.ops.sparse_grad import CONV_IMPLS, IMPLS

ROWS, CONV_ROWS = testing.rows_of(IMPLS), testing.rows_of(CONV_IMPLS)
KERNELS = [row for row in ROWS if row not in ("dense", "rows")]
PRODUCTS = ("dense", "rows")  # torch's own, rounded to the dtype of x
# (T, O, I); tiles are of 64 and 128
SHAPES = [
    (0, 3, 5),
    (1, 1, 1),
    (7, 13, 17),
    (65, 64, 65),
    (77, 129, 130),
    (5, 24, 1152),
    (3, 1152, 8),
]
DENSITIES = (0.0, 0.05, 0.4, 1.0)
# (B, C, H, W, O, kernel, stride, padding, dilation)
PICTURES = [
    (0, 2, 5, 5, 3, (3, 3), 1, 1, 1),
    (1, 1, 1, 1, 1, (1, 1), 1, 0, 1),
    (2, 5, 9, 8, 7, (3, 3), 1, 1, 1),
    (2, 7, 9, 8, 67, (3, 3), 2, 1, 1),
    (1, 8, 13, 11, 5, (3, 3), (1, 2), (2, 0), (2, 3)),
    (3, 65, 5, 6, 9, (1, 1), 1, 0, 1),
    (1, 3, 7, 17, 4, (3, 2), (2, 1), (0, 1), 1),
    (1, 2, 4, 3, 6, (5, 4), 1, (3, 2), 1),
]


def mask_of(shape, density):
    mask = torch.rand(shape) < density
    if 0 < density < 1 and mask.shape[0] > 2:
        mask[1] = False  # a row without entries
        mask[-1] = True  # and one that is full
    return mask


def make(tokens, out, width, dtype=torch.float32):
    return torch.randn(tokens, out).to(dtype), torch.randn(tokens, width).to(dtype)


def near(got, index, exact, eager, what=""):
    """At most twice eager torch's largest error in the weight: that of few entries is luck."""
    want = index.take(exact)
    assert got.shape == want.shape == index.values_shape and got.is_contiguous()
    assert got.dtype == torch.float32
    bound = 4 * testing.ROUNDOFF[torch.float32] * exact.abs().max() if exact.numel() else 0.0
    bound = bound + 2 * (eager.double() - exact).abs().max() if exact.numel() else 0.0
    error = (got.double() - want).abs().max() if got.numel() else torch.zeros(())
    assert error <= bound, f"{what}: error {error:.3g} above {bound:.3g}"


def check(got, grad, x, index, row, what=""):
    exact = grad.double().t() @ x.double()
    plain = (grad, x) if row in PRODUCTS else (grad.float(), x.float())
    near(got, index, exact, plain[0].t() @ plain[1], f"{row} {what}")


def takes(op, row, *args, **kwargs):
    return fastdiff.explain(op, *args, **kwargs)[row] is None


def whole(*values):
    return torch.tensor(values, dtype=torch.int64)


# ---- linear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_matches_float64(row, dtype):
    ran = 0
    for shape in SHAPES:
        grad, x = make(*shape, dtype)
        for density in DENSITIES:
            index = SparseIndex.of_mask(mask_of(shape[1:], density))
            if row == "rows":
                some = torch.arange(shape[1])[torch.rand(shape[1]) < density]
                index = SparseIndex.of_rows(some, shape[1:])
            if not takes(sparse_weight_grad, row, grad, x, index):
                assert row == "dense" and density < 1
                continue
            with testing.unchanged(grad, x, index.crow, index.col):
                got = sparse_weight_grad(grad, x, index, impl=row)
            check(got, grad, x, index, row, f"{shape} {density}")
            ran += 1
    assert ran >= len(SHAPES)


@pytest.mark.parametrize("block", [(1, 2), (16, 16), (3, 1), (2, 8), (48, 1), (1, 96), (48, 96)])
@pytest.mark.parametrize("row", ROWS)
def test_blocks(row, block):
    for dtype in testing.DTYPES:
        for tokens in (0, 1, 37):
            grad, x = make(tokens, 48, 96, dtype)
            for density in (0.0, 0.3, 1.0):
                mask = torch.rand(48 // block[0], 96 // block[1]) < density
                index = SparseIndex.of_blocks(mask, block)
                if takes(sparse_weight_grad, row, grad, x, index):
                    got = sparse_weight_grad(grad, x, index, impl=row)
                    check(got, grad, x, index, row, f"{block} {tokens} {density}")


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("row", ROWS)
def test_layouts(row, layout):
    mask = torch.ones(48, 40, dtype=torch.bool) if row == "dense" else mask_of((48, 40), 0.2)
    index = SparseIndex.of_rows(whole(2, 7), (48, 40)) if row == "rows" else None
    index = index or SparseIndex.of_mask(mask)
    for dtype in testing.DTYPES:
        grad, x = make(23, 48, 40, dtype)
        for laid in ((testing.lay(grad, layout), x), (grad, testing.lay(x, layout))):
            with testing.unchanged(*laid):
                got = sparse_weight_grad(*laid, index, impl=row)
            check(got, grad, x, index, row, layout)
    same = torch.ones(()).expand(23, 48)  # as .sum() gives it
    check(sparse_weight_grad(same, x.float(), index, impl=row), same, x.float(), index, row)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels(level, dtype):
    with testing.cpu_level(level):
        for shape in SHAPES:
            grad, x = make(*shape, dtype)
            for density in DENSITIES:
                index = SparseIndex.of_mask(mask_of(shape[1:], density))
                got = sparse_weight_grad(grad, x, index, impl="native")
                check(got, grad, x, index, "native", f"{level} {shape} {density}")
        for block in ((16, 16), (2, 8), (1, 3)):
            grad, x = make(50, 48, 96, dtype)
            index = SparseIndex.of_blocks(torch.rand(48 // block[0], 96 // block[1]) < 0.3, block)
            got = sparse_weight_grad(grad, x, index, impl="native")
            check(got, grad, x, index, "native", f"{level} {block}")
        for picture in PICTURES:
            grad, x, weight, how = pictures(picture, dtype)
            index = SparseIndex.of_mask(mask_of(weight.shape, 0.3))
            got = sparse_conv2d_weight_grad(grad, x, index, **how, impl="native")
            check_conv(got, grad, x, index, how, "native", f"{level} {picture}")


@pytest.mark.parametrize("row", KERNELS)
def test_nan_and_infinity_reach_their_entries_only(row):
    grad, x = make(9, 20, 30)
    index = SparseIndex.of_mask(mask_of((20, 30), 0.3))
    plain = sparse_weight_grad(grad, x, index, impl=row)
    grad[2, 3], x[6, 5] = torch.nan, torch.inf
    got = sparse_weight_grad(grad, x, index, impl=row)
    touched = (index.linear // 30 == 3) | (index.linear % 30 == 5)
    assert touched.any() and not got[touched].isfinite().any()
    torch.testing.assert_close(got[~touched], plain[~touched])


@pytest.mark.parametrize("row", ROWS)
def test_twice_the_same_bits(row):
    index = SparseIndex.of_mask(torch.ones(34, 40, dtype=torch.bool))
    if row == "rows":
        index = SparseIndex.of_rows(whole(1, 30), (34, 40))
    for dtype in testing.DTYPES:
        grad, x = make(77, 34, 40, dtype)
        one, two = (sparse_weight_grad(grad, x, index, impl=row) for _ in range(2))
        assert torch.equal(one, two)


def test_which_row_runs():
    grad, x = make(20, 8, 10)
    full = torch.ones(8, 10, dtype=torch.bool)
    half = full.clone()
    half[:4] = False
    why = fastdiff.explain(sparse_weight_grad, grad, x, SparseIndex.of_mask(half))
    assert "40 of 80 entries, too few for a dense product" in why["dense"]
    assert "blocks are 1 x 1; this row is for whole rows" in why["rows"] and why["ref"] is None
    for mask, row in ((half, "native"), (full, "dense")):
        with fastdiff.use(), fastdiff.record() as ran:
            sparse_weight_grad(grad, x, SparseIndex.of_mask(mask))
        assert set(ran) == {("sparse_weight_grad", row)}
    for rows, row in ((whole(*range(7)), "rows"), (whole(*range(8)), "dense")):
        with fastdiff.use(), fastdiff.record() as ran:
            sparse_weight_grad(grad, x, SparseIndex.of_rows(rows, (8, 10)))
        assert set(ran) == {("sparse_weight_grad", row)}
    why = fastdiff.explain(sparse_weight_grad, grad.requires_grad_(), x, SparseIndex.of_mask(half))
    assert all("no backward" in why[name] for name in ("native", "triton")) and why["ref"] is None


# ---- convolutions --------------------------------------------------------------------------------


def pictures(case, dtype=torch.float32):
    """grad, x, a weight, and the keywords of the convolution."""
    batch, channels, height, width, out, kernel, stride, padding, dilation = case
    how = dict(stride=stride, padding=padding, dilation=dilation)
    x, weight = torch.randn(batch, channels, height, width), torch.randn(out, channels, *kernel)
    grad = torch.randn(F.conv2d(x, weight, **how).shape)
    return grad.to(dtype), x.to(dtype), weight.to(dtype), how


def dense_conv(grad, x, index, how):
    weight = x.new_zeros(index.shape, requires_grad=True)
    F.conv2d(x, weight, **how).backward(grad)
    return weight.grad


def check_conv(got, grad, x, index, how, row, what=""):
    exact = dense_conv(grad.double(), x.double(), index, how)
    plain = (grad, x) if row in PRODUCTS else (grad.float(), x.float())
    near(got, index, exact, dense_conv(*plain, index, how), f"{row} {what}")


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", CONV_ROWS)
def test_convolutions_match_float64(row, dtype):
    ran = 0
    for case in PICTURES:
        grad, x, weight, how = pictures(case, dtype)
        for density in (1.0,) if row == "dense" else DENSITIES[: 2 if case[4] > 60 else 4]:
            index = SparseIndex.of_mask(mask_of(weight.shape, density))
            with testing.unchanged(grad, x, index.crow, index.col):
                got = sparse_conv2d_weight_grad(grad, x, index, **how, impl=row)
            check_conv(got, grad, x, index, how, row, f"{case} {density}")
            ran += 1
    assert ran >= len(PICTURES)


@pytest.mark.parametrize("row", CONV_ROWS)
def test_layouts_of_pictures(row):
    grad, x, weight, how = pictures(PICTURES[3])
    last = torch.channels_last
    index = SparseIndex.of_mask(mask_of(weight.shape, 1.0 if row == "dense" else 0.2))
    layouts = (
        lambda t: t,
        lambda t: t.contiguous(memory_format=last),
        lambda t: testing.lay(t, "sliced"),
        lambda t: testing.lay(t, "transposed"),
        lambda t: testing.lay(t, "misaligned"),
    )
    for of_grad in layouts:
        for of_x in layouts:
            laid = of_grad(grad), of_x(x)
            with testing.unchanged(*laid):
                got = sparse_conv2d_weight_grad(*laid, index, **how, impl=row)
            check_conv(got, grad, x, index, how, row)
    same = torch.ones(()).expand(grad.shape)
    got = sparse_conv2d_weight_grad(same, x, index, **how, impl=row)
    check_conv(got, same, x, index, how, row)


@pytest.mark.parametrize("row", CONV_ROWS)
def test_whole_rows_of_a_convolution(row):
    for dtype in testing.DTYPES:
        grad, x, weight, how = pictures(PICTURES[2], dtype)
        for rows in (whole(0, 2, 6), whole(*range(7)), whole()):
            index = SparseIndex.of_rows(rows, weight.shape)
            if not takes(sparse_conv2d_weight_grad, row, grad, x, index, **how):
                assert row == "dense" and not len(rows)
                continue
            got = sparse_conv2d_weight_grad(grad, x, index, **how, impl=row)
            check_conv(got, grad, x, index, how, row)


def test_padding_in_words():
    x = torch.randn(2, 3, 8, 9)
    index = SparseIndex.of_mask(mask_of((4, 3, 3, 5), 0.3))
    for padding in ("same", "valid"):
        how = dict(padding=padding, dilation=(2, 1))
        grad = torch.randn(F.conv2d(x, torch.randn(4, 3, 3, 5), **how).shape)
        got = sparse_conv2d_weight_grad(grad, x, index, **how)
        check_conv(got, grad, x, index, how, "native")


# ---- the entries ---------------------------------------------------------------------------------


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import sparse_grad as kernel

    for dtype in testing.DTYPES:
        grad, x = make(70, 130, 132, dtype)
        for density in (0.05, 1.0):
            index = SparseIndex.of_mask(mask_of((130, 132), density))
            args = grad, x, index.crow, index.col, 1, 1
            for name, got in testing.run_configs(kernel.sparse_weight_grad, kernel.CONFIGS, *args):
                check(got, grad, x, index, "triton", name)
        grad, x, weight, how = pictures(PICTURES[3], dtype)
        index = SparseIndex.of_mask(mask_of(weight.shape, 0.1))
        args = grad, x, index.crow, index.col, [3, 3], [2, 2], [1, 1], [1, 1]
        run = kernel.sparse_conv2d_weight_grad
        for name, got in testing.run_configs(run, kernel.CONFIGS, *args):
            check_conv(got, grad, x, index, how, "triton", name)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_triton_touches_nothing_outside():
    """The interpreter raises for an access outside of the arguments, whatever values say."""
    from fastdiff.kernels import sparse_grad as kernel

    grad, x = torch.ones(9, 5), torch.ones(9, 30)  # rows that share entries agree on them
    index = SparseIndex.of_mask(mask_of((5, 30), 0.4))
    count = len(index.col)
    for value in (-(2**31), -1, count + 1, 2**31 - 1):
        for at in range(6):
            crow = index.crow.clone()
            crow[at] = value
            kernel.sparse_weight_grad(grad, x, crow, index.col, 1, 1)
        col = index.col.clone()
        col[count // 2] = value
        kernel.sparse_weight_grad(grad, x, index.crow, col, 1, 1)
        ends = [[1, 1], [1, 1], [0, 0], [1, 1]]
        kernel.sparse_conv2d_weight_grad(
            grad[:, :, None, None], x[:, :, None, None], index.crow, col, *ends
        )


@pytest.mark.parametrize("row", ["native", "ref"])
def test_compile(row):
    grad, x = make(9, 12, 8)
    index = SparseIndex.of_mask(mask_of((12, 8), 0.3))
    testing.check_compile(lambda g, x: sparse_weight_grad(g, x, index, impl=row), grad, x)
    blocks = SparseIndex.of_blocks(torch.rand(3, 2) < 0.5, (4, 4))
    testing.check_compile(lambda g, x: sparse_weight_grad(g, x, blocks, impl=row), grad, x)
    grad, x, weight, how = pictures(PICTURES[2])
    of_conv = SparseIndex.of_mask(mask_of(weight.shape, 0.3))
    testing.check_compile(
        lambda g, x: sparse_conv2d_weight_grad(g, x, of_conv, **how, impl=row), grad, x
    )


def test_compile_of_a_layer():
    x, weight, bias = torch.randn(9, 8), torch.randn(12, 8), torch.randn(12)
    index = SparseIndex.of_mask(mask_of((12, 8), 0.3))

    def grads(x, values):
        y = sparse_grad_linear(x, weight, bias, values, index)
        return torch.autograd.grad(y.square().sum(), (x, values))

    leaves = x.requires_grad_(), index.take(weight).requires_grad_()
    want = grads(*leaves)
    torch._dynamo.reset()
    layer = torch.compile(
        lambda x, v: sparse_grad_linear(x, weight, bias, v, index), fullgraph=True
    )
    got = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(not fastdiff.cpu_levels(), reason="the extension is not built here")
def test_opcheck():
    op = torch.ops.fastdiff.sparse_weight_grad.default
    grad, x = make(9, 12, 8)
    for index in (
        SparseIndex.of_mask(mask_of((12, 8), 0.3)),
        SparseIndex.of_blocks(torch.rand(3, 2) < 0.5, (4, 4)),
    ):
        torch.library.opcheck(op, (grad, x, index.crow, index.col, *index.block))
    op = torch.ops.fastdiff.sparse_conv2d_weight_grad.default
    grad, x, weight, _ = pictures(PICTURES[2])
    index = SparseIndex.of_mask(mask_of(weight.shape, 0.3))
    ends = [3, 3], [1, 1], [1, 1], [1, 1]
    torch.library.opcheck(op, (grad, x, index.crow, index.col, *ends))


@pytest.mark.skipif(not fastdiff.cpu_levels(), reason="the extension is not built here")
@pytest.mark.parametrize(
    ("crow", "col", "message"),
    [
        ([0, 2, 9, 4], [0, 3, 1, 4], "crow has value 9 at 2, need ascending values from 0 to 4"),
        ([0, 3, 2, 4], [0, 3, 1, 4], "crow has value 2 at 2, need ascending values from 0 to 4"),
        ([1, 2, 3, 4], [0, 3, 1, 4], "crow has value 1 at 0, need ascending values from 0 to 4"),
        ([0, 1, 2, 3], [0, 3, 1, 4], "crow has value 3 at 3, need ascending values from 0 to 4"),
        ([0, 2, 3, 4], [0, 5, 1, 4], "col has value 5, need 0 to 4"),
        ([0, 2, 3, 4], [0, -1, 1, 4], "col has value -1, need 0 to 4"),
    ],
)
def test_the_native_entries_refuse_what_lies_outside(crow, col, message):
    grad, x = make(6, 3, 5)
    crow, col = torch.tensor(crow).int(), torch.tensor(col).int()
    with pytest.raises(ValueError, match=f"sparse_weight_grad: {message}"):
        torch.ops.fastdiff.sparse_weight_grad(grad, x, crow, col, 1, 1)
    pictures = grad[:, :, None, None], x[:, :, None, None]
    ends = [1, 1], [1, 1], [0, 0], [1, 1]
    with pytest.raises(ValueError, match=f"sparse_conv2d_weight_grad: {message}"):
        torch.ops.fastdiff.sparse_conv2d_weight_grad(*pictures, crow, col, *ends)


G, X = torch.ones(6, 4), torch.ones(6, 5)
INDEX = SparseIndex.of_mask(torch.ones(4, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(grad="no"), "grad is str, need a torch.Tensor"),
        (dict(grad=G[0]), r"grad has shape \[4\], need 2 dimensions"),
        (dict(grad=G.half()), "x is torch.float32, need torch.float16, the dtype of grad"),
        (dict(grad=G[:, :3]), r"grad has shape \[6, 3\], need \[6, 4\]"),
        (dict(x=X[:5]), r"x has shape \[5, 5\], need \[6, 5\]"),
        (dict(x=X[:, :4]), r"x has shape \[6, 4\], need \[6, 5\]"),
        (dict(x=X[None]), r"x has shape \[1, 6, 5\], need 2 dimensions"),
        (dict(index=torch.ones(4, 5)), "index is Tensor, need a SparseIndex"),
        (
            dict(index=SparseIndex.of_rows(whole(1), (4, 5, 1, 1))),
            r"index is of a weight of shape \[4, 5, 1, 1\], need 2 dimensions",
        ),
        (dict(index=INDEX.to("meta")), "index is on meta, need cpu, the device of x"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=f"sparse_weight_grad: {message}"):
        sparse_weight_grad(**{"grad": G, "x": X, "index": INDEX, **call})


CG, CX = torch.ones(2, 4, 6, 6), torch.ones(2, 3, 6, 6)
CONV = SparseIndex.of_mask(torch.ones(4, 3, 3, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(grad=CG[0]), r"grad has shape \[4, 6, 6\], need 4 dimensions"),
        (dict(x=CX.half()), "x is torch.float16, need torch.float32, the dtype of grad"),
        (dict(x=CX[:, :1]), r"x has shape \[2, 1, 6, 6\], need \[B, 3, H, W\]; a convolution in g"),
        (dict(x=CX[:1]), r"grad has shape \[2, 4, 6, 6\], need \[1, 4, 6, 6\]"),
        (dict(padding=0), r"grad has shape \[2, 4, 6, 6\], need \[2, 4, 4, 4\]"),
        (dict(stride=0), "stride is 0, need one or two integers of at least 1"),
        (dict(stride=(1, 1, 1)), r"stride is \(1, 1, 1\), need one or two integers"),
        (dict(padding=-1), "padding is -1, need one or two integers of at least 0"),
        (dict(padding="full"), r"padding is 'full' with a kernel of \[3, 3\], need integers"),
        (dict(dilation=1.5), "dilation is 1.5, need one or two integers of at least 1"),
        (dict(dilation=9), r"x has shape \[2, 3, 6, 6\], need pictures as large as the kernel"),
        (dict(index=INDEX), r"index is of a weight of shape \[4, 5\], need 4 dimensions"),
        (
            dict(index=SparseIndex.of_blocks(torch.ones(4, 9) > 0, (1, 3), (4, 3, 3, 3))),
            "index has blocks of 1 x 3, need single entries or whole rows",
        ),
    ],
)
def test_bad_pictures(call, message):
    with pytest.raises(ValueError, match=f"sparse_conv2d_weight_grad: {message}"):
        sparse_conv2d_weight_grad(**{"grad": CG, "x": CX, "index": CONV, "padding": 1, **call})
