"""A run as a few programs: the same bits, no wait, and what a graph replays without Python."""

import pytest
import torch

import fastdiff
from fastdiff import models
from fastdiff.cache import (
    AccumulatedDistance,
    Broadcast,
    DeepCache,
    EncoderPropagation,
    FirstBlock,
    Forecast,
    GuidanceReuse,
    MagnitudeRatio,
)
from fastdiff.engine._buffers import Buffers
from fastdiff.engine._tape import Made
from fastdiff.engine._watch import Log
from fastdiff.engine.capture_check import _run
from fastdiff.engine.programs import Programs
from fastdiff.testing import draw_weights
from fastdiff.tokens import RegionAdaptive


def dit():
    torch.manual_seed(0)
    model = models.DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    return draw_weights(model).eval()


def unet():
    model = models.UNet(
        4, 4, (16, 32), 1, (0, 1), 1, heads=2, groups=8, cross_attention_dim=24, num_classes=10
    )
    return draw_weights(model).eval()


class Tape:
    """A runner that replays operations on memory, as a graph does, without the step's Python."""

    made = 0

    def __init__(self, step, inputs, pool=None, share=True):
        self._buffers = Buffers("Tape", inputs, share=True)
        before, log = self._buffers.values(), Log(step, _run.__code__)
        self._tape, _ = _run(step, self._buffers, log, Made(), None)
        assert not log.found, [v.sentence for v in log.found.values()]
        self._buffers.set(before)
        Tape.made += 1

    def replay(self):
        (out,) = self._tape.replay(self._buffers.tensors)
        return out


def draw(model, steps=12, size=8, seed=0):
    y = torch.tensor([1, 5])
    return fastdiff.sample(
        model, (2, 4, size, size), steps=steps, classes=y, guidance=2.0, seed=seed
    )


RATIOS = (1.0, *[0.97] * 11)
CASES = [
    (make, policy)
    for make in (dit, unet)
    for policy in (
        [Forecast(3, order=1)],
        [Forecast(2, order=2, method="adams", last=True)],
        [DeepCache(3)],
        [MagnitudeRatio(RATIOS, threshold=0.2, order=1)],
        [Broadcast(2, 3, 2, start=0.2, order=1)],
        [Broadcast(2, 3), Forecast(schedule=(0, 1, 4, 8, 9), order=1)],
        [],
    )
]
CASES.append((unet, [EncoderPropagation(3)]))
GUIDED = [
    (dit, [GuidanceReuse(3)]),
    (unet, [GuidanceReuse(2, start=0.3)]),
    (unet, [DeepCache(3), GuidanceReuse(2)]),
    (dit, [Forecast(3, order=1), GuidanceReuse(3, alpha_low=0, alpha_high=0)]),
]
CASES += GUIDED
TOKENS = [
    (dit, [RegionAdaptive(0.5, 3, (7,))]),
    (dit, [RegionAdaptive(0.25, 2, (), metric="std", high=0.3, own_times=True)]),
    (dit, [RegionAdaptive(0.25, 2, 6, metric="norm", most=3, end=10)]),
    (dit, [RegionAdaptive(0.5, 2, (8,), end_ratio=0.2)]),
    (dit, [RegionAdaptive(0.5, 2, (6,)), Forecast(3, order=1)]),
    (dit, [RegionAdaptive(0.5, 2, (6,)), GuidanceReuse(3)]),
    (dit, [RegionAdaptive(0.5, 2, (6,)), Broadcast(2, 3, 2, start=0.2, order=1)]),
]
CASES += TOKENS


def name(value):
    return getattr(value, "__name__", str(value))


every = pytest.mark.parametrize("make, policies", CASES, ids=name)


@every
def test_programs_give_the_bits_of_the_network_and_of_each_other(make, policies):
    model = fastdiff.accelerate(make(), cache=policies)
    want = draw(model), draw(model, seed=1)
    for kind in (None, Tape):
        programs = fastdiff.programs(model) if kind is None else Programs(model, policies, kind)
        for seed in (0, 1, 0):
            assert torch.equal(draw(programs, seed=seed), want[seed])
        assert 1 <= programs.kinds <= 12 and torch.equal(draw(model), want[0])


@pytest.mark.parametrize(
    "make, policies", [*CASES[:6], CASES[7], CASES[11], *CASES[14:19], *TOKENS], ids=name
)
def test_every_program_can_be_captured(make, policies):
    model = fastdiff.accelerate(make(), cache=policies)
    programs = fastdiff.programs(model)
    draw(programs, steps=6)
    reports = programs.check()
    assert len(reports) == programs.kinds and all(r.ok for r in reports), "\n".join(
        map(str, reports)
    )
    assert torch.equal(draw(programs, steps=6), draw(model, steps=6))


def test_periodic_schedules_need_few_programs_and_say_what_they_did():
    model = fastdiff.accelerate(dit(), cache=Forecast(3, order=1))
    programs = fastdiff.programs(model)
    with fastdiff.request(steps=60) as run:
        x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 20.0]), torch.tensor([1, 5])
        with torch.no_grad():
            for _ in range(60):
                programs(x, t, y)
    # Two warm-up steps; then each phase of three steps, with the newest value in either buffer.
    assert programs.kinds <= 2 + 2 * 3 + 3
    assert [e.step for e in run.trace] == list(range(60)) and run.syncs == 0
    assert [e.how for e in run.trace[-3:]] == ["forecast", "full", "forecast"]
    assert run.peak_bytes == 2 * 2 * 16 * 32 * 4
    made = programs.kinds
    draw(programs, size=16)  # another shape: programs of its own
    assert programs.kinds > made


def test_runs_take_turns_and_a_limit_holds():
    model = fastdiff.accelerate(dit(), cache=Forecast(3), cache_bytes=1000)
    programs = fastdiff.programs(model)
    with pytest.raises(ValueError, match="cache_bytes is 1000"):
        draw(programs)
    fastdiff.restore(model)
    programs = fastdiff.programs(fastdiff.accelerate(model, cache=Forecast(3)))
    args = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 20.0]), torch.tensor([1, 5])
    with torch.no_grad(), fastdiff.request() as first:
        programs(*args)
        with fastdiff.request():
            programs(*args)
        with pytest.raises(RuntimeError, match="another run has begun"):
            programs(*args)
    assert first.step == 1


def test_what_cannot_be_captured_is_refused():
    for policy in (FirstBlock(0.1), AccumulatedDistance(0.1)):
        model = fastdiff.accelerate(dit(), cache=policy)
        with pytest.raises(ValueError, match="decides from features"):
            fastdiff.programs(model)
    with pytest.raises(ValueError, match="need parallel 1"):
        fastdiff.programs(fastdiff.accelerate(unet(), cache=EncoderPropagation(3, parallel=2)))
    with pytest.raises(ValueError, match="which is not accelerated"):
        fastdiff.programs(dit())
