"""The CUDA kernel of grouped_quant_linear, in the model: integer sums are exact."""

import math

import pytest
import torch

from fastdiff import testing, testing_simt
from fastdiff.ops import ExpertWeight, Quantized, grouped_quant_linear, quantize_experts
from fastdiff.ops.grouped_linear import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of the experts, N, K, group: tiles are of 64 or 128 rows and 128 columns, slices of 64 of k.
# Empty experts, one of every length about a tile's; the last has tiles of 128 rows.
CASES = (
    ((1,), 2, 1, None),
    ((0, 3, 0, 0, 7), 16, 24, 8),
    ((64, 65, 1, 63), 128, 32, None),
    ((0, 0, 200, 0), 130, 96, 32),
    ((5, 0, 70), 264, 256, 64),
    ((3, 11), 34, 37, None),
    ((9, 2), 136, 240, 40),
    ((3, 4), 4, 0, None),
    ((129, 0, 190), 5700, 80, None),
)


def make(lengths, columns, width, group=None, dtype=torch.float32, index=True):
    """Tokens of which the second has a NaN for its scale, a weight, and what else a call takes."""
    rows = sum(lengths)
    values = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    scale = (torch.rand(rows) + 0.5) / 127
    scale[1:2] = math.nan
    weight = quantize_experts(torch.randn(len(lengths), columns, width), group=group)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    how = {"bias": torch.randn(len(lengths), columns).to(dtype)}
    if index:
        how["index"] = torch.randint(rows, (rows,))
    return (Quantized(values, scale, dtype), weight, offsets), how


def run(args, how, activation=None, mode=(0, False, False)):
    x, weight, offsets = args
    given = [*x[:2], *weight[:2], offsets, *how.values()]
    with testing.unchanged(*given), testing_simt.emulated(*mode):
        return grouped_quant_linear(*args, **how, activation=activation, impl="native")


def compare(args, how, activation=None, mode=(0, False, False)):
    """As near to float64 as the native CPU row, whose order of sums it has, is twice over."""
    got = run(args, how, activation, mode)
    x, weight, offsets = args
    wide = {k: v.double() if v.is_floating_point() else v for k, v in how.items()}
    exact = grouped_quant_linear(
        x._replace(dtype=torch.float64), weight, offsets, **wide, activation=activation, impl="ref"
    )
    near = grouped_quant_linear(*args, **how, activation=activation, impl="native")
    assert got.dtype == x.dtype and got.shape == exact.shape
    assert (got.isnan() == exact.isnan()).all()
    testing.assert_close(got.nan_to_num(7.0), exact.nan_to_num(7.0), near.nan_to_num(7.0))
    return got


def clean(t):
    return t.nan_to_num(7.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    args, how = make(*case, dtype)
    compare(args, how, "swiglu")
    if case[1] < 1000:
        args, how = make(*case, dtype, index=False)
        compare(args, how, "gelu")
        del how["bias"]
        compare(args, how)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    args, how = make((20, 0, 7), 48, 64, 32)
    compare(args, how, activation)


@pytest.mark.parametrize("width, group", ((1100, None), (260, 130), (33, None)))
def test_integer_sums_are_exact(width, group):
    """Of the largest values, whose sums are no float32; where scales are 1 the sum is one rounding
    away."""
    values = torch.full((67, width), 127, dtype=torch.int8)
    values[::2, width // 2] = -126
    values[:, -1] = torch.arange(67) - 33
    weight = torch.full((2, 130, width), -127, dtype=torch.int8)
    weight[:, ::3] = 127
    weight[..., -1] = torch.arange(130) - 65
    groups = 1 if group is None else width // group
    given = ExpertWeight(weight, torch.ones(2, 130, groups), 8)
    args = Quantized(values, torch.ones(67), torch.float32), given, torch.tensor([0, 30, 67])
    got = run(args, {})
    parts = torch.einsum("mgk,ngk->mng", values.view(67, groups, -1).long(),
                         weight[0].view(130, groups, -1).long())  # fmt: skip
    want = torch.zeros(67, 130)
    for g in range(groups):
        want = (want.double() + parts[..., g].float().double()).float()
    assert torch.equal(got, want)


@pytest.mark.parametrize("activation", (None, "geglu"))
def test_rows_past_the_last_expert_are_not_touched(activation):
    """tests/conftest.py: memory that C++ asks for is full of NaN."""
    (x, weight, offsets), how = make((5, 0, 70), 136, 40)
    x.scale[1] = 1.0
    whole = run((x, weight, offsets), how, activation)
    assert not whole.isnan().any()
    index = how["index"].clone()
    index[40:] = 2**62
    got = run((x, weight, torch.tensor([0, 5, 5, 40])), {**how, "index": index}, activation)
    assert torch.equal(got[:40], whole[:40]) and got[40:].isnan().all()


def test_index_out_of_range_is_a_row_of_zeros():
    (x, weight, offsets), how = make((5, 0, 60), 24, 37)
    x.scale[1] = 1.0
    index = how["index"].clone()
    index[3:7] = torch.tensor([-1, len(x.values), 2**62, -(2**63)])
    with testing.guarded(*x[:2], *weight[:2]) as (q, s, values, scale):
        given = Quantized(q, s, x.dtype), ExpertWeight(values, scale, 8), offsets
        got = run(given, {**how, "index": index})
    want = run((x, weight, offsets), how)
    want[3:5], want[5:7] = how["bias"][0], how["bias"][2]
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "offsets",
    ([0, 70, 30, 90], [0, -5, 2**62, 3], [0, 80, 80, 80], [0] * 32 + [70, 30, 90]),
    ids=str,
)
def test_offsets_are_clamped(offsets):
    """Ones that descend, or leave the rows, are taken as the highest so far, and R at most."""
    (x, weight, _), how = make((90, *[0] * (len(offsets) - 2)), 24, 40)
    good = torch.tensor(offsets).clamp(0, 90).cummax(0).values
    rows = int(good[-1])
    got, want = (run((x, weight, o), how)[:rows] for o in (torch.tensor(offsets), good))
    assert torch.equal(clean(got), clean(want))


@pytest.mark.parametrize("case", (((33, 4), 40, 128, None), ((9, 3), 72, 96, 32)), ids=str)
def test_misaligned_tensors(case):
    """Each of them in turn begins a byte, or an element, past 16 bytes."""
    (x, weight, offsets), how = make(*case)
    want = clean(run((x, weight, offsets), how, "swiglu"))

    def off(t):
        wide = torch.empty(t.numel() + 1, dtype=t.dtype)
        return wide[1:].view(t.shape).copy_(t)

    for a, b, bias in (
        (x._replace(values=off(x.values)), weight, how["bias"]),
        (x._replace(scale=off(x.scale)), weight, how["bias"]),
        (x, weight._replace(values=off(weight.values)), how["bias"]),
        (x, weight._replace(scale=off(weight.scale)), how["bias"]),
        (x, weight, off(how["bias"])),
    ):
        got = run((a, b, offsets), {**how, "bias": bias}, "swiglu")
        assert torch.equal(clean(got), want)


@pytest.mark.parametrize("case", (((70, 9), 136, 192, None), ((65, 1), 130, 128, 32)), ids=str)
def test_same_bits_in_every_order(case):
    """And whatever else is in a group: a row is what it is alone."""
    args, how = make(*case, torch.bfloat16)
    want = clean(run(args, how, "swiglu"))
    for mode in testing_simt.MODES[1:]:
        assert torch.equal(clean(run(args, how, "swiglu", mode)), want)
    x, weight, _ = args
    last = sum(case[0]) - 1
    how["index"] = how["index"][last:]
    alone = clean(run((x, weight, torch.tensor([0, 0, 1])), how, "swiglu"))
    assert torch.equal(alone[0], want[last])


def test_no_bank_conflicts():
    args, how = make((70, 5), 136, 192)
    testing_simt.counters()
    run(args, how, "geglu")
    seen = testing_simt.counters()
    assert seen["mma"] and not seen["bank_conflicts"]


@pytest.mark.parametrize("case", (((65, 2), 136, 96, 32), ((3, 5), 46, 37, None)), ids=str)
def test_reads_nothing_outside(case):
    (x, weight, offsets), how = make(*case)
    for activation in (None, "swishglu"):
        want = clean(run((x, weight, offsets), how, activation))
        with testing.guarded(*x[:2], *weight[:2], how["bias"]) as (q, s, values, scale, bias):
            given = Quantized(q, s, x.dtype), ExpertWeight(values, scale, 8), offsets
            got = run(given, {**how, "bias": bias}, activation)
        assert torch.equal(clean(got), want)
