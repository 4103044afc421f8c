"""What a run says of itself: the heat map's rows, and the lines of ``summary``."""

import math
from collections import Counter

import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff import cli, models, ops, report, run_summary
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import Broadcast, DeepCache, EncoderPropagation, FirstBlock, Forecast
from fastdiff.engine.request import Event, Request
from fastdiff.report import Cell


@pytest.fixture(scope="module")
def dit():
    return models.load("dit-digits")[0]


@pytest.fixture(scope="module")
def unet():
    return models.load("unet-digits")[0]


def run(model, cache, steps=6, batch=2):
    """A run, and what ``summary`` says of it."""
    with fastdiff.accelerated(model, cache=cache, exact=False):
        fastdiff.sample(
            model, (batch, 1, 32, 32), steps=steps, classes=torch.arange(batch), seed=0,
            sampler="flow_euler" if isinstance(model, models.DiT) else "ddim",
        )  # fmt: skip
        return acceleration_of(model).last, fastdiff.summary(model)


def test_a_row_for_every_block(dit):
    last, _ = run(dit, FirstBlock(0.6))
    rows = report.cells(last.trace)
    assert list(rows) == [f"block {i}" for i in range(len(dit.blocks))]
    assert {cell for cell in rows["block 0"].values()} == {Cell("full", 1.0)}
    assert rows["block 1"] == rows["block 4"]
    assert "reuse" in {cell.kind for cell in rows["block 1"].values()}
    assert last.trace[0].layout is last.trace[-1].layout  # nothing is built in a call


def layers_of(unet, name):
    """The residual blocks that a row of the map is about."""
    if name == "middle":
        return list(unet.mid_block.resnets)
    stage, _, layers = name.partition(", layers ")
    way, level = stage.split()
    stages = unet.down_blocks if way == "down" else list(reversed(unet.up_blocks))
    found = list(stages[int(level)].resnets)
    if not layers:
        return found
    first, last = (int(n) for n in layers.split("-"))
    return found[first : last + 1]


@pytest.mark.parametrize(
    "policy", [*(DeepCache(3, branch) for branch in range(6)), EncoderPropagation(3)], ids=str
)
def test_rows_of_a_unet_say_which_layers_ran(unet, policy):
    calls = Counter()
    hooks = []
    for module in unet.modules():
        hooks.append(module.register_forward_hook(lambda m, *_: calls.update([m])))
    last, _ = run(unet, policy)
    for hook in hooks:
        hook.remove()
    rows = report.cells(last.trace)
    for name, row in rows.items():
        ran = [step for step in range(6) if row[step].kind == "full"]
        layers = layers_of(unet, name)
        assert layers and {calls[layer] for layer in layers} == {len(ran)}, name
    listed = [layer for name in rows for layer in layers_of(unet, name)]
    both = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    assert set(listed) == {layer for stage in both for layer in stage.resnets}
    assert len(listed) == len(set(listed))


def test_two_policies_keep_their_rows(dit, tmp_path):
    last, text = run(dit, [Forecast(3), Broadcast()])
    rows = report.cells(last.trace)
    assert "block 0" in rows and "self-attention" in rows
    report.heat_map(last, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.size[1] > 200 and image.info["Software"] == "fastdiff"
    assert "blocks 0-4: 6 calls" in text and "self-attention: " in text


def events(*computed, how="by the change", part="blocks 1-2"):
    return [Event(step, (0, 0), part, c, how) for step, c in enumerate(computed)]


def told(trace, **facts):
    found = Request()
    found.trace = trace
    for name, value in facts.items():
        setattr(found, name, value)
    return "\n".join(run_summary.lines(found))


def test_steps_are_joined_and_shares_are_told():
    trace = events((True, True), (True, True), (False, False), (True, False), (False, False))
    (row,) = report.cells(trace).values()
    assert row[3] == Cell("mixed", 0.5)
    text = told(trace)
    assert "steps 0-1 full, 2 reused, 3 1 of 2 samples, 4 reused" in text
    assert "5 of 10 samples' parts not computed" in text
    assert "hit rate of each sample: 40%, 60%" in text


def test_calls_of_one_step_that_differ_are_mixed():
    trace = [Event(0, (0, i), "p", (i == 0,), "x") for i in range(2)]
    assert report.cells(trace) == {"p": {0: Cell("mixed", 0.5)}}


def test_off_calls_and_nan_are_counted_with_their_reason():
    off = events((True,), (True,), how="off: gradients are recorded")
    text = told([*off, Event(2, (0, 0), "blocks 1-2", (False,), "reuse")])
    assert "off: gradients are recorded" in text and "steps 0-1 off, 2 reused" in text
    assert report.cells([Event(0, (0, 0), "m", (), "off: why")])["m"][0] == Cell("off", 1.0)
    nan = events((True,), how="full, as the change is NaN")
    assert "1 of 1 decisions met NaN" in told(nan) and "NaN" not in told(off)


def test_nan_in_a_run_is_told(dit):
    with fastdiff.accelerated(dit, cache=FirstBlock(0.3), exact=False), torch.no_grad():
        with fastdiff.request(steps=3) as last:
            x, y = torch.full((1, 1, 32, 32), math.nan), torch.tensor([1])
            for _ in range(3):
                dit(x, torch.tensor([0.5]), y)
        text = fastdiff.summary(dit, last)
    assert "2 of 3 decisions met NaN" in text and "steps 0-2 full" in text


def test_waits_bytes_and_a_cache_that_never_hits(dit):
    last, text = run(dit, FirstBlock(1e-9))
    assert "WARNING: the cache never hit" in text and f"waited {last.syncs} times" in text
    assert last.syncs == 5 and last.peak_bytes > 0
    assert f"caches held {last.peak_bytes:,} bytes" in text
    _, text = run(dit, Forecast(2))
    assert "WARNING" not in text and "waited 0 times" in text


def test_rows_that_fell_back_say_why():
    x = torch.randn(2, 8)
    with fastdiff.record() as rows:
        ops.gelu_tanh(x)
        ops.gelu_tanh(x.requires_grad_())
        ops.gelu_tanh(x)
    text = told([], rows=rows)
    ran = [row for op, row in rows if op == "gelu_tanh"]
    for row in ran:
        assert f"gelu_tanh {row}" in text
    assert sum(rows.values()) == 3
    for key, why in rows.why.items():
        assert f"gelu_tanh ran {key[1]}: " in text
        assert all(why.values()) and all(name in text for name in why)
    with fastdiff.use("ref"), fastdiff.record() as rows:
        ops.gelu_tanh(x)
    assert "gelu_tanh ran ref: forced" in told([], rows=rows)


def test_a_row_that_refuses_is_named(monkeypatch):
    monkeypatch.setattr(fastdiff._native, "_C", None)
    monkeypatch.setattr(fastdiff._native, "load_error", "planted: no library")
    with fastdiff.record() as rows:
        ops.gelu_tanh(torch.randn(2, 8))
    assert ("gelu_tanh", "native") not in rows
    assert "native: planted: no library" in told([], rows=rows)


@pytest.fixture
def moe(tmp_path):
    config = dict(
        input_size=16, patch_size=4, in_channels=1, hidden_size=32, depth=2, num_heads=2,
        num_classes=10, learn_sigma=False, prediction="flow", experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.DiTMoE(**config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    path = tmp_path / "moe.safetensors"
    facts = dict(sampler="flow_euler", guidance=2.0, image_size=16)
    models.save(model, path, **facts)
    return models.load(path)[0], path


def test_use_of_experts(moe):
    model, _ = moe

    def run():
        how = dict(sampler="flow_euler", steps=3, classes=torch.tensor([1, 2]), guidance=2.0)
        fastdiff.sample(model, (2, 1, 16, 16), **how)

    use = report.expert_use(model, run)
    assert use.times.shape == (3,) and (use.times.diff() < 0).all()
    assert use.shares.shape == (3, 2, 4)
    assert torch.allclose(use.shares.sum(-1), torch.ones(3, 2))
    assert not model._forward_pre_hooks
    twice = report.expert_use(model, lambda: (run(), run()))
    assert torch.equal(twice.shares, use.shares)  # levels are merged
    with pytest.raises(ValueError, match="0 layers of experts ran in 0 calls"):
        report.expert_use(model, lambda: None)


def test_sample_and_report_of_experts(moe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, out = str(moe[1]), tmp_path / "experts.png"
    argv = ["report", "--experts", "--model", path, "--steps", "2", "--batch", "2"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "layer 1: " in text and text.count("%") == 8
    with Image.open(out) as picture:
        assert picture.info["Software"] == report.MARK and picture.size[0] > 300
    argv = ["sample", "--model", path, "--steps", "2", "--out", str(tmp_path / "s.png")]
    assert cli.main([*argv, "--compare", "--repeat", "1"]) == 0
    assert "torch eager" in capsys.readouterr().out
    for more, words in (
        (["--model", path], "need one of --cache and --experts"),
        (["--model", path, "--cache", "taylor:2", "--experts"], "need one of --cache and"),
        (["--model", "dit-digits", "--experts", "--steps", "1"], "0 layers of experts ran in 1"),
    ):
        assert cli.main(["report", *more, "--out", str(out)]) == 2
        assert words in capsys.readouterr().err
