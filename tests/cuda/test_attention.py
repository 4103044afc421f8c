"""The CUDA kernel of attention, in the model, against float64."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastdiff
from fastdiff import testing, testing_simt
from fastdiff.ops.attention import GroupBias, attention

DTYPES = (torch.bfloat16, torch.float16)
# Per key, full (rows with no key, rows whose first tile of keys is masked), by groups; ragged.
FEATURES = ("none", "full", "full32", "key", "key32", "group", "length", "index", "all")
# (B, S, T, D): tiles are of 64 keys (16 above D = 160) and 16 rows a warp.
SHAPES = ((1, 1, 1, 32), (2, 5, 0, 32), (2, 7, 77, 64), (1, 65, 131, 40))
EDGES = ((1, 16, 64, 48), (1, 33, 65, 72), (1, 32, 128, 88), (1, 17, 193, 128), (1, 9, 129, 160),
         (1, 65, 63, 80), (1, 129, 66, 96), (1, 21, 49, 256), (1, 18, 16, 200))  # fmt: skip
ODD_DIMS = (7, 20, 33, 100, 250)  # not a multiple of 8: element by element


def make(shape, dtype, feature="none", heads=2):
    """Arguments of one case."""
    batch, rows, keys, dim = shape
    q, k, v = (torch.randn(batch, heads, n, dim).to(dtype) for n in (rows, keys, keys))
    kwargs = {}
    if feature in ("full", "full32"):
        bias = torch.randn(batch, 1, rows, keys)
        bias[:, :, ::3, 1::2] = -torch.inf
        bias[:, :, 1::5] = -torch.inf
        bias[:, :, 2::5, :70] = -torch.inf
        kwargs["bias"] = bias if feature == "full32" else bias.to(dtype)
    if feature in ("key", "key32"):
        bias = torch.randn(1, heads, keys)
        bias[..., 2::5] = -torch.inf
        kwargs["bias"] = bias if feature == "key32" else bias.to(dtype)
    if feature in ("group", "all"):
        table = torch.randn(batch, heads, 3, 4)
        table[:, :, 1, 2] = table[:, 0, 2] = -torch.inf
        groups = torch.randint(3, (1, rows)), torch.randint(4, (batch, keys))
        kwargs["bias"] = GroupBias(*groups, table)
    if feature in ("length", "all"):
        kwargs["key_lengths"] = (torch.arange(batch) + (batch == 1)) * keys // max(batch, 2)
        for b, n in enumerate(kwargs["key_lengths"].tolist()):
            k[b, :, n:] = v[b, :, n:] = torch.nan  # which nobody reads
    if feature in ("index", "all"):
        kwargs["q_index"] = torch.randint(max(rows, 1), (batch, rows // 2 + 1))
    return (q, k, v), kwargs


def doubled(kwargs):
    bias, kwargs = kwargs.get("bias"), dict(kwargs)
    if isinstance(bias, GroupBias):
        kwargs["bias"] = bias._replace(table=bias.table.double())
    elif bias is not None:
        kwargs["bias"] = bias.double()
    return kwargs


def run(args, kwargs, mode=(0, False, False)):
    """out and log-sum-exp of the kernel, whose inputs stay as they were."""
    bias = kwargs.get("bias")
    inputs = [*args, *(kwargs.get(name) for name in ("key_lengths", "q_index", "q_starts"))]
    inputs += list(bias) if isinstance(bias, GroupBias) else [bias]
    with testing.unchanged(*inputs), testing_simt.emulated(*mode):
        return attention(*args, **kwargs, return_lse=True, impl="native")


def compare(args, kwargs, mode=(0, False, False), what=""):
    """The kernel is as near to float64 as the reference, which has one rounding, is twice over."""
    got = run(args, kwargs, mode)
    near = attention(*args, **kwargs, return_lse=True, impl="ref")
    wide = [t.double() for t in args]
    exact = attention(*wide, **doubled(kwargs), return_lse=True, impl="ref")
    assert got[0].dtype == args[0].dtype and got[1].dtype == torch.float32
    for name, g, e, n in zip(("out", "lse"), got, exact, near, strict=True):
        testing.assert_close(g, e, n, what=f"{name} {what}")
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_against_float64(feature, dtype):
    for shape in SHAPES:
        compare(*make(shape, dtype, feature), what=f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EDGES)
def test_head_dims_and_edges_of_tiles(shape, dtype):
    for feature in ("none", "all"):
        compare(*make(shape, dtype, feature, heads=1), what=feature)


@pytest.mark.parametrize("dim", ODD_DIMS)
def test_head_dims_that_are_no_multiple_of_eight(dim):
    for feature in ("none", "all"):
        compare(*make((2, 18, 70, dim), torch.float16, feature), what=feature)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    for feature in ("none", "full", "key32"):
        args, kwargs = make((2, 19, 67, 40), torch.bfloat16, feature)
        args = tuple(testing.lay(t, layout) for t in args)
        if feature != "none":
            kwargs["bias"] = testing.lay(kwargs["bias"], layout)
        compare(args, kwargs, what=f"{layout} {feature}")


def test_strided_inputs():
    packed = torch.randn(2, 67, 3, 2, 40).half()  # the projection of a fused q, k, v
    compare(tuple(packed.permute(2, 0, 3, 1, 4)), {}, what="packed")
    (q, k, v), _ = make((2, 19, 67, 40), torch.float16)
    compare((q, k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1)), {}, what="expanded")
    for i in range(3):  # one of the three at an odd address, or at odd strides
        for layout in ("misaligned", "sliced"):
            args = [
                testing.lay(t, layout if i == j else "contiguous") for j, t in enumerate((q, k, v))
            ]
            compare(args, {}, what=f"{layout} {i}")


def test_a_full_grid_has_blocks_of_eight_warps():
    testing_simt.counters()
    args, kwargs = make((2, 113, 65, 80), torch.bfloat16, "length", heads=64)
    run(args, kwargs)
    assert testing_simt.counters()["threads"] == 128 * 8 * 32
    compare(args, kwargs)


@pytest.mark.parametrize("scale", (0.0, -0.5, 8.0))
def test_scales(scale):
    """Among them one where nearly every tile brings a new maximum."""
    (q, k, v), _ = make((1, 20, 300, 64), torch.float16)
    k = k + torch.linspace(0, 3, 300).half()[:, None] * q[:, :, :1].sign()
    compare((q, k, v), {"scale": scale})


@pytest.mark.parametrize("shape", ((2, 70, 200, 64), (1, 34, 90, 20), (1, 40, 70, 256)))
def test_same_bits_in_every_order(shape):
    args, kwargs = make(shape, torch.bfloat16, "all")
    outputs = [run(args, kwargs, mode) for mode in testing_simt.MODES]
    compare(args, kwargs)
    for out, lse in outputs:
        assert torch.equal(out, outputs[0][0]) and torch.equal(lse, outputs[0][1])


@pytest.mark.parametrize("dim", (32, 48, 64, 80, 96, 128, 160, 256))
def test_tensor_cores_are_fed_without_bank_conflicts(dim):
    rows, keys = 32, 128
    args, _ = make((1, rows, keys, dim), torch.bfloat16, heads=1)
    testing_simt.counters()
    run(args, {})
    seen = testing_simt.counters()
    assert seen["bank_conflicts"] == 0
    assert seen["mma"] == 2 * (rows // 16) * (keys // 8) * (dim // 16)
    assert seen["ldmatrix"] == seen["mma"] // 2 + (rows // 16) * (dim // 16)
    assert seen["copies"] == (rows + 2 * keys) * dim // 8  # 16 bytes each, none twice


def test_non_finite_values():
    (q, k, v), kwargs = make((1, 20, 70, 64), torch.float16, "key32", heads=1)
    q[0, 0, 3, 5] = torch.nan
    compare((q, k, v), kwargs)  # one row
    v[0, 0, 2, 7] = torch.inf  # of a key that is masked: 0 * inf
    compare((q, k, v), kwargs)
    k[0, 0, 69, 0] = torch.inf
    compare((q, k, v), kwargs)


def test_what_lies_outside_is_not_read_and_gives_nan():
    """Indices are not checked, as on a GPU; the reference has them where they are inside."""
    far = torch.tensor([-1, 20, 2**62, -(2**63)])
    args, kwargs = make((2, 20, 70, 40), torch.bfloat16, "all")
    kwargs["key_lengths"][:] = 70
    args = tuple(t.nan_to_num() for t in args)
    for what in ("q_index", "query_group"):
        bad = dict(kwargs, q_index=torch.arange(20).repeat(2, 1))
        good, bias = compare(args, bad), bad["bias"]
        if what == "q_index":
            bad["q_index"] = bad["q_index"].clone()
            bad["q_index"][:, 3:7] = far
        else:
            group = bias.query_group.clone()
            group[:, 3:7] = far
            bad["bias"] = bias._replace(query_group=group)
        with testing.guarded(*args) as copies:
            got = run(tuple(copies), bad)
        for g, w in zip(got, good, strict=True):
            assert g[:, :, 3:7].isnan().all()
            assert torch.equal(g[:, :, :3], w[:, :, :3]) and torch.equal(g[:, :, 7:], w[:, :, 7:])


def test_lengths_and_key_groups_outside_give_nan():
    args, kwargs = make((2, 20, 70, 40), torch.bfloat16, "group")
    for length in (-1, 71, 2**40):
        out, lse = run(args, dict(kwargs, key_lengths=torch.tensor([length, 70])))
        assert out[0].isnan().all() and lse[0].isnan().all() and not lse[1].isnan().any()
    for group in (-1, 4, 2**62):
        key_group = kwargs["bias"].key_group.clone()
        key_group[1, 66] = group
        out, lse = run(args, {"bias": kwargs["bias"]._replace(key_group=key_group)})
        assert out[1].isnan().all() and lse[1].isnan().all() and not lse[0].isnan().any()


def make_packed(counts, keys, dim, dtype, feature="none", heads=2):
    """Packed queries of ``counts`` rows a sample."""
    (_, k, v), kwargs = make((len(counts), 1, keys, dim), dtype, feature, heads)
    q = torch.randn(1, sum(counts), heads, dim).to(dtype).transpose(1, 2)
    return (q, k, v), {**kwargs, "q_starts": torch.tensor([0, *counts]).cumsum(0)}


COUNTS = ((3, 0, 11, 1), (9,), (0, 65, 0), (0, 0), (33, 16, 17), (129, 1))
MANY = tuple(i % 4 * (i % 5) for i in range(70))  # more than a warp looks at at once


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", ("none", "key", "key32", "length"))
def test_packed_samples(feature, dtype):
    """Near float64, and to the bit what each sample is alone."""
    for counts in (*COUNTS, MANY):
        keys, dim = (17, 32) if counts == MANY else (67, 40)
        args, kwargs = make_packed(counts, keys, dim, dtype, feature)
        out, lse = compare(args, kwargs, what=f"{counts}")
        starts = kwargs.pop("q_starts").tolist()
        for b, n in enumerate(counts[:9]):
            one = {name: t if len(t) == 1 else t[b : b + 1] for name, t in kwargs.items()}
            at = slice(starts[b], starts[b] + n)
            rows = args[0][:, :, at], args[1][b : b + 1], args[2][b : b + 1]
            alone = run(rows, one)
            assert torch.equal(out[:, :, at], alone[0]) and torch.equal(lse[:, :, at], alone[1])


def test_packed_strides_and_orders():
    args, kwargs = make_packed((20, 0, 35), 67, 40, torch.float16, "length")
    for layout in testing.LAYOUTS:
        compare(tuple(testing.lay(t.nan_to_num(), layout) for t in args), kwargs, what=layout)
    outputs = [run(args, kwargs, mode) for mode in testing_simt.MODES]
    for out, lse in outputs:
        assert torch.equal(out, outputs[0][0]) and torch.equal(lse, outputs[0][1])


@pytest.mark.parametrize(
    "counts, blocks, warps",
    [((64,), 1, 4), ((32, 32), 3, 2), ((64, 0, 0, 0), 7, 1), ((1, 1, 1), 3, 1), ((0, 1, 0), 1, 1)],
)
def test_packed_samples_have_blocks_enough_and_few_more(counts, blocks, warps):
    args, kwargs = make_packed(counts, 17, 32, torch.bfloat16, heads=1)
    testing_simt.counters()
    run(args, kwargs)
    assert testing_simt.counters()["threads"] == blocks * warps * 32


def test_starts_outside_of_q_are_moved_to_its_ends():
    args, kwargs = make_packed((4, 5, 21), 40, 40, torch.bfloat16)
    want = run(args, {"q_starts": torch.tensor([0, 4, 30, 30])})
    for starts in ([-3, 4, 2**40, 2**62], [-(2**63), 4, 30, 0], [0, 4, 30, 2]):
        with testing.guarded(*args) as copies:
            got = run(tuple(copies), {"q_starts": torch.tensor(starts)})
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    # Rows that no sample has: any value.
    got = run(args, {"q_starts": torch.tensor([0, 4, 7, 7])})
    assert torch.equal(got[0][:, :, :7], want[0][:, :, :7])
    for starts in ([30, 30, 30, 30], [9, 0, 30, 0], [0, 30, 0, 30], [30, 0, 30, 0]):
        assert run(args, {"q_starts": torch.tensor(starts)})[0].shape == want[0].shape
    # Nor is a row past the end of its sample stored: those after 4 are the first sample's alone.
    q, k, v = args
    got = run(args, {"q_starts": torch.tensor([0, 30, 0, 4])})
    assert torch.equal(got[0][:, :, 4:], run((q, k[:1], v[:1]), {})[0][:, :, 4:])
    assert run((q, k[:0], v[:0]), {"q_starts": torch.tensor([3])})[0].shape == q.shape


def test_refusals():
    for dtype, dim in ((torch.float32, 32), (torch.bfloat16, 257)):
        args, _ = make((1, 3, 3, dim), dtype)
        with pytest.raises(RuntimeError, match=r"attention: the launch failed: .*\(801\)"):
            run(args, {})
    with FakeTensorMode():
        for dtype, dim, why in ((torch.float32, 32, "float32"), (torch.float16, 257, "257")):
            q = torch.empty(1, 1, 3, dim, dtype=dtype, device="cuda")
            assert why in fastdiff.explain(attention, q, q, q)["native"]
