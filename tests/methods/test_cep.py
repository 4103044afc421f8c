"""CEP: moments of what is added to conditions, and that it is nowhere else."""

import math

import pytest
import torch
from torch import nn

from fastdiff import samplers
from fastdiff.methods.cep import CEP_STREAM, KINDS, ConditionNoise, perturbed
from fastdiff.models.dit import DiT
from fastdiff.ops import Noise, philox_normal

TABLE = "y_embedder.embedding_table"


def dit():
    torch.manual_seed(0)
    model = DiT(
        input_size=4, patch_size=2, in_channels=1, hidden_size=32, depth=1, num_heads=2,
        num_classes=3, learn_sigma=False, prediction="eps",
    )  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


X, T, Y = torch.randn(3, 1, 4, 4), torch.tensor([30.0, 400.0, 900.0]), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("kind, share", [("uniform", 1 / 3), ("normal", 1.0)])
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_moments(kind, share, gamma):
    """Mean 0 and variance gamma^2 / (3 d) or gamma^2 / d, within 4 standard errors."""
    n, d = 4000, 24
    c = torch.randn(n, 3, d, dtype=torch.float64)
    delta = perturbed(c, Noise(5, None, 0, CEP_STREAM), gamma=gamma, kind=kind) - c
    variance, count = share * gamma**2 / d, delta.numel()
    kurtosis = 1.8 if kind == "uniform" else 3.0
    assert abs(delta.mean()) < 4 * math.sqrt(variance / count)
    error = variance * math.sqrt((kurtosis - 1) / count)
    assert abs(delta.square().mean() - variance) < 4 * error
    both = torch.corrcoef(delta.flatten(1).T)
    assert (both - torch.eye(3 * d)).abs().max() < 6 / math.sqrt(n)
    if kind == "uniform":
        bound = gamma / math.sqrt(d)
        assert delta.abs().max() <= bound and delta.abs().max() > 0.999 * bound
    # Without the division by d, or with another law's variance, it would be seen.
    assert abs(variance * d - variance) > 4 * error
    assert abs(variance * 3 - variance) > 4 * error


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_bit_for_bit_the_network(kind):
    model = dit().eval()
    plain = model(X, T, Y)
    with ConditionNoise(model, gamma=2.0, kind=kind) as noise:
        assert torch.equal(model(X, T, Y), plain) and noise.calls == 0
        model.train()
        first, second = model(X, T, Y), model(X, T, Y)
        assert not torch.equal(first, plain) and not torch.equal(first, second)
        assert noise.calls == 2
        model.eval()
        assert torch.equal(model(X, T, Y), plain)
    model.train()
    assert (
        torch.equal(model(X, T, Y), plain) and not model.y_embedder.embedding_table._forward_hooks
    )
    with ConditionNoise(model, gamma=0.0):
        assert torch.equal(model(X, T, Y), plain)


def test_its_noise_is_a_stream_of_its_own():
    """Torch's random numbers and a sampler's go on as if it were not there."""
    model = dit().train()
    torch.manual_seed(3)
    before = torch.randn(4)
    torch.manual_seed(3)
    with ConditionNoise(model):
        model(X, T, Y)
        assert torch.equal(torch.randn(4), before)
    # A sampler whose step noise has the same seed, slots and numbers.
    step = philox_normal((3, 32), 0, None, 0, 0)
    c = torch.zeros(3, 32)
    own = perturbed(c, Noise(0, None, 0, CEP_STREAM), kind="normal") * math.sqrt(32)
    correlation = torch.corrcoef(torch.stack((own.flatten(), step.flatten())))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(96)
    shared = perturbed(c, Noise(0, None, 0, 0), kind="normal") * math.sqrt(32)
    assert torch.allclose(shared, step)  # the stream is what parts them
    model.eval()
    plain = samplers.sample(model, X, classes=Y, sampler="ddpm", steps=3)
    with ConditionNoise(model):
        found = samplers.sample(model, X, classes=Y, sampler="ddpm", steps=3)
    assert torch.equal(found, plain)


def test_runs_are_repeated_by_seed_and_call():
    model, found = dit().train(), []
    for seed, calls in ((1, 0), (1, 0), (2, 0), (1, 4)):
        with ConditionNoise(model, seed=seed) as noise:
            noise.calls = calls
            found.append(model(X, T, Y))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])


def test_gradients_go_through():
    c = torch.randn(2, 3, 5, requires_grad=True)
    weight = torch.randn(2, 3, 5)
    (weight * perturbed(c, Noise(0, None, 0, CEP_STREAM))).sum().backward()
    assert torch.equal(c.grad, weight)
    model = dit().train()
    with ConditionNoise(model):
        model(X, T, Y).square().mean().backward()
    assert model.y_embedder.embedding_table.weight.grad[:3].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_batches(dtype):
    c, seeds = torch.randn(3, 2, 8).to(dtype), torch.tensor([4, 5, 6])
    whole = perturbed(c, Noise(seeds, None, 2, CEP_STREAM))
    assert whole.dtype == dtype
    for b in range(3):
        one = slice(b, b + 1)
        alone = perturbed(c[one], Noise(seeds[one], None, 2, CEP_STREAM))
        assert torch.equal(alone, whole[one])
    assert perturbed(c, Noise(seeds, None, 2, CEP_STREAM), gamma=0.0) is c


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(gamma=-1.0), "gamma is -1.0"),
        (dict(gamma=math.nan), "gamma is nan"),
        (dict(kind="laplace"), "kind is 'laplace'"),
        (dict(target="y"), "target is 'y', need a layer's name, such as x_embedder"),
        (dict(target=""), "target is ''"),
    ],
)
def test_bad_input(settings, words):
    model = dit()
    with pytest.raises(ValueError, match=words):
        ConditionNoise(model, **settings)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"c is torch.float32 \[4\]"):
        perturbed(torch.randn(4), Noise(0))
