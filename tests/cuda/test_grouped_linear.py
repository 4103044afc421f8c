"""The CUDA kernels of grouped linear layers, in the model, against float64."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastdiff
from fastdiff import testing, testing_simt
from fastdiff.ops import grouped_linear, grouped_weight_grad
from fastdiff.ops.grouped_linear import ACTIVATIONS, GATED

DTYPES = (torch.bfloat16, torch.float16)
# Rows of the groups, N and K: tiles are of 64 or 128 rows and 128 columns, slices 32 of k. Empty
# groups, a group of every length about a tile's, all rows on one; tails of each size.
CASES = (
    ((1,), 2, 1),
    ((0, 3, 0, 0, 7), 16, 24),
    ((64, 65, 1, 63), 128, 32),
    ((0, 0, 200, 0), 130, 33),
    ((5, 0, 70), 264, 96),
    ((9, 2), 34, 160),
)
ODD = ((3, 11), 37, 45)  # no row is aligned, and N is odd
LARGE = (129, 0, 190)  # of a large grid: tiles of 128 rows


def make(lengths, columns, depth, dtype, index=True, bias=True, seed=0):
    """x, weight, offsets, bias and index; rows of x in another order, some repeated."""
    g = torch.Generator().manual_seed(seed)
    rows, groups = sum(lengths), len(lengths)
    x = torch.randn(rows, depth, generator=g).to(dtype)
    weight = (torch.randn(groups, columns, depth, generator=g) / max(depth, 1) ** 0.5).to(dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    extra = {}
    if index:
        extra["index"] = torch.randint(max(rows, 1), (rows,), generator=g)
    if bias:
        extra["bias"] = torch.randn(groups, columns, generator=g).to(dtype)
    return (x, weight, offsets), extra


def run(args, kwargs, mode=(0, False, False)):
    """The kernel's output, whose inputs stay as they were."""
    inputs = [*args, *(v for v in kwargs.values() if isinstance(v, torch.Tensor))]
    with testing.unchanged(*inputs), testing_simt.emulated(*mode):
        return grouped_linear(*args, **kwargs, impl="native")


def doubled(args, kwargs):
    bias = kwargs.get("bias")
    wide = {**kwargs, "bias": None if bias is None else bias.double()}
    return (args[0].double(), args[1].double(), args[2]), wide


def compare(args, kwargs, mode=(0, False, False), what=""):
    """The kernel is as near to float64 as the reference, which has one rounding, is twice over."""
    got = run(args, kwargs, mode)
    wide, more = doubled(args, kwargs)
    exact = grouped_linear(*wide, **more, impl="ref")
    near = grouped_linear(*args, **kwargs, impl="ref")
    assert got.dtype == args[0].dtype
    testing.assert_close(got, exact, near, what=what)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (*CASES, ODD), ids=str)
def test_against_float64(case, dtype):
    for plain in (False, True):
        args, kwargs = make(*case, dtype, index=not plain, bias=not plain)
        compare(args, kwargs, what=f"plain {plain}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", (*CASES[:4], ((3, 11), 38, 45)), ids=str)
def test_activations(case, activation):
    for bias in (False, True):
        args, kwargs = make(*case, torch.bfloat16, bias=bias)
        compare(args, {**kwargs, "activation": activation}, what=f"bias {bias}")


@pytest.mark.parametrize("activation", (None, "swishglu", "swiglu"))
@pytest.mark.parametrize("columns", (128, 256, 272, 36))
def test_transposed_weights(columns, activation):
    """Those of a gradient: n, and not k, lies side by side."""
    for depth in (64, 41):
        args, kwargs = make((70, 0, 9), columns, depth, torch.float16)
        turned = args[1].transpose(1, 2).contiguous().transpose(1, 2)
        got = compare((args[0], turned, args[2]), {**kwargs, "activation": activation})
        assert torch.equal(got, run(args, {**kwargs, "activation": activation}))


@pytest.mark.parametrize("activation", (None, "geglu"))
@pytest.mark.parametrize("turned", (False, True))
def test_tiles_of_128_rows(turned, activation):
    columns = 128 * 44 + 16  # so many that no multiprocessor is idle
    (x, weight, offsets), kwargs = make(LARGE, columns, 40, torch.bfloat16)
    if turned:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    testing_simt.counters()
    compare((x, weight, offsets), {**kwargs, "activation": activation})
    tiles = 319 // 128 + 3
    assert testing_simt.counters()["threads"] == 256 * tiles * 45


@pytest.mark.parametrize("activation", (None, "geglu"))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout, activation):
    args, kwargs = make((5, 0, 60), 48, 40, torch.bfloat16)
    for i in range(2):
        mixed = [testing.lay(t, layout if i == j else "contiguous") for j, t in enumerate(args[:2])]
        compare((*mixed, args[2]), {**kwargs, "activation": activation}, what=f"{layout} {i}")
    kwargs["bias"] = testing.lay(kwargs["bias"], layout)
    compare(args, {**kwargs, "activation": activation})


def test_strided_inputs():
    """Rows and experts that lie apart; the same expert for all."""
    (x, weight, offsets), kwargs = make((5, 0, 60), 48, 40, torch.float16)
    wide = torch.full((65, 56), math.nan).half()
    wide[:, 8:48] = x
    compare((wide[:, 8:48], weight, offsets), kwargs)
    for pad in (8, 3):
        apart = torch.full((3, 50, 40 + pad), math.nan).half()
        apart[:, :48, :40] = weight
        compare((x, apart[:, :48, :40], offsets), kwargs)
        turned = torch.full((3, 40, 48 + pad), math.nan).half()
        turned[:, :, :48] = weight.transpose(1, 2)
        compare((x, turned[:, :, :48].transpose(1, 2), offsets), kwargs)
    odd = torch.full((3, 48 * 40 + 4), math.nan).half()
    odd[:, : 48 * 40] = weight.flatten(1)
    compare((x, odd[:, : 48 * 40].unflatten(1, (48, 40)), offsets), kwargs)
    compare((x, weight[:1].expand(3, -1, -1), offsets), kwargs)
    compare((x[:1].expand(65, -1), weight, offsets), {})


def test_sizes_of_zero():
    (x, weight, offsets), kwargs = make((0, 0), 8, 16, torch.bfloat16)
    assert run((x, weight, offsets), {}).shape == (0, 8)
    for length in ((4, 5), (0, 0)):
        args, kwargs = make(length, 8, 0, torch.bfloat16, index=False)
        compare(args, kwargs)


def test_many_experts():
    """More than a warp looks at together."""
    for lengths in ([i % 2 for i in range(41)], [0] * 40 + [3] + [0] * 30 + [70]):
        args, kwargs = make(lengths, 16, 24, torch.bfloat16)
        compare(args, kwargs)


@pytest.mark.parametrize("columns", (24, 21))
def test_rows_past_the_last_group_are_not_touched(columns):
    """tests/conftest.py: memory that C++ asks for is full of NaN."""
    (x, weight, offsets), kwargs = make((5, 0, 70), columns, 40, torch.bfloat16)
    whole = run((x, weight, offsets), kwargs)
    assert not whole.isnan().any()
    short, index = torch.tensor([0, 5, 5, 40]), kwargs["index"].clone()
    index[40:] = 2**62
    got = run((x, weight, short), {**kwargs, "index": index})
    assert torch.equal(got[:40], whole[:40]) and got[40:].isnan().all()
    none = run((x, weight, torch.zeros(4, dtype=torch.int64)), kwargs)
    assert none.shape == whole.shape and none.isnan().all()


@pytest.mark.parametrize("depth", (40, 37))
def test_index_out_of_range_is_a_row_of_zeros(depth):
    """What lies about x, full of NaN, is not read: -1 and T name the rows just outside."""
    (x, weight, offsets), kwargs = make((5, 0, 60), 24, depth, torch.bfloat16)
    index = kwargs["index"].clone()
    index[3:7] = torch.tensor([-1, len(x), 2**62, -(2**63)])
    zero = torch.cat([x, torch.zeros_like(x[:1])])
    named = index.clone()
    named[3:7] = len(x)
    want = run((zero, weight, offsets), {**kwargs, "index": named})
    with testing.guarded(x, weight) as copies:
        got = run((*copies, offsets), {**kwargs, "index": index})
    assert torch.equal(got, want) and not got.isnan().any()


@pytest.mark.parametrize(
    "offsets",
    (
        [0, 70, 30, 90],
        [0, -5, 2**62, 3],
        [0, 2**62, 5, 10],
        [0, 80, 80, 80],
        [0, 0, -(2**63), 0],
        [0] * 32 + [70, 30, 90],
    ),
    ids=str,
)
def test_offsets_are_clamped(offsets):
    """Ones that descend, or leave the rows, are taken as the highest so far, and R at most."""
    groups = len(offsets) - 1
    (x, weight, _), kwargs = make((90, *[0] * (groups - 1)), 24, 40, torch.bfloat16)
    good = torch.tensor(offsets).clamp(0, 90).cummax(0).values
    got = run((x, weight, torch.tensor(offsets)), kwargs)
    want = run((x, weight, good), kwargs)
    rows = int(good[-1])
    assert torch.equal(got[:rows], want[:rows])
    grads = [
        weight_grad(got[:, :24].contiguous().nan_to_num(), x, torch.tensor(o), kwargs["index"])
        for o in (offsets, good.tolist())
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("activation", (None, "swiglu"))
@pytest.mark.parametrize("turned", (False, True))
def test_same_bits_in_every_order(turned, activation):
    """And whatever else is in a group: each row is what it is alone."""
    (x, weight, offsets), kwargs = make((70, 0, 9), 136, 104, torch.bfloat16)
    if turned:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    kwargs["activation"] = activation
    outputs = [run((x, weight, offsets), kwargs, mode) for mode in testing_simt.MODES]
    compare((x, weight, offsets), kwargs)
    for other in outputs[1:]:
        assert torch.equal(other, outputs[0])
    alone = {**kwargs, "index": kwargs["index"][75:76]}
    got = run((x, weight, torch.tensor([0, 0, 0, 1])), alone)
    assert torch.equal(got[0], outputs[0][75])


@pytest.mark.parametrize("turned", (False, True))
@pytest.mark.parametrize("rows", (64, 128))
def test_tensor_cores_are_fed_without_bank_conflicts(rows, turned):
    columns, depth = (128, 96) if rows == 64 else (128 * 132, 64)
    (x, weight, offsets), _ = make((rows,), columns, depth, torch.bfloat16)
    if turned:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    testing_simt.counters()
    run((x, weight, offsets), {"activation": "gelu"})
    seen = testing_simt.counters()
    assert seen["bank_conflicts"] == 0
    tiles, steps = columns // 128, depth // 16
    assert seen["mma"] == tiles * (rows // 16) * 16 * steps
    pieces = 4 if rows == 64 else 2  # warps beside one another, which all load their rows of x
    loads = pieces * rows // 16 + 8 * rows // 32
    assert seen["ldmatrix"] == tiles * loads * steps
    assert seen["copies"] == tiles * (rows + 128) * depth // 8  # 16 bytes each, none twice


def test_non_finite_values():
    """They stay in their row, and in their expert's columns."""
    (x, weight, offsets), kwargs = make((9, 3, 60), 48, 40, torch.float16, index=False)
    x[2, 5], x[10, 3] = math.nan, math.inf
    weight[2, 7, 1] = math.inf
    for activation in (None, "geglu", "swiglu"):
        got = compare((x, weight, offsets), {**kwargs, "activation": activation})
        assert got[2].isnan().all() and not got[:2].isnan().any()


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
def test_activations_of_large_values(activation):
    u = torch.tensor([0.0, -0.0, 3e4, -3e4, 90.0, -90.0, 11.0, -11.0])
    weight = torch.eye(16)[None].half()
    x = torch.cat([u, torch.ones(8)]).repeat(4, 1).half()
    x[1] = x[1].roll(8)
    offsets = torch.tensor([0, 4])
    got = run((x, weight, offsets), {"activation": activation})
    with fastdiff.use("ref"):
        want = grouped_linear(x.double(), weight.double(), offsets, activation=activation)
    assert got.shape[1] == (8 if activation in GATED else 16)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-3)


def test_refusals():
    args, _ = make((3, 4), 8, 16, torch.float32)
    with pytest.raises(RuntimeError, match=r"grouped_linear: the launch failed: .*\(801\)"):
        run(args, {})
    with FakeTensorMode():
        x, w = torch.empty(7, 16, device="cuda"), torch.empty(2, 8, 16, device="cuda")
        o = torch.empty(3, dtype=torch.int64, device="cuda")
        assert "float32" in fastdiff.explain(grouped_linear, x, w, o)["native"]
        assert "float32" in fastdiff.explain(grouped_weight_grad, x, x, o)["native"]


# ---- the gradient of the weight ------------------------------------------------------------------


def weight_grad(grad, x, offsets, index, mode=(0, False, False)):
    inputs = (grad, x, offsets) if index is None else (grad, x, offsets, index)
    with testing.unchanged(*inputs), testing_simt.emulated(*mode):
        return grouped_weight_grad(grad, x, offsets, index=index, impl="native")


def check_grad(grad, x, offsets, index, mode=(0, False, False), what=""):
    got = weight_grad(grad, x, offsets, index, mode)
    exact = grouped_weight_grad(grad.double(), x.double(), offsets, index=index, impl="ref")
    near = grouped_weight_grad(grad, x, offsets, index=index, impl="ref")
    testing.assert_close(got, exact, near, what=what)
    return got


def grads(lengths, columns, depth, dtype):
    (x, _, offsets), kwargs = make(lengths, columns, depth, dtype)
    return torch.randn(sum(lengths), columns).to(dtype), x, offsets, kwargs["index"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (*CASES, ODD), ids=str)
def test_gradient_against_float64(case, dtype):
    grad, x, offsets, index = grads(*case, dtype)
    for each in (None, index):
        got = check_grad(grad, x, offsets, each)
        for e, length in enumerate(case[0]):
            assert length or not got[e].any()


def test_gradient_of_many_experts_and_none_of_their_rows():
    grad, x, offsets, index = grads([i % 3 for i in range(40)], 16, 24, torch.bfloat16)
    check_grad(grad, x, offsets, index)
    assert not check_grad(grad[:0], x[:0], torch.zeros(4, dtype=torch.int64), None).any()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_gradient_of_layouts(layout):
    grad, x, offsets, index = grads((5, 0, 60), 48, 40, torch.bfloat16)
    check_grad(testing.lay(grad, layout), x, offsets, index)
    check_grad(grad, testing.lay(x, layout), offsets, index)


def test_gradient_reads_nothing_outside():
    """Neither rows past the last group, nor beside x; those of a bad index count as zeros."""
    grad, x, offsets, index = grads((5, 0, 60), 48, 40, torch.bfloat16)
    offsets[3] = 41
    grad[41:] = math.nan
    index = index.clone()
    index[3:7] = torch.tensor([-1, len(x), 2**62, -(2**63)])
    zeroed = grad.clone()
    zeroed[3:7] = 0
    want = weight_grad(zeroed, x, offsets, index.clamp(0, 64))
    with testing.guarded(x, grad) as (inner_x, inner_grad):
        got = weight_grad(inner_grad, inner_x, offsets, index)
    assert torch.equal(got, want) and not got.isnan().any()


def test_gradient_has_the_same_bits_in_every_order_and_no_bank_conflicts():
    given = grads((70, 0, 9), 136, 104, torch.bfloat16)
    outputs = [weight_grad(*given, mode) for mode in testing_simt.MODES]
    check_grad(*given)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    testing_simt.counters()
    weight_grad(*given)
    seen = testing_simt.counters()
    assert seen["bank_conflicts"] == 0 and seen["mma"] == 2 * (3 + 1) * 256  # tiles, slices


def test_gradient_of_a_layer():
    """autograd through the kernels alone, against float64."""
    (x, weight, offsets), kwargs = make((20, 0, 13), 24, 40, torch.bfloat16)
    wide, more = doubled((x, weight, offsets), kwargs)
    leaves = [t.requires_grad_() for t in (x, weight, *wide[:2])]
    with testing_simt.emulated():
        grouped_linear(x, weight, offsets, **kwargs, activation="swiglu").float().sum().backward()
    grouped_linear(*wide, **more, activation="swiglu", impl="ref").sum().backward()
    for got, want in zip(leaves[:2], leaves[2:], strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=0.05, atol=0.2)
