"""CycleDiffusion: the round trip, through caches too, and what a translation moves."""

import sys

import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.cache import DeepCache, Forecast
from fastdiff.methods.store import Store
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.models import DiT
from fastdiff.samplers import DDIM, Run
from fastdiff.testing_gaussian import GaussianModel, affine

cd = sys.modules["fastdiff.methods.cycle_diffusion"]  # the package's name is the function's

SHAPE = (2, 3, 5, 7)
Y = torch.tensor([0, 2])


def mixture(dtype=torch.float32, seed=0, prediction="eps"):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(3, *SHAPE[1:], generator=g, dtype=dtype)
    variance = torch.rand(3, *SHAPE[1:], generator=g, dtype=dtype) + 0.2
    return GaussianModel(mean, variance, classes=True, prediction=prediction)


def transformer():
    torch.manual_seed(0)
    net = DiT(8, 2, 3, 32, 4, 2, num_classes=3, prediction="flow").eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def clean(dtype=torch.float32, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(found, x):
    return float((found.double() - x.double()).abs().max())


@pytest.mark.parametrize(
    "sampler", [DDIM(eta=0.1), DDIM(), "ddpm", DDIM(eta=0.1, spacing="leading")]
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("start", [0, 12])
def test_round_trip(sampler, guidance, start):
    """One rounding of the state a step, which the guided map carries on."""
    model, x = mixture(), clean()
    before = x.clone()
    settings = dict(sampler=sampler, steps=50, classes=Y, guidance=guidance, seed=3)
    store = cd.encode(model, x, start=start, **settings)
    assert sorted(store.residuals) == list(range(start, 50)) and sorted(store.states) == [start]
    assert error(cd.decode(model, store, **settings), x) < 1e-5
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "state, kept",
    [
        (torch.float32, torch.float64),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_wide_residuals_make_it_exact(state, kept):
    model, x = mixture(), clean(state)
    settings = dict(steps=50, classes=Y, guidance=3.0)
    store = cd.encode(model, x, dtype_residuals=kept, **settings)
    assert torch.equal(cd.decode(model, store, **settings), x)


def test_without_the_last_residual_it_is_lost():
    """The step to the clean end draws no noise, and yet it has a residual."""
    model, x = mixture(), clean()
    store = cd.encode(model, x, steps=50, classes=Y)
    store.residuals[49] = torch.zeros_like(store.residuals[49])
    assert error(cd.decode(model, store, steps=50, classes=Y), x) > 1e-2


def test_noise_in_place_of_residuals_would_be_large_and_inexact():
    """r / sigma in bfloat16, as a narrow store of z would hold it."""
    model, x, n = mixture(), clean(), 50
    settings = dict(sampler=DDIM(eta=0.1), steps=n, classes=Y)
    store = cd.encode(model, x, **settings)
    sigma = Run(model, x, **settings).table.rows[:, cd.SIGMA]
    z = torch.stack([store.residuals[i] / sigma[i] for i in range(n - 1)])
    assert z.abs().max() > 20 and z.square().mean().sqrt() > 2
    for i in range(n - 1):
        store.residuals[i] = sigma[i] * z[i].bfloat16().float()
    assert error(cd.decode(model, store, **settings), x) > 1e-3


def test_residuals_of_a_samplers_own_path_are_its_noise():
    """decode with r = sigma z is the plain sampler, to one rounding a step."""
    model = mixture()
    settings = dict(sampler="ddpm", steps=20, classes=Y, seed=4)
    plain = samplers.sample(model, SHAPE, **settings)
    with running(model, SHAPE, **settings) as run:
        store = Store(cd.Plan.of(run, range(20)))
        store.keep(0, run.x)
        sigma = run.table.rows[:, cd.SIGMA]
        for i in range(20):
            z = fastdiff.ops.philox_normal(SHAPE, run.seeds, run.slots, i)
            store.residuals[i] = sigma[i] * z
    assert error(cd.decode(model, store, **settings), plain) < 1e-5


@pytest.mark.parametrize(
    "make, time_batch",
    [(mixture, 1), (mixture, 3), (mixture, 100), (transformer, 3), (transformer, 100)],
)
@pytest.mark.parametrize("guided", [None, (0.0, 1000.0), (300.0, 700.0)])
def test_levels_may_share_a_call(make, time_batch, guided):
    """Of the analytic model bit for bit unguided; guided, and in a network, to the rounding of a
    product of another size."""
    model = make()
    x = clean(shape=SHAPE if make is mixture else (2, 3, 8, 12))
    settings = dict(sampler=DDIM(eta=0.5), steps=10, classes=Y)
    if guided:
        settings |= dict(guidance=3.0, guidance_interval=guided, guidance_rescale=0.5)
    one = cd.encode(model, x, **settings)
    calls = []
    hook = model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    many = cd.encode(model, x, time_batch=time_batch, **settings)
    hook.remove()
    assert max(calls) <= 2 * time_batch
    if time_batch == 100:
        assert len(calls) == {None: 1, (0.0, 1000.0): 2, (300.0, 700.0): 4}[guided]
    assert torch.equal(one.state(0), many.state(0)) and one.plan == many.plan
    for i in range(10):
        if make is mixture and not guided:
            assert torch.equal(one.residuals[i], many.residuals[i])
        assert error(one.residuals[i], many.residuals[i]) < 1e-5
    assert error(cd.decode(model, many, **settings), x) < 2e-5


def moved(source, target, steps=20, eta=0.1):
    """What a translation between two Gaussians of one variance adds, from the maps of their steps:
    ``D' = A D + b_target - b_source``, ``D_T = 0``."""
    run = Run(source, (1, *SHAPE[1:]), sampler=DDIM(eta=eta), steps=steps, dtype=torch.float64)
    d = torch.zeros_like(source.mean)
    with torch.no_grad():
        both = zip(affine(run.table, run, source), affine(run.table, run, target), strict=True)
        for (a, b1, _), (a2, b2, _) in both:
            assert torch.allclose(a, a2)
            d = a * d + b2 - b1
    return d


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_translation_moves_everything_by_the_same(prediction):
    g = torch.Generator().manual_seed(5)
    one = (1, *SHAPE[1:])
    variance = torch.rand(one, generator=g, dtype=torch.float64) + 0.2
    means = [torch.randn(one, generator=g, dtype=torch.float64) for _ in range(2)]
    source = GaussianModel(means[0], variance)
    target = GaussianModel(means[1], variance, prediction=prediction)
    x = clean(torch.float64)
    y = cd.cycle_diffusion(source, target, x, steps=20, sampler=DDIM(eta=0.1))
    # float64 states and residuals; rows of another prediction are float32 of their own.
    bound = 1e-12 if prediction == "eps" else 1e-5
    reference = moved(source, GaussianModel(means[1], variance))
    assert error(y - x, reference.expand_as(x)) < bound
    assert error(reference, means[1] - means[0]) < 0.5 * error(means[0], means[1])


def test_translation_between_classes_and_each_alone():
    model, x, to = mixture(), clean(), torch.tensor([1, 0])
    settings = dict(source_classes=Y, classes=to, guidance=2.0, steps=20)
    seeds = torch.tensor([8, 9])
    whole = cd.cycle_diffusion(model, model, x, seed=seeds, **settings)
    assert (whole - x).abs().mean() > 0.3
    for b in range(2):
        part = slice(b, b + 1)
        own = settings | dict(source_classes=Y[part], classes=to[part])
        one = cd.cycle_diffusion(model, model, x[part], seed=seeds[part], **own)
        assert torch.equal(one, whole[part])


def test_the_path_has_the_marginals_of_q():
    model = GaussianModel(torch.zeros(1, 1), torch.ones(1, 1))
    x = torch.full((40_000, 1), 1.5)
    with running(model, x, sampler=DDIM(eta=0.7), steps=8) as run:
        path = cd.posterior_path(run, run.x, 2)
        assert torch.equal(path[-1], x) and len(path) == 7
        for i, state in enumerate(path[:-1], 2):
            mean, spread = float(run.alpha[i]) * 1.5, float(run.sigma[i])
            assert abs(state.mean() - mean) < 4 * spread / 200
            assert abs(state.var() / spread**2 - 1) < 4 * (2 / 40_000) ** 0.5


CACHES = [Forecast(interval=3), Forecast(interval=2, order=0), DeepCache(interval=3, branch=1)]
TRIP = dict(sampler=DDIM(eta=0.5), steps=12, classes=Y, guidance=2.0)


@pytest.mark.parametrize("cache", CACHES)
def test_round_trip_through_a_cache(cache):
    net, x = transformer(), clean(shape=(2, 3, 8, 12))
    store = cd.encode(net, x, cache=cache, **TRIP)
    assert error(cd.decode(net, store, cache=cache, **TRIP), x) < 1e-5
    whole = cd.encode(net, x, **TRIP)
    assert max(error(whole.residuals[i], store.residuals[i]) for i in range(12)) > 1e-3


@pytest.mark.parametrize("cache", [None, Forecast(interval=2), DeepCache(interval=3)])
def test_other_plan_is_refused_and_would_be_wrong(cache):
    net, x = transformer(), clean(shape=(2, 3, 8, 12))
    store = cd.encode(net, x, cache=Forecast(interval=3), **TRIP)
    with pytest.raises(ValueError, match="plan: cache is .*, need .*interval=3"):
        cd.decode(net, store, cache=cache, **TRIP)
    wrong = cd.decode(net, store, cache=cache, may_differ=("cache",), **TRIP)
    assert error(wrong, x) > 1e-2


@pytest.mark.parametrize(
    "other, name",
    [
        (dict(steps=13), "levels"),
        (dict(sampler=DDIM(eta=0.6)), "table"),
        (dict(guidance=2.5), "guidance"),
        (dict(guidance_rescale=0.1), "guidance"),
    ],
)
def test_other_settings_are_refused(other, name):
    model, x = mixture(), clean()
    store = cd.encode(model, x, **TRIP)
    with pytest.raises(ValueError, match=f"plan: {name} is"):
        cd.decode(model, store, **TRIP | other)


def both_ways(net, x):
    """Encode and decode within one request, whose caches live on."""
    fastdiff.accelerate(net, cache=Forecast(interval=4, order=1, warmup=1), exact=False)
    try:
        with fastdiff.request(12, calls_per_step=None):
            store = cd.encode(net, x, **TRIP)
            return cd.decode(net, store, **TRIP)
    finally:
        fastdiff.restore(net)


def test_caches_begin_anew_both_ways(monkeypatch):
    net, x = transformer(), clean(shape=(2, 3, 8, 12))
    assert error(both_ways(net, x), x) < 1e-5
    monkeypatch.setattr(Trajectory, "dirty", lambda self: None)  # stale state would be seen
    assert error(both_ways(net, x), x) > 1e-3


def test_levels_that_share_a_call_go_past_caches():
    net, x = transformer(), clean(shape=(2, 3, 8, 12))
    plain = cd.encode(net, x, time_batch=4, **TRIP)
    fastdiff.accelerate(net, cache=Forecast(interval=3), exact=False)
    cached = cd.encode(net, x, time_batch=4, **TRIP)
    with pytest.raises(ValueError, match="plan: cache is"):
        cd.decode(net, cached, **TRIP)
    fastdiff.restore(net)
    assert plain.plan == cached.plan
    for i in range(12):
        assert torch.equal(plain.residuals[i], cached.residuals[i])
    with pytest.raises(ValueError, match="time_batch is 4 and cache is Forecast.*need one of them"):
        cd.encode(net, x, time_batch=4, cache=Forecast(interval=3), **TRIP)


@pytest.mark.parametrize(
    "x, settings, words",
    [
        (SHAPE, {}, "encode: x is .*, need a tensor"),
        (None, dict(start=12), "start is 12, need a level from 0 to 11"),
        (None, dict(start=-1), "start is -1"),
        (None, dict(time_batch=0), "time_batch is 0, need an integer of at least 1"),
        (None, dict(dtype_residuals=torch.bfloat16), "dtype is torch.bfloat16, need torch.float32"),
        (None, dict(sampler="dpmpp_2m"), "the sampler keeps a history"),
    ],
)
def test_bad_input(x, settings, words):
    with pytest.raises(ValueError, match=words):
        cd.encode(mixture(), clean() if x is None else x, **TRIP | settings)
