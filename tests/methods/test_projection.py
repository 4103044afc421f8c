"""Data consistency: what is measured is met, what is not is the sampler's."""

import math

import pytest
import torch

from fastdiff import samplers
from fastdiff.methods.operators import BoxDown, Mask, Matrix
from fastdiff.methods.projection import projected
from fastdiff.samplers import DDIM, Run
from fastdiff.testing import unchanged
from fastdiff.testing_gaussian import GaussianModel, recursion

SHAPE = (2, 2, 4, 6)
N = math.prod(SHAPE[1:])


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian(prediction="eps", **kwargs):
    mean, variance = draw(1, *SHAPE[1:], seed=2), 0.2 + draw(1, *SHAPE[1:], seed=3).square()
    return GaussianModel(mean, variance, prediction=prediction, **kwargs)


OPERATORS = {
    "mask": lambda: Mask(draw(SHAPE[0], 1, *SHAPE[2:], seed=4) > 0),
    "box": lambda: BoxDown(2),
    "matrix": lambda: Matrix(draw(7, N, seed=5), SHAPE[1:]),
}


class Watched:
    """An operator that keeps what it projects."""

    def __init__(self, operator):
        self.operator, self.found = operator, []

    def __getattr__(self, name):
        return getattr(self.operator, name)

    def project(self, x, y):
        self.found.append(self.operator.project(x, y))
        return self.found[-1]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_predicted_state_explains_the_measurement(name, sampler):
    operator = Watched(OPERATORS[name]())
    y = operator.apply(draw(*SHAPE, seed=6))
    with unchanged(y):
        found = projected(gaussian(), SHAPE, operator, y, sampler=sampler, steps=8)
    assert len(operator.found) >= 9
    for x0 in operator.found:  # predictions at first are around 100: 1e-5 is a few roundings of y
        assert torch.allclose(operator.apply(x0), y, atol=2e-5 * max(1, x0.abs().max()))
    assert torch.equal(found, operator.found[-1])
    assert torch.allclose(operator.apply(found), y, atol=1e-5)
    if name == "mask":
        assert torch.equal(operator.apply(found), y)  # bit for bit


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", OPERATORS)
def test_is_the_affine_loop(name, prediction):
    """The loop of the module's docstring, in float64, with H^T (H H^T)^-1 as a matrix."""
    operator, model = OPERATORS[name](), gaussian(prediction)
    y, start = operator.apply(draw(*SHAPE, seed=6)), draw(*SHAPE, seed=7)
    found = projected(model, start, operator, y, steps=10, weight=lambda i: 1 - 0.05 * i)
    run = Run(model, SHAPE, steps=10)
    mean, variance = model.mean.double(), model.variance.double()
    x = start.double()
    eye = torch.eye(N).view(N, *SHAPE[1:])
    for i in range(10):
        (alpha, sigma), (alpha_s, sigma_s) = ((run.alpha[j], run.sigma[j]) for j in (i, i + 1))
        x0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        fixed = []
        for b in range(SHAPE[0]):
            if name == "mask":
                h = torch.diag(operator.on[b].expand(SHAPE[1:]).flatten().double())
                h = h[h.sum(1) > 0]
                own = y[b].double().flatten()[operator.on[b].expand(SHAPE[1:]).flatten()]
            else:
                h, own = operator.apply(eye).flatten(1).T.double(), y[b].double().flatten()
            away = h.T @ torch.linalg.solve(h @ h.T, own - h @ x0[b].flatten())
            fixed.append(x0[b] + (1 - 0.05 * i) * away.view(SHAPE[1:]))
        fixed = torch.stack(fixed)
        x = alpha_s * fixed + sigma_s * (x - alpha * fixed) / sigma
    assert torch.allclose(found.double(), x, atol=2e-5)


def test_law_of_what_is_not_measured():
    """Elements are independent: the others keep the law of the sampler, of which mean and variance
    are known; the measured ones are the measurement."""
    model = GaussianModel(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 0.3]]))
    settings = dict(sampler=DDIM(eta=1.0), steps=20)
    mean, variance = recursion(Run(model, (1, 2), **settings), model)
    operator, n = Mask(torch.tensor([[True, False]])), 20000
    y = torch.tensor([[0.7, 0.0]]).expand(n, 2)
    x = projected(model, (n, 2), operator, y, seed=3, **settings).double()
    assert torch.equal(x[:, 0], y[:, 0].double())
    error = math.sqrt(float(variance[0, 1]) / n)
    assert abs(x[:, 1].mean() - mean[0, 1]) < 4 * error
    assert abs(x[:, 1].var() / variance[0, 1] - 1) < 4 * math.sqrt(2 / n)


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_neutral_settings_are_plain_sampling(sampler, clip):
    model = gaussian(classes=True)
    settings = dict(
        sampler=sampler, steps=6, clip=clip, classes=torch.tensor([0, 1]), guidance=2.5, seed=4
    )
    plain = samplers.sample(model, SHAPE, **settings)
    nothing = Mask(torch.zeros(1, 1, 1, 1))
    found = projected(model, SHAPE, nothing, torch.zeros(SHAPE), **settings)
    assert torch.equal(found, plain)
    y = BoxDown(2).apply(draw(*SHAPE))
    assert torch.equal(projected(model, SHAPE, BoxDown(2), y, weight=0, **settings), plain)


def test_everything_measured():
    y = draw(*SHAPE)
    found = projected(gaussian(), SHAPE, Mask(torch.ones(1, 1, 1, 1)), y, steps=5, sampler="ddpm")
    assert torch.equal(found, y)


def test_clipped_predictions_are_projected_within():
    operator = OPERATORS["mask"]()
    y = operator.apply(draw(*SHAPE).clamp(-0.5, 0.5))
    seen = []
    found = projected(
        gaussian(),
        SHAPE,
        operator,
        y,
        steps=5,
        clip=0.6,
        callback=lambda i, run: seen.append(run.x),
    )
    assert torch.equal(operator.apply(found), y) and found.abs().max() <= 0.6
    # The last step goes to its x0: without the final projection it is met to rounding too.
    assert torch.allclose(operator.apply(seen[-1]), y, atol=1e-5)


def test_an_addition_in_the_place_of_a_selection_would_be_seen():
    y, x = draw(4, 1000), 10 * draw(4, 1000, seed=2)
    assert not torch.equal(x + (y - x), y)
    assert torch.equal(Mask(torch.ones(1, 1)).project(x, y), y)


def test_batch_of_samples_is_each_alone():
    model, operator = gaussian(), BoxDown(2)
    y, seeds = operator.apply(draw(*SHAPE)), torch.tensor([5, 9])
    whole = projected(model, SHAPE, operator, y, seed=seeds, sampler="ddpm", steps=5)
    for b in range(2):
        s = slice(b, b + 1)
        alone = projected(
            model, (1, *SHAPE[1:]), operator, y[s], seed=seeds[s], sampler="ddpm", steps=5
        )
        assert torch.equal(whole[s], alone)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(weight=1.5), "weight is 1.5"),
        (dict(weight=[1.0]), "scale has 1 entries, need 5"),
        (dict(y=torch.zeros(1, 2, 2, 3)), r"y is \[1, 2, 2, 3\], need \[2, 2, 2, 3\]"),
        (dict(y=None), "y is NoneType"),
    ],
)
def test_bad_input(settings, words):
    y = settings.pop("y", torch.zeros(2, 2, 2, 3))
    with pytest.raises(ValueError, match=words):
        projected(gaussian(), SHAPE, BoxDown(2), y, steps=5, **settings)
