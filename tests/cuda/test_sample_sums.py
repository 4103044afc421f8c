"""The CUDA kernels of sums over samples, in the model, against float64."""

import pytest
import torch

from fastdiff import testing, testing_simt
from fastdiff.ops import sample_sums
from fastdiff.ops.sample_sums import KINDS

# One element, less than four, a warp's with a tail, a block's and one more, several pieces with a
# tail, more pieces than a warp has lanes.
SHAPES = ((2, 1), (5,), (3, 7), (2, 130), (1, 1024), (2, 1025), (3, 4096), (2, 4097), (1, 9, 1500))


def inputs(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=g) + 0.5).to(dtype) for _ in range(2)]


def exact(x, y, kind):
    x, y = (t.double()[..., None].flatten(1) for t in (x, y))
    terms = {"square": x * x, "product": x * y, "difference": (x - y) ** 2}[kind]
    return terms.sum(1), terms.abs().sum(1)


def run(x, y, kind, mode=(0, False, False)):
    with testing_simt.emulated(*mode), testing.unchanged(x, y):
        return sample_sums(x, None if kind == "square" else y, kind=kind, impl="native")


def compare(x, y, kind):
    got, (want, size) = run(x, y, kind), exact(x, y, kind)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert ((got.double() - want).abs() <= 1.5e-7 * size).all()
    return got


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind, dtype):
    for shape in SHAPES:
        compare(*inputs(shape, dtype), kind)


def test_many_pieces_and_samples():
    """More pieces than a warp has lanes; more samples than a block of the second launch has."""
    compare(*inputs((1, 34 * 4096 + 3)), "square")
    compare(*inputs((9, 4100)), "product")


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_have_the_same_bits(layout):
    """Loads of four elements and of one add the same elements in the same order."""
    for shape in ((2, 1152), (3, 5, 64), (2, 4096 + 8)):
        for dtype in (torch.float32, torch.bfloat16):
            x, y = inputs(shape, dtype)
            want = run(x, y, "product")
            assert torch.equal(run(testing.lay(x, layout), y, "product"), want)
            assert torch.equal(run(x, testing.lay(y, layout), "product"), want)


@pytest.mark.parametrize("size, stride", ((8, 9), (7, 8), (70, 72), (4098, 4100)))
def test_samples_apart(size, stride):
    """Aligned first samples: those after them are not, or NaN stands where a load of four ends."""
    x, y = inputs((3, size))
    for dtype in testing.DTYPES:
        a, b = x.to(dtype), y.to(dtype)
        apart = torch.full((3, stride), float("nan"), dtype=dtype)[:, :size].copy_(a)
        want = run(a, b, "product")
        assert torch.equal(run(apart, b, "product"), want)
        assert torch.equal(run(b, apart, "product"), want)
        assert torch.equal(run(apart, apart, "square"), run(a, a, "square"))


def test_a_sample_does_not_depend_on_its_batch():
    for size in (77, 4097):
        x, y = inputs((4, size))
        together = run(x, y, "difference")
        for b in range(4):  # the second starts where no load of four may
            assert torch.equal(run(x[b : b + 1], y[b : b + 1], "difference")[0], together[b])


@pytest.mark.parametrize("size", (8, 4100))
def test_one_y_for_all_samples(size):
    x, y = inputs((3, size))
    want = run(x, y[:1].expand_as(x).contiguous(), "difference")
    assert torch.equal(run(x, y[:1], "difference"), want)


@pytest.mark.parametrize("mode", testing_simt.MODES)
def test_same_bits_in_every_order(mode):
    for shape in ((2, 600), (2, 9001)):
        x, y = inputs(shape)
        assert torch.equal(run(x, y, "product", mode), run(x, y, "product"))


@pytest.mark.parametrize("size", (64, 70, 4096, 5001))
def test_nothing_is_read_past_a_sample_or_written_past_the_sums(size):
    x, y = inputs((2, size))
    with testing.guarded(x, y) as (a, b):  # NaN all around
        got = run(a, b, "product")
    assert torch.equal(got, run(x, y, "product"))


def test_no_elements():
    assert torch.equal(run(torch.ones(3, 0), torch.ones(3, 0), "product"), torch.zeros(3))
    assert run(torch.ones(0, 4), torch.ones(0, 4), "square").shape == (0,)
