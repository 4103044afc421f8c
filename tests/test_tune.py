"""The frontier: quality measures, choice on held-out inputs, JSON, the plot and the heat map."""

import json
import math

import pytest
import torch

import fastdiff
from fastdiff import models, report, tune
from fastdiff.cache import (
    Broadcast,
    DeepCache,
    EncoderPropagation,
    FirstBlock,
    Forecast,
    MagnitudeRatio,
)
from fastdiff.tune import Quality, Report, Row


def digits(seed, cache=None, steps=10):
    """Four pictures by the bundled DiT."""
    model = digits.model

    def draw():
        return fastdiff.sample(
            model, (4, 1, 32, 32), steps=steps, sampler="flow_euler", seed=seed,
            classes=torch.arange(4), guidance=2.0,
        )  # fmt: skip

    if cache is None:
        return draw()
    with fastdiff.accelerated(model, cache=cache), fastdiff.request(steps=steps) as run:
        out = draw()
        digits.run = run
    return out


@pytest.fixture(autouse=True)
def model():
    digits.model, _ = models.load("dit-digits")


def test_quality_of_known_errors():
    want = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    got = want + torch.tensor([[0.1, 0.1], [0.2, 0.2]])
    assert tune.psnr(got, want).tolist() == pytest.approx([20, 20])
    assert tune.relative_l2(got, want).tolist() == pytest.approx([2**0.5 / 10] * 2)
    assert Quality(psnr=19).margin(got, want) == pytest.approx(1, abs=1e-4)
    assert Quality(relative_l2=0.2).margin(got, want) == pytest.approx(0.2 - 2**0.5 / 10, abs=1e-6)
    assert Quality(psnr=30).margin(want, want) == math.inf
    assert Quality(psnr=0).margin(got * math.nan, want) == -math.inf
    sharp = Quality(metric=lambda got, want: got.amax(1), at_least=1.5)
    assert sharp.margin(got, want) == pytest.approx((1.1 + 2.2) / 2 - 1.5, abs=1e-6)


def test_bad_targets_and_inputs():
    for bad in ({}, dict(psnr=30, relative_l2=0.1), dict(metric=len), dict(psnr=math.nan)):
        with pytest.raises(ValueError, match="Quality"):
            Quality(**bad)
    with pytest.raises(ValueError, match="need at least 2"):
        tune.tune(digits, [0], Quality(psnr=30), [], steps=10)
    with pytest.raises(ValueError, match=r"fewer has 10, need numbers of steps in \[1, 10\)"):
        tune.tune(digits, [0, 1], Quality(psnr=30), [], steps=10, fewer=[10])
    with pytest.raises(ValueError, match="two plain runs of one input differ"):
        tune.tune(lambda *_, **__: torch.randn(2, 3), [0, 1], Quality(psnr=30), [], steps=10)


def test_the_frontier_of_the_digits(tmp_path):
    candidates = [Forecast(interval=3, order=1), Forecast(interval=9, order=0), FirstBlock(0.05)]
    found = tune.tune(digits, [0, 1], Quality(psnr=20), candidates, steps=10, fewer=[3], rounds=1)
    assert len(found.rows) == 4 and [r.steps for r in found.rows] == [None, None, None, 3]
    fine, coarse = found.rows[:2]
    assert fine.psnr > coarse.psnr and all(r.speedup > 0 for r in found.rows)
    row = found.row()
    if row is not None:
        assert row.held_out >= 0 and row.margin >= 0 and row.speedup > 1
        good = [r.speedup for r in found.rows if r.margin >= 0 and r.held_out >= 0]
        assert row.speedup == max(good)
    found.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again == found and again.policy() == found.policy()
    assert "| 3 steps |" in str(found) and "PSNR >= 20 dB" in str(found)
    found.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_an_unreachable_target_chooses_nothing():
    found = tune.tune(digits, [0, 1], Quality(psnr=200), [Forecast(interval=9)], steps=10, rounds=1)
    assert found.chosen is None and found.policy() is None and "nothing meets" in str(found)
    (row,) = found.rows
    assert row.stopped and row.held_out == -math.inf and "stopped: missed by far" in str(found)


def test_a_file_that_is_no_report(tmp_path):
    path = tmp_path / "x.json"
    for text in ("{}", "nonsense", '{"rows": [{"a": 1}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no report"):
            Report.load(path)


def test_policies_as_json():
    for policy in (
        [Forecast(3), Broadcast()],
        EncoderPropagation([0, 3, 5]),
        MagnitudeRatio([1.0, 0.9, 0.95]),
        Broadcast([0, 2], order=1),
        DeepCache(5, branch=2),
        FirstBlock(0.3),
        Forecast(4, order=2),
    ):
        text = json.dumps(tune.policy_dict(policy))
        assert tune.policy_from(json.loads(text)) == policy
    assert tune.describe(DeepCache(5, branch=2)) == "DeepCache(interval=5, branch=2)"
    assert tune.describe([Forecast(4), Broadcast()]) == "Forecast(interval=4) + Broadcast()"
    with pytest.raises(ValueError, match="policy is 'Nothing', need one of"):
        tune.policy_from({"name": "Nothing"})


def test_the_heat_map_of_a_run(tmp_path):
    digits(0, cache=Forecast(interval=3, warmup=2))
    rows = report.cells(digits.run.trace)
    assert list(rows) == [f"block {i}" for i in range(5)]
    (row,) = {tuple(row.items()): row for row in rows.values()}.values()
    kinds = [row[s].kind for s in range(10)]
    assert kinds == ["full"] * 2 + ["forecast", "forecast", "full"] * 2 + ["forecast"] * 2
    report.heat_map(digits.run, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="empty trace"):
        report.heat_map(fastdiff.engine.request.Request(), tmp_path / "x.png")


def test_rows_are_plain_values():
    row = Row("a", None, 3, 2.0, 30.0, 0.1, 1.0, 1.0)
    assert Report("t", [row], "a").policy() is None
