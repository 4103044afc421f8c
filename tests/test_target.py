"""``accelerate(target=Quality(...))``: the search on a pipeline and on a network of its own."""

import math

import diffusers
import pytest
import torch

import fastdiff
from fastdiff import calibrate, models
from fastdiff import target as searching
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import DeepCache, FirstBlock, Forecast, MagnitudeRatio
from fastdiff.precision import Precision
from fastdiff.tune import Quality, Report

EASY, HARD = Quality(psnr=-100), Quality(psnr=1000)


def pipeline():
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.05)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4).eval()
    pipe = diffusers.DiTPipeline(dit.eval(), vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(n=2, **more):
    return [
        dict(class_labels=[i], generator=i, num_inference_steps=6, guidance_scale=1.0, **more)
        for i in range(n)
    ]


def attributes(pipe):
    modules = {name: set(m.__dict__) for name, m in pipe.transformer.named_modules()}
    return type(pipe), set(pipe.__dict__), modules


def faster(monkeypatch, speeds):
    """Fixed speed-ups in the place of clocks: the choice is what is tested here."""
    from fastdiff import tune

    def timed(run, some, cache=None, steps=None):
        seconds = 1 / speeds(cache, steps)
        return [run(one, cache=cache, steps=steps) for one in some], seconds

    monkeypatch.setattr(tune, "_timed", timed)


def test_a_pipeline_gets_the_fastest_that_meets_the_target(monkeypatch, tmp_path):
    faster(monkeypatch, lambda cache, steps: 1 if cache is None else cache.interval)
    pipe = pipeline()
    before = attributes(pipe)
    policies = [Forecast(2, 0), Forecast(3, 0)]
    report = fastdiff.accelerate(
        pipe, target=EASY, calibrate=inputs(), candidates=policies, fewer=[3]
    )
    assert isinstance(report, Report) and report.chosen == "Forecast(order=0)"
    assert acceleration_of(pipe).policies == [Forecast(3, 0)] and "chosen: Fore" in str(report)
    assert [r.steps for r in report.rows] == [None, None, 3]
    assert all(r.worst_psnr <= r.psnr for r in report.rows)
    pipe(class_labels=[1], num_inference_steps=6, output_type="np")
    assert "of 12 samples' parts not computed" in fastdiff.summary(pipe)
    fastdiff.restore(pipe)
    assert attributes(pipe) == before
    report.save(tmp_path / "report.json")
    fastdiff.accelerate(pipe, cache=Report.load(tmp_path / "report.json"))
    assert acceleration_of(pipe).policies == [Forecast(3, 0)]


def test_fewer_steps_may_win_and_then_no_cache_is_applied(monkeypatch):
    faster(monkeypatch, lambda cache, steps: 6 / steps if cache is None else 1.5)
    pipe = pipeline()
    report = fastdiff.accelerate(pipe, target=EASY, calibrate=inputs(), candidates=[Forecast()])
    assert report.chosen == "1 steps" and report.policy() is None
    assert "run 1 steps instead of 6" in str(report)
    assert [r.steps for r in report.rows] == [None, 1, 2, 3, 4]
    assert acceleration_of(pipe).policies == [] and "attention" in fastdiff.summary(pipe)


def test_a_target_that_nothing_meets_leaves_exact_mode():
    pipe = pipeline()
    report = fastdiff.accelerate(
        pipe, target=HARD, calibrate=inputs(), candidates=[Forecast()], fewer=[]
    )
    assert report.chosen is None and "no cache is applied" in str(report)
    assert acceleration_of(pipe).policies == []


def test_the_default_candidates_run_on_a_pipeline():
    seen = []
    report = fastdiff.accelerate(
        pipeline(), target=HARD, calibrate=inputs(), fewer=[], progress=seen.append
    )
    names = [r.name for r in report.rows]
    assert seen == ["6 steps without a cache", *names]
    assert all(r.stopped or r.psnr == math.inf for r in report.rows) and report.rows[-1].stopped
    for kind in ("Forecast(interval=2", "FirstBlock", "AccumulatedDistance", "MagnitudeRatio"):
        assert any(name.startswith(kind) for name in names), kind
    assert not any("DeepCache(" in name for name in names)


@pytest.mark.parametrize("find", [calibrate.slower, calibrate.layer_errors])
def test_layers_of_a_pipeline_have_names_that_its_policy_takes(find):
    pipe = pipeline()
    policy = Precision(least=256)
    found = find(pipe, lambda: pipe(**(inputs()[0] | {"generator": None})), policy)
    names = [name for name, _ in found] if find is calibrate.slower else list(found)
    named = tuple((name, "float") for name in names)
    fastdiff.accelerate(pipe, precision=policy)
    every = {own.name for own in acceleration_of(pipe).layers.values()}
    fastdiff.restore(pipe)
    fastdiff.accelerate(pipe, precision=Precision(least=256, layers=named))
    left = {own.name for own in acceleration_of(pipe).layers.values()}
    assert set(names) <= every and left == every - set(names) and (left != every) == bool(names)


def test_candidates_of_a_unet():
    unet, _ = models.load("unet-digits")
    found = searching.candidates(unet, [1.0, 0.9])
    assert DeepCache(3, branch=1) in found and any(isinstance(p, list) for p in found)
    assert any(isinstance(p, MagnitudeRatio) for p in found) and Forecast(3) not in found
    assert not any(isinstance(p, MagnitudeRatio) for p in searching.candidates(unet))


def test_a_candidate_over_the_limit_of_memory_is_told():
    report = fastdiff.accelerate(
        pipeline(), target=EASY, calibrate=inputs(), candidates=[Forecast()], fewer=[],
        cache_bytes=10,
    )  # fmt: skip
    (row,) = report.rows
    assert "cache_bytes is 10" in row.refused and report.chosen is None
    assert "refused: accelerate: cache_bytes is 10" in str(report)


def test_an_exception_in_the_middle_leaves_the_pipeline_clean():
    pipe = pipeline()
    before, seen = attributes(pipe), []

    def broken(got, want):
        seen.append(len(got))
        if len(seen) == 2:
            raise RuntimeError("planted")
        return got.flatten(1).mean(1)

    with pytest.raises(RuntimeError, match="planted"):
        fastdiff.accelerate(
            pipe, target=Quality(metric=broken, at_least=0), calibrate=inputs(),
            candidates=[Forecast()],
        )  # fmt: skip
    assert attributes(pipe) == before
    with pytest.raises(ValueError, match="Unet|UNet|branch"):
        fastdiff.accelerate(pipe, target=EASY, calibrate=inputs(), candidates=[DeepCache(branch=9)])
    assert attributes(pipe) == before


def test_the_halves_are_disjoint():
    pipe = pipeline()
    with pytest.raises(ValueError, match="inputs 0 and 2 are equal, and 2 is held out"):
        fastdiff.accelerate(
            pipe, target=EASY, calibrate=[*inputs(2), inputs(1)[0], inputs(4)[3]], candidates=[]
        )
    seen = []

    def note(got, want):
        seen.append(want.clone())
        return want.flatten(1).mean(1) * 0

    fastdiff.accelerate(
        pipe, target=Quality(metric=note, at_least=0), calibrate=inputs(4), fewer=[],
        candidates=[Forecast()],
    )  # fmt: skip
    one, chosen_on, held_out = seen
    assert len(one) == 1 and torch.equal(one[0], chosen_on[0])
    assert len(chosen_on) == len(held_out) == 2
    assert not any(torch.equal(a, b) for a in chosen_on for b in held_out)


def test_bad_searches():
    pipe = pipeline()
    before = attributes(pipe)
    some = dict(target=EASY, candidates=[])
    for match, bad in (
        ("without target", dict(calibrate=inputs())),
        ("target needs calibrate", some),
        ("cache and target", dict(some, calibrate=inputs(), cache=Forecast())),
        ("need a fastdiff.tune.Quality", dict(some, target=35, calibrate=inputs())),
        ("need at least 2", dict(some, calibrate=inputs(1))),
        (r"calibrate\[1\] is int", dict(some, calibrate=[inputs()[0], 3])),
        ("no one num_inference_steps", dict(some, calibrate=[*inputs(1), {"class_labels": [1]}])),
        ("generator Generator, which", dict(some, calibrate=[{"generator": torch.Generator()}])),
        ("two plain runs", dict(some, calibrate=[{"class_labels": [i]} for i in (1, 2)], steps=2)),
    ):
        with pytest.raises(ValueError, match=match):
            fastdiff.accelerate(pipe, **bad)
    with pytest.raises(TypeError, match="no argument is called candidats"):
        fastdiff.accelerate(pipe, candidats=[])
    assert attributes(pipe) == before


def test_a_network_of_its_own():
    model, _ = models.load("dit-digits")

    def run(seed, steps):
        return fastdiff.sample(
            model, (2, 1, 32, 32), steps=steps, sampler="flow_euler", seed=seed,
            classes=torch.arange(2),
        )  # fmt: skip

    report = fastdiff.accelerate(
        model, target=Quality(psnr=5), calibrate=[0, 1], run=run, steps=6, fewer=[3],
        candidates=[Forecast(3), FirstBlock(0.2)],
    )  # fmt: skip
    assert len(report.rows) == 3 and all(r.psnr < 200 for r in report.rows[:1])
    policy = report.policy()
    assert acceleration_of(model).policies == ([] if policy is None else [policy])
    fastdiff.restore(model)
    with pytest.raises(ValueError, match="needs run"):
        fastdiff.accelerate(model, target=EASY, calibrate=[0, 1])
    with pytest.raises(ValueError, match="times outside a run"):
        fastdiff.accelerate(
            model, target=EASY, calibrate=[0, 1], steps=2, candidates=[],
            run=lambda seed, steps: model(
                torch.zeros(1, 1, 32, 32), torch.tensor([0.5]), torch.tensor([1])
            ),
        )  # fmt: skip
    assert acceleration_of(model) is None


def test_nan_counts_as_missed(monkeypatch):
    faster(monkeypatch, lambda cache, steps: 1 if cache is None else 2)
    model, _ = models.load("dit-digits")

    def run(seed, steps):
        acceleration = acceleration_of(model)
        out = fastdiff.sample(
            model, (1, 1, 32, 32), steps=steps, sampler="flow_euler", seed=seed,
            classes=torch.arange(1),
        )  # fmt: skip
        return out * float("nan") if acceleration.policies else out

    report = fastdiff.accelerate(
        model, target=EASY, calibrate=[0, 1], run=run, steps=3, fewer=[], candidates=[Forecast()]
    )
    assert report.chosen is None and report.rows[0].stopped
