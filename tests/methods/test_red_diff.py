"""RED-Diff: where it comes to rest, and that its calls know nothing of each other."""

import math

import pytest
import torch

import fastdiff
from fastdiff.methods.latent_adam import Adam
from fastdiff.methods.operators import BoxDown, Mask, Matrix
from fastdiff.methods.red_diff import WEIGHTS, red_diff
from fastdiff.models import DiT
from fastdiff.samplers import DDIM, VP, Run, alphas_cumprod
from fastdiff.testing import draw_weights, unchanged
from fastdiff.testing_gaussian import GaussianModel

SHAPE = (2, 2, 4, 6)
# Its alpha is 0.35 at the noisy end: the weight sigma / alpha stays small, and so do the roundings
# of eps_hat - eps that it multiplies.
SCHEDULE = VP(alphas_cumprod(low=1e-4, high=4e-3))
SETTINGS = dict(sampler=DDIM(), steps=12, schedule=SCHEDULE)
FEW = SETTINGS | dict(steps=4)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian(prediction="eps", **kwargs):
    mean, variance = draw(1, *SHAPE[1:], seed=2), 0.2 + draw(1, *SHAPE[1:], seed=3).square()
    return GaussianModel(mean, variance, schedule=SCHEDULE, prediction=prediction, **kwargs)


def mask():
    return (draw(SHAPE[0], 1, *SHAPE[2:], seed=4) > 0).float()


OPERATORS = {
    "mask": lambda: Mask(mask()),
    "box": lambda: BoxDown(2),
    "matrix": lambda: Matrix(0.12 * draw(7, math.prod(SHAPE[1:]), seed=5), SHAPE[1:]),
}


def matrix_of(operator):
    """Of every sample: ``[B, M, N]`` in float64, column by column."""
    n = math.prod(SHAPE[1:])
    columns = []
    for j in range(n):
        unit = torch.zeros(SHAPE[0], n)
        unit[:, j] = 1
        columns.append(operator.apply(unit.view(SHAPE)).flatten(1))
    return torch.stack(columns, 2).double()


def stationary(model, operator, y, lam):
    """The closed form of the module's docstring, by a linear solve in float64."""
    run = Run(model, SHAPE, **FEW)
    alpha, sigma = (v[:-1].view(-1, 1) for v in (run.alpha, run.sigma))
    mean, variance = (v.double().flatten() for v in (model.mean, model.variance))
    pull = lam * (sigma**2 / (alpha**2 * variance + sigma**2)).mean(0)
    found = []
    for h, one in zip(matrix_of(operator), y.flatten(1).double(), strict=True):
        left = h.T @ h + torch.diag(pull)
        found.append(torch.linalg.solve(left, h.T @ one + pull * mean))
    return torch.stack(found).view(SHAPE)


FIT = dict(at=[range(4)] * 80, lam=1.0, betas=None, lr=1.0, antithetic=True, **FEW)


@pytest.mark.parametrize(
    "name, prediction", [("mask", "eps"), ("matrix", "eps"), ("box", "v"), ("box", "x0")]
)
@torch.no_grad()
def test_rests_where_the_closed_form_says(name, prediction):
    """All levels in every update and pairs of noise leave no randomness, and gradient descent
    contracts by 0.8 an update: what is left of the tolerance is float32."""
    operator, model = OPERATORS[name](), gaussian(prediction)
    y = operator.apply(draw(*SHAPE, seed=6))
    found = red_diff(model, SHAPE, operator, y, **FIT)
    want = stationary(model, operator, y, 1.0)
    assert (found - want).abs().max() < 1e-6


@torch.no_grad()
def test_adam_comes_near_the_same_point():
    """From noise of one level each: with a falling rate within the noise of its last updates."""
    operator, model = OPERATORS["mask"](), gaussian()
    y = operator.apply(draw(*SHAPE, seed=6))
    found = red_diff(
        model, SHAPE, operator, y, at=[[k % 4] for k in range(800)], lam=1.0,
        lr=lambda k: 0.1 * 0.995**k, **FEW,
    )  # fmt: skip
    want, start = stationary(model, operator, y, 1.0), operator.pinv(y)
    assert (found - want).norm() < 0.1 * (start - want).norm()


@torch.no_grad()
def test_a_gradient_through_the_model_or_another_weight_would_be_seen():
    """The point moves by far more than the tolerance where the weight is another one, and where the
    gradient went through the network: of the squared error 1/2 |eps_hat - eps|^2 for one."""
    operator, model = OPERATORS["mask"](), gaussian()
    y = operator.apply(draw(*SHAPE, seed=6))
    want = stationary(model, operator, y, 1.0)
    for weight in ("const", "square"):
        found = red_diff(model, SHAPE, operator, y, weight=weight, **FIT | dict(lr=0.3))
        assert (found - want).abs().max() > 1e-3
    run = Run(model, SHAPE, **FEW)
    alpha, sigma = (v[:-1].view(-1, 1, 1, 1, 1) for v in (run.alpha, run.sigma))
    slope = alpha * sigma / (alpha**2 * model.variance.double() + sigma**2)  # d eps_hat / d mu
    pull = (slope**2).mean(0)
    on = mask().double()
    through = (on * y + pull * model.mean) / (on + pull)
    assert (through - want).abs().max() > 1e-3


@torch.no_grad()
def test_default_is_one_level_an_update_from_the_noisiest():
    model, operator = gaussian(), OPERATORS["box"]()
    y = operator.apply(draw(*SHAPE, seed=6))
    seen = []
    found = red_diff(
        model, SHAPE, operator, y, callback=lambda k, run: seen.append(run.x), **SETTINGS
    )
    times = torch.stack(model.calls)
    assert times.shape == (12, 2) and (times[1:] < times[:-1]).all()
    assert torch.equal(seen[-1], found) and len(seen) == 12
    start = draw(*SHAPE, seed=7)
    with unchanged(start, y):
        other = red_diff(model, start, operator, y, **SETTINGS)
    assert not torch.equal(other, found)
    again = red_diff(model, operator.pinv(y), operator, y, **SETTINGS)
    assert torch.equal(again, found)  # from H^+ y


@torch.no_grad()
def test_adam_is_torch_s():
    theta, g = draw(3, 5).double(), [draw(3, 5, seed=s).double() for s in range(4)]
    leaf = torch.nn.Parameter(theta.clone())
    theirs, ours = torch.optim.Adam([leaf], lr=0.1, betas=(0.9, 0.99)), Adam(theta, (0.9, 0.99))
    for one in g:
        leaf.grad = one
        theirs.step()
        theta = ours.step(theta, one, 0.1)
    assert torch.allclose(theta, leaf, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_batch_of_samples_is_each_alone():
    model, operator = gaussian(classes=True), BoxDown(2)
    y, seeds = operator.apply(draw(*SHAPE, seed=6)), torch.tensor([5, 9])
    classes = torch.tensor([0, 1])
    run = dict(guidance=2.0, **SETTINGS)
    whole = red_diff(model, SHAPE, operator, y, seed=seeds, classes=classes, **run)
    for b in range(2):
        s = slice(b, b + 1)
        alone = red_diff(
            model, (1, *SHAPE[1:]), operator, y[s], seed=seeds[s], classes=classes[s], **run
        )
        assert torch.equal(whole[s], alone)


@torch.no_grad()
def test_caches_are_off():
    model = draw_weights(
        DiT(input_size=8, hidden_size=32, depth=4, num_heads=2, in_channels=2, num_classes=3)
    ).eval()
    operator, y = BoxDown(2), draw(2, 2, 4, 4)
    plain = red_diff(model, (2, 2, 8, 8), operator, y, steps=10)
    cached = red_diff(model, (2, 2, 8, 8), operator, y, steps=10, cache=fastdiff.cache.DeepCache(3))
    # To rounding: an accelerated network may take other kernels. A reused block is off by far more.
    assert torch.allclose(plain, cached, atol=1e-5)
    off = fastdiff.sample(model, (2, 2, 8, 8), steps=10, cache=fastdiff.cache.DeepCache(3))
    assert not torch.allclose(fastdiff.sample(model, (2, 2, 8, 8), steps=10), off, atol=1e-4)


@pytest.mark.parametrize("on", [0.0, 1.0], ids=["nothing", "everything"])
@torch.no_grad()
def test_masks_all_off_and_all_on(on):
    """Nothing observed: the prior's mean. Everything, and no prior: the measurement, at once."""
    model, operator = gaussian(), Mask(torch.full((1, 1, 1, 1), on))
    y = operator.apply(draw(*SHAPE, seed=6))
    found = red_diff(model, SHAPE, operator, y, **FIT | dict(lam=1 - on))
    want = y if on else model.mean.expand(SHAPE)
    assert torch.equal(found, y) if on else torch.allclose(found, want, atol=1e-6)


@torch.no_grad()
def test_nan_stays_in_its_sample():
    operator = BoxDown(2)
    y = operator.apply(draw(*SHAPE, seed=6))
    good = red_diff(gaussian(), SHAPE, operator, y, **SETTINGS)
    y[0] = math.nan
    found = red_diff(gaussian(), SHAPE, operator, y, **SETTINGS)
    assert found[0].isnan().all() and torch.equal(found[1], good[1])


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_adjoint_and_inverse(name):
    operator = OPERATORS[name]()
    x = draw(*SHAPE)
    y = operator.apply(x)
    u = draw(*y.shape, seed=8)
    if name == "mask":
        u = operator.apply(u)
    left, right = (y * u).flatten(1).sum(1), (x * operator.adjoint(u)).flatten(1).sum(1)
    assert torch.allclose(left, right, atol=1e-5)
    assert torch.allclose(operator.apply(operator.pinv(u)), u, atol=1e-5)
    # The smallest: its projection on what H does not see is 0.
    assert torch.allclose(
        operator.pinv(operator.apply(operator.pinv(u))), operator.pinv(u), atol=1e-5
    )
    near = operator.project(x, u)
    assert torch.allclose(operator.apply(near), u, atol=1e-5)
    away = x - operator.pinv(y)
    assert torch.allclose(near - operator.pinv(u), away, atol=1e-5)


def test_weights_are_the_papers():
    r = torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    found = {name: [round(float(v), 6) for v in w(r)] for name, w in WEIGHTS.items()}
    assert found == {
        "linear": [0.1, 1.0, 9.0],
        "sqrt": [0.316228, 1.0, 3.0],
        "square": [0.01, 1.0, 81.0],
        "log": [0.09531, 0.693147, 2.302585],
        "trunc": [0.1, 1.0, 1.0],
        "const": [1.0, 1.0, 1.0],
    }


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(weight="cubic"), "weight is 'cubic'"),
        (dict(at=[[12]]), r"at is \[\[12\]\], need for every update levels 0 to 11"),
        (dict(at=[[]]), "at is"),
        (dict(lr=[0.1]), "scale has 1 entries, need 12"),
        (dict(betas=(1.0, 0.9)), "betas is"),
        (dict(y=torch.zeros(2, 2, 2, 2)), r"y is \[2, 2, 2, 2\], need \[2, 2, 2, 3\]"),
        (dict(operator=BoxDown(5)), r"factor is 5, x is \[2, 2, 4, 6\]"),
    ],
)
def test_bad_input(settings, words):
    operator = settings.pop("operator", BoxDown(2))
    y = settings.pop("y", torch.zeros(2, 2, 2, 3))
    with pytest.raises(ValueError, match=words):
        red_diff(gaussian(), SHAPE, operator, y, **SETTINGS, **settings)


def test_bad_operators():
    with pytest.raises(ValueError, match="other than 0 and 1"):
        Mask(torch.full((1, 1), 0.5))
    with pytest.raises(ValueError, match="factor is 0"):
        BoxDown(0)
    with pytest.raises(ValueError, match=r"a is \[2, 3\], need \[M, 4\]"):
        Matrix(torch.zeros(2, 3), (1, 4))
