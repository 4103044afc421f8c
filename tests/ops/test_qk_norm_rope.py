import math

import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.kernels import AVAILABLE
from fastdiff.ops.qk_norm_rope import (
    IMPLS,
    axial_rope,
    qk_norm_rope,
    qk_norm_rope_ref,
    rope_table,
    row_args,
)

# (batch, heads of q, heads of k, length, dim, channels that turn)
SHAPES = [
    (2, 3, 3, 7, 64, 64),
    (1, 1, 1, 1, 2, 2),
    (2, 4, 1, 65, 72, 72),
    (1, 2, 2, 77, 40, 24),
    (2, 2, 2, 0, 64, 64),
    (0, 2, 2, 5, 64, 64),
    (1, 0, 2, 5, 16, 16),
    (1, 2, 3, 64, 128, 34),
    (2, 1, 1, 5, 17, 0),
]
FEW = [SHAPES[0], SHAPES[2], SHAPES[4], SHAPES[7], SHAPES[8]]  # for the interpreter


def make(shape, dtype, *, norm=True, rope=True, position=None):
    B, H, Hk, S, D, R = shape
    q, k = torch.randn(B, H, S, D).to(dtype), torch.randn(B, Hk, S, D).to(dtype)
    weights = [(1 + 0.3 * torch.randn(D)).to(dtype) if norm else None for _ in "qk"]
    cos = sin = None
    if rope:
        cos, sin = rope_table(torch.rand(S + 5, 1) * 100, (R,))
        if position is not None:
            position = torch.randint(0, S + 5, (position or B, S))
    else:
        position = None
    return q, k, *weights, {"cos": cos, "sin": sin, "position": position}


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def exact(q, k, q_weight, k_weight, tables, eps=1e-6, interleaved=True):
    args = [*map(wide, (q, k, q_weight, k_weight, *tables.values())), eps, interleaved]
    return qk_norm_rope_ref(*args)


def eager(q, k, q_weight, k_weight, tables, eps=1e-6, interleaved=True):
    """The usual model code: norm in float32 rounded to x's dtype, rotation in float32."""
    cos, sin, position = tables.values()
    if cos is not None:
        cos, sin = (
            t[: q.shape[2]] if position is None else t[position].unsqueeze(1) for t in (cos, sin)
        )

    def one(x, weight):
        if weight is not None:
            rms = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
            x = (x.float() * rms).to(x.dtype) * weight
        if cos is None:
            return x
        turned = 2 * cos.shape[-1]
        h, rest = x[..., :turned], x[..., turned:]
        if interleaved:
            z = torch.view_as_complex(h.float().unflatten(-1, (turned // 2, 2)).contiguous())
            h = torch.view_as_real(z * torch.complex(cos, sin)).flatten(-2)
        else:
            c, s = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
            a, b = h.float().chunk(2, -1)
            h = h * c + torch.cat((-b, a), -1) * s
        return torch.cat((h.to(x.dtype), rest), -1)

    return one(q, q_weight), one(k, k_weight)


def check(got, args, what, **kwargs):
    for name, g, e, t in zip(
        "qk", got, exact(*args, **kwargs), eager(*args, **kwargs), strict=True
    ):
        testing.assert_close(g, e, t, what=f"{what} {name}")


@pytest.mark.parametrize("interleaved", (True, False))
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_matches_float64(row, dtype, interleaved):
    for i, shape in enumerate(FEW if row == "triton" else SHAPES):
        for options in ({}, {"norm": False, "position": 1}, {"rope": False}, {"position": 0}):
            if row == "triton" and i and "rope" in options:
                continue
            args = make(shape, dtype, **options)
            *tensors, tables = args
            with testing.unchanged(*tensors, *tables.values()):
                got = qk_norm_rope(*tensors, **tables, interleaved=interleaved, impl=row)
            what = f"{row} {shape} {options} {interleaved}"
            check(got, args, what, interleaved=interleaved)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_every_triton_configuration():
    from fastdiff.kernels.qk_norm_rope import CONFIGS
    from fastdiff.kernels.qk_norm_rope import qk_norm_rope as launch

    args = make((1, 2, 1, 33, 24, 16), torch.float32, position=0)
    *tensors, tables = args
    rest = row_args(*tensors, **tables)
    for name, got in testing.run_configs(launch, CONFIGS, *rest):
        check(got, args, name)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels_and_layouts(level, layout, dtype):
    q, k, q_weight, k_weight, tables = make((2, 3, 2, 9, 72, 36), dtype, position=0)
    tensors = [testing.lay(t, layout) for t in (q, k, q_weight, k_weight)]
    tables["cos"], tables["sin"] = (testing.lay(tables[n], layout) for n in ("cos", "sin"))
    for interleaved in (True, False):
        with testing.cpu_level(level):
            got = qk_norm_rope(*tensors, **tables, interleaved=interleaved, impl="native")
        check(got, (*tensors, tables), f"{level} {layout}", interleaved=interleaved)


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_views_of_a_joint_projection(row):
    """q and k as a projection [B, S, 3 H D] leaves them: read in place, same order in memory."""
    qkv = torch.randn(2, 7, 3, 3, 16)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    args = (q, k, torch.randn(16), None, make((2, 3, 3, 7, 16, 16), torch.float32)[-1])
    got = qk_norm_rope(*args[:4], **args[4], impl=row)
    check(got, args, row)
    for t in got:
        assert t.transpose(1, 2).is_contiguous()
    for t in qk_norm_rope(q.contiguous(), k.contiguous(), impl=row):
        assert t.is_contiguous()


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_a_subset_of_tokens_keeps_its_positions(row):
    q, k, q_weight, k_weight, tables = make((2, 2, 2, 12, 32, 32), torch.float32)
    tables.pop("position")
    chosen = torch.tensor([[11, 0, 5], [1, 1, 7]])
    index = chosen[:, None, :, None].expand(2, 2, 3, 32)
    whole = qk_norm_rope(q, k, q_weight, k_weight, **tables, impl=row)
    part = qk_norm_rope(
        q.gather(2, index), k.gather(2, index), q_weight, k_weight,
        **tables, position=chosen, impl=row,
    )  # fmt: skip
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a.gather(2, index), b, rtol=0, atol=0)


@pytest.mark.parametrize("row", ("native", "ref"))
def test_a_position_out_of_range_is_an_error(row):
    q, k, _, _, tables = make((1, 2, 2, 3, 8, 8), torch.float32)
    for bad in (-1, 8):
        tables["position"] = torch.tensor([[0, bad, 1]])
        with pytest.raises(ValueError, match=f"position has value {bad}, need 0 to 7"):
            qk_norm_rope(q, k, **tables, impl=row)


@pytest.mark.skipif(not AVAILABLE, reason="needs triton")
def test_a_position_out_of_range_gives_nan_in_triton():
    q, k, _, _, tables = make((1, 1, 1, 3, 8, 6), torch.float32)
    tables["position"] = torch.tensor([[0, 9, -1]])
    got, _ = qk_norm_rope(q, k, **tables, impl="triton")
    assert got[0, 0, 0].isfinite().all()
    assert got[0, 0, 1:, :6].isnan().all() and torch.equal(got[..., 6:], q[..., 6:])


def test_positions_matter_by_their_difference_only():
    cos, sin = rope_table(torch.arange(40)[:, None], (16,))
    q, k = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()
    for interleaved in (True, False):
        score = []
        for a, b in ((0, 7), (32, 39)):
            tables = {"cos": cos, "sin": sin, "interleaved": interleaved}
            qa, _ = qk_norm_rope(q, k, **tables, position=torch.tensor([[a]]))
            _, kb = qk_norm_rope(q, k, **tables, position=torch.tensor([[b]]))
            score.append((qa * kb).sum())
        torch.testing.assert_close(*score, rtol=1e-6, atol=1e-6)


def test_axial_rope_is_rows_then_columns():
    cos, sin = axial_rope(3, 5, 8, theta=100.0)
    assert cos.shape == sin.shape == (15, 4) and cos.dtype == torch.float32
    for row, column in ((0, 0), (2, 4), (1, 3)):
        angles = [row, row / 10, column, column / 10]
        want = torch.tensor([math.cos(a) for a in angles])
        torch.testing.assert_close(cos[row * 5 + column], want)
    assert axial_rope(0, 5, 8)[0].shape == (0, 4) and axial_rope(2, 2, 0)[0].shape == (4, 0)


def test_rope_table_takes_a_time_axis_of_its_own_width():
    ids = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4))
    cos, sin = rope_table(ids, (16, 56, 56))
    assert cos.shape == (24, 64)
    torch.testing.assert_close(cos[:, 8:36], rope_table(ids[:, 1:2], (56,))[0])
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(24, 64))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: axial_rope(2, 2, 6), "axial_rope: dim is 6, need a multiple of 4"),
        (lambda: axial_rope(-1, 2, 8), "axial_rope: height is -1, need a number of tokens"),
        (lambda: axial_rope(1, 2, 8, theta=0.0), "theta is 0.0, need a finite number above 0"),
        (lambda: rope_table(torch.ones(4, 2), (8,)), r"position has shape \[4, 2\], need \[P, 1\]"),
        (lambda: rope_table(torch.ones(4, 1), (7,)), "dims has 7, need even numbers"),
    ],
)
def test_bad_tables(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_opcheck_and_compile():
    q, k, q_weight, k_weight, tables = make((2, 3, 1, 5, 16, 8), torch.float32, position=1)
    rest = [*tables.values(), 1e-6]
    op = torch.ops.fastdiff.qk_norm_rope.default
    torch.library.opcheck(op, (q, k, q_weight, None, *rest, True))
    swapped = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(op, (swapped, k, None, None, None, None, None, 1e-6, False))
    testing.check_compile(qk_norm_rope, q, k, q_weight, k_weight, **tables)


@pytest.mark.parametrize("interleaved", (True, False))
def test_gradient_comes_from_the_reference(interleaved):
    q, k, q_weight, k_weight, tables = make((1, 2, 1, 3, 6, 4), torch.float64, position=1)
    leaves = [t.requires_grad_() for t in (q, k, q_weight, k_weight)]
    assert torch.autograd.gradcheck(
        lambda *a: qk_norm_rope(*a, **tables, interleaved=interleaved), leaves
    )
    why = fastdiff.explain(qk_norm_rope, *[t.float() for t in leaves], **tables)
    assert "no backward" in why["native"] and why["ref"] is None


Q = torch.ones(2, 3, 5, 8)
COS = torch.ones(5, 4)
I64 = torch.int64


@pytest.mark.parametrize(
    "args, tables, message",
    [
        (("no", Q), {}, "qk_norm_rope: q is str, need a torch.Tensor"),
        ((Q[0], Q), {}, r"q has shape \[3, 5, 8\], need 4 dimensions"),
        ((Q, Q.half()), {}, "k is torch.float16, need torch.float32, the dtype of q"),
        ((Q, Q[:, :, :4]), {}, r"k has shape \[2, 3, 4, 8\], need \[2, 3, 5, 8\]"),
        ((Q, Q, torch.ones(7)), {}, r"q_weight has shape \[7\], need \[8\]"),
        ((Q, Q), {"cos": COS}, "cos is given and sin is None, need both or neither"),
        ((Q, Q), {"cos": COS, "sin": COS[:, :3]}, r"sin has shape \[5, 3\], need \[5, 4\]"),
        ((Q, Q), {"cos": COS[:4], "sin": COS[:4]}, "need at least S = 5 rows or a position"),
        (
            (Q, Q),
            {"cos": torch.ones(5, 5), "sin": torch.ones(5, 5)},
            "need at most D/2 = 4 columns",
        ),
        ((Q, Q), {"cos": COS.half(), "sin": COS}, "cos is torch.float16, need torch.float32"),
        ((Q, Q), {"position": torch.zeros(1, 5, dtype=I64)}, "need cos and sin as well"),
        (
            (Q, Q),
            {"cos": COS, "sin": COS, "position": torch.zeros(3, 5, dtype=I64)},
            r"position has shape \[3, 5\], need \[2, 5\] or \[1, 5\]",
        ),
        (
            (Q, Q),
            {"cos": COS, "sin": COS, "position": torch.zeros(1, 5)},
            "position is torch.float32, need torch.int64",
        ),
        ((Q, Q), {"eps": 0.0}, "eps is 0.0, need a finite number above 0"),
    ],
)
def test_bad_input(args, tables, message):
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*args, **tables)


def test_the_native_entry_checks_for_itself():
    op = torch.ops.fastdiff.qk_norm_rope
    none = (None, None)
    with pytest.raises(RuntimeError, match="k has shape"):
        op(Q, Q[:, :, :4], *none, *none, None, 1e-6, True)
    with pytest.raises(RuntimeError, match="need at least 5 rows or a position"):
        op(Q, Q, *none, COS[:4], COS[:4], None, 1e-6, True)
    with pytest.raises(RuntimeError, match="need at most 4 columns"):
        op(Q, Q, *none, torch.ones(5, 5), torch.ones(5, 5), None, 1e-6, True)
    with pytest.raises(RuntimeError, match="sin has shape"):
        op(Q, Q, *none, COS, COS[:, :2], None, 1e-6, True)
    with pytest.raises(RuntimeError, match="position has shape"):
        op(Q, Q, *none, COS, COS, torch.zeros(2, 4, dtype=I64), 1e-6, True)
    with pytest.raises(RuntimeError, match="q_weight has shape"):
        op(Q, Q, torch.ones(7), None, *none, None, 1e-6, True)
