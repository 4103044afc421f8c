import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.ops.group_norm_silu import IMPLS, group_norm_silu, group_norm_silu_ref

# (shape, groups): positions 0, 1, primes, vector width and one more; groups of 1 to C channels.
CASES = [
    ((2, 8, 3, 5), 4),
    ((1, 1, 7, 11), 1),
    ((2, 6, 1, 1), 3),
    ((2, 6, 1, 1), 6),
    ((3, 64), 32),
    ((2, 30, 17), 3),
    ((2, 33, 65), 1),
    ((1, 20, 8, 8), 20),
    ((2, 12, 2, 3, 5), 4),
    ((0, 8, 3, 3), 2),
    ((2, 8, 0, 3), 2),
    ((1, 80, 13, 13), 8),
]
# Several pieces of 32768 elements, few groups and many.
LARGE = [((1, 3, 181, 179), 1), ((2, 80, 37, 31), 2), ((1, 320, 31, 31), 32)]
FEW_CASES = [((2, 8, 3, 5), 4), ((2, 6, 1, 1), 6), ((2, 30, 17), 3), ((2, 8, 0, 3), 2)]


def eager(x, groups, weight, bias, shift, scale, eps, silu):
    y = torch.group_norm(x, groups, weight, bias, eps)
    channels = (*x.shape[:2], *[1] * (x.dim() - 2))
    y = y if scale is None else y * (1 + scale.reshape(channels))
    y = y if shift is None else y + shift.reshape(channels)
    return F.silu(y) if silu else y


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def double(parts):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in parts]


def make(shape, groups, dtype, case, spread=2.0, mean=0.3):
    C = shape[1]
    x = (spread * torch.randn(shape) + mean).to(dtype)
    weight, bias = torch.randn(2, C).to(dtype) if case != "plain" else (None, None)
    shift, scale = None, None
    if case == "modulated":  # halves of one projection of the time embedding
        shift, scale = torch.randn(shape[0], 2 * C).to(dtype).chunk(2, 1)
    return [x, groups, weight, bias, shift, scale, 1e-5, case != "no act"]


def call(parts, row):
    x, groups, weight, bias, shift, scale, eps, silu = parts
    return group_norm_silu(
        x, groups, weight, bias, shift=shift, scale=scale, eps=eps, silu=silu, impl=row
    )


def check(parts, row, what):
    tensors = [t for t in parts if isinstance(t, torch.Tensor)]
    with testing.unchanged(*tensors):
        got = call(parts, row)
    testing.assert_close(got, group_norm_silu_ref(*double(parts)), eager(*parts), what=what)
    return got


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
@pytest.mark.parametrize("case", ["plain", "affine", "modulated", "no act"])
def test_matches_float64(row, dtype, case):
    for shape, groups in FEW_CASES if row == "triton" else CASES:
        parts = make(shape, groups, dtype, case)
        got = check(parts, row, f"{row} {shape} {groups}")
        assert got.is_contiguous()
        parts[0] = channels_last(parts[0])
        got = check(parts, row, f"{row} {shape} {groups} channels last")
        assert got.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_pieces(level, dtype):
    for shape, groups in LARGE:
        parts = make(shape, groups, dtype, "modulated")
        with testing.cpu_level(level):
            check(parts, "native", f"{shape} {groups}")
            parts[0] = channels_last(parts[0])
            check(parts, "native", f"{shape} {groups} channels last")


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_layouts(level, layout, dtype):
    parts = make((2, 20, 9, 7), 5, dtype, "modulated")
    parts = [testing.lay(t, layout) if isinstance(t, torch.Tensor) else t for t in parts]
    with testing.cpu_level(level):
        check(parts, "native", layout)
        for x in (testing.lay(parts[0].movedim(1, -1), layout).movedim(-1, 1),):
            check([x, *parts[1:]], "native", f"{layout} channels last")


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("mean", [1e2, 1e4, -3e5])
def test_mean_far_above_the_deviation(level, mean):
    for shape, groups in [((2, 20, 9, 7), 5), *LARGE]:
        parts = make(shape, groups, torch.float32, "affine", spread=1.0, mean=mean)
        with testing.cpu_level(level):
            check(parts, "native", f"{shape}")
            parts[0] = channels_last(parts[0])
            check(parts, "native", f"{shape} channels last")


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-2])
def test_constant_groups_and_tiny_eps(row, eps):
    for layout in (torch.clone, channels_last):
        x = layout(
            torch.tensor([0.0, 1.0, -7.0, 0.3])
            .repeat_interleave(3)[None, :, None]
            .expand(2, 12, 35)
        )
        got = group_norm_silu(x, 4, eps=eps, silu=False, impl=row)
        zero = torch.zeros(2, 12, 35, dtype=torch.double)
        testing.assert_close(got, zero, torch.group_norm(x, 4, eps=eps))
        parts = [layout(1e-5 * torch.randn(2, 12, 35)), 4, None, None, None, None, eps, True]
        check(parts, row, "narrow")


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_silu_over_its_range(level):
    u = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([-1e4, 1e4, 3e30])])
    # With shift the norm of a constant group vanishes and silu sees u alone.
    x = torch.zeros(1, u.numel(), 4)
    with testing.cpu_level(level):
        got = group_norm_silu(x, 1, shift=u[None], impl="native")
    exact = F.silu(u.double())[None, :, None].expand(1, -1, 4)
    assert ((got - exact).abs() <= 3e-7 * exact.abs().clamp(min=1)).all()


def test_non_finite_groups_stay_apart():
    for layout in (torch.clone, channels_last):
        for value in (torch.nan, torch.inf):
            x = torch.randn(2, 8, 5, 5)
            x[0, 3, 1, 1] = value
            got = group_norm_silu(layout(x), 4, impl="native")
            assert got[0, 2:4].isnan().all()
            assert got[0, [0, 1, 4, 5, 6, 7]].isfinite().all() and got[1].isfinite().all()


def test_neutral_values_and_batch_equals_alone():
    zero = torch.zeros(3, 20)
    for layout in (torch.clone, channels_last):
        x = layout(torch.randn(3, 20, 19, 17))
        plain = group_norm_silu(x, 5)
        assert torch.equal(group_norm_silu(x, 5, shift=zero, scale=zero), plain)
        assert torch.equal(group_norm_silu(x[1:2], 5), plain[1:2])


def test_opcheck_and_compile():
    weight, bias = torch.randn(2, 8)
    scale = torch.randn(2, 8)
    for x in (torch.randn(2, 8, 3, 5), channels_last(torch.randn(2, 8, 3, 5))):
        torch.library.opcheck(
            torch.ops.fastdiff.group_norm_silu.default,
            (x, 4, weight, bias, None, scale, 1e-5, True),
        )
        testing.check_compile(group_norm_silu, x, 4, weight, bias, scale=scale)


X = torch.ones(2, 8, 3, 3)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"x": "no"}, "x is str, need a torch.Tensor"),
        ({"x": X[0, 0, 0]}, r"x has shape \[3\], need at least 2 dimensions"),
        ({"x": X.int()}, "x is torch.int32, need float16"),
        ({"num_groups": 3}, "num_groups is 3, need a divisor of C = 8"),
        ({"num_groups": 0}, "num_groups is 0, need a divisor of C = 8"),
        ({"num_groups": 2.0}, "num_groups is 2.0, need a divisor of C = 8"),
        ({"weight": torch.ones(4)}, r"weight has shape \[4\], need \[8\]"),
        ({"bias": torch.ones(8).half()}, "bias is torch.float16, need torch.float32"),
        ({"shift": torch.ones(8)}, r"shift has shape \[8\], need \[2, 8\]"),
        ({"scale": torch.ones(2, 8, device="meta")}, "scale is on meta, need cpu"),
        ({"eps": -1e-5}, "eps is -1e-05, need a finite number above 0"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{"x": X, "num_groups": 2, **kwargs})


@pytest.mark.parametrize(
    "args, message",
    [
        ((X, 3, None, None, None, None, 1e-5, True), "num_groups is 3, need a divisor of C = 8"),
        ((X, 0, None, None, None, None, 1e-5, True), "num_groups is 0, need a divisor of C = 8"),
        ((X[0, 0, 0], 1, None, None, None, None, 1e-5, True), "need at least 2 dimensions"),
        (
            (X, 2, X[0, :4, 0, 0], None, None, None, 1e-5, True),
            r"weight has shape \[4\], need \[8\]",
        ),
        ((X, 2, None, None, X[:1, :, 0, 0], None, 1e-5, True), r"shift has shape \[1, 8\]"),
        ((X.double(), 2, None, None, None, None, 1e-5, True), "x is Double, need float32"),
    ],
)
def test_native_entry_is_safe_by_itself(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastdiff.group_norm_silu(*args)


def test_every_triton_config():
    from fastdiff.kernels import group_norm_silu as triton_norm

    parts = make((1, 6, 113, 101), 2, torch.float32, "modulated", mean=1e4)  # 2 pieces a group
    exact = group_norm_silu_ref(*double(parts))
    for x in (parts[0], channels_last(parts[0])):
        for name, got in testing.run_configs(
            triton_norm.group_norm_silu, triton_norm.CONFIGS, x, *parts[1:]
        ):
            testing.assert_close(got, exact, eager(*parts), what=name)
    with testing.guarded(*(t for t in parts if isinstance(t, torch.Tensor))) as tensors:
        x, weight, bias, shift, scale = tensors
        got = triton_norm.group_norm_silu(x, 2, weight, bias, shift, scale, 1e-5, True)
    testing.assert_close(got, exact, eager(*parts), what="guarded")


def gradients(parts, dtype, row):
    """Of a fixed random functional of the output, to every tensor, through one row."""
    leaves = [
        t.detach().to(dtype).requires_grad_() if isinstance(t, torch.Tensor) else t for t in parts
    ]
    out = call(leaves, row)
    seen = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return torch.autograd.grad(out, [t for t in leaves if isinstance(t, torch.Tensor)], seen)


def check_gradients(draw, what):
    """Of 8 draws at once: the largest of a handful of errors alone would be luck, eager's too."""
    results = []
    for _ in range(8):
        parts = draw()
        exact = gradients(parts, torch.float64, "ref")
        plain = gradients(parts, parts[0].dtype, "ref")
        with testing.unchanged(*(t for t in parts if isinstance(t, torch.Tensor))):
            got = gradients(parts, parts[0].dtype, "native")
        results.append((got, exact, plain))
        assert got[0].stride() == torch.empty_like(parts[0]).stride() or not got[0].numel()
    for i, draws in enumerate(zip(*(zip(*r, strict=True) for r in results), strict=True)):
        g, e, p = (torch.stack(t) for t in zip(*draws, strict=True))
        testing.assert_close(g, e, p, what=f"{what} gradient {i}")


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("case", ["plain", "modulated", "no act"])
def test_native_gradients(level, dtype, case):
    with testing.cpu_level(level):
        for shape, groups in CASES + LARGE[1:2]:
            if 0 in shape[2:]:
                continue  # torch leaves the gradient of weight undefined
            for layout in (torch.clone, channels_last):

                def draw(shape=shape, groups=groups, layout=layout):
                    parts = make(shape, groups, dtype, case)
                    return [layout(parts[0]), *parts[1:]]

                check_gradients(draw, f"{shape} {groups} {layout.__name__}")


def test_native_gradients_without_positions_are_zero():
    x = torch.ones(2, 8, 0, 3, requires_grad=True)
    leaves = [torch.ones(8, requires_grad=True), torch.ones(2, 8, requires_grad=True)]
    out = group_norm_silu(x, 4, leaves[0], shift=leaves[1], impl="native")
    grads = torch.autograd.grad(out.sum(), [x, *leaves])
    assert grads[0].shape == x.shape and not any(g.any() for g in grads)


def test_native_gradients_with_mean_far_above_the_deviation():
    for layout in (torch.clone, channels_last):

        def draw(layout=layout):
            parts = make((2, 20, 9, 7), 5, torch.float32, "modulated", spread=1.0, mean=1e4)
            return [layout(parts[0]), *parts[1:]]

        check_gradients(draw, layout.__name__)


def test_reference_gradients_and_refusals():
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, s: group_norm_silu(x, 2, shift=s, scale=s), (x, scale)
    )
    x = x.detach().float().requires_grad_()
    assert "no backward" in fastdiff.explain(group_norm_silu, x, 2)["triton"]
    out = group_norm_silu(x, 2, impl="native").square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_opcheck_and_compile_with_gradients():
    weight, bias, shift, scale = (torch.randn(s).requires_grad_() for s in (8, 8, (2, 8), (2, 8)))
    for layout in (torch.clone, channels_last):
        x = layout(torch.randn(2, 8, 3, 5)).requires_grad_()
        args = (x, 4, weight, bias, shift, scale, 1e-5, True)
        torch.library.opcheck(torch.ops.fastdiff.group_norm_silu.default, args)
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(
            torch.ops.fastdiff.group_norm_silu_backward.default, (plain[0], *plain)
        )

    def loss(x, weight, scale):
        return group_norm_silu(x, 4, weight, scale=scale).square().sum()

    torch._dynamo.reset()
    leaves = (x, weight, scale)
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(got, want)


def test_native_backward_entry_is_safe_by_itself():
    backward = torch.ops.fastdiff.group_norm_silu_backward
    for grad, groups, message in (
        (X[:1], 2, r"grad has shape \[1, 8, 3, 3\], need \[2, 8, 3, 3\]"),
        (X.half(), 2, "grad is Half, need Float"),
        (X, 3, "num_groups is 3, need a divisor of C = 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(grad, X, groups, None, None, None, None, 1e-5, True)
