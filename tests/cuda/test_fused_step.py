"""The CUDA kernels of the sampler step and its noise, in the model, against float64."""

import math

import pytest
import torch

from fastdiff import testing, testing_simt
from fastdiff.ops.fused_step import (
    COLUMNS,
    Noise,
    fused_step,
    fused_step_ref,
    philox_normal,
    row_args,
)

PARTS = ("plain", "guided", "rescaled", "multistep", "noisy", "clipped", "inpaint", "select")
# Tails of the quad, of a group of 64 elements, of a block (2048) and of a chunk of moments (4096);
# sizes that are and are not whole quads.
SHAPES = ((0, 3, 4), (2, 0), (3, 1), (2, 7), (2, 3, 20), (1, 65), (1, 3, 37, 45), (2, 4, 33, 36))


def case(shape, part="all", dtype=torch.float32, m_dtype=None, n=4):
    """Arguments of one call with one part of the algebra, or all of them, turned on."""

    def on(*names):
        return part == "all" or part in names

    batch, branches = shape[0], 3 if on("guided", "rescaled") else 1
    coef = torch.rand(n, len(COLUMNS)) - 0.3
    coef[:, COLUMNS.index("clip")] = 0.4 if on("clipped") else math.inf
    args = {
        "x": torch.randn(shape).to(dtype),
        "m": torch.randn(branches, *shape).to(m_dtype or dtype),
        "coef": coef,
        "step": torch.randint(n, (batch,)) if on("noisy") else torch.tensor(n - 1),
        "keep": on("multistep", "noisy"),
    }
    if on("guided", "rescaled"):
        args["w"] = torch.randn(batch, branches)
    if on("rescaled"):
        args["rescale"] = torch.rand(batch) * (torch.arange(batch) != 1)
    if on("multistep"):
        args["h1"], args["h2"] = torch.randn(2, *shape).to(dtype)
    if on("noisy", "inpaint"):
        seeds = torch.randint(2**62, (batch,))
        args["noise"] = Noise(seeds, torch.arange(batch) + 2**31, args["step"], 3)
    if on("inpaint"):
        args["mask"] = torch.rand(1, 1, *shape[2:]) if len(shape) > 2 else torch.rand(shape)
        args["ref"] = torch.randn(shape).to(dtype)
    if on("select"):
        args["select"] = torch.arange(batch) % 2 == 1
        args["stored"] = torch.randn(shape).to(dtype)
    return args


def run(args, mode=(0, False, False)):
    with testing_simt.emulated(*mode):
        return fused_step(**args, impl="native")


def check(args, what=""):
    """The kernel against the specification in float64; inputs stay as they are."""
    row = row_args(**args)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in row]
    with testing.unchanged(*(t for t in args.values() if isinstance(t, torch.Tensor))):
        got = run(args)
    for g, exact, eager in zip(got, fused_step_ref(*wide), fused_step_ref(*row), strict=True):
        assert g.dtype == args["x"].dtype and g.is_contiguous()
        testing.assert_close(g, exact, eager, what=str(what))
    return got


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype):
    check(case(shape, dtype=dtype), shape)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone(part):
    for shape in ((2, 3, 5, 7), (2, 4, 6, 6)):
        check(case(shape, part), part)


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "clip"])
def test_each_column_alone(name):
    args = case((2, 3, 5, 8))
    args["coef"][:, [COLUMNS.index(n) for n in COLUMNS if n not in (name, "clip", "a_m")]] = 0
    check(args, name)


@pytest.mark.parametrize("m_dtype", testing.DTYPES)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_state_and_prediction_of_different_dtypes(dtype, m_dtype):
    for shape in ((2, 3, 40), (1, 77)):
        check(case(shape, dtype=dtype, m_dtype=m_dtype), shape)


@pytest.mark.parametrize("shape", ((2, 3, 37, 39), (1, 4, 36, 36)))
def test_same_bits_in_every_order(shape):
    args = case(shape)
    first, *others = [run(args, mode) for mode in testing_simt.MODES]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_give_the_same_bits(layout):
    """Also moments: the order of additions does not depend on alignment."""
    args = case((2, 4, 34, 36), dtype=torch.bfloat16)
    want = run(args)
    for name in ("x", "m", "h1", "h2", "ref", "stored", "mask", "w", "coef"):
        args[name] = testing.lay(args[name], layout)
    assert all(torch.equal(a, b) for a, b in zip(run(args), want, strict=True))


@pytest.mark.parametrize("name", ("x", "m", "h1", "h2", "ref", "stored", "mask"))
def test_one_misaligned_tensor(name):
    args = case((2, 4, 3, 8))
    check(args | {name: testing.lay(args[name], "misaligned")}, name)


def test_half_of_the_channels_is_taken_without_a_copy():
    args = case((2, 3, 8, 9))
    args["m"] = torch.randn(3, 2, 6, 8, 9)[:, :, :3]
    check(args)
    odd = torch.randn(3 * 2 * 217)  # branches or samples that start off the quad
    for strides in ((434, 217), (433, 216)):
        args["m"] = odd.as_strided((3, 2, 3, 8, 9), (*strides, 72, 9, 1))
        check(args)


@pytest.mark.parametrize("plane", ((5, 7), (2, 1), (4, 6)))
def test_masks(plane):
    args = case((2, 3, *plane), "inpaint")
    for b in (1, 2):
        for c in (1, 3):
            check(args | {"mask": torch.rand(b, c, *plane)}, (b, c))


@pytest.mark.parametrize("numel", (33, 36))
def test_rescale(numel):
    args = case((3, 4, numel), "rescaled")
    off, _ = run(args | {"rescale": 0.0})
    zeros, _ = run(args | {"rescale": torch.zeros(3)})
    assert torch.equal(off, zeros)
    args["m"] = torch.full((3, 3, 4, numel), 0.3)  # no spread: left alone, exactly
    plain, _ = run(args | {"rescale": 0.0})
    assert torch.equal(run(args | {"rescale": 1.0})[0], plain)
    args["m"] = torch.full((1, 3, 4, numel), 0.3)
    args["w"] = torch.full((1,), 1.7)
    assert torch.equal(run(args | {"rescale": 1.0})[0], run(args | {"rescale": 0.0})[0])


def test_rescale_loses_nothing_to_a_large_mean():
    take_m = torch.tensor([[0.0, 0, 0, 0, 1] + [0] * 6 + [math.inf, 0, 0]])
    m = 1000 + torch.randn(2, 1, 5000)
    args = {"x": torch.zeros(1, 5000), "m": m, "coef": take_m, "w": torch.tensor([-1.0, 2.0])}
    got, _ = run(args | {"rescale": 1.0})
    torch.testing.assert_close(got.std(), m[-1].std(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("numel", (69, 68))
def test_not_a_number_is_kept(numel):
    args = case((2, numel), "clipped")
    args["coef"][:, :5] = torch.tensor([1.0, 1, 1, 1, -1])
    args["x"][0, 3], args["x"][1, 66] = math.nan, math.inf
    args["m"][0, 1, 66] = -math.inf  # x0 is NaN, the rest of the sum is infinite
    got, _ = run(args)
    want = fused_step_ref(*row_args(**args))[0]
    assert torch.equal(got.isnan(), want.isnan()) and got[0, 3].isnan() and got[1, 66].isnan()


@pytest.mark.parametrize("numel", (70, 72))
def test_stored_samples_are_taken_as_they_are(numel):
    args = case((3, numel), dtype=torch.float16)
    args["x"][1] = math.nan
    args["stored"].view(torch.int16)[1, 5] = 0x7C01  # a signalling NaN
    got, _ = run(args)
    same = got.view(torch.int16) == args["stored"].view(torch.int16)
    assert same[1].all() and not same[0].all() and not same[2].all()


def test_rows_out_of_range_are_clamped():
    """A GPU's index is not read by the host; guards of NaN lie around the table."""
    args = case((2, 40), "plain", n=3)
    for step in (-1, 3, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min):
        want, _ = run(args | {"step": torch.tensor(0 if step < 0 else 2)})
        with testing.guarded(args["coef"]) as (coef,):
            got, _ = run(args | {"coef": coef, "step": torch.tensor([step, step])})
        assert torch.equal(got, want)


def test_rows_of_the_table():
    args = case((3, 40), "plain", n=3) | {"step": None}
    own, _ = run(args)
    by_index, _ = run(args | {"step": torch.arange(3)})
    strided, _ = run(args | {"step": torch.tensor([0, 9, 1, 9, 2])[::2]})
    assert torch.equal(own, by_index) and torch.equal(own, strided)
    one, _ = run(args | {"coef": args["coef"][1]})
    assert torch.equal(one[1], own[1]) and not torch.equal(one[0], own[0])


def test_a_sample_does_not_depend_on_its_batch():
    args = case((3, 2, 41, 60)) | {"step": torch.tensor([3, 0, 2])}
    together = run(args)
    for b in range(3):
        one = slice(b, b + 1)
        names = ("x", "w", "h1", "h2", "rescale", "ref", "select", "stored", "step")
        alone = args | {k: args[k][one] for k in names} | {"m": args["m"][:, one]}
        noise = args["noise"]
        alone["noise"] = Noise(noise.seed[one], noise.slot[one], noise.step[one], noise.stream)
        for a, t in zip(run(alone), together, strict=True):
            assert torch.equal(a[0], t[b])


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", ((2, 3, 5, 13), (2, 4, 5, 12)))
def test_reads_and_writes_stay_inside(shape, dtype):
    """Guard zones are NaN: a read past an end would show in the result."""
    args = list(row_args(**case(shape, dtype=dtype)))
    at = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    with testing_simt.emulated():
        want = torch.ops.fastdiff.fused_step(*args)
        with testing.guarded(*(args[i] for i in at)) as copies:
            for i, copy in zip(at, copies, strict=True):
                args[i] = copy
            got = torch.ops.fastdiff.fused_step(*args)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def same_noise(got, want):
    """The integers agree, or values would differ by 1 and more; Box-Muller to 4 ulp of 1."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if got.numel():
        assert (got - want).abs().max() <= 4 * 2.0**-23


def draw(seed, slot, step, numel, mode=(0, False, False)):
    """The native row itself, which takes counters as they lie."""
    with testing_simt.emulated(*mode):
        return torch.ops.fastdiff.philox_normal(seed, slot, step, 0, numel)


NOISES = (
    ((1, 1), 0, 0, 0, 0),
    ((3, 130), 2**63 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 2),
    ((2, 3, 5, 7), 123456789012345, 7, 3, 1),
    ((2, 4100), 11, None, 5, 0),
    ((1, 6151), 5, 1, 2, 3),
    ((0, 5), 1, 0, 0, 0),
    ((2, 0), 1, 0, 0, 0),
)


def test_noise_is_the_reference_s():
    for shape, *key in NOISES:
        with testing_simt.emulated():
            got = philox_normal(shape, *key, impl="native")
        same_noise(got, philox_normal(shape, *key, impl="ref"))


@pytest.mark.parametrize("numel", (99, 100))
def test_noise_of_each_sample(numel):
    seeds, slots = torch.tensor([-1, 0, 5, 0])[::2], torch.tensor([0, 9])
    for steps in (torch.tensor([4, 2]), torch.tensor([7])):
        want = philox_normal((2, numel), seeds, slots, steps, impl="ref")
        got, *others = [draw(seeds, slots, steps, numel, mode) for mode in testing_simt.MODES]
        same_noise(got, want)
        assert all(torch.equal(got, other) for other in others)
        assert torch.equal(draw(seeds[1:], slots[1:], steps[-1:], numel)[0], got[1])


@pytest.mark.parametrize("numel", (99, 100))
def test_the_step_draws_the_same_noise(numel):
    """x' = z and the region's z_ref, with the counters of philox_normal."""
    coef = torch.zeros(1, len(COLUMNS))
    coef[:, [COLUMNS.index(name) for name in ("sigma", "r_b")]] = 1
    x = torch.zeros(2, numel)
    noise = Noise(torch.tensor([3, 2**60]), torch.tensor([5, 2**32 - 1]), torch.tensor([8]), 6)
    args = {"x": x, "m": x, "coef": coef, "noise": noise, "ref": x}
    for mask, stream in ((torch.ones(2, numel), 6), (torch.zeros(2, numel), 7)):
        got, _ = run(args | {"mask": mask})
        with testing_simt.emulated():
            want = philox_normal((2, numel), *noise[:3], stream, impl="native")
        assert torch.equal(got, want)
