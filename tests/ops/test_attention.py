import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import testing
from fastdiff.ops.attention import IMPLS, GroupBias, attention

ROWS = testing.rows_of(IMPLS)
HEAD_DIMS = (32, 40, 64, 72, 80, 88, 96, 128, 160)
FEATURES = ("none", "full", "key", "group", "length", "index", "all")


def make(shape, dtype, feature="none", heads=2, seed=0):
    """Arguments of one case: ``shape`` is (batch, queries, keys, head dim)."""
    batch, rows, keys, dim = shape
    gen = torch.Generator().manual_seed(seed)
    randn = lambda *size: torch.randn(*size, generator=gen)  # noqa: E731
    q, k, v = (randn(batch, heads, n, dim).to(dtype) for n in (rows, keys, keys))
    kwargs = {}
    if feature == "full":
        kwargs["bias"] = randn(batch, 1, rows, keys).to(dtype)
        kwargs["bias"][:, :, ::3, 1::2] = -torch.inf
    if feature == "key":
        kwargs["bias"] = randn(1, heads, keys).to(dtype)
        kwargs["bias"][..., 2::5] = -torch.inf
    if feature in ("group", "all"):
        table = randn(batch, heads, 3, 4)
        table[:, :, 1, 2] = -torch.inf
        kwargs["bias"] = GroupBias(
            torch.randint(3, (1, rows), generator=gen),
            torch.randint(4, (batch, keys), generator=gen),
            table.double() if dtype == torch.float64 else table,
        )
    if feature in ("length", "all"):
        kwargs["key_lengths"] = (torch.arange(batch) * keys) // max(batch - 1, 1)
    if feature in ("index", "all"):
        kwargs["q_index"] = torch.randint(max(rows, 1), (batch, rows // 2), generator=gen)
    return (q, k, v), kwargs


def cast(args, kwargs, dtype):
    bias = kwargs.get("bias")
    kwargs = dict(kwargs)
    if isinstance(bias, GroupBias):
        kwargs["bias"] = bias._replace(table=bias.table.to(dtype))
    elif bias is not None:
        kwargs["bias"] = bias.to(dtype)
    return tuple(t.to(dtype) for t in args), kwargs


def eager(args, kwargs):
    """Plain torch in the dtype of the arguments, over a bias laid out in full."""
    q, k, v = args
    bias, lengths, index = (kwargs.get(n) for n in ("bias", "key_lengths", "q_index"))
    mask = q.new_zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if isinstance(bias, GroupBias):
        for b in range(q.shape[0]):
            rows, cols = (g[b % len(g)] for g in bias[:2])
            mask[b] += bias.table[b % len(bias.table)][:, rows][:, :, cols].to(mask.dtype)
    elif bias is not None:
        mask = mask + (bias[:, :, None] if bias.dim() == 3 else bias).to(mask.dtype)
    if lengths is not None:
        for b, n in enumerate(lengths.tolist()):
            mask[b, :, :, n:] = -torch.inf
    if index is not None:
        pick = index[:, None, :, None]
        q = q.gather(2, pick.expand(-1, q.shape[1], -1, q.shape[3]))
        mask = mask.gather(2, pick.expand(-1, q.shape[1], -1, mask.shape[3]))
    if q.numel() == 0 or k.shape[2] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    scale = kwargs.get("scale") or q.shape[-1] ** -0.5
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    score = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale + mask.to(wide)
    return out, score.logsumexp(-1)


def check(row, args, kwargs, what="", scale=None):
    kwargs = {**kwargs, "scale": scale}
    exact, exact_lse = eager(*cast(args, kwargs, torch.float64))
    near, near_lse = eager(args, kwargs)
    bias = kwargs.get("bias")
    inputs = [*args, kwargs.get("key_lengths"), kwargs.get("q_index")]
    inputs += list(bias) if isinstance(bias, GroupBias) else [bias]
    with testing.unchanged(*inputs):
        if row == "torch":
            got = attention(*args, **kwargs, impl=row)
        else:
            got, lse = attention(*args, **kwargs, return_lse=True, impl=row)
            assert lse.dtype == torch.float32
            testing.assert_close(lse, exact_lse, near_lse, what=f"lse {row} {what}")
    assert got.dtype == args[0].dtype
    testing.assert_close(got, exact, near, what=f"{row} {what}")


def usable(row, args, kwargs):
    return row != "torch" or fastdiff.explain(attention, *args, **kwargs)["torch"] is None


SHAPES = [(1, 0, 5, 32), (0, 3, 5, 32), (2, 5, 0, 32), (1, 1, 1, 32)]
SHAPES += [(2, 7, 77, 64), (1, 65, 131, 40)]
# The interpreter of triton walks tiles in Python: fewer and smaller cases.
BIG = [(1, 13, 1152, 72), (2, 129, 64, 64), (1, 300, 257, 48), (1, 48, 128, 32), (1, 49, 129, 32)]


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_matches_float64(row, dtype):
    for shape in SHAPES + (BIG if row != "triton" else []):
        for feature in FEATURES:
            args, kwargs = make(shape, dtype, feature)
            if usable(row, args, kwargs):
                check(row, args, kwargs, f"{shape} {feature}")


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("row", ROWS)
def test_head_dims(row, dim):
    for dtype in testing.DTYPES:
        args, kwargs = make((1, 33, 70, dim), dtype, heads=3)
        if row == "triton" and dtype == torch.float32 and dim > 128:
            assert f"head dimension {dim} is above 128" in fastdiff.explain(attention, *args)[row]
            continue
        check(row, args, kwargs, f"{dim} {dtype}")


@pytest.mark.parametrize("dim", (1, 7, 384, 512, 960))
@pytest.mark.parametrize("row", ROWS)
def test_other_head_dims(row, dim):
    args, kwargs = make((1, 9, 66, dim), torch.float32, heads=1)
    if fastdiff.explain(attention, *args)[row] is None:
        check(row, args, kwargs, f"{dim}")


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_layouts(row, dtype, layout):
    for feature in ("full", "key", "none"):
        args, kwargs = make((2, 19, 37, 40), dtype, feature)
        args = tuple(testing.lay(t, layout) for t in args)
        if feature != "none":
            kwargs["bias"] = testing.lay(kwargs["bias"], layout)
        check(row, args, kwargs, f"{layout} {feature}")
    packed = torch.randn(2, 19, 3, 2, 40).to(dtype)  # the projection of a fused q, k, v
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    check(row, (q, k, v), {}, "packed")


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_levels(level, dtype):
    with testing.cpu_level(level):
        for shape in SHAPES + BIG:
            for feature in FEATURES:
                check("native", *make(shape, dtype, feature), f"{level} {shape} {feature}")
        for dim in (1, 7, *HEAD_DIMS, 384):
            check("native", *make((2, 50, 33, dim), dtype), f"{level} {dim}")


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_reads_and_writes_nothing_outside(level, dtype):
    for dim, keys in ((40, 37), (7, 129), (64, 8)):
        for feature in FEATURES:
            args, kwargs = make((2, 19, keys, dim), dtype, feature)
            exact, _ = eager(*cast(args, kwargs, torch.float64))
            bias = kwargs.get("bias")
            table = bias.table if isinstance(bias, GroupBias) else bias
            spare = args[0][:0] if table is None else table
            with testing.cpu_level(level), testing.guarded(*args, spare) as (q, k, v, spare):
                if isinstance(bias, GroupBias):
                    kwargs["bias"] = bias._replace(table=spare)
                elif bias is not None:
                    kwargs["bias"] = spare
                got = attention(q, k, v, **kwargs, impl="native")
            testing.assert_close(got, exact, eager(args, kwargs)[0], what=f"{dim} {keys} {feature}")


@pytest.mark.parametrize("feature", ("none", "key", "group", "length"))
def test_memory_is_linear_in_the_lengths(feature):
    rows, dim = 3000, 32
    args, kwargs = make((1, rows, rows, dim), torch.float32, feature, heads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            attention(*args, **kwargs, impl="native")
    finally:
        torch.set_num_threads(before)
    taken = sum(max(e.cpu_memory_usage, 0) for e in profile.events() if e.name == "aten::empty")
    # K and V repacked, biases and group ids, the outputs; then the tiles, which do not grow
    assert 0 < taken < 4 * (4 * rows * dim + 8 * rows) + 2**18 < 4 * rows * rows / 10


@pytest.mark.parametrize("threads", (1, 2, 3, 7))
def test_threads_split_rows_without_a_trace(threads):
    before = torch.get_num_threads()
    args, kwargs = make((3, 171, 140, 40), torch.float32, "all")
    want = attention(*args, **kwargs, return_lse=True, impl="native")
    torch.set_num_threads(threads)
    try:
        got = attention(*args, **kwargs, return_lse=True, impl="native")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("row", ROWS)
def test_scale_bias_dtypes_and_broadcasts(row):
    for scale in (0.0, -0.5, 3.0):
        check(row, make((1, 5, 40, 32), torch.float32)[0], {}, f"scale {scale}", scale or 1e-30)
    q = k = v = torch.randn(2, 3, 9, 32)
    for shape in ((1, 1, 9, 9), (2, 3, 9, 9), (1, 3, 9), (2, 1, 9), (2, 3, 1, 9)):
        check(row, (q, k, v), {"bias": torch.randn(shape)}, f"{shape}")
        spread = torch.randn(1, *shape[1:]).expand(2, *shape[1:])
        check(row, (q, k, v), {"bias": spread}, f"expanded {shape}")
        half = tuple(t.bfloat16() for t in (q, k, v))
        if row != "torch":
            check(row, half, {"bias": torch.randn(shape)}, f"float32 bias {shape}")


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_masked_rows_and_large_scores(row, dtype):
    args, _ = make((1, 6, 40, 32), dtype)
    bias = torch.zeros(1, 1, 6, 40, dtype=dtype)
    bias[..., 2, :] = -torch.inf
    bias[..., 3, :39] = -torch.inf
    bias[..., 4, 1:] = -torch.inf
    check(row, args, {"bias": bias}, "masked")
    assert attention(*args, bias=bias, impl=row)[:, :, 2].eq(0).all()
    q, k, v = args
    check(row, (q * 60, k * 60, v), {}, "large scores")
    check(row, (q * 0, k, v), {}, "uniform")


@pytest.mark.parametrize("row", ROWS)
def test_nan_reaches_the_rows_that_read_it(row):
    (q, k, v), _ = make((2, 21, 50, 40), torch.float32)
    base = attention(q, k, v, impl=row)
    bad = q.clone()
    bad[0, 1, 3, 7] = torch.nan
    got = attention(bad, k, v, impl=row)
    assert got[0, 1, 3].isnan().all()
    got[0, 1, 3] = base[0, 1, 3]
    assert torch.equal(got, base)
    bad = k.clone()
    bad[1, 0, 44, 0] = torch.nan
    got = attention(q, bad, v, impl=row)
    assert got[1, 0].isnan().all() and torch.equal(got[0], base[0])
    bad = v.clone()
    bad[1, 0, 3, 5] = torch.nan
    got = attention(q, k, bad, impl=row)
    assert got[1, 0, :, 5].isnan().all() and got.isnan().sum() == 21
    for value in (torch.inf, -torch.inf):
        bad = q.clone()
        bad[0, 0, 0, 0] = value
        assert attention(bad, k, v, impl=row)[0, 0, 0].isnan().all()
        assert torch.equal(attention(bad, k, v, impl=row)[0, 0, 1:], base[0, 0, 1:])


@pytest.mark.parametrize("row", [r for r in ROWS if r != "torch"])
def test_keys_past_the_length_are_not_read(row):
    (q, k, v), _ = make((2, 9, 50, 40), torch.float32)
    lengths = torch.tensor([0, 17])
    clean, clean_lse = attention(q, k, v, key_lengths=lengths, return_lse=True, impl=row)
    for t in (k, v):
        t[0] = torch.nan
        t[1, :, 17:] = torch.nan
    got, lse = attention(q, k, v, key_lengths=lengths, return_lse=True, impl=row)
    assert torch.equal(got, clean) and torch.equal(lse, clean_lse)
    assert got[0].eq(0).all() and lse[0].eq(-torch.inf).all() and lse[1].isfinite().all()


def test_partial_attentions_combine_by_their_lse():
    (q, k, v), _ = make((1, 8, 60, 64), torch.float32)
    whole = attention(q, k, v)
    halves = (slice(25), slice(25, 60))
    parts = [attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in halves]
    weight = torch.stack([lse for _, lse in parts]).softmax(0)[..., None]
    torch.testing.assert_close((weight * torch.stack([o for o, _ in parts])).sum(0), whole)


def test_gradient():
    (q, k, v), kwargs = make((2, 4, 5, 3), torch.float64, "all")
    for t in (q, k, v, kwargs["bias"].table):
        t.requires_grad_()

    def run(q, k, v, table):
        bias = kwargs["bias"]._replace(table=table)
        rest = {n: kwargs[n] for n in ("key_lengths", "q_index")}
        return attention(q, k, v, bias=bias, return_lse=False, **rest)

    assert torch.autograd.gradcheck(run, (q, k, v, kwargs["bias"].table))
    assert torch.autograd.gradcheck(attention, (q, k, v))
    q32 = q.detach().float().requires_grad_()
    why = fastdiff.explain(attention, q32, k.float(), v.float())
    for row in set(ROWS) & {"native", "triton"}:
        assert "no backward" in why[row]
    assert why["torch"] is None and why["ref"] is None


def test_compile_and_opcheck():
    args, kwargs = make((2, 9, 33, 40), torch.float32, "all")
    testing.check_compile(attention, *args, **kwargs, return_lse=True)
    testing.check_compile(attention, *args)
    if "native" in ROWS:
        rest = (kwargs["key_lengths"], kwargs["q_index"], None)
        op = torch.ops.fastdiff.attention.default
        torch.library.opcheck(op, (*args, 0.1, None, *kwargs["bias"], *rest))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in args]
        bias = GroupBias(*(mode.from_tensor(t) for t in kwargs["bias"]))
        rest = {n: mode.from_tensor(kwargs[n]) for n in ("key_lengths", "q_index")}
        for row in ROWS:
            if row in ("native", "ref"):
                out = attention(*fake, bias=bias, **rest, impl=row)
                assert out.shape == (2, 2, 4, 40)


# Query rows of samples: none, one, around the tiles of the rows of the table (16 to 128 rows).
COUNTS = ((3, 0, 11, 1), (9,), (0, 33, 0), (0, 0), (97, 2), (1, 16, 17, 49), (1,) * 37)
PACKED = ("none", "key", "length")


def make_packed(counts, dtype, feature="none", keys=37, dim=40, heads=2):
    """The same with packed queries: each sample's alone, and all of them in one call."""
    (_, k, v), kwargs = make((len(counts), 1, keys, dim), dtype, feature, heads)
    gen = torch.Generator().manual_seed(1)
    q = torch.randn(1, heads, sum(counts), dim, generator=gen).to(dtype)
    alone, start = [], 0
    for b, n in enumerate(counts):
        one = {name: t if len(t) == 1 else t[b : b + 1] for name, t in kwargs.items()}
        alone.append(((q[:, :, start : start + n], k[b : b + 1], v[b : b + 1]), one))
        start += n
    starts = torch.tensor([0, *counts]).cumsum(0)
    return alone, (q, k, v), {**kwargs, "q_starts": starts}


def joined(fn, alone):
    """out and log-sum-exp of samples alone, packed."""
    found = [fn(args, kwargs) for args, kwargs in alone]
    return tuple(torch.cat(parts, 2) for parts in zip(*found, strict=True))


def run(row):
    return lambda args, kw: attention(*args, **kw, return_lse=True, impl=row)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", [r for r in ROWS if r != "torch"])
def test_packed_samples(row, dtype):
    """Each over its own keys, near float64, and to the bit what it is alone."""
    for counts in COUNTS if row != "triton" else COUNTS[:4]:
        for feature in PACKED:
            alone, args, kwargs = make_packed(counts, dtype, feature)
            with testing.unchanged(*args, *kwargs.values()):
                got = run(row)(args, kwargs)
            near, exact = (
                joined(eager, alone),
                joined(lambda a, k: eager(*cast(a, k, torch.float64)), alone),
            )
            for name, *tensors in zip(("out", "lse"), got, exact, near, strict=True):
                testing.assert_close(*tensors, what=f"{name} {row} {counts} {feature}")
            if row != "ref":  # whose products are of other shapes
                assert got[0].transpose(1, 2).is_contiguous()
                same = zip(got, joined(run(row), alone), strict=True)
                assert all(torch.equal(a, b) for a, b in same), f"{row} {counts} {feature}"


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("row", [r for r in ROWS if r != "torch"])
def test_packed_layouts(row, layout):
    _, args, kwargs = make_packed((3, 0, 20), torch.float32, "key")
    want = run(row)(args, kwargs)
    kwargs["bias"] = testing.lay(kwargs["bias"], layout)
    kwargs["q_starts"] = torch.stack([kwargs["q_starts"]] * 2, 1)[:, 0]
    got = run(row)(tuple(testing.lay(t, layout) for t in args), kwargs)
    projected = args[0].permute(0, 2, 1, 3).repeat(1, 1, 3, 1)  # q of a fused q, k, v
    views = projected[:, :, :2].transpose(1, 2), *(t[:1].expand(3, -1, -1, -1) for t in args[1:])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
    whole = run(row)(tuple(t.contiguous() for t in views), kwargs)
    assert all(torch.equal(a, b) for a, b in zip(run(row)(views, kwargs), whole, strict=True))


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_packed_levels_threads_and_memory(level):
    before = torch.get_num_threads()
    for dtype in testing.DTYPES:
        for dim in (40, 7):  # float32 rows in place, and repacked
            alone, args, kwargs = make_packed((5, 0, 99, 1), dtype, "length", dim=dim)
            with testing.cpu_level(level), testing.guarded(*args, kwargs["q_starts"]) as copies:
                want = joined(run("native"), alone)
                kwargs["q_starts"] = copies.pop()
                for threads in (1, 2, 7):
                    torch.set_num_threads(threads)
                    try:
                        got = run("native")(copies, kwargs)
                    finally:
                        torch.set_num_threads(before)
                    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_packed_gradient():
    _, (q, k, v), kwargs = make_packed((2, 0, 1), torch.float64, "key", keys=4, dim=3)
    kwargs["bias"][kwargs["bias"] == -torch.inf] = 0.0
    inputs = [t.requires_grad_() for t in (q, k, v, kwargs.pop("bias"))]
    fn = lambda q, k, v, bias: attention(q, k, v, bias=bias, **kwargs)  # noqa: E731
    assert torch.autograd.gradcheck(fn, inputs)


def test_packed_compile_and_opcheck():
    _, args, kwargs = make_packed((5, 12), torch.float32, "length")
    testing.check_compile(attention, *args, **kwargs, return_lse=True)
    testing.check_compile(attention, *args, **kwargs, impl="ref")
    rest = (*[None] * 4, kwargs["key_lengths"], None, kwargs["q_starts"])
    if "native" in ROWS:
        torch.library.opcheck(torch.ops.fastdiff.attention.default, (*args, 0.1, *rest))


def test_starts_outside_of_q_are_moved_to_its_ends():
    """Of the triton row, as on a GPU, whose values nobody looks at."""
    _, args, kwargs = make_packed((4, 5, 3), torch.float32)
    want = run("triton")(args, {"q_starts": torch.tensor([0, 4, 12, 12])})
    for starts in ([-3, 4, 2**40, 2**62], [-(2**63), 4, 12, 0]):
        got = run("triton")(args, {"q_starts": torch.tensor(starts)})
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got = run("triton")(args, {"q_starts": torch.tensor([0, 4, 7, 7])})  # rows past the last: any
    assert torch.equal(got[0][:, :, :7], want[0][:, :, :7])


Q = torch.ones(2, 3, 4, 8)
STARTS = torch.tensor([0, 1, 4])
GROUPS = GroupBias(torch.zeros(2, 4).long(), torch.zeros(1, 4).long(), torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": 3}, "attention: q is int, need a torch.Tensor"),
        ({"q": Q[0]}, r"q has shape \[3, 4, 8\], need 4 dimensions"),
        ({"k": Q.half()}, "k is torch.float16, need torch.float32, the dtype of q"),
        ({"k": Q[:, :1]}, r"k has shape \[2, 1, 4, 8\], need \[2, 3, 4, 8\]"),
        ({"v": Q[:, :, :3]}, r"v has shape \[2, 3, 3, 8\], need \[2, 3, 4, 8\]"),
        ({"v": Q.to("meta")}, "v is on meta, need cpu"),
        ({"q": Q[..., :0], "k": Q[..., :0], "v": Q[..., :0]}, "need a head dimension above 0"),
        ({"scale": float("nan")}, "scale is nan, need a finite number"),
        ({"bias": Q[0, 0]}, r"bias has shape \[4, 8\], need \[2 or 1, 3 or 1, 4, 4\] \(full\)"),
        ({"bias": torch.ones(2, 3, 5)}, r"bias has shape \[2, 3, 5\]"),
        ({"bias": torch.ones(3, 3, 4)}, r"bias has shape \[3, 3, 4\]"),
        ({"bias": torch.ones(2, 3, 4, 4).bool()}, "bias is torch.bool, need float16"),
        ({"bias": torch.ones(2, 3, 4, 4).half()}, "bias is torch.float16, need torch.float32"),
        ({"bias": GROUPS._replace(query_group=Q[0, 0])}, "bias.query_group is torch.float32"),
        ({"bias": GROUPS._replace(key_group=torch.zeros(2, 5).long())}, r"key_group has shape"),
        ({"bias": GROUPS._replace(table=torch.zeros(1, 2, 1, 1))}, "bias.table has shape"),
        ({"bias": GROUPS._replace(table=torch.zeros(1, 1, 1, 1).half())}, "bias.table is torch.fl"),
        ({"key_lengths": torch.ones(3).long()}, r"key_lengths has shape \[3\], need \[2\]"),
        ({"key_lengths": torch.ones(2)}, "key_lengths is torch.float32, need torch.int64"),
        ({"q_index": torch.ones(3, 2).long()}, r"q_index has shape \[3, 2\], need \[2, rows\]"),
        (
            {"q_starts": STARTS},
            r"q has shape \[2, 3, 4, 8\], need \[1, 3, rows of all samples, 8\]",
        ),
        ({"q": Q[:1], "q_starts": [0, 1, 4]}, "q_starts is list, need a torch.Tensor"),
        ({"q": Q[:1], "q_starts": STARTS.int()}, "q_starts is torch.int32, need torch.int64"),
        ({"q": Q[:1], "q_starts": STARTS.to("meta")}, "q_starts is on meta, need cpu"),
        ({"q": Q[:1], "q_starts": STARTS[:2]}, r"q_starts has shape \[2\], need \[3\]"),
        ({"q": Q[:1], "q_starts": STARTS[None]}, r"q_starts has shape \[1, 3\], need \[3\]"),
        ({"q": Q[:1], "q_starts": STARTS, "k": Q[:, :1]}, r"k has shape .* need \[2, 3, 4, 8\]"),
        ({"q": Q[:1], "q_starts": STARTS, "v": Q[:1]}, r"v has shape .* need \[2, 3, 4, 8\]"),
        ({"q": Q[:1], "q_starts": STARTS, "bias": GROUPS}, "bias is a GroupBias, need one per key"),
        ({"q": Q[:1], "q_starts": STARTS, "bias": Q[..., :4]}, r"bias has .*, 4\] \(per key\) wh"),
        ({"q": Q[:1], "q_starts": STARTS, "q_index": STARTS[None]}, "q_index is given, need none"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**{"q": Q, "k": Q, "v": Q, **change})


@pytest.mark.parametrize("row", [r for r in ROWS if r in ("native", "ref")])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"key_lengths": torch.tensor([-1, 2])}, "key_lengths has value -1, need 0 to 4"),
        ({"key_lengths": torch.tensor([1, 5])}, "key_lengths has value 5, need 0 to 4"),
        ({"q_index": torch.tensor([[0], [4]])}, "q_index has value 4, need 0 to 3"),
        ({"q_index": torch.tensor([[-7], [0]])}, "q_index has value -7, need 0 to 3"),
        (
            {"bias": GROUPS._replace(query_group=torch.ones(1, 4).long())},
            "bias.query_group has value 1, need 0 to 0",
        ),
        (
            {"bias": GROUPS._replace(key_group=-torch.ones(2, 4).long())},
            "bias.key_group has value -1, need 0 to 0",
        ),
        ({"q": Q[:1], "q_starts": torch.tensor([1, 2, 4])}, "q_starts begins with 1, need 0"),
        ({"q": Q[:1], "q_starts": torch.tensor([0, -2, 4])}, "q_starts has value -2 after 0, need"),
        (
            {"q": Q[:1], "q_starts": torch.tensor([0, 9, 4])},
            "q_starts has value 4 after 9, need as",
        ),
        ({"q": Q[:1], "q_starts": torch.tensor([0, 2, 3])}, "q_starts ends with 3, need 4, the ro"),
    ],
)
def test_values_out_of_range(row, change, message):
    with pytest.raises((ValueError, RuntimeError), match=f"attention: {message}"):
        attention(**{"q": Q, "k": Q, "v": Q, **change}, impl=row)


def test_every_triton_config():
    from fastdiff.kernels import attention as triton_attention

    args, kwargs = make((2, 70, 75, 40), torch.bfloat16, "all")
    bias, lengths, index = kwargs["bias"], kwargs["key_lengths"], kwargs["q_index"]
    exact, exact_lse = eager(*cast(args, kwargs, torch.float64))
    near, near_lse = eager(args, kwargs)
    arguments = (*args, 40**-0.5, None, *bias, lengths, index)
    launch, configs = triton_attention.attention, triton_attention.CONFIGS
    for name, (out, lse) in testing.run_configs(launch, configs, *arguments):
        testing.assert_close(out, exact, near, what=name)
        testing.assert_close(lse, exact_lse, near_lse, what=name)
    alone, args, kwargs = make_packed((3, 0, 70), torch.float32)
    rest = (40**-0.5, *[None] * 6)
    for config in configs:
        one = lambda args, _, c=config: launch(*args, *rest, config=c)  # noqa: E731
        got = launch(*args, *rest, kwargs["q_starts"], config=config)
        assert all(torch.equal(*pair) for pair in zip(got, joined(one, alone), strict=True))


@pytest.mark.parametrize(
    "change, bad",
    [
        ({"key_lengths": torch.tensor([5, 2])}, (0, slice(None))),
        ({"q_index": torch.tensor([[1, 4], [-7, 0]])}, ([0, 1], [1, 0])),
        ({"bias": GROUPS._replace(query_group=torch.tensor([[0, 0, 1, 0]] * 2))}, (slice(None), 2)),
        ({"bias": GROUPS._replace(key_group=torch.tensor([[0, 9, 0, 0]]))}, slice(None)),
    ],
)
def test_triton_gives_nan_for_values_out_of_range(change, bad):
    out = attention(Q, Q, Q, **change, impl="triton").transpose(1, 2)
    assert out[bad].isnan().all()
    out[bad] = 1.0
    torch.testing.assert_close(out, torch.ones_like(out))


def test_torch_row_refuses_what_sdpa_lacks():
    for kwargs, reason in (
        ({"bias": GROUPS}, "S x T"),
        ({"key_lengths": torch.ones(2).long()}, "key_lengths"),
        ({"q_index": torch.ones(2, 1).long()}, "q_index"),
        ({"return_lse": True}, "return_lse"),
        ({"q": Q[:1], "q_starts": STARTS}, "q_starts is given"),
    ):
        call = {"q": Q, "k": Q, "v": Q, **kwargs}
        assert reason in fastdiff.explain(attention, **call)["torch"]
    with pytest.raises(fastdiff.NoImpl, match="row torch refuses: .*key_lengths"):
        attention(Q, Q, Q, key_lengths=torch.ones(2).long(), impl="torch")
