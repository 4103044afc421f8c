"""The CUDA kernels that aggregate models' features, in the model, against float64."""

import pytest
import torch

from fastdiff import testing_simt
from fastdiff.ops import aggregate_features, aggregate_features_backward
from fastdiff.testing import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# [K, B, C, P]: four elements at once and one, more channels than a block and than a warp hold, more
# positions than a block holds, as many models as there are, one.
SHAPES = ((3, 2, 8, 40), (2, 1, 70, 33), (4, 2, 133, 9), (16, 1, 5, 132), (1, 2, 3, 7))
MAPS = ("one", "each")


def inputs(shape, dtype, maps="one", inner=False, wide=False):
    x = torch.randn(shape)
    logits = 2 * torch.randn((*shape[:2], 1, *shape[3:]) if maps == "one" else shape)
    if inner:
        x, logits = (t.movedim(2, -1).contiguous().movedim(-1, 2) for t in (x, logits))
    return x.to(dtype), logits.to(torch.float32 if wide else dtype)


def compare(x, logits, mode=(0, False, False)):
    """Both ops in the model, and what they give."""
    grad = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(1)).to(x.dtype)
    with testing_simt.emulated(*mode):
        got = aggregate_features(x, logits, impl="native")
        grads = aggregate_features_backward(grad, x, logits, impl="native")
    exact = aggregate_features(x.double(), logits.double(), impl="ref")
    assert_close(got, exact, aggregate_features(x, logits, impl="ref"))
    exact = aggregate_features_backward(grad.double(), x.double(), logits.double(), impl="ref")
    plain = aggregate_features_backward(grad, x, logits, impl="ref")
    for a, e, p in zip(grads, exact, plain, strict=True):
        assert a.dtype == p.dtype
        assert_close(a, e, p, factor=3.0)
    return got, *grads


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype, maps):
    for inner in (False, True):
        x, logits = inputs(shape, dtype, maps, inner)
        got, *_ = compare(x, logits)
        if shape[0] == 1:
            assert torch.equal(got, x[0])
        compare(*inputs(shape, dtype, maps, inner, wide=True))


@pytest.mark.parametrize("maps", MAPS)
def test_strided_and_misaligned_models(maps):
    for inner in (False, True):
        many, logits = inputs((6, 4, 8, 40), torch.bfloat16, maps, inner)
        compare(many[::2, 1:3], logits[::2, 1:3])
        compare(many[:3], logits[:1].expand(3, *logits.shape[1:]))
    for odd in (False, True):  # samples, or only logits, off an address of four
        buffer = torch.randn(2 * 2 * 321)
        x = buffer.view(2, 2, 321)[..., 1:].unflatten(2, (8, 40))
        if odd:
            x = x.contiguous()
        rest = (1, 40) if maps == "one" else (8, 40)
        size = 2 * 2 * rest[0] * 40
        logits = torch.randn(size + 1)[1:].view(2, 2, *rest)
        compare(x, logits)
    rest = (1, 40) if maps == "one" else (8, 40)
    for strides in ((641, 320), (644, 321)):  # only the second model, only the second sample
        x = torch.randn(2000).as_strided((2, 2, 8, 40), (*strides, 40, 1))
        compare(x, torch.randn(2, 2, *rest))


@pytest.mark.parametrize("maps", MAPS)
def test_infinite_logits(maps):
    inf = torch.inf
    for inner in (False, True):
        x, logits = inputs((4, 2, 9, 40), torch.float32, maps, inner)
        logits[2] = inf
        with testing_simt.emulated():
            got = aggregate_features(x, logits, impl="native")
            grads = aggregate_features_backward(x[0], x, logits, impl="native")
        assert torch.equal(got, x[2]) and not grads[1].any()
        assert torch.equal(grads[0][2], x[0]) and not grads[0][[0, 1, 3]].any()
        logits[:, 1, :, 3] = -inf
        logits[1, 0, :, 5] = torch.nan
        with testing_simt.emulated():
            got = aggregate_features(x, logits, impl="native")
        assert got[1, :, 3].isnan().all() and got[0, :, 5].isnan().all()
        assert int(got.isnan().sum()) == 2 * 9


@pytest.mark.parametrize("inner", (False, True))
@pytest.mark.parametrize("maps", MAPS)
def test_same_bits_in_every_order(maps, inner):
    for shape in ((3, 2, 72, 36), (3, 1, 37, 33)):
        given = inputs(shape, torch.bfloat16, maps, inner)
        outputs = [compare(*given, mode) for mode in testing_simt.MODES]
        for other in outputs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))
