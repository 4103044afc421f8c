"""Layers with few trainable entries: gradients, what they keep, and taps on others' layers."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdiff import testing
from fastdiff.ops import (
    SparseIndex,
    sparse_grad_conv2d,
    sparse_grad_linear,
    sparse_grad_tap,
)

OP = testing.load_file(Path(__file__).parent / "ops" / "test_sparse_grad.py")
KERNELS, PICTURES, G, X, INDEX, CONV = (
    OP.KERNELS, OP.PICTURES, OP.G, OP.X, OP.INDEX, OP.CONV,
)  # fmt: skip
mask_of, whole, pictures, check, check_conv = (
    OP.mask_of, OP.whole, OP.pictures, OP.check, OP.check_conv,
)  # fmt: skip


def grads_of(out, towards, *leaves):
    return torch.autograd.grad(out, leaves, towards)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", [(9, 24), (2, 11, 24), (2, 3, 5, 24), (1, 24), (0, 24), (24,)])
def test_a_full_index_is_autograd_of_the_plain_layer_to_the_bit(shape, dtype):
    for bias in (torch.randn(40).to(dtype).requires_grad_(), None):
        x = torch.randn(shape).to(dtype).requires_grad_()
        weight = (torch.randn(40, 24) / 5).to(dtype).requires_grad_()
        index = SparseIndex.of_mask(torch.ones(40, 24, dtype=torch.bool))
        values = index.take(weight.detach()).float().requires_grad_()
        y = sparse_grad_linear(x, weight, bias, values, index)
        plain = F.linear(x, weight, bias)
        towards = torch.randn(plain.shape).to(dtype)
        others = [t for t in (x, bias) if t is not None]
        got, want = grads_of(y, towards, values, *others), grads_of(plain, towards, weight, *others)
        assert torch.equal(y, plain) and got[0].dtype == torch.float32
        assert torch.equal(got[0].view(40, 24), want[0].float())
        assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))
        assert weight.grad is None


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", PICTURES[1:], ids=str)
def test_a_full_index_is_autograd_of_the_plain_convolution_to_the_bit(case, last):
    for dtype in testing.DTYPES:
        towards, x, weight, how = pictures(case, dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        x, weight = x.requires_grad_(), weight.requires_grad_()
        bias = torch.randn(case[4]).to(dtype).requires_grad_()
        index = SparseIndex.of_mask(torch.ones(weight.shape, dtype=torch.bool))
        values = index.take(weight.detach()).requires_grad_()
        y = sparse_grad_conv2d(x, weight, bias, values, index, **how)
        plain = F.conv2d(x, weight, bias, **how)
        got = grads_of(y, towards, values, x, bias)
        want = grads_of(plain, towards, weight, x, bias)
        assert torch.equal(y, plain) and torch.equal(got[0].view(weight.shape), want[0])
        assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", KERNELS)
def test_layers_at_few_positions(row, dtype):
    """Of a linear layer and a convolution: values' gradients near float64's, all others as they
    are without positions."""
    x, weight, bias = torch.randn(2, 7, 24), torch.randn(40, 24) / 5, torch.randn(40)
    x, weight, bias = (t.to(dtype).requires_grad_() for t in (x, weight, bias))
    index = SparseIndex.of_mask(mask_of((40, 24), 0.1))
    values = index.take(weight.detach()).float().requires_grad_()
    y = sparse_grad_linear(x, weight, bias, values, index, impl=row)
    towards = torch.randn(2, 40, 7).to(dtype).transpose(1, 2)  # not contiguous
    got = grads_of(y, towards, values, x, bias)
    want = grads_of(F.linear(x, weight, bias), towards, x, bias)
    check(got[0], towards.reshape(-1, 40), x.detach().view(-1, 24), index, row)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want, strict=True))

    towards, x, weight, how = pictures(PICTURES[4], dtype)
    x.requires_grad_()
    index = SparseIndex.of_mask(mask_of(weight.shape, 0.1))
    values = index.take(weight).float().requires_grad_()
    y = sparse_grad_conv2d(x, weight, None, values, index, **how, impl=row)
    got = grads_of(y, towards, values, x)
    check_conv(got[0], towards, x.detach(), index, how, row)
    assert torch.equal(got[1], grads_of(F.conv2d(x, weight, **how), towards, x)[0])


def test_gradients_of_gradients():
    weight, bias = torch.randn(5, 4).double(), torch.randn(5).double()
    for index in (
        SparseIndex.of_mask(mask_of((5, 4), 0.4)),
        SparseIndex.of_rows(whole(1, 4), (5, 4)),
        SparseIndex.of_mask(torch.ones(5, 4, dtype=torch.bool)),
    ):
        values = index.take(weight).requires_grad_()
        x, to = torch.randn(3, 4).double(), torch.randn(3, 5).double()
        x.requires_grad_(), to.requires_grad_()

        def gradient(x, to, index=index, values=values):
            y = sparse_grad_linear(x, weight, bias, values, index)
            return torch.autograd.grad(y, (values, x), to, create_graph=True)

        assert torch.autograd.gradcheck(gradient, (x, to))
    x, to = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 2, 4, 5).double()
    weight = torch.randn(2, 3, 3, 3).double()
    index = SparseIndex.of_mask(mask_of(weight.shape, 0.2))
    values = index.take(weight).requires_grad_()
    x.requires_grad_(), to.requires_grad_()

    def of_conv(x, to):
        y = sparse_grad_conv2d(x, weight, None, values, index, padding=1)
        return torch.autograd.grad(y, values, to, create_graph=True)

    assert torch.autograd.gradcheck(of_conv, (x, to))


def tapped(layer, values, index):
    """``layer`` with its gradient at ``index``, by a hook."""
    how = {}
    if isinstance(layer, nn.Conv2d):
        how = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    return layer.register_forward_hook(
        lambda _, args, y: sparse_grad_tap(y, args[0], values, index, **how)
    )


def model():
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, "valid"), nn.SiLU(), nn.Flatten(2), nn.Linear(9, 6)
    )
    layers[0].padding = (1, 1)
    return layers


def taps_on(net):
    """Hooks on both layers of a frozen ``net``: their values and indices."""
    found = []
    for layer in (net[0], net[3]):
        index = SparseIndex.of_mask(mask_of(layer.weight.shape, 0.3))
        values = index.take(layer.weight.detach()).requires_grad_()
        tapped(layer, values, index)
        found.append((layer, values, index))
    return found


def test_a_tap_on_frozen_layers():
    """By hooks, over two batches, with and without checkpoints, and under autocast."""
    net, free = model(), model()
    free.load_state_dict(net.state_dict())
    taps = taps_on(net.requires_grad_(False))
    batches = [torch.randn(2, 3, 6, 6) for _ in range(2)]
    for autocast in (False, True):
        for through in (lambda x: net(x), lambda x: checkpoint(net, x, use_reentrant=False)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for x in batches:
                    y, plain = through(x), free(x)
                    assert torch.equal(y, plain)
                    y.float().square().sum().backward()
                    plain.float().square().sum().backward()
            for (_, values, index), layer in zip(taps, (free[0], free[3]), strict=True):
                want = index.take(layer.weight.grad)
                assert values.grad.dtype == torch.float32
                tolerance = 0.02 * want.abs().max() if autocast else 1e-5 * want.abs().max()
                torch.testing.assert_close(values.grad, want, rtol=0, atol=tolerance.item())
                values.grad = None
            free.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_autocast_takes_x_as_the_layer_does():
    """A float32 x counts as rounded to the dtype of y: to the bit what a bfloat16 x gives."""
    x, weight = torch.randn(9, 24), torch.randn(40, 24)
    index = SparseIndex.of_mask(mask_of((40, 24), 0.1))
    to = torch.randn(9, 40).bfloat16()
    found = []
    for given in (x, x.bfloat16()):
        values = index.take(weight).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = sparse_grad_linear(given, weight, None, values, index)
        assert y.dtype == torch.bfloat16
        found += grads_of(y, to, values)
    assert torch.equal(*found) and found[0].dtype == torch.float32


def test_a_tap_without_gradients_is_nothing():
    x, y = torch.randn(3, 4), torch.randn(3, 5)
    index = SparseIndex.of_mask(mask_of((5, 4), 0.5))
    values = torch.zeros(index.values_shape)
    assert sparse_grad_tap(y, x, values, index) is y
    with torch.no_grad():
        assert sparse_grad_tap(y, x, values.requires_grad_(), index) is y


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_entries_take_no_product():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    for index in (
        SparseIndex.of_mask(torch.zeros(5, 4, dtype=torch.bool)),
        SparseIndex.of_rows(whole(), (5, 4)),
    ):
        for row in (None, *KERNELS):
            values = index.take(weight).requires_grad_()
            y = sparse_grad_linear(x, weight, None, values, index, impl=row)
            with Seen() as seen:
                (got,) = grads_of(y.sum(), None, values)
            assert got.shape == index.values_shape and got.numel() == 0
            if index.block == (1, 1):
                assert not seen.names & {"mm", "addmm", "bmm", "mul", "einsum"}


def allocations(profile):
    """Bytes of every block that torch's allocator gave away, in C++ too."""
    found, left = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        found.append(getattr(event.extra_fields, "alloc_size", 0))
    return found


@pytest.mark.parametrize("row", KERNELS)
def test_nothing_as_large_as_the_weight_is_made(row):
    """Of a backward, nor kept for it: x and the index are all."""
    side = 256 if row == "triton" else 1152  # the interpreter is slow
    x, weight = torch.randn(40, side), torch.randn(side, side)
    index = SparseIndex.of_mask(torch.rand(side, side) < 0.01)
    values = index.take(weight).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = sparse_grad_linear(x, weight, None, values, index, impl=row)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, index.crow, index.col)}
    to = torch.randn(y.shape)
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        (got,) = grads_of(y, to, values)
    made = allocations(profile)
    assert 4 * index.count <= max(made) < weight.nbytes // 2
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as control:
        to.t() @ x
    assert max(allocations(control)) >= weight.nbytes
    check(got, to, x, index, row)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(y=G[:5]), r"y has shape \[5, 4\], need \[6, 4\]"),
        (dict(x=X[:, :3]), r"x has shape \[6, 3\], need \[6, 5\]"),
        (dict(values=X), r"values has shape \[6, 5\], need \[20\]"),
        (dict(values=[1.0]), "values is list, need a torch.Tensor"),
        (dict(y=G.to("meta")), "y is on meta, need cpu, the device of x"),
        (dict(index=3), "index is int, need a SparseIndex"),
        (dict(index=CONV), r"x has shape \[6, 5\], need 4 dimensions"),
    ],
)
def test_bad_taps(call, message):
    with pytest.raises(ValueError, match=f"sparse_grad_tap: {message}"):
        sparse_grad_tap(**{"y": G, "x": X, "values": torch.ones(20), "index": INDEX, **call})


def test_bad_layers():
    values = torch.ones(20)
    with pytest.raises(
        ValueError, match=r"sparse_grad_linear: weight has shape \[5, 5\], need \[4"
    ):
        sparse_grad_linear(X, torch.ones(5, 5), None, values, INDEX)
    with pytest.raises(ValueError, match=r"sparse_grad_conv2d: x has shape \[2, 6, 6, 6\], need"):
        sparse_grad_conv2d(torch.ones(2, 6, 6, 6), torch.ones(4, 3, 3, 3), None, values, CONV)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        sparse_grad_linear(X, torch.ones(4, 5), None, values.requires_grad_(), INDEX).add_(1)
