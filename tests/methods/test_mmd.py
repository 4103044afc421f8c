"""MMD fine-tuning: the gradient of a whole sampler, and the distance that it lowers."""

import math

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import samplers
from fastdiff.cache import Forecast
from fastdiff.dispatch import record
from fastdiff.methods import density, pso
from fastdiff.methods.mmd import kernel, mmd, mmd_loss, rollout
from fastdiff.models.dit import DiT
from fastdiff.samplers import DDIM, Run
from fastdiff.testing_gaussian import GaussianModel, affine

SETTINGS = dict(sampler=DDIM(eta=0.5), steps=6)


def gaussian(mean=0.7, **more):
    return GaussianModel(
        torch.full((1, 3, 1, 1), mean).double(), torch.full((1, 3, 1, 1), 0.5).double(), **more
    )


class Small(nn.Module):
    prediction = "v"

    def __init__(self, dropout=0.0):
        super().__init__()
        self.mix, self.drop, self.calls = nn.Linear(3, 3), nn.Dropout(dropout), 0

    def forward(self, x, t, y=None):
        self.calls += 1
        return self.drop(torch.tanh(self.mix(x.movedim(1, -1))).movedim(-1, 1))


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(eta=1.0), "dpmpp_2m", "heun", "ddpm"])
def test_forward_is_plain_sampling(sampler):
    model = gaussian()
    found = rollout(model, (3, 3, 2, 5), sampler=sampler, steps=5, seed=2)
    plain = samplers.sample(model, (3, 3, 2, 5), sampler=sampler, steps=5, seed=2)
    assert found.requires_grad
    # Rows with a backward and kernels agree to roundings; without gradients it is the same loop.
    assert torch.allclose(found, plain, atol=1e-5)
    with torch.no_grad():
        off = rollout(model, (3, 3, 2, 5), sampler=sampler, steps=5, seed=2)
    assert torch.equal(off, plain)


def test_steps_take_rows_that_have_a_backward():
    model = gaussian().float()
    with record() as rows:
        rollout(model, (2, 3, 2, 5), **SETTINGS)
    assert {row for op, row in rows if op == "fused_step"} == {"ref"}
    with pytest.raises(fastdiff.NoImpl, match="no backward"), fastdiff.use("native"):
        rollout(model, (2, 3, 2, 5), **SETTINGS)


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_gradient_is_the_closed_form(eta, checkpoint):
    """A step is x' = A x + b + s z with b linear in the mean: d x0 / d mean = sum of products of
    A_j times d b_i / d mean, the same for all samples; d x0 / d x_T = product of all A."""
    settings = dict(sampler=DDIM(eta=eta), steps=6)
    model = gaussian()
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    found = rollout(model, x, checkpoint=checkpoint, **settings)
    weight = torch.randn(found.shape, dtype=torch.float64)
    by_mean, by_x = torch.autograd.grad((weight * found).sum(), (model.mean, x))
    with torch.no_grad():
        steps = affine(Run(model, x.detach(), **settings).table, Run(model, x, **settings), model)
        total, slope = torch.ones(1, 3, 1, 1).double(), torch.zeros(1, 3, 1, 1).double()
        for a, b, _ in steps:
            slope = a * slope + b / model.mean  # b is proportional to the mean
            total = a * total
    assert torch.allclose(by_x, weight * total, atol=1e-10)
    assert torch.allclose(by_mean, slope * weight.sum((0, 2, 3), keepdim=True), rtol=1e-9)


def test_gradient_is_that_of_finite_differences():
    model, x = Small().double(), torch.randn(2, 3, 2, 5).double()

    def value():
        return rollout(model, x, **SETTINGS).square().sum()

    (g,) = torch.autograd.grad(value(), model.mix.weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            model.mix.weight[1, 2] += sign * 1e-5
            values.append(value())
            model.mix.weight[1, 2] -= sign * 1e-5
    assert torch.allclose(g[1, 2], (values[0] - values[1]) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_change_nothing_but_the_calls(dropout):
    model, x = Small(dropout), torch.randn(2, 3, 2, 5)
    found = []
    for checkpoint in (True, False):
        torch.manual_seed(3)
        model.zero_grad()
        model.calls = 0
        out = rollout(model, x, checkpoint=checkpoint, **SETTINGS)
        out.square().sum().backward()
        found.append((out.detach(), model.mix.weight.grad.clone(), model.calls))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert (found[0][2], found[1][2]) == (12, 6)


def test_a_gradient_that_stops_between_steps_would_be_seen():
    """A state detached at every step: the last step's gradient alone."""
    model, x = gaussian(), torch.randn(2, 3, 2, 5).double()
    (whole,) = torch.autograd.grad(rollout(model, x, **SETTINGS).sum(), model.mean)
    run = Run(model, x, **SETTINGS)
    for i in range(len(run)):
        run.x = run.x.detach()
        run.step(i, run.predict(i))
    (last,) = torch.autograd.grad(run.x.sum(), model.mean)
    assert not torch.allclose(whole, last, rtol=0.05)


def analytic(d, v, w, shift, twice):
    """MMD^2 of N(0, v I) and N(shift, w I) in d dimensions under exp(-|x - y|^2 / twice)."""

    def mean(total, away):
        return (1 + 2 * total / twice) ** (-d / 2) * math.exp(-away / (twice + 2 * total))

    return mean(2 * v, 0) + mean(2 * w, 0) - 2 * mean(v + w, d * shift**2)


def test_rbf_of_gaussians():
    """Against the closed form, and 0 for equal laws, within 4 standard errors of 30 sets."""
    d, n = 3, 150
    for shift, target in ((0.8, analytic(d, 1.0, 0.5, 0.8, d)), (0.0, 0.0)):
        found = []
        for _ in range(30):
            x = torch.randn(n, d, dtype=torch.float64)
            y = torch.randn(n, d, dtype=torch.float64)
            found.append(mmd(x, y * math.sqrt(0.5) + shift if shift else y))
        found = torch.stack(found)
        assert abs(found.mean() - target) < 4 * found.std() / math.sqrt(30), (found.mean(), target)
        if not shift:
            assert (found < 0).any()  # unbiased, and not clamped
            biased = found + 2 * (1 - kernel(x, y).mean()) / n  # with i = j: would be seen
            assert abs(biased.mean()) > 4 * biased.std() / math.sqrt(30)


@pytest.mark.parametrize("kind", ["rbf", "poly"])
@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_are_the_whole(kind, block):
    x = torch.randn(23, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(19, 5, dtype=torch.float64) + 1
    whole, parts = mmd(x, y, kind=kind), mmd(x, y, kind=kind, block=block)
    assert torch.allclose(whole, parts, rtol=1e-13, atol=1e-15)
    (g,), (h,) = (torch.autograd.grad(v, x) for v in (whole, parts))
    assert torch.allclose(g, h, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["rbf", "poly"])
def test_mmd_written_out_and_its_gradient(kind):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def k(a, b):
        if kind == "poly":
            return float((a @ b / 3 + 1).detach() ** 3)
        return math.exp(-float((a - b).detach().square().sum()) / 3)

    target = sum(k(x[i], x[j]) for i in range(4) for j in range(4) if i != j) / 12
    target += sum(k(y[i], y[j]) for i in range(6) for j in range(6) if i != j) / 30
    target -= 2 * sum(k(a, b) for a in x for b in y) / 24
    assert float(mmd(x, y, kind=kind).detach()) == pytest.approx(target, abs=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: mmd(a, b, kind=kind, bandwidth=0.9), (x, y))


def test_updates_lower_the_distance():
    """A Gaussian model with a wrong mean finds that of the data."""
    model = gaussian(mean=-0.5)
    data = 1.0 + math.sqrt(0.5) * torch.randn(64, 3, 1, 2, dtype=torch.float64)
    optimizer = torch.optim.Adam([model.mean], lr=0.1)
    losses = []
    for step in range(25):
        optimizer.zero_grad()
        loss = mmd_loss(
            model, (64, 3, 1, 2), data, seed=step, dtype=torch.float64, kind="poly", **SETTINGS
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert (model.mean - 1.0).abs().max() < 0.4


def test_features_and_guidance():
    model = GaussianModel(torch.tensor([[1.0], [-1.0]]), torch.full((2, 1), 0.5), classes=True)
    y = torch.tensor([0, 1, 0])
    loss = mmd_loss(
        model, (3, 1), torch.randn(5, 1), lambda z: torch.cat((z, z**2), 1),
        classes=y, guidance=2.0, **SETTINGS,
    )  # fmt: skip
    loss.backward()
    assert torch.isfinite(model.mean.grad).all() and model.mean.grad.abs().min() > 0


@pytest.mark.parametrize(
    "arguments, settings, words",
    [
        ((torch.zeros(1, 2), torch.zeros(3, 2)), {}, r"x is torch.float32 \[1, 2\]"),
        ((torch.zeros(3, 2), torch.zeros(3, 4)), {}, "y has 4 features, need 2"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), dict(kind="laplace"), "kernel is 'laplace'"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), dict(bandwidth=0.0), "bandwidth is 0.0"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), dict(block=0), "block is 0"),
    ],
)
def test_bad_input(arguments, settings, words):
    with pytest.raises(ValueError, match=words):
        mmd(*arguments, **settings)


@pytest.mark.parametrize(
    "call, who",
    [
        (lambda model, x: rollout(model, x), "mmd"),
        (lambda model, x: pso.record(model, x, sampler="ddpm"), "pso"),
        (lambda model, x: density.log_density(model, x, probes=1), "density"),
    ],
)
def test_caches_are_refused(call, who):
    """What trains or measures a network asks the network itself."""
    model = DiT(
        input_size=4, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2,
        num_classes=3, learn_sigma=False, prediction="eps",
    )  # fmt: skip
    fastdiff.accelerate(model, cache=Forecast(interval=2))
    with pytest.raises(ValueError, match=f"{who}: model has caches, .*; need it without"):
        call(model, torch.randn(2, 1, 4, 4))
