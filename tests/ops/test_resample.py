import math

import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import resample
from fastdiff.ops.resample import IMPLS

ROWS = testing.rows_of(IMPLS)
COUNTS = (1, 2, 7, 16, 64, 65, 77, 1024)
INF, NAN = math.inf, math.nan


def inputs(groups, count, seed=0, spread=2.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logw = spread * torch.randn(groups, count, generator=g, dtype=torch.float64) - 300
    return logw.to(dtype), torch.rand(groups, generator=g, dtype=torch.float64)


def by_loops(logw, u, ess_below):
    """What the docstring says, in Python's floats; and the least distance of a point to an edge."""
    count, near = logw.shape[1], 1.0
    parents, after, did = [], [], []
    for row, start in zip(logw.double().tolist(), u.tolist(), strict=True):
        known = [-INF if math.isnan(v) else v for v in row]
        most = max(known)
        if most == -INF:
            w = [1.0] * count
        else:
            w = [1.0 if v == most else math.exp(v - most) for v in known]
        total = math.fsum(w)
        did.append(total**2 / math.fsum(v * v for v in w) < ess_below * count * (1 - 1e-12))
        if not did[-1]:
            parents.append(list(range(count)))
            after.append(row)
            continue
        edges, sums = [], 0.0
        for v in w:
            sums += v
            edges.append(sums / total)
        chosen = []
        for j in range(count):
            point = (start + j) / count
            near = min(near, min(abs(edge - point) for edge in edges[:-1]))
            chosen.append(next((k for k, edge in enumerate(edges) if edge > point), count - 1))
        parents.append(chosen)
        after.append([most + math.log(total / count)] * count)
    after = torch.tensor(after, dtype=torch.float64).view(logw.shape)
    parents = torch.tensor(parents, dtype=torch.int64).view(logw.shape)
    return parents, after.to(logw.dtype), torch.tensor(did, dtype=torch.bool), near


def agree(got, want):
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    assert got[0].dtype == torch.int64 and got[2].dtype == torch.bool
    assert got[1].dtype == want[1].dtype
    tight = 1e-13 if got[1].dtype == torch.float64 else 2e-7
    torch.testing.assert_close(got[1], want[1], rtol=tight, atol=tight, equal_nan=True)
    stayed = ~got[2]
    assert torch.equal(got[1][stayed].isnan(), want[1][stayed].isnan())
    assert torch.equal(got[1][stayed].nan_to_num(), want[1][stayed].nan_to_num())


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("ess_below", (1.0, 0.5, 0.1))
@pytest.mark.parametrize("row", ROWS)
def test_against_loops(row, ess_below, dtype):
    chosen = []
    for seed, count in enumerate(COUNTS[:-1]):
        for spread in (0.01, 1.0, 8.0):
            logw, u = inputs(5, count, seed, spread, dtype)
            *want, near = by_loops(logw, u, ess_below)
            assert near > 1e-9  # no point is as near to an edge as roundings are
            with testing.unchanged(logw, u):
                got = resample(logw, u, ess_below, impl=row)
            agree(got, want)
            chosen += got[2].tolist()
    assert any(chosen) and not all(chosen)


@pytest.mark.parametrize("row", ROWS[:-1])
def test_every_row_chooses_as_the_reference(row):
    for seed in range(4):
        for count in COUNTS:
            logw, u = inputs(3, count, seed, 3.0)
            agree(resample(logw, u, 0.9, impl=row), resample(logw, u, 0.9, impl="ref"))


CONSTRUCTED = {
    "equal": ([-5.0] * 6, list(range(6))),
    "one alone": ([-INF, -INF, -INF, 2.0, -INF, -INF], [3] * 6),
    "one dominates": ([0.0, 900.0, 1.0, 2.0, 3.0, 4.0], [1] * 6),
    "halves": ([0.0, -INF, 0.0, -INF, -INF, -INF], [0, 0, 0, 2, 2, 2]),
    "thirds": ([-INF, 7.0, 7.0, -INF, -INF, 7.0], [1, 1, 2, 2, 5, 5]),
    "zeros first": ([-INF, -INF, -INF, -INF, 0.0, 0.0], [4, 4, 4, 5, 5, 5]),
    "nan has none": ([NAN, 0.0, NAN, 0.0, -INF, NAN], [1, 1, 1, 3, 3, 3]),
    "infinite weights": ([0.0, INF, 1e38, -INF, INF, NAN], [1, 1, 1, 4, 4, 4]),
    "dead": ([-INF] * 6, list(range(6))),
    "all nan": ([NAN] * 6, list(range(6))),
    "dead and nan": ([NAN, -INF, NAN, -INF, NAN, NAN], list(range(6))),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("name", CONSTRUCTED)
@pytest.mark.parametrize("row", ROWS)
def test_constructed(row, name, dtype):
    weights, parents = CONSTRUCTED[name]
    for start in (0.01, 0.3, 0.99):
        logw, u = torch.tensor([weights] * 2).to(dtype), torch.tensor([start, 0.5]).double()
        got = resample(logw, u, impl=row)
        assert got[0].tolist() == [parents] * 2
        agree(got, by_loops(logw, u, 1.0)[:3])
        assert got[2].tolist() == [parents != list(range(6))] * 2


@pytest.mark.parametrize("row", ROWS)
def test_a_point_at_an_edge_takes_the_next(row):
    """All of it exact: points 1/6, 1/2, 5/6; edges 1/2, 1, 1."""
    logw, u = torch.tensor([[0.0, 0.0, -INF]]), torch.tensor([0.5]).double()
    assert resample(logw, u, impl=row)[0].tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("row", ROWS)
def test_one_particle_and_no_groups(row):
    for value in (0.0, -INF, NAN, INF):
        logw = torch.full((3, 1), value, dtype=torch.float64)
        parents, after, did = resample(logw, torch.full((3,), 0.4).double(), impl=row)
        assert not parents.any() and not did.any()
        torch.testing.assert_close(after, logw, rtol=0, atol=0, equal_nan=True)
    empty = resample(torch.ones(0, 5), torch.ones(0).double(), impl=row)
    assert [list(t.shape) for t in empty] == [[0, 5], [0, 5], [0]]


@pytest.mark.parametrize("row", ROWS)
def test_children_are_the_weights_share(row):
    """floor(K w) or ceil(K w) of them, in order; none without a weight, whatever u is."""
    for seed, count in enumerate((5, 33, 64, 500)):
        logw, _ = inputs(4, count, seed, 2.0)
        logw[:, ::3], logw[:, -1] = -INF, -INF
        for u in (2.0**-53, 0.25, 1 - 2.0**-53):
            parents, _, did = resample(logw, torch.full((4,), u).double(), impl=row)
            assert (parents.diff() >= 0).all()
            share = count * torch.softmax(logw, 1)
            children = torch.zeros_like(share).scatter_add(1, parents, torch.ones_like(share))
            assert did.all() and not children[logw == -INF].any()
            assert (children > share - 1 - 1e-9).all() and (children < share + 1 + 1e-9).all()


@pytest.mark.parametrize("row", ROWS)
def test_the_sum_of_weights_stays(row):
    for dtype, tight in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        logw, u = inputs(5, 77, dtype=dtype)
        _, after, did = resample(logw, u, impl=row)
        assert did.all()
        torch.testing.assert_close(after.logsumexp(1), logw.logsumexp(1), rtol=tight, atol=tight)


@pytest.mark.parametrize("row", ROWS)
def test_a_group_does_not_depend_on_others(row):
    logw, u = inputs(9, 50, spread=1.0)
    together = resample(logw, u, 0.5, impl=row)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = resample(logw, u, 0.5, impl=row)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))
    for g in range(9):
        alone = resample(logw[g : g + 1], u[g : g + 1], 0.5, impl=row)
        assert all(torch.equal(a[0], b[g]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_levels(level):
    with testing.cpu_level(level):
        for count in COUNTS:
            logw, u = inputs(3, count)
            agree(resample(logw, u, 0.7, impl="native"), resample(logw, u, 0.7, impl="ref"))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("row", ROWS)
def test_layouts(row, layout):
    logw, u = inputs(4, 31)
    want = resample(logw, u, impl=row)
    got = resample(testing.lay(logw, layout), testing.lay(u, layout), impl=row)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(t.is_contiguous() for t in got)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import resample as kernel
    from fastdiff.ops.resample import row_args

    for count in (1, 13, 200):
        logw, u = inputs(3, count)
        want = resample(logw, u, 0.6, impl="ref")
        for _, got in testing.run_configs(kernel.resample, kernel.CONFIGS, *row_args(logw, u, 0.6)):
            agree(got, want)
    why = fastdiff.explain(resample, torch.ones(1, 1025), torch.ones(1).double())
    assert (
        "logw has 1025 particles in a group; the kernel holds them in one block, at most 1024"
        in (why["triton"] or "")
    )
    with torch.device("meta"):
        there = torch.ones(1, 1025), torch.ones(1).double()
    assert fastdiff.explain(resample, *there)["native"]


def test_more_particles_than_a_block_holds():
    """The CPU's rows have no limit."""
    logw, u = inputs(2, 3000)
    agree(resample(logw, u, impl="native"), resample(logw, u, impl="ref"))


def test_gradients_are_the_references():
    logw, u = inputs(3, 8, spread=1.0)
    logw[0] = -300  # stays
    logw.requires_grad_()
    assert fastdiff.explain(resample, logw, u)["native"] == (
        "this row has no backward and an input requires a gradient"
    )
    _, after, did = resample(logw, u)
    assert did.tolist() == [False, True, True]
    (grad,) = torch.autograd.grad(after.sum(), logw)
    want = torch.cat((torch.ones(1, 8), 8 * torch.softmax(logw.detach()[1:], 1)))
    torch.testing.assert_close(grad, want.double())


def test_opcheck_and_compile():
    logw, u = inputs(2, 9)
    for dtype in (torch.float32, torch.float64):
        args = (logw.to(dtype), u, 8.5)
        torch.library.opcheck(torch.ops.fastdiff.resample.default, args)
    testing.check_compile(lambda logw, u: resample(logw, u, 0.9), logw, u)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(ess_below=0), r"ess_below is 0, need a number in \(0, 1\]"),
        (dict(ess_below=1.5), r"ess_below is 1.5, need a number in \(0, 1\]"),
        (dict(ess_below=NAN), "ess_below is nan, need a number in"),
        (dict(ess_below=True), "ess_below is True, need a number in"),
        (dict(u=torch.ones(2)), "u is torch.float32, need torch.float64"),
        (dict(u=torch.ones(3).double()), r"u has shape \[3\], need \[2\]"),
        (
            dict(logw=torch.ones(2, 6).half()),
            "logw is torch.float16, need torch.float32 or torch.float64",
        ),
        (dict(logw=torch.ones(2, 0)), r"logw has shape \[2, 0\], need \[groups, particles\]"),
        (dict(logw=torch.ones(6)), r"logw has shape \[6\], need \[groups, particles\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=f"resample: {message}"):
        resample(**{"logw": torch.ones(2, 6), "u": torch.ones(2).double(), **call})
