"""The CUDA kernels of quant_attention, in the model, against the specification in float64."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import fastdiff
from fastdiff import testing, testing_simt
from fastdiff.ops.quant_attention import CUDA_MAX_DIM, TINY, quant_attention

DTYPES = testing.DTYPES
# Queries, keys, D, that of v: tiles are of 64 keys (32 of float32, and above 160 channels) and 16
# rows a warp; channels are up to 48, 64, 80, 128, 160, 256.
SHAPES = [(7, 65, 40, 40), (65, 1, 64, 24), (1, 77, 72, 72), (33, 130, 80, 7), (50, 129, 7, 9)]
SHAPES += [(33, 64, 128, 128), (3, 5, 1, 1), (48, 128, 4, 64), (17, 33, 100, 127)]
WIDE = [(49, 16, 132, 16), (17, 66, 160, 160), (9, 97, 256, 250), (21, 31, 50, 200)]
MODE = (0, False, False)


def make(rows, keys, dim, value_dim=None, dtype=torch.float32, *, mean=0.0, batch=2, heads=2):
    randn = lambda *size: torch.randn(batch, heads, *size)  # noqa: E731
    q, k, v = randn(rows, dim), randn(keys, dim) + mean, randn(keys, value_dim or dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(args, mode=MODE, **kwargs):
    with testing.unchanged(*args), testing_simt.emulated(*mode):
        return quant_attention(*args, **kwargs, impl="native")


def check(args, what="", **kwargs):
    """As near to the specification in float64 as that in the dtype is, twice over."""
    got = run(args, **kwargs)
    exact = quant_attention(*(t.double() for t in args), **kwargs, impl="ref")
    near = quant_attention(*args, **kwargs, impl="ref")
    assert got.dtype == args[0].dtype and got.transpose(1, 2).is_contiguous()
    testing.assert_close(got, exact, near, what=f"{what} {kwargs}")
    return got


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_specification(dtype):
    for shape in SHAPES if dtype == torch.float32 else SHAPES + WIDE:
        for mean, smooth in ((0.0, False), (20.0, True)):
            check(make(*shape, dtype, mean=mean), f"{shape} {mean}", smooth=smooth)
    for scale in (0.0, -0.5, 3.0):
        check(make(9, 70, 40, dtype=dtype), scale=scale)


def test_the_mean_is_that_of_float64():
    """Of keys whose sum in float32 would be off by a sixteenth, their own spread being one."""
    check(make(9, 150, 40, mean=2.0**16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_in_and_nothing_out(dtype):
    assert run(make(17, 0, 40, 24, dtype)).eq(0).all()
    assert run(make(17, 0, 40, 24, dtype), smooth=False).eq(0).all()
    for shape in ((0, 5, 8, 8), (5, 3, 8, 0)):
        assert run(make(*shape[:3], dtype=dtype)[:2] + make(*shape, dtype)[2:]).numel() in (0, 160)
    assert run(make(5, 3, 8, batch=0, dtype=dtype)).shape == (0, 2, 5, 8)


def test_integer_products_are_exact():
    """Of rows that are integers already, with a largest of 127: one unit is 1e-5 of a weight."""
    for dim in (4, 30, 64, 128):
        q, k = (torch.randint(-127, 128, (1, 2, n, dim)).float() for n in (37, 50))
        q[..., 0], k[..., -1] = 127, -127
        v = torch.eye(50).expand(1, 2, 50, 50)  # the weights themselves
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1e-5)
        got = run((q, k, v), scale=1e-5, smooth=False)
        assert ((got / exact - 1).abs() < 4e-6).all(), dim
    for signs in ((1, 1), (1, -1), (-1, -1)):  # all values the largest there are
        q, k = (sign * torch.full((1, 1, 9, 64), 127.0) for sign in signs)
        k[:, :, ::2, 1::2] *= -1
        got = run((q, k, torch.eye(9)[None, None]), scale=2e-6, smooth=False)
        exact = F.scaled_dot_product_attention(*(t.double() for t in (q, k)), scale=2e-6,
                                               value=torch.eye(9).double()[None, None])  # fmt: skip
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=0)


def rows_of_every_kind(rows, dim):
    """Of one size, so that an integer more changes every weight's logarithm alike."""
    x = torch.randn(2, 2, rows, dim)
    x[:, :, 0] = torch.linspace(-127, 127, dim)
    x[:, :, 1] = torch.arange(dim) - dim // 2 + 0.5  # halves go to the even neighbour
    x[:, :, 2] = (torch.arange(dim) - dim // 2 + 0.5) / 3
    x[:, :, 1, 0] = 127
    return x / x.abs().amax(-1, keepdim=True) * 127 * (1 + torch.rand(2, 2, rows, 1) / 8)


@pytest.mark.parametrize("layout", ("contiguous", "misaligned"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (72, 37))
def test_every_integer_is_that_of_the_reference(dim, dtype, layout):
    """Against rows with one element each, and values of one: the weights tell the integers."""
    x = testing.lay(rows_of_every_kind(20, dim).to(dtype), layout)
    one = 127 * torch.eye(dim, dtype=dtype).expand(2, 2, dim, dim)
    reach = 6 if dtype == torch.bfloat16 else 3  # of a score: less than half a step is rounded off
    scale = reach / 127**2 / 1.125
    for name, args, smooth in (("q", (x, one), False), ("k", (one, x), False), ("k", (one, x), 1)):
        value = torch.eye(args[1].shape[2], dtype=dtype).expand(2, 2, -1, -1)
        how = {"scale": scale, "smooth": bool(smooth)}
        got = run((*args, value), **how).double().log()
        want = quant_attention(*(t.double() for t in (*args, value)), **how, impl="ref").log()
        assert (got - want).abs().max() < 0.4 * reach / 127 / 1.125, f"{name} {smooth}"


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, layout):
    q, k, v = make(19, 67, 40, dtype=dtype, mean=1.0)
    args = tuple(testing.lay(t, layout) for t in (q, k, v))
    want = check(args, layout)
    if q.stride() != args[0].stride() or layout != "contiguous":
        assert torch.equal(run((q, k, v)), want)
    for i in range(3):  # one of them alone
        some = [args[j] if i == j else (q, k, v)[j] for j in range(3)]
        assert torch.equal(run(some), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    packed = torch.randn(2, 19, 3, 2, 40).to(dtype)  # the projection of a fused q, k, v
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    want = run([t.contiguous() for t in (q, k, v)])
    assert torch.equal(check((q, k, v), "packed"), want)
    wide = torch.randn(3, 2, 2, 19, 42).to(dtype)  # aligned, and its rows are not
    rows = wide[..., :40].unbind()
    assert torch.equal(check(rows, "rows of 42"), run([t.contiguous() for t in rows]))
    check((q, k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1)), "expanded")
    check((q[:, :, :1].expand(-1, -1, 19, -1), k, v[:, :, :1].expand(-1, -1, 19, -1)), "one row")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_is_what_it_is_alone(dtype):
    q, k, v = make(35, 70, 40, 48, dtype)
    whole = check((q, k, v))
    for b, h in ((0, 1), (1, 0)):
        at = (slice(b, b + 1), slice(h, h + 1))
        assert torch.equal(run((q[at], k[at], v[at])), whole[at])
    assert torch.equal(run((q[:, :, 33:34], k, v)), whole[:, :, 33:34])


def test_a_full_grid_has_blocks_of_eight_warps():
    testing_simt.counters()
    args = make(113, 33, 80, 80, torch.bfloat16, heads=64)
    check(args, smooth=False)
    assert testing_simt.counters()["threads"] == 128 * 8 * 32 + 128 * 256
    args = make(113, 33, 80, 80, torch.bfloat16, heads=1)
    check(args)
    assert testing_simt.counters()["threads"] == 2 * (2 * 4 * 32 + 256 + 3 * 512)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_equal_keys(dtype):
    q, k, v = make(9, 70, 40, dtype=dtype)
    mean = v.float().mean(2, keepdim=True).expand(-1, -1, 9, -1).to(dtype)
    small = 1e-37 if dtype == torch.float32 else 0
    for args in ((q * 0, k, v), (q, k * 0, v), (q, k[:, :, :1].expand_as(k), v), (q * small, k, v)):
        torch.testing.assert_close(check(args), mean)
    q, k = q.clone(), k.clone()
    q[0, 1, 3], k[1, 0, 5] = 0, 0
    check((q, k, v), "a row of zeros", smooth=False)


def test_rows_at_the_ends_of_the_range():
    """A row below TINY is 0, one at it is none."""
    q = torch.ones(1, 1, 4, 8)
    q[..., 0, :] *= TINY
    q[..., 1, :] *= TINY * (1 - 2.0**-23)
    k, v = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    got = check((q, k * 2.0**60, v), scale=2.0**60)
    torch.testing.assert_close(got[0, 0, 1], v[0, 0].mean(0))
    assert (got[0, 0, 0] - got[0, 0, 1]).abs().max() > 1e-3
    check((q * 3e38, k * 2.0**-60, v), scale=2.0**-60)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows(dtype, value):
    q, k, v = make(21, 150, 40, dtype=dtype)
    for smooth in (True, False):
        base = run((q, k, v), smooth=smooth)
        bad = q.clone()
        bad[0, 1, 3, 0] = bad[1, 0, 20, 39] = value
        got = run((bad, k, v), smooth=smooth)
        for at in ((0, 1, 3), (1, 0, 20)):
            assert got[at].isnan().all()
            got[at] = base[at]
        assert torch.equal(got, base)
        for key in (0, 149):
            bad = k.clone()
            bad[1, 0, key, 7] = value
            got = run((q, bad, v), smooth=smooth)
            assert got[1, 0].isnan().all()
            got[1, 0] = base[1, 0]
            assert torch.equal(got, base)
    bad = v.clone()
    bad[1, 0, 3, 5], bad[0, 0, 149, 39] = value, value
    base, got = run((q, k, v)), run((q, k, bad))
    for at in ((1, 0, slice(None), 5), (0, 0, slice(None), 39)):
        assert got[at].equal(torch.full_like(got[at], value)) or math.isnan(value)
        assert not got[at].isfinite().any()
        got[at] = base[at]
    assert torch.equal(got, base)
    testing.assert_close(run((q, k, bad)), quant_attention(q.double(), k.double(), bad.double(),
                         impl="ref"), quant_attention(q, k, bad, impl="ref"))  # fmt: skip


def test_scores_that_overflow():
    q, k, v = make(9, 70, 40)
    assert run((q * 1e30, k * 1e30, v)).isnan().all()
    assert run((q.abs() * 1e30, -k.abs() * 1e30, v), smooth=False).isnan().all()  # all of them -inf
    assert check((q * 60, k, v)).isfinite().all()
    # Some are -inf: their keys weigh nothing, in the first tile or a later one.
    q, k = q.abs() * 1e20, k.abs()
    for part in (slice(0, 66), slice(40, 70)):
        some = k * 1e-20
        some[:, :, part] = k[:, :, part] * -1e20
        assert check((q, some, v), smooth=False).isfinite().all()


def test_the_parts_of_float32_values():
    """Every bit of a value, of the largest and of the smallest; one key takes all the weight."""
    v = torch.randn(1, 1, 40, 64)
    v[0, 0, 1] = 3.4028235e38 * torch.linspace(-1, 1, 64)
    v[0, 0, 2] = torch.linspace(1, 2, 64) * 2.0**-110
    v[0, 0, 3] = (2 - 2.0**-23) * torch.linspace(-1, 1, 64).sign()
    k = torch.eye(40).mul(127)[None, None]
    got = run((k, k, v), scale=1.0, smooth=False)
    assert torch.equal(got, v)


@pytest.mark.parametrize(
    "shape, dtype",
    [((35, 150, 40, 48), torch.bfloat16), ((35, 70, 72, 80), torch.float32),
     ((20, 70, 256, 33), torch.float16)],
    ids=str,
)  # fmt: skip
def test_same_bits_in_every_order(shape, dtype):
    args = make(*shape, dtype, batch=1)
    want = check(args)
    for mode in testing_simt.MODES[1:]:
        assert torch.equal(run(args, mode), want), mode


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (48, 64, 80, 128, 160, 256))
def test_tensor_cores_are_fed_without_bank_conflicts(dim, dtype):
    if dim > CUDA_MAX_DIM[dtype]:
        return
    rows, keys, width, products = 32, 128, -(-dim // 32), 6 if dtype == torch.float32 else 1
    args = make(rows, keys, dim, dim, dtype, batch=1, heads=1)
    testing_simt.counters()
    run(args)
    seen = testing_simt.counters()
    assert seen["bank_conflicts"] == 0
    tiles = rows // 16 * (keys // 8)
    parts = 3 if dtype == torch.float32 else 1
    assert seen["mma"] == tiles * (width + products * (dim // 16))
    assert seen["ldmatrix"] == tiles * (width + parts * (dim // 16)) // 2
    assert seen["copies"] == keys * (2 * width + parts * dim // 8) + keys // 4  # none twice


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_nothing_outside(dtype):
    for shape in ((7, 65, 40, 40), (33, 70, 37, 9), (1, 1, 64, 64)):
        args = make(*shape, dtype)
        want = run(args)
        with testing.guarded(*args) as copies:
            assert torch.equal(run(copies), want), shape


def test_refusals():
    for dtype, most in CUDA_MAX_DIM.items():
        for dim, value_dim in ((most + 1, 8), (8, most + 1)):
            args = make(3, 3, dim, value_dim, dtype)
            with pytest.raises(
                RuntimeError, match=r"quant_attention: the launch failed: .*\(801\)"
            ):
                run(args)
            with FakeTensorMode():
                q, k, v = (torch.empty(t.shape, dtype=dtype, device="cuda") for t in args)
                why = fastdiff.explain(quant_attention, q, k, v)["native"]
            assert f"head dimension {most + 1} is above {most}" in why
