"""PSO: densities of steps, the pairwise loss at the reference, and what has no density."""

import math

import pytest
import torch
from torch import nn

from fastdiff import samplers
from fastdiff.adapters import LoRA
from fastdiff.methods import pso
from fastdiff.samplers import DDIM
from fastdiff.testing_gaussian import GaussianModel

SETTINGS = dict(sampler=DDIM(eta=1.0), steps=4)


def gaussian(mean=0.7, **more):
    return GaussianModel(torch.full((1, 3, 1, 1), mean), torch.full((1, 3, 1, 1), 0.5), **more)


class Small(nn.Module):
    """A network with a linear layer to adapt."""

    prediction = "v"

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def forward(self, x, t, y=None):
        return self.mix(x.movedim(1, -1)).movedim(-1, 1) * (1 + 1e-3 * t.view(-1, 1, 1, 1))


def lora(network, spread=0.05):
    adapter = LoRA(network, 2)
    for pair in adapter.pairs.values():
        nn.init.normal_(pair.up, std=spread)
    return adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_probability_is_that_of_torch(dtype):
    x = (3 * torch.randn(5, 3, 2, 4)).to(dtype)
    mean = torch.randn(5, 3, 2, 4).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    target = torch.distributions.Normal(mean.to(wide), 0.37).log_prob(x.to(wide))
    found = pso.log_normal(x, mean, 0.37)
    # Relative to terms of up to 1e2 in float32.
    assert torch.allclose(found, target.flatten(1).mean(1), rtol=1e-6, atol=1e-6)


def test_a_recorded_step_has_the_density_that_the_sampler_drew_from():
    """By the sampler's own update, written out as Euler's ancestral step (Karras's sigma)."""
    model = gaussian()
    path = pso.record(model, (6, 3, 2, 4), seed=5, **SETTINGS)
    assert torch.equal(path.x, samplers.sample(model, (6, 3, 2, 4), seed=5, **SETTINGS))
    assert path.calls == (0, 1, 2)  # the last draws nothing
    found = pso.step_log_probs(model, path, **SETTINGS)
    run = samplers.Run(model, path.x, **SETTINGS)
    for j, i in enumerate(path.calls):
        alpha, sigma = run.alpha.double(), run.sigma.double()
        high, low = sigma[i] / alpha[i], sigma[i + 1] / alpha[i + 1]
        up = (low**2 * (high**2 - low**2) / high**2).sqrt()
        down = (low**2 - up**2).sqrt()
        u = path.states[j].double() / alpha[i]
        m = model(path.states[j], run.times[i].expand(6), None).double()
        x0 = u - high * m
        mean = alpha[i + 1] * (u + (u - x0) / high * (down - high))
        normal = torch.distributions.Normal(mean, float(alpha[i + 1] * up))
        target = normal.log_prob(path.after[j].double()).flatten(1).mean(1)
        assert torch.allclose(found[j].double(), target, atol=2e-5)


def test_expected_log_probability():
    """E = -1/2 - log sigma - 1/2 log 2 pi, within 4 standard errors."""
    model = gaussian()
    path = pso.record(model, (512, 3, 4, 2), **SETTINGS)
    found = pso.step_log_probs(model, path, **SETTINGS)
    spreads = samplers.Run(model, path.x, **SETTINGS).table.rows[:3, 7].double()
    target = -0.5 - spreads.log() - 0.5 * math.log(2 * math.pi)
    error = math.sqrt(0.5 / (512 * 24))
    assert ((found.double().mean(1) - target).abs() < 4 * error).all()


def pair(network, **more):
    settings = SETTINGS | more
    win = pso.record(network, (4, 3, 2, 5), seed=1, **settings)
    lose = pso.record(network, (4, 3, 2, 5), seed=2, **settings)
    return win, lose


def test_loss_at_the_reference_is_log_2_with_antisymmetric_gradients():
    network = Small()
    adapter = lora(network, 0.0)
    win, lose = pair(network)
    ref = pso.references(network, (win, lose), **SETTINGS)
    gradients = []
    for first, second, about in ((win, lose, ref), (lose, win, ref[::-1])):
        adapter.zero_grad()
        loss = pso.pso_loss(network, about, first, second, **SETTINGS)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
        loss.backward()
        gradients.append(torch.cat([p.up.grad.flatten() for p in adapter.pairs.values()]))
    assert gradients[0].abs().max() > 1e-3
    assert torch.allclose(gradients[0], -gradients[1], rtol=1e-4, atol=1e-6)
    same = pso.pso_loss(network, (ref[0], ref[0]), win, win, **SETTINGS)
    assert same.item() == pytest.approx(math.log(2), abs=1e-6)


def test_a_gradient_step_raises_the_winner():
    network = Small()
    adapter = lora(network, 0.0)
    win, lose = pair(network)
    ref = pso.references(network, (win, lose), **SETTINGS)
    optimizer = torch.optim.SGD(adapter.trainable(), lr=1e-5)
    pso.pso_loss(network, ref, win, lose, **SETTINGS).backward()
    optimizer.step()
    with torch.no_grad():
        now = [pso.step_log_probs(network, p, **SETTINGS) for p in (win, lose)]
    assert ((now[0] - ref[0]) - (now[1] - ref[1])).mean() > 0


def test_gradient_is_that_of_finite_differences():
    model = gaussian().double()
    x = torch.randn(3, 3, 2, 5, dtype=torch.float64)
    path = pso.record(model, x, seed=1, **SETTINGS)
    total = pso.step_log_probs(model, path, **SETTINGS).sum()
    (g,) = torch.autograd.grad(total, model.mean)
    values = []
    for sign in (1, -1):
        other = gaussian().double()
        with torch.no_grad():
            other.mean[0, 1] += sign * 1e-4
            values.append(pso.step_log_probs(other, path, **SETTINGS).sum())
    assert torch.allclose(g[0, 1].sum(), (values[0] - values[1]) / 2e-4, rtol=1e-5)


def test_reference_is_the_network_with_its_adapters_off():
    network = Small()
    x, t = torch.randn(2, 3, 2, 5), torch.tensor([3.0, 7.0])
    bare = network(x, t).detach()
    first, second = lora(network, 0.3), lora(network, 0.2)
    on = network(x, t)
    assert not torch.equal(on, bare)
    with pso.adapters_off(network):
        off = network(x, t)
        assert torch.equal(off, bare) and not off.requires_grad
    assert torch.equal(network(x, t), on)  # and in their order
    on.sum().backward()  # a graph made before is good still
    assert first.trainable()[0].grad is not None and second.trainable()[1].grad is not None
    with pytest.raises(RuntimeError, match="planted"), pso.adapters_off(network):
        raise RuntimeError("planted")
    assert torch.equal(network(x, t), on)


def test_outside_the_clip_there_is_no_gradient():
    logp = torch.tensor([[0.5, 0.05, -0.5]], requires_grad=True)
    ratio = pso.log_ratio(logp, torch.zeros(1, 3), 0.1)
    pso.pair_loss(ratio, torch.zeros(1, 3)).backward()
    assert logp.grad[0, 0] == 0 and logp.grad[0, 2] == 0 and logp.grad[0, 1] < 0
    assert torch.allclose(ratio.exp()[0, ::2], torch.tensor([1.1, 0.9]))


def test_offline_loss():
    losses = [torch.rand(5, requires_grad=True) for _ in range(2)]
    equal = pso.offline_loss(*losses, *(v.detach() for v in losses), eta=1.0)
    assert equal.item() == pytest.approx(math.log(2), abs=1e-5)
    g = torch.autograd.grad(equal, losses)
    assert (g[0] > 0).all() and torch.allclose(g[0], -g[1])  # descent: the winner's loss falls


def test_a_path_through_a_cache_would_be_seen():
    """Steps whose prediction was an older one have another density than the model gives them."""
    model, kept = gaussian(), {}

    class Cached(nn.Module):
        prediction = "eps"

        def forward(self, x, t, y=None):
            kept.setdefault("m", model(x, t))
            return kept["m"]

    path = pso.record(Cached(), (64, 3, 2, 5), **SETTINGS)
    found = pso.step_log_probs(model, path, **SETTINGS)
    spreads = samplers.Run(model, path.x, **SETTINGS).table.rows[:3, 7].double()
    target = -0.5 - spreads.log() - 0.5 * math.log(2 * math.pi)
    off = (found.double().mean(1) - target).abs()
    assert off[0] < 0.05 < off[1]


def test_batch_and_guidance():
    model = GaussianModel(
        torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1),
        torch.full((2, 3, 1, 1), 0.5),
        classes=True,
    )
    y, seeds = torch.tensor([0, 1, 0]), torch.tensor([4, 5, 6])
    x = torch.randn(3, 3, 2, 5)
    settings = dict(guidance=2.0, **SETTINGS)
    path = pso.record(model, x, classes=y, seed=seeds, **settings)
    whole = pso.step_log_probs(model, path, classes=y, **settings)
    for b in range(3):
        part = slice(b, b + 1)
        alone = pso.record(model, x[part], classes=y[part], seed=seeds[part], **settings)
        assert torch.equal(alone.after, path.after[:, part])
        found = pso.step_log_probs(model, alone, classes=y[part], **settings)
        assert torch.allclose(found, whole[:, part], atol=1e-6)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(sampler="ddim"), "draws no noise in any step"),
        (dict(sampler="dpmpp_2m_sde"), "keeps a history or has churn"),
        (dict(steps=1), "draws no noise in any step"),
    ],
)
def test_samplers_without_a_density(settings, words):
    with pytest.raises(ValueError, match=words):
        pso.record(gaussian(), (2, 3, 2, 5), **(SETTINGS | settings))


def test_bad_input():
    network = Small()
    with pytest.raises(ValueError, match="network has no adapters"), pso.adapters_off(network):
        pass
    adapter = lora(network)
    win, lose = pair(network)
    ref = pso.references(network, (win, lose), **SETTINGS)
    for more, words in (
        (dict(beta=0.0), "beta is 0.0"),
        (dict(clip=1.0), "clip is 1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            pso.pso_loss(network, ref, win, lose, **more, **SETTINGS)
    with pytest.raises(ValueError, match=r"reference is \[2, 4\], need \[3, 4\]"):
        pso.pso_loss(network, [r[:2] for r in ref], win, lose, **SETTINGS)
    with pytest.raises(ValueError, match="call 2 draws no noise"):
        pso.step_log_probs(network, win, sampler=DDIM(eta=1.0), steps=3)
    adapter.merge()
    with pytest.raises(ValueError, match="adapter lora merged"), pso.adapters_off(network):
        pass
