"""A stored trajectory: what it holds, and which runs may walk it again."""

import pytest
import torch

import fastdiff
from fastdiff.cache import Forecast
from fastdiff.methods.store import Plan, Store
from fastdiff.methods.trajectory import running
from fastdiff.models import DiT
from fastdiff.samplers import DDIM, VP
from fastdiff.testing_gaussian import GaussianModel

BASE = dict(sampler=DDIM(eta=0.5), steps=8)


def model(**settings):
    mean = torch.tensor([[-1.0], [1.0]])
    return GaussianModel(mean, torch.tensor([[0.5]]), classes=True, **settings)


def plan(net=None, batch=2, calls=range(8), **settings):
    with running(net or model(), torch.zeros(batch, 1), **BASE | settings) as run:
        return Plan.of(run, calls)


@pytest.mark.parametrize(
    "other, name",
    [
        (dict(steps=9), "levels"),
        (dict(schedule=VP(karras=True)), "levels"),
        (dict(sampler=DDIM(eta=0.4)), "table"),
        (dict(clip=1.0), "table"),
        (dict(calls=range(1, 8)), "calls"),
        (dict(classes=torch.tensor([0, 1]), guidance=2.0), "guidance"),
        (dict(classes=torch.tensor([0, 1]), guidance=torch.tensor([2.0, 3.0])), "guidance"),
    ],
)
def test_other_plan_is_found(other, name):
    own, found = plan(), plan(**other)
    assert own.hash != found.hash and own.hash == plan().hash
    with pytest.raises(ValueError, match=f"plan: {name} is .*, need .*stored trajectory"):
        own.check(found)
    own.check(found, ("levels", "table", "calls", "guidance"))


def test_order_of_scales_counts():
    y = torch.tensor([0, 1])
    a = plan(classes=y, guidance=torch.tensor([2.0, 3.0]))
    b = plan(classes=y, guidance=torch.tensor([3.0, 2.0]))
    with pytest.raises(ValueError, match="guidance"):
        a.check(b)


def test_what_says_nothing_about_the_walk_is_not_in_the_plan():
    assert plan(batch=5, seed=7) == plan()


def test_cache_is_in_the_plan():
    net = DiT(8, 2, 3, 32, 3, 2, num_classes=3, prediction="flow").eval()
    x = torch.zeros(1, 3, 8, 8)
    found = []
    for cache in (None, Forecast(interval=2), Forecast(interval=3)):
        with running(net, x, cache=cache, steps=8) as run:
            found.append(Plan.of(run, range(8)))
            assert Plan.of(run, range(8), cached=False) == found[0]
    assert len({p.hash for p in found}) == 3
    with pytest.raises(ValueError, match=r"cache is .*interval=3.*need .*interval=2"):
        found[1].check(found[2])
    fastdiff.accelerate(net, cache=Forecast(interval=2), exact=False)
    with running(net, x, steps=8) as run:
        assert Plan.of(run, range(8)) == found[1]
    fastdiff.restore(net)


def test_unknown_name():
    with pytest.raises(ValueError, match="may_differ has 'tabel', need some of levels, table"):
        plan().check(plan(), ("tabel",))


def test_states_are_copies():
    store, x = Store(plan()), torch.randn(2, 3)
    store.keep(0, x)
    before = x.clone()
    x.zero_()
    assert torch.equal(store.state(0), before)
    with pytest.raises(ValueError, match=r"store: level is 1, need one of \[0\]"):
        store.state(1)
    with pytest.raises(ValueError, match=r"store: level is 0, need one of \[\]"):
        store.add_residual(0, x)


@pytest.mark.parametrize(
    "state, kept",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_wide_residuals_are_exact(state, kept):
    """The difference of two numbers of p bits is exact in 2 p bits where their exponents are less
    than p apart; where they are more, one rounding of the wide sum is far below the narrow one."""
    store = Store(plan(), kept)
    x, mean = (torch.randn(4, 1000, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    x, mean = x.to(state), mean.to(state)
    store.keep_residual(3, x, mean)
    assert torch.equal(store.add_residual(3, mean), x)
    assert store.residuals[3].dtype == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_narrow_residuals_are_refused(dtype):
    with pytest.raises(ValueError, match="store: dtype is .*, need torch.float32 or torch.float64"):
        Store(plan(), dtype)
