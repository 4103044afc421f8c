"""The CUDA kernel of low-rank adapters, in the model, against float64."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastdiff
from fastdiff import testing, testing_simt
from fastdiff.ops import lora_add
from fastdiff.ops.lora import IMPLS

DTYPES = (torch.bfloat16, torch.float16)
NATIVE = next(row.fn for row in IMPLS if row.name == "native")
REF = next(row.fn for row in IMPLS if row.name == "ref")
# (dimensions of y before the last, K, N, rank): tiles are of 64 rows and 64 columns (32 above a
# rank of 128), slices 32 of k, ranks are rounded up to 32, 64, 128 and 256.
CASES = (
    ((1, 1), 8, 8, 8), ((3, 65), 96, 136, 16), ((4,), 40, 64, 24), ((2, 3, 5), 128, 200, 32),
    ((2, 64), 160, 72, 40), ((2, 9), 72, 320, 64), ((2, 13), 64, 96, 72), ((3, 20), 48, 104, 136),
    ((2, 7), 40, 40, 256),
)  # fmt: skip
ODD = (((3, 67), 37, 45, 5), ((2, 9), 33, 130, 33), ((1, 3), 70, 21, 129))  # no row is aligned


def make(lead, k, n, rank, dtype=torch.bfloat16, adapters=3, seed=0):
    """y, x, down, up, scale and index; sample 0 has adapter 1, one none; the last scale is 0."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    y, x = draw(*lead, n), draw(*lead, k)
    down = draw(adapters or 1, rank, k) / max(k, 1) ** 0.5
    up, scale = draw(adapters or 1, n, rank), torch.rand(adapters or 1, generator=g) + 0.5
    if not adapters:
        return y, x, down, up, scale, None
    scale[-1] = 0
    index = torch.arange(lead[0]) * 3 % (adapters + 1)
    index[:1] = 1
    return y, x, down, up, scale, index


def run(args, keep=False, mode=(0, False, False)):
    """The kernel's outputs, whose inputs stay as they were."""
    with testing.unchanged(*args), testing_simt.emulated(*mode):
        return NATIVE(*args, keep)


def compare(args, what=""):
    """The product has one rounding, and so has what is added of it, rounded, to y."""
    y, _, _, up, scale, index = (
        t.double() if t is not None and t.is_floating_point() else t for t in args
    )
    out, low = run(args, True)
    wide = [t.double() if i < 5 else t for i, t in enumerate(args)]
    product = REF(*wide, True)[1]
    unit = 2.02 * testing.ROUNDOFF[out.dtype]
    for b in range(len(y)):
        a = 0 if index is None else int(index[b]) - 1
        gain = scale[a] if a >= 0 else 0.0
        exact = y[b] + (gain * (low[b].double() @ up[a].T) if gain else 0.0)
        for got, want in ((out[b], exact), (low[b], product[b])):
            bound = unit * want.abs() + 1e-5 * want.abs().amax()
            assert ((got.double() - want).abs() <= bound).all(), f"{what} sample {b}"
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (*CASES, *ODD), ids=str)
def test_against_float64(case, dtype):
    for adapters in (0, 3):
        args = make(*case, dtype, adapters)
        whole = compare(args, f"adapters {adapters}")
        assert torch.equal(whole, run(args)[0])  # without the product


def test_columns_are_shared_out():
    """Few rows and many columns: more than one block a tile of rows; the last one's is short."""
    for n in (700, 704, 1100):
        args = make((2, 5), 64, n, 16)
        testing_simt.counters()
        compare(args)
        blocks = testing_simt.counters()["threads"] / 256
        assert blocks == 2 * ((n + 255) // 256)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    for shape in (((2, 7), 40, 48, 16), ((2, 7), 33, 45, 9)):
        args = make(*shape)
        want = run(args)[0]
        for i in range(5):
            mixed = [testing.lay(t, layout) if i == j else t for j, t in enumerate(args)]
            assert torch.equal(run(mixed)[0], want), f"{layout} {i}"


def test_strided_inputs():
    """Rows and samples that lie apart, aligned and not; one sample for all."""
    y, x, *rest = make((3, 70), 40, 48, 16)
    want = run((y, x, *rest))[0]
    for pad in (8, 3):
        apart = [torch.full((3, 70, t.shape[2] + pad), math.nan).bfloat16() for t in (y, x)]
        for wide, t in zip(apart, (y, x), strict=True):
            wide[:, :, : t.shape[2]] = t
        views = [wide[:, :, : t.shape[2]] for wide, t in zip(apart, (y, x), strict=True)]
        assert torch.equal(run((*views, *rest))[0], want)
        skew = [torch.full((3, t[0].numel() + pad), math.nan).bfloat16() for t in (y, x)]
        for wide, t in zip(skew, (y, x), strict=True):
            wide[:, : t[0].numel()] = t.flatten(1)
        views = [
            w[:, : t[0].numel()].unflatten(1, t.shape[1:])
            for w, t in zip(skew, (y, x), strict=True)
        ]
        assert torch.equal(run((*views, *rest))[0], want)
    compare((y[:1].expand(3, -1, -1), x[:1].expand(3, -1, -1), *rest))


def test_nothing_is_added():
    """Index 0, a scale of 0, a rank of 0: the bits of y, whatever the adapter holds."""
    for n in (48, 45):
        y, x, down, up, scale, _ = make((4, 66), 40, n, 16)
        y[:, 0, 0], y[:, 1, 1] = -0.0, math.nan
        down[1:], up[1:] = math.nan, math.inf
        index = torch.tensor([0, 3, 1, 3])
        for keep in (False, True):
            out, low = run((y, x, down, up, scale, index), keep)
            for b in (0, 1, 3):
                assert torch.equal(out[b].view(torch.int16), y[b].view(torch.int16))
            assert not torch.equal(out[2, 2:], y[2, 2:]) and not out[2, 2:].isnan().any()
        assert not low[0].any() and low[1].isnan().all() and low[2].any()
        empty = run((y, x, down[:, :0], up[:, :, :0], scale, index), True)
        assert torch.equal(empty[0].view(torch.int16), y.view(torch.int16))


def test_index_out_of_range_is_no_adapter():
    y, x, down, up, scale, _ = make((5, 3), 40, 48, 16)
    index = torch.tensor([-1, 4, 1, 2**62, -(2**63)])
    with testing.guarded(y, x, down, up) as copies:
        out, low = run((*copies, scale, index), True)
    for b in (0, 1, 3, 4):
        assert torch.equal(out[b], y[b]) and not low[b].any()
    assert low[2].any() and not torch.equal(out[2], y[2])


@pytest.mark.parametrize("shape", (((2, 65), 40, 136, 16), ((2, 3), 37, 45, 5)), ids=str)
def test_reads_and_writes_nothing_outside(shape):
    args = make(*shape)
    want = run(args, True)
    for i in range(4):
        with testing.guarded(args[i]) as (inner,):
            got = run([inner if i == j else t for j, t in enumerate(args)], True)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert not got[0].isnan().any() and not got[1].isnan().any()


def test_sizes_of_zero():
    for shape in (((0, 4), 8, 8, 8), ((2, 0), 8, 8, 8), ((2, 3), 8, 0, 8), ((2, 3), 0, 8, 8)):
        args = make(*shape)
        out, low = run(args, True)
        assert torch.equal(out, args[0]) and low.shape == (*shape[0], 8)
        assert shape[1] or not low.any()


@pytest.mark.parametrize("case", (CASES[1], CASES[7], ODD[0]), ids=str)
def test_same_bits_in_every_order_and_alone(case):
    args = make(*case)
    outputs = [run(args, True, mode) for mode in testing_simt.MODES]
    compare(args)
    for other in outputs[1:]:
        assert torch.equal(other[0], outputs[0][0]) and torch.equal(other[1], outputs[0][1])
    y, x, *factors, index = args
    for b in range(len(y)):
        alone = run((y[b : b + 1], x[b : b + 1], *factors, index[b : b + 1]))[0]
        assert torch.equal(alone[0], outputs[0][0][b])


@pytest.mark.parametrize("rank", (32, 64, 128, 256))
def test_tensor_cores_are_fed_without_bank_conflicts(rank):
    args = make((1, 64), 96, 64, rank, adapters=0)
    testing_simt.counters()
    run(args)
    seen = testing_simt.counters()
    assert seen["bank_conflicts"] == 0
    assert seen["mma"] == 4 * (rank // 8) * (96 // 16) + 4 * (64 // 8) * (rank // 16)
    assert seen["copies"] == (64 + rank) * 96 // 8 + 64 * rank // 8  # 16 bytes each, none twice


def test_non_finite_values_stay_in_their_row():
    y, x, down, up, scale, index = make((2, 9), 40, 48, 16)
    index[:] = 1
    x[0, 2, 5], y[1, 3, 7] = math.nan, math.inf
    out = run((y, x, down, up, scale, index))[0]
    assert out[0, 2].isnan().all() and out[1, 3, 7].isinf()
    assert out.isfinite().sum() == out.numel() - 48 - 1


def test_gradients():
    """From what the kernel kept, against float64."""
    for adapters in (0, 3):
        args = make((3, 20), 40, 48, 16, torch.bfloat16, adapters)
        leaves = [t.clone().requires_grad_() for t in args[:5]]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        with testing_simt.emulated():
            out = lora_add(*leaves, args[5])
        out.float().square().sum().backward()
        lora_add(*wide, args[5], impl="ref").square().sum().backward()
        for got, want in zip(leaves, wide, strict=True):
            size = want.grad.abs().max().item()
            assert (got.grad.double() - want.grad).abs().max().item() <= 0.02 * size


def test_refusals():
    args = make((2, 3), 8, 9, 4, torch.float32)
    with pytest.raises(RuntimeError, match=r"lora_add: the launch failed: .*\(801\)"):
        run(args)
    with FakeTensorMode():
        fake = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in args]
        assert "float32" in fastdiff.explain(lora_add, *fake)["native"]
