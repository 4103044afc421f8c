import math

import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops import select_tokens
from fastdiff.ops.select_tokens import IMPLS

FAST = [row for row in testing.rows_of(IMPLS) if row != "ref"]


def by_loops(score, count, drops, starvation=0.1, high=0.0, most=None, forced=None):
    """What the docstring says, sample by sample, token by token."""
    skip = score.shape[1] - count
    low = int((1 - high) * skip + 1e-9)
    chosen = []
    for b, row in enumerate(score.float()):

        def key(n, sign, row=row, b=b):
            waited = int(drops[b, n])
            s = row[n]
            nan = bool(s.isnan())
            factor = (min(waited, 127) * torch.tensor(starvation)).clamp(max=80).exp()
            value = 0.0 if nan else float(s * factor) if sign > 0 else -float(s * (1 / factor))
            guard = waited if most is not None and waited >= most else 0
            guard = 2**31 - 2 if nan else guard
            if forced is not None and forced[b % len(forced), n]:
                guard = 2**31 - 1
            return guard, value, n

        tokens = range(score.shape[1])
        out = sorted(tokens, key=lambda n: key(n, 1))[:low]
        rest = [n for n in tokens if n not in out]
        out += sorted(rest, key=lambda n: key(n, -1))[: skip - low]
        chosen.append([n for n in tokens if n not in out])
    index = torch.tensor(chosen, dtype=torch.int64).view(len(score), count)
    new = drops + 1
    return index, new.scatter(1, index, 0)


def inputs(batch, tokens, seed=0, ties=False):
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(batch, tokens, generator=g)
    if ties:
        score = (score * 4).floor()
    return score, torch.randint(6, (batch, tokens), generator=g, dtype=torch.int32)


SETTINGS = [
    dict(),
    dict(high=0.3),
    dict(high=1.0, starvation=1.0),
    dict(high=0.5, most=3),
    dict(starvation=0.0, most=1),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_against_loops(row, settings, ties):
    for batch, tokens, count in ((2, 1, 1), (2, 7, 3), (1, 64, 64), (3, 65, 1), (1, 130, 77)):
        score, drops = inputs(batch, tokens, ties=ties)
        forced = torch.zeros(batch, tokens, dtype=torch.bool)
        forced[:, ::5] = True
        for given in (None, forced, forced[:1]):
            want = by_loops(score, count, drops, forced=given, **settings)
            with testing.unchanged(score, drops):
                got = select_tokens(score, count, drops, forced=given, **settings, impl=row)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
            assert got[0].dtype == torch.int64 and got[1].dtype == torch.int32


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_row_gives_the_bits_of_the_reference(row, settings):
    for seed, tokens in enumerate((1, 2, 31, 256, 1000, 4096)):
        score, drops = inputs(2, tokens, seed, ties=seed % 2 == 0)
        drops = drops * 40  # past the table of factors
        score[0, :: max(1, tokens // 7)] = math.nan
        score[1, :: max(1, tokens // 5)] = math.inf
        score[1, 1 :: max(1, tokens // 3)] = -0.0
        for count in {1, (tokens + 1) // 2, tokens}:
            want = select_tokens(score, count, drops, **settings, impl="ref")
            got = select_tokens(score, count, drops, **settings, impl=row)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), (tokens, count)


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_compatible_is_the_published_rule(row):
    """One sorted list, the ends of which are left out; counts of all steps."""
    drops = total = torch.zeros(2, 50, dtype=torch.int32)
    for step in range(6):
        score, _ = inputs(2, 50, step)
        index, drops = select_tokens(score, 20, drops, high=0.3, compatible=True, impl=row)
        low, high = int(30 * 0.7), 30 - int(30 * 0.7)
        scaled = score * torch.exp(0.1 * total)
        order = scaled.argsort(1)
        assert torch.equal(index, order[:, low : 50 - high].sort(1).values)
        total = total + 1
        total = total.scatter_add(1, index, torch.full_like(index, -1, dtype=torch.int32))
        assert torch.equal(drops, total)


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
@pytest.mark.parametrize("most", [1, 2, 5])
def test_the_wait_is_bounded(row, most):
    """With scores that never change, and no factor."""
    tokens, count = 40, 7
    score, drops = torch.rand(1, tokens), None
    longest = 0
    for _ in range(4 * (most + 6)):
        _, drops = select_tokens(score, count, drops, starvation=0.0, most=most, impl=row)
        longest = max(longest, int(drops.max()))
    assert longest <= most + math.ceil(tokens / count)


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_samples_and_orders_do_not_matter(row):
    score, drops = inputs(3, 90, seed=4)
    index, new = select_tokens(score, 30, drops, high=0.4, impl=row)
    for b in range(3):
        one = select_tokens(score[b : b + 1], 30, drops[b : b + 1], high=0.4, impl=row)
        assert torch.equal(one[0][0], index[b]) and torch.equal(one[1][0], new[b])
    order = torch.randperm(90)
    turned, _ = select_tokens(score[:, order], 30, drops[:, order], high=0.4, impl=row)
    assert torch.equal(order[turned].sort(1).values, index)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_levels(level):
    score, drops = inputs(2, 300, ties=True)
    want = select_tokens(score, 100, drops, high=0.5, impl="ref")
    with testing.cpu_level(level):
        got = select_tokens(score, 100, drops, high=0.5, impl="native")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels import select_tokens as kernel
    from fastdiff.ops.select_tokens import row_args

    args = row_args(*inputs(2, 40)[:1], 11, high=0.3)
    want = select_tokens(inputs(2, 40)[0], 11, high=0.3, impl="ref")
    for name, got in testing.run_configs(kernel.select_tokens, kernel.CONFIGS, *args):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), name
    why = fastdiff.explain(select_tokens, torch.ones(1, 20000), 3)
    assert "at most 16384" in why["triton"]


def test_other_dtypes_strides_and_no_samples():
    score, _ = inputs(4, 20)
    for given in (score.half(), score.bfloat16(), score.double(), score.repeat(1, 2)[:, :20]):
        want = select_tokens(given.float().contiguous(), 5)
        assert torch.equal(select_tokens(given, 5)[0], want[0])
    index, drops = select_tokens(torch.ones(0, 5), 2)
    assert index.shape == (0, 2) and drops.shape == (0, 5)


def test_opcheck_and_compile():
    score, drops = inputs(2, 9)
    args = (score, drops, score > 0.9, torch.ones(2, 9), 4, 3, 2, True)
    torch.library.opcheck(torch.ops.fastdiff.select_tokens.default, args)
    testing.check_compile(lambda s, d: select_tokens(s, 4, d, high=0.3, most=2), score, drops)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(count=0), "count is 0, need an integer from 1 to 6"),
        (dict(count=7), "count is 7, need an integer from 1 to 6"),
        (dict(count=2.0), "count is 2.0, need"),
        (dict(starvation=-1.0), "starvation is -1.0, need a number of at least 0"),
        (dict(starvation=math.nan), "starvation is nan, need"),
        (dict(high=1.5), "high is 1.5, need a number from 0 to 1"),
        (dict(most=0), "most is 0, need an integer of at least 1"),
        (dict(drops=torch.zeros(2, 6)), "drops is torch.float32, need a tensor of torch.int32"),
        (
            dict(drops=torch.zeros(1, 6, dtype=torch.int32)),
            r"drops has shape \[1, 6\], need \[2, 6\]",
        ),
        (dict(forced=torch.ones(2, 6)), "forced is torch.float32, need a tensor of torch.bool"),
        (dict(compatible=True, most=2), "compatible is set and most is 2, need one of them"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=f"select_tokens: {message}"):
        select_tokens(torch.ones(2, 6), **{"count": 2, **call})
