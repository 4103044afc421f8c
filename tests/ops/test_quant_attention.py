import itertools
import sys

import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.ops.quant_attention import IMPLS, MOST_DIM, quant_attention

ROWS = testing.rows_of(IMPLS)
LENGTHS = (1, 7, 64, 65, 77, 256)
HEAD_DIMS = (40, 64, 72, 80, 128)
# Queries, keys, head dimension, that of v: tails of tiles, of words of four channels, of blocks.
ODD = [(7, 65, 40, 40), (65, 1, 64, 24), (1, 77, 72, 72), (77, 256, 80, 7), (50, 129, 7, 9)]
ODD += [(33, 64, 128, 128), (3, 5, 1, 1), (48, 128, 4, 64), (49, 16, 132, 16)]


def make(rows, keys, dim, value_dim=None, dtype=torch.float32, *, mean=0.0, batch=2, heads=3):
    gen = torch.Generator().manual_seed(rows + 1000 * keys + dim)
    randn = lambda *size: torch.randn(batch, heads, *size, generator=gen)  # noqa: E731
    q, k, v = randn(rows, dim), randn(keys, dim) + mean, randn(keys, value_dim or dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def float64(q, k, v, scale=None):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)


def check(row, args, what="", **kwargs):
    """The row against the specification in float64, with the error of that in the dtype."""
    exact = quant_attention(*(t.double() for t in args), **kwargs, impl="ref")
    near = quant_attention(*args, **kwargs, impl="ref")
    with testing.unchanged(*args):
        got = quant_attention(*args, **kwargs, impl=row)
    assert got.dtype == args[0].dtype
    testing.assert_close(got, exact, near, what=f"{row} {what}")
    if row != "ref":
        assert got.transpose(1, 2).is_contiguous()
    return got


def distance(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_matches_the_specification(row, dtype):
    for shape in [*ODD, (0, 5, 8, 8), (5, 0, 8, 8), (2, 3, 8, 8)]:
        for mean in (0.0, 20.0):
            for smooth in (True, False):
                args = make(*shape, dtype, mean=mean, heads=2)
                check(row, args, f"{shape} {mean} {smooth}", smooth=smooth)
    args = make(9, 33, 40, dtype=dtype)
    for scale in (0.0, -0.5, 3.0):
        check(row, args, f"scale {scale}", scale=scale)
    assert quant_attention(*make(5, 0, 8), impl=row).eq(0).all()
    assert quant_attention(*make(5, 3, 8, batch=0), impl=row).shape == (0, 3, 5, 8)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels(level, dtype):
    first = fastdiff.cpu_levels()[0]
    shapes = [(n, m, d, d) for n, m, d in itertools.product(LENGTHS, LENGTHS, HEAD_DIMS)]
    for shape in shapes + ODD:
        args = make(*shape, dtype, mean=2.0, heads=1 if shape in shapes else 3)
        with testing.cpu_level(level):
            got = check("native", args, f"{level} {shape}")
        with testing.cpu_level(first):  # integers are equal, and all else is in one order
            want = quant_attention(*args, impl="native")
        assert torch.equal(got, want), f"{level} and {first} differ: {shape}"


@pytest.mark.parametrize("row", ROWS)
def test_near_attention_in_float64(row):
    """1 % of normal inputs; of keys with a large common part too, for they are smoothed."""
    shapes = (64, 77, 40), (65, 256, 64), (77, 65, 72), (256, 77, 80), (65, 64, 128)
    for rows, keys, dim in shapes:
        args = make(rows, keys, dim)
        exact = float64(*args)
        for smooth in (True, False):
            error = distance(quant_attention(*args, smooth=smooth, impl=row), exact)
            assert 1e-4 < error <= 1e-2, f"{rows} {keys} {dim} {smooth}: {error}"
        args = make(rows, keys, dim, mean=20.0)
        exact = float64(*args)
        error = distance(quant_attention(*args, impl=row), exact)
        rough = distance(quant_attention(*args, smooth=False, impl=row), exact)
        assert error <= 1e-2 and rough >= 5 * error, f"{rows} {keys} {dim}: {error}, {rough}"


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("row", ROWS)
def test_integer_products_are_exact(row, level):
    """Of rows that are integers already, with a largest of 127: one unit is 1e-5 of a weight."""
    gen = torch.Generator().manual_seed(0)
    for dim in (4, 30, 64, 132):
        q, k = (torch.randint(-127, 128, (1, 2, n, dim), generator=gen).float() for n in (37, 50))
        q[..., 0], k[..., -1] = 127, -127
        v = torch.eye(50).expand(1, 2, 50, 50)  # the weights themselves
        exact = float64(q, k, v, 1e-5)
        with testing.cpu_level(level):
            got = quant_attention(q, k, v, scale=1e-5, smooth=False, impl=row)
        assert ((got / exact - 1).abs() < 4e-6).all(), f"{dim}"
    for signs in ((1, 1), (1, -1), (-1, -1)):  # all values the largest there are
        q, k = (sign * torch.full((1, 1, 9, 64), 127.0) for sign in signs)
        k[:, :, ::2, 1::2] *= -1
        k[:, :, 1] *= -1
        v = torch.eye(9).expand(1, 1, 9, 9)
        with testing.cpu_level(level):
            got = quant_attention(q, k, v, scale=2e-6, smooth=False, impl=row)
        torch.testing.assert_close(got.double(), float64(q, k, v, 2e-6), rtol=2e-6, atol=0)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_layouts(row, dtype, layout):
    args = make(19, 37, 40, dtype=dtype)
    check(row, tuple(testing.lay(t, layout) for t in args), layout)
    packed = torch.randn(2, 19, 3, 2, 40).to(dtype)  # the projection of a fused q, k, v
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    want = quant_attention(*(t.contiguous() for t in (q, k, v)), impl=row)
    assert torch.equal(check(row, (q, k, v), "packed"), want) or row == "ref"
    shared = k[:1].expand(2, -1, -1, -1)
    check(row, (q, shared, v[:, :1].expand(-1, 2, -1, -1)), "expanded")


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_reads_and_writes_nothing_outside(level, dtype):
    for shape in ODD:
        args = make(*shape, dtype)
        with testing.cpu_level(level):
            want = quant_attention(*args, impl="native")
            with testing.guarded(*args) as copies:
                assert torch.equal(quant_attention(*copies, impl="native"), want), shape


@pytest.mark.parametrize("threads", (1, 2, 3, 7))
def test_threads_leave_no_trace(threads):
    before = torch.get_num_threads()
    for args in (make(171, 140, 40, heads=1), make(3, 5, 8, batch=1, heads=1)):
        want = quant_attention(*args, impl="native")
        torch.set_num_threads(threads)
        try:
            got = quant_attention(*args, impl="native")
        finally:
            torch.set_num_threads(before)
        assert torch.equal(got, want)


@pytest.mark.parametrize("row", [r for r in ROWS if r != "ref"])
def test_a_sample_is_what_it_is_alone(row):
    """And a head; natively a query row too. Elsewhere products are of other shapes then."""
    q, k, v = make(70, 65, 40)
    whole = quant_attention(q, k, v, impl=row)
    for b, h in ((0, 0), (1, 2)):
        at = (slice(b, b + 1), slice(h, h + 1))
        assert torch.equal(quant_attention(q[at], k[at], v[at], impl=row), whole[at])
        if row == "native":
            one = quant_attention(q[at][:, :, 33:34], k[at], v[at], impl=row)
            assert torch.equal(one, whole[at][:, :, 33:34])


@pytest.mark.parametrize("row", ROWS)
def test_zeros_and_equal_keys(row):
    q, k, v = make(9, 33, 40)
    mean = v.mean(2, keepdim=True).expand(-1, -1, 9, -1)
    for args in ((q * 0, k, v), (q, k * 0, v), (q, k[:, :, :1].expand_as(k), v), (q * 1e-37, k, v)):
        got = check(row, args)
        torch.testing.assert_close(got, mean)
    q, k = q.clone(), k.clone()
    q[0, 1, 3], k[1, 0, 5] = 0, 0
    check(row, (q, k, v), "a row of zeros")
    check(row, (q, k, v), "a row of zeros", smooth=False)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("row", ROWS)
def test_what_is_not_finite_shows(row, value):
    q, k, v = make(21, 150, 40)
    for smooth in (True, False):
        base = quant_attention(q, k, v, smooth=smooth, impl=row)
        for place in (0, 39):
            bad = q.clone()
            bad[0, 1, 3, place] = value
            got = quant_attention(bad, k, v, smooth=smooth, impl=row)
            assert got[0, 1, 3].isnan().all()
            got[0, 1, 3] = base[0, 1, 3]
            assert torch.equal(got, base)
        for key in (0, 149):
            bad = k.clone()
            bad[1, 0, key, 7] = value
            got = quant_attention(q, bad, v, smooth=smooth, impl=row)
            assert got[1, 0].isnan().all()
            got[1, 0] = base[1, 0]
            assert torch.equal(got, base)
    bad = v.clone()
    bad[1, 0, 3, 5] = torch.nan
    got = quant_attention(q, k, bad, impl=row)
    assert got[1, 0, :, 5].isnan().all() and got.isnan().sum() == 21
    huge = quant_attention(q * 1e30, k * 1e30, v, impl=row)  # scores overflow
    assert huge.isnan().all()
    large = quant_attention(q * 60, k, v, impl=row)
    assert large.isfinite().all()


def test_memory_is_linear_in_the_lengths():
    rows, dim = 3000, 32
    args = make(rows, rows, dim, batch=1, heads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            quant_attention(*args, impl="native")
    finally:
        torch.set_num_threads(before)
    taken = sum(max(e.cpu_memory_usage, 0) for e in profile.events() if e.name == "aten::empty")
    # Keys as int8 with scales and sums, V repacked, the output; then the tiles, which do not grow
    assert 0 < taken < rows * (dim + 8 + 4 * dim + 4 * dim) + 2**18 < 4 * rows * rows / 10


def test_gradients_are_refused():
    q, k, v = make(4, 5, 8)
    q.requires_grad_()
    why = fastdiff.explain(quant_attention, q, k, v)
    assert all("no backward" in why[row] for row in ROWS)
    with pytest.raises(fastdiff.NoImpl, match="every row refuses"):
        quant_attention(q, k, v)
    with pytest.raises(fastdiff.NoImpl, match="no forward-mode derivative|no derivative"):
        torch.func.jvp(lambda k: quant_attention(q.detach(), k, v), (k,), (k,))


def test_compile_and_opcheck():
    args = make(9, 33, 40, 24)
    testing.check_compile(quant_attention, *args)
    testing.check_compile(quant_attention, *args, smooth=False, impl="ref")
    if "native" in ROWS:
        op = torch.ops.fastdiff.quant_attention.default
        torch.library.opcheck(op, (*args, 0.1, True))
        torch.library.opcheck(op, (*make(0, 3, 8), 0.1, False))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in args]
        for row in ("native", "ref"):
            assert quant_attention(*fake, impl=row).shape == (2, 3, 9, 24)


def test_every_triton_config():
    from fastdiff.kernels import quant_attention as kernels

    for dtype in testing.DTYPES:
        args = make(70, 75, 40, 24, dtype, mean=5.0)
        exact = quant_attention(*(t.double() for t in args), impl="ref")
        near = quant_attention(*args, impl="ref")
        launch = kernels.quant_attention
        for name, out in testing.run_configs(launch, kernels.CONFIGS, *args, 40**-0.5, True):
            testing.assert_close(out, exact, near, what=name)


def test_integers_of_the_triton_row_are_those_of_the_reference():
    from fastdiff.kernels.quant_attention import _int8_rows

    ref = sys.modules[quant_attention.__module__]._int8_rows
    for dtype in testing.DTYPES:
        x = make(130, 1, 72, dtype=dtype)[0]
        x[0, 0, 3], x[0, 0, 4, 7], x[0, 0, 5, 1] = 0, torch.nan, torch.inf
        x[0, 0, 6] = 1e-38 if dtype == torch.float32 else 0
        mean = x[:, :, 9].float().contiguous()
        for taken in (None, mean):
            want = ref(x.float() if taken is None else x.float() - mean[:, :, None])
            q, s = _int8_rows(x, taken, 80)
            assert torch.equal(q[..., :72].float(), want[0]) and q[..., 72:].eq(0).all()
            torch.testing.assert_close(s, want[1][..., 0], rtol=0, atol=0, equal_nan=True)


Q = torch.ones(2, 3, 4, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": 3}, "quant_attention: q is int, need a torch.Tensor"),
        ({"q": Q[0]}, r"q has shape \[3, 4, 8\], need 4 dimensions"),
        ({"k": Q.half()}, "k is torch.float16, need torch.float32, the dtype of q"),
        ({"k": Q[:, :1]}, r"k has shape \[2, 1, 4, 8\], need \[2, 3, 4, 8\]"),
        ({"v": Q[:, :, :3]}, r"v has shape \[2, 3, 3, 8\], need \[2, 3, 4, 8\]"),
        ({"v": Q[0]}, r"v has shape \[3, 4, 8\], need 4 dimensions"),
        ({"v": Q.to("meta")}, "v is on meta, need cpu"),
        ({"q": Q[..., :0], "k": Q[..., :0]}, f"need a head dimension of 1 to {MOST_DIM}"),
        ({"scale": float("nan")}, "scale is nan, need a finite number"),
        ({"smooth": "yes"}, "smooth is 'yes', need True or False"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        quant_attention(**{"q": Q, "k": Q, "v": Q, **change})


def test_refusals_of_the_triton_row():
    wide = torch.ones(1, 1, 2, 260)
    why = fastdiff.explain(quant_attention, wide, wide, wide[..., :8])
    assert "head dimension 260 of q is above 256" in why["triton"] and why["native"] is None
    why = fastdiff.explain(quant_attention, wide[..., :8], wide[..., :8], wide[..., :132])
    assert "head dimension 132 of v is above 128" in why["triton"] and why["native"] is None
    double = torch.ones(1, 1, 2, 8, dtype=torch.float64)
    why = fastdiff.explain(quant_attention, double, double, double)
    assert "float64" in why["native"] and why["ref"] is None
