import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.ops.layer_norm_modulate import (
    GATE_RESIDUAL,
    GATE_RESIDUAL_NORM_MODULATE,
    LAYER_NORM_MODULATE,
    TABLES,
    gate_residual,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
    gate_residual_norm_quantize,
    layer_norm_modulate,
    layer_norm_modulate_ref,
)

ROWS = testing.rows_of(LAYER_NORM_MODULATE)
SHAPES = [(2, 3, d) for d in (1, 2, 17, 64, 65, 77, 1152)]
SHAPES += [(1, 1, 40), (3, 1, 33), (0, 4, 8), (2, 0, 8), (2, 3, 0), (2, 65, 80)]
FEW_SHAPES = [(2, 3, 77), (1, 1, 1), (2, 0, 8), (1, 9, 1152)]  # triton's interpreter is slow


def shapes_of(row):
    return FEW_SHAPES if row == "triton" else SHAPES


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def tokens(m):
    return m.unsqueeze(1) if m.dim() == 2 else m


def eager_norm(x, shift, scale, weight, bias, eps, rms):
    D = x.shape[-1:]
    m = F.rms_norm(x, D, weight, eps) if rms else F.layer_norm(x, D, weight, bias, eps)
    m = m + bias if rms and bias is not None else m
    m = m if scale is None else m * (1 + tokens(scale))
    return m if shift is None else m + tokens(shift)


def eager_chain(x, y, gate, *rest):
    r = x + tokens(gate) * y
    return r, eager_norm(r, *rest)


def modulations(shape, dtype, per_token, layout="contiguous"):
    """gate, shift, scale: chunks of one projection, as a DiT block makes them."""
    B, N, D = shape
    whole = torch.randn(*((B, N) if per_token else (B,)), 6 * D).to(dtype)
    return list(testing.lay(whole, layout).chunk(6, -1)[1:4])


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("rms", [False, True])
def test_norm_matches_float64(row, dtype, rms):
    for shape in shapes_of(row):
        for case in ("plain", "sample", "token", "affine", "scale only"):
            D = shape[-1]
            x = (3 * torch.randn(shape) + 0.5).to(dtype)
            _, shift, scale = modulations(shape, dtype, case == "token")
            weight, bias = torch.randn(2, D).to(dtype)
            if case in ("plain", "sample", "token"):
                weight = bias = None
            if case == "plain":
                shift = scale = None
            if case == "scale only":
                shift = bias = None
            parts = (x, shift, scale, weight, bias)
            exact = layer_norm_modulate_ref(*double(*parts), 1e-6, rms)
            with testing.unchanged(*parts):
                got = layer_norm_modulate(
                    x, shift, scale, weight=weight, bias=bias, rms=rms, impl=row
                )
            eager = eager_norm(*parts, 1e-6, rms) if x.numel() else got
            testing.assert_close(got, exact, eager, what=f"{row} {shape} {case}")


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("rms", [False, True])
def test_chain_matches_float64(row, dtype, rms):
    for shape in shapes_of(row):
        for per_token in (False, True):
            x, y = (2 * torch.randn(2, *shape) + 0.25).to(dtype)
            gate, shift, scale = modulations(shape, dtype, per_token)
            weight, bias = torch.randn(2, shape[-1]).to(dtype)
            parts = (x, y, gate, shift, scale, weight, bias)
            exact = gate_residual_norm_modulate_ref(*double(*parts), 1e-6, rms)
            with testing.unchanged(*parts):
                got = gate_residual_norm_modulate(
                    x, y, gate, shift, scale, weight=weight, bias=bias, rms=rms, impl=row
                )
                alone = gate_residual(x, y, gate, impl=row)
            eager = eager_chain(*parts, 1e-6, rms) if x.numel() else got
            for g, e, p, name in zip(got, exact, eager, ("residual", "modulated"), strict=True):
                testing.assert_close(g, e, p, what=f"{row} {shape} {per_token} {name}")
            testing.assert_close(alone, exact[0], eager[0], what=f"{row} {shape} alone")
            assert torch.equal(alone, got[0])


def check_tokens(got, parts, smooth, rms=False):
    """Integers within a half and rounding errors of the exact quotients; scales of the largest."""
    exact = gate_residual_norm_modulate_ref(*double(*parts), 1e-6, rms)[1]
    exact = exact if smooth is None else exact / smooth.double()
    values, scale, dtype = got
    assert values.dtype == torch.int8 and scale.dtype == torch.float32 and dtype == parts[0].dtype
    assert values.shape == exact.shape and scale.shape == exact.shape[:-1]
    assert values.is_contiguous() and scale.is_contiguous()
    if exact.numel():
        most = exact.abs().amax(-1)
        torch.testing.assert_close(scale.double(), most / 127, rtol=1e-4, atol=1e-7)
        away = (values * scale.double()[..., None] - exact).abs() - 0.5 * scale[..., None]
        assert (away <= 1e-4 * most[..., None] + 1e-6).all(), away.max()


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("rms", [False, True])
def test_chain_as_integers(row, dtype, rms):
    for shape in shapes_of(row):
        for per_token in (False, True):
            x, y = (2 * torch.randn(2, *shape) + 0.25).to(dtype)
            gate, shift, scale = modulations(shape, dtype, per_token)
            weight, bias = torch.randn(2, shape[-1]).to(dtype)
            smooth = torch.rand(shape[-1]) + 0.5 if per_token else None
            parts = (x, y, gate, shift, scale, weight, bias)
            how = dict(weight=weight, bias=bias, smooth=smooth, rms=rms, impl=row)
            with testing.unchanged(*parts, *([] if smooth is None else [smooth])):
                r, tokens = gate_residual_norm_quantize(x, y, gate, shift, scale, **how)
            assert torch.equal(r, gate_residual(x, y, gate, impl=row))
            check_tokens(tokens, parts, smooth, rms)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_integers_of_levels_and_layouts(level, layout):
    for shape in ((3, 5, 77), (2, 3, 640), (1, 2, 1)):
        for dtype in testing.DTYPES:
            x, y = (testing.lay(t, layout) for t in (2 * torch.randn(2, *shape)).to(dtype))
            mods = modulations(shape, dtype, False, layout)
            smooth = testing.lay(torch.rand(shape[-1]) + 0.5, layout)
            with testing.cpu_level(level):
                got = gate_residual_norm_quantize(x, y, *mods, smooth=smooth, impl="native")[1]
            check_tokens(got, (x, y, *mods, None, None), smooth)


@pytest.mark.parametrize("row", ROWS)
def test_integers_of_rows_without_any(row):
    """A row of zeros is zeros; one with a NaN or an infinity has the scale NaN; neighbours and
    another batch do not matter."""
    x, y = torch.randn(2, 2, 4, 40)
    x[0, 1], y[0, 1] = 3.0, 0.0  # no deviation
    x[0, 2, 7], x[1, 0, 39] = torch.nan, torch.inf
    gate = torch.randn(2, 40)
    values, scale, _ = gate_residual_norm_quantize(x, y, gate, impl=row)[1]
    broken = scale.isnan()
    assert broken.nonzero().tolist() == [[0, 2], [1, 0]] and not values[broken].any()
    assert scale[0, 1] == 0 and not values[0, 1].any()
    one = gate_residual_norm_quantize(x[1:, 1:], y[1:, 1:], gate[1:], impl=row)[1]
    assert torch.equal(one.values, values[1:, 1:]) and torch.equal(one.scale, scale[1:, 1:])
    assert values[1, 1].abs().max() == 127


def test_integers_have_no_gradient():
    x = torch.randn(1, 2, 8, requires_grad=True)
    with pytest.raises(fastdiff.NoImpl, match="gradient"):
        gate_residual_norm_quantize(x, x.detach(), torch.randn(1, 8))


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_layouts(level, layout, dtype):
    for shape in ((3, 5, 77), (2, 3, 640), (1, 2, 1)):
        x, y = (testing.lay(t, layout) for t in (2 * torch.randn(2, *shape)).to(dtype))
        weight, bias = (testing.lay(t, layout) for t in torch.randn(2, shape[-1]).to(dtype))
        for per_token in (False, True):
            mods = modulations(shape, dtype, per_token, layout)
            parts = (x, y, *mods, weight, bias)
            with testing.cpu_level(level), testing.unchanged(*parts):
                got = gate_residual_norm_modulate(
                    x, y, *mods, weight=weight, bias=bias, impl="native"
                )
                norm = layer_norm_modulate(x, *mods[1:], weight=weight, bias=bias, impl="native")
            exact = gate_residual_norm_modulate_ref(*double(*parts), 1e-6, False)
            for g, e, p in zip(got, exact, eager_chain(*parts, 1e-6, False), strict=True):
                testing.assert_close(g, e, p, what=f"{shape} {per_token}")
            parts = (x, *mods[1:], weight, bias)
            exact = layer_norm_modulate_ref(*double(*parts), 1e-6, False)
            testing.assert_close(norm, exact, eager_norm(*parts, 1e-6, False))


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("mean", [1e2, 1e4, -3e5])
def test_mean_far_above_the_deviation(level, mean):
    x = mean + torch.randn(2, 9, 1152)
    with testing.cpu_level(level):
        got = layer_norm_modulate(x, impl="native")
    exact = layer_norm_modulate_ref(x.double(), None, None, None, None, 1e-6, False)
    testing.assert_close(got, exact, F.layer_norm(x, (1152,), eps=1e-6))


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_one_channel_towers_over_the_rest(level, dtype):
    x = torch.randn(2, 5, 640)
    x[..., 0] = 3000.0
    x = x.to(dtype)
    with testing.cpu_level(level):
        got = layer_norm_modulate(x, impl="native")
    exact = layer_norm_modulate_ref(x.double(), None, None, None, None, 1e-6, False)
    testing.assert_close(got, exact, F.layer_norm(x, (640,), eps=1e-6))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
def test_constant_rows_and_tiny_eps(row, eps):
    x = torch.tensor([0.0, 1.0, -7.0, 0.3])[None, :, None].expand(1, 4, 77)
    got = layer_norm_modulate(x, eps=eps, impl=row)
    exact = torch.zeros(1, 4, 77, dtype=torch.double)
    testing.assert_close(got, exact, F.layer_norm(x, (77,), eps=eps))
    narrow = 1e-5 * torch.randn(1, 4, 77)
    exact = layer_norm_modulate_ref(narrow.double(), None, None, None, None, eps, False)
    got = layer_norm_modulate(narrow, eps=eps, impl=row)
    testing.assert_close(got, exact, F.layer_norm(narrow, (77,), eps=eps))


@pytest.mark.parametrize("row", ROWS)
def test_non_finite_rows_stay_apart(row):
    x = torch.randn(1, 3, 40)
    x[0, 1, 7] = torch.nan
    got = layer_norm_modulate(x, impl=row)
    assert got[0, 1].isnan().all() and got[0, [0, 2]].isfinite().all()
    x[0, 1, 7] = torch.inf
    got = layer_norm_modulate(x, impl=row)
    assert got[0, 1].isnan().all() and got[0, [0, 2]].isfinite().all()


def test_neutral_values_are_exact():
    x, y = torch.randn(2, 2, 7, 40)
    zero = torch.zeros(2, 40)
    plain = layer_norm_modulate(x)
    assert torch.equal(layer_norm_modulate(x, zero, zero), plain)
    residual, modulated = gate_residual_norm_modulate(x, y, zero)
    assert torch.equal(residual, x) and torch.equal(modulated, plain)
    assert torch.equal(gate_residual(x, y, zero), x)


def test_per_token_equals_per_sample_and_batch_equals_alone():
    x, y = torch.randn(2, 3, 5, 33)
    gate, shift, scale = torch.randn(3, 3, 33)
    wide = [m[:, None].expand(3, 5, 33) for m in (gate, shift, scale)]
    apart = [m[:, None].repeat(1, 5, 1) for m in (gate, shift, scale)]
    got = gate_residual_norm_modulate(x, y, gate, shift, scale)
    for mods in (wide, apart):
        for a, b in zip(gate_residual_norm_modulate(x, y, *mods), got, strict=True):
            assert torch.equal(a, b)
    one = gate_residual_norm_modulate(x[1:2], y[1:2], gate[1:2], shift[1:2], scale[1:2])
    for a, b in zip(one, got, strict=True):
        assert torch.equal(a, b[1:2])


def test_opcheck_and_compile():
    x, y = torch.randn(2, 2, 3, 33)
    gate, shift, scale = torch.randn(3, 2, 33)
    weight = torch.randn(33)
    ops = torch.ops.fastdiff
    torch.library.opcheck(
        ops.layer_norm_modulate.default, (x, shift, scale, weight, None, 1e-6, False)
    )
    torch.library.opcheck(ops.gate_residual.default, (x, y, gate))
    torch.library.opcheck(
        ops.gate_residual_norm_modulate.default,
        (x.mT.contiguous().mT, y, gate, shift, scale, None, None, 1e-6, True),
    )
    testing.check_compile(layer_norm_modulate, x, shift, scale, weight=weight)
    testing.check_compile(gate_residual, x, y, gate)
    testing.check_compile(gate_residual_norm_modulate, x, y, gate, shift, scale, rms=True)


X = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layer_norm_modulate("no"), "x is str, need a torch.Tensor"),
        (lambda: layer_norm_modulate(X[0]), r"x has shape \[3, 4\], need 3 dimensions"),
        (lambda: layer_norm_modulate(X.int()), "x is torch.int32, need float16"),
        (lambda: layer_norm_modulate(X, X), None),
        (
            lambda: layer_norm_modulate(X, X[:, :1]),
            r"shift has shape \[2, 1, 4\], need \[2, 4\] or",
        ),
        (lambda: layer_norm_modulate(X, None, X[0, 0]), r"scale has shape \[4\], need \[2, 4\] or"),
        (lambda: layer_norm_modulate(X, X.half()), "shift is torch.float16, need torch.float32"),
        (lambda: layer_norm_modulate(X, X.to("meta")), "shift is on meta, need cpu"),
        (lambda: layer_norm_modulate(X, weight=X), r"weight has shape \[2, 3, 4\], need \[4\]"),
        (lambda: layer_norm_modulate(X, bias=X[0, 0, :3]), r"bias has shape \[3\], need \[4\]"),
        (lambda: layer_norm_modulate(X, eps=0.0), "eps is 0.0, need a finite number above 0"),
        (lambda: layer_norm_modulate(X, eps=float("nan")), "eps is nan, need a finite number"),
        (lambda: gate_residual(X, X[:1], X), r"y has shape \[1, 3, 4\], need \[2, 3, 4\]"),
        (lambda: gate_residual(X, X, X[0]), r"gate has shape \[3, 4\], need \[2, 4\] or"),
        (lambda: gate_residual(X, X.double(), X), "y is torch.float64, need torch.float32"),
        (lambda: gate_residual_norm_modulate(X, X, None), "gate is NoneType, need a torch.Tensor"),
    ],
)
def test_bad_input(call, message):
    if message is None:
        call()
        return
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "args, message",
    [
        (
            (X, X[:, :1], None, None, None, 1e-6, False),
            r"shift has shape \[2, 1, 4\], need \[2, 3, 4\]",
        ),
        ((X, X[0], None, None, None, 1e-6, False), r"shift has shape \[3, 4\], need \[2, 4\]"),
        ((X, None, None, X[0, 0, :2], None, 1e-6, False), r"weight has shape \[2\], need \[4\]"),
        ((X, None, X.half(), None, None, 1e-6, False), "scale is Half, need Float"),
        ((X.double(), None, None, None, None, 1e-6, False), "x is Double, need float32"),
    ],
)
def test_native_entry_is_safe_by_itself(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastdiff.layer_norm_modulate(*args)


def test_native_chain_checks_y_and_gate():
    with pytest.raises(RuntimeError, match=r"y has shape \[1, 3, 4\], need \[2, 3, 4\]"):
        torch.ops.fastdiff.gate_residual(X, X[:1], X)
    with pytest.raises(RuntimeError, match=r"y has shape \[2, 4\], need 3 dimensions"):
        torch.ops.fastdiff.gate_residual(X, X[:, 0], X)
    with pytest.raises(RuntimeError, match=r"gate has shape \[4\], need \[2, 4\]"):
        torch.ops.fastdiff.gate_residual(X, X, X[0, 0])


def test_tables_cover_the_public_functions():
    chains = gate_residual_norm_modulate, gate_residual_norm_quantize
    assert list(TABLES) == [f.__name__ for f in (layer_norm_modulate, gate_residual, *chains)]
    why = fastdiff.explain(gate_residual, X, X.double().float(), X)
    assert why["native"] is None and why["ref"] is None
    assert testing.rows_of(GATE_RESIDUAL) == testing.rows_of(GATE_RESIDUAL_NORM_MODULATE) == ROWS


def test_every_triton_config():
    from fastdiff.kernels import layer_norm_modulate as triton_norms

    x, y = torch.randn(2, 2, 5, 77) + 1e4
    gate, shift, scale = torch.randn(3, 2, 77)
    exact = gate_residual_norm_modulate_ref(
        *double(x, y, gate, shift, scale, None, None), 1e-6, False
    )
    eager = eager_chain(x, y, gate, shift, scale, None, None, 1e-6, False)
    with testing.guarded(x, y, gate, shift, scale) as parts:
        for name, got in testing.run_configs(
            triton_norms.gate_residual_norm_modulate,
            triton_norms.CONFIGS,
            *(*parts, None, None, 1e-6, False),
        ):
            for g, e, p in zip(got, exact, eager, strict=True):
                testing.assert_close(g, e, p, what=name)


def test_triton_refuses_rows_too_long_for_registers():
    why = fastdiff.explain(layer_norm_modulate, torch.empty(1, 1, 16385))
    assert "D is 16385" in why["triton"] and why["native"] is None


def gradients(parts, dtype, row, rms, seeds=(1, 2)):
    """Of a random functional of both outputs, to every input, through one row."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in parts]
    x, y, gate, shift, scale, weight, bias = leaves
    outputs = gate_residual_norm_modulate(
        x, y, gate, shift, scale, weight=weight, bias=bias, rms=rms, impl=row
    )
    seen = [
        torch.randn(o.shape, generator=torch.Generator().manual_seed(s))
        for o, s in zip(outputs, seeds, strict=True)
    ]
    return torch.autograd.grad(outputs, leaves, [s.to(dtype) for s in seen])


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("rms", [False, True])
def test_native_gradients(level, dtype, rms):
    for shape in ((2, 3, 77), (1, 129, 40), (2, 65, 1), (3, 1, 1152), (0, 4, 8), (2, 0, 8)):
        B, _, D = shape
        parts = [*(torch.randn(2, *shape) + 0.25), *torch.randn(3, B, D), *torch.randn(2, D)]
        parts = [t.to(dtype) for t in parts]
        exact = gradients(parts, torch.float64, "ref", rms)
        eager = gradients(parts, dtype, "ref", rms)
        with testing.cpu_level(level), testing.unchanged(*parts):
            got = gradients(parts, dtype, "native", rms)
        names = ("x", "y", "gate", "shift", "scale", "weight", "bias")
        for name, g, e, p in zip(names, got, exact, eager, strict=True):
            testing.assert_close(g, e, p, what=f"{shape} {name}")


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_native_gradients_of_single_ops(mean):
    x, y = torch.randn(2, 2, 9, 33)
    x = x + mean
    gate, shift, scale = torch.randn(3, 2, 33)
    grad = torch.randn(2, 9, 33)

    def run(call, parts, dtype, row):
        leaves = [t.to(dtype).detach().requires_grad_() for t in parts]
        return torch.autograd.grad(call(*leaves, impl=row), leaves, grad.to(dtype))

    for call, parts in (
        (layer_norm_modulate, (x,)),
        (layer_norm_modulate, (x, shift)),
        (layer_norm_modulate, (x, shift, scale)),
        (gate_residual, (x, y, gate)),
    ):
        results = [
            run(call, parts, dtype, row)
            for dtype, row in (
                (torch.float32, "native"),
                (torch.float64, "ref"),
                (torch.float32, "ref"),
            )
        ]
        for got, exact, eager in zip(*results, strict=True):
            testing.assert_close(got, exact, eager, what=f"{call.__name__} {len(parts)}")


def test_one_output_unused():
    x, y = torch.randn(2, 2, 9, 33)
    gate = torch.randn(2, 33)
    for index in (0, 1):
        grads = []
        for row in ("native", "ref"):
            leaves = [t.clone().requires_grad_() for t in (x, y, gate)]
            outputs = gate_residual_norm_modulate(*leaves, impl=row)
            grads.append(torch.autograd.grad(outputs[index].square().sum(), leaves))
        torch.testing.assert_close(*grads)


def test_reference_gradients():
    x, y = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    gate, shift, scale = torch.randn(3, 1, 2, 3, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, y, gate, shift, scale)]
    for rms in (False, True):
        assert torch.autograd.gradcheck(
            lambda *a, rms=rms: gate_residual_norm_modulate(*a, rms=rms), leaves
        )


def test_gradients_that_native_refuses():
    x = torch.randn(2, 3, 8, requires_grad=True)
    token = torch.randn(2, 3, 8)
    why = fastdiff.explain(layer_norm_modulate, x, token)
    assert "scale" not in why["native"] and "shift is [B, N, D]" in why["native"]
    assert "no backward" in why["triton"] and why["ref"] is None
    assert "gate is [B, N, D]" in fastdiff.explain(gate_residual, x, x, token)["native"]
    with torch.no_grad():
        assert fastdiff.explain(layer_norm_modulate, x, token)["native"] is None
    with pytest.raises(NotImplementedError, match="needs modulations per sample"):
        torch.ops.fastdiff.gate_residual(x, x, token)
    (grad,) = torch.autograd.grad(
        layer_norm_modulate(x, impl="native").square().sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_opcheck_and_compile_with_gradients():
    x, y = torch.randn(2, 2, 3, 33).requires_grad_().unbind(0)
    gate, shift, scale = torch.randn(3, 2, 33).requires_grad_().unbind(0)
    args = [t.detach().requires_grad_() for t in (x, y, gate, shift, scale)]
    ops = torch.ops.fastdiff
    torch.library.opcheck(ops.gate_residual_norm_modulate.default, (*args, None, None, 1e-6, False))
    torch.library.opcheck(
        ops.layer_norm_modulate_backward.default,
        (None, x.detach(), x.detach(), None, None, None, None, 1e-6, False),
    )

    def loss(*leaves):
        r, m = gate_residual_norm_modulate(*leaves)
        return (r * m).sum()

    torch._dynamo.reset()
    want = torch.autograd.grad(loss(*args), args)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*args), args)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": X}, "need y and gate, or neither"),
        ({"y": X, "gate": X}, r"gate has shape \[2, 3, 4\], need 2 dimensions"),
        ({"y": X[:, :1], "gate": X[:, 0]}, r"y has shape \[2, 1, 4\], need \[2, 3, 4\]"),
        ({"scale": X}, r"scale has shape \[2, 3, 4\], need 2 dimensions"),
        ({"grad_modulated": X[:1]}, r"grad_modulated has shape \[1, 3, 4\], need \[2, 3, 4\]"),
        ({"grad_residual": X[0]}, r"grad_residual has shape \[3, 4\], need 3 dimensions"),
        ({"weight": X}, r"weight has shape \[2, 3, 4\], need \[4\]"),
    ],
)
def test_native_backward_entry_is_safe_by_itself(change, message):
    names = ("grad_residual", "grad_modulated", "x", "y", "gate", "scale", "weight")
    args = {"grad_modulated": X, "x": X, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastdiff.layer_norm_modulate_backward(*(args.get(n) for n in names), 1e-6, False)
