import itertools

import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import lora_add, lora_linear
from fastdiff.ops.lora import IMPLS

ROWS = testing.rows_of(IMPLS)
# (dimensions of y before the last, K, N, rank): tokens, pictures, one row of each sample, a tile
# and one more, an odd number of vectors of rank, no rows, no inner width, no columns.
SHAPES = [
    ((1, 1), 1, 1, 1), ((3, 7), 20, 9, 3), ((4,), 33, 65, 16), ((2, 3, 5), 40, 48, 8),
    ((2, 65), 77, 130, 17), ((1, 13), 1152, 40, 16), ((3, 6), 1600, 16, 24), ((2, 5), 9, 33, 64),
    ((2, 4), 30, 20, 256), ((3, 14), 17, 31, 33), ((2, 9), 12, 10, 0), ((0, 4), 8, 8, 4),
    ((2, 0), 8, 8, 4), ((2, 3), 0, 8, 4), ((2, 3), 8, 0, 4),
]  # fmt: skip
FEW = [SHAPES[i] for i in (0, 1, 2, 10, 11)] + [((1, 18), 40, 70, 17)]


def make(lead, k, n, rank, dtype=torch.float32, adapters=3):
    """y, x, down, up, scale and index; the last adapter's scale is 0, sample 0 has none of three.

    Values are few bits wide where sums are short: the largest error of a few numbers is luck.
    """
    few = max(lead, default=0) * n < 16

    def draw(*shape):
        return torch.randint(-4, 5, shape) / 4 if few else torch.randn(shape)

    y, x = draw(*lead, n).to(dtype), draw(*lead, k).to(dtype)
    down = (draw(adapters or 1, rank, k) / (1 if few else max(k, 1) ** 0.5)).to(dtype)
    up = draw(adapters or 1, n, rank).to(dtype)
    scale = torch.rand(adapters or 1) + 0.5
    if not adapters:
        return y, x, down, up, scale, None
    scale[-1] = 0
    index = torch.randint(0, adapters + 1, lead[:1])
    index[:1] = 0
    index[1:2] = 1
    return y, x, down, up, scale, index


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def by_hand(y, x, down, up, scale, index):
    """What the docstring says, sample by sample, in the dtype of ``y``, as PEFT adds it."""
    out = []
    for b in range(y.shape[0]):
        a = 0 if index is None else int(index[b]) - 1
        if a < 0:
            out.append(y[b])
            continue
        added = F.linear(F.linear(x[b], down[a]), up[a])
        out.append(y[b] + added * scale[a].to(y.dtype))
    return torch.stack(out) if out else y.clone()


def check(got, args, what=""):
    assert got.dtype == args[0].dtype and got.shape == args[0].shape and got.is_contiguous(), what
    testing.assert_close(got, by_hand(*double(*args)), by_hand(*args), what=what)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_matches_float64(row, dtype):
    for shape in FEW if row == "triton" else SHAPES:
        for adapters in (0, 3):
            args = make(*shape, dtype, adapters)
            with testing.unchanged(*args):
                got = lora_add(*args, impl=row)
            check(got, args, f"{row} {shape} {adapters}")
            assert got.data_ptr() != args[0].data_ptr() or not got.numel()


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_nothing_added_is_y_to_the_bit(row, dtype):
    """-0 and NaN of y stay, and what an unused adapter holds is not looked at."""
    y, x, down, up, scale, _ = make((4, 5), 20, 24, 16, dtype)
    y[:, 0, 0], y[:, 1, 1] = -0.0, torch.nan
    down[1:], up[1:] = torch.nan, torch.inf
    index = torch.tensor([0, 3, 1, 3])  # adapter 3 has scale 0
    got = lora_add(y, x, down, up, scale, index, impl=row)
    bits = y.view(torch.uint8), got.view(torch.uint8)
    for b in (0, 1, 3):
        assert torch.equal(bits[0][b], bits[1][b])
    assert not torch.equal(bits[0][2], bits[1][2])
    for none in (0.0, -0.0):
        alone = lora_add(y, x, down[1:2], up[1:2], torch.tensor([none]), impl=row)
        assert torch.equal(alone.view(torch.uint8), bits[0])
    empty = lora_add(y, x, down[:1, :0], up[:1, :, :0], scale[:1], impl=row)
    assert torch.equal(empty.view(torch.uint8), bits[0])


def rounded(args, first, second):
    """float64, but the low-rank product is rounded, and with its scale again."""
    y, x, down, up, scale, index = double(*args)
    out = []
    for b in range(y.shape[0]):
        a = int(index[b]) - 1
        low = x[b] @ down[a].T
        low = low.to(args[0].dtype).double() if first else low
        low = low * scale[a]
        low = low.to(args[0].dtype).double() if second else low
        out.append(y[b] + (low @ up[a].T if a >= 0 and scale[a] else 0.0))
    return torch.stack(out)


@pytest.mark.parametrize("row", ROWS)
def test_rounding_of_the_low_rank_product(row):
    """One that the result shows: up and y have few bits, and the sum over the rank cancels."""
    dtype = torch.bfloat16
    x = torch.randn(2, 5, 64).to(dtype)
    half = torch.randn(2, 4, 64).to(dtype) / 8
    down = torch.cat((half, half), 1)
    down[:, 4:, 0] += 2**-7  # beside it, what a rounding loses
    up = torch.ones(2, 8, 4).to(dtype)
    up = torch.cat((up, -up), 2)
    y, scale = torch.zeros(2, 5, 8).to(dtype), torch.tensor([1.25, 0.7])
    args = y, x, down, up, scale, torch.tensor([1, 2])
    kinds = {"native": (0, 0), "ref": (0, 0), "triton": (1, 0), "torch": (1, 1)}
    found = {kind: rounded(args, *kind) for kind in ((0, 0), (1, 0), (1, 1))}
    got = lora_add(*args, impl=row).double()
    errors = {kind: (got - want).abs().max().item() for kind, want in found.items()}
    size = found[0, 0].abs().max().item()
    assert errors[kinds[row]] <= 2**-8 * size + 1e-6, errors
    others = [e for kind, e in errors.items() if kind != kinds[row]]
    assert min(others) > 2**-6 * size, errors  # a row that rounds otherwise fails


@pytest.mark.parametrize("adapters", (0, 4))
def test_a_sample_is_what_it_is_alone(adapters):
    for dtype in testing.DTYPES:
        for lead in ((5, 17), (5, 1), (5,)):
            args = make(lead, 70, 45, 16, dtype, adapters)
            y, x, *factors, index = args
            mixed = lora_add(*args, impl="native")
            for b in range(lead[0]):
                mine = None if index is None else index[b : b + 1]
                alone = lora_add(y[b : b + 1], x[b : b + 1], *factors, mine, impl="native")
                assert torch.equal(alone, mixed[b : b + 1])
            if len(lead) == 2:  # nor on rows beside it
                few = lora_add(y[:, 2:4], x[:, 2:4], *factors, index, impl="native")
                assert torch.equal(few, mixed[:, 2:4])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("row", ROWS)
def test_layouts(row, layout):
    for adapters in (0, 2):
        args = make((2, 7), 20, 33, 9, torch.float32, adapters)
        for i in range(4):
            mixed = [testing.lay(t, layout) if i == j else t for j, t in enumerate(args)]
            with testing.unchanged(*mixed):
                check(lora_add(*mixed, impl=row), args, f"{layout} {i}")
    y, x, *rest = make((3, 8, 2), 20, 33, 9)
    for pair in ((y[:, 1:5], x[:, 1:5]), [t[:1].expand(3, -1, -1, -1) for t in (y, x)]):
        check(lora_add(*pair, *rest, impl=row), (*pair, *rest), "sliced or expanded")


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_levels(level):
    with testing.cpu_level(level):
        for dtype in testing.DTYPES:
            for shape in SHAPES[:10]:
                for adapters in (0, 3):
                    args = make(*shape, dtype, adapters)
                    check(lora_add(*args, impl="native"), args, f"{level} {shape}")


def test_the_same_bits_for_any_number_of_threads():
    before, args = torch.get_num_threads(), make((4, 300), 200, 150, 16)
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(lora_add(*args, impl="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", (0, 3))
@pytest.mark.parametrize("row", ROWS)
def test_gradients(row, adapters):
    """Of every choice of inputs, against float64 autograd of the formula; also at a scale of 0."""
    of = torch.float32 if row in ("native", "triton") else torch.float64
    for lead in ((3, 4), (4,), (3, 2, 3)):
        args = make(lead, 10, 9, 5, torch.float64, adapters)
        leaves = [t.to(torch.float64).requires_grad_() for t in args[:5]]
        seen = torch.randn(*lead, 9, dtype=torch.float64)
        want = torch.autograd.grad(by_hand(*leaves, args[5]), leaves, seen, allow_unused=True)
        for wants in itertools.product((False, True), repeat=5):
            if not any(wants):
                continue
            given = [
                t.detach().to(of).requires_grad_(w) for t, w in zip(leaves, wants, strict=True)
            ]
            out = lora_add(*given, args[5], impl=row)
            asked = [t for t, w in zip(given, wants, strict=True) if w]
            got = iter(torch.autograd.grad(out, asked, seen.to(of)))
            for name, w, exact in zip("y x down up scale".split(), wants, want, strict=True):
                if w:
                    torch.testing.assert_close(
                        next(got), exact.to(of), msg=lambda m, n=name: f"{n}: {m}"
                    )


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_gradients_of_half_precision(dtype):
    for adapters in (0, 4):
        args = make((4, 33), 40, 48, 16, dtype, adapters)
        seen = torch.randn(4, 33, 48).to(dtype)
        results = []
        for of, fn in ((dtype, lora_add), (torch.float64, by_hand), (dtype, by_hand)):
            leaves = [t.to(of) if i < 4 else t for i, t in enumerate(args[:5])]
            leaves = [t.detach().requires_grad_() for t in leaves]
            results.append(torch.autograd.grad(fn(*leaves, args[5]), leaves, seen.to(of)))
        for i, (got, exact, eager) in enumerate(zip(*results, strict=True)):
            assert got.dtype == args[i].dtype
            # the product's rounding, which eager torch has before the sum over samples too
            testing.assert_close(got, exact.double(), eager, factor=3, what=f"{adapters} {i}")


def test_gradients_stay_with_their_adapter():
    """A sample's NaN reaches neither another adapter's gradients nor another sample's."""
    y, x, down, up, scale, _ = make((3, 4), 10, 9, 5, adapters=3)
    index, seen = torch.tensor([1, 3, 2]), torch.randn(3, 4, 9)
    leaves = [t.requires_grad_() for t in (y, x, down, up, scale)]
    clean = torch.autograd.grad(lora_add(*leaves, index), leaves, seen)
    seen[1] = torch.nan
    got = torch.autograd.grad(lora_add(*leaves, index), leaves, seen)
    for of_sample in (0, 1):
        assert torch.equal(got[of_sample][[0, 2]], clean[of_sample][[0, 2]])
    for of_adapter in (2, 3, 4):
        assert torch.equal(got[of_adapter][:2], clean[of_adapter][:2])
        assert got[of_adapter][2].isnan().any()


@pytest.mark.parametrize("broken", ("down", "up"))
def test_an_adapter_that_adds_nothing_is_not_looked_at(broken):
    """Neither by a sample without one nor at scale 0, forward and backward."""
    y, x, down, up, scale, _ = make((3, 4), 10, 9, 5, adapters=3)
    index, seen = torch.tensor([0, 3, 2]), torch.randn(3, 4, 9)
    scale[1] = 0.0
    clean_x = torch.autograd.grad(lora_add(y, x.requires_grad_(), down, up, scale, index), x, seen)
    (down if broken == "down" else up)[:2] = torch.nan
    out = lora_add(y, x, down, up, scale, index)
    assert torch.equal(out[[0, 2]], y[[0, 2]])
    assert torch.equal(torch.autograd.grad(out, x, seen)[0], clean_x[0])
    one = lora_add(y, x, down[:1], up[:1], torch.zeros(1))
    assert torch.equal(torch.autograd.grad(one, x, seen)[0], torch.zeros_like(x))


def test_adapters_without_samples_get_zero():
    y, x, down, up, scale, _ = make((2, 4), 10, 9, 5, adapters=3)
    leaves = [t.requires_grad_() for t in (down, up, scale)]
    lora_add(y, x, down, up, scale, torch.tensor([0, 2])).sum().backward()
    for leaf in leaves:
        assert not leaf.grad[[0, 2]].any() and leaf.grad[1].any()
        leaf.grad = None
    lora_add(y, x, down, up, scale, torch.tensor([0, 0])).sum().backward()
    assert not any(leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("adapters", (0, 3))
def test_what_is_kept_for_the_backward(adapters):
    """x where down is trained, the low-rank product where up or the scale is; never y."""
    args = make((3, 40), 50, 60, 4, torch.float32, adapters)
    sizes = {"x": args[1].numel(), "low": 3 * 40 * 4}
    for names, keeps in (
        (("x",), ()), (("y", "x"), ()), (("down",), ("x",)), (("up",), ("low",)),
        (("scale",), ("low",)), (("down", "up"), ("x", "low")), (("x", "down"), ("x",)),
    ):  # fmt: skip
        leaves = dict(zip(("y", "x", "down", "up", "scale"), args, strict=False))
        leaves = {n: t.detach().requires_grad_(n in names) for n, t in leaves.items()}
        held = []

        def pack(t, held=held):
            held.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lora_add(*leaves.values(), args[5])
        small = {t.data_ptr() for n, t in leaves.items() if n not in ("y", "x")}
        small |= {args[5].data_ptr()} if adapters else set()
        large = [t.numel() for t in held if t.data_ptr() not in small]
        assert sorted(large) == sorted(sizes[k] for k in keeps), names


def test_no_gradients_at_rank_zero_and_no_second_derivative():
    y, x, down, up, scale, _ = make((2, 3), 8, 9, 0, adapters=0)
    leaves = [t.requires_grad_() for t in (y, x, down, up, scale)]
    grads = torch.autograd.grad(lora_add(*leaves).sum(), leaves)
    assert torch.equal(grads[0], torch.ones_like(y)) and not any(g.any() for g in grads[1:])
    y, x, down, up, scale, index = make((2, 3), 8, 9, 4)
    x.requires_grad_()
    out = lora_add(y, x, down, up, scale, index)
    with pytest.raises(NotImplementedError, match="lora_add: there is no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_a_layer_and_its_adapter():
    y, x, down, up, scale, index = make((3, 5), 20, 24, 4)
    weight, bias = torch.randn(24, 20), torch.randn(24)
    got = lora_linear(x, weight, bias, down, up, scale, index)
    torch.testing.assert_close(got, by_hand(F.linear(x, weight, bias), x, down, up, scale, index))
    leaves = [t.requires_grad_() for t in (x, weight, bias, down, up, scale)]
    got = torch.autograd.grad(lora_linear(*leaves, index).square().sum(), leaves)
    plain = by_hand(F.linear(x, weight, bias), x, down, up, scale, index)
    want = torch.autograd.grad(plain.square().sum(), leaves)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


# ---- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", (-1, 4, 2**62, -(2**63)))
@pytest.mark.parametrize("row", ("native", "torch", "ref"))
def test_index_out_of_range(row, bad):
    y, x, down, up, scale, index = make((2, 3), 8, 9, 4)
    index[1] = bad
    with pytest.raises(ValueError, match=f"^lora_add: index has value {bad}, need 0 to 3"):
        lora_add(y, x, down, up, scale, index, impl=row)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_triton_gives_y_for_an_index_out_of_range():
    y, x, down, up, scale, _ = make((4, 3), 8, 9, 4)
    index = torch.tensor([1, 4, -1, 2**62])
    got = lora_add(y, x, down, up, scale, index, impl="triton")
    assert torch.equal(got[1:], y[1:]) and not torch.equal(got[0], y[0])


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import lora as launchers

    for shape in (((3, 70), 100, 300, 16), ((2, 5), 40, 33, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            args = make(*shape, dtype)
            for keep in (False, True):
                given = (*args, keep)
                runs = testing.run_configs(launchers.lora_add, launchers.CONFIGS, *given)
                for name, (got, low) in runs:
                    check(got, args, name)
                    assert low.shape == ((*shape[0], shape[3]) if keep else (0,))


@pytest.mark.parametrize("row", ROWS)
def test_the_product_that_is_kept(row):
    """Of a sample with a scale of 0 too; 0 where there is no adapter."""
    y, x, down, up, scale, index = args = make((4, 5), 20, 24, 6)
    index[:] = torch.tensor([0, 1, 3, 2])
    fn = next(r.fn for r in IMPLS if r.name == row)
    out, low = fn(*args, True)
    assert torch.equal(out, fn(*args, False)[0]) and low.is_contiguous()
    want = torch.stack([x[b] @ down[index[b] - 1].T * (index[b] > 0) for b in range(4)])
    torch.testing.assert_close(low, want)


def test_opcheck_and_compile():
    for shape in (((2, 3), 6, 8, 4), ((2, 3, 2), 6, 8, 4), ((3,), 6, 8, 4)):
        for adapters in (0, 2):
            args = make(*shape, torch.float32, adapters)
            for keep in (False, True):
                torch.library.opcheck(torch.ops.fastdiff.lora_add.default, (*args, keep))
            testing.check_compile(lora_add, *args)


@pytest.mark.parametrize("adapters", (0, 2))
def test_compiled_gradients(adapters):
    args = make((2, 3), 6, 8, 4, torch.float32, adapters)
    leaves = [t.requires_grad_() for t in args[:5]]
    torch._dynamo.reset()
    compiled = torch.compile(lora_add, fullgraph=True)
    got, want = (
        torch.autograd.grad(fn(*leaves, args[5]).square().sum(), leaves)
        for fn in (compiled, by_hand)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_native_entry_checks_for_itself():
    op = torch.ops.fastdiff.lora_add
    y, x, down, up, scale, index = make((2, 3), 8, 9, 4)
    with pytest.raises(RuntimeError, match="lora_add: down has shape .*need 1 adapter"):
        op(y, x, down, up, scale, None, False)
    with pytest.raises(RuntimeError, match="lora_add: x has shape"):
        op(y, x[:, :2], down, up, scale, index, False)
    with pytest.raises(RuntimeError, match="lora_add: scale is Half, need Float"):
        op(y, x, down, up, scale.half(), index, False)
    many = torch.zeros(3, 257, 8), torch.zeros(3, 9, 257)
    with pytest.raises(RuntimeError, match="lora_add: down has shape .*rank of at most 256"):
        op(y, x, *many, scale, index, False)
