import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import scale_shift, scale_shift_backward
from fastdiff.ops.scale_shift import BACKWARD_IMPLS, IMPLS

ROWS = testing.rows_of(IMPLS)
# (shape, dim): tokens, planes, one channel, one position, odd sizes, DiT-XL's width, no rows.
SHAPES = [
    ((2, 7, 17), -1), ((1, 129, 64), -1), ((3, 1152), -1), ((2, 3, 5, 40), -1), ((2, 65, 1), -1),
    ((2, 17, 5, 9), 1), ((1, 40, 33, 37), 1), ((2, 64, 7), 1), ((3, 8, 1, 1), 1), ((2, 1, 9), 1),
    ((0, 4, 8), -1), ((2, 0, 8), -1), ((2, 3, 0), -1), ((2, 8, 0), 1), ((2, 1152, 3), 1),
]  # fmt: skip
FEW = [((2, 7, 17), -1), ((2, 17, 5, 9), 1), ((3, 40), -1), ((2, 0, 8), -1), ((1, 3, 70, 70), 1)]


def inputs(shape, dim, dtype=torch.float32, tasks=0, shift=True, wide=False):
    """x, scale, shift and index; ``tasks`` rows, of which one is no sample's."""
    channels = shape[dim]
    rows = (tasks, channels) if tasks else (channels,)
    of = torch.float32 if wide else dtype
    index = torch.randint(1, tasks, shape[:1]) if tasks else None
    add = torch.randn(rows).to(of) if shift else None
    return torch.randn(shape).to(dtype), torch.randn(rows).to(of), add, index


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def by_hand(x, scale, shift, index, dim):
    """What the docstring says, sample by sample, in the dtype of ``x``."""
    out = []
    for b, sample in enumerate(x):
        s = scale if index is None else scale[index[b]]
        h = shift if shift is None or index is None else shift[index[b]]
        rows = sample if dim == -1 else sample.movedim(0, -1)
        y = rows * s.to(x.dtype) + (0 if h is None else h.to(x.dtype))
        out.append(y if dim == -1 else y.movedim(-1, 0))
    return torch.stack(out) if out else x.clone()


def check(got, x, scale, shift, index, dim, what=""):
    assert got.dtype == x.dtype and got.device == x.device
    exact = by_hand(*double(x, scale, shift), index, dim)
    testing.assert_close(got, exact, by_hand(x, scale, shift, index, dim), what=what)


@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_matches_float64(row, dtype, wide):
    for shape, dim in FEW if row == "triton" else SHAPES:
        for tasks in (0, 4):
            for shift in (True, False):
                x, scale, add, index = inputs(shape, dim, dtype, tasks, shift, wide)
                with testing.unchanged(x, scale, add, index):
                    got = scale_shift(x, scale, add, dim=dim, index=index, impl=row)
                what = f"{row} {shape} {dim} {tasks} {shift}"
                assert got.is_contiguous(), what
                check(got, x, scale, add, index, dim, what)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_one_and_zero_change_nothing(row, dtype):
    for shape, dim in FEW:
        x = torch.randn(shape).to(dtype)
        one, zero = torch.ones(shape[dim], dtype=dtype), torch.zeros(shape[dim], dtype=dtype)
        got = scale_shift(x, one, dim=dim, impl=row)
        assert torch.equal(got, x) and (not x.numel() or got.data_ptr() != x.data_ptr())
        assert torch.equal(scale_shift(x, one, zero, dim=dim, impl=row), x)
    x = torch.tensor([[1.0, torch.inf, -torch.inf, -0.0]]).to(dtype)
    got = scale_shift(x, torch.ones(4, dtype=dtype), impl=row)
    assert torch.equal(got.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("row", ROWS)
def test_channels_last_stays_so(row):
    x, scale, add, index = inputs((2, 6, 3, 5), 1, tasks=3)
    last = x.contiguous(memory_format=torch.channels_last)
    got = scale_shift(last, scale, add, dim=1, index=index, impl=row)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, scale_shift(x, scale, add, dim=1, index=index, impl=row))
    grad = torch.randn_like(x)
    for g in (grad, grad.contiguous(memory_format=torch.channels_last)):
        grads = scale_shift_backward(g, last, scale, dim=1, index=index, impl=row)
        plain = scale_shift_backward(grad, x, scale, dim=1, index=index, impl=row)
        assert grads[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(grads[0], plain[0])
        torch.testing.assert_close(grads[1:], plain[1:])


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_layouts(level, layout, dtype):
    for shape, dim in (((2, 65, 77), -1), ((2, 3, 4, 33), -1), ((2, 33, 77), 1)):
        for wide in (False, True):
            tensors = inputs(shape, dim, dtype, 4, wide=wide)
            x, scale, add, index = (testing.lay(t, layout) for t in tensors)
            grad = testing.lay(torch.randn(shape).to(dtype), layout)
            with testing.cpu_level(level):
                got = scale_shift(x, scale, add, dim=dim, index=index, impl="native")
                grads = scale_shift_backward(grad, x, scale, dim=dim, index=index, impl="native")
            check(got, *tensors, dim, f"{shape} {layout}")
            check_backward(grads, grad, *tensors[:2], index, dim, f"{shape} {layout}")


def check_backward(got, grad, x, scale, index, dim, what):
    """Against float64 autograd through the loops; eager: the same in the dtype of ``x``."""
    both = []
    for tensors in (double(grad, x, scale), (grad, x, scale.to(x.dtype))):
        g, *leaves = (t.detach() for t in tensors)
        leaves = [t.requires_grad_() for t in (*leaves, torch.zeros_like(leaves[1]))]
        y = by_hand(*leaves, index, dim)
        both.append(torch.autograd.grad(y, leaves, g, allow_unused=True))
    rows = (1, -1) if index is None else scale.shape
    for name, a, exact, eager in zip(("x", "scale", "shift"), got, *both, strict=True):
        if name == "x":
            assert a.dtype == x.dtype
            testing.assert_close(a, exact, eager, what=f"{what} {name}")
            continue
        assert a.dtype == torch.float32
        if exact is None:  # no sample
            exact = eager = torch.zeros(scale.shape).double()
        exact, eager = exact.reshape(rows), eager.reshape(rows)
        # Sums may cancel: one rounding of what is added up is allowed, beside twice eager's error.
        error, base = ((t.double() - exact).abs() for t in (a, eager.to(torch.float32)))
        terms = grad.double().abs() * (x.double().abs() if name == "scale" else 1)
        added = terms.sum() / max(scale[..., :1].numel(), 1) / max(scale.shape[-1], 1)
        bound = 2 * base.max() + testing.ROUNDOFF[torch.float32] * added if a.numel() else 0.0
        assert a.numel() == 0 or error.max() <= bound, f"{what} {name}: {error.max()} over {bound}"


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(BACKWARD_IMPLS))
def test_backward_matches_float64_autograd(row, dtype):
    for shape, dim in FEW if row == "triton" else SHAPES:
        for tasks, wide in ((0, False), (4, True), (3, False)):
            x, scale, _, index = inputs(shape, dim, dtype, tasks, wide=wide)
            grad = torch.randn(shape).to(dtype)
            with testing.unchanged(grad, x, scale, index):
                got = scale_shift_backward(grad, x, scale, dim=dim, index=index, impl=row)
            what = f"{row} {shape} {dim} {tasks}"
            check_backward(got, grad, x, scale, index, dim, what)
            if tasks:
                assert not got[1][0].any() and not got[2][0].any(), "no sample has row 0"


@pytest.mark.parametrize("row", ROWS)
def test_gradients_reach_all_three(row):
    for shape, dim, tasks in (((2, 5, 9), -1, 3), ((2, 6, 3, 5), 1, 0)):
        x, scale, add, index = inputs(shape, dim, tasks=tasks)
        seen = torch.randn(shape)
        results = []
        for of, impl in ((torch.float32, row), (torch.float64, "ref")):
            leaves = [t.to(of).requires_grad_() for t in (x, scale, add)]
            y = scale_shift(*leaves, dim=dim, index=index, impl=impl)
            results.append(torch.autograd.grad(y, leaves, seen.to(of)))
        for got, exact in zip(*results, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, exact.float())
        leaf = x.clone().requires_grad_()  # the gradient of x alone
        y = scale_shift(leaf, scale, add, dim=dim, index=index, impl=row)
        (alone,) = torch.autograd.grad(y, [leaf], seen)
        torch.testing.assert_close(alone, results[0][0])
        leaf = scale.clone().requires_grad_()
        y = scale_shift(x, leaf, dim=dim, index=index, impl=row)
        (alone,) = torch.autograd.grad(y, [leaf], seen)
        torch.testing.assert_close(alone, results[0][1])


def test_float32_parameters_of_bfloat16_get_float32_gradients():
    x, scale, add, _ = inputs((2, 300, 8), -1, torch.bfloat16, wide=True)
    leaves = [t.requires_grad_() for t in (x, scale, add)]
    scale_shift(*leaves).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert torch.equal(add.grad, torch.full((8,), 600.0))  # bfloat16 would stop at 256


def test_second_derivatives():
    x, scale, add, _ = inputs((2, 3, 4), -1)
    leaves = [t.double().requires_grad_() for t in (x, scale, add)]
    assert torch.autograd.gradgradcheck(scale_shift, leaves)
    x.requires_grad_()
    y = scale_shift(x, scale, add, impl="native")
    with pytest.raises(NotImplementedError, match="only the row ref has a second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_the_same_bits_for_any_number_of_threads():
    before = torch.get_num_threads()
    results = []
    for shape, dim in (((3, 500, 40), -1), ((3, 40, 50, 50), 1)):
        x, scale, add, index = inputs(shape, dim, tasks=2)
        grad = torch.randn(shape)
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                grads = scale_shift_backward(grad, x, scale, dim=dim, index=index, impl="native")
                results.append((scale_shift(x, scale, add, dim=dim, index=index), *grads))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        results.clear()


@pytest.mark.parametrize("row", ROWS)
def test_a_mixed_batch_is_its_samples_alone(row):
    x, scale, add, index = inputs((4, 5, 9), -1, tasks=5)
    mixed = scale_shift(x, scale, add, index=index, impl=row)
    for b in range(4):
        alone = scale_shift(x[b : b + 1], scale[index[b]], add[index[b]], impl=row)
        assert torch.equal(mixed[b : b + 1], alone)


@pytest.mark.parametrize("bad", (-1, 3, 2**62, -(2**63)))
@pytest.mark.parametrize("row", ("native", "ref"))
def test_index_out_of_range(row, bad):
    x, scale, index = torch.ones(2, 3, 4), torch.ones(3, 4), torch.tensor([0, bad])
    with pytest.raises(ValueError, match=f"^scale_shift: index has value {bad}, need 0 to 2"):
        scale_shift(x, scale, index=index, impl=row)
    with pytest.raises(ValueError, match=f"index has value {bad}, need 0 to 2"):
        scale_shift_backward(x, x, scale, index=index, impl=row)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_triton_gives_nan_for_an_index_out_of_range():
    for shape, dim in (((3, 2, 4), -1), ((3, 4, 5), 1)):
        x, scale, add, _ = inputs(shape, dim, tasks=3)
        index = torch.tensor([2, 3, -1])
        got = scale_shift(x, scale, add, dim=dim, index=index, impl="triton")
        want = scale_shift(x[:1], scale, add, dim=dim, index=index[:1], impl="ref")
        torch.testing.assert_close(got[:1], want)
        assert got[1:].isnan().all()
        grads = scale_shift_backward(x, x, scale, dim=dim, index=index, impl="triton")
        want = scale_shift_backward(x[:1], x[:1], scale, dim=dim, index=index[:1], impl="ref")
        torch.testing.assert_close(grads[1:], want[1:])
        assert grads[0][1:].isnan().all()


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import scale_shift as launchers

    for shape, dim in (((2, 70, 300), -1), ((2, 5, 40, 40), 1)):
        x, scale, add, index = inputs(shape, dim, tasks=3)
        grad = torch.randn(shape)
        given = (x, scale, add, index, dim)
        for name, got in testing.run_configs(launchers.scale_shift, launchers.CONFIGS, *given):
            check(got, *given, what=name)
        given = (grad, x, scale, index, dim)
        launch = launchers.scale_shift_backward
        for name, got in testing.run_configs(launch, launchers.CONFIGS, *given):
            check_backward(got, grad, x, scale, index, dim, name)


def test_opcheck_and_compile():
    for shape, dim in (((2, 3, 6), -1), ((2, 6, 3, 2), 1)):
        x, scale, add, index = inputs(shape, dim, tasks=3)
        for laid in (x, x.contiguous(memory_format=torch.channels_last) if dim == 1 else x.mT):
            if laid.shape != x.shape:
                continue
            entry = torch.ops.fastdiff.scale_shift.default
            torch.library.opcheck(entry, (laid, scale, add, index, dim))
            entry = torch.ops.fastdiff.scale_shift_backward.default
            torch.library.opcheck(entry, (x, laid, scale, index, dim))
        testing.check_compile(scale_shift, x, scale, add, dim=dim, index=index)


def test_compiled_gradients():
    x, scale, add, _ = (t if t is None else t.requires_grad_() for t in inputs((2, 3, 6), -1))
    torch._dynamo.reset()
    compiled = torch.compile(scale_shift, fullgraph=True)
    for call in (scale_shift, compiled):
        torch.testing.assert_close(
            torch.autograd.grad(call(x, scale, add).square().sum(), (x, scale, add)),
            torch.autograd.grad((x * scale + add).square().sum(), (x, scale, add)),
        )


def test_the_native_entry_checks_for_itself():
    ops, x = torch.ops.fastdiff, torch.ones(2, 3, 4)
    with pytest.raises(RuntimeError, match="dim is 2, need -1 or 1"):
        ops.scale_shift(x, x[0, 0], None, None, 2)
    with pytest.raises(RuntimeError, match="shift has shape"):
        ops.scale_shift(x, x[0, 0], x[0], None, -1)
    with pytest.raises(RuntimeError, match="index is Int, need Long"):
        ops.scale_shift(x, x[0], None, torch.zeros(2, dtype=torch.int32), -1)
    with pytest.raises(RuntimeError, match="grad has shape"):
        ops.scale_shift_backward(x[:1], x, x[0, 0], None, -1)
