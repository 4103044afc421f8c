import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import aggregate_features, aggregate_features_backward
from fastdiff.ops.aggregate_features import BACKWARD_IMPLS, IMPLS, MAX_MODELS

ROWS = testing.rows_of(IMPLS)
# [K, B, C, ...]: one model, all that the kernels take, one channel, tokens, images, no rows.
SHAPES = [
    (1, 2, 5, 7), (3, 2, 17, 9, 5), (2, 1, 64, 33, 37), (MAX_MODELS, 2, 6, 11), (4, 3, 1, 8),
    (2, 2, 1152, 3), (8, 1, 40, 129), (5, 2, 9), (3, 0, 4, 8), (3, 2, 4, 0), (2, 2, 0, 5),
]  # fmt: skip
FEW = [(1, 2, 5, 7), (3, 2, 17, 9, 5), (16, 1, 6, 40), (5, 2, 9), (3, 2, 4, 0)]
MAPS = ("one", "each")


def inputs(shape, dtype=torch.float32, maps="one", inner=False, wide=False):
    x = torch.randn(shape)
    logits = 2 * torch.randn((*shape[:2], 1, *shape[3:]) if maps == "one" else shape)
    if inner:
        x, logits = (t.movedim(2, -1).contiguous().movedim(-1, 2) for t in (x, logits))
    return x.to(dtype), logits.to(torch.float32 if wide else dtype)


def plain(x, logits):
    """What the paper says, in torch's words."""
    return (logits.softmax(0) * x).sum(0)


def check(got, x, logits, what=""):
    assert got.dtype == x.dtype and got.shape == x.shape[1:]
    eager = plain(x, logits.to(x.dtype))
    testing.assert_close(got, plain(x.double(), logits.double()), eager, what=what)


@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_matches_float64(row, dtype, maps, wide):
    for shape in FEW if row == "triton" else SHAPES:
        for inner in (False, True):
            x, logits = inputs(shape, dtype, maps, inner, wide)
            with testing.unchanged(x, logits):
                got = aggregate_features(x, logits, impl=row)
            assert got.numel() == 0 or got.stride() == x[0].contiguous().stride() or inner
            check(got, x, logits, f"{row} {shape} {inner}")


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_one_model_is_copied(row, dtype, maps):
    for shape in ((1, 2, 17, 9, 5), (1, 2, 5)):
        for inner in (False, True):
            x, logits = inputs(shape, dtype, maps, inner)
            got = aggregate_features(x, logits, impl=row)
            assert torch.equal(got, x[0]) and got.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("row", ROWS)
def test_equal_models_give_what_one_does(row, maps):
    for inner in (False, True):
        x, logits = inputs((4, 2, 17, 9, 5), maps=maps, inner=inner)
        x = x[:1].expand_as(x)
        torch.testing.assert_close(aggregate_features(x, logits, impl=row), x[0])


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("row", ROWS)
def test_infinite_logits(row, maps):
    inf = torch.inf
    for inner in (False, True):
        x, logits = inputs((4, 2, 17, 9, 5), maps=maps, inner=inner)
        for one in (logits.clone().fill_(-inf), logits.clone()):
            one[2] = inf
            assert torch.equal(aggregate_features(x, one, impl=row), x[2]), "that model alone"
            grads = aggregate_features_backward(x[0], x, one, impl=row)
            assert torch.equal(grads[0][2], x[0]) and not grads[0][[0, 1, 3]].any()
            assert not grads[1].any()
        one[0] = inf
        got = aggregate_features(x, one, impl=row)
        torch.testing.assert_close(got, (x[0] + x[2]) / 2)
        out = logits.clone()
        out[1] = -inf
        left = [0, 2, 3]
        torch.testing.assert_close(
            aggregate_features(x, out, impl=row), plain(x[left], logits[left])
        )
        for bad in (-inf, torch.nan):
            none = logits.clone()
            none[(slice(None) if bad == -inf else 2), 1, :, 3] = bad
            got = aggregate_features(x, none, impl=row)
            assert got[1, :, 3].isnan().all()
            got[1, :, 3] = 0
            assert got.isfinite().all(), "nowhere else"


@pytest.mark.parametrize("row", ROWS)
def test_large_logits_do_not_overflow(row):
    x, logits = inputs((3, 2, 6, 40))
    check(aggregate_features(x, 1e4 * logits, impl=row), x, 1e4 * logits)
    check(aggregate_features(x, logits + 3e4, impl=row), x, logits + 3e4)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_layouts(level, layout, dtype):
    for maps in MAPS:
        for inner in (False, True):
            for wide in (False, True):
                tensors = inputs((3, 2, 33, 5, 29), dtype, maps, inner, wide)
                x, logits = (testing.lay(t, layout) for t in tensors) if not inner else tensors
                grad = testing.lay(torch.randn(x.shape[1:]).to(dtype), layout)
                with testing.cpu_level(level):
                    got = aggregate_features(x, logits, impl="native")
                    grads = aggregate_features_backward(grad, x, logits, impl="native")
                check(got, *tensors, f"{maps} {layout} {inner}")
                check_backward(grads, grad, *tensors, f"{maps} {layout} {inner}")


def test_strided_models_are_taken_as_they_are():
    many = torch.randn(6, 4, 8, 5, 7)
    x, logits = many[::2, 1:3], torch.randn(3, 1, 1, 5, 7).expand(3, 2, 1, 5, 7)
    check(aggregate_features(x, logits, impl="native"), x, logits)


def check_backward(got, grad, x, logits, what):
    """Against float64 autograd; eager: autograd in the dtype of ``x``."""
    both = []
    for of in (torch.float64, x.dtype):
        leaves = [t.to(of).detach().requires_grad_() for t in (x, logits)]
        both.append(torch.autograd.grad(plain(*leaves), leaves, grad.to(of)))
    assert got[0].dtype == x.dtype and got[1].dtype == logits.dtype
    for name, a, exact, eager in zip(("x", "logits"), got, *both, strict=True):
        assert a.shape == exact.shape
        if name == "x":
            testing.assert_close(a, exact, eager, what=f"{what} x")
        elif a.numel():
            # d_k and their mean cancel: roundings of what is added up, beside twice eager's error
            error, base = ((t.double() - exact).abs().max() for t in (a, eager))
            terms = (grad.double() * x.double()).abs().sum(2).max() if a.shape[2] == 1 else (
                (grad.double() * x.double()).abs().max())  # fmt: skip
            own = 4 * testing.ROUNDOFF[a.dtype] * exact.abs().max()
            bound = 2 * base + own + 2 * testing.ROUNDOFF[torch.float32] * terms
            assert error <= bound, f"{what} logits: {error} over {bound}"


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(BACKWARD_IMPLS))
def test_backward_matches_float64_autograd(row, dtype, maps):
    for shape in FEW if row == "triton" else SHAPES:
        for inner in (False, True):
            x, logits = inputs(shape, dtype, maps, inner)
            grad = torch.randn(shape[1:]).to(dtype)
            with testing.unchanged(grad, x, logits):
                got = aggregate_features_backward(grad, x, logits, impl=row)
            check_backward(got, grad, x, logits, f"{row} {shape} {inner}")
            if shape[0] == 1:
                assert not got[1].any() and torch.equal(got[0][0], grad)


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("row", ROWS)
def test_gradients_reach_both(row, maps):
    x, logits = inputs((3, 2, 6, 4, 5), maps=maps)
    logits[1] = logits[0]  # a tie
    seen, results = torch.randn(2, 6, 4, 5), []
    for of, call in ((torch.float32, aggregate_features), (torch.float64, None)):
        leaves = [t.to(of).requires_grad_() for t in (x, logits)]
        y = plain(*leaves) if call is None else call(*leaves, impl=row)
        results.append(torch.autograd.grad(y, leaves, seen.to(of)))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact.float())
    leaf = logits.clone().requires_grad_()
    (alone,) = torch.autograd.grad(aggregate_features(x, leaf, impl=row), [leaf], seen)
    torch.testing.assert_close(alone, results[0][1])


def test_second_derivatives():
    x, logits = (t.double().requires_grad_() for t in inputs((3, 1, 2, 3)))
    assert torch.autograd.gradcheck(aggregate_features, (x, logits))
    assert torch.autograd.gradgradcheck(aggregate_features, (x, logits))
    x, logits = (t.requires_grad_() for t in inputs((3, 1, 2, 3)))
    y = aggregate_features(x, logits, impl="native")
    with pytest.raises(NotImplementedError, match="only the row ref has a second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("row", ROWS)
def test_permuted_models_and_samples_alone(row):
    x, logits = inputs((3, 4, 6, 5, 4))
    got, order = aggregate_features(x, logits, impl=row), [2, 0, 1]
    torch.testing.assert_close(aggregate_features(x[order], logits[order], impl=row), got)
    for b in range(4):
        alone = aggregate_features(x[:, b : b + 1], logits[:, b : b + 1], impl=row)
        assert torch.equal(alone[0], got[b])
    equal = aggregate_features(x, torch.zeros_like(logits), impl=row)
    torch.testing.assert_close(equal, x.mean(0))


def test_the_same_bits_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    for maps in MAPS:
        x, logits = inputs((3, 3, 70, 40, 40), maps=maps)
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                grads = aggregate_features_backward(x[0], x, logits, impl="native")
                results.append((aggregate_features(x, logits, impl="native"), *grads))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        results.clear()


def test_more_models_than_the_kernels_take():
    x, logits = inputs((MAX_MODELS + 1, 1, 2, 3))
    why = fastdiff.explain(aggregate_features, x, logits)
    assert "x is of 17 models, above 16" in why["native"] and why["ref"] is None
    check(aggregate_features(x, logits), x, logits)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import aggregate_features as launchers

    configs = launchers.CONFIGS
    for maps in MAPS:
        for inner in (False, True):
            x, logits = inputs((3, 2, 50, 10, 10), maps=maps, inner=inner)
            grad = torch.randn(x.shape[1:])
            launch = launchers.aggregate_features
            for name, got in testing.run_configs(launch, configs, x, logits):
                check(got, x, logits, name)
            launch = launchers.aggregate_features_backward
            for name, got in testing.run_configs(launch, configs, grad, x, logits):
                check_backward(got, grad, x, logits, name)


def test_opcheck_and_compile():
    for maps in MAPS:
        for inner in (False, True):
            x, logits = inputs((3, 2, 6, 3, 4), maps=maps, inner=inner)
            entry = torch.ops.fastdiff.aggregate_features.default
            torch.library.opcheck(entry, (x, logits))
            entry = torch.ops.fastdiff.aggregate_features_backward.default
            torch.library.opcheck(entry, (torch.randn(2, 6, 3, 4), x, logits))
    testing.check_compile(aggregate_features, x, logits)
    torch._dynamo.reset()
    compiled = torch.compile(aggregate_features, fullgraph=True)
    leaves = [t.requires_grad_() for t in inputs((3, 2, 6, 3, 4))]
    got, want = (torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, plain))
    torch.testing.assert_close(got, want)


def test_the_native_entry_checks_for_itself():
    ops, x = torch.ops.fastdiff, torch.ones(2, 3, 4)
    with pytest.raises(RuntimeError, match="logits has shape"):
        ops.aggregate_features(x, x[:1])
    with pytest.raises(RuntimeError, match="need 1 to 16 models"):
        ops.aggregate_features(torch.ones(17, 1, 2), torch.ones(17, 1, 2))
    with pytest.raises(RuntimeError, match="grad has shape"):
        ops.aggregate_features_backward(x[0, :1], x, x)
