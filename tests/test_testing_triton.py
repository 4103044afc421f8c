import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastdiff.kernels import INTERPRET  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRET, reason="TRITON_INTERPRET is 0")
N = 64
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3.4e38, -3.4e38, 1.00390625]


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, flag_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, x * y - x)
    tl.store(out_ptr + 2 * N + i, tl.where(x < y, -x, y))
    tl.store(out_ptr + 3 * N + i, tl.maximum(x, y))
    tl.store(out_ptr + 4 * N + i, tl.abs(x) / 3.0)
    tl.store(flag_ptr + i, (x < y).to(tl.int8))


def test_bfloat16_arithmetic():
    x, y = torch.randn(N).bfloat16(), torch.randn(N).bfloat16()
    out, flag = torch.empty(5, N, dtype=torch.bfloat16), torch.empty(N, dtype=torch.int8)
    _arithmetic_kernel[(1,)](x, y, out, flag, N=N)
    same(out[0], x + y)
    same(out[1], (x * y) - x)
    same(out[2], torch.where(x < y, -x, y))
    same(out[3], torch.maximum(x, y))
    same(out[4], x.abs() / 3.0)
    same(flag, (x < y).to(torch.int8))


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", (torch.float32, torch.bfloat16, torch.float16, torch.int32))
@pytest.mark.parametrize("target", (torch.float32, torch.bfloat16, torch.float16))
def test_casts_round_to_nearest_even(source, target):
    halfway = 1 + torch.arange(N - len(SPECIAL)) * 2.0**-8  # ties of bfloat16 every second element
    x = torch.cat((torch.tensor(SPECIAL), halfway))
    if source == torch.int32:
        x = torch.randint(-1000, 1000, (N,))
    x = x.to(source)
    y = torch.empty(N, dtype=target)
    _cast_kernel[(1,)](x, y, N=N)
    same(y, x.to(target))


def test_casts_of_float8():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wide = torch.empty(256)
    _cast_kernel[(1,)](every, wide, N=256)
    same(wide, every.float())
    known = wide[~wide.isnan()].sort().values
    x = torch.cat((known, (known[1:] + known[:-1]) / 2, torch.randn(8) * 100, torch.zeros(8)))
    x = x[:512]  # all values, and the ties between neighbours
    for source in (torch.float32, torch.float16):
        y = torch.empty(512, dtype=torch.float8_e4m3fn)
        _cast_kernel[(1,)](x.to(source), y, N=512)
        assert torch.equal(y.view(torch.uint8), x.to(source).to(y.dtype).view(torch.uint8))
    big = torch.tensor([1e9, -1e9, float("inf"), float("nan")])
    out = torch.empty(4, dtype=torch.float8_e4m3fn)
    _cast_kernel[(1,)](big, out, N=4)
    same(out.float(), torch.tensor([448.0, -448.0, 448.0, float("nan")]))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(c_ptr + at, c.to(c_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_dot(dtype):
    a, b = torch.randn(N, N).to(dtype), torch.randn(N, N).to(dtype)
    c = torch.empty(N, N)
    _dot_kernel[(1,)](a, b, c, N=N, PRECISION="ieee")
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_dot_of_float8():
    a, b = (torch.randn(N, N).to(torch.float8_e4m3fn) for _ in range(2))
    c = torch.empty(N, N)
    _dot_kernel[(1,)](a, b, c, N=N, PRECISION="ieee")
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_dot_of_float32_is_tf32_unless_asked_otherwise():
    a = torch.full((16, 16), 1 + 2.0**-11)
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](a, torch.eye(16), c, N=16, PRECISION="tf32")
    same(c, torch.ones(16, 16))
    _dot_kernel[(1,)](a, torch.eye(16), c, N=16, PRECISION="ieee")
    same(c, a)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.sum(x).to(tl.float32))
    tl.store(out_ptr + 1, tl.max(x).to(tl.float32))
    tl.store(out_ptr + 2, tl.reduce(x, 0, _larger).to(tl.float32))
    tl.store(out_ptr + 3, tl.argmin(x, 0).to(tl.float32))
    rows = tl.reshape(x, (N // 16, 16))
    tl.store(out_ptr + 4 + tl.arange(0, 16), tl.sum(rows, 0).to(tl.float32))
    tl.store(out_ptr + 20 + tl.arange(0, N), tl.cumsum(x).to(tl.float32))


def test_bfloat16_reductions():
    x = torch.randn(N).bfloat16()
    out = torch.empty(20 + N)
    _reduce_kernel[(1,)](x, out, N=N)
    wide = x.float()
    first = torch.stack((wide.sum(), wide.max(), wide.max(), wide.argmin().float()))
    want = torch.cat((first, wide.view(-1, 16).sum(0), wide.cumsum(0)))
    torch.testing.assert_close(out, want, rtol=2**-8, atol=1e-5)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at + shift, mask=at < n), mask=at < n)


@triton.jit
def _unmasked_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _undefined_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n))


@triton.jit
def _same_place_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK) * 0, tl.load(x_ptr + tl.arange(0, BLOCK)))


@triton.jit
def _every_program_kernel(y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, at * 0 + tl.program_id(0))


@triton.jit
def _atomic_kernel(y_ptr, n):
    tl.atomic_add(y_ptr + n, 1.0)


def test_access_outside_of_the_arguments_is_caught():
    x, y = torch.zeros(100), torch.zeros(100)
    _copy_kernel[(2,)](x, y, 100, 0, BLOCK=64)
    with pytest.raises(Exception, match="load outside of every argument"):
        _copy_kernel[(2,)](x, y, 100, 1, BLOCK=64)
    with pytest.raises(Exception, match="load outside of every argument"):
        _copy_kernel[(2,)](x, y, 100, -1, BLOCK=64)
    with pytest.raises(Exception, match="store outside of every argument"):
        _unmasked_kernel[(1,)](torch.zeros(128), y, BLOCK=128)
    _atomic_kernel[(3,)](y, 99)
    assert y[99] == 3
    with pytest.raises(Exception, match="atomic outside of every argument"):
        _atomic_kernel[(1,)](y, 100)
    same(y[:99], torch.zeros(99))


def test_a_view_is_an_argument_of_its_own():
    whole = torch.zeros(300)
    with pytest.raises(Exception, match="store outside of every argument"):
        _unmasked_kernel[(1,)](torch.ones(128), whole[100:200], BLOCK=128)
    same(whole, torch.zeros(300))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_lanes_masked_off_are_undefined(dtype):
    y = torch.zeros(64, dtype=dtype)
    _undefined_kernel[(1,)](torch.ones(64, dtype=dtype), y, 40, BLOCK=64)
    same(y, torch.tensor([1.0] * 40 + [float("nan")] * 24).to(dtype))


def test_races_are_caught():
    x = torch.arange(64.0)
    with pytest.raises(Exception, match="two lanes give one address different values"):
        _same_place_kernel[(1,)](x, x.clone(), BLOCK=64)
    with pytest.raises(Exception, match="overwrites what another program wrote"):
        _every_program_kernel[(2,)](torch.empty(16, dtype=torch.int32), BLOCK=16)
    shifted = torch.arange(129.0)
    with pytest.raises(Exception, match="overwrites what another program read"):
        _copy_kernel[(2,)](shifted, shifted, 128, 1, BLOCK=64)
    with pytest.raises(Exception, match="reads what another program wrote"):
        _copy_kernel[(2,)](shifted[:128], shifted[1:], 128, 0, BLOCK=64)
