"""Noise-DA: levels by rows, conditions that get gradients, swaps and negatives."""

import math

import pytest
import torch
from torch import nn

from fastdiff.methods.noise_da import Drawn, drawn, noise_da_loss, q_sample, swapped
from fastdiff.train import linear_alpha_bar

SHAPE = (3, 2, 4, 6)


class Denoiser(nn.Module):
    """A small network of the rows and their levels, smooth and not symmetric in its conditions."""

    def __init__(self, channels=2):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Conv2d(3 * channels, 8, 3, padding=1)
        self.last = nn.Conv2d(8, channels, 3, padding=1)
        self.rows = []

    def forward(self, x, gamma):
        self.rows.append((x.detach(), gamma))
        return self.last(torch.tanh(self.first(x) + gamma.view(-1, 1, 1, 1)))


def pictures(dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=rng, dtype=torch.float64).to(dtype) for _ in range(5)]


def all_of(**more):
    y0, syn, real, syn_in, real_in = pictures()
    draw = drawn(y0, linear_alpha_bar(), seed=4)
    return Denoiser().double(), y0, syn, real, draw._replace(**more), (syn_in, real_in)


def test_q_sample_is_exact_in_every_row():
    y0, eps = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    gamma = torch.tensor([1.0, 0.0, 0.25, 0.9, 0.01])
    found = q_sample(y0, gamma, eps)
    for b in range(5):
        target = gamma[b].sqrt() * y0[b] + (1 - gamma[b]).sqrt() * eps[b]
        assert torch.equal(found[b], target)
        assert torch.equal(q_sample(y0[b : b + 1], gamma[b : b + 1], eps[b : b + 1])[0], found[b])
    assert torch.equal(found[0], y0[0]) and torch.equal(found[1], eps[1])
    one = q_sample(y0, gamma[:1].expand(5), eps)  # a level for the batch would be seen
    assert not torch.allclose(one[2:], found[2:], atol=1e-2)


def test_q_sample_has_its_moments():
    n, y0 = 40000, torch.full((40000, 2), 1.5).double()
    draw = drawn(y0, linear_alpha_bar(), seed=1)
    gamma = torch.full((n,), 0.3).double()
    found = q_sample(y0, gamma, draw.eps)
    assert ((found.mean(0) - 0.3**0.5 * 1.5).abs() < 4 * math.sqrt(0.7 / n)).all()
    assert ((found.var(0) - 0.7).abs() < 4 * 0.7 * math.sqrt(2 / n)).all()


def test_levels_fill_their_bins_and_swaps_are_even():
    n, alpha_bar = 40000, torch.tensor([0.9, 0.5, 0.1])
    draw = drawn(torch.zeros(n, 1, dtype=torch.float64), alpha_bar, seed=2)
    edges = [1.0, 0.9, 0.5, 0.1]
    for high, low in zip(edges, edges[1:], strict=False):
        inside = draw.gamma[(draw.gamma <= high) & (draw.gamma > low)]
        assert abs(len(inside) / n - 1 / 3) < 4 * math.sqrt(2 / 9 / n)
        width, middle = high - low, (high + low) / 2
        assert abs(inside.mean() - middle) < 4 * width / math.sqrt(12 * len(inside))
        assert inside.max() - inside.min() > 0.99 * width
    assert draw.gamma.min() >= 0.1 and draw.gamma.max() <= 1
    assert abs(draw.swap.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    both = torch.stack((draw.gamma, draw.swap.double(), draw.eps[:, 0]))
    assert (torch.corrcoef(both) - torch.eye(3)).abs().max() < 5 / math.sqrt(n)


def test_draws_depend_on_seed_and_step_alone():
    y0, seeds = torch.zeros(SHAPE), torch.tensor([3, 9, 27])
    whole = drawn(y0, linear_alpha_bar(), seeds, 5)
    for b in range(3):
        alone = drawn(y0[b : b + 1], linear_alpha_bar(), seeds[b : b + 1], 5)
        for one, many in zip(alone, whole, strict=True):
            assert torch.equal(one[0], many[b])
    assert not torch.equal(drawn(y0, linear_alpha_bar(), seeds, 6).eps, whole.eps)


def test_loss_written_out():
    model, y0, syn, real, draw, (syn_in, real_in) = all_of(swap=torch.tensor([True, False, True]))
    found = noise_da_loss(model, y0, syn, real, draw, inputs=(syn_in, real_in), margin=0.3)
    squares, hinges = [], []
    for b in range(3):
        one, gamma = slice(b, b + 1), draw.gamma[b : b + 1]
        y = gamma.sqrt() * y0[one] + (1 - gamma).sqrt() * draw.eps[one]
        pairs = [
            (syn[one], real[one]),
            (syn_in[one] + real[one] - real_in[one], real_in[one] + syn[one] - syn_in[one]),
        ]
        outs = [model(torch.cat((y, *(p[::-1] if draw.swap[b] else p)), 1), gamma) for p in pairs]
        near, far = ((o - draw.eps[one]).square().mean() for o in outs)
        squares.append(near)
        hinges.append((near.sqrt() - far.sqrt() + 0.3).clamp(min=0))
    assert torch.allclose(found.diffusion, sum(squares) / 3)
    assert torch.allclose(found.contrast, sum(hinges) / 3, atol=1e-10) and found.contrast > 0
    assert torch.allclose(found.total, (found.diffusion + found.contrast) / 2)
    assert len(model.rows[0][0]) == 6  # one call for both


@pytest.mark.parametrize("which", ["syn", "real"])
def test_gradient_of_a_condition_is_that_of_finite_differences(which):
    model, y0, syn, real, draw, inputs = all_of()
    given = {"syn": syn.requires_grad_(), "real": real.requires_grad_()}

    def value():
        return noise_da_loss(model, y0, given["syn"], given["real"], draw, inputs=inputs).total

    (g,) = torch.autograd.grad(value(), given[which])
    assert (g.flatten(1).abs().sum(1) > 0).all()
    for index in ((0, 1, 2, 3), (2, 0, 0, 5)):
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                given[which][index] += sign * 1e-5
                values.append(value())
                given[which][index] -= sign * 1e-5
        assert torch.allclose(g[index], (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-10)


def test_swapping_labels_changes_nothing_where_both_are_equal():
    model, y0, syn, _, draw, (syn_in, _) = all_of()
    on, off = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    found = [
        noise_da_loss(model, y0, syn, syn, draw._replace(swap=s), inputs=(syn_in, syn_in)).total
        for s in (on, off)
    ]
    assert torch.equal(*found)


def test_a_swap_is_an_exchange_of_the_conditions():
    model, y0, syn, real, draw, (syn_in, real_in) = all_of()
    on, off = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    there = noise_da_loss(
        model, y0, syn, real, draw._replace(swap=on), inputs=(syn_in, real_in)
    ).total
    here = noise_da_loss(
        model, y0, real, syn, draw._replace(swap=off), inputs=(real_in, syn_in)
    ).total
    assert torch.equal(there, here)
    other = noise_da_loss(model, y0, syn, real, draw._replace(swap=off)).total
    assert not torch.allclose(there, other)  # the denoiser is not symmetric
    assert torch.equal(swapped(syn, real, on), torch.cat((real, syn), 1))


def test_equal_residuals_make_negatives_of_the_positives():
    model, y0, syn, real, draw, (syn_in, _) = all_of()
    equal = (syn_in, real - (syn - syn_in))
    found = noise_da_loss(model, y0, syn, real, draw, inputs=equal, margin=0.7)
    assert torch.allclose(found.contrast, torch.tensor(0.7).double(), atol=1e-9)
    without = noise_da_loss(model, y0, syn, real, draw)
    assert without.contrast == 0 and torch.equal(without.total, without.diffusion / 2)


def test_a_restoration_network_learns_through_its_conditions():
    """The denoiser is frozen and knows y0 by the conditions alone: they move towards it."""
    y0 = pictures()[0]

    def denoiser(x, gamma):
        y, first, second = x.chunk(3, 1)
        level = gamma.view(-1, 1, 1, 1)
        return (y - level.sqrt() * (first + second) / 2) / (1 - level).sqrt()

    syn, real = (torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([syn, real], lr=0.1)
    for step in range(150):
        optimizer.zero_grad()
        draw = drawn(y0, torch.tensor([0.8, 0.4]), seed=0, step=step)
        draw = draw._replace(gamma=draw.gamma.clamp(max=0.8))  # weights gamma / (1 - gamma)
        noise_da_loss(denoiser, y0, syn, real, draw).total.backward()
        optimizer.step()
    assert ((syn + real) / 2 - y0).abs().mean() < 0.05 * y0.abs().mean()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(syn=torch.zeros(3, 2, 4, 5)), r"syn is \[3, 2, 4, 5\], need \[3, 2, 4, 6\]"),
        (dict(margin=-1.0), "margin is -1.0"),
        (dict(margin=math.nan), "margin is nan"),
        (dict(inputs=(torch.zeros(1), torch.zeros(1))), r"inputs\[0\] is \[1\]"),
        (dict(gamma=torch.ones(2)), r"draw.gamma is \[2\], need \[3\]"),
        (dict(denoiser=lambda x, g: x), r"denoiser gives \[6, 6, 4, 6\], need \[6, 2, 4, 6\]"),
    ],
)
def test_bad_input(change, words):
    model, y0, syn, real, draw, inputs = all_of()
    given = dict(denoiser=model, syn=syn, inputs=inputs, margin=1.0, gamma=draw.gamma) | change
    draw = Drawn(given["gamma"], draw.eps, draw.swap)
    with pytest.raises(ValueError, match=words):
        noise_da_loss(
            given["denoiser"], y0, given["syn"], real, draw,
            inputs=given["inputs"], margin=given["margin"],
        )  # fmt: skip
    with pytest.raises(ValueError, match="alpha_bar is torch.float32"):
        drawn(y0, torch.ones(2, 2))
