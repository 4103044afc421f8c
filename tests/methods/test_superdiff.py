"""SuperDiff: the density estimates, the mixture of OR, the balance of AND, and what breaks them."""

import math

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import samplers
from fastdiff.cache import Forecast
from fastdiff.methods.superdiff import _change, and_weights, or_weights, superdiff
from fastdiff.models.dit import DiT
from fastdiff.samplers import DDIM, Flow
from fastdiff.samplers.schedule import Levels
from fastdiff.testing_gaussian import GaussianModel

D = 3


class Late(Flow):
    """Straight paths whose noisiest level is s = 0.98: alpha is above 0, ``sigma / alpha`` 49."""

    def levels(self, steps, spacing, extra=0):
        s = torch.linspace(0.98, 0, steps + 1, dtype=torch.float64)
        return Levels(1 - s, s, 1000 * s[:-1])


def gaussian(mean, variance=0.5, schedule=None, **more):
    mean = torch.as_tensor(mean, dtype=torch.float64).expand(1, D).clone()
    return GaussianModel(mean, torch.full((1, D), variance).double(), schedule=schedule, **more)


def logp(model, x, alpha=1.0, sigma=0.0):
    total = alpha**2 * model.variance + sigma**2
    away = x.double() - alpha * model.mean
    return -0.5 * (away**2 / total + (2 * math.pi * total).log()).sum(1).detach()


ONE, TWO = (1.5, 0.5, -1.0), (-1.0, 0.3, 0.5)


def estimate_errors(steps, variances, kind="or"):
    """Root mean square errors of what log q1 - log q2, and log q1, gain on the way."""
    pair = [gaussian(m, v, Late()) for m, v in zip((ONE, TWO), variances, strict=True)]
    start = torch.randn(128, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = superdiff(pair, start, kind=kind, sampler=DDIM(eta=1.0), steps=steps, seed=2)
    gained = found.logq + 0.5 * (start**2 + math.log(2 * math.pi)).sum(1, keepdim=True)
    true = torch.stack([logp(m, found.x) - logp(m, start, 0.02, 0.98) for m in pair], 1)
    error = gained - true
    rms = (error[:, 0] - error[:, 1]).square().mean().sqrt(), error[:, 0].square().mean().sqrt()
    return [float(e) for e in rms]


def slope(errors):
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


def test_log_ratios_are_good_to_first_order_and_densities_to_half():
    """Each doubling of the steps halves the error of the ratio; of the density it takes a root."""
    found = [estimate_errors(n, (0.5, 0.5)) for n in (64, 128, 256)]
    ratio, absolute = ([e[j] for e in found] for j in (0, 1))
    assert 0.85 < slope(ratio) < 1.15, ratio
    assert 0.3 < slope(absolute) < 0.7, absolute
    assert ratio[-1] < 0.25 < 0.7 < absolute[-1], (ratio, absolute)


def test_mixture_of_scores_is_the_score_of_the_mixture():
    """With the true log densities; 1e-6 of float64 models holds with room."""
    schedule = Late()
    pair = [gaussian(ONE, 0.5, schedule), gaussian(TWO, 0.8, schedule)]
    both = GaussianModel(
        torch.cat([m.mean for m in pair]), torch.cat([m.variance for m in pair]), schedule=schedule
    )
    x = torch.randn(7, D, dtype=torch.float64)
    for s in (0.1, 0.5, 0.9):
        logq = torch.stack([logp(m, x, 1 - s, s) for m in pair], 1)
        t = torch.full((7,), 1000 * s, dtype=torch.float64)
        eps = torch.stack([m(x, t) for m in pair])
        mixed = torch.einsum("kbd,bk->bd", eps, or_weights(logq))
        assert (mixed - both(x, t)).abs().max() < 1e-6
        flat = torch.einsum("kbd,bk->bd", eps, or_weights(logq, temperature=0.0))
        assert (flat - both(x, t)).abs().max() > 1e-3  # the average is another law


def test_or_samples_the_mixture():
    """Half of the samples near each mean, with the mixture's mean and variance."""
    pair = [gaussian((3.0, 0.0, 1.0), 0.2, Late()), gaussian((-3.0, 0.0, 1.0), 0.2, Late())]
    x = torch.randn(2000, D, generator=torch.Generator().manual_seed(3))
    found = superdiff(pair, x, kind="or", sampler=DDIM(eta=1.0), steps=100)
    first = found.x[:, 0]
    share = (first > 0).double().mean()
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(2000)
    assert abs(first.abs().mean() - 3.0) < 0.05 and (first.abs() > 1.0).double().mean() > 0.99
    assert (found.kappa.sum(2) - 1).abs().max() < 1e-12
    near = torch.where(first > 0, found.kappa[-1, :, 0], found.kappa[-1, :, 1])
    assert (near > 0.99).double().mean() > 0.98


def test_and_keeps_the_difference_of_log_densities():
    pair = [gaussian(ONE, 0.5, Late()), gaussian(TWO, 0.5, Late())]
    x = torch.randn(64, D, dtype=torch.float64)
    drift = []

    def look(i, run):
        drift.append((run.carried["logq"][:, 0] - run.carried["logq"][:, 1]).abs().max())

    settings = dict(sampler=DDIM(eta=1.0), steps=100, callback=look)
    found = superdiff(pair, x, kind="and", ridge=0.0, clamp=1e9, **settings)
    # Rows are float32: their error is 1e-7 of terms of up to 1e3 in 200 steps.
    assert max(drift) < 1e-3
    true = logp(pair[0], found.x) - logp(pair[1], found.x)
    average = superdiff(pair, x, kind="or", temperature=0.0, **settings)
    plain = logp(pair[0], average.x) - logp(pair[1], average.x)
    assert true.abs().median() < 0.1 * plain.abs().median()
    assert true.abs().median() < 0.15


@pytest.mark.parametrize("k", [2, 3, 4])
def test_and_weights_solve_their_system(k):
    torch.manual_seed(k)
    s, b = torch.randn(5, k, 9, dtype=torch.float64), torch.randn(5, k, dtype=torch.float64)
    gram = s @ s.mT
    kappa = and_weights(b, gram, 0.3, 0.0, 1e9)
    gain = b + 0.3 * (gram @ kappa[..., None])[..., 0]
    assert (gain - gain[:, :1]).abs().max() < 1e-9 and (kappa.sum(1) - 1).abs().max() < 1e-9
    if k == 2:  # the closed form, with the sum of the weights eliminated
        d = s[:, 0] - s[:, 1]
        top = (b[:, 0] - b[:, 1]) + 0.3 * (d * s[:, 1]).sum(1)
        assert torch.allclose(kappa[:, 0], -top / (0.3 * d.square().sum(1)))


@pytest.mark.parametrize("k", [2, 3])
def test_equal_scores_leave_equal_weights(k):
    """The system is singular: 0 / 0 without a ridge, and 1/K with one."""
    s = torch.randn(4, 1, 5, dtype=torch.float64).expand(4, k, 5)
    gram = s @ s.mT
    b = torch.randn(4, 1, dtype=torch.float64).expand(4, k)
    kappa = and_weights(b, gram, 0.3, 1e-6, 100.0)
    assert (kappa - 1 / k).abs().max() < 1e-6
    noisy = b + 1e-3 * torch.randn(4, k, dtype=torch.float64)
    assert and_weights(noisy, gram, 0.3, 1e-12, 2.0).sub(1 / k).abs().max() <= 2.0 + 1e-12


def test_without_ridge_and_clamp_weights_explode_where_scores_agree():
    """Two models that are nearly one: what a step has to balance is noise over next to nothing."""
    pair = [gaussian(ONE, 0.5, Late()), gaussian(ONE, 0.5005, Late())]
    x = torch.randn(32, D, dtype=torch.float64)
    settings = dict(kind="and", sampler=DDIM(eta=1.0), steps=50)
    wild = superdiff(pair, x, ridge=0.0, clamp=1e30, **settings).kappa.abs().max()
    tame = superdiff(pair, x, ridge=1e-4, clamp=10.0, **settings).kappa
    assert wild > 1e3 and (tame - 0.5).abs().max() <= 10 + 1e-9


def test_stale_scores_would_be_seen():
    """Estimates from scores of steps before: the error of the ratio is far off."""
    pair = [gaussian(ONE, 0.5, Late()), gaussian(TWO, 0.5, Late())]
    kept = {}

    class Stale(nn.Module):
        prediction, schedule = "eps", pair[0].schedule

        def forward(self, x, t, y=None):
            count = kept["n"] = kept.get("n", -1) + 1
            if count % 4 == 0:
                kept["m"] = pair[0](x, t)
            return kept["m"]

    x = torch.randn(128, D, dtype=torch.float64)
    errors = []
    for first in (pair[0], Stale()):
        found = superdiff([first, pair[1]], x, sampler=DDIM(eta=1.0), steps=128)
        true = logp(pair[0], found.x) - logp(pair[1], found.x)
        errors.append((found.logq[:, 0] - found.logq[:, 1] - true).square().mean().sqrt())
    assert errors[1] > 5 * errors[0], errors


def test_one_model_is_plain_sampling():
    model = gaussian(ONE)
    found = superdiff(model, (3, D), steps=7, seed=4)
    assert torch.equal(found.x, samplers.sample(model, (3, D), sampler="ddpm", steps=7, seed=4))
    assert torch.equal(found.kappa, torch.ones(7, 3, 1, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["or", "and"])
def test_equal_models_are_one(kind):
    model = gaussian(ONE)
    found = superdiff([model] * 2, (3, D), kind=kind, steps=9)
    plain = samplers.sample(model, (3, D), sampler="ddpm", steps=9)
    assert (found.x - plain).abs().max() < 1e-4
    assert (found.kappa - 0.5).abs().max() < 1e-2


@pytest.mark.parametrize("kind", ["or", "and"])
def test_predictions_may_differ_and_a_batch_is_its_singles(kind):
    seeds, x = torch.tensor([3, 5, 8]), torch.randn(3, 2, 3, 5, dtype=torch.float64)

    def models(prediction):
        return [
            GaussianModel(torch.full((1, 1, 1, 1), m), torch.full((1, 1, 1, 1), 0.5), prediction=p)
            for m, p in ((1.0, "eps"), (-1.0, prediction))
        ]

    settings = dict(kind=kind, steps=12)
    whole = superdiff(models("eps"), x, seed=seeds, **settings)
    other = superdiff(models("v"), x, seed=seeds, **settings)
    assert torch.allclose(whole.x, other.x, atol=1e-4)
    for b in range(3):
        one = slice(b, b + 1)
        alone = superdiff(models("eps"), x[one], seed=seeds[one], **settings)
        assert torch.allclose(whole.x[one], alone.x, atol=1e-12)
        assert torch.allclose(whole.logq[one], alone.logq)


def test_conditions_of_one_model_with_guidance():
    model = GaussianModel(
        torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.full((2, 2), 0.3), classes=True
    )
    y = [torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)]
    found = superdiff(model, (4, 2), conditions=y, kind="and", guidance=1.5, steps=20)
    assert torch.isfinite(found.x).all()
    # A bias that leaves one condition alone is plain guided sampling with it.
    only = superdiff(model, (4, 2), conditions=y, bias=[0.0, -1e9], guidance=1.5, steps=20)
    plain = samplers.sample(model, (4, 2), classes=y[0], guidance=1.5, sampler="ddpm", steps=20)
    assert torch.allclose(only.x, plain, atol=1e-4)


def dit(**more):
    torch.manual_seed(0)
    model = DiT(
        input_size=4, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2,
        num_classes=3, prediction="eps", **more,
    )  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize("kind", ["or", "and"])
def test_caches_are_off_where_densities_add_up(kind):
    model, x = dit(learn_sigma=False), torch.randn(3, 1, 4, 4)
    settings = dict(kind=kind, guidance=1.5, steps=5)
    y = [torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])]
    plain = superdiff(model, x, conditions=y, **settings)
    found = superdiff(model, x, conditions=y, cache=Forecast(interval=3), **settings)
    assert torch.equal(plain.x, found.x) and torch.equal(plain.logq, found.logq)
    own = dict(classes=y[0], sampler="ddpm", steps=5)  # the cache has an effect where it is on
    kept = fastdiff.sample(model, x, cache=Forecast(interval=3), **own)
    assert not torch.equal(kept, fastdiff.sample(model, x, **own))


def test_pure_noise_at_the_first_level():
    class Straight(nn.Module):
        """eps - x0 of Gaussian data, finite where alpha is 0."""

        prediction, schedule = "flow", Flow()

        def __init__(self, mean):
            super().__init__()
            self.mean = torch.tensor(mean)

        def forward(self, x, t, y=None):
            s = t.view(-1, 1) / 1000
            total = (1 - s) ** 2 * 0.5 + s**2
            away = x - (1 - s) * self.mean
            return (s - 0.5 * (1 - s)) * away / total - self.mean

    pair = [Straight(ONE), Straight(TWO)]
    for kind in ("or", "and"):
        found = superdiff(pair, (5, D), kind=kind, sampler=DDIM(eta=1.0), steps=20)
        assert torch.isfinite(found.x).all() and torch.isfinite(found.logq).all()
        assert torch.allclose(found.kappa[0], torch.full((5, 2), 0.5).double())


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(kind="xor"), "kind is 'xor'"),
        (dict(conditions=[None]), "conditions has 1 entries, need 2"),
        (dict(classes=torch.zeros(2, dtype=torch.int64)), "classes is given"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(ridge=-1.0), "ridge is -1.0"),
        (dict(clamp=0.0), "clamp is 0.0"),
        (dict(bias=[0.0, 1.0, 2.0]), r"bias is \[3\], need \[2\] or \[2, 2\]"),
        (dict(sampler="dpmpp_2m"), "sampler has churn, a history or clip"),
        (dict(clip=1.0), "sampler has churn, a history or clip"),
        (dict(guidance_rescale=0.7), "guidance_rescale is 0.7"),
    ],
)
def test_bad_input(settings, words):
    x = torch.randn(2, D)
    before = x.clone()
    with pytest.raises(ValueError, match=words):
        superdiff([gaussian(ONE), gaussian(TWO)], x, **settings)
    assert torch.equal(x, before)


def test_changes_of_models_that_nearly_agree_keep_their_digits():
    """Each changes by thousands; errors are of what they differ by, not of those."""
    g = torch.Generator().manual_seed(0)
    eps, along = torch.randn(2, 1, 4, 64, 64, generator=g)
    near = eps + 1e-3 * torch.randn(eps.shape, generator=g)
    tau, half = 0.7, 0.31
    s, t, du = (-eps.double() / tau), (-near.double() / tau), along.double() * tau
    want = ((t - s) * du - half * tau**2 * (t.square() - s.square())).flatten(1).sum(1)
    got = _change(near, eps, along, half)
    assert got.dtype == torch.float64
    size = ((t - s) * (du - half * tau**2 * (t + s))).abs().flatten(1).sum(1)
    assert ((got - want).abs() <= 1e-6 * size).all() and size < 50
    whole = _change(eps, torch.zeros_like(eps), along, half)
    want = (s * du - half * tau**2 * s.square()).flatten(1).sum(1)
    torch.testing.assert_close(whole, want, rtol=1e-5, atol=1e-3)
