import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import gather_tokens, scatter_tokens, update_tokens_
from fastdiff.ops.tokens import GATHER_IMPLS, SCATTER_IMPLS, UPDATE_IMPLS

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


def cache_of(shape, heads, dtype):
    """A cache, rows for it and an index; heads inside tokens, as attention leaves them."""
    B, N, A, D = shape
    if not heads:
        return (
            torch.randn(B, N, D).to(dtype),
            torch.randint(max(N, 1), (B, A)),
            torch.randn(B, A, D).to(dtype),
        )
    cache, y = torch.randn(B, N, heads, D).to(dtype), torch.randn(B, A, heads, D).to(dtype)
    index = torch.randint(max(N, 1), (B, A))
    return cache.transpose(1, 2), index, y.transpose(1, 2)


def updated(cache, index, y):
    """What the docstring says, row by row."""
    out = cache.clone()
    for b, row in enumerate(index.tolist()):
        for a, n in enumerate(row):
            out[b, ..., n, :] = y[b, ..., a, :]
    return out


@pytest.mark.parametrize("heads", [0, 1, 3])
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(UPDATE_IMPLS))
def test_update_writes_its_rows_alone(row, dtype, heads):
    for shape in FEW if row == "triton" else SHAPES:
        cache, index, y = cache_of(shape, heads, dtype)
        want = updated(cache, index, y)
        with testing.unchanged(index, y):
            assert update_tokens_(cache, index, y, impl=row) is cache
        assert torch.equal(cache, want), f"{row} {shape}"


@pytest.mark.parametrize("row", testing.rows_of(UPDATE_IMPLS))
def test_update_of_views_leaves_the_memory_between(row):
    """Values in a joint projection of queries, keys and values; heads outside tokens; strided y."""
    index = torch.tensor([[4, 0, 4], [1, 2, 3]])
    joint = torch.randn(2, 5, 3, 4, 8)
    before, y = joint.clone(), torch.randn(2, 4, 3, 8)
    v = joint[:, :, 2].transpose(1, 2)  # [2, 4, 5, 8]
    want = updated(v, index, y)
    update_tokens_(v, index, y, impl=row)
    assert torch.equal(v, want) and torch.equal(joint[:, :, :2], before[:, :, :2])
    outside = torch.randn(2, 4, 5, 8)
    want = updated(outside, index, y)
    update_tokens_(outside, index, y.transpose(1, 2).contiguous().transpose(1, 2), impl=row)
    assert torch.equal(outside, want)
    wide = torch.randn(2, 5, 20)
    kept, rows = wide.clone(), torch.randn(2, 3, 16)[..., ::2]
    want = updated(wide[..., 3:11], index, rows)
    update_tokens_(wide[..., 3:11], index, rows, impl=row)
    assert torch.equal(wide[..., 3:11], want)
    assert torch.equal(wide[..., :3], kept[..., :3]) and torch.equal(wide[..., 11:], kept[..., 11:])


@pytest.mark.parametrize("row", testing.rows_of(UPDATE_IMPLS))
def test_ragged_batches_are_one_sample(row):
    """Two, none and three tokens of three samples, in one call without padding."""
    x, y = torch.randn(3, 6, 8), torch.randn(1, 5, 8)
    index = torch.tensor([[0 * 6 + 1, 0 * 6 + 4, 2 * 6 + 0, 2 * 6 + 5, 2 * 6 + 2]])
    flat = x.view(1, 18, 8)
    gathered = gather_tokens(flat, index)
    assert torch.equal(gathered[0, :2], x[0, [1, 4]]) and torch.equal(
        gathered[0, 2:], x[2, [0, 5, 2]]
    )
    want = x.clone()
    want[0, [1, 4]], want[2, [0, 5, 2]] = y[0, :2], y[0, 2:]
    update_tokens_(flat, index, y, impl=row)
    assert torch.equal(x, want)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_update_at_every_level(level, dtype):
    for heads in (0, 5):
        cache, index, y = cache_of((2, 65, 30, 77), heads, dtype)
        want = updated(cache, index, y)
        with testing.cpu_level(level):
            update_tokens_(cache, index, y, impl="native")
        assert torch.equal(cache, want)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_update_by_every_triton_configuration():
    from fastdiff.kernels import tokens

    cache, index, y = cache_of((2, 19, 40, 300), 2, torch.float32)
    want = updated(cache, index, y)
    for config in tokens.CONFIGS:
        got = cache.clone()
        tokens.update_tokens_(got, index, y, config=config)
        assert torch.equal(got, want), config
    index[:, 1:4] = torch.tensor([19, -1, 2**62])  # no such rows: skipped
    kept = [0, *range(4, 40)]
    want = updated(cache, index[:, kept], y[:, :, kept])
    tokens.update_tokens_(cache, index, y)
    assert torch.equal(cache, want)


def test_update_refuses_before_it_writes():
    cache, index, y = cache_of((2, 5, 3, 4), 2, torch.float32)
    before = cache.clone()
    for bad in (5, -1):
        spoilt = index.clone()
        spoilt[1, 2] = bad
        for row in ("native", "ref"):
            with pytest.raises(ValueError, match=f"index has value {bad}, need 0 to 4"):
                update_tokens_(cache, spoilt, y, impl=row)
    assert torch.equal(cache, before)
    with pytest.raises(ValueError, match="cache has strides .* need a last dimension that is"):
        update_tokens_(cache.transpose(2, 3), index, y)
    with pytest.raises(ValueError, match=r"y has shape \[2, 2, 4, 3\], need \[2, 2, 3, 4\]"):
        update_tokens_(cache, index, y.transpose(2, 3))
    with pytest.raises(ValueError, match=r"cache has shape \[5\], need 3 or 4 dimensions"):
        update_tokens_(torch.ones(5), index, y)


def test_update_opcheck_and_compile():
    cache, index, y = cache_of((2, 5, 3, 4), 2, torch.float32)
    torch.library.opcheck(torch.ops.fastdiff.update_tokens_.default, (cache, index, y))
    compiled = torch.compile(update_tokens_, fullgraph=True)
    want = updated(cache, index, y)
    compiled(cache, index, y)
    assert torch.equal(cache, want)
