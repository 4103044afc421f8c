"""The CUDA kernels of tokens by index, in the model, against the reference and float64."""

import pytest
import torch

from fastdiff import testing_simt
from fastdiff.ops import gather_tokens, scatter_tokens, update_tokens_
from fastdiff.testing import GUARD, assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATES = ("none", "per sample", "per token")
# (B, N, A, D): rows of 16 bytes at once and by element, more rows than a block has, more index than
# a block has threads, no active row, rows longer than a warp holds at once.
SHAPES = ((2, 9, 4, 64), (1, 150, 37, 24), (2, 20, 300, 37), (1, 5, 0, 8), (1, 3, 2, 2312))


def inputs(shape, dtype, gate):
    B, N, A, D = shape
    x, y = torch.randn(B, N, D).to(dtype), torch.randn(B, A, D).to(dtype)
    gates = {"none": None, "per sample": torch.randn(B, D), "per token": torch.randn(B, A, D)}
    g = gates[gate]
    return x, torch.randint(N, (B, A)), y, None if g is None else g.to(dtype)


def compare(x, index, y, gate, mode=(0, False, False)):
    """Both ops in the model: rows have their bits, sums are as near to float64 as the reference."""
    with testing_simt.emulated(*mode):
        taken = gather_tokens(x, index, impl="native")
        got = scatter_tokens(x, index, y, gate, impl="native")
    assert torch.equal(taken, gather_tokens(x, index, impl="ref"))
    eager = scatter_tokens(x, index, y, gate, impl="ref")
    if gate is None:
        assert torch.equal(got, eager)
    exact = scatter_tokens(
        x.double(), index, y.double(), None if gate is None else gate.double(), impl="ref"
    )
    assert_close(got, exact, eager)
    return got


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype, gate):
    compare(*inputs(shape, dtype, gate))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_grid_gives_a_block_more_rows(dtype):
    compare(*inputs((5, 1700, 40, 8), dtype, "none"))


@pytest.mark.parametrize("gate", GATES)
def test_strided_and_misaligned_rows(gate):
    x, index, y, g = inputs((2, 9, 4, 64), torch.bfloat16, gate)
    wide = torch.randn(2, 9, 200).to(x.dtype)
    for view in (wide[..., :64], wide[..., 3:67], wide.transpose(0, 1)[:2, :, :64]):
        compare(view, index % view.shape[1], y, g)
        compare(x, index, view[:, :1].expand(-1, 4, -1), g)
    compare(x, index[:1].expand(2, -1), y, g)
    if gate == "per sample":
        compare(x, index, y, torch.randn(2, 3 * 64).to(x.dtype)[:, 65:129])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dim", (64, 37))
def test_same_bits_in_every_order(dim, gate):
    """With rows that are named several times: the last counts in every order of threads."""
    given = inputs((2, 12, 290, dim), torch.bfloat16, gate)
    outputs = [compare(*given, mode) for mode in testing_simt.MODES]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dim", (64, 37))
def test_index_out_of_range_touches_no_memory(dim, gate):
    """It gives zeros, or is skipped; what lies about x, full of NaN, is neither read nor written.

    -1 and N name the rows just outside, which are in the buffer.
    """
    x, index, y, g = inputs((1, 9, 6, dim), torch.float32, gate)
    zone = GUARD // 4
    buffer = torch.full((x.numel() + 2 * zone,), torch.nan)
    inside = buffer[zone:-zone].view(x.shape).copy_(x)
    index[:, 1:5] = torch.tensor([-1, 9, 2**62, -(2**63)])
    kept = [0, 5]
    with testing_simt.emulated():
        taken = gather_tokens(inside, index, impl="native")
        got = scatter_tokens(inside, index, y, g, impl="native")
    assert torch.equal(taken[:, kept], gather_tokens(x, index[:, kept], impl="ref"))
    assert not taken[:, 1:5].any()
    gate_kept = g[:, kept] if gate == "per token" else g
    want = scatter_tokens(x, index[:, kept], y[:, kept], gate_kept, impl="ref")
    torch.testing.assert_close(got, want)
    assert torch.equal(inside, x)
    assert buffer[:zone].isnan().all() and buffer[-zone:].isnan().all()


def cache_of(shape, heads, dtype):
    """A cache, an index and rows for it; heads inside tokens, or outside of them."""
    B, N, A, D = shape
    if heads == "none":
        return (
            torch.randn(B, N, D).to(dtype),
            torch.randint(N, (B, A)),
            torch.randn(B, A, D).to(dtype),
        )
    cache, y = torch.randn(B, N, 3, D).to(dtype), torch.randn(B, A, 3, D).to(dtype)
    cache, y = cache.transpose(1, 2), y.transpose(1, 2)
    return cache.contiguous() if heads == "outside" else cache, torch.randint(N, (B, A)), y


def check_update(cache, index, y, mode=(0, False, False)):
    want = update_tokens_(cache.clone(), index, y, impl="ref")
    with testing_simt.emulated(*mode):
        update_tokens_(cache, index, y, impl="native")
    assert torch.equal(cache, want)
    return cache


@pytest.mark.parametrize("heads", ("none", "inside", "outside"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_update_has_the_bits_of_y(shape, dtype, heads):
    check_update(*cache_of(shape, heads, dtype))


@pytest.mark.parametrize("dim", (64, 37))
def test_update_has_the_same_bits_in_every_order(dim):
    """With rows that are named several times: the last counts in every order of threads."""
    cache, index, y = cache_of((2, 12, 290, dim), "inside", torch.bfloat16)
    outputs = [check_update(cache.clone(), index, y, mode) for mode in testing_simt.MODES]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_update_of_views_and_misaligned_rows():
    _, index, y = cache_of((2, 9, 4, 64), "inside", torch.bfloat16)
    joint = torch.randn(2, 9, 3, 3, 64).to(y.dtype)
    before = joint.clone()
    check_update(joint[:, :, 2].transpose(1, 2), index, y)
    assert torch.equal(joint[:, :, :2], before[:, :, :2])
    wide = torch.randn(2, 9, 3, 80).to(y.dtype)
    before = wide.clone()
    check_update(wide[..., 3:67].transpose(1, 2), index, y)
    assert torch.equal(wide[..., :3], before[..., :3])
    assert torch.equal(wide[..., 67:], before[..., 67:])


@pytest.mark.parametrize("dim", (64, 37))
def test_update_skips_an_index_out_of_range(dim):
    """What lies about the cache is not written."""
    cache, index, y = cache_of((1, 9, 6, dim), "none", torch.float32)
    zone = GUARD // 4
    buffer = torch.full((cache.numel() + 2 * zone,), torch.nan)
    inside = buffer[zone:-zone].view(cache.shape).copy_(cache)
    index[:, 1:5] = torch.tensor([-1, 9, 2**62, -(2**63)])
    want = update_tokens_(cache, index[:, [0, 5]], y[:, [0, 5]], impl="ref")
    with testing_simt.emulated():
        update_tokens_(inside, index, y, impl="native")
    assert torch.equal(inside, want)
    assert buffer[:zone].isnan().all() and buffer[-zone:].isnan().all()


def test_update_of_short_rows_in_aligned_memory_writes_no_further():
    index = torch.tensor([[3, 0, 5]])
    wide, y = torch.randn(1, 9, 64), torch.randn(1, 3, 64)
    before = wide.clone()
    check_update(wide[..., :37], index, y[..., :37])
    assert torch.equal(wide[..., 37:], before[..., 37:])
