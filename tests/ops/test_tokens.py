import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import gather_tokens, scatter_tokens
from fastdiff.ops.tokens import GATHER_IMPLS, SCATTER_IMPLS

GATES = ("none", "per sample", "per token")
# (B, N, A, D)
SHAPES = [(2, n, a, d) for n, a in ((1, 1), (7, 3), (65, 77)) for d in (1, 17, 64)] + [
    (1, 77, 0, 40),
    (0, 5, 3, 8),
    (3, 5, 2, 0),
    (2, 64, 16, 1152),
]
# The interpreter takes about 10 ms a program: it is given fewer of them.
FEW = [(2, 7, 3, 17), (2, 20, 77, 40), (1, 5, 0, 8), (0, 5, 3, 8), (3, 5, 2, 0), (1, 4, 2, 1152)]


def inputs(shape, dtype=torch.float32, gate="none", unique=False):
    B, N, A, D = shape
    x, y = torch.randn(B, N, D).to(dtype), torch.randn(B, A, D).to(dtype)
    index = torch.randint(max(N, 1), (B, A))
    if unique:
        index = torch.rand(B, N).argsort(1)[:, :A]
    gates = {"none": None, "per sample": torch.randn(B, D), "per token": torch.randn(B, A, D)}
    g = gates[gate]
    return x, index, y, None if g is None else g.to(dtype)


def by_loops(x, index, y, gate):
    """What the docstring says, row by row."""
    out = x.clone()
    for b, row in enumerate(index.tolist()):
        for a, n in enumerate(row):
            if gate is None:
                out[b, n] = y[b, a]
            else:
                out[b, n] = x[b, n] + (gate[b] if gate.dim() == 2 else gate[b, a]) * y[b, a]
    return out


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def check_scatter(got, x, index, y, gate, what=""):
    assert got.is_contiguous() and got.dtype == x.dtype
    if gate is None:
        assert torch.equal(got, by_loops(x, index, y, gate)), what
    else:
        exact = by_loops(*double(x, index, y, gate))
        testing.assert_close(got, exact, by_loops(x, index, y, gate), what=what)
        named = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, index, True)
        assert torch.equal(got[~named], x[~named]), what


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(GATHER_IMPLS))
def test_gather_has_the_bits_of_x(row, dtype):
    for shape in FEW if row == "triton" else SHAPES:
        x, index, _, _ = inputs(shape, dtype)
        with testing.unchanged(x, index):
            got = gather_tokens(x, index, impl=row)
        want = [x[b, index[b]] for b in range(shape[0])]
        assert got.shape == (shape[0], *shape[2:]) and got.is_contiguous() and got.dtype == dtype
        assert torch.equal(got, torch.stack(want) if want else got), f"{row} {shape}"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(SCATTER_IMPLS))
def test_scatter_matches_float64(row, dtype, gate):
    """Most of ``SHAPES`` name rows several times: the last counts."""
    for shape in FEW if row == "triton" else SHAPES:
        tensors = inputs(shape, dtype, gate)
        with testing.unchanged(*tensors):
            got = scatter_tokens(*tensors, impl=row)
        check_scatter(got, *tensors, what=f"{row} {shape}")


@pytest.mark.parametrize("row", testing.rows_of(SCATTER_IMPLS))
def test_the_last_of_several_counts(row):
    x, y = torch.zeros(1, 3, 2), torch.arange(1.0, 6).view(1, 5, 1).expand(1, 5, 2)
    index = torch.tensor([[2, 0, 2, 0, 2]])
    want = torch.tensor([4.0, 0.0, 5.0]).view(1, 3, 1).expand(1, 3, 2)
    assert torch.equal(scatter_tokens(x, index, y, impl=row), want)
    assert torch.equal(scatter_tokens(x, index, y, torch.full((1, 2), 2.0), impl=row), 2 * want)


@pytest.mark.parametrize("row", testing.rows_of(SCATTER_IMPLS))
def test_gather_and_scatter_are_inverse(row):
    """Of float32's special values too: rows move as they are."""
    x, index, _, _ = inputs((2, 33, 12, 20), unique=True)
    x[0, :, 3], x[1, 5] = torch.inf, torch.nan
    taken = gather_tokens(x, index, impl=row)
    back = scatter_tokens(torch.zeros_like(x), index, taken, impl=row)
    assert torch.equal(gather_tokens(back, index, impl=row).isnan(), taken.isnan())
    assert torch.equal(scatter_tokens(x, index, taken, impl=row).nan_to_num(7.0), x.nan_to_num(7.0))


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
@pytest.mark.parametrize("gate", GATES)
def test_every_triton_configuration(gate):
    from fastdiff.kernels import tokens

    given = inputs((2, 19, 40, 300), gate=gate)
    for name, got in testing.run_configs(tokens.scatter_tokens, tokens.CONFIGS, *given):
        check_scatter(got, *given, what=name)
    for name, got in testing.run_configs(tokens.gather_tokens, tokens.CONFIGS, *given[:2]):
        assert torch.equal(got, gather_tokens(*given[:2], impl="ref")), name


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_triton_touches_nothing_outside():
    """The interpreter raises for an access outside of the arguments: none for any index."""
    from fastdiff.kernels import tokens

    x, index, y, gate = inputs((2, 9, 5, 7), gate="per sample")
    index[:, 1:4] = torch.tensor([9, -1, 2**62])
    want = gather_tokens(x, index.clamp(0, 8), impl="ref")
    want[:, 1:4] = 0
    assert torch.equal(tokens.gather_tokens(x, index), want)
    kept = [0, 4]
    want = scatter_tokens(x, index[:, kept], y[:, kept], gate, impl="ref")
    torch.testing.assert_close(tokens.scatter_tokens(x, index, y, gate), want)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_layouts(level, layout, dtype):
    for gate in GATES:
        tensors = inputs((2, 65, 30, 77), dtype, gate)
        laid = [t if t is None else testing.lay(t, layout) for t in tensors]
        with testing.cpu_level(level):
            check_scatter(scatter_tokens(*laid, impl="native"), *tensors)
            got = gather_tokens(*laid[:2], impl="native")
        assert torch.equal(got, gather_tokens(*tensors[:2], impl="ref"))


@pytest.mark.parametrize("row", testing.rows_of(SCATTER_IMPLS))
def test_one_index_and_one_gate_for_all_samples(row):
    x, index, y, gate = inputs((3, 20, 6, 10), gate="per sample")
    index, gate = index[:1].expand(3, -1), gate[:1].expand(3, -1)
    check_scatter(scatter_tokens(x, index, y, gate, impl=row), x, index, y, gate)
    assert torch.equal(gather_tokens(x, index, impl=row), x[:, index[0]])


def test_opcheck_and_compile():
    for gate in GATES:
        tensors = inputs((2, 9, 4, 6), gate=gate)
        torch.library.opcheck(torch.ops.fastdiff.scatter_tokens.default, tensors)
    torch.library.opcheck(torch.ops.fastdiff.gather_tokens.default, tensors[:2])
    testing.check_compile(gather_tokens, *tensors[:2])
    testing.check_compile(scatter_tokens, *tensors)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_come_from_the_reference(gate):
    x, index, y, g = inputs((2, 5, 7, 3), torch.float64, gate)  # indices repeat
    leaves = [t.requires_grad_() for t in (x, y, g) if t is not None]
    assert torch.autograd.gradcheck(lambda x, y, *g: scatter_tokens(x, index, y, *g), leaves)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, index), leaves[:1])
    why = fastdiff.explain(gather_tokens, x.detach().float().requires_grad_(), index)
    assert "no backward" in why["native"] and "no backward" in why["triton"] and why["ref"] is None


def test_gradient_of_an_overwritten_row_is_zero():
    y = torch.ones(1, 3, 2, requires_grad=True)
    index = torch.tensor([[1, 1, 0]])
    scatter_tokens(torch.zeros(1, 2, 2), index, y).sum().backward()
    assert torch.equal(y.grad[0, :, 0], torch.tensor([0.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    "op, args, message",
    [
        (gather_tokens, ("no", None), "gather_tokens: x is str, need a torch.Tensor"),
        (gather_tokens, (torch.ones(2, 3), None), "need 3 dimensions"),
        (gather_tokens, (torch.ones(1, 3, 2), torch.zeros(1, 2)), "index is torch.float32, need"),
        (
            gather_tokens,
            (torch.ones(1, 3, 2), torch.zeros(2, dtype=torch.int64)),
            r"index has shape \[2\], need \[1, any number\]",
        ),
        (
            scatter_tokens,
            (torch.ones(1, 3, 2), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 3, 2)),
            r"scatter_tokens: y has shape \[1, 3, 2\], need \[1, 2, 2\]",
        ),
    ],
)
def test_bad_input(op, args, message):
    with pytest.raises(ValueError, match=message):
        op(*args)


@pytest.mark.parametrize("bad", (-1, 3, 2**62, -(2**63)))
@pytest.mark.parametrize("row", ("native", "ref"))
def test_index_out_of_range(row, bad):
    x, index = torch.ones(2, 3, 4), torch.tensor([[0, 1], [2, bad]])
    for call in (lambda: gather_tokens(x, index, impl=row),
                 lambda: scatter_tokens(x, index, x[:, :2], impl=row)):  # fmt: skip
        with pytest.raises(ValueError, match=f"index has value {bad}, need 0 to 2"):
            call()


def test_the_native_entry_checks_for_itself():
    ops, x, index = torch.ops.fastdiff, torch.ones(2, 3, 4), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="index is Int, need Long"):
        ops.gather_tokens(x, index.int())
    with pytest.raises(RuntimeError, match="y has shape"):
        ops.scatter_tokens(x, index, x, None)
    with pytest.raises(RuntimeError, match="gate has shape"):
        ops.scatter_tokens(x, index, x[:, :2], torch.ones(4))
