"""Lotus: one step, a function of the image alone (D) or of its noise channels too (G)."""

import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.methods.lotus import lotus
from fastdiff.models import DiT
from fastdiff.ops.fused_step import philox_normal
from fastdiff.samplers import DDIM
from fastdiff.samplers.run import START_STREAM
from fastdiff.testing import draw_weights, unchanged

IMAGE = (3, 3, 8, 12)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(image):
    return torch.nn.functional.avg_pool2d(image, 2).repeat(1, 2, 1, 1)[:, :4]


def decode(z):
    return torch.nn.functional.interpolate(z[:, :3], scale_factor=2.0)


class Network(torch.nn.Module):
    """Not linear, of 4 or 8 channels to 4; keeps what it was called with."""

    def __init__(self, channels=4):
        super().__init__()
        self.weight = torch.nn.Parameter(draw(4, channels, seed=2))
        self.calls = []

    def forward(self, x, t, task):
        self.calls.append((x, t, task))
        shift = 0.0 if task is None else task.sum(1)[:, None, None, None]
        y = (self.weight[:, :, None, None] * torch.tanh(x)[:, None]).sum(2)
        return y + shift + t[:, None, None, None] / 1000


STAGE = dict(encode=encode, decode=decode)


def test_is_one_call_at_the_noisy_end():
    network, image, task = Network(), draw(*IMAGE), draw(1, 4)
    with unchanged(image, task):
        found = lotus(network, image, task=task, **STAGE)
    ((x, t, told),) = network.calls
    assert torch.equal(x, encode(image)) and (t == 999).all() and t.shape == (3,)
    assert torch.equal(told, task.expand(3, 4))
    assert torch.equal(found, decode(network(x, t, told)))


def test_is_the_sampler_s_step_to_x0():
    network, image = Network(), draw(*IMAGE)
    found = lotus(network, image, **STAGE)
    plain = samplers.sample(network, encode(image), sampler=DDIM(), steps=1, prediction="x0")
    assert torch.equal(found, decode(plain))


def test_form_d_does_not_know_the_seed_nor_its_batch():
    network, image = Network(), draw(*IMAGE)
    found = lotus(network, image, seed=1, **STAGE)
    assert torch.equal(found, lotus(network, image, seed=2, **STAGE))
    for b in range(3):
        assert torch.equal(found[b : b + 1], lotus(network, image[b : b + 1], **STAGE))


@pytest.mark.parametrize("noise_first", [False, True])
def test_form_g_sees_noise_in_its_channels_alone(noise_first):
    network, image = Network(8), draw(*IMAGE)
    seeds = torch.tensor([3, 4, 5])
    run = dict(form="G", noise_first=noise_first, **STAGE)
    found = lotus(network, image, seed=seeds, **run)
    ((x, _, _),) = network.calls
    z, noise = (x[:, 4:], x[:, :4]) if noise_first else (x[:, :4], x[:, 4:])
    assert torch.equal(z, encode(image))
    drawn = philox_normal(z.shape, seeds, torch.zeros(3, dtype=torch.int64), 0, START_STREAM)
    assert torch.equal(noise, drawn)
    assert not torch.equal(found, lotus(network, image, seed=seeds + 1, **run))
    alone = lotus(network, image[1:2], seed=seeds[1:2], **run)
    assert torch.equal(found[1:2], alone)
    # Without weights on those channels noise does not come in anywhere else.
    with torch.no_grad():
        network.weight[:, slice(0, 4) if noise_first else slice(4, 8)] = 0
    blind = lotus(network, image, seed=1, **run)
    assert torch.equal(blind, lotus(network, image, seed=2, **run))


def test_an_encoder_that_draws_would_be_seen():
    """Form D is a function of the image only with the mean of the posterior."""
    network, image = Network(), draw(*IMAGE)

    def drawing(image):
        z = encode(image)
        return z + 0.1 * torch.randn_like(z)

    one, two = (lotus(network, image, encode=drawing, decode=decode) for _ in range(2))
    assert not torch.equal(one, two)


@torch.no_grad()
def test_caches_are_inert():
    net = draw_weights(
        DiT(input_size=8, hidden_size=32, depth=4, num_heads=2, in_channels=4, num_classes=3)
    ).eval()
    first, second = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=2)
    stage = dict(encode=lambda x: x, decode=lambda z: z)
    task = torch.tensor([1])
    plain = [lotus(net, x, task=task, **stage) for x in (first, second)]
    with fastdiff.accelerated(net, cache=fastdiff.cache.DeepCache(3)):
        with fastdiff.request(2, calls_per_step=None) as request:
            inside = [lotus(net, x, task=task, **stage) for x in (first, second)]
            assert not request.state  # nothing is kept of the first for the second
            fastdiff.sample(net, first, steps=1)
            assert request.state  # as plain sampling does
    for one, other in zip(plain, inside, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert (plain[0] - plain[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(form="X"), "form is 'X', need 'D' or 'G'"),
        (dict(steps=4), "steps is given"),
        (dict(guidance=2.0), "guidance is given"),
        (dict(task=draw(2, 4)), r"task is \[2, 4\], need \[3, ...\] or \[1, ...\]"),
        (dict(encode=lambda x: encode(x)[:, :3]), "need"),
    ],
)
def test_bad_input(settings, words):
    class Four(Network):
        def forward(self, x, t, task):
            return x[:, :1].repeat(1, 2, 1, 1)

    with pytest.raises(ValueError, match=words):
        lotus(Four(), draw(*IMAGE), **STAGE | settings)
