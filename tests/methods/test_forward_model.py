"""Diffusion with forward models: every x0 is rendered, its signal comes out, the context is read
once."""

import math

import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.methods.forward_model import forward_model
from fastdiff.models import DiT
from fastdiff.samplers import DDIM, VP, Run
from fastdiff.testing import draw_weights, unchanged
from fastdiff.testing_gaussian import GaussianModel

SHAPE, SIGNAL, CONTEXT = (3, 2, 3, 5), 7, 4
N = math.prod(SHAPE[1:])


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


A = draw(N, SIGNAL, seed=2) / 3  # the forward model
B = draw(CONTEXT, SIGNAL, seed=3)  # what the context observes, with noise of variance TAU
TAU = 0.5


def render(signal, target=None):
    return (signal @ A.T.to(signal.dtype)).view(-1, *SHAPE[1:])


def levels(t):
    alpha, sigma, _ = VP().at_timesteps(t.double())
    return alpha[: len(t)], sigma[: len(t)]


class Network:
    """``E[S | x_t, c]`` for S ~ N(0, I), c = B S + noise, x_t = alpha A S + sigma eps."""

    def __init__(self):
        self.seen = []

    def encode(self, context):
        self.seen.append(context.shape)
        return (
            context @ B / TAU
        )  # the context's pull on S: its share of the precision is B^T B / TAU

    def __call__(self, x, t, y, features):
        signals = []
        for row, alpha, sigma, pull in zip(x.double(), *levels(t), features.double(), strict=True):
            a = A.double()
            # No context is a pull of NaN: nothing is known of it.
            known = ~pull.isnan().any()
            precision = torch.eye(SIGNAL).double() + (alpha / sigma) ** 2 * a.T @ a
            if known:
                precision = precision + B.double().T @ B.double() / TAU
            found = alpha / sigma**2 * a.T @ row.flatten() + pull.nan_to_num(0)
            signals.append(torch.linalg.solve(precision, found))
        return torch.stack(signals).to(x.dtype)


def test_every_x0_is_in_the_range_and_the_signal_explains_the_last():
    network, context, seen = Network(), draw(SHAPE[0], CONTEXT), []
    with unchanged(context):
        found = forward_model(
            network, SHAPE, render, context=context, encode=network.encode, steps=8,
            sampler="ddpm", callback=lambda i, s: seen.append(s),
        )  # fmt: skip
    assert len(seen) == 8 and torch.equal(seen[-1], found.signal)
    assert torch.equal(render(found.signal), found.x)  # bit for bit
    basis = torch.linalg.qr(A.double()).Q
    flat = found.x.double().flatten(1)
    assert (flat - flat @ basis @ basis.T).abs().max() < 1e-6
    # A step away from the range would be seen: the state before the last step is not in it.
    noisy = draw(*SHAPE).double().flatten(1)
    assert (noisy - noisy @ basis @ basis.T).abs().max() > 0.1


def test_context_is_encoded_once_and_the_same_bits_as_every_time():
    network, context = Network(), draw(SHAPE[0], CONTEXT)
    once = forward_model(
        network, SHAPE, render, context=context, encode=network.encode, steps=6, seed=2
    )
    assert network.seen == [context.shape]

    def anew(x, t, y, context):
        return network(x, t, y, network.encode(context))

    always = forward_model(anew, SHAPE, render, context=context, steps=6, seed=2)
    assert len(network.seen) == 7
    assert torch.equal(once.x, always.x) and torch.equal(once.signal, always.signal)
    other = forward_model(
        network, SHAPE, render, context=-context, encode=network.encode, steps=6, seed=2
    )
    assert not torch.equal(other.x, once.x)


def test_law_of_signals_is_the_recursion_s():
    """The sampler's steps are affine in x: mean and covariance of its signals, propagated in
    float64, against those of many samples. With many steps the mean is the posterior's."""
    network, n, steps = Network(), 6000, 6
    context = draw(1, CONTEXT, seed=9)
    pull = network.encode(context)
    run = Run(lambda x, t, y: x, SHAPE, sampler=DDIM(eta=1.0), steps=steps, prediction="x0")
    mean, cov = torch.zeros(N).double(), torch.eye(N).double()
    for i in range(steps):
        alpha, sigma = run.alpha[i], run.sigma[i]
        a = A.double()
        precision = torch.eye(SIGNAL).double() + (alpha / sigma) ** 2 * a.T @ a
        inverse = (precision + B.double().T @ B.double() / TAU).inverse()
        gain, shift = alpha / sigma**2 * inverse @ a.T, inverse @ pull[0].double()
        s_mean, s_cov = gain @ mean + shift, gain @ cov @ gain.T
        row = run.rows[i].double()
        step = row[2] * torch.eye(N).double() + row[4] * a @ gain
        mean = step @ mean + row[4] * a @ shift
        cov = step @ cov @ step.T + row[7] ** 2 * torch.eye(N).double()

    class Fast(Network):
        def __call__(self, x, t, y, features):  # one matrix for all rows
            (alpha,), (sigma,) = levels(t[:1])
            a = A.double()
            precision = torch.eye(SIGNAL).double() + (alpha / sigma) ** 2 * a.T @ a
            inverse = (precision + B.double().T @ B.double() / TAU).inverse()
            found = alpha / sigma**2 * x.double().flatten(1) @ a + features.double()
            return (found @ inverse.T).to(x.dtype)

    found = forward_model(
        Fast(), (n, *SHAPE[1:]), render, context=context.expand(n, -1), encode=network.encode,
        sampler=DDIM(eta=1.0), steps=steps,
    )  # fmt: skip
    signal = found.signal.double()
    error = (s_cov.diagonal() / n).sqrt()
    assert ((signal.mean(0) - s_mean).abs() < 4.5 * error).all()
    assert (signal.T.cov() - s_cov).abs().max() < 5 * s_cov.diagonal().max() * math.sqrt(2 / n)
    one = network(draw(2, *SHAPE[1:]), torch.tensor([999.0, 400.0]), None, pull.expand(2, -1))
    assert torch.equal(one[:1], network(draw(2, *SHAPE[1:])[:1], torch.tensor([999.0]), None, pull))


def test_identity_is_plain_sampling():
    model = GaussianModel(draw(1, *SHAPE[1:]), torch.tensor(0.5), prediction="x0", classes=True)
    settings = dict(
        steps=5, sampler="dpmpp_2m", classes=torch.tensor([0, 0, 1]), guidance=2.0, seed=3
    )

    class Plain(torch.nn.Module):
        num_classes = model.num_classes

        def forward(self, x, t, y, features):
            assert features is None
            return model(x, t, y)

    found = forward_model(Plain(), SHAPE, lambda s, target: s, **settings)
    plain = samplers.sample(model, SHAPE, **settings)
    assert torch.equal(found.x, plain)
    assert found.signal.shape == SHAPE  # the conditional branch's


def test_guidance_by_context():
    """Of linear renders it is the render of guided signals; the signal is the conditional's."""
    network, context = Network(), draw(SHAPE[0], CONTEXT)
    null = torch.full((SHAPE[0], SIGNAL), math.nan)
    run = dict(context=context, encode=network.encode, steps=1, seed=2)
    found = forward_model(network, SHAPE, render, null=null, scale=3.0, **run)
    told = forward_model(network, SHAPE, render, **run)
    bare = forward_model(network, SHAPE, render, context=null, steps=1, seed=2)
    assert torch.equal(found.signal, told.signal)
    want = render(bare.signal + 3 * (told.signal - bare.signal))
    assert torch.allclose(found.x, want, atol=1e-5)
    same = forward_model(network, SHAPE, render, null=null, scale=1.0, **run)
    assert torch.equal(same.x, told.x)


def test_targets_and_nested_signals_follow_their_samples():
    """Class guidance calls the network with every sample twice: features and targets too."""

    class Scene(torch.nn.Module):
        num_classes = 2

        def forward(self, x, t, y, features):
            shade = features["shade"][:, None, None, None] + y.view(-1, 1, 1, 1)
            return {"map": 0.1 * x + shade, "pair": (x, features["shade"])}

    def scaled(signal, target):
        return signal["map"] * target[:, None, None, None]

    context, target = {"shade": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([0.5, 1.0, 2.0])
    settings = dict(classes=torch.tensor([0, 1, 1]), guidance=2.0, steps=3)
    seeds = torch.tensor([4, 5, 6])
    whole = forward_model(
        Scene(), SHAPE, scaled, context=context, target=target, seed=seeds, **settings
    )
    assert torch.equal(whole.signal["pair"][1], context["shade"])
    for b in range(3):
        s = slice(b, b + 1)
        alone = forward_model(
            Scene(), (1, *SHAPE[1:]), scaled, context={"shade": context["shade"][s]},
            target=target[s], seed=seeds[s], **settings | dict(classes=settings["classes"][s]),
        )  # fmt: skip
        assert torch.equal(whole.x[s], alone.x)


@torch.no_grad()
def test_network_may_be_accelerated():
    net = draw_weights(
        DiT(input_size=8, hidden_size=32, depth=4, num_heads=2, in_channels=2, num_classes=3)
    ).eval()

    class Told(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, y, features):
            return net(x, t, torch.zeros(len(x), dtype=torch.int64))[:, :2]

    renders = []

    def render(signal, target):
        renders.append(len(signal))
        return 2.0 * signal

    model, shape, found = Told(), (2, 2, 8, 8), {}
    plain = forward_model(model, shape, render, steps=12).x
    for interval in (1, 3):
        with fastdiff.accelerated(net, cache=fastdiff.cache.DeepCache(interval)):
            model._fastdiff = net._fastdiff  # where a run looks for it
            found[interval] = forward_model(model, shape, render, steps=12).x
            del model._fastdiff
    assert torch.allclose(plain, found[1], atol=1e-5)
    assert not torch.allclose(plain, found[3], atol=1e-4)
    assert renders == [2] * 36  # anew in every call


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(prediction="eps"), "prediction is 'eps', need 'x0'"),
        (dict(scale=2.0), "scale is 2.0 and null is None"),
        (dict(render=lambda s, t: s), r"render gives \[3, 7\], need \[3, 2, 3, 5\]"),
    ],
)
def test_bad_input(settings, words):
    settings = dict(render=render, context=draw(3, SIGNAL)) | settings
    with pytest.raises(ValueError, match=words):
        forward_model(Network(), SHAPE, steps=3, **settings)
