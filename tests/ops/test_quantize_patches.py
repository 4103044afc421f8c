import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import quant_linear, quantize, quantize_patches, quantize_weight
from fastdiff.ops.quantize_patches import IMPLS, quantize_patches_ref

ROWS = testing.rows_of(IMPLS)
SHAPES = (  # x; size, stride, padding, upsample
    ((2, 5, 7, 9), (3, 1, 1, False)),
    ((1, 8, 5, 4), (3, 2, 1, False)),
    ((2, 17, 4, 6), (3, 1, 1, True)),
    ((1, 64, 3, 3), (3, 1, 1, False)),
    ((2, 33, 6, 5), (1, 2, 0, False)),
    ((1, 3, 9, 8), (4, 4, 0, False)),
    ((1, 70, 5, 6), (2, 3, 2, True)),
    ((3, 1, 2, 2), (5, 1, 2, False)),
    ((0, 4, 5, 5), (3, 1, 1, False)),
    ((2, 0, 5, 5), (3, 1, 1, False)),
)


def patches(x, size, stride, padding, upsample):
    """By torch's unfold, columns in our order."""
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    columns = F.unfold(x, size, padding=padding, stride=stride)  # [B, C k k, L]
    rows = [(n + 2 * padding - size) // stride + 1 for n in x.shape[2:]]
    taps = columns.unflatten(1, (x.shape[1], size * size)).transpose(1, 2).flatten(1, 2)
    return taps.transpose(1, 2).unflatten(1, rows)


def call(x, size, stride, padding, upsample, impl=None):
    return quantize_patches(x, size, stride=stride, padding=padding, upsample=upsample, impl=impl)


def same(got, want):
    assert got.values.dtype == torch.int8 and got.values.is_contiguous()
    assert torch.equal(got.values, want.values)
    assert torch.equal(got.scale.nan_to_num(-1.0), want.scale.nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_patches_are_rounded_as_rows(row, dtype):
    """To the bit what quantize makes of the patches that torch's unfold gives."""
    for shape, how in SHAPES:
        x = (3 * torch.randn(shape)).to(dtype)
        with testing.unchanged(x):
            got = call(x, *how, row)
        assert got.dtype == dtype
        if not x.numel():
            assert not got.scale.any() and got.values.numel() == 0
            continue
        same(got, quantize(patches(x.float(), *how).to(dtype), impl="ref"))


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_layouts(level, layout, dtype):
    for shape, how in SHAPES[:5]:
        for last in (False, True):
            x = torch.randn(shape).to(dtype)
            x = (
                testing.lay(x.movedim(1, -1), layout).movedim(-1, 1)
                if last
                else testing.lay(x, layout)
            )
            with testing.cpu_level(level):
                got = call(x, *how, "native")
            want = quantize_patches_ref(x, *how)
            assert torch.equal(got.values, want[0]) and torch.equal(got.scale, want[1])


@pytest.mark.parametrize("row", ROWS)
def test_scales_that_are_known(row):
    """Powers of two, one outlier, zeros, denormals, the largest floats: every bit."""
    for power in (0, -20, 90, -126):
        x = torch.zeros(1, 2, 5, 5)
        x[0, 1, 2, 2] = -127 * 2.0**power
        x[0, 0, 0, 0] = 64 * 2.0**power
        got = call(x, 3, 1, 1, False, row)
        near = torch.zeros(5, 5, dtype=torch.bool)
        near[1:4, 1:4] = True
        assert (got.scale[0][near] == 2.0**power).all()
        whole = got.values[0].view(5, 5, 3, 3, 2)
        for h in range(1, 4):
            for w in range(1, 4):
                assert whole[h, w, 3 - h, 3 - w, 1] == -127
        assert whole[1, 1, 0, 0, 0] == 64 and whole[0, 0, 1, 1, 0] == (0 if power == -126 else 127)
        far = ~near
        far[:2, :2] = False
        assert not got.scale[0][far].any() and not got.values[0][far].any()
    x = torch.full((1, 3, 4, 4), torch.finfo(torch.float32).max)
    got = call(x, 3, 1, 1, False, row)
    assert got.scale.isfinite().all() and set(got.values.unique().tolist()) == {0, 127}


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_nan_and_infinity_are_reported_where_they_are_seen(row, dtype):
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        for at in (0, 8, 18):
            x = torch.randn(2, 19, 5, 6).to(dtype)
            clean = call(x, 3, 1, 1, False, row)
            x[0, at, 0, 3] = bad
            got = call(x, 3, 1, 1, False, row)
            seen = torch.zeros(2, 5, 6, dtype=torch.bool)
            seen[0, :2, 2:5] = True
            assert torch.equal(got.scale.isnan(), seen)
            assert not got.values[seen].any()
            assert torch.equal(got.values[~seen], clean.values[~seen])
            assert torch.equal(got.scale[~seen], clean.scale[~seen])
    x[0, 5, 1, 2], x[0, 6, 1, 2] = torch.nan, torch.inf  # both in one patch
    assert call(x, 3, 1, 1, False, row).scale[0, 0, 1].isnan()


@pytest.mark.parametrize("row", ROWS)
def test_a_product_with_them_is_the_convolution(row):
    """Against float64: both roundings' steps, summed by their squares."""
    for stride, padding, upsample in ((1, 1, False), (2, 1, False), (1, 1, True), (1, 0, False)):
        x, w, bias = torch.randn(2, 24, 9, 6), torch.randn(10, 24, 3, 3), torch.randn(10)
        tokens = call(x, 3, stride, padding, upsample, row)
        weight = quantize_weight(w.permute(0, 2, 3, 1).flatten(1))
        got = quant_linear(tokens, weight, bias).permute(0, 3, 1, 2)
        wide = F.interpolate(x.double(), scale_factor=2.0) if upsample else x.double()
        want = F.conv2d(wide, w.double(), bias.double(), stride, padding)
        assert got.shape == want.shape
        error = (got.double() - want).norm() / want.norm()
        assert 1e-3 < error < 1.5e-2  # 127 levels of about 3 deviations: 1 / (127 sqrt(12) / 3)


def test_threads_change_no_bit():
    x = torch.randn(3, 40, 33, 17)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call(x, 3, 1, 1, False, "native"))
    finally:
        torch.set_num_threads(before)
    for got in results[1:]:
        same(got, results[0])


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import quantize_patches as kernel

    for x in (torch.randn(2, 5, 4, 5), torch.randn(1, 70, 3, 4), torch.randn(1, 600, 2, 2)):
        args = x, 3, 1, 1, False
        want = quantize_patches_ref(*args)
        for name, got in testing.run_configs(kernel.quantize_patches, kernel.CONFIGS, *args):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), name


def test_opcheck_and_compile():
    x = torch.randn(2, 5, 6, 7)
    for args in ((x, 3, 1, 1, False), (x.bfloat16(), 3, 2, 1, True), (x, 1, 1, 0, False)):
        torch.library.opcheck(torch.ops.fastdiff.quantize_patches.default, args)
    for row in ROWS:
        if row == "triton":
            continue  # a launch is no part of a graph, as of all ops
        testing.check_compile(lambda t, row=row: quantize_patches(t, 3, padding=1, impl=row)[:2], x)


def test_rounding_has_no_gradient():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    with pytest.raises(fastdiff.NoImpl, match="quantize_patches: every row refuses"):
        quantize_patches(x, 3)
    with pytest.raises(fastdiff.NoImpl, match="rounding has no derivative"):
        torch.func.jvp(
            lambda t: quantize_patches(t, 3).scale, (x.detach(),), (torch.ones(1, 2, 4, 4),)
        )


X = torch.ones(1, 2, 4, 4)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (("no", 3), {}, "quantize_patches: x is str, need a torch.Tensor"),
        ((X[0], 3), {}, r"x has shape \[2, 4, 4\], need 4 dimensions"),
        ((X.int(), 3), {}, "x is torch.int32, need float16"),
        ((X, 0), {}, "size is 0, need an integer of at least 1"),
        ((X, 3.0), {}, "size is 3.0, need an integer"),
        ((X, True), {}, "size is True, need an integer"),
        ((X, 3), {"stride": 0}, "stride is 0, need an integer of at least 1"),
        ((X, 3), {"padding": -1}, "padding is -1, need an integer of at least 0"),
        ((X, 3), {"upsample": 1}, "upsample is 1, need True or False"),
        ((X, 5), {}, r"x has shape \[1, 2, 4, 4\], need 5 pixels or more in both directions"),
    ],
)
def test_bad_input(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        quantize_patches(*args, **kwargs)
