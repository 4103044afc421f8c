"""Guidance of latents by energies of decoded images, with the background of a target."""

import math

import pytest
import torch
from torch import nn

from fastdiff import samplers
from fastdiff.methods.guide import Guide, total
from fastdiff.methods.latent_guidance import decoded, latent_guidance
from fastdiff.samplers import Run
from fastdiff.testing_gaussian import GaussianModel, convert

C, HEIGHT, WIDTH, STEPS = 2, 3, 5, 6
SHAPE = (C, HEIGHT, WIDTH)
SETTINGS = dict(sampler="ddim", steps=STEPS)


def gaussian(dtype=torch.float64, **more):
    torch.manual_seed(1)
    mean = torch.randn(1, *SHAPE, dtype=dtype)
    return GaussianModel(mean, torch.rand(1, *SHAPE, dtype=dtype) + 0.2, **more)


class Decoder(nn.Module):
    """A stub of a first stage: twice the size, 3 channels, with or without a bend."""

    def __init__(self, bend=True):
        super().__init__()
        torch.manual_seed(2)
        self.up = nn.ConvTranspose2d(C, 3, 2, stride=2, dtype=torch.float64)
        self.bend = bend

    def forward(self, z):
        image = self.up(z.double() / 0.2)
        return torch.tanh(image) if self.bend else image


def identity(image):  # one minus the cosine to a fixed direction
    one = torch.linspace(-1, 2, image[0].numel(), dtype=image.dtype)
    return 1 - torch.cosine_similarity(image.flatten(1), one[None])


def size(image):
    return 0.1 * image.flatten(1).square().sum(1)


def start(batch=3, dtype=torch.float64):
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(3)).to(dtype)


def finite_differences(f, z, h=1e-5):
    g = torch.zeros_like(z)
    for j in range(z[0].numel()):
        up, down = z.clone(), z.clone()
        up.flatten(1)[:, j] += h
        down.flatten(1)[:, j] -= h
        g.flatten(1)[:, j] = (f(up) - f(down)) / (2 * h)
    return g


@pytest.mark.parametrize("through", ["model", "x0"])
@pytest.mark.parametrize("i", [0, 3, STEPS - 1])
def test_gradient_through_the_decoder(through, i):
    """Central differences in float64: h^2 of truncation, 1e-16 / h of rounding."""
    run = Run(gaussian(), start(), **SETTINGS)
    decode, energy = Decoder(), total((identity, 2.0), (size, 0.5))
    with torch.no_grad():
        found = Guide(decoded(energy, decode), through).gradient(run, i)

        def x0(z):
            return run.x0(i, run.combined(run.predict(i, z)), z)

        at = run.x if through == "model" else x0(run.x)
        inner = x0 if through == "model" else (lambda z: z)
        g = finite_differences(lambda z: energy(decode(inner(z))), at)
    assert torch.allclose(found.g, g, atol=1e-7)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_one_run_by_hand(prediction):
    """``eps + sigma g`` in DDIM, for a linear decoder and |image|^2: g in closed form."""
    model, decode, z = gaussian(prediction=prediction), Decoder(bend=False), start()
    lam = [0.02 * (i + 1) for i in range(STEPS)]
    found = latent_guidance(model, z, [(size, lam)], decode=decode, **SETTINGS)
    run = Run(model, z, **SETTINGS)
    mean, variance = model.mean.double(), model.variance.double()
    with torch.no_grad():
        zero = decode(torch.zeros(1, *SHAPE).double()).flatten()
        basis = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, *SHAPE)
        matrix = (decode(basis).flatten(1) - zero).T
        for i in range(STEPS):
            alpha, sigma = run.alpha[i], run.sigma[i]
            all_ = alpha**2 * variance + sigma**2
            eps = sigma * (z - alpha * mean) / all_
            x0 = convert("x0", z, eps, alpha, sigma)
            image = x0.flatten(1) @ matrix.T + zero
            g = alpha * variance / all_ * (0.2 * image @ matrix).view_as(z)
            eps_g = eps + sigma * lam[i] * g
            x0 = (z - sigma * eps_g) / alpha
            z = run.alpha[i + 1] * x0 + run.sigma[i + 1] * eps_g
    assert torch.allclose(found, z, atol=1e-5)


def test_a_step_is_linear_in_the_energies():
    """The change of a sum of energies is the sum of their changes, in one guided step."""
    model, decode, z = gaussian(), Decoder(), start()

    def change(*terms):
        first = [(e, lambda i, w=w: w if i == STEPS - 1 else 0.0) for e, w in terms]
        found = latent_guidance(model, z, first, decode=decode, **SETTINGS)
        return found - latent_guidance(model, z, [], **SETTINGS)

    a, b = change((identity, 2.0)), change((size, 0.5))
    assert a.abs().max() > 1e-4 and b.abs().max() > 1e-4
    assert torch.allclose(change((identity, 2.0), (size, 0.5)), a + b, atol=1e-9)
    assert torch.allclose(change((identity, 4.0)), 2 * a, atol=1e-9)


def test_energies_come_down():
    model, decode, z = gaussian(), Decoder(), start(16)
    run = dict(decode=decode, sampler="ddpm", steps=20)
    plain, guided = (
        identity(decode(latent_guidance(model, z, [(identity, lam)], **run))).mean()
        for lam in (0.0, 100.0)
    )
    assert guided < plain - 0.1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m_sde"])
@pytest.mark.parametrize("mask", [None, "ones"])
def test_without_scale_it_is_sample(sampler, mask):
    model = gaussian(torch.float32)
    run = dict(sampler=sampler, steps=STEPS, seed=5)
    own = {} if mask is None else dict(mask=torch.ones(1, 1, HEIGHT, WIDTH), target=start().float())
    found = latent_guidance(model, (3, *SHAPE), [(size, 0.0)], decode=Decoder(), **own, **run)
    assert torch.equal(found, samplers.sample(model, (3, *SHAPE), **run))


def test_background_is_the_target():
    model, z, target = gaussian(torch.float32), start(dtype=torch.float32), torch.randn(3, *SHAPE)
    mask = torch.zeros(3, 1, HEIGHT, WIDTH)
    mask[:, :, 1:, 2:] = 1
    mask[2] = 0  # nothing of the last is generated
    keep = mask.clone(), target.clone()
    seen = []
    run = dict(
        decode=Decoder(), mask=mask, target=target, sampler="ddpm", steps=STEPS, seed=6,
        callback=lambda i, run: seen.append(run.x),
    )  # fmt: skip
    found = latent_guidance(model, z, [(size, 0.3)], **run)
    outside = (mask == 0).expand_as(found)
    assert torch.equal(found[outside], target[outside])
    assert not torch.equal(found[~outside], target[~outside])
    assert torch.equal(keep[0], mask) and torch.equal(keep[1], target)
    # On the way the background is the target at the level of the state, whatever is guided.
    plain = []
    latent_guidance(model, z, [], **run | dict(callback=lambda i, run: plain.append(run.x)))
    assert all(torch.equal(a[outside], b[outside]) for a, b in zip(seen, plain, strict=True))


def at_level(x, target, alpha, sigma):
    """Has x mean and variance of N(alpha target, sigma^2)?"""
    n = x.numel()
    mean = abs(x.mean() - target * alpha) < 4 * sigma / math.sqrt(n)
    return bool(mean & (abs(x.var() - sigma**2) < 4 * sigma**2 * math.sqrt(2 / n)))


def test_background_has_the_level_of_the_state():
    model, n, seen = gaussian(torch.float32), 4000, []
    target = torch.full((n, *SHAPE), 1.5)
    latent_guidance(
        model, (n, *SHAPE), [], mask=torch.zeros(1, 1, HEIGHT, WIDTH), target=target, steps=STEPS,
        callback=lambda i, run: seen.append((run.x, run.alpha[i + 1], run.sigma[i + 1])),
    )  # fmt: skip
    for x, alpha, sigma in seen[:-1]:
        assert at_level(x, 1.5, alpha, sigma)
        assert not at_level(target, 1.5, alpha, sigma)  # a clean paste would be seen
    assert torch.equal(seen[-1][0], target)


@pytest.mark.parametrize("through", ["model", "x0"])
def test_batch_is_each_alone(through):
    torch.manual_seed(3)
    model = GaussianModel(torch.randn(2, *SHAPE), torch.full((2, 1, 1, 1), 0.3), classes=True)
    z, seeds, classes = start(dtype=torch.float32), torch.tensor([4, 5, 6]), torch.tensor([0, 1, 2])
    target, mask = torch.randn(3, *SHAPE), (torch.rand(3, 1, HEIGHT, WIDTH) > 0.4).float()

    def run(part):
        return latent_guidance(
            model, z[part], [(size, 0.3), (identity, [0.5] * STEPS)], decode=Decoder(),
            through=through, mask=mask[part], target=target[part], seed=seeds[part],
            classes=classes[part], guidance=2.0, sampler="ddpm", steps=STEPS,
        )  # fmt: skip

    alone = torch.cat([run(slice(b, b + 1)) for b in range(3)])
    assert torch.allclose(run(slice(None)), alone, atol=1e-5)  # convolutions of other batch sizes


def test_decoder_or_energy_that_raises():
    model, z = gaussian(), start()
    before = z.clone()

    def broken(_):
        raise RuntimeError("no image today")

    for settings in (dict(decode=broken), dict(energies=[(broken, 1.0)])):
        with pytest.raises(RuntimeError, match="no image today"):
            latent_guidance(model, z, **{"energies": [(size, 1.0)], **settings, **SETTINGS})
    assert torch.equal(z, before) and torch.is_grad_enabled()


def test_nan_stays_in_its_sample():
    def bad(image):
        return torch.where(torch.arange(len(image)) == 1, math.nan, 1.0) * size(image)

    run = dict(seed=torch.tensor([1, 2, 3]), **SETTINGS)
    found = latent_guidance(gaussian(), start(), [(bad, 0.1)], **run)
    good = latent_guidance(gaussian(), start(), [(size, 0.1)], **run)
    assert found[1].isnan().any() and torch.equal(found[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(energies=[(1.0, size)]), "energies is"),
        (dict(energies=[(size, [1.0])]), "scale has 1 entries, need 6"),
        (dict(energies=[(lambda z: z, 1.0)]), r"energy gives \[3, 2, 3, 5\]|must match"),
        (dict(through="x"), "through is 'x'"),
        (dict(mask=torch.ones(1, 1, 3, 5)), "mask and target go together"),
        (dict(mask=torch.ones(1, 1, 3, 4), target=start()), r"mask is \[1, 1, 3, 4\]"),
        (dict(mask=torch.ones(1, 1, 3, 5), target=start(2)), r"target is \[2, 2, 3, 5\]"),
    ],
)
def test_bad_input(settings, words):
    with pytest.raises(ValueError, match=words):
        latent_guidance(gaussian(), start(), **{"energies": [(size, 1.0)], **settings, **SETTINGS})
