import math

import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops.geglu import IMPLS, geglu, geglu_ref

SHAPES = [(rows, 2 * dim) for rows in testing.ROWS for dim in (1, 17, 64)] + [
    (2, 33, 2304),
    (34,),
    (3, 0),
]
# The interpreter takes about 10 ms a row: it is given fewer of them.
FEW = [(0, 34), (7, 34), (2, 3, 2304), (34,), (3, 0)]
APPROXIMATE = ("none", "tanh")


def eager(x, bias, approximate):
    h, g = (x if bias is None else x + bias).chunk(2, -1)
    return h * F.gelu(g, approximate=approximate)


def exact(x, bias, approximate):
    b = None if bias is None else bias.double()
    return geglu_ref(x.double(), b, approximate == "tanh")


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_matches_float64(row, dtype):
    for shape in FEW if row == "triton" else SHAPES:
        for with_bias in (False, True):
            for approximate in APPROXIMATE:
                x = (3 * torch.randn(shape)).to(dtype)
                if x.numel():
                    x.view(-1, 2, shape[-1] // 2)[0, :, 0] = 5  # bounds are relative to the largest
                bias = torch.randn(shape[-1]).to(dtype) if with_bias else None
                with testing.unchanged(x, bias):
                    got = geglu(x, bias, approximate=approximate, impl=row)
                assert got.is_contiguous()
                testing.assert_close(
                    got,
                    exact(x, bias, approximate),
                    eager(x, bias, approximate),
                    what=f"{row} {shape} {with_bias} {approximate}",
                )


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels.geglu import CONFIGS
    from fastdiff.kernels.geglu import geglu as launch

    x, bias = torch.randn(2, 600), torch.randn(600)
    for name, got in testing.run_configs(launch, CONFIGS, x, bias, False):
        testing.assert_close(got, exact(x, bias, "none"), eager(x, bias, "none"), what=name)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_layouts(level, layout, dtype):
    x = testing.lay((3 * torch.randn(3, 65, 154)).to(dtype), layout)
    bias = testing.lay(torch.randn(154).to(dtype), layout)
    for approximate in APPROXIMATE:
        with testing.cpu_level(level):
            got = geglu(x, bias, approximate=approximate, impl="native")
        testing.assert_close(got, exact(x, bias, approximate), eager(x, bias, approximate))


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_error_of_the_erf_form(level):
    """Absolute, as wherever Phi is computed as 1/2 + something; the ends saturate."""
    g = torch.linspace(-12.0, 12.0, 200_001)
    with testing.cpu_level(level):
        got = geglu(torch.cat((torch.ones_like(g), g)), impl="native").double()
    want = g.double() * torch.special.erfc(-g.double() / math.sqrt(2)) / 2
    error = (got - want).abs()
    assert error.max() <= 1e-6
    assert (error / want.abs().clamp_min(1e-30))[g.abs() < 2].max() <= 60 * 2.0**-24
    assert torch.equal(got[g > 6], g[g > 6].double()) and not got[g < -6].any()


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_special_values(level):
    inf, nan = torch.inf, torch.nan
    g = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e-30, -1e-30, 88.0, -88.0, 1e30])
    want = torch.tensor([0.0, -0.0, inf, nan, nan, 5e-31, -5e-31, 88.0, -0.0, 1e30])
    x = torch.cat((torch.ones_like(g), g))
    for approximate in APPROXIMATE:
        with testing.cpu_level(level):
            got = geglu(x, approximate=approximate, impl="native")
        torch.testing.assert_close(got, want, equal_nan=True, msg=approximate)


def test_opcheck_and_compile():
    x, bias = torch.randn(4, 66), torch.randn(66)
    for args in ((x, bias, False), (x, None, True)):
        torch.library.opcheck(torch.ops.fastdiff.geglu.default, args)
    testing.check_compile(geglu, x, bias)


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gradient_comes_from_the_reference(approximate):
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: geglu(x, b, approximate=approximate), (x, bias))
    why = fastdiff.explain(geglu, x.float(), bias.float())
    assert "no backward" in why["native"] and why["ref"] is None


@pytest.mark.parametrize(
    "x, bias, approximate, message",
    [
        ("no", None, "none", "geglu: x is str, need a torch.Tensor"),
        (torch.ones(2, dtype=torch.int32), None, "none", "x is torch.int32, need float16"),
        (torch.ones(()), None, "none", r"x has shape \[\], need at least 1 dimensions"),
        (torch.ones(2, 3), None, "none", r"x has shape \[2, 3\], need an even last dimension"),
        (torch.ones(2, 4), torch.ones(2), "none", r"bias has shape \[2\], need \[4\]"),
        (
            torch.ones(2, 4),
            torch.ones(4).half(),
            "none",
            "bias is torch.float16, need torch.float32",
        ),
        (torch.ones(2, 4), None, "erf", "approximate is 'erf', need 'none' or 'tanh'"),
    ],
)
def test_bad_input(x, bias, approximate, message):
    with pytest.raises(ValueError, match=message):
        geglu(x, bias, approximate=approximate)


def test_the_native_entry_checks_for_itself():
    op = torch.ops.fastdiff.geglu
    with pytest.raises(RuntimeError, match="need an even last dimension"):
        op(torch.ones(2, 3), None, False)
    with pytest.raises(RuntimeError, match="bias has shape"):
        op(torch.ones(2, 4), torch.ones(2), False)
    with pytest.raises(RuntimeError, match="bias is"):
        op(torch.ones(2, 4), torch.ones(4).half(), False)
