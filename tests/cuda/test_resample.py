"""The CUDA kernel of resample, in the model: the reference's parents."""

import math

import pytest
import torch

from fastdiff import testing, testing_simt
from fastdiff.ops import resample

INF, NAN = math.inf, math.nan
# One, fewer than a warp has lanes, a lane each and one more, a block's threads and one more, all.
COUNTS = (1, 2, 7, 31, 32, 33, 64, 77, 128, 129, 500, 1023, 1024)


def inputs(groups, count, seed=0, spread=2.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logw = spread * torch.randn(groups, count, generator=g, dtype=torch.float64) - 300
    return logw.to(dtype), torch.rand(groups, generator=g, dtype=torch.float64)


def run(logw, u, ess_below=1.0, mode=(0, False, False)):
    with testing_simt.emulated(*mode), testing.unchanged(logw, u):
        return resample(logw, u, ess_below, impl="native")


def compare(logw, u, ess_below=1.0, mode=(0, False, False)):
    want, got = resample(logw, u, ess_below, impl="ref"), run(logw, u, ess_below, mode)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    tight = 1e-13 if logw.dtype == torch.float64 else 2e-7
    torch.testing.assert_close(got[1], want[1], rtol=tight, atol=tight, equal_nan=True)
    stay = ~got[2]
    torch.testing.assert_close(got[1][stay], logw[stay], rtol=0, atol=0, equal_nan=True)
    return got


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("ess_below", (1.0, 0.5))
def test_against_the_reference(ess_below, dtype):
    chosen = []
    for seed, count in enumerate(COUNTS):
        for spread in (0.2, 3.0):
            chosen += compare(*inputs(2, count, seed, spread, dtype), ess_below)[2].tolist()
    assert any(chosen) and not all(chosen)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_constructed(dtype):
    """Equal, one alone, one dominating, parts of equals, zeros first, NaN, infinite, dead."""
    groups = [
        [-5.0] * 6,
        [-INF, -INF, -INF, 2.0, -INF, -INF],
        [0.0, 900.0, 1.0, 2.0, 3.0, 4.0],
        [0.0, -INF, 0.0, -INF, -INF, -INF],
        [-INF, 7.0, 7.0, -INF, -INF, 7.0],
        [-INF, -INF, -INF, -INF, 0.0, 0.0],
        [NAN, 0.0, NAN, 0.0, -INF, NAN],
        [0.0, INF, 1e38, -INF, INF, NAN],
        [-INF] * 6,
        [NAN] * 6,
        [NAN, -INF, NAN, -INF, NAN, NAN],
    ]
    own = list(range(6))
    want = [own, [3] * 6, [1] * 6, [0] * 3 + [2] * 3, [1, 1, 2, 2, 5, 5], [4] * 3 + [5] * 3,
            [1] * 3 + [3] * 3, [1] * 3 + [4] * 3, own, own, own]  # fmt: skip
    for u in (0.01, 0.99):
        got = compare(torch.tensor(groups).to(dtype), torch.full((11,), u).double())
        assert got[0].tolist() == want


def test_a_point_at_an_edge_takes_the_next():
    """All of it exact: points 1/6, 1/2, 5/6; edges 1/2, 1, 1."""
    logw, u = torch.tensor([[0.0, 0.0, -INF]]), torch.tensor([0.5]).double()
    assert compare(logw, u)[0].tolist() == [[0, 1, 1]]


def test_a_particle_without_weight_has_no_child():
    """Also between the particles of two lanes, and for the first and last numbers in (0, 1)."""
    for count in (5, 64, 200, 1000):
        logw, _ = inputs(3, count)
        logw[:, ::3], logw[:, 1::4], logw[:, -1] = -INF, -INF, -INF
        for u in (2.0**-53, 0.5, 1 - 2.0**-53):
            parents, _, did = compare(logw, torch.full((3,), u).double())
            assert did.all() and logw.gather(1, parents).isfinite().all()


def test_numbers_outside_of_the_interval_stay_inside_of_a_group():
    logw, _ = inputs(4, 40)
    parents = run(logw, torch.tensor([-3.0, 2.0, NAN, INF]).double())[0]
    assert (parents >= 0).all() and (parents < 40).all()


@pytest.mark.parametrize("mode", testing_simt.MODES)
def test_same_bits_in_every_order(mode):
    logw, u = inputs(2, 300)
    got, want = run(logw, u, 1.0, mode), run(logw, u)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nothing_outside_of_the_groups_is_read():
    logw, u = inputs(3, 77)
    with testing.guarded(logw, u) as (a, b):
        got = run(a, b)
    assert all(torch.equal(a, b) for a, b in zip(got, run(logw, u), strict=True))


def test_more_particles_than_a_block_holds():
    logw, u = inputs(1, 1025)
    with pytest.raises(RuntimeError, match="logw has 1025 particles in a group, need at most 1024"):
        run(logw, u)
