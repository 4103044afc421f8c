"""Encoder propagation: key steps, runs of pipelines, prior noise, equality with a plain loop."""

from pathlib import Path

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.cache import EncoderPropagation
from fastdiff.cache.faster_diffusion import NAMED
from fastdiff.testing import load_file

deepcache = load_file(Path(__file__).parent / "test_deepcache.py")
views = load_file(Path(__file__).parents[1] / "integrations" / "test_unet_views.py")
draw, last, pipeline, relative = (
    getattr(deepcache, name) for name in ("draw", "last", "pipeline", "relative")
)


def accelerated(pipe, policy):
    return fastdiff.accelerate(pipe, cache=policy, exact=False)


# The schedule.


@pytest.mark.parametrize("name", NAMED)
def test_named_key_steps(name):
    policy = EncoderPropagation(name)
    assert tuple(i for i in range(50) if policy.full(i, 50)) == NAMED[name]
    twice = [i for i in range(100) if policy.full(i, 100)]
    assert twice == [2 * i for i in NAMED[name]]


def test_key_steps_of_other_counts():
    def keys(policy, steps):
        return [i for i in range(steps) if policy.full(i, steps)]

    assert keys(EncoderPropagation("50ls"), 20) == [0, 1, 2, 4, 6, 10, 14]
    assert keys(EncoderPropagation([0, 3, 9]), 20) == [0, 3, 9]
    assert keys(EncoderPropagation([0, 3, 9], of=10), 20) == [0, 6, 18]
    assert keys(EncoderPropagation(4), 10) == [0, 4, 8]
    assert EncoderPropagation(4).full(8, None) and EncoderPropagation([0, 8]).full(8, None)
    with pytest.raises(ValueError, match="need the number of steps"):
        EncoderPropagation("50ls").full(0, None)


@pytest.mark.parametrize(
    "settings, need",
    [
        (dict(key_steps="60ls"), "key_steps is '60ls', need one of 50ls"),
        (dict(key_steps=0), "key_steps is 0, need an integer of at least 1"),
        (dict(key_steps=[1, 4]), "ascending integers from 0"),
        (dict(key_steps=[0, 9], of=9), "of is 9, need an integer of at least 10"),
        (dict(key_steps=5, of=50), "of is 50, need None"),
        (dict(of=20), "written for 50 steps"),
        (dict(parallel=0), "parallel is 0"),
        (dict(inject=-0.1), "inject is -0.1, need a number from 0 to 1"),
        (dict(inject_below=2), "inject_below is 2"),
    ],
)
def test_bad_settings(settings, need):
    with pytest.raises(ValueError, match=f"EncoderPropagation: .*{need}"):
        EncoderPropagation(**settings)


# Networks.


@pytest.mark.parametrize("name", views.MODELS)
def test_reuse_of_the_same_input_is_the_key_step(name):
    x, more = views.inputs(name)
    plain, again = views.same_input_twice(
        views.MODELS[name](), EncoderPropagation(5), x, lambda: dict(more)
    )
    assert torch.equal(again, plain)


def test_odd_sizes():
    x, more = views.inputs("sd15", 13, 22)
    plain, again = views.same_input_twice(
        views.sd15(), EncoderPropagation(5), x, lambda: dict(more)
    )
    assert torch.equal(again, plain)


@torch.no_grad()
def test_residuals_are_those_of_the_key_step():
    """ControlNet's are kept within the features; what comes at other steps is not read."""
    model = views.sd15()
    x, more = views.inputs("sd15")
    down, mid = views.controlnet_residuals(model)

    def call(scale, **other):
        return model(
            x, down_block_additional_residuals=[scale * d for d in down],
            mid_block_additional_residual=scale * mid, **{**more, **other},
        )[0]  # fmt: skip

    plain = call(1.0)
    with fastdiff.accelerated(model, cache=EncoderPropagation(5), exact=False):
        with fastdiff.request(20, 1):
            assert torch.equal(call(1.0), plain)
            assert torch.equal(call(7.0), plain)
            assert not torch.equal(call(1.0, timestep=torch.tensor(800)), plain)


def test_t2i_adapter_and_freeu():
    model = views.sdxl()
    for block in model.up_blocks:
        for name, value in dict(s1=0.9, s2=0.2, b1=1.2, b2=1.4).items():
            setattr(block, name, value)
    x, more = views.inputs("sdxl")
    residuals = [torch.randn(2, c, n, n) for c, n in ((16, 8), (32, 8), (32, 4), (32, 4))]

    def call():
        return dict(more, down_intrablock_additional_residuals=[r.clone() for r in residuals])

    plain, again = views.same_input_twice(model, EncoderPropagation(5), x, call)
    assert torch.equal(again, plain)


@torch.no_grad()
def test_only_the_way_up_runs():
    model = views.sd15()
    x, more = views.inputs("sd15")
    called = []

    def note(name, out):
        if len(out):  # conv_in is called, and gives nothing
            called.append(name)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda m, args, out, name=name: note(name, out))
    with fastdiff.accelerated(model, cache=EncoderPropagation(5), exact=False):
        with fastdiff.request(20, 1):
            model(x, **more)
            called.clear()
            model(x, **more)
    assert {name.split(".")[0] for name in called} == {"time_embedding", "up_blocks", "conv_out"}


# Runs.


@pytest.mark.parametrize("scale, batch", [(5.0, 1), (1.0, 2)])
def test_all_key_steps_is_plain(scale, batch):
    pipe = pipeline()
    plain = draw(pipe, 5, batch, scale)
    assert torch.equal(draw(accelerated(pipe, EncoderPropagation(1)), 5, batch, scale), plain)
    assert [e.how for e in last(pipe).trace] == ["full"] * 5


def features_loop(pipe, keys, steps, inject=0.0):
    """The method by hooks on a plain network: features taken at key steps, put back at others."""
    unet, kept, now = pipe.unet, {}, {}

    def look(module, args, kwargs):
        place = list(unet.up_blocks).index(module)
        fresh = ("hidden_states", "res_hidden_states_tuple")
        if now["step"] in keys:
            kept[place] = {k: kwargs[k] for k in fresh}
            return None
        skips = kept[place]["res_hidden_states_tuple"]
        hidden = kept[place]["hidden_states"] if place == 0 else kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": hidden, "res_hidden_states_tuple": skips}

    hooks = [b.register_forward_pre_hook(look, with_kwargs=True) for b in unet.up_blocks]
    words = deepcache.prompt()
    both = torch.cat((words["negative_prompt_embeds"], words["prompt_embeds"]))
    pipe.scheduler.set_timesteps(steps)
    g = torch.Generator().manual_seed(4)
    side = 16 // pipe.vae_scale_factor
    x = start = torch.randn(1, 4, side, side, generator=g) * pipe.scheduler.init_noise_sigma
    with torch.no_grad():
        for now["step"], t in enumerate(pipe.scheduler.timesteps):
            if inject and t / 1000 < 0.5:
                x = x + inject * start
            scaled = pipe.scheduler.scale_model_input(torch.cat((x, x)), t)
            null, cond = unet(scaled, t, encoder_hidden_states=both)[0].chunk(2)
            x = pipe.scheduler.step(null + 5.0 * (cond - null), t, x)[0]
    for hook in hooks:
        hook.remove()
    return x


@pytest.mark.parametrize("inject", [0.0, 0.05])
@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_a_pipeline_is_the_method_by_hand(scheduler, inject):
    pipe = pipeline()
    pipe.scheduler = getattr(diffusers, scheduler)()
    keys = (0, 1, 4, 9)
    by_hand = features_loop(pipe, keys, 12, inject)
    plain = draw(pipe, 12)
    accelerated(pipe, EncoderPropagation(keys, inject=inject))
    got = draw(pipe, 12)
    assert relative(got, by_hand) < 1e-5 and relative(got, plain) > 1e-4
    run = last(pipe)
    assert [e.step for e in run.trace if e.how == "full"] == list(keys) and run.syncs == 0
    if inject:
        fastdiff.restore(pipe)
        assert relative(draw(accelerated(pipe, EncoderPropagation(keys)), 12), got) > 1e-3


def test_noise_with_a_scheduler_of_second_order():
    pipe = pipeline()
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    accelerated(pipe, EncoderPropagation(3, inject=0.01))
    with pytest.raises(ValueError, match="needs a scheduler of order 1; HeunDiscreteScheduler"):
        draw(pipe, 12)
    fastdiff.restore(pipe)
    with pytest.raises(ValueError, match="which needs a pipeline"):
        accelerated(pipe.unet, EncoderPropagation(3, inject=0.01))


def test_what_is_kept_is_the_features():
    """Nine skips and the middle's result, in bytes, for both halves of guidance."""
    pipe = accelerated(pipeline(), EncoderPropagation(4))
    seen = []

    def look(pipe, i, t, values):
        state = fastdiff.engine.request.current().state
        (kept,) = (v for k, v in state.items() if k[-1] == "unet")
        (first, *others) = (history.values[0] for history in kept.stages.values())
        hidden, skips = [first[0]], [*first[1:], *(s for group in others for s in group)]
        seen.append((len(skips), sum(t.nbytes for t in hidden + skips)))
        return {}

    draw(pipe, 12, callback_on_step_end=look)
    pixels = [16 * 64] * 3 + [16 * 16] + [32 * 16] * 2 + [32 * 4] * 3 + [32 * 4]
    assert seen == [(9, 2 * 4 * sum(pixels))] * 12 and not last(pipe).state


def test_an_interrupted_run_leaves_nothing_to_the_next():
    pipe = accelerated(pipeline(), EncoderPropagation(4, inject=0.01))
    fresh = draw(pipe, 12)

    def fail(pipe, i, t, values):
        if i == 6:
            raise RuntimeError("stop")
        return {}

    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, 12, callback_on_step_end=fail)
    assert torch.equal(draw(pipe, 12), fresh)
