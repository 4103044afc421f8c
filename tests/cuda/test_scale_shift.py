"""The CUDA kernels of a scale and shift per channel, in the model, against float64."""

import pytest
import torch

from fastdiff import testing_simt
from fastdiff.ops import scale_shift, scale_shift_backward
from fastdiff.testing import GUARD, assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (shape, dim): four elements at once and one, more channels than a warp holds, several pieces with
# a tail, one position, more pieces than a block has warps, planes of several parts with a tail.
SHAPES = (
    ((2, 5, 64), -1),
    ((1, 150, 37), -1),
    ((2, 70, 260), -1),
    ((3, 40), -1),
    ((1, 600, 8), -1),
    ((2, 6, 8, 8), 1),
    ((1, 3, 45, 49), 1),
    ((2, 2, 1100), 1),
)


def inputs(shape, dim, dtype, tasks=0, wide=False):
    channels = shape[dim]
    rows = (tasks, channels) if tasks else (channels,)
    of = torch.float32 if wide else dtype
    index = torch.arange(shape[0]) % 2 + 1 if tasks else None
    x, scale, shift = torch.randn(shape), torch.randn(rows), torch.randn(rows)
    return x.to(dtype), scale.to(of), shift.to(of), index


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def compare(x, scale, shift, index, dim, mode=(0, False, False)):
    """Both ops in the model, and what they give."""
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    how = dict(dim=dim, index=index)
    with testing_simt.emulated(*mode):
        got = scale_shift(x, scale, shift, **how, impl="native")
        grads = scale_shift_backward(grad, x, scale, **how, impl="native")
    exact = scale_shift(*double(x, scale, shift), **how, impl="ref")
    assert_close(got, exact, scale_shift(x, scale, shift, **how, impl="ref"))
    exact = scale_shift_backward(*double(grad, x, scale), **how, impl="ref")
    plain = scale_shift_backward(grad, x, scale, **how, impl="ref")
    for a, e, p in zip(grads, exact, plain, strict=True):
        assert a.dtype == p.dtype
        assert_close(a, e, p)
    return got, *grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, dim", SHAPES)
def test_against_float64(shape, dim, dtype):
    compare(*inputs(shape, dim, dtype), dim)
    x, scale, shift, index = inputs(shape, dim, dtype, tasks=4, wide=True)
    compare(x, scale, shift, index, dim)
    compare(x, scale, None, index, dim)


def test_channels_last_and_strided_rows():
    x, scale, shift, index = inputs((2, 8, 3, 5), 1, torch.bfloat16, tasks=3)
    compare(x.contiguous(memory_format=torch.channels_last), scale, shift, index, 1)
    wide = torch.randn(2, 9, 80)
    for view in (wide[..., :64], wide[..., 3:67], wide.transpose(0, 1)[:2, :, :64]):
        _, scale, shift, index = inputs(view.shape, -1, torch.float32, tasks=3)
        compare(view, scale, shift, index, -1)
    scales = torch.randn(3, 72)[:, 1:65]
    compare(wide[..., :64], scales, scales, index, -1)
    compare(wide[..., :64], torch.randn(3, 66)[:, :64], None, index, -1)
    image = torch.randn(2 * 4 * 64 + 1)[1:].view(2, 4, 8, 8)  # planes that are not aligned
    compare(image, *inputs(image.shape, 1, torch.float32)[1:], 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_gives_the_bits_of_x(dtype):
    for shape, dim in SHAPES:
        x = torch.randn(shape).to(dtype)
        with testing_simt.emulated():
            got = scale_shift(x, torch.ones(shape[dim], dtype=dtype), dim=dim, impl="native")
        assert torch.equal(got, x)


@pytest.mark.parametrize("shape, dim", (((3, 70, 48), -1), ((3, 70, 37), -1), ((3, 4, 1100), 1)))
def test_same_bits_in_every_order(shape, dim):
    given = inputs(shape, dim, torch.bfloat16, tasks=3)
    outputs = [compare(*given, dim, mode) for mode in testing_simt.MODES]
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


@pytest.mark.parametrize("shape, dim", (((4, 5, 64), -1), ((4, 5, 37), -1), ((4, 3, 8, 8), 1)))
def test_index_out_of_range_is_nan_and_touches_no_memory(shape, dim):
    """Rows just outside of scale are in its buffer, full of 7: neither is taken."""
    x, rows, _, _ = inputs(shape, dim, torch.float32, tasks=3)
    zone = GUARD // 4
    buffer = torch.full((rows.numel() + 2 * zone,), 7.0)
    scale = buffer[zone:-zone].view(rows.shape).copy_(rows)
    index = torch.tensor([-1, 1, 3, 2**62])
    with testing_simt.emulated():
        got = scale_shift(x, scale, scale, dim=dim, index=index, impl="native")
        grads = scale_shift_backward(x, x, scale, dim=dim, index=index, impl="native")
    kept = [1]
    want = scale_shift(x[kept], rows, rows, dim=dim, index=index[kept], impl="ref")
    torch.testing.assert_close(got[kept], want)
    wants = scale_shift_backward(x[kept], x[kept], rows, dim=dim, index=index[kept], impl="ref")
    torch.testing.assert_close(grads[1:], wants[1:])
    for t in (got, grads[0]):
        assert t[[0, 2, 3]].isnan().all()
