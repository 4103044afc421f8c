import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops.gelu_tanh import IMPLS, gelu_tanh, gelu_tanh_ref

SHAPES = [(rows, dim) for rows in testing.ROWS for dim in (1, 17, 64)] + [(2, 33, 1152), (5,)]


def eager(x, bias):
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_matches_float64(row, dtype):
    for shape in SHAPES:
        for with_bias in (False, True):
            x = (3 * torch.randn(shape)).to(dtype)
            bias = torch.randn(shape[-1]).to(dtype) if with_bias else None
            exact = gelu_tanh_ref(x.double(), None if bias is None else bias.double())
            with testing.unchanged(x, bias):
                got = gelu_tanh(x, bias, impl=row)
            testing.assert_close(got, exact, eager(x, bias), what=f"{row} {shape} {with_bias}")


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels.gelu_tanh import CONFIGS
    from fastdiff.kernels.gelu_tanh import gelu_tanh as launch

    x, bias = torch.randn(3, 300), torch.randn(300)
    for b in (None, bias):
        want = gelu_tanh_ref(x.double(), None if b is None else b.double())
        for name, got in testing.run_configs(launch, CONFIGS, x, b):
            testing.assert_close(got, want, eager(x, b), what=name)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_layouts(level, layout, dtype):
    x = testing.lay((3 * torch.randn(3, 65, 77)).to(dtype), layout)
    bias = testing.lay(torch.randn(77).to(dtype), layout)
    with testing.cpu_level(level):
        got = gelu_tanh(x, bias, impl="native")
    testing.assert_close(got, gelu_tanh_ref(x.double(), bias.double()), eager(x, bias))


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_special_values(level):
    x = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-30, -1e-30, 88.0, -88.0, 1e30])
    with testing.cpu_level(level):
        got = gelu_tanh(x, impl="native")
    torch.testing.assert_close(got, F.gelu(x, approximate="tanh"), equal_nan=True)


def test_opcheck_and_compile():
    x, bias = torch.randn(4, 33), torch.randn(33)
    torch.library.opcheck(torch.ops.fastdiff.gelu_tanh.default, (x, bias))
    testing.check_compile(gelu_tanh, x, bias)


def test_gradient_comes_from_the_reference():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu_tanh, (x, bias))
    why = fastdiff.explain(gelu_tanh, x.float(), bias.float())
    assert "no backward" in why["native"] and why["ref"] is None


@pytest.mark.parametrize(
    "x, bias, message",
    [
        ("no", None, "gelu_tanh: x is str, need a torch.Tensor"),
        (torch.ones(3, dtype=torch.int32), None, "x is torch.int32, need float16"),
        (torch.ones(()), None, r"x has shape \[\], need at least 1 dimensions"),
        (torch.ones(2, 3), torch.ones(4), r"bias has shape \[4\], need \[3\]"),
        (torch.ones(2, 3), torch.ones(3).half(), "bias is torch.float16, need torch.float32"),
        (torch.ones(2, 3), torch.ones(3, device="meta"), "bias is on meta, need cpu"),
    ],
)
def test_bad_input(x, bias, message):
    with pytest.raises(ValueError, match=message):
        gelu_tanh(x, bias)


def test_the_native_entry_checks_for_itself():
    op = torch.ops.fastdiff.gelu_tanh
    with pytest.raises(RuntimeError, match="need at least 1 dimension"):
        op(torch.ones(()), None)
    with pytest.raises(RuntimeError, match="bias has shape"):
        op(torch.ones(2, 4), torch.ones(2))
    with pytest.raises(RuntimeError, match="bias is"):
        op(torch.ones(2, 4), torch.ones(4).half())
