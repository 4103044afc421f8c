import math

import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import sample_sums
from fastdiff.ops.sample_sums import IMPLS, KINDS, _SampleSums

ROWS = testing.rows_of(IMPLS)
# One element, part of a vector, pieces of 4096 with a tail, one dimension, a picture.
SHAPES = (
    (0, 5),
    (3, 0),
    (1, 1),
    (5,),
    (2, 7),
    (1, 64),
    (2, 65),
    (3, 77),
    (2, 3, 1152),
    (1, 4096),
    (2, 4097),
    (2, 4, 33, 65),
)


def pair(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(2)]


def exact(x, y, kind):
    """In float64; and the sums of magnitudes that errors are relative to."""
    x, y = (t.double()[..., None].flatten(1) for t in (x, y))
    terms = {"square": x * x, "product": x * y, "difference": (x - y) ** 2}[kind]
    return terms.sum(1), terms.abs().sum(1)


def given(kind, y):
    return None if kind == "square" else y


def check(got, x, y, kind, most=4e-7):
    want, size = exact(x, y, kind)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert ((got.double() - want).abs() <= most * size).all()


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_against_float64(row, kind, dtype):
    for shape in SHAPES:
        x, y = pair(shape, dtype)
        with testing.unchanged(x, y):
            got = sample_sums(x, given(kind, y), kind=kind, impl=row)
        check(got, x, y, kind)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_layouts_have_the_same_bits(row, kind, layout):
    for shape in ((5,), (3, 77), (3, 5, 1152), (2, 3, 41, 41)):
        x, y = pair(shape)
        want = sample_sums(x, given(kind, y), kind=kind, impl=row)
        x, y = testing.lay(x, layout), testing.lay(y, layout)
        assert torch.equal(sample_sums(x, given(kind, y), kind=kind, impl=row), want)


@pytest.mark.parametrize("row", ROWS)
def test_other_memory(row):
    """Channels last, every second sample, one sample for all, turned samples."""
    x, y = pair((4, 3, 40, 41))
    want = sample_sums(x, y, kind="product", impl=row)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(sample_sums(last, y, kind="product", impl=row), want)
    assert torch.equal(sample_sums(x[::2], y[::2], kind="product", impl=row), want[::2])
    turned = sample_sums(x.flip(0), y.flip(0), kind="product", impl=row)
    assert torch.equal(turned, want.flip(0))
    same = x[:1].expand(4, -1, -1, -1)
    assert torch.equal(sample_sums(same, impl=row), sample_sums(x[:1], impl=row).expand(4))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("row", ROWS)
def test_one_y_for_all_samples(row, kind):
    for shape in ((1, 9), (5,), (3, 7), (3, 2, 4097)):
        x, y = pair(shape)
        want = sample_sums(x, y[:1].expand_as(x).contiguous(), kind=kind, impl=row)
        assert torch.equal(sample_sums(x, y[:1], kind=kind, impl=row), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_a_sample_does_not_depend_on_its_batch(row, kind):
    for size in (1, 77, 4097, 20001):
        x, y = pair((7, size))
        together = sample_sums(x, given(kind, y), kind=kind, impl=row)
        for b in range(7):
            alone = sample_sums(x[b : b + 1], given(kind, y[b : b + 1]), kind=kind, impl=row)
            assert torch.equal(alone[0], together[b]), (size, b)


@pytest.mark.parametrize("row", ROWS)
def test_threads_do_not_change_bits(row):
    x, y = pair((3, 50001))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(sample_sums(x, y, kind="difference", impl=row))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_error_of_large_samples(row, kind):
    """What a step of a latent has, also far from 0, where all terms have one sign."""
    for shape in ((2, 4 * 64 * 64), (1, 4 * 64 * 64 * 16)):
        for away in (0.0, 3.0):
            x, y = pair(shape, seed=1)
            check(sample_sums(x + away, given(kind, y - away), kind=kind, impl=row),
                  x + away, y - away, kind, 2e-7)  # fmt: skip


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels(level, dtype):
    with testing.cpu_level(level):
        for kind in KINDS:
            for shape in SHAPES:
                x, y = pair(shape, dtype)
                check(sample_sums(x, given(kind, y), kind=kind, impl="native"), x, y, kind)


@pytest.mark.parametrize("row", ROWS)
def test_infinities_and_nan_stay_in_their_sample(row):
    x, y = pair((5, 100))
    x[1, 7], x[2, 99], y[3, 0], x[4, 5], y[4, 5] = math.inf, math.nan, -math.inf, math.inf, math.inf
    got = sample_sums(x, y, kind="difference", impl=row)
    want = (x - y).square().sum(1)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got[0].isfinite() and got[[1, 3]].isinf().all() and got[[2, 4]].isnan().all()


def test_float64_is_the_references():
    x, y = (t.double() for t in pair((2, 500)))
    got = sample_sums(x, y, kind="product")
    assert got.dtype == torch.float64 and torch.equal(got, (x * y).sum(1))
    for row in ROWS[:-1]:
        with pytest.raises(fastdiff.NoImpl, match="dtype torch.float64 is not"):
            sample_sums(x, impl=row)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
@pytest.mark.parametrize("kind", KINDS)
def test_every_triton_configuration(kind):
    from fastdiff.kernels import sample_sums as kernel

    for shape in ((3, 7), (2, 4097), (1, 600, 999)):
        x, y = pair(shape)
        args = x, given(kind, y), kind == "difference"
        for name, got in testing.run_configs(kernel.sample_sums, kernel.CONFIGS, *args):
            assert got.dtype == torch.float32, name
            check(got, x, y, kind)


def gradients(kind, row, x, y, weights):
    """First derivatives, and those of a function of them."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    inputs = (x,) if kind == "square" else (x, y)
    out = sample_sums(*inputs, kind=kind, impl=row).double()
    first = torch.autograd.grad((out.square() * weights).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(f.double().pow(3).sum() for f in first), inputs)
    return [*first, *second]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_gradients_and_theirs_against_float64(row, kind, shared):
    for shape in ((3,), (3, 7), (2, 3, 65)):
        x, y = pair(shape)
        y = y[:1] if shared else y
        weights = torch.linspace(0.5, 2, shape[0]).double()
        want = gradients(kind, "ref", x.double(), y.double(), weights)
        got = gradients(kind, row, x, y, weights)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == torch.float32 and g.shape == w.shape
            assert (g.double() - w).abs().max() <= 2e-5 * w.abs().max()


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_gradients_of_each_alone_and_their_dtype(row, dtype):
    x, y = pair((2, 33), dtype)
    for kind in KINDS[1:]:
        both = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        sample_sums(*both, kind=kind, impl=row).sum().backward()
        for i in range(2):
            one = [x.clone(), y.clone()]
            one[i].requires_grad_()
            sample_sums(*one, kind=kind, impl=row).sum().backward()
            assert one[i].grad.dtype == dtype and one[1 - i].grad is None
            torch.testing.assert_close(one[i].grad, both[i].grad, rtol=0, atol=0)
    torch.testing.assert_close(both[0].grad, (2 * (x.float() - y.float())).to(dtype))  # the last


def test_forward_mode_is_the_references():
    x, y = pair((2, 9))

    def distance(x, y):
        return sample_sums(x, y, kind="difference")

    with fastdiff.dispatch.record() as rows:
        _, tangent = torch.func.jvp(distance, (x, y), (y, x))
    torch.testing.assert_close(tangent, 2 * ((x - y) * (y - x)).sum(1))
    assert set(rows) == {("sample_sums", "ref")}


def test_no_graph_without_gradients():
    x, _ = pair((2, 9))
    assert sample_sums(x).grad_fn is None
    x.requires_grad_()
    assert isinstance(sample_sums(x, impl="native").grad_fn, _SampleSums._backward_cls)
    with torch.no_grad():
        assert sample_sums(x).grad_fn is None


def test_opcheck_and_compile():
    x, y = pair((3, 4, 5))
    for args in ((x, None, False), (x, y, False), (x, y[:1], True), (x[:0], None, False)):
        torch.library.opcheck(torch.ops.fastdiff.sample_sums.default, args)
    testing.check_compile(lambda x, y: sample_sums(x, y, kind="difference") + sample_sums(x), x, y)


def test_compiled_gradient():
    x, y = pair((3, 40))

    def step(x, y):
        return sample_sums(x, y, kind="difference").sqrt().sum()

    def grads(function):
        inputs = [t.clone().requires_grad_() for t in (x, y)]
        return torch.autograd.grad(function(*inputs), inputs)

    torch._dynamo.reset()
    torch.testing.assert_close(grads(torch.compile(step, fullgraph=True)), grads(step))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(kind="cube"), "kind is 'cube', need one of square, product, difference"),
        (dict(y=torch.ones(2, 3)), "y is given with kind 'square', need None"),
        (dict(kind="product"), "y is None with kind 'product', need a tensor like x"),
        (dict(kind="product", y=torch.ones(2, 3).half()), "y is torch.float16, need torch.float32"),
        (
            dict(kind="difference", y=torch.ones(2, 1)),
            r"y has shape \[2, 1\], need \[2, 3\] or \[1, 3\]",
        ),
        (dict(kind="product", y=torch.ones(3)), r"y has shape \[3\], need \[2, 3\]"),
        (dict(x=torch.ones(())), r"x has shape \[\], need at least 1 dimensions"),
        (dict(x=torch.ones(2, 3).int()), "x is torch.int32, need float16"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=f"sample_sums: {message}"):
        sample_sums(**{"x": torch.ones(2, 3), **call})
