"""Gaussian data, whose score is known: orders of convergence, and the law of stochastic samplers.

A stochastic sampler on Gaussian data is an affine recursion, so its exact output law at a finite
number of steps is known; that is what is compared, not the law of the data.
"""

import math

import pytest
import torch

import fastdiff
from fastdiff.ops import philox_normal
from fastdiff.ops.fused_step import COLUMNS
from fastdiff.samplers import DDIM, EDM, VP, DPMpp2M, Euler, Flow, Given, Heun, karras_sigmas

MEAN, STD = 0.7, 0.4
X = torch.linspace(-2, 2, 41, dtype=torch.float64).view(1, 1, 1, 41)


def gaussian(kind, alpha, sigma):
    """Posterior means of x0 and eps given x, for data N(MEAN, STD^2); ``kind`` of prediction."""

    def model(x):
        w = (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        eps, x0 = sigma * w, MEAN + alpha * STD**2 * w
        if kind == "edm":  # (x0 - c_skip x_ve) / c_out, see to_x0
            return (x0 - (1 - sigma**2) / alpha * x) / (sigma * (1 - sigma**2).sqrt() / alpha)
        return {"eps": eps, "x0": x0, "flow": eps - x0, "v": alpha * eps - sigma * x0}[kind]

    return model


def knows_its_level(schedule, kind):
    """A model that recovers its level from t, by inverting ``schedule.at`` on a fine grid."""
    logs = torch.linspace(-7, 7, 200_001, dtype=torch.float64)
    _, _, t = schedule.at(logs.exp())

    def model(x, time, y):
        now = time[0].double()
        i = torch.searchsorted(t, now).clamp(1, len(t) - 1)
        share = ((now - t[i - 1]) / (t[i] - t[i - 1])).clamp(0, 1)
        alpha, sigma, _ = schedule.at((logs[i - 1] + share * (logs[i] - logs[i - 1])).exp())
        return gaussian(kind, alpha, sigma)(x)

    return model


def ode_end(x, alpha, sigma):
    """Where the probability-flow ODE takes x from a level to the clean end."""
    return MEAN + STD * (x - alpha * MEAN) / math.sqrt((alpha * STD) ** 2 + sigma**2)


def error(sampler, schedule, kind, steps, high=20.0):
    """Largest error against the ODE, over levels uniform in ln(sigma / alpha) down to 0.002."""
    ratios = torch.logspace(math.log10(high), math.log10(0.002), steps, dtype=torch.float64)
    given = Given(ratios, schedule)
    table = sampler.table(given, steps, kind, None)
    alpha, sigma, _ = schedule.at(ratios[:1])
    # float64 by hand: the recursion of the table's rows with exact models
    x, history = X.clone(), []
    levels = given.levels(steps, "trailing")
    calls = [(levels.alpha[i], levels.sigma[i]) for i in range(steps)]
    if isinstance(sampler, Heun):
        calls = calls[:1] + [c for c in calls[1:] for _ in range(2)]
    rows = table.rows.double()
    for i, (a, s) in enumerate(calls):
        r = dict(zip(COLUMNS, rows[i], strict=True))
        m = gaussian(kind, a, s)(x)
        out = r["c_x"] * x + r["c_m"] * m
        if table.reads[i]:
            out = out + r["c_h1"] * history[0]
        if table.keep[i]:
            history = [r["k_x"] * x + r["k_m"] * m]
        x = out
    return float((x - ode_end(X, float(alpha), float(sigma))).abs().max())


@pytest.mark.parametrize(
    "sampler, order",
    [(DDIM(), 1), (Euler(), 1), (DPMpp2M(), 2), (Heun(), 2)],
    ids=["ddim", "euler", "dpmpp_2m", "heun"],
)
@pytest.mark.parametrize(
    "schedule, kind", [(VP(), "eps"), (VP(), "v"), (Flow(), "flow"), (EDM(), "edm")]
)
def test_order_of_convergence(sampler, order, schedule, kind):
    errors = [error(sampler, schedule, kind, n) for n in (40, 80, 160)]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert errors[-1] < 0.02 and all(abs(s - order) < 0.3 for s in slopes), (errors, slopes)


def test_all_predictions_are_one_trajectory():
    schedule = VP(karras=True)
    ends = [
        fastdiff.sample(
            knows_its_level(schedule, kind), X.float(), sampler="dpmpp_2m", steps=12,
            prediction=kind, schedule=schedule,
        )
        for kind in ("eps", "v", "x0", "flow")
    ]  # fmt: skip
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=3e-5)


@pytest.mark.parametrize("sampler", ["ddim_eta", "ddpm", "dpmpp_2m_sde", "euler_churn"])
def test_law_of_the_discretised_sampler(sampler):
    """Mean and variance of the output equal the affine recursion's, within 4 standard errors."""
    make = {
        "ddim_eta": DDIM(eta=1.0), "ddpm": fastdiff.samplers.DDPM(),
        "dpmpp_2m_sde": DPMpp2M(sde=True), "euler_churn": Euler(s_churn=8.0, s_tmin=0.05),
    }[sampler]  # fmt: skip
    steps, schedule = 12, Given(karras_sigmas(12, 0.01, 20.0), VP())
    table = make.table(schedule, steps, "x0", None)
    levels = schedule.levels(steps, "trailing")
    if isinstance(make, Euler):
        levels, _, _ = make.raised(schedule, levels)
    calls = iter(range(10**6))

    def model(x, t, y):
        i = next(calls)
        return gaussian("x0", levels.alpha[i].float(), levels.sigma[i].float())(x)

    shape = (4, 1, 256, 256)
    out = fastdiff.sample(
        model, shape, sampler=make, steps=steps, prediction="x0", schedule=schedule, seed=3
    )
    # state, history entry: mean and covariance under the recursion, float64
    mean, cov = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    cov[0, 0] = 1
    if table.first is not None:
        first = dict(zip(COLUMNS, table.first.double(), strict=True))
        cov[0, 0] = first["c_x"] ** 2 + first["sigma"] ** 2
    for i in range(steps):
        r = dict(zip(COLUMNS, table.rows[i].double(), strict=True))
        a, s = levels.alpha[i], levels.sigma[i]
        slope = a * STD**2 / ((a * STD) ** 2 + s**2)
        shift = MEAN - slope * a * MEAN  # m = slope x + shift
        h1 = r["c_h1"] if table.reads[i] else 0.0
        step = torch.tensor(
            [[r["c_x"] + r["c_m"] * slope, h1], [r["k_x"] + r["k_m"] * slope, 0.0]]
        ).double()
        mean = step @ mean + torch.stack((r["c_m"], r["k_m"])) * shift
        cov = step @ cov @ step.T
        cov[0, 0] += r["sigma"] ** 2
    n = out.numel()
    assert abs(float(out.double().mean() - mean[0])) < 4 * math.sqrt(cov[0, 0] / n)
    assert abs(float(out.double().var() / cov[0, 0]) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float(mean[0]) - MEAN) < 0.02  # and the recursion itself is near the data


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("kind", ["eps", "edm"])
def test_churn_is_algorithm_2_of_karras(heun, kind):
    """In float64 and in x / alpha, as the paper writes it, with the same noise."""
    n, churn, low, high, s_noise = 9, 3.0, 0.05, 50.0, 1.003
    base = EDM(high=30.0) if kind == "edm" else VP()
    sigmas = karras_sigmas(n, 0.02, 30.0)
    schedule = base if kind == "edm" else Given(sigmas, base)
    if kind == "edm":
        sigmas = karras_sigmas(n, base.low, base.high)
    shape = (2, 3, 4, 5)
    sampler = (Heun if heun else Euler)(churn, low, high, s_noise)
    calls = []

    def denoise(x, sigma):  # nonlinear, in x / alpha
        return torch.tanh(x) / (1 + sigma)

    def model(x, t, y):
        ratio = calls_at[len(calls)]
        calls.append(float(t[0]))
        alpha, sigma, want = base.at(torch.tensor([ratio], dtype=torch.float64))
        assert abs(float(want) - float(t[0])) < 1e-3 * max(1.0, abs(float(want)))
        x0 = denoise(x.double() / alpha, ratio)
        if kind == "edm":
            m = (x0 - (1 - sigma**2) / alpha * x) / (sigma * (1 - sigma**2).sqrt() / alpha)
        else:
            m = (x - alpha * x0) / sigma
        return m.float()

    gamma = min(churn / n, math.sqrt(2) - 1)
    start = philox_normal(shape, 5, stream=2)
    x = start.double() / float(base.at(sigmas[:1])[0])
    levels = [*sigmas.tolist(), 0.0]
    calls_at, drawn = [], []
    for i in range(n):  # the calls, and which row draws the noise of step i: the row before it
        on = low <= levels[i] <= high
        calls_at.append(levels[i] * (1 + gamma) if on else levels[i])
        drawn.append((2 * n - 1 if heun else n) if i == 0 else len(calls_at) - 2)
        if heun and i + 1 < n:
            calls_at.append(levels[i + 1])
    for i in range(n):
        hat = levels[i]
        if low <= hat <= high:
            hat = hat * (1 + gamma)
            z = philox_normal(shape, 5, step=drawn[i]).double()
            x = x + math.sqrt(hat**2 - levels[i] ** 2) * s_noise * z
        d = (x - denoise(x, hat)) / hat
        new = x + (levels[i + 1] - hat) * d
        if heun and levels[i + 1] > 0:
            second = (new - denoise(new, levels[i + 1])) / levels[i + 1]
            new = x + (levels[i + 1] - hat) * (d + second) / 2
        x = new
    got = fastdiff.sample(
        model, start, sampler=sampler, steps=n, prediction=kind, schedule=schedule, seed=5
    )
    torch.testing.assert_close(got.double(), x, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in fastdiff.samplers.SAMPLERS if n != "lcm"])
def test_every_sampler_runs_on_straight_paths(name):
    """From pure noise, where alpha is 0; the variance of few-step samplers is low, not the mean."""
    out = fastdiff.sample(
        lambda x, t, y: gaussian("flow", 1 - t[0] / 1000, t[0] / 1000)(x), (4, 1, 128, 128),
        sampler=name, steps=100, prediction="flow",
    )  # fmt: skip
    assert abs(float(out.mean()) - MEAN) < 0.01
    assert abs(float(out.std()) - STD) < 0.03


def test_lcm_needs_timesteps():
    with pytest.raises(ValueError, match="LCM: schedule is Flow, need VP"):
        fastdiff.sample(lambda x, t, y: x, (1, 1, 2, 2), sampler="lcm", steps=2, prediction="flow")
    with pytest.raises(ValueError, match="LCM: steps is 51, need at most 50"):
        fastdiff.sample(lambda x, t, y: x, (1, 1, 2, 2), sampler="lcm", steps=51)
