"""The CUDA kernel of group norm and SiLU, in the model, against float64."""

import pytest
import torch

from fastdiff import testing_simt
from fastdiff.ops import group_norm_silu
from fastdiff.testing import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (shape, groups): quads, channels of one group that are no multiple of four, odd positions; work
# for every warp of a block.
CASES = (
    ((1, 32, 16, 16), 2),
    ((2, 64, 8, 8), 32),
    ((2, 96, 5, 7), 32),
    ((1, 64, 3, 4), 8),
    ((2, 128, 9), 4),
)


def compare(x, groups, mode=(0, False, False), **parameters):
    with testing_simt.emulated(*mode):
        got = group_norm_silu(x, groups, impl="native", **parameters)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in parameters.items()}
    exact = group_norm_silu(x.double(), groups, impl="ref", **wide)
    assert got.dtype == x.dtype and got.stride() == x.stride()
    assert_close(got, exact, group_norm_silu(x, groups, impl="ref", **parameters))
    return got


def parameters(x):
    C = x.shape[1]
    weight, bias = torch.randn(2, C).to(x.dtype)
    shift, scale = torch.randn(x.shape[0], 2 * C).to(x.dtype).chunk(2, 1)
    return {"weight": weight, "bias": bias, "shift": shift, "scale": scale}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), CASES)
@pytest.mark.parametrize("channels_last", (False, True))
def test_against_float64(shape, groups, channels_last, dtype):
    x = torch.randn(shape).to(dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    compare(x, groups)
    compare(x, groups, **parameters(x))
    compare(x, groups, silu=False, **parameters(x))


def test_large_mean_does_not_cancel():
    compare(torch.randn(2, 64, 8, 8) + 300, 8)


@pytest.mark.parametrize("channels_last", (False, True))
def test_same_bits_in_every_order(channels_last):
    x = torch.randn(1, 64, 8, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    given = parameters(x)
    outputs = [compare(x, 32, mode, **given) for mode in testing_simt.MODES]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
