import math

import pytest
import torch

import fastdiff
from fastdiff import testing
from fastdiff.ops.fused_step import (
    COLUMNS,
    IMPLS,
    NOISE_IMPLS,
    Noise,
    _philox_words,
    fused_step,
    fused_step_ref,
    philox_normal,
    row_args,
)

# 64 is the noise group, 4096 the task of the native row; sizes around both, and no samples at all.
SHAPES = [(0, 3, 4), (2, 0), (1, 1), (2, 7), (3, 5, 13), (2, 4, 8, 8), (1, 65), (2, 3, 37, 77)]
SMALL = [(0, 3, 4), (2, 5, 13), (1, 3, 37, 77)]
FEATURES = ("plain", "guided", "rescaled", "multistep", "noisy", "clipped", "inpaint", "select")


def case(shape, feature="all", dtype=torch.float32, m_dtype=None, n=4):
    """Arguments of one call; ``feature`` "all" turns everything on."""
    on = lambda *names: feature == "all" or feature in names  # noqa: E731
    batch, k = shape[0], 3 if on("guided", "rescaled") else 1
    coef = torch.rand(n, len(COLUMNS)) - 0.3
    coef[:, COLUMNS.index("clip")] = 0.4 if on("clipped") else math.inf
    m = torch.randn(k, *shape).to(m_dtype or dtype)
    args = dict(x=torch.randn(shape).to(dtype), m=m, coef=coef, keep=on("multistep", "noisy"))
    args["step"] = torch.randint(n, (batch,)) if on("noisy") else torch.tensor(n - 1)
    if on("guided", "rescaled"):
        args["w"] = torch.randn(batch, k)
    if on("rescaled"):
        args["rescale"] = torch.rand(batch) * (torch.arange(batch) != 1)
    if on("multistep"):
        args["h1"], args["h2"] = (torch.randn(shape).to(dtype) for _ in range(2))
    if on("noisy", "inpaint"):
        seeds = torch.randint(2**62, (batch,))
        args["noise"] = Noise(seeds, torch.arange(batch) + 2**31, args["step"], 3)
    if on("inpaint"):
        args["mask"] = torch.rand(1, 1, *shape[2:]) if len(shape) > 2 else torch.rand(shape)
        args["ref"] = torch.randn(shape).to(dtype)
    if on("select"):
        args["select"] = torch.arange(batch) % 2 == 0
        args["stored"] = torch.randn(shape).to(dtype)
    return args


def exact_and_eager(args):
    """The specification in float64, and what plain torch gives in the dtype of x."""
    row = list(row_args(**args))
    eager = fused_step_ref(*row)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in row]
    return fused_step_ref(*wide), eager


def check(args, row, what=""):
    exact, eager = exact_and_eager(args)
    with testing.unchanged(*(t for t in args.values() if isinstance(t, torch.Tensor))):
        got = fused_step(**args, impl=row)
    for g, e, plain in zip(got, exact, eager, strict=True):
        assert g.dtype == args["x"].dtype and g.is_contiguous()
        testing.assert_close(g, e, plain, what=f"{row} {what}")


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_matches_float64(row, dtype):
    for shape in SMALL if row == "triton" else SHAPES:
        check(case(shape, dtype=dtype), row, shape)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_each_part_alone(row, feature):
    check(case((2, 3, 5, 7), feature), row, feature)


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_levels_and_layouts(level, layout):
    for dtype, m_dtype in zip(
        testing.DTYPES, (torch.bfloat16, torch.float16, torch.float32), strict=True
    ):
        args = case((2, 4, 9, 77), dtype=dtype, m_dtype=m_dtype)
        for name in ("x", "m", "h1", "h2", "ref", "stored", "mask", "w", "coef"):
            args[name] = testing.lay(args[name], layout)
        with testing.cpu_level(level):
            check(args, "native", f"{dtype} {m_dtype}")


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_learned_variance_view_and_large_samples(row):
    args = case((2, 3, 8, 9))
    args["m"] = torch.randn(6, 6, 8, 9).view(3, 2, 6, 8, 9)[:, :, :3]  # first half of the channels
    check(args, row, "view")
    if row != "triton":
        check(case((2, 3, 64, 65)), row, "over one chunk")


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_masks(row):
    args = case((2, 3, 5, 7), "inpaint")
    for shape in ((2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 5, 7), (1, 1, 5, 7)):
        check(args | dict(mask=torch.rand(shape)), row, shape)
    ones, zeros = torch.ones(1, 1, 5, 7), torch.zeros(1, 1, 5, 7)
    paste = torch.tensor([[0.0] * 12 + [1.0, 0.0]])
    paste[:, COLUMNS.index("clip")] = math.inf
    got, _ = fused_step(**args | dict(mask=ones), impl=row)
    plain, _ = fused_step(**args | dict(mask=None, ref=None), impl=row)
    assert torch.equal(got, plain)
    got, _ = fused_step(**args | dict(mask=zeros, coef=paste, step=None), impl=row)
    assert torch.equal(got, args["ref"])


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_rescale(row):
    args = case((3, 4, 33), "rescaled")
    off, _ = fused_step(**args | dict(rescale=0.0), impl=row)
    zeros, _ = fused_step(**args | dict(rescale=torch.zeros(3)), impl=row)
    assert torch.equal(off, zeros)
    # phi 1: the combined prediction has the spread of the last branch
    take_m = torch.tensor([[0.0, 0, 0, 0, 1] + [0] * 6 + [math.inf, 0, 0]])
    got, _ = fused_step(**args | dict(rescale=1.0, coef=take_m, step=None), impl=row)
    torch.testing.assert_close(got.std((1, 2)), args["m"][-1].std((1, 2)))
    # no spread: left alone; a large mean loses nothing
    args["m"] = torch.full((3, 3, 4, 33), 0.3)
    got, _ = fused_step(**args | dict(rescale=1.0), impl=row)
    assert torch.isfinite(got).all()
    args["m"] = 1000 + torch.randn(3, 3, 4, 33)
    args["w"] = torch.tensor([[0.0, -1.0, 2.0]])[:, :].expand(3, 3)
    got, _ = fused_step(**args | dict(rescale=1.0, coef=take_m, step=None), impl=row)
    torch.testing.assert_close(got.std((1, 2)), args["m"][-1].std((1, 2)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_not_a_number_is_kept(row):
    args = case((2, 70), "clipped")
    args["x"][0, 3], args["x"][1, 66] = math.nan, math.inf
    got, _ = fused_step(**args, impl=row)
    want, _ = fused_step(**args, impl="ref")
    assert torch.equal(got.isnan(), want.isnan()) and got[0, 3].isnan()


def test_philox_known_answers():
    """Vectors of Random123 (Salmon et al. 2011), kat_vectors, philox4x32 10 rounds."""
    ones, low = 0xFFFFFFFF, 0
    known = [
        ([low] * 4, [low] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([ones] * 4, [ones] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]  # fmt: skip
    for counter, key, words in known:
        got = _philox_words([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        assert [int(g) for g in got] == [int(word, 16) for word in words.split()]


def same_noise(got, want):
    """The integers agree, or values would differ by 1 and more; Box-Muller to 4 ulp of 1."""
    assert (got - want).abs().max() <= 4 * 2.0**-23


NOISES = [
    ((1, 1), 0, 0, 0, 0),
    ((3, 130), 2**63 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 2),
    ((2, 3, 5, 7), 123456789012345, 7, 3, 1),
    ((0, 5), 1, 0, 0, 0),
    ((2, 0), 1, 0, 0, 0),
]


@pytest.mark.parametrize("row", testing.rows_of(NOISE_IMPLS))
def test_noise_is_the_same_in_every_row(row):
    for shape, *key in NOISES:
        got, want = philox_normal(shape, *key, impl=row), philox_normal(shape, *key, impl="ref")
        assert got.shape == shape
        if got.numel():
            same_noise(got, want)
    seeds, slots, steps = torch.tensor([-1, 5]), torch.tensor([0, 9]), torch.tensor([4, 2])
    both = philox_normal((2, 99), seeds, slots, steps, impl=row)
    for b in range(2):
        alone = philox_normal((1, 99), seeds[b : b + 1], int(slots[b]), steps[b : b + 1], impl=row)
        assert torch.equal(alone[0], both[b])


@pytest.mark.parametrize("level", fastdiff.cpu_levels())
def test_noise_is_the_same_at_every_level_and_thread_count(level):
    want = philox_normal((3, 70001), 11, torch.arange(3), 5, impl="ref")
    threads = torch.get_num_threads()
    with testing.cpu_level(level):
        got = philox_normal((3, 70001), 11, torch.arange(3), 5, impl="native")
        same_noise(got, want)
        args = case((2, 3, 64, 129))
        one = fused_step(**args, impl="native")
        torch.set_num_threads(3)
        try:
            assert torch.equal(
                philox_normal((3, 70001), 11, torch.arange(3), 5, impl="native"), got
            )
            for a, b in zip(fused_step(**args, impl="native"), one, strict=True):
                assert torch.equal(a, b)
        finally:
            torch.set_num_threads(threads)


def test_noise_is_normal():
    z = philox_normal((4, 250_000), 3).double()
    n = z.numel()
    for power, want, var in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # 4 standard errors
        assert abs(float((z**power).mean()) - want) < 4 * math.sqrt(var / n)
    for lag in (1, 16, 32, 48, 64):  # neighbours, and the words of one counter
        assert abs(float((z[:, lag:] * z[:, :-lag]).mean())) < 4 / math.sqrt(n)
    assert abs(float((z[0] * z[1]).mean())) < 4 / math.sqrt(n / 4)
    assert 4.5 < float(z.abs().max()) < 6.8
    assert torch.equal(
        philox_normal((2, 9), 3, dtype=torch.bfloat16), philox_normal((2, 9), 3).bfloat16()
    )


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_a_sample_does_not_depend_on_its_batch(row):
    args = case((3, 2, 6, 11)) | dict(step=torch.tensor([3, 0, 2]))
    together = fused_step(**args, impl=row)
    for b in range(3):
        one = slice(b, b + 1)
        alone = args | {
            k: args[k][one] for k in ("x", "w", "h1", "h2", "rescale", "ref", "select", "stored")
        }
        alone |= dict(m=args["m"][:, one], step=args["step"][one], mask=args["mask"])
        noise = args["noise"]
        alone["noise"] = Noise(noise.seed[one], noise.slot[one], noise.step[one], noise.stream)
        for a, t in zip(fused_step(**alone, impl=row), together, strict=True):
            assert torch.equal(a[0], t[b])


@pytest.mark.parametrize("row", testing.rows_of(IMPLS))
def test_rows_of_the_table(row):
    args = case((3, 40), "plain", n=3) | dict(step=None)
    per_sample, _ = fused_step(**args, impl=row)
    by_index, _ = fused_step(**args | dict(step=torch.arange(3)), impl=row)
    assert torch.equal(per_sample, by_index)
    one, _ = fused_step(**args | dict(coef=args["coef"][1]), impl=row)
    picked, _ = fused_step(**args | dict(step=torch.tensor(1)), impl=row)
    assert torch.equal(one, picked) and torch.equal(one[1], per_sample[1])


def test_step_out_of_range():
    args = case((2, 40), "plain", n=3)
    for step in (-1, 3, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min):
        for row, error in (("native", RuntimeError), ("ref", ValueError)):
            with pytest.raises(error, match=f"^fused_step: step .*{step}, need"):
                fused_step(**args | dict(step=torch.tensor(step)), impl=row)
        last = fused_step(**args | dict(step=torch.tensor(0 if step < 0 else 2)), impl="triton")
        clamped = fused_step(**args | dict(step=torch.tensor(step)), impl="triton")
        assert torch.equal(clamped[0], last[0])


def test_opcheck_and_compile():
    args = row_args(**case((2, 3, 4, 5)))
    torch.library.opcheck(torch.ops.fastdiff.fused_step.default, args)
    torch.library.opcheck(torch.ops.fastdiff.fused_step.default, row_args(**case((2, 9), "plain")))
    counters = (torch.arange(2), torch.arange(2), torch.arange(1))
    torch.library.opcheck(torch.ops.fastdiff.philox_normal.default, (*counters, 0, 77))
    full = case((2, 3, 4, 5))
    testing.check_compile(lambda **kw: fused_step(**kw), **full)
    testing.check_compile(lambda seed: philox_normal((2, 5), seed, 1, 2), torch.arange(2))


def test_gradient_comes_from_the_reference():
    args = case((2, 3, 5), dtype=torch.float64)
    args["coef"][:, COLUMNS.index("clip")] = 0.7
    names = ("x", "m", "h1", "h2", "w", "rescale")
    args["rescale"] = torch.tensor([0.3, 0.6])
    leaves = [args[name].double().requires_grad_() for name in names[:4]]
    assert torch.autograd.gradcheck(
        lambda *t: fused_step(**args | dict(zip(names[:4], t, strict=True))), leaves
    )
    for name in names:
        args32 = case((2, 3, 5)) | dict(rescale=torch.tensor([0.3, 0.6]))
        args32[name] = args32[name].float().requires_grad_()
        why = fastdiff.explain(fused_step, **args32)
        assert "no backward" in why["native"] and "no backward" in why["triton"]
        out, _ = fused_step(**args32)
        assert torch.autograd.grad(out.sum(), args32[name])[0].shape == args32[name].shape


def bad(**change):
    return case((2, 3, 5), "plain") | change


ROW = torch.zeros(len(COLUMNS))


@pytest.mark.parametrize(
    "args, message",
    [
        (bad(x="no"), "fused_step: x is str, need a torch.Tensor"),
        (bad(x=torch.ones(3)), r"x has shape \[3\], need at least 2 dimensions"),
        (bad(m=torch.ones(1, 2, 3, 4)), r"m has shape \[1, 2, 3, 4\], need \[2, 3, 5\] or \[K"),
        (bad(m=torch.ones(0, 2, 3, 5)), r"m has shape \[0, 2, 3, 5\]"),
        (bad(m=torch.ones(2, 2, 3, 5)), "m has 2 branches and w is None"),
        (bad(m=torch.ones(2, 3, 5).long()), "m is torch.int64"),
        (bad(w=torch.ones(3, 2)), r"w has shape \[3, 2\], need \[1\] or \[2, 1\]"),
        (bad(coef=ROW.double()), "coef is torch.float64 on cpu, need torch.float32 on cpu"),
        (bad(coef=ROW[:5]), r"coef has shape \[5\], need \[14\]"),
        (bad(coef=ROW.expand(3, -1), step=None), "coef has 3 rows and no step picks one"),
        (bad(coef=ROW[None][:0]), "coef has 0 rows"),
        (bad(step=torch.ones(1)), "step is torch.float32, need torch.int64"),
        (bad(step=torch.zeros(3).long()), r"step has shape \[3\], need \[2\]"),
        (bad(h1=torch.ones(2, 3, 5).half()), "h1 is torch.float16, need torch.float32"),
        (bad(h2=torch.ones(2, 3)), r"h2 has shape \[2, 3\], need \[2, 3, 5\]"),
        (bad(rescale=2.0), r"rescale is 2.0, need a number in \[0, 1\]"),
        (bad(rescale=torch.ones(3)), r"rescale has shape \[3\], need \[\] or \[2\]"),
        (bad(mask=torch.ones(2, 3, 5)), "mask and ref go together"),
        (bad(mask=torch.ones(5, 1), ref=torch.ones(2, 3, 5)), r"mask has shape \[5, 1\]"),
        (bad(mask=torch.ones(1, 1, 1), ref=torch.ones(2, 3, 5)), r"mask has shape \[1, 1, 1\]"),
        (bad(select=torch.ones(2).bool()), "select and stored go together"),
        (bad(select=torch.ones(2), stored=torch.ones(2, 3, 5)), "select is torch.float32"),
        (bad(noise=Noise(torch.zeros(3).long())), r"seed has shape \[3\], need \[2\]"),
        (bad(noise=Noise(torch.zeros(2))), "seed is torch.float32 on cpu, need torch.int64"),
        (bad(noise=Noise(torch.zeros(2).long(), slot=-1)), r"slot is -1, need an integer in \[0"),
        (bad(noise=Noise(torch.zeros(2).long(), stream=2**32 - 1)), "stream is 4294967295"),
    ],
)  # fmt: skip
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message):
        fused_step(**args)


@pytest.mark.parametrize(
    "args, message",
    [
        (((2, -1), 0), r"shape is \(2, -1\)"),
        (((), 0), r"shape is \(\)"),
        (((1, 2**34 + 1), 0), "17179869185 elements a sample"),
        (((2, 3), -1), r"seed is -1, need an integer in \[0, 9223372036854775808\)"),
        (((2, 3), 0, 2**32), "slot is 4294967296"),
        (((2, 3), torch.zeros(3).long()), r"seed has shape \[3\], need \[2\]"),
    ],
)
def test_bad_noise(args, message):
    with pytest.raises(ValueError, match=message):
        philox_normal(*args)


def test_the_native_entry_guards_memory():
    good = list(row_args(**case((2, 3, 5))))
    op = torch.ops.fastdiff.fused_step.default
    op(*good)
    x, m, w, coef, step, h1, *_ = good
    for at, change in (
        (1, m[:, :1]), (1, m[0]), (1, m[:0]), (2, w[:1]), (2, None), (3, coef[:, :13]),
        (3, coef[0]),
        (3, coef.double()), (4, step[:0]), (4, step.int()), (5, h1[:1]), (5, h1.half()),
        (7, torch.ones(1)), (8, None), (8, good[8][:1].repeat(3)), (12, good[12][..., :4]),
        (12, good[12].double()), (13, None), (14, good[14].float()), (15, good[15][:, :1]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="fused_step"):
            op(*good[:at], change, *good[at + 1 :])


def test_every_triton_config():
    from fastdiff.kernels import fused_step as kernels

    args = row_args(**case((2, 3, 11, 131)))
    want = kernels.fused_step(*args)
    for name, got in testing.run_configs(kernels.fused_step, kernels.CONFIGS, *args):
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w), name
    counters = (torch.arange(2), torch.arange(2), torch.arange(2), 1, 5000)
    want = kernels.philox_normal(*counters)
    for name, got in testing.run_configs(kernels.philox_normal, kernels.CONFIGS, *counters):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("row", ("native", "triton"))
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_reads_and_writes_stay_inside(row, dtype):
    """Guard zones are NaN: a read past an end would show in the result."""
    args = list(row_args(**case((2, 3, 5, 13), dtype=dtype)))
    at = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    want = fused_step_ref(*args)
    with testing.guarded(*(args[i] for i in at)) as copies:
        for i, copy in zip(at, copies, strict=True):
            args[i] = copy
        got = {i.name: i.fn for i in IMPLS}[row](*args)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
