import math

import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.engine import require
from fastdiff.kernels import AVAILABLE
from fastdiff.nn import MoE
from fastdiff.ops import Routing, load_balance_loss, moe_combine, moe_route, z_loss
from fastdiff.ops.grouped_linear import activate
from fastdiff.ops.moe import (
    COMBINE_IMPLS,
    ROUTE_IMPLS,
    combine_args,
    moe_combine_ref,
    moe_route_ref,
    route_args,
)

FAST = [row for row in testing.rows_of(ROUTE_IMPLS) if row != "ref"]
LAYERS = testing.rows_of(ROUTE_IMPLS)  # every op of a layer has these rows
# (T, E, k)
SHAPES = [(0, 4, 2), (1, 1, 1), (1, 5, 5), (7, 3, 2), (64, 8, 2), (65, 8, 8), (77, 17, 3)]
SIZES = [*SHAPES, (131, 100, 4), (9, 255, 6), (33, 256, 256), (257, 2, 1)]
CAPACITIES = (None, 0, 1, 5, 1000)
SETTINGS = [
    dict(gate=gate, renormalise=again) for gate in ("softmax", "sigmoid") for again in (False, True)
]


def drawn(tokens, experts, seed=0, ties=False):
    """Multiples of 1/8, so that sums in float32 are exact; with ``ties`` of few values."""
    g = torch.Generator().manual_seed(seed)
    most = 3 if ties else 400
    return torch.randint(-most, most + 1, (tokens, experts), generator=g) / 8


def by_loops(logits, k, sample_logits=None, gate="softmax", renormalise=False, capacity=None):
    """What the docstring says, slot by slot."""
    tokens, count = logits.shape
    full = logits.double()
    if sample_logits is not None and tokens:
        samples = [t * len(sample_logits) // tokens for t in range(tokens)]
        full = full + sample_logits.double()[samples]
    if gate == "softmax":
        gates = full.softmax(1)
    else:
        gates = full.sigmoid()
        gates[full.isnan().any(1)] = math.nan
    rows = full.tolist()

    def key(t, e):
        return (1, 0, e) if math.isnan(rows[t][e]) else (0, -rows[t][e], e)

    experts = [sorted(range(count), key=lambda e, t=t: key(t, e))[:k] for t in range(tokens)]
    weights = torch.zeros(tokens, k, dtype=torch.float64)
    held = [[] for _ in range(count)]
    dropped, counts = [], [0] * count
    for t, chosen in enumerate(experts):
        total = gates[t][chosen].sum() if renormalise else 1.0
        for j, e in enumerate(chosen):
            counts[e] += 1
            if capacity is not None and len(held[e]) >= capacity:
                dropped.append(t * k + j)
            else:
                held[e].append(t * k + j)
                weights[t, j] = gates[t, e] / total
    kept = [slot for slots in held for slot in slots]
    position = torch.full((tokens * k,), -1)
    position[kept] = torch.arange(len(kept))
    offsets = [0]
    for slots in held:
        offsets.append(offsets[-1] + len(slots))
    return Routing(
        weights,
        torch.tensor(experts, dtype=torch.int64).view(tokens, k),
        torch.tensor(kept + dropped, dtype=torch.int64),
        position.view(tokens, k),
        torch.tensor(offsets),
        torch.tensor(counts),
    )


def same_choice(got, want, what=""):
    assert got[0].dtype in (torch.float32, want[0].dtype)
    for name, a, b in zip(Routing._fields[1:], got[1:], want[1:], strict=True):
        assert a.dtype == torch.int64 and torch.equal(a, b), f"{name} {what}"


def close(got, want, logits, what=""):
    """Gates against those of float64, and zero where dropped."""
    finite = want.masked_fill(want.isnan(), 0.0)
    assert torch.equal(got.isnan(), want.isnan()), what
    assert got.dtype == torch.float32 and got.shape == want.shape
    error = (got.double().nan_to_num(0.0) - finite).abs()
    assert (error <= 1e-6 * finite + 1e-30).all(), f"{what}: {error.max() if error.numel() else 0}"


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("row", testing.rows_of(ROUTE_IMPLS))
def test_route_against_loops(row, settings, ties):
    for tokens, experts, k in SHAPES:
        logits = drawn(tokens, experts, seed=tokens, ties=ties)
        sample = drawn(1 if tokens % 7 else 7, experts, seed=1, ties=ties)
        for i, capacity in enumerate(CAPACITIES):
            given = dict(settings, sample_logits=sample if i % 2 else None, capacity=capacity)
            want = by_loops(logits, k, **given)
            with testing.unchanged(logits, sample):
                got = moe_route(logits, k, **given, impl=row)
            what = f"{row} {tokens} {experts} {k} {capacity}"
            same_choice(got, want, what)
            close(got.weights, want.weights, logits, what)


@pytest.mark.parametrize("row", FAST)
def test_every_row_gives_the_choice_of_the_reference(row):
    """With ties, both zeros, infinities and NaN."""
    for seed, (tokens, experts, k) in enumerate(SIZES):
        logits = drawn(tokens, experts, seed, ties=seed % 2 == 0)
        if tokens > 6:
            logits[1::5, experts // 2] = math.nan
            logits[2::5, :] = -math.inf
            logits[3::5, 0] = math.inf
            logits[4, ::2], logits[4, 1::2], logits[5] = -0.0, 0.0, math.nan
        for capacity in CAPACITIES if experts < 20 else (None, 2):
            args = route_args(logits, k, capacity=capacity, gate="sigmoid")
            got, want = moe_route(logits, k, capacity=capacity, impl=row), moe_route_ref(*args)
            same_choice(got, want, f"{tokens} {experts} {k} {capacity}")


@pytest.mark.parametrize("row", FAST)
def test_every_number_of_experts(row):
    for experts in (*range(1, 18), 31, 33, 96, 127, 128, 129, 256):
        logits = torch.randn(5, experts)
        for k in {1, min(2, experts), experts}:
            got = moe_route(logits, k, capacity=2, impl=row)
            same_choice(got, moe_route_ref(*route_args(logits, k, capacity=2)), f"{experts} {k}")


@pytest.mark.parametrize("row", testing.rows_of(ROUTE_IMPLS))
def test_nan_and_infinite_logits(row):
    """A NaN is chosen last and spoils its token's gates, and those of no other."""
    nan, inf = math.nan, math.inf
    logits = torch.tensor(
        [[nan, -inf, 2.0, -1.0], [inf, 1.0, inf, 0.0], [-inf] * 4, [nan] * 4, [1.0, -inf, 3.0, 2.0]]
    )
    got = moe_route(logits, 4, impl=row)
    want = [[2, 3, 1, 0], [0, 2, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 0, 1]]
    assert got.experts.tolist() == want
    assert got.weights[:4].isnan().all() and got.weights[4].isfinite().all()
    assert got.weights[4, 3] == 0
    got = moe_route(logits, 4, gate="sigmoid", impl=row)
    assert got.weights[[0, 3]].isnan().all()
    torch.testing.assert_close(got.weights[1], torch.tensor([1.0, 1.0, 1.0, 0.0]).add(
        torch.tensor([0.0, 0.0, 1 / (1 + math.exp(-1)) - 1, 0.5])))  # fmt: skip
    assert got.weights[2].eq(0).all()
    y = torch.ones(20, 3)
    out = moe_combine(y, got.weights, got.position)
    assert torch.equal(out.isnan().any(1), torch.tensor([True, False, False, True, False]))


@pytest.mark.parametrize("row", testing.rows_of(ROUTE_IMPLS))
def test_ties_go_to_the_lowest_expert(row):
    logits = torch.tensor([[1.0, 1, 1, 1], [0.0, -0.0, 0.0, -1], [-2, 5, -2, 5]])
    got = moe_route(logits, 3, impl=row)
    assert got.experts.tolist() == [[0, 1, 2], [0, 1, 2], [1, 3, 0]]
    logits = torch.zeros(2, 256)
    assert torch.equal(moe_route(logits, 256, impl=row).experts, torch.arange(256).expand(2, 256))


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("row", testing.rows_of(ROUTE_IMPLS))
def test_capacity(row, capacity):
    logits = drawn(61, 6, ties=True)
    got = moe_route(logits, 2, capacity=capacity, impl=row)
    most = 61 if capacity is None else capacity
    assert torch.equal(got.counts, got.experts.flatten().bincount(minlength=6))
    assert torch.equal(got.dropped, (got.counts - most).clamp(min=0))
    assert torch.equal(got.offsets.diff(), got.counts.clamp(max=most)) and got.offsets[0] == 0
    assert torch.equal(got.order.sort().values, torch.arange(122))
    kept, rows = got.position.flatten() >= 0, int(got.offsets[-1])
    assert torch.equal(got.order[got.position.flatten()[kept]], kept.nonzero()[:, 0])
    assert torch.equal(got.order[rows:], (~kept).nonzero()[:, 0])  # in the order of slots
    assert torch.equal(got.tokens, got.order // 2)
    assert got.weights.flatten()[~kept].eq(0).all() and got.weights.flatten()[kept].gt(0).all()
    if most >= 61:
        same_choice(got, moe_route(logits, 2, impl=row))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(ROUTE_IMPLS))
def test_dtypes_and_layouts(row, dtype):
    logits, sample = torch.randn(30, 12).to(dtype), torch.randn(3, 12)
    for layout in testing.LAYOUTS:
        for other in (dtype, torch.float32):
            args = testing.lay(logits, layout), testing.lay(sample.to(other), layout)
            with testing.unchanged(*args):
                got = moe_route(args[0], 4, sample_logits=args[1], impl=row)
            full = logits.float() + sample.to(other).float().repeat_interleave(10, 0)
            same_choice(got, moe_route_ref(full, None, 4, False, False, -1), layout)
            close(got.weights, full.double().softmax(1).gather(1, got.experts), full, layout)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_levels(level):
    for tokens, experts, k in SHAPES:
        logits = drawn(tokens, experts, ties=True)
        with testing.cpu_level(level):
            got = moe_route(logits, k, capacity=3, impl="native")
        same_choice(got, moe_route_ref(*route_args(logits, k, capacity=3)))
    for dtype in testing.DTYPES:
        given = combining(9, 2, 77, dtype)
        with testing.cpu_level(level):
            check_combine(moe_combine(*given, impl="native"), *given, what=level)


def combining(tokens, k, channels, dtype=torch.float32, rows=None):
    """Rows, weights and positions, a third of which is dropped; ``rows``: R."""
    rows = tokens * k if rows is None else rows
    position = torch.full((tokens * k,), -1)
    held = torch.randperm(tokens * k)[: min(rows, (2 * tokens * k + 2) // 3)]
    position[held] = torch.randperm(rows)[: len(held)]
    return (
        torch.randn(rows, channels).to(dtype),
        torch.randn(tokens, k),
        position.view(tokens, k),
    )


def check_combine(got, y, weights, position, what=""):
    """Eager: the same sum with products in the dtype of y."""
    exact = moe_combine_ref(y.double(), weights.double(), position)
    eager = torch.zeros_like(exact, dtype=y.dtype)
    for j in range(position.shape[1] if y.shape[0] else 0):
        part = weights[:, j : j + 1].to(y.dtype) * y[position[:, j].clamp(min=0)]
        eager = eager + part.masked_fill(position[:, j : j + 1] < 0, 0.0)
    assert got.dtype == y.dtype and got.is_contiguous()
    testing.assert_close(got, exact, eager, what=what)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(COMBINE_IMPLS))
def test_combine_matches_float64(row, dtype):
    for tokens, k in ((0, 2), (1, 1), (7, 3), (65, 2)):
        for channels in (0, 1, 17, 77, 1152):
            given = combining(tokens, k, channels, dtype)
            with testing.unchanged(*given):
                got = moe_combine(*given, impl=row)
            check_combine(got, *given, what=f"{row} {tokens} {k} {channels}")
    for given in (combining(5, 2, 9, dtype, rows=0), combining(5, 2, 9, dtype, rows=30)):
        check_combine(moe_combine(*given, impl=row), *given)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("row", testing.rows_of(COMBINE_IMPLS))
def test_combine_layouts(row, layout):
    for dtype in testing.DTYPES:
        given = combining(13, 2, 33, dtype)
        laid = [testing.lay(t, layout) for t in given]
        with testing.unchanged(*laid):
            check_combine(moe_combine(*laid, impl=row), *given, what=layout)


@pytest.mark.parametrize("row", testing.rows_of(COMBINE_IMPLS))
def test_combine_reads_no_row_of_a_dropped_slot(row):
    """NaN in rows that no position names, or with the weight of a dropped slot, reach nothing."""
    y = torch.full((4, 3), math.nan)
    y[2] = 1.0
    weights = torch.tensor([[2.0, math.nan], [math.nan, math.nan]])
    got = moe_combine(y, weights, torch.tensor([[2, -1], [-1, -1]]), impl=row)
    assert torch.equal(got, torch.tensor([[2.0] * 3, [0.0] * 3]))


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import moe

    for tokens, experts, k, capacity in ((150, 6, 2, None), (150, 6, 2, 40), (19, 250, 3, 1)):
        logits = drawn(tokens, experts, ties=True)
        args = route_args(logits, k, sample_logits=logits[:1], capacity=capacity, gate="sigmoid")
        want = moe_route_ref(*args)
        for name, got in testing.run_configs(moe.moe_route, moe.CONFIGS, *args):
            same_choice(got, want, name)
            close(got[0], want[0].double(), logits, name)
    given = combine_args(*combining(21, 3, 600))
    for name, got in testing.run_configs(moe.moe_combine, moe.CONFIGS, *given):
        check_combine(got, *given, what=name)
    why = fastdiff.explain(moe_route, torch.ones(2, 257), 3)
    assert "257 experts, above 256" in why["triton"] and "257 experts" in why["native"]


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_triton_touches_nothing_outside():
    """The interpreter raises for an access outside of the arguments: such positions count as -1."""
    from fastdiff.kernels import moe

    y, weights, position = combining(9, 3, 7)
    position[1:4, 1] = torch.tensor([27, -2, 2**62])
    kept = torch.where((position >= 0) & (position < 27), position, -1)
    torch.testing.assert_close(
        moe.moe_combine(y, weights, position), moe_combine_ref(y, weights, kept)
    )


@pytest.mark.parametrize("row", ("native", "ref"))
@pytest.mark.parametrize("bad", (-2, 4, 2**62))
def test_position_out_of_range(row, bad):
    with pytest.raises(ValueError, match=f"moe_combine: position has value {bad}, need -1 to 3"):
        moe_combine(torch.ones(4, 2), torch.ones(2, 2), torch.tensor([[0, 1], [2, bad]]), impl=row)


@pytest.mark.parametrize("row", LAYERS)
def test_twice_the_same_bits(row):
    logits, sample = torch.randn(77, 9), torch.randn(7, 9)
    for capacity in (None, 9):
        given = dict(sample_logits=sample, renormalise=True, capacity=capacity, impl=row)
        for a, b in zip(moe_route(logits, 3, **given), moe_route(logits, 3, **given), strict=True):
            assert torch.equal(a, b)
    given = combining(20, 3, 40, torch.bfloat16)
    assert torch.equal(moe_combine(*given, impl=row), moe_combine(*given, impl=row))


# ---- the layer -----------------------------------------------------------------------------------


def layer(experts=4, k=2, **kwargs):
    torch.manual_seed(2)
    return MoE(16, 24, experts, k, **kwargs).requires_grad_(False)


def dense(model, x, gates):
    """Every expert for every token, weighted by ``gates [T, E]``."""
    out = torch.zeros_like(x)
    for e in range(gates.shape[1]):
        h = activate(x @ model.up[e].T, model.activation)
        out = out + gates[:, e : e + 1] * (h @ model.down[e].T)
    return out


@pytest.mark.parametrize("row", LAYERS)
def test_all_experts_are_the_dense_mixture(row):
    model, x = layer(4, 4), torch.randn(37, 16)
    with fastdiff.use(row):
        got = model(x)
    exact = model.double()
    want = dense(exact, x.double(), (x.double() @ exact.router.T).softmax(1))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("row", LAYERS)
def test_chosen_experts_are_the_sparse_mixture(row, capacity):
    model, x = layer(5, 2, capacity=capacity, renormalise=True), torch.randn(37, 16)
    with fastdiff.use(row):
        routing = model.route(x)
        got = model(x)
    gates = torch.zeros(37, 5).scatter_(1, routing.experts, routing.weights)
    torch.testing.assert_close(got, dense(model, x, gates), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", LAYERS)
def test_order_of_tokens_and_names_of_experts_do_not_matter(row):
    model, x = layer(5, 2), torch.randn(29, 16)
    tokens, names = torch.randperm(29), torch.randperm(5)
    with fastdiff.use(row):
        want, routing = model(x), model.route(x)
        turned = model.route(x[tokens])
        assert torch.equal(turned.experts, routing.experts[tokens])
        assert torch.equal(turned.weights, routing.weights[tokens])
        torch.testing.assert_close(model(x[tokens]), want[tokens], rtol=1e-6, atol=1e-6)
        for name in ("up", "down", "router"):
            getattr(model, name).copy_(getattr(model, name)[names])
        torch.testing.assert_close(model(x), want, rtol=1e-6, atol=1e-6)
        assert torch.equal(names[model.route(x).experts], routing.experts)


def test_a_step_of_experts_can_be_captured():
    """No host sync and no shape that hangs on values; the weights are tensors of outside."""
    model = layer(4, 2, capacity=9, activation="geglu", bias=True, renormalise=True)
    sample = torch.randn(2, 4)

    def step(x):
        with torch.no_grad():
            return model(x, sample_logits=sample)

    assert require(step, (torch.randn(2, 9, 16),)).ok


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_of_gates(settings):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 5, generator=g, dtype=torch.float64, requires_grad=True)
    sample = torch.randn(2, 5, generator=g, dtype=torch.float64, requires_grad=True)
    for capacity in (None, 2):

        def gates(a, b, capacity=capacity):
            given = dict(settings, capacity=capacity, impl="ref")
            return moe_route(a, 3, sample_logits=b, **given).weights

        assert torch.autograd.gradcheck(gates, (logits, sample))


def test_gradients_of_combine():
    for k, rows in ((1, 4), (3, 12), (2, 0)):
        y, weights, position = combining(4, k, 3, torch.float64, rows=rows)
        leaves = y.requires_grad_(), weights.double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda y, w, p=position: moe_combine(y, w, p, impl="ref"), leaves
        )
    why = fastdiff.explain(moe_combine, y.detach().float().requires_grad_(), weights, position)
    assert all("no backward" in why[name] for name in ("native", "triton"))


@pytest.mark.parametrize("row", LAYERS)
def test_gradients_match_float64(row):
    logits, y = torch.randn(23, 6), torch.randn(46, 7)
    found = []
    for dtype, impl in ((torch.float32, row), (torch.float64, "ref")):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (logits, y)]
        routing = moe_route(leaves[0], 2, capacity=9, renormalise=True, impl=impl)
        out = moe_combine(leaves[1], routing.weights, routing.position, impl=impl)
        (out * torch.linspace(-1, 1, 7)).square().sum().backward()
        found.append([t.grad.double() for t in leaves])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ---- losses --------------------------------------------------------------------------------------


def test_load_balance_loss_is_one_where_routing_is_even():
    for gate in ("softmax", "sigmoid"):
        logits = 3 * torch.eye(4).repeat(5, 1)
        experts = moe_route(logits, 1, gate=gate).experts
        torch.testing.assert_close(load_balance_loss(logits, experts, gate=gate), torch.tensor(1.0))
    logits = torch.zeros(8, 4)
    logits[:, 1] = 50.0
    assert load_balance_loss(logits, moe_route(logits, 1).experts) == 4.0
    even = torch.zeros(6, 3)
    value = load_balance_loss(even, moe_route(even, 3).experts)
    torch.testing.assert_close(value, torch.tensor(1.0))


def test_load_balance_loss_is_its_formula_and_its_gradient_goes_through_the_gates():
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    experts = moe_route(logits.detach(), 2, impl="ref").experts
    for gate in ("softmax", "sigmoid"):
        value = load_balance_loss(logits, experts, gate=gate)
        gates = logits.softmax(1) if gate == "softmax" else logits.sigmoid()
        gates = gates / gates.sum(1, keepdim=True)
        share = experts.flatten().bincount(minlength=5) / 18
        torch.testing.assert_close(value, 5 * (share * gates.mean(0)).sum())
        assert torch.autograd.gradcheck(
            lambda t, gate=gate: load_balance_loss(t, experts, gate=gate), logits
        )


def test_z_loss():
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    want = logits.exp().sum(1).log().square().mean()
    torch.testing.assert_close(z_loss(logits), want)
    assert torch.autograd.gradcheck(z_loss, logits)
    assert z_loss(torch.zeros(3, 1)) == 0.0
    assert z_loss(torch.full((2, 2), 1e4, dtype=torch.float16)).isfinite()


# ---- the entries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["native", "ref"])
def test_compile(row):
    logits, sample = torch.randn(12, 6), torch.randn(2, 6)
    testing.check_compile(
        lambda a, b: moe_route(a, 2, sample_logits=b, capacity=3, impl=row), logits, sample
    )
    given = combining(5, 2, 9)
    testing.check_compile(lambda *a: moe_combine(*a, impl=row), *given)


@pytest.mark.skipif(not fastdiff.cpu_levels(), reason="the extension is not built here")
def test_opcheck():
    route, combine = torch.ops.fastdiff.moe_route.default, torch.ops.fastdiff.moe_combine.default
    logits = torch.randn(12, 6)
    torch.library.opcheck(route, route_args(logits, 2))
    given = dict(sample_logits=logits[:3], gate="sigmoid", renormalise=True, capacity=2)
    torch.library.opcheck(route, route_args(logits, 6, **given))
    torch.library.opcheck(combine, combining(5, 2, 9))


def test_no_tokens_has_shapes():
    got = moe_route(torch.ones(0, 4), 2)
    assert got.weights.shape == got.experts.shape == got.position.shape == (0, 2)
    assert got.order.shape == (0,) and torch.equal(got.offsets, torch.zeros(5, dtype=torch.int64))


L, S = torch.ones(6, 4), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(logits="no"), "logits is str, need a torch.Tensor"),
        (dict(logits=L[0]), r"logits has shape \[4\], need 2 dimensions"),
        (dict(logits=L.int()), "logits is torch.int32, need float16"),
        (dict(logits=L[:, :0]), r"logits has shape \[6, 0\], need at least one expert"),
        (dict(k=0), "k is 0, need an integer from 1 to 4, the experts"),
        (dict(k=5), "k is 5, need an integer from 1 to 4"),
        (dict(k=2.0), "k is 2.0, need"),
        (dict(k=True), "k is True, need"),
        (dict(sample_logits=1.0), "sample_logits is float, need a torch.Tensor"),
        (dict(sample_logits=S[0]), r"sample_logits has shape \[4\], need 2 dimensions"),
        (dict(sample_logits=S[:, :3]), r"sample_logits has shape \[2, 3\], need \[B, 4\]"),
        (dict(sample_logits=L[:4]), r"\[4, 4\], need \[B, 4\] with 6 tokens a multiple of B"),
        (dict(sample_logits=S[:0]), r"sample_logits has shape \[0, 4\], need"),
        (dict(sample_logits=S.to("meta")), "sample_logits is on meta, need cpu"),
        (dict(gate="relu"), "gate is 'relu', need one of softmax, sigmoid"),
        (dict(capacity=-1), "capacity is -1, need an integer of at least 0, or None"),
        (dict(capacity=1.5), "capacity is 1.5, need"),
        (dict(capacity=True), "capacity is True, need"),
    ],
)
def test_bad_input_of_route(call, message):
    with pytest.raises(ValueError, match=f"moe_route: .*{message}"):
        moe_route(**{"logits": L, "k": 2, **call})


P = torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(y="no"), "y is str, need a torch.Tensor"),
        (dict(y=L[0]), r"y has shape \[4\], need 2 dimensions"),
        (dict(weights=[1.0]), "weights is list, need a torch.Tensor"),
        (dict(weights=torch.ones(2)), r"weights has shape \[2\], need 2 dimensions"),
        (
            dict(weights=torch.ones(2, 2).half()),
            "weights is torch.float16 on cpu, need torch.float",
        ),
        (dict(y=L.double()), "weights is torch.float32 on cpu, need torch.float64"),
        (dict(position=P.int()), "position is torch.int32, need torch.int64"),
        (dict(position=P[:1]), r"position has shape \[1, 2\], need \[2, 2\]"),
        (dict(position=P.to("meta")), "position is on meta, need cpu, the device of y"),
    ],
)
def test_bad_input_of_combine(call, message):
    with pytest.raises(ValueError, match=f"moe_combine: {message}"):
        moe_combine(**{"y": L, "weights": torch.ones(2, 2), "position": P, **call})


def test_bad_input_of_losses():
    with pytest.raises(ValueError, match=r"load_balance_loss: experts has shape \[2\], need \[6"):
        load_balance_loss(L, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="load_balance_loss: gate is 'tanh', need one of"):
        load_balance_loss(L, torch.zeros(6, 1, dtype=torch.int64), gate="tanh")
    with pytest.raises(ValueError, match=r"z_loss: logits has shape \[4\], need 2 dimensions"):
        z_loss(L[0])
