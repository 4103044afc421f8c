"""Networks of diffusers in our samplers and sampling programs, by the number of a condition."""

from pathlib import Path

import diffusers
import pytest
import torch

import fastdiff
from fastdiff import methods, samplers
from fastdiff.cache import DeepCache, Forecast
from fastdiff.integrations import Conditioned
from fastdiff.samplers import VP, Flow
from fastdiff.testing import load_file

networks = load_file(Path(__file__).with_name("networks.py"))
STEPS = 5


def rows(*shape, seed):
    """Three conditions and none."""
    return networks.draw(4, *shape, seed=seed)


def sd15():
    net, (x, _), _ = networks.sd15()
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    return Conditioned(net, {"encoder_hidden_states": rows(7, 24, seed=2)}, scheduler=scheduler), x


def sdxl():
    net, (x, _), _ = networks.sdxl()
    told = {
        "encoder_hidden_states": rows(7, 24, seed=2),
        "added_cond_kwargs.text_embeds": rows(20, seed=3),
        "added_cond_kwargs.time_ids": torch.arange(24.0).view(4, 6),
    }
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    return Conditioned(net, told, scheduler=scheduler), x


def sd3():
    net, (x,), _ = networks.sd3()
    told = {
        "encoder_hidden_states": rows(7, 24, seed=2),
        "pooled_projections": rows(20, seed=3),
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Conditioned(net, told, scheduler=scheduler), x


def flux():
    net, (x,), kwargs = networks.flux()
    told = {
        "encoder_hidden_states": rows(7, 24, seed=2),
        "pooled_projections": rows(20, seed=3),
        "guidance": torch.full((4,), 3.5),
    }
    grids = {name: kwargs[name] for name in ("img_ids", "txt_ids")}
    flow = dict(prediction="flow", schedule=Flow(1.15), time_scale=0.001)
    return Conditioned(net, told, **flow, **grids), x


def dit():
    net, (x,), _ = networks.dit()
    return Conditioned(net, {"class_labels": torch.tensor([3, 5, 7, 1000])}, prediction="eps"), x


every = pytest.mark.parametrize("make", [sd15, sdxl, sd3, flux, dit], ids=lambda f: f.__name__)


def settings(model, x):
    sampler = "euler" if model.prediction == "flow" else "ddpm"
    y = torch.tensor([2, 0])
    return dict(classes=y, guidance=2.0, sampler=sampler, steps=STEPS, seed=torch.tensor([4, 9]))


@every
@torch.no_grad()
def test_a_call_is_that_of_the_network(make):
    model, x = make()
    t, y = torch.tensor([800.0, 20.0]), torch.tensor([1, 3])
    told = {}
    for i, name in enumerate(model._names):
        outer, _, inner = name.partition(".")
        value = getattr(model, f"condition_{i}")[y]
        if inner:
            told.setdefault(outer, {})[inner] = value
        else:
            told[outer] = value
    out = model.network(
        x, timestep=t * model.time_scale, **told, **model.constant, return_dict=False
    )[0]
    assert torch.equal(model(x, t, y), out)
    assert model.num_classes == 3


@pytest.mark.parametrize("make", [sd15, sd3], ids=lambda f: f.__name__)
def test_a_run_is_that_of_the_pipelines_scheduler(make):
    """Sampled by diffusers' own scheduler: its steps, its timesteps."""
    model, x = make()
    y = torch.tensor([2, 0])
    if make is sd3:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        sampler, schedule = "euler", None
    else:
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        )  # fmt: skip
        sampler, schedule = samplers.DDIM(spacing="trailing"), None
    if make is sd3:  # as Flux's pipeline spaces them
        scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)])
    else:
        scheduler.set_timesteps(STEPS)
    want = x.clone()
    with torch.no_grad():
        for t in scheduler.timesteps:
            each = t.expand(2).float()
            none, told = model(want, each, torch.full_like(y, 3)), model(want, each, y)
            want = scheduler.step(none + 2.0 * (told - none), t, want).prev_sample
    got = fastdiff.sample(
        model, x, classes=y, guidance=2.0, sampler=sampler, steps=STEPS, schedule=schedule
    )
    worst = (got - want).abs().max() / want.abs().max()
    assert worst < 2e-4, float(worst)


@every
def test_programs_and_caches(make):
    model, x = make()
    how = settings(model, x)
    plain = fastdiff.sample(model, x, **how)
    assert plain.shape == x.shape and plain.isfinite().all()
    unet = hasattr(model.network, "up_blocks")
    cache = DeepCache(2) if unet else Forecast(2)
    fastdiff.accelerate(model, cache=cache)
    cached = fastdiff.sample(model, x, **how)
    assert not torch.equal(cached, plain) and "reused" in fastdiff.summary(model)
    assert "outside a run" not in fastdiff.summary(model)
    captured = fastdiff.programs(model)
    for _ in range(2):
        assert torch.equal(fastdiff.sample(captured, x, **how), cached)
    assert captured.network.kinds >= 2
    fastdiff.restore(model)
    assert torch.equal(fastdiff.sample(model, x, **how), plain)


@every
def test_particles_are_steered(make):
    model, x = make()
    how = settings(model, x) | {"sampler": samplers.DDIM(eta=1.0)}
    if model.prediction == "flow":
        pytest.skip("a flow's sampler draws no noise")
    found = methods.fk_steering(
        model, x, lambda x0: x0.flatten(1).mean(1), particles=3, at=[1, 2, 3], lam=5.0, **how
    )
    assert found.x.shape == (2, 3, *x.shape[1:]) and found.x.isfinite().all()
    again = methods.fk_steering(
        model, x, lambda x0: x0.flatten(1).mean(1), particles=3, at=[1, 2, 3], lam=5.0,
        cache=DeepCache(1) if hasattr(model.network, "up_blocks") else Forecast(1), **how,
    )  # fmt: skip
    assert torch.equal(again.x, found.x)


@pytest.mark.parametrize("make", [sd15, sd3], ids=lambda f: f.__name__)
def test_gradients_go_through(make):
    model, x = make()
    how = settings(model, x) | {"sampler": "euler", "guidance": 1.0}
    energy = lambda x0: (x0 - 1).square().flatten(1).mean(1)  # noqa: E731
    plain = methods.steered(model, x, energy, scale=0.0, **how)
    steered = methods.steered(model, x, energy, scale=2.0, **how)
    assert (energy(steered) < energy(plain)).all()


def test_bad_input():
    net, (x, t), _ = networks.sd15()
    told = {"encoder_hidden_states": rows(7, 24, seed=2)}
    good = dict(network=net, conditions=told, prediction="eps")
    for bad, words in (
        (dict(network=3), "network is int, need an nn.Module"),
        (dict(prediction=None), "need exactly one of scheduler and prediction"),
        (dict(scheduler=diffusers.DDIMScheduler()), "need exactly one of scheduler and prediction"),
        (dict(prediction="noise"), "prediction is 'noise', need one of eps"),
        (dict(conditions={**told, "pooled": rows(20, seed=3)[:2]}), "need as many of each"),
        (dict(conditions={"pooled": 3}), "need as many of each"),
        (dict(prediction=None, scheduler=3), "scheduler is int, need one of diffusers"),
        (
            dict(
                prediction=None,
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            ),
            "shifts by the size of the picture",
        ),
        (
            dict(prediction=None, scheduler=diffusers.EDMEulerScheduler()),
            "neither alphas_cumprod nor the shift",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            Conditioned(**{**good, **bad})
    with pytest.raises(ValueError, match="y is None"):
        Conditioned(**good)(x, t)
    for classes in (torch.tensor([4, 0]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="sample: classes has value (4|-1), need 0 to 3"):
            fastdiff.sample(Conditioned(**good), x, classes=classes, steps=2)
    with pytest.raises(ValueError, match="needs a pipeline"):
        fastdiff.accelerate(
            Conditioned(**good), cache=fastdiff.cache.EncoderPropagation(2, inject=0.1)
        )
    assert isinstance(Conditioned(net, told, scheduler=diffusers.DDIMScheduler()).schedule, VP)
