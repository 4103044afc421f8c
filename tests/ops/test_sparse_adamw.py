import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import sparse_adamw_
from fastdiff.ops.sparse_adamw import IMPLS, row_args

NUMBERS = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
# What torch.optim.AdamW branches on: no decay; lerp's other end; no history at all.
OTHERS = (
    dict(weight_decay=0.0),
    dict(beta1=0.3, beta2=0.5),
    dict(beta1=0.0, beta2=0.0),
    dict(eps=0.1, lr=3.0),
    dict(beta1=0.5, lr=0.0),
)
# 0, 1, around a vector, around the chunk between two square roots, several of those
SIZES = (0, 1, 7, 8, 9, 16, 17, 77, 4095, 4096, 4097, 10007)
FEW = (0, 1, 77, 2051)


def draw(n, dtype=torch.float32, size=None, index=torch.int32):
    """Packed vectors after some steps, and a weight of ``size`` entries, n of which are theirs."""
    size = 3 * n + 5 if size is None else size
    weight = torch.randn(size).to(dtype)
    places = torch.randperm(size)[:n].sort().values.to(index)
    moment = torch.rand(n) * 10 ** torch.empty(n).uniform_(-9, 1)
    return torch.randn(n), torch.randn(n), 0.1 * torch.randn(n), moment, weight, places


def copies(given):
    return [t.clone() for t in given]


def rounded(given, *, lr, beta1, beta2, eps, weight_decay, step):
    """What the docstring says, with a rounded square root: values, moments and weight.

    Sums and products in float64, of which those of float32 are exact.
    """

    def once(x):
        return x.float().double()

    values, grad, m, v = (t.double() for t in given[:4])
    weight, index = given[4].clone(), given[5].long()

    def number(x):
        return once(torch.tensor(x, dtype=torch.float64))

    w = number(1 - beta1)
    delta = once(grad - m)
    m = once(m + w * delta) if w < 0.5 else once(grad + once(w - 1) * delta)
    v = once(once(v * number(beta2)) + once(number(1 - beta2) * grad) * grad)
    root = number((1 - beta2**step) ** 0.5)
    size = number(-(lr / (1 - beta1**step)))
    denominator = once(once(once(v.sqrt()) / root) + number(eps))
    decayed = once(values * number(1 - lr * weight_decay))
    values = once(decayed + once(once(size * m) / denominator))
    weight[index] = values.float().to(weight.dtype)
    return [values.float(), m.float(), v.float(), weight]


def outputs(given):
    return [given[i] for i in (0, 2, 3, 4)]


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def torch_steps(n, row, numbers, steps=10):
    """Whether the row does with an index of everything what torch does, at each of ``steps``."""
    parameter = torch.nn.Parameter(torch.randn(n))
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=numbers["lr"],
        betas=(numbers["beta1"], numbers["beta2"]),
        eps=numbers["eps"],
        weight_decay=numbers["weight_decay"],
    )
    values = parameter.detach().clone()
    weight, m, v, index = values.clone(), torch.zeros(n), torch.zeros(n), torch.arange(n)
    for step in range(1, steps + 1):
        parameter.grad = torch.randn(n) * 10 ** torch.empty(n).uniform_(-4, 1)
        optimizer.step()
        grad = parameter.grad.clone()
        sparse_adamw_(values, grad, m, v, weight, index, **numbers, step=step, impl=row)
        state = optimizer.state[parameter]
        want = [parameter.detach(), state["exp_avg"], state["exp_avg_sq"], parameter.detach()]
        assert same([values, m, v, weight], want), f"{row}, n = {n}, step {step}, {numbers}"


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_native_has_the_bits_of_torch(level):
    with testing.cpu_level(level):
        for n in SIZES[1:]:
            torch_steps(n, "native", NUMBERS)
        for other in OTHERS:
            torch_steps(77, "native", {**NUMBERS, **other})


def test_reference_has_the_bits_of_torch():
    for n in SIZES[1:]:
        torch_steps(n, "ref", NUMBERS)
    for other in OTHERS:
        torch_steps(77, "ref", {**NUMBERS, **other})


@pytest.mark.parametrize("index", (torch.int32, torch.int64))
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_native_has_the_bits_of_the_reference(level, dtype, index):
    """Entries of a weight alone; the others keep their bits, NaN among them."""
    for n in SIZES:
        given = draw(n, dtype, index=index)
        rest = torch.ones(given[4].numel(), dtype=torch.bool)
        rest[given[5].long()] = False
        given[4][rest] = torch.nan
        want, got = copies(given), copies(given)
        sparse_adamw_(*want, **NUMBERS, step=3, impl="ref")
        with testing.cpu_level(level), testing.unchanged(got[1], got[5], got[4][rest]):
            assert sparse_adamw_(*got, **NUMBERS, step=3, impl="native") is got[0]
        assert same(outputs(got)[:3], outputs(want)[:3]), n
        assert torch.equal(got[4][~rest], want[4][~rest]), n
        assert torch.equal(got[4][~rest], got[0].to(dtype)), n
        assert got[4][rest].isnan().all() and want[4][rest].isnan().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_rounding_to_the_weight_is_torch_s(level, dtype):
    """Ties, values below the smallest normal number and past the largest, signed zeros."""
    bits = torch.arange(2**16, dtype=torch.int32) << 16
    tie = torch.cat((bits + 0x8000, bits, bits + 0x7FFF)).view(torch.float32)
    half = torch.arange(-(2**12), 2**12).float() * 2.0**-25
    values = torch.cat((tie[tie.isfinite()], half, torch.tensor([65519.0, 65520.0, -0.0])))
    n = values.numel()
    weight = torch.zeros(2 * n, dtype=dtype)
    index = torch.arange(n, dtype=torch.int32) * 2
    zeros = [torch.zeros(n) for _ in range(3)]
    with testing.cpu_level(level):
        sparse_adamw_(
            values.clone(), *zeros, weight, index, **{**NUMBERS, "weight_decay": 0}, step=1,
            impl="native",
        )  # fmt: skip
    want = values.to(dtype)
    assert torch.equal(weight[::2].view(torch.int16), want.view(torch.int16))
    assert not weight[1::2].any()


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ("triton", "ref"))
def test_rows_round_as_the_docstring_says(row, dtype):
    """The reference but for the last bit of torch's square root, Triton to the bit."""
    if row == "triton" and not AVAILABLE:
        pytest.skip("needs triton")
    for n in FEW:
        for numbers in (NUMBERS, *({**NUMBERS, **other} for other in OTHERS)):
            given = draw(n, dtype)
            want, got = rounded(given, **numbers, step=3), copies(given)
            with testing.unchanged(got[1], got[5]):
                sparse_adamw_(*got, **numbers, step=3, impl=row)
            if row == "triton":
                assert same(outputs(got), want), f"{n}, {numbers}"
                continue
            assert same(outputs(got)[1:3], want[1:3]), f"{n}, {numbers}"
            torch.testing.assert_close(got[0], want[0], rtol=4e-7, atol=1e-6 * numbers["lr"])


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_against_float64(row):
    if row == "triton" and not AVAILABLE:
        pytest.skip("needs triton")
    given = draw(1000)
    numbers, step = dict(NUMBERS, lr=0.5), 7
    p, g, m, v = (t.double() for t in given[:4])
    m, v = m + 0.1 * (g - m), 0.999 * v + 0.001 * g**2
    exact = p * (1 - 0.5 * 0.01)
    exact -= 0.5 / (1 - 0.9**step) * m / (v.sqrt() / (1 - 0.999**step) ** 0.5 + 1e-8)
    eager, got = copies(given), copies(given)
    sparse_adamw_(*eager, **numbers, step=step, impl="ref")
    sparse_adamw_(*got, **numbers, step=step, impl=row)
    for mine, true, plain in zip(outputs(got), (exact, m, v), outputs(eager), strict=False):
        testing.assert_close(mine, true, plain)


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_step_in_a_tensor(row):
    """What a captured step counts; it is not written."""
    if row == "triton" and not AVAILABLE:
        pytest.skip("needs triton")
    for step in (1, 2, 10, 1000, 10**6):
        for other in ({}, dict(beta1=0.0, beta2=0.0)):
            given, count = draw(77), torch.tensor([float(step)])
            want, got = copies(given), copies(given)
            sparse_adamw_(*want, **{**NUMBERS, **other}, step=step, impl=row)
            with testing.unchanged(count):
                sparse_adamw_(*got, **{**NUMBERS, **other}, step=count, impl=row)
            assert same(outputs(got), outputs(want)), step


def test_reference_on_a_device_that_nothing_waits_for():
    """As it is traced for one: the same to the rounding of a double power."""
    given = draw(300)
    want, got = copies(given), copies(given)
    sparse_adamw_(*want, **NUMBERS, step=5, impl="ref")
    traced = torch.fx.experimental.proxy_tensor.make_fx(
        lambda *t: sparse_adamw_(*t[:-1], **NUMBERS, step=t[-1], impl="ref"), tracing_mode="fake"
    )(*got, torch.tensor([5.0]))
    traced(*got, torch.tensor([5.0]))
    for a, b in zip(outputs(got), outputs(want), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_an_entry_does_not_depend_on_its_place_nor_on_threads(level):
    given = draw(300_000)
    before = torch.get_num_threads()
    with testing.cpu_level(level):
        want = copies(given)
        try:
            torch.set_num_threads(1)
            sparse_adamw_(*want, **NUMBERS, step=3, impl="native")
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                got = copies(given)
                sparse_adamw_(*got, **NUMBERS, step=3, impl="native")
                assert same(got, want), threads
        finally:
            torch.set_num_threads(before)
        for first, n in [(0, k) for k in range(1, 36)] + [(k, 4101) for k in range(1, 17)]:
            part = slice(first, first + n)
            weight = given[4].clone()
            got = [*(t[part].clone() for t in given[:4]), weight, given[5][part]]
            sparse_adamw_(*got, **NUMBERS, step=3, impl="native")
            assert same([got[0], got[2], got[3]], [want[i][part] for i in (0, 2, 3)]), (first, n)
            assert torch.equal(weight[given[5][part].long()], want[0][part])


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_runs_and_misaligned_memory(level, dtype):
    """Entries in a row, which are copied as one, alone and among others; odd addresses."""
    for n in (5, 4096, 9000):
        given = list(draw(n, dtype, size=2 * n))
        index = torch.arange(n, dtype=torch.int32) + 3
        index[-(n // 3) :] += torch.arange(n // 3, dtype=torch.int32) + 1
        given[5] = index
        want = copies(given)
        sparse_adamw_(*want, **NUMBERS, step=3, impl="ref")
        got = [testing.lay(t, "misaligned") for t in given]
        with testing.cpu_level(level):
            sparse_adamw_(*got, **NUMBERS, step=3, impl="native")
        assert same(got, want)


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_writes_nothing_outside(row):
    if row == "triton" and not AVAILABLE:
        pytest.skip("needs triton")
    for n, dtype in ((1, torch.float32), (13, torch.bfloat16), (1030, torch.float16)):
        given = draw(n, dtype)
        want = copies(given)
        sparse_adamw_(*want, **NUMBERS, step=3, impl=row)
        with testing.guarded(*given) as inside:
            sparse_adamw_(*inside, **NUMBERS, step=3, impl=row)
        assert same(inside, want)


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_strided_gradient_and_index_and_a_weight_of_any_shape(row):
    if row == "triton" and not AVAILABLE:
        pytest.skip("needs triton")
    given = draw(20, torch.bfloat16, size=4 * 5 * 6)
    want, got = copies(given), copies(given)
    sparse_adamw_(*want, **NUMBERS, step=3, impl=row)
    got[1] = torch.stack((given[1], given[1]), 1)[:, 0]
    got[5] = torch.stack((given[5], given[5]), 1)[:, 1]
    got[4] = got[4].view(4, 5, 6)
    sparse_adamw_(*got, **NUMBERS, step=3, impl=row)
    got[4] = got[4].flatten()
    assert same(got, want)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import sparse_adamw

    given = draw(3001, torch.bfloat16)
    want = rounded(given, **NUMBERS, step=3)
    args = row_args(*given, **NUMBERS, step=3)

    def launch(*args, config):
        own = [*copies(args[:6]), *args[6:]]
        sparse_adamw.sparse_adamw_(*own, config=config)
        return outputs(own)

    for name, got in testing.run_configs(launch, sparse_adamw.CONFIGS, *args):
        assert same(got, want), name


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_triton_skips_an_index_out_of_range():
    """The interpreter raises for an access outside of the arguments: none for any index."""
    from fastdiff.kernels import sparse_adamw

    given = draw(6, index=torch.int64)
    want = rounded(given, **NUMBERS, step=3)
    want[3] = given[4].clone()
    want[3][given[5][[0, 5]]] = want[0][[0, 5]]
    given[5][1:5] = torch.tensor([-1, given[4].numel(), 2**62, -(2**63)])
    sparse_adamw.sparse_adamw_(*row_args(*given, **NUMBERS, step=3))
    assert same(outputs(given), want)


def test_opcheck_and_compile():
    given = draw(9, torch.bfloat16)
    for step in (3, torch.tensor([3.0])):
        args = row_args(*copies(given), **NUMBERS, step=step)
        torch.library.opcheck(torch.ops.fastdiff.sparse_adamw_.default, args)
        torch._dynamo.reset()
        compiled = torch.compile(sparse_adamw_, fullgraph=True)
        for row in ("native", "ref"):
            want, got = copies(given), copies(given)
            sparse_adamw_(*want, **NUMBERS, step=step, impl=row)
            compiled(*got, **NUMBERS, step=step, impl=row)
            for a, b in zip(outputs(got), outputs(want), strict=True):
                torch.testing.assert_close(a, b)
            assert row == "ref" or same(got, want)  # the reference's sums are the compiler's own


@pytest.mark.parametrize("row", ("native", "ref"))
def test_a_parameter_is_written_and_a_graph_that_kept_it_sees_it(row):
    given = draw(5)
    weight = torch.nn.Parameter(given[4].clone())
    x = torch.randn(weight.numel(), requires_grad=True)
    y = (weight * x).sum()
    sparse_adamw_(*given[:4], weight, given[5], **NUMBERS, step=1, impl=row)
    assert weight.requires_grad and weight.is_leaf and given[0].grad_fn is None
    assert torch.equal(weight.detach()[given[5].long()], given[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("index", (torch.int32, torch.int64))
@pytest.mark.parametrize("row", ("native", "ref"))
def test_refuses_a_bad_index_before_it_writes(row, index):
    given = draw(9000, torch.bfloat16, index=index)
    size, places = given[4].numel(), given[5].tolist()
    for at, bad, message in (
        (0, -1, f"index has value -1, need 0 to {size - 1}"),
        (8999, size, f"index has value {size}, need 0 to {size - 1}"),
        (4000, size + 7, f"index has value {size + 7}, need 0 to {size - 1}"),
        (4000, -5, f"index has value -5, need 0 to {size - 1}"),
        (4000, places[3999], f"index has value {places[3999]} after {places[3999]}, need"),
        (4096, places[4094], f"index has value {places[4094]} after {places[4095]}, need"),
        (8999, places[8998], "need ascending values"),
    ):  # fmt: skip
        spoilt = given[5].clone()
        spoilt[at] = bad
        with testing.unchanged(*given), pytest.raises(ValueError, match=message) as caught:
            sparse_adamw_(*given[:5], spoilt, **NUMBERS, step=1, impl=row)
        assert str(caught.value).startswith("sparse_adamw_: ")


@pytest.mark.parametrize(
    "what, value, message",
    [
        ("values", torch.ones(4).double(), "values is torch.float64, need torch.float32"),
        ("values", torch.ones(8)[::2], r"values has strides \[2\], need a contiguous tensor"),
        ("exp_avg", torch.ones(8)[::2], r"exp_avg has strides \[2\], need a contiguous tensor"),
        ("exp_avg_sq", torch.ones(8)[::2], r"exp_avg_sq has strides \[2\], need a contiguous"),
        ("exp_avg", torch.ones(4).bfloat16(), "exp_avg is torch.bfloat16, need torch.float32"),
        ("grad", torch.ones(3), r"grad has shape \[3\], need \[4\]"),
        ("weight", torch.ones(4, 3).t(), r"weight has strides \[1, 3\], need a contiguous tensor"),
        ("weight", torch.ones(12).double(), "weight is torch.float64, need float32, bfloat16 or"),
        ("index", torch.arange(4.0), "index is torch.float32, need torch.int32 or torch.int64"),
        ("index", torch.arange(5), r"index has shape \[5\], need \[4\]"),
        ("lr", -1.0, "lr is -1.0, need 0 or more"),
        ("eps", float("nan"), "eps is nan, need a finite number"),
        ("weight_decay", -0.1, "weight_decay is -0.1, need 0 or more"),
        ("beta1", 1.0, "beta1 is 1.0, need 0 to below 1"),
        ("beta2", "0.9", "beta2 is '0.9', need a finite number"),
        ("step", 0, "step is 0, need an integer of at least 1, or a torch.float32 tensor"),
        ("step", 1.0, "step is 1.0, need an integer of at least 1"),
        ("step", torch.tensor([1]), "step is torch.int64, need torch.float32"),
        ("step", torch.tensor(1.0), r"step has shape \[\], need \[1\]"),
    ],
)
def test_bad_input(what, value, message):
    call = dict(zip(("values", "grad", "exp_avg", "exp_avg_sq"), torch.ones(4, 4), strict=True))
    call |= dict(weight=torch.ones(12), index=torch.arange(4), step=1, **NUMBERS)
    with testing.unchanged(*(t for t in call.values() if isinstance(t, torch.Tensor))):
        with pytest.raises(ValueError, match=f"sparse_adamw_: {message}"):
            sparse_adamw_(**{**call, what: value})


def test_the_native_entry_checks_for_itself():
    entry = torch.ops.fastdiff.sparse_adamw_
    good = list(row_args(*draw(4), **NUMBERS, step=torch.ones(1)))
    for at, value, message in (
        (0, torch.ones(4, 1), "values has shape"),
        (1, torch.ones(4).double(), "grad is Double, need Float"),
        (2, torch.ones(8)[::2], "exp_avg has strides"),
        (3, torch.ones(5), "exp_avg_sq has shape"),
        (4, torch.ones(4, 5).t(), "weight has strides"),
        (5, torch.ones(4), "index is Float, need Int or Long"),
        (6, torch.ones(2), "step has shape"),
        (6, torch.ones(1, dtype=torch.int64), "step is Long, need Float"),
    ):
        with pytest.raises(RuntimeError, match=f"sparse_adamw_: {message}"):
            entry(*good[:at], value, *good[at + 1 :])
