"""Steered Diffusion: the affine map of its loops, and what they are without steering."""

import math

import pytest
import torch
from torch import nn

from fastdiff import samplers
from fastdiff.cache import Broadcast, FirstBlock
from fastdiff.methods.guide import Guide
from fastdiff.methods.steered import steered
from fastdiff.models import DiT
from fastdiff.ops.fused_step import philox_normal
from fastdiff.samplers import DDIM, Run
from fastdiff.samplers.run import RENOISE_STREAM
from fastdiff.testing_gaussian import GaussianModel, affine

D, STEPS = 3, 6
SETTINGS = dict(sampler="ddim", steps=STEPS)


def gaussian(dtype=torch.float64):
    mean = torch.tensor([[0.5, -1.0, 2.0]], dtype=dtype)
    return GaussianModel(mean, torch.tensor([[0.5, 1.0, 0.2]], dtype=dtype))


H = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=torch.float64)
Y = torch.tensor([1.0, -0.5], dtype=torch.float64)
U = torch.tensor([0.3, 0.1, -0.7], dtype=torch.float64)


def square(x):
    return 0.5 * (x.double() @ H.T - Y).square().sum(1)


def line(x):
    return x.double() @ U


def reference(model, loops, k, through, settings=SETTINGS):
    """``(A, b, C)`` of ``x' = A x + b + sum_j C_j z_j`` of the whole run, in float64; the noise of
    renoising alone, or that of steps before it."""
    run = Run(model, (1, D), **settings)
    with torch.no_grad():
        steps = affine(run.table, run, model)
    mean, variance = model.mean[0].double(), model.variance[0].double()
    eye = torch.eye(D, dtype=torch.float64)
    a, b, c = eye, torch.zeros(D, dtype=torch.float64), []
    for i, (slope, offset, spread) in enumerate(steps):
        alpha, sigma = run.alpha[i], run.sigma[i]
        jacobian = alpha * variance / (alpha**2 * variance + sigma**2)
        x0_a, x0_b = torch.diag(jacobian), mean - jacobian * alpha * mean
        # grad of 0.5 |H x0 - y|^2 / 2 + 3 u x0, by x0, then by x_t
        g_a, g_b = 0.5 * H.T @ H @ x0_a, 0.5 * H.T @ (H @ x0_b - Y) + 3 * U
        if through == "model":
            g_a, g_b = jacobian[:, None] * g_a, jacobian * g_b
        step_a, step_b = torch.diag(slope[0]) - k * g_a, offset[0] - k * g_b
        scale = alpha / run.alpha[i + 1]
        up = (sigma**2 - (scale * run.sigma[i + 1]) ** 2).sqrt()
        for visit in range(loops):
            if visit:
                a, b, c = scale * a, scale * b, [scale * one for one in c] + [up * eye]
            a, b, c = step_a @ a, step_a @ b + step_b, [step_a @ one for one in c]
            if spread.abs().max() > 0:
                c.append(torch.diag(spread[0]))
    return a, b, c


TERMS = [(square, 0.5), (line, 3.0)]


@pytest.mark.parametrize("through", ["model", "x0"])
@pytest.mark.parametrize("loops", [1, 2, 4])
def test_affine_map(loops, through):
    """Basis vectors pushed through a run with the same noise give the reference matrix; a run from
    0 gives its offset, with the noise of every renoising. float32 rows: 1e-5 as the coefficients
    are of size 1."""
    model, k = gaussian(), 0.05
    start = torch.cat([torch.zeros(1, D), torch.eye(D)]).double()
    seeds = torch.full((D + 1,), 11)  # the same noise for all
    found = steered(
        model, start, TERMS, loops=loops, scale=k, through=through, seed=seeds, **SETTINGS
    )
    a, b, c = reference(model, loops, k, through)
    assert torch.allclose((found[1:] - found[0]).T, a, atol=1e-5)
    run = Run(model, start, seed=seeds, **SETTINGS)
    assert len(c) == STEPS * (loops - 1)
    for one in c:
        z = philox_normal((1, D), *run.noise(RENOISE_STREAM)._replace(
            seed=seeds[:1], slot=run.slots[:1]
        ))  # fmt: skip
        b = b + one @ z[0].double()
    assert torch.allclose(found[0], b, atol=1e-5)


@pytest.mark.parametrize("loops", [1, 3])
def test_law(loops):
    """Mean and covariance of samples with noisy steps, against their recursion."""
    settings = dict(sampler=DDIM(eta=1.0), steps=STEPS)
    model, n = gaussian(), 8000
    found = steered(model, (n, D), TERMS, loops=loops, scale=0.05, dtype=torch.float64, **settings)
    a, b, c = reference(model, loops, 0.05, "model", settings)
    cov = a @ a.T + sum(one @ one.T for one in c)
    error = found.mean(0) - b
    assert (error.abs() < 4 * (cov.diagonal() / n).sqrt()).all()
    spread = found.T.cov()
    bound = ((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / n).sqrt()
    assert ((spread - cov).abs() < 4 * bound).all()


def test_missing_renoise_would_be_seen():
    """Loops that go on without renoising have another map: the test of the map finds that."""
    model, k = gaussian(), 0.05
    a, _, _ = reference(model, 2, k, "model")
    run = Run(model, torch.cat([torch.zeros(1, D), torch.eye(D)]).double(), **SETTINGS)
    guide = Guide(lambda x: 0.5 * square(x) + 3 * line(x))
    with torch.no_grad():
        for i in range(STEPS):
            for _ in range(2):
                found = guide.gradient(run, i)
                run.x = run.step(i, found.m) - k * found.g
    assert (((run.x[1:] - run.x[0]).T) - a).abs().max() > 0.05


def plain_loop(model, x, scale, **settings):
    run = Run(model, x, **settings)
    guide = Guide(lambda x: 0.5 * square(x) + 3.0 * line(x))
    with torch.no_grad():
        run.start()
        for i in range(len(run)):
            found = guide.gradient(run, i)
            run.x = run.step(i, found.m) - scale * found.g
    return run.x


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpmpp_2m"])
def test_one_loop_is_plain_guidance(sampler):
    model = gaussian(torch.float32)
    x = torch.randn(4, D)
    found = steered(model, x, TERMS, loops=1, scale=0.1, sampler=sampler, steps=STEPS)
    assert torch.equal(found, plain_loop(model, x, 0.1, sampler=sampler, steps=STEPS))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpmpp_2m"])
def test_without_scale_it_is_sample(sampler):
    model = gaussian(torch.float32)
    found = steered(model, (4, D), square, scale=0.0, sampler=sampler, steps=STEPS, seed=5)
    assert torch.equal(found, samplers.sample(model, (4, D), sampler=sampler, steps=STEPS, seed=5))


def test_list_is_the_weighted_sum():
    model, x = gaussian(), torch.randn(4, D).double()
    run = dict(loops=2, scale=0.1, **SETTINGS)
    both = steered(model, x, TERMS, **run)
    one = steered(model, x, lambda x: 0.5 * square(x) + 3.0 * line(x), **run)
    assert torch.allclose(both, one, atol=1e-12)
    off = steered(model, x, [(square, 1.0), (line, 0.0)], **run)
    assert torch.allclose(off, steered(model, x, square, **run), atol=1e-12)


def test_loops_bring_the_energy_down():
    model, x = gaussian(), torch.randn(64, D).double()
    run = dict(scale=0.1, sampler="ddpm", steps=STEPS)
    often = [square(steered(model, x, square, loops=n, **run)).mean() for n in (1, 4)]
    assert often[1] < 0.8 * often[0]


@pytest.mark.parametrize("norm", [None, "l2"])
def test_batch_is_each_alone(norm):
    """A mixture, so that the model is not linear, on states that are not square."""
    torch.manual_seed(3)
    shape = (2, 3, 5)
    model = GaussianModel(torch.randn(2, *shape), torch.full((2, 1, 1, 1), 0.3), classes=True)
    x, seeds, classes = torch.randn(3, *shape), torch.tensor([4, 5, 6]), torch.tensor([0, 1, 2])

    def energy(x):
        return x.flatten(1).square().sum(1)

    def run(part, **more):
        return steered(
            model, x[part], energy, loops=2, scale=0.1, norm=norm, seed=seeds[part],
            classes=classes[part], guidance=2.0, steps=STEPS, **more,
        )  # fmt: skip

    alone = torch.cat([run(slice(b, b + 1)) for b in range(3)])
    assert torch.equal(run(slice(None)), alone)
    if norm:  # one norm for the batch would be seen
        assert (run(slice(None), scope="batch") - alone).abs().max() > 1e-3


def dit(channels):
    torch.manual_seed(0)
    model = DiT(8, 2, channels, hidden_size=16, depth=4, num_heads=2, num_classes=3)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 0.01])
def test_caches(loops, scale):
    """One that reuses nothing changes nothing; calls for a gradient are computed, whatever the
    cache; without one a level's first visit may reuse what the last level's kept."""
    model, x = dit(3), torch.randn(3, 3, 4, 6)

    def energy(x):
        return x.flatten(1).square().sum(1)

    run = dict(loops=loops, scale=scale, classes=torch.tensor([0, 1, 3]), guidance=2.0, **SETTINGS)
    plain = steered(model, x, energy, **run)
    assert torch.equal(steered(model, x, energy, cache=FirstBlock(0.0), **run), plain)
    cached = steered(model, x, energy, cache=Broadcast(3, 3, 3, 0, 1), **run)
    assert torch.equal(cached, plain) == (scale > 0)


def test_levels_that_are_visited():
    model, seen = gaussian(), []
    steered(
        model, (2, D), square, loops=3, scale=0.1, dtype=torch.float64,
        callback=lambda i, run: seen.append(list(run.visits)), **SETTINGS,
    )  # fmt: skip
    assert seen[-1] == [i for i in range(STEPS) for _ in range(3)]
    assert len(seen) == STEPS


def test_nan_stays_in_its_sample():
    model, x = gaussian(), torch.randn(3, D).double()

    def bad(x):
        return torch.where(torch.arange(len(x)) == 1, math.nan, 1.0) * square(x)

    run = dict(loops=2, scale=0.1, seed=torch.tensor([1, 2, 3]), **SETTINGS)
    found, good = steered(model, x, bad, **run), steered(model, x, square, **run)
    assert found[1].isnan().any()
    assert torch.equal(found[[0, 2]], good[[0, 2]])


def test_energy_that_raises_leaves_model_and_state_alone():
    model, x = gaussian(), torch.randn(3, D).double()
    before = x.clone()

    def bad(x):
        raise RuntimeError("no energy today")

    with pytest.raises(RuntimeError, match="no energy today"):
        steered(model, x, bad, **SETTINGS)
    assert torch.equal(x, before) and torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(loops=0), "loops is 0, need an integer of at least 1"),
        (dict(loops=True), "loops is True"),
        (dict(through="x"), "through is 'x'"),
        (dict(norm="l1"), "norm is 'l1'"),
        (dict(scale=[1.0, 2.0]), "scale has 2 entries, need 6"),
        (dict(loops=2, sampler="heun"), "sampler is 'heun' and loops is 2"),
        (dict(energies=[]), r"energies is \[\]"),
        (dict(energies=[(1.0, square)]), "energies is"),
        (dict(energies=lambda x: x.sum()), r"energy gives \[\], need a tensor \[2\]"),
    ],
)
def test_bad_input(settings, words):
    settings = {"energies": square, **SETTINGS, **settings}
    with pytest.raises(ValueError, match=words):
        steered(gaussian(), (2, D), dtype=torch.float64, **settings)
