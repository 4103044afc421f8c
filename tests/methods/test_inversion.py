"""DDIM inversion: its map, its order, and what it visits."""

import pytest
import torch

from fastdiff import samplers
from fastdiff.cache import Forecast
from fastdiff.methods.inversion import ddim_inversion
from fastdiff.models import DiT
from fastdiff.samplers import Run
from fastdiff.testing_gaussian import GaussianModel

SHAPE = (2, 3, 5, 7)


def gaussian(dtype=torch.float64, **settings):
    shape = (1, *SHAPE[1:])
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(shape, generator=g, dtype=dtype)
    variance = torch.rand(shape, generator=g, dtype=dtype) + 0.2
    return GaussianModel(mean, variance, **settings)


def clean(dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("until", [0, 4])
def test_is_the_affine_map_of_the_equation(until):
    """Coefficients of a run's rows are float32, so the map agrees to their rounding: 12 steps of
    2^-24 each."""
    model, x, steps = gaussian(), clean(), 12
    run = Run(model, x, steps=steps)
    store = ddim_inversion(model, x, steps=steps, until=until)
    assert sorted(store.states) == list(range(until, steps + 1))
    assert torch.equal(store.state(steps), x)
    y = x
    for i in reversed(range(until, steps)):
        (a, s), (a_t, s_t) = ((run.alpha[j], run.sigma[j]) for j in (i + 1, i))
        eps = s_t * (y - a_t * model.mean) / (a_t**2 * model.variance + s_t**2)
        y = a_t * (y - s * eps) / a + s_t * eps
        assert (store.state(i) - y).abs().max() < 12 * 2**-24 * y.abs().max()
    assert store.plan.calls == tuple(reversed(range(until, steps)))


def test_round_trip_is_of_first_order():
    model, x = gaussian(), clean()
    error = []
    for steps in (50, 100, 200):
        store = ddim_inversion(model, x, steps=steps)
        again = samplers.sample(model, store.state(0), steps=steps)
        error.append(float((again - x).abs().mean()))
    assert error[0] > 1e-3
    for coarse, fine in zip(error, error[1:], strict=False):
        assert 1.6 < coarse / fine < 2.6  # halves; a second order would quarter


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_other_predictions_invert_too(prediction):
    """To level 1: at level 0 of a straight path alpha is 0, and the analytic model has no x0."""
    schedule = samplers.Flow() if prediction == "flow" else samplers.VP()
    model, x = gaussian(prediction=prediction, schedule=schedule), clean()
    error = []
    for steps in (100, 200):
        store = ddim_inversion(model, x, steps=steps, until=1)
        run = Run(model, store.state(1), steps=steps)
        with torch.no_grad():
            for i in range(1, steps):
                run.step(i, run.predict(i))
        error.append(float((run.x - x).abs().mean()))
    assert error[0] > 1e-4 and error[1] < 0.65 * error[0]


def test_prediction_that_says_nothing_at_the_clean_end():
    model = gaussian(prediction="x0")
    with pytest.raises(ValueError, match="prediction is 'x0', which means no noise"):
        ddim_inversion(model, clean(), steps=4)


def test_guided_with_classes_and_each_alone():
    shape = (3, *SHAPE[1:])
    mean = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    model = GaussianModel(mean, torch.full(shape, 0.5), classes=True)
    x, y = clean(torch.float32), torch.tensor([0, 2])
    both = ddim_inversion(model, x, steps=6, classes=y, guidance=2.5)
    for b in range(2):
        part = slice(b, b + 1)
        one = ddim_inversion(model, x[part], steps=6, classes=y[part], guidance=2.5)
        for i in range(7):
            assert torch.equal(both.state(i)[part], one.state(i))
    plain = ddim_inversion(model, x, steps=6, classes=y)
    assert not torch.equal(plain.state(0), both.state(0))


def test_caches_see_levels():
    net = DiT(8, 2, 3, 32, 3, 2, num_classes=3, prediction="flow").eval()
    seen = []

    def callback(i, run):
        seen.append((i, run.request.step, run.request.trace[-1].how))

    x = torch.randn(2, 3, 8, 12)
    store = ddim_inversion(net, x, steps=6, cache=Forecast(interval=3), callback=callback)
    assert [s[:2] for s in seen] == [(i, i) for i in reversed(range(6))]
    assert seen[0][2] == "full" and {how for _, _, how in seen} != {"full"}
    assert store.plan.cache == (repr(Forecast(interval=3)),)


@pytest.mark.parametrize(
    "x, settings, words",
    [
        ((2, 3), {}, r"x is \(2, 3\), need a tensor"),
        (None, dict(until=4), "until is 4, need a level from 0 to 3"),
        (None, dict(until=True), "until is True"),
        (None, dict(until=-1), "until is -1"),
    ],
)
def test_bad_input(x, settings, words):
    x = clean() if x is None else x
    with pytest.raises(ValueError, match=words):
        ddim_inversion(gaussian(), x, steps=4, **settings)
