import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.ops.conv3x3 import IMPLS, conv3x3, conv3x3_ref

# (B, C, H, W, N): whole and cut tiles, one pixel, channels of every block and vector remainder.
SHAPES = [
    (1, 1, 1, 1, 1), (2, 3, 4, 4, 16), (1, 5, 7, 9, 17), (2, 16, 8, 12, 48), (1, 33, 3, 30, 65),
    (3, 20, 5, 5, 129), (1, 64, 13, 8, 96), (0, 4, 8, 8, 4), (2, 0, 4, 4, 3), (1, 2, 0, 4, 3),
    (1, 2, 4, 4, 0),
]  # fmt: skip
# Winograd's rms error is about twice that of the direct form, its largest up to 6 times.
FACTOR = 6.0


def make(b, c, h, w, n, dtype=torch.float32):
    x, weight = torch.randn(b, c, h, w), torch.randn(n, c, 3, 3) / (9 * c + 1) ** 0.5
    return x.to(dtype), weight.to(dtype)


def extras(x, weight, upsample, seed=0):
    """Every bias and residual that the call takes."""
    b, _, h, w = x.shape
    n, s = weight.shape[0], 1 + upsample
    single, each = torch.randn(n).to(x.dtype), torch.randn(b, n).to(x.dtype)
    add = torch.randn(b, n, s * h, s * w).to(x.dtype)
    return [(None, None), (single, None), (each, add), (None, add)]


def exact(x, weight, bias, add, upsample):
    wide = (None if t is None else t.double() for t in (bias, add))
    return conv3x3_ref(x.double(), weight.double(), *wide, upsample)


def eager(x, weight, bias, add, upsample):
    """The steps of plain torch, each rounded to the dtype of x."""
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    y = F.conv2d(x, weight, padding=1)
    if bias is not None:
        y = y + bias.reshape(-1, bias.shape[-1], 1, 1)
    return y if add is None else y + add


def defined(shape):
    return 0 not in shape[1:]  # torch's convolution refuses what has no channels or pixels


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_matches_float64(row, dtype):
    if row == "native" and dtype != torch.float32:
        pytest.skip("float32 only")
    run = next(r.fn for r in IMPLS if r.name == row)  # also below the size from which it gains
    for shape in filter(defined, SHAPES):
        x, weight = make(*shape, dtype)
        for upsample in (False, True):
            for bias, add in extras(x, weight, upsample):
                with testing.unchanged(x, weight, bias, add):
                    got = run(x, weight, bias, add, upsample)
                want = exact(x, weight, bias, add, upsample)
                base = eager(x, weight, bias, add, upsample)
                what = f"{row} {shape} {upsample} {bias is None} {add is None}"
                testing.assert_close(got, want, base, factor=FACTOR, what=what)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", [*testing.LAYOUTS, "channels last"])
def test_levels_and_layouts(level, layout):
    for shape in filter(defined, SHAPES):
        x, weight = make(*shape)
        for upsample in (False, True):
            bias, add = extras(x, weight, upsample)[2]
            args = x, weight, bias, add
            if layout == "channels last":
                last = torch.channels_last
                laid = [t.contiguous(memory_format=last) if t.dim() == 4 else t for t in args]
            else:
                laid = [testing.lay(t, layout) for t in args]
            with testing.cpu_level(level):
                got = torch.ops.fastdiff.conv3x3(*laid, upsample)
            assert got.is_contiguous(memory_format=torch.channels_last)
            want, base = exact(*args, upsample), eager(*args, upsample)
            testing.assert_close(got, want, base, factor=FACTOR, what=f"{shape} {upsample}")


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_large_weights_go_in_pieces(level):
    """More columns than are transformed at once: 16 MB hold 1 of the 64-wide blocks here."""
    x, weight = make(1, 1200, 4, 5, 150)
    args = x, weight, torch.randn(150), torch.randn(1, 150, 4, 5), False
    with testing.cpu_level(level):
        error = torch.ops.fastdiff.conv3x3(*args) - exact(*args)
    assert error.abs().max() / exact(*args).abs().max() < 1e-5  # a column amiss is off by 1


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_rms_error(level):
    """At a U-Net's widths: at most twice the rounding of the direct form."""
    for channels in (32, 320, 1280):
        x, weight = make(1, channels, 16, 16, 64)
        args = x, weight, None, None, False
        with testing.cpu_level(level):
            error = torch.ops.fastdiff.conv3x3(*args) - exact(*args)
        assert error.norm() / exact(*args).norm() < 1.6e-6


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_samples_and_threads_do_not_touch_each_other(level):
    x, weight = make(5, 40, 12, 20, 70)
    bias, add = extras(x, weight, False)[2]
    with testing.cpu_level(level):
        run = torch.ops.fastdiff.conv3x3
        together = run(x, weight, bias, add, False)
        single = [run(x[i : i + 1], weight, bias[i : i + 1], add[i : i + 1], False)
                  for i in range(5)]  # fmt: skip
        assert torch.equal(together, torch.cat(single))
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if before > 1 else 2)
            assert torch.equal(together, run(x, weight, bias, add, False))
        finally:
            torch.set_num_threads(before)


def test_values_that_are_not_finite_stay_in_their_sample_and_near():
    x, weight = make(2, 8, 24, 24, 8)
    x[0, 3, 1, 1] = torch.nan
    y = conv3x3(x, weight, impl="native")
    assert y[0, :, :3, :3].isnan().all()
    assert y[0, :, 8:].isfinite().all() and y[0, :, :, 8:].isfinite().all()
    assert y[1].isfinite().all()


def test_when_the_native_row_runs():
    x, weight = make(2, 32, 8, 8, 32)
    why = fastdiff.explain(conv3x3, x, weight)
    assert why["native"] is None
    assert "has 2 tiles of 4x4" in fastdiff.explain(conv3x3, x[:, :, :4], weight)["native"]
    assert fastdiff.explain(conv3x3, x[:, :, :4], weight, upsample=True)["native"] is None
    assert "(need 16)" in fastdiff.explain(conv3x3, *make(9, 256, 12, 16, 256))["native"]
    assert fastdiff.explain(conv3x3, *make(1, 256, 16, 16, 256))["native"] is None
    assert "no backward" in fastdiff.explain(conv3x3, x, weight.requires_grad_())["native"]
    assert "bfloat16" in fastdiff.explain(conv3x3, x.bfloat16(), weight.bfloat16())["native"]


def test_opcheck_and_compile():
    x, weight = make(2, 8, 8, 16, 24)
    for upsample in (False, True):
        for bias, add in extras(x, weight, upsample):
            args = x, weight, bias, add, upsample
            torch.library.opcheck(torch.ops.fastdiff.conv3x3.default, args)
    testing.check_compile(lambda x, w, b: conv3x3(x, w, b, upsample=True), x, weight, bias)


@pytest.mark.parametrize("upsample", (False, True))
def test_gradient_comes_from_torch(upsample):
    x, weight = make(2, 2, 3, 4, 3, torch.float64)
    bias, add = extras(x, weight, upsample)[2]
    args = [t.requires_grad_() for t in (x, weight, bias, add)]
    assert torch.autograd.gradcheck(
        lambda x, w, b, a: conv3x3(x, w, b, add=a, upsample=upsample), args
    )


X, W = torch.ones(2, 3, 4, 5), torch.ones(6, 3, 3, 3)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (("no", W), {}, "conv3x3: x is str, need a torch.Tensor"),
        ((X[0], W), {}, r"x has shape \[3, 4, 5\], need 4 dimensions"),
        ((X, W[:, :2]), {}, r"weight has shape \[6, 2, 3, 3\], need \[6, 3, 3, 3\]"),
        ((X, W[..., :1]), {}, r"weight has shape \[6, 3, 3, 1\], need \[6, 3, 3, 3\]"),
        ((X, W.half()), {}, "weight is torch.float16, need torch.float32"),
        ((X, W, torch.ones(5)), {}, r"bias has shape \[5\], need \[6\] or \[2, 6\]"),
        ((X, W, torch.ones(3, 6)), {}, r"bias has shape \[3, 6\], need \[6\] or \[2, 6\]"),
        ((X, W), dict(add=X), r"add has shape \[2, 3, 4, 5\], need \[2, 6, 4, 5\]"),
        (
            (X, W),
            dict(add=torch.ones(2, 6, 4, 5), upsample=True),
            r"add has shape \[2, 6, 4, 5\], need \[2, 6, 8, 10\]",
        ),
        ((X, W), dict(upsample=2), "upsample is 2, need True or False"),
    ],
)
def test_bad_input(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        conv3x3(*args, **kwargs)


def test_the_native_entry_checks_for_itself():
    op = torch.ops.fastdiff.conv3x3
    for args, message in [
        ((X, W[:, :2], None, None, False), "weight has shape"),
        ((X[0], W, None, None, False), "need 4 dimensions"),
        ((X, W, torch.ones(5), None, False), "bias has shape"),
        ((X, W, torch.ones(3, 6), None, False), "bias has shape"),
        ((X, W, None, X, False), "add has shape"),
        ((X, W.half(), None, None, False), "weight is"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*args)
