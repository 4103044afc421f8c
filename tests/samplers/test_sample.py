import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.samplers import DDPM, VP, Flow


class Pointwise:
    """An analytic stand-in for a network: one class shifts its output; counts its rows."""

    num_classes = 10

    def __init__(self, channels=1):
        self.rows, self.channels = [], channels

    def __call__(self, x, t, y):
        assert t.shape == y.shape == x.shape[:1]
        self.rows.append(len(x))
        shift = (y.to(x.dtype) - 4 + t / 1000).view(-1, *[1] * (x.dim() - 1)) / 10
        out = torch.tanh(0.7 * x + shift)
        return torch.cat((out, torch.full_like(out, 7.0)), 1) if self.channels == 2 else out


SHAPE = (3, 2, 6, 5)
CLASSES = torch.tensor([1, 7, 3])


def test_a_sample_does_not_depend_on_its_batch():
    seeds = torch.tensor([5, 2**40 + 1, 9])
    args = dict(steps=5, guidance=3.0, guidance_rescale=0.5, clip=1.5)
    for sampler in fastdiff.samplers.SAMPLERS:
        all_three = fastdiff.sample(
            Pointwise(), SHAPE, seed=seeds, classes=CLASSES, sampler=sampler, **args
        )
        for b in range(3):
            alone = fastdiff.sample(
                Pointwise(), (1, *SHAPE[1:]), seed=seeds[b : b + 1], classes=CLASSES[b : b + 1],
                sampler=sampler, **args,
            )  # fmt: skip
            assert torch.equal(alone[0], all_three[b]), sampler


def test_interleaved_runs_are_two_separate_runs():
    def run(seed, callback=None):
        return fastdiff.sample(
            Pointwise(), SHAPE, seed=seed, classes=CLASSES, steps=4, guidance=2.0, callback=callback
        )

    one, two, inner = run(1), run(2), []
    outer = run(1, callback=lambda i, t, x: inner.append(run(2)))
    assert torch.equal(outer, one) and len(inner) == 4
    assert all(torch.equal(t, two) for t in inner)


def test_guidance_interval_and_rows():
    model = Pointwise()
    seen = []
    fastdiff.sample(
        model, SHAPE, classes=CLASSES, steps=10, guidance=4.0, guidance_interval=(300, 700),
        callback=lambda i, t, x: seen.append(t),
    )  # fmt: skip
    assert model.rows == [6 if 300 <= t <= 700 else 3 for t in seen] and 6 in model.rows
    model = Pointwise()
    plain = fastdiff.sample(model, SHAPE, classes=CLASSES, steps=4)
    assert model.rows == [3] * 4
    same = fastdiff.sample(Pointwise(), SHAPE, classes=CLASSES, steps=4, guidance=torch.ones(3))
    torch.testing.assert_close(same, plain)


def test_learned_variance_channels_are_dropped():
    plain = fastdiff.sample(Pointwise(), SHAPE, classes=CLASSES, steps=4, guidance=2.0)
    both = fastdiff.sample(Pointwise(2), SHAPE, classes=CLASSES, steps=4, guidance=2.0)
    assert torch.equal(plain, both)


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_inpainting(prediction):
    reference, mask = torch.randn(SHAPE), torch.zeros(1, 1, 6, 5)
    mask[..., :3] = 1
    args = dict(classes=CLASSES, steps=6, prediction=prediction)
    out = fastdiff.sample(Pointwise(), SHAPE, mask=mask, reference=reference, **args)
    assert torch.equal(out[..., 3:], reference[..., 3:])
    plain = fastdiff.sample(Pointwise(), SHAPE, **args)
    assert torch.equal(out[..., :3], plain[..., :3])  # a pointwise model: the region is its own run
    full = fastdiff.sample(
        Pointwise(), SHAPE, mask=torch.ones_like(mask), reference=reference, **args
    )
    assert torch.equal(full, plain)


def test_gaussian_data_is_reproduced():
    mean, std = 0.5, 0.4

    def flow(x, t, y):
        s = (t / 1000).view(-1, 1, 1, 1)
        a = 1 - s
        weight = (x - a * mean) / ((a * std) ** 2 + s**2)
        return s * weight - (mean + a * std**2 * weight)

    out = fastdiff.sample(flow, (16, 4, 32, 32), sampler="flow_euler", steps=100, prediction="flow")
    assert abs(out.mean() - mean) < 0.01 and abs(out.std() - std) < 0.02


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sampler="no"), "sampler is 'no', need one of"),
        (dict(sampler=3), "sampler is 3, need one of"),
        (dict(steps=0), "steps is 0, need an integer of at least 1"),
        (dict(steps=1001), "steps is 1001, need at most 1000"),
        (dict(guidance=float("nan")), "guidance is nan, need a finite number"),
        (
            dict(guidance=torch.ones(2)),
            r"guidance is torch.float32 \[2\], need floats \[\] or \[3\]",
        ),
        (dict(guidance=2.0, classes=None), "needs classes"),
        (dict(guidance_rescale=1.5), "guidance_rescale is 1.5, need a number in"),
        (dict(guidance_interval=(9, 3)), "guidance_interval is"),
        (dict(classes=CLASSES.float()), "classes is torch.float32"),
        (dict(classes=CLASSES[:2]), r"classes is torch.int64 \[2\], need torch.int64 \[3\]"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=torch.zeros(2, dtype=torch.int64)), r"seed is torch.int64 \[2\]"),
        (dict(clip=0.0), "clip is 0.0"),
        (dict(prediction="score"), "prediction is 'score', need one of eps"),
        (dict(mask=torch.ones(1, 1, 6, 5)), "mask and reference go together"),
        (dict(mask=torch.ones(6, 5), reference=torch.ones(SHAPE)), r"mask is \[6, 5\]"),
        (dict(mask=torch.ones(1, 1, 6, 5), reference=torch.ones(2)), r"reference is \[2\]"),
        (dict(x=(3,)), r"x is \(3,\), need a tensor or a shape"),
        (dict(x=torch.ones(SHAPE, dtype=torch.int64)), "x is torch.int64"),
    ],
)
def test_bad_input(change, message):
    args = dict(x=SHAPE, classes=CLASSES, steps=2) | change
    with pytest.raises(ValueError, match=message):
        fastdiff.sample(Pointwise(), args.pop("x"), **args)


def test_empty_batch_and_dtypes():
    none = torch.zeros(0, dtype=torch.int64)
    out = fastdiff.sample(Pointwise(), (0, 2, 4, 4), classes=none, steps=2, guidance=2.0)
    assert out.shape == (0, 2, 4, 4)
    half = fastdiff.sample(Pointwise(), SHAPE, classes=CLASSES, steps=3, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    given = torch.randn(SHAPE, dtype=torch.float64)
    assert fastdiff.sample(Pointwise(), given, classes=CLASSES, steps=3).dtype == torch.float64
    for schedule in (VP(karras=True), Flow(shift=3.0)):
        prediction = "flow" if isinstance(schedule, Flow) else "v"
        out = fastdiff.sample(
            Pointwise(), SHAPE, classes=CLASSES, steps=3, schedule=schedule, prediction=prediction
        )
        assert torch.isfinite(out).all()


def test_learned_variances_travel_and_stay_in_their_region():
    def network(x, t, y):
        return torch.cat((0.3 * x, torch.tanh(5 * x)), 1)

    settings = dict(sampler=DDPM("learned"), steps=8, prediction="eps")
    x, seeds = torch.randn(3, 2, 5, 7), torch.tensor([4, 5, 6])
    whole = samplers.sample(network, x, seed=seeds, **settings)
    for b in range(3):
        alone = samplers.sample(network, x[b : b + 1], seed=seeds[b : b + 1], **settings)
        assert torch.equal(alone, whole[b : b + 1])
    mask = torch.zeros(1, 1, 5, 7)
    mask[..., :3] = 1
    ref = torch.randn(3, 2, 5, 7)
    part = samplers.sample(network, x, seed=seeds, mask=mask, reference=ref, **settings)
    assert torch.equal(part[..., 3:], ref[..., 3:])
    small = samplers.sample(
        lambda x, t, y: 0.3 * x, x, seed=seeds, **settings | dict(sampler="ddpm")
    )

    def lowest(x, t, y):
        return torch.cat((0.3 * x, torch.full_like(x, -1.0)), 1)

    low = samplers.sample(lowest, x, seed=seeds, **settings)
    torch.testing.assert_close(low, small, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="learned variance and the model gives 2 channels, need 4"):
        samplers.sample(lambda x, t, y: x, x, **settings)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_tables_are_made_on_the_host_whatever_the_default_device_is(name):
    model = lambda x, t, y: 0.3 * x  # noqa: E731
    with torch.device("meta"):
        run = samplers.Run(model, torch.zeros(2, 3, device="cpu"), sampler=name, steps=7)
        table = run.table
    assert {t.device.type for t in (table.rows, table.t, run.alpha, run.rows)} == {"cpu"}
