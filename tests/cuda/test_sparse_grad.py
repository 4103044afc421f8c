"""The CUDA kernels of sparse weight gradients, in the model, against float64."""

import math
import os

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import fastdiff
from fastdiff import testing, testing_simt
from fastdiff.ops import SparseIndex, sparse_conv2d_weight_grad, sparse_weight_grad

DTYPES = (torch.bfloat16, torch.float16)
# (T, O, I): tiles are of 128 rows and 128 columns, slices of 32 tokens.
CASES = (
    (1, 1, 1),
    (7, 16, 24),
    (32, 128, 128),
    (33, 129, 136),
    (65, 130, 264),
    (96, 8, 200),
    (40, 260, 33),
)
ODD = (37, 45, 131)  # no row is aligned
# (B, C, H, W, O, kernel, stride, padding, dilation)
PICTURES = (
    (1, 1, 1, 1, 1, (1, 1), 1, 0, 1),
    (2, 5, 6, 7, 9, (3, 3), 1, 1, 1),
    (1, 16, 5, 4, 130, (3, 3), 2, 1, 1),
    (1, 8, 9, 7, 5, (3, 3), (1, 2), (2, 0), (2, 3)),
    (3, 140, 4, 3, 6, (1, 1), 1, 0, 1),
    (1, 3, 7, 11, 4, (3, 2), (2, 1), (0, 1), 1),
)
PLAIN = (0, False, False)


def mask_of(shape, density, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < density
    if 0 < density < 1 and mask.shape[0] > 2:
        mask[1] = False  # a row without entries
        mask[-1] = True  # and one that is full
    return mask


def make(shape, dtype, density=0.1):
    tokens, out, width = shape
    grad, x = torch.randn(tokens, out).to(dtype), torch.randn(tokens, width).to(dtype)
    return grad, x, SparseIndex.of_mask(mask_of((out, width), density))


def run(grad, x, index, mode=PLAIN):
    inputs = grad, x, index.crow, index.col
    with testing.unchanged(*inputs), testing_simt.emulated(*mode):
        return sparse_weight_grad(grad, x, index, impl="native")


def run_conv(grad, x, index, how, mode=PLAIN):
    inputs = grad, x, index.crow, index.col
    with testing.unchanged(*inputs), testing_simt.emulated(*mode):
        return sparse_conv2d_weight_grad(grad, x, index, **how, impl="native")


def near(got, index, exact, plain, what=""):
    """As near to float64 as twice the float32 product's largest error in the weight."""
    want = index.take(exact)
    assert got.dtype == torch.float32 and got.shape == index.values_shape
    bound = 2 * (plain.double() - exact).abs().max() if exact.numel() else 0.0
    bound = bound + 4 * testing.ROUNDOFF[torch.float32] * exact.abs().max()
    error = (got.double() - want).abs().max() if got.numel() else torch.zeros(())
    assert error <= bound, f"{what}: error {error:.3g} above {bound:.3g}"


def compare(grad, x, index, mode=PLAIN, what=""):
    got = run(grad, x, index, mode)
    near(got, index, grad.double().t() @ x.double(), grad.float().t() @ x.float(), what)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", (*CASES, ODD), ids=str)
def test_against_float64(shape, dtype):
    for density in (0.02, 0.3, 1.0):
        compare(*make(shape, dtype, density), what=density)


@pytest.mark.parametrize("block", [(1, 2), (16, 16), (3, 24), (48, 1), (1, 192), (4, 192)])
def test_blocks(block):
    for density in (0.1, 0.5, 1.0):
        grad, x, _ = make((40, 144, 192), torch.bfloat16)
        index = SparseIndex.of_blocks(mask_of((144 // block[0], 192 // block[1]), density), block)
        compare(grad, x, index, what=density)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    grad, x, index = make((40, 48, 72), torch.bfloat16, 0.3)
    compare(testing.lay(grad, layout), x, index)
    compare(grad, testing.lay(x, layout), index)
    wide = torch.full((40, 83), math.nan).bfloat16()
    wide[:, 8:80] = x
    compare(grad, wide[:, 8:80], index)
    even = torch.full((40, 88), math.nan).bfloat16()
    even[:, 8:80] = x
    compare(grad, even[:, 8:80], index)


def test_tiles_without_entries_are_left_at_once():
    """And no element of them is read: what is there is NaN."""
    tokens, out, width = 64, 304, 400
    grad, x, _ = make((tokens, out, width), torch.bfloat16)
    mask = torch.zeros(out, width, dtype=torch.bool)
    mask[130:200, 256:300] = True  # of tile (1, 2) alone
    index = SparseIndex.of_mask(mask)
    grad[:, :128] = math.nan
    x[:, 384:] = math.nan
    testing_simt.counters()
    got = run(grad, x, index)
    seen = testing_simt.counters()
    assert seen["mma"] == 8 * 16 * tokens // 16 and not got.isnan().any()
    assert seen["copies"] == 2 * tokens * 128 // 8
    want = (grad.float().t() @ x.float())[mask]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_no_tokens_and_no_entries():
    grad, x, index = make((0, 16, 24), torch.bfloat16)
    assert not run(grad, x, index).any()
    grad, x, _ = make((9, 16, 24), torch.bfloat16)
    index = SparseIndex.of_mask(torch.zeros(16, 24, dtype=torch.bool))
    testing_simt.counters()
    assert run(grad, x, index).numel() == 0 and testing_simt.counters()["threads"] == 0


def test_entries_that_lie_are_read_and_written_nowhere():
    """Rows that begin outside of the entries, or descend: the address sanitizer looks on. Columns
    outside of the weight: no other row's entries change."""
    grad, x, index = make((33, 20, 200), torch.bfloat16, 0.2)
    count = len(index.col)
    good = run(grad, x, index)
    # Two rows that claim the same entries race for them, which the thread sanitizer would report.
    overlap = "tsan" not in os.environ.get("LD_PRELOAD", "")
    for value in (-(2**31), -1, count + 1, 2**31 - 1):
        for at in (0, 3, 19, 20) if overlap else ():
            crow = index.crow.clone()
            crow[at] = value
            run(grad, x, SparseIndex(crow, index.col, index.shape))
    for value in (-(2**31), -1, 200, 2**31 - 1):
        col = index.col.clone()
        col[count // 2] = value
        got = run(grad, x, SparseIndex(index.crow, col, index.shape))
        row = int((index.crow <= count // 2).sum()) - 1
        begin, end = int(index.crow[row]), int(index.crow[row + 1])
        assert torch.equal(got[:begin], good[:begin]) and torch.equal(got[end:], good[end:])


def test_reads_nothing_beside_its_inputs():
    """A last row that ends with its memory, in rows of whole 16 bytes: the sanitizer looks on."""
    grad, x, index = make((33, 40, 70), torch.bfloat16, 0.2)
    end = torch.empty(32 * 72 + 70, dtype=x.dtype).as_strided((33, 70), (72, 1)).copy_(x)
    assert torch.equal(run(grad, end, index), run(grad, x, index))
    for shape in ((33, 40, 136), ODD):
        grad, x, index = make(shape, torch.bfloat16, 0.2)
        want = run(grad, x, index)
        with testing.guarded(grad, x, index.crow, index.col) as (g, inner, crow, col):
            got = run(g, inner, SparseIndex(crow, col, index.shape))
        assert torch.equal(got, want) and not got.isnan().any()


@pytest.mark.parametrize("density", (0.05, 1.0))
def test_same_bits_in_every_order_and_no_bank_conflicts(density):
    grad, x, index = make((70, 136, 264), torch.bfloat16, density)
    outputs = [run(grad, x, index, mode) for mode in testing_simt.MODES]
    compare(grad, x, index)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    testing_simt.counters()
    run(grad, x, index)
    seen = testing_simt.counters()
    assert seen["bank_conflicts"] == 0 and seen["mma"] == 6 * 8 * 16 * 6  # tiles, slices of 16


def test_non_finite_values_stay_in_their_row_and_column():
    grad, x, index = make((40, 48, 72), torch.float16, 0.3)
    plain = run(grad, x, index)
    grad[2, 5], x[10, 3] = math.nan, math.inf
    got = run(grad, x, index)
    touched = (index.linear // 72 == 5) | (index.linear % 72 == 3)
    assert not got[touched].isfinite().any() and torch.equal(got[~touched], plain[~touched])


def test_refusals():
    grad, x, index = make((7, 16, 24), torch.float32)
    with pytest.raises(RuntimeError, match=r"sparse_weight_grad: the launch failed: .*\(801\)"):
        run(grad, x, index)
    conv = SparseIndex.of_mask(mask_of((16, 24, 1, 1), 0.2))
    with pytest.raises(RuntimeError, match=r"sparse_conv2d_weight_grad: the launch failed:.*801"):
        run_conv(grad[:, :, None, None], x[:, :, None, None], conv, {})
    with FakeTensorMode():
        grad, x = (torch.empty(7, n, device="cuda") for n in (16, 24))
        crow, col = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (17, 9))
        index = SparseIndex(crow, col, (16, 24))
        assert "float32" in fastdiff.explain(sparse_weight_grad, grad, x, index)["native"]


# ---- convolutions --------------------------------------------------------------------------------


def picture(case, dtype, density=0.2):
    batch, channels, height, width, out, kernel, stride, padding, dilation = case
    how = dict(stride=stride, padding=padding, dilation=dilation)
    x, shape = torch.randn(batch, channels, height, width), (out, channels, *kernel)
    grad = torch.randn(F.conv2d(x, torch.randn(shape), **how).shape)
    return grad.to(dtype), x.to(dtype), SparseIndex.of_mask(mask_of(shape, density)), how


def dense(grad, x, index, how):
    weight = x.new_zeros(index.shape, requires_grad=True)
    F.conv2d(x, weight, **how).backward(grad)
    return weight.grad


def compare_conv(grad, x, index, how, mode=PLAIN, what=""):
    got = run_conv(grad, x, index, how, mode)
    exact = dense(grad.double(), x.double(), index, how)
    near(got, index, exact, dense(grad.float(), x.float(), index, how), what)
    return got


def last(t):
    return t.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PICTURES, ids=str)
def test_convolutions(case, dtype):
    for density in (0.05, 1.0):
        grad, x, index, how = picture(case, dtype, density)
        for laid in ((grad, x), (last(grad), x), (grad, last(x)), (last(grad), last(x))):
            compare_conv(*laid, index, how, what=density)


def test_convolutions_of_strided_pictures():
    grad, x, index, how = picture(PICTURES[1], torch.bfloat16)
    for layout in ("sliced", "transposed", "misaligned"):
        compare_conv(testing.lay(grad, layout), testing.lay(x, layout), index, how)


def test_convolutions_read_nothing_beside_their_inputs():
    for case in PICTURES:
        grad, x, index, how = picture(case, torch.bfloat16)
        want = run_conv(grad, x, index, how)
        with testing.guarded(grad, x, index.crow, index.col) as (g, inner, crow, col):
            got = run_conv(g, inner, SparseIndex(crow, col, index.shape), how)
        assert torch.equal(got, want) and not got.isnan().any()


def test_convolutions_in_every_order_without_bank_conflicts():
    grad, x, index, how = picture((2, 16, 5, 9, 130, (3, 3), 1, 1, 1), torch.bfloat16)
    outputs = [run_conv(grad, x, index, how, mode) for mode in testing_simt.MODES]
    compare_conv(grad, x, index, how)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    testing_simt.counters()
    run_conv(grad, x, index, how)
    seen = testing_simt.counters()
    assert seen["bank_conflicts"] == 0 and seen["mma"] == 4 * 8 * 16 * 6  # 90 pixels: 6 times 16


def test_convolutions_leave_tiles_without_entries():
    grad, x, _, how = picture((1, 32, 4, 8, 200, (3, 3), 1, 1, 1), torch.bfloat16)
    mask = torch.zeros(200, 288, dtype=torch.bool)
    mask[150, 260] = True
    index = SparseIndex.of_mask(mask.view(200, 32, 3, 3))
    testing_simt.counters()
    compare_conv(grad, x, index, how)
    assert testing_simt.counters()["mma"] == 8 * 16 * 2


def test_whole_rows_of_a_convolution():
    grad, x, index, how = picture(PICTURES[1], torch.bfloat16)
    index = SparseIndex.of_rows(torch.tensor([0, 4, 8]), index.shape)
    compare_conv(grad, x, index, how)
