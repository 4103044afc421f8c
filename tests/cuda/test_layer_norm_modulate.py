"""The CUDA kernel of the norms, in the model, against float64."""

import pytest
import torch

from fastdiff import testing_simt
from fastdiff.ops import (
    gate_residual,
    gate_residual_norm_modulate,
    gate_residual_norm_quantize,
    layer_norm_modulate,
)
from fastdiff.testing import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Register-held rows of three sizes, one that is read again, one that is not a multiple of four.
DIMS = (64, 512, 1152, 2048, 2500, 37)


def inputs(dim, dtype, tokens=5, mean=0.0):
    x, y = torch.randn(2, 2, tokens, dim).to(dtype)
    gate, shift, scale = torch.randn(2, 3 * dim).to(dtype).chunk(3, 1)
    weight, bias = torch.randn(2, dim).to(dtype)
    return x + mean, y, gate, shift, scale, weight, bias


def compare(call, tensors, mode=(0, False, False)):
    """The op on ``tensors`` in the model: as near to float64 as the reference is."""
    with testing_simt.emulated(*mode):
        got = call(*tensors, impl="native")
    exact = call(*[None if t is None else t.double() for t in tensors], impl="ref")
    eager = call(*tensors, impl="ref")
    several = [(t,) if isinstance(t, torch.Tensor) else t for t in (got, exact, eager)]
    for g, e, r in zip(*several, strict=True):
        assert g.dtype == tensors[0].dtype
        assert_close(g, e, r)
    return several[0]


def norm(x, y, gate, shift, scale, weight, bias, **options):
    return layer_norm_modulate(x, shift, scale, weight=weight, bias=bias, **options)


def chain(x, y, gate, shift, scale, weight, bias, **options):
    return gate_residual_norm_modulate(
        x, y, gate, shift, scale, weight=weight, bias=bias, **options
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_against_float64(dim, dtype):
    tensors = inputs(dim, dtype)
    compare(norm, tensors)
    compare(chain, tensors)
    compare(lambda *t, impl: norm(*t, rms=True, impl=impl), tensors)
    compare(lambda *t, impl: gate_residual(*t[:3], impl=impl), tensors)
    compare(norm, (*tensors[:3], None, None, None, None))


def rounded(tensors, smooth, mode=(0, False, False)):
    with testing_simt.emulated(*mode):
        x, y, gate, shift, scale, weight, bias = tensors
        return gate_residual_norm_quantize(
            x, y, gate, shift, scale, weight=weight, bias=bias, smooth=smooth, impl="native"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_integers(dim, dtype):
    for smooth in (None, torch.rand(dim) + 0.5):
        tensors = inputs(dim, dtype)
        r, (values, scale, _) = rounded(tensors, smooth)
        exact = chain(*[t.double() for t in tensors], impl="ref")
        compare(lambda *t, impl: gate_residual(*t[:3], impl=impl), tensors)
        assert torch.equal(r, chain(*tensors, impl="ref")[0]) or dtype == torch.float32
        m = exact[1] if smooth is None else exact[1] / smooth.double()
        most = m.abs().amax(-1)
        torch.testing.assert_close(scale.double(), most / 127, rtol=1e-5, atol=0)
        away = (values * scale.double()[..., None] - m).abs()
        assert (away <= 0.5 * scale[..., None] + 1e-5 * most[..., None]).all()
        assert (values.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("dim", (64, 37))
def test_integers_of_rows_without_any(dim):
    x, y, gate, *_ = inputs(dim, torch.float32)
    x[0, 1], y[0, 1] = 2.0, 0.0
    x[0, 2, 3], x[1, 4, dim - 1] = torch.nan, -torch.inf
    want = None
    for mode in testing_simt.MODES:
        r, (values, scale, _) = rounded((x, y, gate, *[None] * 4), None, mode)
        broken = scale.isnan()
        assert broken.nonzero().tolist() == [[0, 2], [1, 4]] and not values[broken].any()
        assert scale[0, 1] == 0 and not values[0, 1].any()
        assert want is None or torch.equal(want, values)
        want = values


@pytest.mark.parametrize("dim", (96, 37))
def test_modulations_per_token_and_strided_inputs(dim):
    x, y, gate, shift, scale, weight, bias = inputs(dim, torch.float32)
    gate, shift, scale = torch.randn(3, *x.shape)
    wide = torch.randn(2, 5, 2 * dim)
    for view in (wide[..., :dim], wide[:, :, dim:], wide.transpose(0, 1)[:2, :, 1 : dim + 1]):
        tensors = (view, y[:, : view.shape[1]], gate[:, : view.shape[1]])
        tensors += (shift[:, : view.shape[1]], scale[:, : view.shape[1]], weight, bias)
        compare(chain, tensors)


def test_aligned_rows_of_a_dimension_that_is_no_multiple_of_four():
    x = torch.randn(2, 5, 64)[..., :37]
    compare(norm, (x, None, None, None, None, None, None))


def test_large_mean_does_not_cancel():
    compare(norm, inputs(512, torch.float32, mean=300.0)[:3] + (None,) * 4)


@pytest.mark.parametrize("dim", (512, 37))
def test_same_bits_in_every_order(dim):
    tensors = inputs(dim, torch.bfloat16)
    outputs = [compare(chain, tensors, mode) for mode in testing_simt.MODES]
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))
