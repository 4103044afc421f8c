"""Diagonal state spaces: the FFT against sums and recurrences, and the spectrum that is kept."""

import copy

import pytest
import torch

from fastdiff import samplers
from fastdiff.methods.tsdiff import tsdiff
from fastdiff.models.s4 import S4D, TSDiff

H, N = 3, 4
LENGTHS = [1, 2, 7, 16, 33]


def layer(both_ways=True, seed=0):
    torch.manual_seed(seed)
    return S4D(H, N, both_ways=both_ways, low=0.05, high=0.5).double()


def direct(s4, u):
    """Sums over what was and what comes."""
    length = u.shape[2]
    k = s4.kernels(length)
    y = s4.d[:, None] * u
    for n in range(length):
        for m in range(length):
            if m <= n:
                y[..., n] += k[0, :, n - m] * u[..., m]
            elif s4.both_ways:
                y[..., n] += k[1, :, m - n - 1] * u[..., m]
    return y


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_fft_is_the_direct_sum(length, both_ways):
    s4, u = layer(both_ways), torch.randn(2, H, length).double()
    with torch.no_grad():
        assert torch.allclose(s4(u), direct(s4, u), atol=1e-12, rtol=0)


def test_convolution_is_the_recurrence():
    s4, u = layer(both_ways=False), torch.randn(2, H, 21).double()
    with torch.no_grad():
        step, cb = s4.system()
        state, y = torch.zeros(2, H, N, dtype=torch.complex128), []
        for n in range(21):
            state = step * state + u[..., n, None]
            y.append(2 * (cb[0] * state).sum(-1).real + s4.d * u[..., n])
        assert torch.allclose(s4(u), torch.stack(y, -1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("place", [0, 3, 8])
def test_impulses_answer_with_the_kernels_and_do_not_wrap(place):
    s4, length = layer(), 9
    u = torch.zeros(1, H, length).double()
    u[..., place] = 1
    with torch.no_grad():
        y, k = s4(u)[0] - s4.d[:, None] * u[0], s4.kernels(length)
    assert torch.allclose(y[:, place:], k[0, :, : length - place], atol=1e-13)
    assert torch.allclose(y[:, :place], k[1, :, :place].flip(-1), atol=1e-13)


def test_half_as_long_a_transform_would_be_seen():
    """With transforms of length L, the end runs into the beginning."""
    s4, u = layer(both_ways=False), torch.randn(1, H, 16).double()
    with torch.no_grad():
        short = torch.fft.irfft(torch.fft.rfft(u) * torch.fft.rfft(s4.kernels(16)[0]), n=16)
        assert (short + s4.d[:, None] * u - s4(u)).abs().max() > 1e-3


def test_zero_order_hold_is_the_exact_system():
    """A constant input ends in the fixed point ``-C / A`` of the continuous system."""
    s4 = layer(both_ways=False)
    with torch.no_grad():
        a = torch.complex(-s4.log_decay.exp(), s4.frequency)
        rest = -2 * (torch.view_as_complex(s4.c)[0] / a).sum(-1).real
        y = s4(torch.ones(1, H, 2000).double())[0, :, -1] - s4.d
    assert torch.allclose(y, rest, atol=1e-9)


def test_kept_spectrum_is_the_computed_one():
    s4, u = layer(), torch.randn(2, H, 9).double()
    with torch.no_grad():
        first = s4(u)
        kept = s4.spectrum(9)
        assert s4.spectrum(9) is kept and torch.equal(s4(u), first)
    assert torch.equal(s4(u).detach(), first)  # with gradients of weights it is computed


@pytest.mark.parametrize("name", ["log_dt", "log_decay", "frequency", "c"])
def test_writing_a_weight_forgets_the_spectrum(name):
    s4, u = layer(), torch.randn(2, H, 9).double()
    with torch.no_grad():
        before = s4(u)
        getattr(s4, name).add_(0.3)
        after = s4(u)
        assert not torch.equal(before, after)
        assert torch.allclose(after, direct(s4, u), atol=1e-12, rtol=0)


def test_other_weights_and_lengths():
    s4, other = layer(), layer(seed=1)
    with torch.no_grad():
        for length in (5, 9, 4, 9, 40):
            u = torch.randn(1, H, length).double()
            assert torch.allclose(s4(u), direct(s4, u), atol=1e-12, rtol=0)
        s4.load_state_dict(other.state_dict())
        u = torch.randn(1, H, 40).double()
        assert torch.equal(s4(u), other(u))
        twin = copy.deepcopy(s4).float()
        assert torch.allclose(twin(u.float()), s4(u).float(), atol=1e-5)


def test_gradients():
    s4 = layer()
    u = torch.randn(1, H, 5).double().requires_grad_()
    torch.autograd.gradcheck(s4, (u,))
    want = torch.autograd.grad(s4(u).square().sum(), [u, *s4.parameters()])
    assert all(bool(g.abs().sum() > 0) for g in want)
    s4.requires_grad_(False)  # the spectrum is kept: the gradient of the input is the same
    with torch.inference_mode():
        s4(u)
    got = torch.autograd.grad(s4(u).square().sum(), u)[0]
    assert s4._kept is not None and torch.allclose(got, want[0], atol=1e-13)


def test_training_steps_are_seen():
    s4, u = layer(), torch.randn(2, H, 9).double()
    with torch.no_grad():
        s4(u)
    optimizer = torch.optim.SGD(s4.parameters(), lr=0.1)
    s4(u).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.allclose(s4(u), direct(s4, u), atol=1e-12, rtol=0)


def network():
    torch.manual_seed(0)
    return TSDiff(2, hidden=8, depth=2, states=3).eval()


@pytest.mark.parametrize("length", [1, 11])
def test_network(length):
    net = network()
    x, t = torch.randn(3, 2, length), torch.tensor([10.0, 500.0, 999.0])
    with torch.no_grad():
        whole = net(x, t)
        assert whole.shape == x.shape and whole.std() > 0
        for b in range(3):
            part = slice(b, b + 1)
            assert (whole[part] - net(x[part], t[part])).abs().max() < 1e-6


def test_network_in_the_sampler_and_under_guidance():
    net, settings = network(), dict(steps=3, seed=1)
    plain = samplers.sample(net, (2, 2, 7), **settings)
    assert plain.isfinite().all()
    observed, mask = torch.ones(1, 2, 7), torch.arange(7).lt(4).expand(1, 1, 7)
    free = tsdiff(net, (2, 2, 7), observed, mask, scale=0.0, **settings)
    assert torch.equal(free, plain)
    trained = tsdiff(net, (2, 2, 7), observed, mask, scale=0.1, **settings)
    net.requires_grad_(False)  # spectra are kept from here on
    kept = tsdiff(net, (2, 2, 7), observed, mask, scale=0.1, **settings)
    assert net.blocks[0].s4._kept is not None
    # Not bit for bit: layers whose weights need no gradient may take other kernels.
    assert torch.allclose(kept, trained, rtol=1e-4) and not torch.allclose(kept, plain, rtol=1e-2)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: S4D(0), "channels is 0"),
        (lambda: S4D(2, low=0.2, high=0.1), "low and high are 0.2 and 0.1"),
        (lambda: S4D(2)(torch.zeros(1, 3, 4)), r"u is \[1, 3, 4\], need \[B, 2, L\]"),
        (lambda: network()(torch.zeros(1, 2, 0), torch.zeros(1)), r"x is \[1, 2, 0\]"),
        (lambda: network()(torch.zeros(1, 2, 4), torch.zeros(1), torch.zeros(1)), "y is given"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
