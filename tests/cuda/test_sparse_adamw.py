"""The CUDA kernel of AdamW on packed entries, in the model, against what its docstring says."""

from pathlib import Path

import pytest
import torch

from fastdiff import testing_simt
from fastdiff.ops import sparse_adamw_
from fastdiff.testing import GUARD, load_file, unchanged

SHARED = load_file(Path(__file__).parents[1] / "ops" / "test_sparse_adamw.py")
NUMBERS, OTHERS = SHARED.NUMBERS, SHARED.OTHERS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Less than a warp, a block less and more than full, several blocks.
SIZES = (0, 1, 33, 1023, 1025, 2600)


def check(given, numbers=NUMBERS, step=3, mode=(0, False, False), count=None):
    """Values, moments and weight to the bit: the model's square root is rounded."""
    want, got = SHARED.rounded(given, **numbers, step=step), SHARED.copies(given)
    with testing_simt.emulated(*mode), unchanged(got[1], got[5]):
        sparse_adamw_(*got, **numbers, step=step if count is None else count, impl="native")
    assert SHARED.same(SHARED.outputs(got), want)


@pytest.mark.parametrize("index", (torch.int32, torch.int64))
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(dtype, index):
    for n in SIZES:
        check(SHARED.draw(n, dtype, index=index))


@pytest.mark.parametrize("other", OTHERS)
def test_bits_with_other_numbers(other):
    check(SHARED.draw(300), {**NUMBERS, **other})


@pytest.mark.parametrize("step", (1, 2, 10, 1000))
def test_step_in_a_tensor(step):
    """Its power is of a rounded logarithm: here, too, the same after rounding to float32."""
    for other in ({}, dict(beta1=0.0, beta2=0.0)):
        numbers, count = {**NUMBERS, **other}, torch.tensor([float(step)])
        for n in (33, 1025):
            check(SHARED.draw(n), numbers, step, count=count)


@pytest.mark.parametrize("mode", testing_simt.MODES)
def test_same_bits_in_every_order(mode):
    check(SHARED.draw(1100), step=7, mode=mode, count=torch.tensor([7.0]))


def test_entries_at_odd_addresses():
    given = SHARED.draw(1100, torch.bfloat16)
    got = [torch.cat((t[:1], t))[1:] for t in given]
    want = SHARED.rounded(given, **NUMBERS, step=3)
    with testing_simt.emulated():
        sparse_adamw_(*got, **NUMBERS, step=3, impl="native")
    assert SHARED.same(SHARED.outputs(got), want)


@pytest.mark.parametrize("index", (torch.int32, torch.int64))
def test_index_out_of_range_touches_no_memory(index):
    """Its values and moments are updated all the same; -1 and the size name what is next to it."""
    given = SHARED.draw(40, index=index)
    size, zone = given[4].numel(), GUARD // 4
    buffer = torch.full((size + 2 * zone,), torch.nan)
    inside = buffer[zone:-zone].copy_(given[4])
    want = SHARED.rounded(given, **NUMBERS, step=3)
    far = (2**62, -(2**63)) if index == torch.int64 else (2**31 - 1, -(2**31))
    given[5][1:5] = torch.tensor([-1, size, *far])
    want[3] = given[4].clone()
    kept = [0, *range(5, 40)]
    want[3][given[5][kept].long()] = want[0][kept]
    got = [*given[:4], inside, given[5]]
    with testing_simt.emulated():
        sparse_adamw_(*got, **NUMBERS, step=3, impl="native")
    assert SHARED.same(SHARED.outputs(got), want)
    assert buffer[:zone].isnan().all() and buffer[-zone:].isnan().all()


def test_nothing_is_written_past_the_vectors():
    given = SHARED.draw(1000)
    parts = [torch.cat((t, torch.full((200,), 7, dtype=t.dtype))) for t in given[:4]]
    got = [*(t[:1000] for t in parts), *given[4:]]
    want = SHARED.rounded(given, **NUMBERS, step=3)
    with testing_simt.emulated():
        sparse_adamw_(*got, **NUMBERS, step=3, impl="native")
    assert SHARED.same(SHARED.outputs(got), want)
    assert all(torch.equal(t[1000:], torch.full((200,), 7.0)) for t in parts)
