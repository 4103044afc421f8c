"""What theory says of guidance and of the order of samplers, on Gaussian data."""

import math

import pytest
import torch

from fastdiff import samplers
from fastdiff.methods.linear_reward import linear_reward_guidance
from fastdiff.samplers import DDIM, Flow, Run
from fastdiff.samplers.schedule import Given
from fastdiff.testing_gaussian import GaussianModel

C = 3  # numbers of a sample


def two_gaussians():
    """Class 0 and the null class are one Gaussian each, so that guided scores are linear."""
    mean = torch.tensor([[1.0, -0.5, 2.0], [0.0, 0.3, -1.0]], dtype=torch.float64)
    variance = torch.tensor([[0.25, 0.5, 0.1], [1.0, 0.4, 2.0]], dtype=torch.float64)
    model = GaussianModel(mean, variance, classes=True)
    model.num_classes = 1  # the null class is the second component
    return model


def guided_eps(model, x, alpha, sigma, w):
    """(1 - w) eps_null + w eps_class."""
    eps = [
        sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        for mean, variance in zip(model.mean.detach(), model.variance.detach(), strict=True)
    ]
    return w * eps[0] + (1 - w) * eps[1]


def recursion_of_guidance(model, run, w, eta):
    """``(a, b, v)``: the whole run is ``x -> a x + b`` and noise of variance v, in float64."""
    a, b, v = torch.ones(C).double(), torch.zeros(C).double(), torch.zeros(C).double()
    for i in range(len(run)):
        (alpha, sigma), (alpha_s, sigma_s) = (
            (run.alpha[j], run.sigma[j]) for j in (i, i + 1)
        )  # fmt: skip
        jump = sigma**2 - (alpha / alpha_s) ** 2 * sigma_s**2
        noise = eta**2 * sigma_s**2 / sigma**2 * jump

        def step(x, alpha=alpha, sigma=sigma, alpha_s=alpha_s, rest=sigma_s**2 - noise):
            eps = guided_eps(model, x, alpha, sigma, w)
            return alpha_s * (x - sigma * eps) / alpha + rest.clamp(min=0).sqrt() * eps

        offset = step(torch.zeros(C).double())
        slope = step(torch.ones(C).double()) - offset
        a, b, v = slope * a, slope * b + offset, slope**2 * v + noise
    return a, b, v


SCALES = [-1.0, 0.0, 0.5, 1.0, 3.0, 7.5]


def guided(x, w, **settings):
    model, classes = two_gaussians(), torch.zeros(len(x), dtype=torch.int64)
    return samplers.sample(model, x, classes=classes, guidance=w, **settings)


@pytest.mark.parametrize("w", SCALES)
def test_guidance_of_gaussians_is_an_affine_recursion(w):
    """DDIM of 20 steps; at the float32 of its rows, relative to the largest slope on the way."""
    x = torch.tensor([[0.0], [1.0]]).expand(2, C).double()
    found = guided(x, w, steps=20)
    model = two_gaussians()
    a, b, _ = recursion_of_guidance(model, Run(model, x, steps=20), w, 0.0)
    assert torch.allclose(found[0], b, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found[1] - found[0], a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_law_of_guided_ancestral_sampling(w):
    n, eta = 4000, 1.0
    x = torch.randn(n, C).double()
    found = guided(x, w, sampler=DDIM(eta=eta), steps=20)
    model = two_gaussians()
    a, b, v = recursion_of_guidance(model, Run(model, x, steps=20), w, eta)
    variance = a**2 + v
    assert ((found.mean(0) - b).abs() < 4 * (variance / n).sqrt()).all()
    assert ((found.var(0) - variance).abs() < 4 * variance * math.sqrt(2 / n)).all()


def test_swapped_branches_would_be_seen():
    model = two_gaussians()
    run = Run(model, (1, C), steps=20)
    right, wrong = (recursion_of_guidance(model, run, w, 0.0)[1] for w in (3.0, -2.0))
    assert (right - wrong).abs().max() > 1


def test_guidance_overshoots_its_tilted_law():
    r"""With N(0, 1) and N(1, 1/4) and w = 3 the tilted law p_c^3 p^-2 is N(1.2, 0.1), but the limit
    of many guided steps is N(1.5, 1/64). In u = x / alpha and rho = sigma / alpha

        du/drho = rho (w (u - m) / (S + rho^2) + (1 - w) u / (1 + rho^2)),

    whose solution has at 0 the variance S^w and the mean
    w m / 2 S^(w/2) int_0^inf (S + q)^(-1 - w/2) (1 + q)^((w - 1) / 2) dq = 3/2 * 1/8 * 8.
    """
    mean = torch.tensor([[1.0], [0.0]]).double()
    model = GaussianModel(mean, torch.tensor([[0.25], [1.0]]).double(), classes=True)
    model.num_classes = 1
    x = torch.tensor([[0.0], [1.0]]).double()
    run = dict(classes=torch.zeros(2, dtype=torch.int64), guidance=3.0, steps=1000)
    found = samplers.sample(model, x, **run).flatten()
    mean, spread = float(found[0]), float(found[1] - found[0])
    assert abs(mean - 1.5) < 0.02 and abs(mean - 1.2) > 0.25
    assert abs(spread**2 - 1 / 64) < 1e-3 and abs(spread**2 - 0.1) > 0.05


def test_equal_variances_do_not_overshoot():
    """Then the guided score is that of N(w m, S), which the tilted law is."""
    model = GaussianModel(
        torch.tensor([[1.0], [0.0]]).double(), torch.full((2, 1), 0.5).double(), classes=True
    )
    model.num_classes = 1
    x = torch.tensor([[0.0], [1.0]]).double()
    run = dict(classes=torch.zeros(2, dtype=torch.int64), guidance=3.0, steps=1000)
    found = samplers.sample(model, x, **run).flatten()
    assert abs(found[0] - 3.0) < 0.03 and abs((found[1] - found[0]) ** 2 - 0.5) < 0.02


MEAN, VARIANCE = 0.7, 0.3


def flow_model():
    one = torch.ones(1, 1).double()
    return GaussianModel(MEAN * one, VARIANCE * one, schedule=Flow(), prediction="flow")


def wasserstein(sampler, steps, forget=False):
    """W2 between the law that a sampler reaches from the true one at its noisiest level, and the
    true law at its last noisy level: both Gaussian. The step to the clean end is left out: its
    error is of the last level, which is the same for all."""
    ratios = torch.logspace(math.log10(10), math.log10(0.05), steps + 1, dtype=torch.float64)
    model = flow_model()
    x = torch.tensor([[0.0], [1.0]]).double()
    run = Run(model, x, sampler=sampler, steps=steps + 1, schedule=Given(ratios, Flow()))
    with torch.no_grad():
        run.start()
        for i in range(len(run) - 1):
            m = run.predict(i)
            if forget and run.history:  # a multistep method without its memory
                run.history = [run.x0(i, run.combined(m))]
            run.step(i, m)
    offset, slope = float(run.x[0, 0]), float(run.x[1, 0] - run.x[0, 0])

    def law(i):
        alpha, sigma = float(run.alpha[i]), float(run.sigma[i])
        return alpha * MEAN, math.sqrt(alpha**2 * VARIANCE + sigma**2)

    (m, s), (to_m, to_s) = law(0), law(len(run) - 1)
    return math.hypot(slope * m + offset - to_m, slope * s - to_s)


def slope(sampler, **more):
    """By what power of the steps the error falls, between 32 and 128 of them."""
    errors = [wasserstein(sampler, n, **more) for n in (32, 128)]
    return math.log(errors[0] / errors[1], 4)


@pytest.mark.parametrize(
    "sampler, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)]
)
def test_order(sampler, order):
    assert abs(slope(sampler) - order) < 0.15


def test_second_order_without_its_memory_would_be_seen():
    assert abs(slope("dpmpp_2m", forget=True) - 1) < 0.15


G = torch.tensor([1.0, -2.0, 0.5]).double()
Y, NOISE = 2.0, 0.4


def one_gaussian(prediction="eps"):
    mean = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    return GaussianModel(mean, torch.tensor([[0.5, 1.0, 0.2]]).double(), prediction=prediction)


def posterior(model, y=Y):
    """Mean and covariance of ``x0 | y``."""
    mean, cov = model.mean[0].double().detach(), torch.diag(model.variance[0].double().detach())
    gain = cov @ G / (G @ cov @ G + NOISE**2)
    return mean + gain * (y - G @ mean), cov - torch.outer(gain, G @ cov)


def conditional_map(model, run, y=Y):
    """``(A, b)`` of DDIM with the exact score of ``x0 | y``, in float64."""
    mean, cov = posterior(model, y)
    eye = torch.eye(C, dtype=torch.float64)
    a, b = eye, torch.zeros(C).double()
    for i in range(len(run)):
        alpha, sigma = run.alpha[i], run.sigma[i]
        precision = sigma * torch.linalg.inv(alpha**2 * cov + sigma**2 * eye)  # eps = P (x - a m)
        ratio = run.alpha[i + 1] / alpha
        pull = run.sigma[i + 1] - ratio * sigma
        step = ratio * eye + pull * precision
        a, b = step @ a, step @ b - pull * precision @ (alpha * mean)
    return a, b


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_linear_reward_is_the_conditional_sampler(prediction):
    """The map of a whole guided run is that of the exact conditional score; float32 rows."""
    model = one_gaussian(prediction)
    x = torch.cat([torch.zeros(1, C), torch.eye(C)]).double()
    found = linear_reward_guidance(model, x, G, Y, noise=NOISE, steps=20)
    a, b = conditional_map(model, Run(model, x, steps=20))
    assert torch.allclose((found[1:] - found[0]).T, a, atol=2e-5)
    assert torch.allclose(found[0], b, atol=1e-4)


def test_linear_reward_reaches_the_conditional_law():
    model, n = one_gaussian(), 4000
    targets = torch.tensor([2.0, -1.0]).double().repeat_interleave(n)
    x = torch.randn(2 * n, C).double()
    found = linear_reward_guidance(model, x, G, targets, noise=NOISE, sampler="euler", steps=200)
    for part, y in zip(found.split(n), (2.0, -1.0), strict=True):
        mean, cov = posterior(model, y)
        assert ((part.mean(0) - mean).abs() < 4 * (cov.diagonal() / n).sqrt() + 0.02).all()
        assert ((part.T.cov() - cov).abs() < 0.05).all()


def test_reward_without_the_covariance_would_be_seen():
    """beta = 1 / noise^2 at all levels, as if x0 were known: too strong."""
    model = one_gaussian()
    x = torch.zeros(1, C).double()
    run = Run(model, x, steps=20)
    _, b = conditional_map(model, run)
    for i in range(len(run)):
        at = run.x.detach().requires_grad_()
        m = run.predict(i, at)
        reward = (G * run.x0(i, m[0], at)).sum(1)
        (along,) = torch.autograd.grad(reward.sum(), at)
        push = (Y - reward.detach()) / NOISE**2
        with torch.no_grad():
            run.step(i, run.shifted(i, m.detach(), eps=-run.sigma[i] * push[:, None] * along))
    assert not (run.x[0] - b).abs().max() < 0.1


def test_linear_reward_from_pure_noise():
    """A flow begins at alpha 0, where the state says nothing of x0."""

    def model(x, t, y):
        s = (t.double() / 1000)[:, None]
        eps = s * (x - (1 - s) * MEAN) / ((1 - s) ** 2 * VARIANCE + s**2)
        gain = (1 - s) * VARIANCE / ((1 - s) ** 2 * VARIANCE + s**2)
        return eps - (MEAN + gain * (x - (1 - s) * MEAN))

    x, run = torch.randn(1000, 1).double(), dict(noise=0.5, steps=100, prediction="flow")
    found = linear_reward_guidance(model, x, torch.ones(1), 1.5, **run)
    gain = VARIANCE / (VARIANCE + 0.25)
    assert abs(found.mean() - (MEAN + gain * (1.5 - MEAN))) < 0.06


def test_linear_reward_of_huge_noise_is_sample():
    model, x = one_gaussian(), torch.randn(4, C).double()
    found = linear_reward_guidance(model, x, G, Y, noise=1e9, steps=10)
    assert torch.allclose(found, samplers.sample(model, x, steps=10), atol=1e-12)


def test_linear_reward_of_a_batch_is_each_alone():
    torch.manual_seed(3)
    shape = (2, 3, 5)
    model = GaussianModel(torch.randn(2, *shape), torch.full((2, 1, 1, 1), 0.3), classes=True)
    x, seeds, classes = torch.randn(3, *shape), torch.tensor([4, 5, 6]), torch.tensor([0, 1, 2])
    g, y = torch.randn(shape), torch.tensor([1.0, -1.0, 0.5])

    def run(part):
        return linear_reward_guidance(
            model, x[part], g, y[part], noise=0.5, seed=seeds[part], classes=classes[part],
            guidance=2.0, sampler="ddpm", steps=6,
        )  # fmt: skip

    alone = torch.cat([run(slice(b, b + 1)) for b in range(3)])
    assert torch.equal(run(slice(None)), alone)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(noise=0.0), "noise is 0.0, need a number above 0"),
        (dict(direction=torch.ones(2)), r"direction is \[2\], need \[3\]"),
        (dict(target=torch.ones(3)), r"target is \[3\], need a number or \[2\]"),
    ],
)
def test_bad_input_of_linear_reward(settings, words):
    settings = {"direction": G, "target": Y, "noise": NOISE, **settings}
    with pytest.raises(ValueError, match=words):
        linear_reward_guidance(one_gaussian(), torch.randn(2, C).double(), **settings)
