"""The CUDA kernels of routing and combining, in the model: the reference's choice, to the bit."""

import math

import pytest
import torch

from fastdiff import testing, testing_simt
from fastdiff.ops import moe_combine, moe_route

DTYPES = testing.DTYPES
# (T, E, K): one expert, ones beyond a lane's first, as many chosen as there are; slots that fill no
# block, one to the last, several with a tail; tokens whose slots lie in two blocks.
SHAPES = ((1, 1, 1), (7, 3, 3), (512, 8, 2), (1025, 5, 1), (300, 31, 7), (77, 33, 33), (40, 64, 2),
          (130, 65, 9), (9, 129, 128), (6, 256, 256))  # fmt: skip
SETTINGS = (
    dict(),
    dict(renormalise=True),
    dict(gate="sigmoid", capacity=3),
    dict(gate="sigmoid", renormalise=True, capacity=0),
    dict(capacity=100),
    dict(capacity=2**40),
)


def logits_of(tokens, experts, dtype=torch.float32, ties=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(tokens, experts, generator=g)
    return (x.round() if ties else x).to(dtype)


def check(logits, k, mode=(0, False, False), **settings):
    """Whole numbers are the reference's; weights as near to float64 as its are, twice over."""
    want = moe_route(logits, k, impl="ref", **settings)
    with testing.unchanged(logits), testing_simt.emulated(*mode):
        got = moe_route(logits, k, impl="native", **settings)
    for name in ("experts", "order", "position", "offsets", "counts"):
        assert torch.equal(getattr(got, name), getattr(want, name)), f"{name} {settings}"
    wide = dict(settings)
    if "sample_logits" in wide:  # the choice is that of sums in float32, and so are these
        per = logits.shape[0] // wide["sample_logits"].shape[0]
        logits = logits.float() + wide.pop("sample_logits").float().repeat_interleave(per, 0)
    exact = moe_route(logits.double(), k, impl="ref", **wide)
    assert torch.equal(exact.experts, want.experts)
    testing.assert_close(got.weights, exact.weights, want.weights, what=f"{settings}")
    assert not got.weights[got.position < 0].any()
    return got


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape, ties):
    tokens, experts, k = shape
    for settings in SETTINGS[:: 3 if ties else 1]:
        check(logits_of(tokens, experts, ties=ties), k, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_samples(dtype):
    for other in DTYPES:
        for samples in (1, 3, 60):
            x, s = logits_of(60, 40, dtype), logits_of(samples, 40, other, seed=1)
            check(x, 3, sample_logits=s, capacity=9)


def test_no_tokens():
    got = check(torch.empty(0, 5), 2)
    assert got.offsets.tolist() == [0] * 6 and got.counts.tolist() == [0] * 5


@pytest.mark.parametrize("capacity", (None, 0, 700))
def test_all_on_one_expert_and_none_on_others(capacity):
    x = torch.zeros(2200, 9)
    x[:, 6] = 1
    check(x, 1, capacity=capacity)
    x[:, 2] = 1  # ties: the lower expert is the first
    got = check(x, 2, capacity=capacity)
    assert (got.experts == torch.tensor([2, 6])).all()


def test_many_blocks_of_slots():
    """More than there are parts of the scan, and than a part has of them."""
    check(logits_of(1150, 100, ties=True), 10)
    check(logits_of(700, 256), 8, capacity=20)


def test_nan_comes_last_and_zeros_are_one():
    x = logits_of(70, 40)
    x[::3, ::2], x[1, :], x[2, :] = math.nan, math.nan, -math.nan
    x[4::3, 1::4], x[5::3, 1::4] = 0.0, -0.0
    for gate in ("softmax", "sigmoid"):
        got = check(x, 25, gate=gate)
        assert got.weights[x.isnan().any(1)].isnan().all()
    zeros = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, 1.0]])
    assert check(zeros, 3).experts.tolist() == [[0, 1, 2], [2, 0, 1]]


def test_infinities():
    x = logits_of(6, 40)
    x[0, 3], x[1, 5], x[2, :], x[3, 1:] = math.inf, -math.inf, -math.inf, -math.inf
    x[4, 7:9] = math.inf
    for gate in ("softmax", "sigmoid"):
        check(x, 11, gate=gate)
    tiny = torch.full((3, 4), 2.0**-149) * torch.tensor([1, -1, 3, 2])
    check(tiny, 3)


@pytest.mark.parametrize("settings", (dict(), dict(capacity=40, renormalise=True)), ids=str)
@pytest.mark.parametrize("shape", ((350, 37, 3), (150, 8, 8), (9, 256, 120)))
def test_same_bits_in_every_order(shape, settings):
    tokens, experts, k = shape
    x = logits_of(tokens, experts, torch.bfloat16, ties=True)
    outputs = [check(x, k, mode, **settings) for mode in testing_simt.MODES]
    for other in outputs[1:]:
        assert all(map(torch.equal, outputs[0], other))


# ---- combine -------------------------------------------------------------------------------------


def rows_of(tokens, k, width, dtype, dropped=0.2):
    """y, weights and a position for every slot, some of them dropped."""
    g = torch.Generator().manual_seed(0)
    slots = tokens * k
    y = torch.randn(slots, width, generator=g).to(dtype)
    position = torch.randperm(slots, generator=g)
    position[torch.rand(slots, generator=g) < dropped] = -1
    weights = torch.randn(tokens, k, generator=g)
    return y, weights, position.view(tokens, k)


def combine(y, weights, position, mode=(0, False, False)):
    with testing.unchanged(y, weights, position), testing_simt.emulated(*mode):
        got = moe_combine(y, weights, position, impl="native")
    assert got.dtype == y.dtype
    return got


def check_combine(y, weights, position, mode=(0, False, False)):
    got = combine(y, weights, position, mode)
    exact = moe_combine(y.double(), weights.double(), position, impl="ref")
    testing.assert_close(got, exact, moe_combine(y, weights, position, impl="ref"))
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 8, 37, 128, 256, 264, 1160))
def test_combine_against_float64(width, dtype):
    for tokens, k in ((1, 1), (9, 2), (23, 5), (0, 3)):
        check_combine(*rows_of(tokens, k, width, dtype))
    y, weights, position = rows_of(9, 2, width, dtype)
    assert not check_combine(y, weights, torch.full_like(position, -1)).any()
    assert not check_combine(y[:0], weights, torch.full_like(position, -1)).any()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_combine_of_any_layout(layout):
    y, weights, position = rows_of(11, 3, 64, torch.bfloat16)
    check_combine(testing.lay(y, layout), testing.lay(weights, layout), position)


def test_combine_of_rows_with_gaps_of_nan():
    """Rows that no slot names, and weights of slots that are dropped, are not seen."""
    y, weights, position = rows_of(12, 4, 72, torch.float16)
    weights[position < 0] = math.nan
    unseen = torch.ones(len(y), dtype=torch.bool)
    unseen[position[position >= 0]] = False
    y[unseen] = math.nan
    assert unseen.any() and not check_combine(y, weights, position).isnan().any()


@pytest.mark.parametrize("width", (64, 37))
def test_combine_takes_a_position_out_of_range_for_none(width):
    """-1 and R name the rows just outside, which are in the buffer and full of NaN."""
    y, weights, position = rows_of(9, 3, width, torch.float32)
    bad = position.clone()
    bad[:4, 1] = torch.tensor([-1, len(y), 2**62, -(2**63)])
    none = bad.clone()
    none[:4, 1] = -1
    with testing.guarded(y) as (inside,):
        got = combine(inside, weights, bad)
    assert torch.equal(got, combine(y, weights, none)) and not got.isnan().any()


def test_combine_has_the_same_bits_in_every_order():
    given = rows_of(19, 3, 296, torch.bfloat16)
    outputs = [check_combine(*given, mode) for mode in testing_simt.MODES]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_combine_undoes_routing():
    """Experts that give their input: the sum of a token's weights times the token."""
    x = torch.randn(80, 24)
    route = check(logits_of(80, 6), 2, renormalise=True)
    got = check_combine(x[route.tokens], route.weights, route.position)
    torch.testing.assert_close(got, x)
