"""DeepCache: its schedule, runs of pipelines, equality with the authors' package."""

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.cache import DeepCache
from fastdiff.cache.deepcache import quad_steps
from fastdiff.testing import draw_weights

SIZES = dict(block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8)


def unet():
    return draw_weights(
        diffusers.UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16, attention_head_dim=2, sample_size=8, **SIZES,
        )
    )  # fmt: skip


def pipeline(cls=diffusers.StableDiffusionPipeline):
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = cls(
        vae=draw_weights(vae), text_encoder=None, tokenizer=None, unet=unet(),
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(batch=1, scale=5.0):
    g = torch.Generator().manual_seed(3)
    words = dict(prompt_embeds=torch.randn(batch, 5, 16, generator=g), guidance_scale=scale)
    if scale > 1:
        words["negative_prompt_embeds"] = torch.randn(batch, 5, 16, generator=g)
    return words


def draw(pipe, steps=12, batch=1, scale=5.0, size=16, **more):
    g = torch.Generator().manual_seed(4)
    return pipe(
        **prompt(batch, scale), num_inference_steps=steps, height=size, width=size, generator=g,
        output_type="latent", **more,
    ).images  # fmt: skip


def hows(run):
    return [event.how for event in run.trace]


def last(pipe):
    return pipe._fastdiff.last


def kept_bytes(state):
    return sum(t.nbytes for kept in state.values() for (t,) in kept.history.values)


# The schedule.


@pytest.mark.parametrize("steps", [1, 7, 12, 50])
@pytest.mark.parametrize("interval", [1, 2, 3, 5, 60])
def test_uniform_has_a_full_step_every_interval(steps, interval):
    full = [i for i in range(steps) if DeepCache(interval).full(i, steps)]
    assert full == list(range(0, steps, interval))


def authors_quad(steps, count, center, power):
    """sample_from_quad_center of the authors' repository, as a formula."""
    while power > 1:
        with np.errstate(all="ignore"):
            low = np.complex128(-center) ** (1 / power)
            x = np.linspace(low, (steps - center) ** (1 / power), count + 1)
            cut = np.unique((x**power).real.astype(np.int32))
        indices = [0] + [int(v) + center for v in cut[1:-1]]
        if len(indices) == count:
            return indices
        power -= 0.02


@pytest.mark.parametrize("center", [0, 10, 15])
@pytest.mark.parametrize("interval", [3, 5, 10])
def test_quad_values(interval, center):
    got = quad_steps(50, interval, center, 1.4)
    assert sorted(got) == sorted(authors_quad(50, -(-50 // interval), center, 1.4))
    policy = DeepCache(interval, schedule="quad", center=center, power=1.4)
    assert {i for i in range(50) if policy.full(i, 50)} == got and policy.full(0, 50)
    assert len(got) == -(-50 // interval)


def test_quad_by_hand():
    # 16^(1/2) = 4 in 4 parts, squared: 0 1 4 9 (16)
    assert quad_steps(16, 4, 0, 2.0) == {0, 1, 4, 9}


@pytest.mark.parametrize(
    "settings, need",
    [
        (dict(interval=0), "interval is 0, need an integer of at least 1"),
        (dict(interval=2.5), "interval is 2.5"),
        (dict(branch=-1), "branch is -1"),
        (dict(branch=True), "branch is True"),
        (dict(schedule="cubic"), "schedule is 'cubic'"),
        (dict(schedule=[1, 2]), r"schedule is \[1, 2\], need ascending integers from 0"),
        (dict(schedule=[0, 4, 2]), "ascending"),
        (dict(schedule=[]), "ascending"),
        (dict(power=1.0), "power is 1.0, need a number above 1"),
        (dict(center=-3), "center is -3"),
    ],
)
def test_bad_settings(settings, need):
    with pytest.raises(ValueError, match=f"DeepCache: {need}|{need}"):
        DeepCache(**settings)


def test_quad_needs_the_number_of_steps_and_room():
    with pytest.raises(ValueError, match="need the number of steps"):
        DeepCache(schedule="quad").full(0, None)
    with pytest.raises(ValueError, match="finds no 30 distinct steps of 30"):
        quad_steps(30, 1, 0, 1.2)


# Runs.


@pytest.mark.parametrize("scale, batch", [(5.0, 1), (1.0, 1), (5.0, 2)])
def test_interval_1_is_plain_and_keeps_nothing(scale, batch):
    pipe = pipeline()
    plain = draw(pipe, 5, batch, scale)
    fastdiff.accelerate(pipe, cache=DeepCache(1), exact=False)
    seen = []
    got = draw(
        pipe, 5, batch, scale,
        callback_on_step_end=lambda *a: seen.append(
            len(fastdiff.engine.request.current().state)
        ) or {},
    )  # fmt: skip
    assert torch.equal(got, plain) and hows(last(pipe)) == ["full"] * 5 and seen == [0] * 5


@pytest.mark.parametrize(
    "policy",
    [
        DeepCache(3),
        DeepCache(5, branch=4),
        DeepCache(3, schedule="quad", center=4, power=1.4),
        DeepCache(schedule=[0, 1, 5, 9]),
    ],
    ids=str,
)
def test_full_steps_are_those_of_the_schedule(policy):
    pipe = fastdiff.accelerate(pipeline(), cache=policy, exact=False)
    draw(pipe, 12)
    run = last(pipe)
    assert [e.step for e in run.trace] == list(range(12)) and run.syncs == 0
    assert hows(run) == ["full" if policy.full(i, 12) else "reuse" for i in range(12)]
    assert all(e.computed == (e.how == "full",) * 2 for e in run.trace)


def packaged(pipe, interval, branch, **more):
    package = pytest.importorskip(
        "DeepCache.extension.deepcache", reason="the authors' package DeepCache is not installed"
    )
    helper = package.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        return draw(pipe, **more)
    finally:
        helper.disable()


def relative(got, need):
    return ((got - need).norm() / need.norm()).item()


@pytest.mark.parametrize(
    "interval, branch", [(2, 0), (3, 1), (5, 2), (3, 3), (5, 5), (2, 7), (3, 8)]
)
def test_equals_the_authors_package(interval, branch):
    pipe = pipeline()
    theirs = packaged(pipe, interval, branch)
    plain = draw(pipe)
    with fastdiff.accelerated(pipe, cache=DeepCache(interval, branch), exact=False):
        got = draw(pipe)
    assert relative(got, theirs) < 1e-4 < relative(plain, theirs)


def test_equals_the_authors_package_in_batches_without_guidance():
    pipe = pipeline()
    theirs = packaged(pipe, 3, 1, batch=2, scale=1.0)
    with fastdiff.accelerated(pipe, cache=DeepCache(3, 1), exact=False):
        assert relative(draw(pipe, batch=2, scale=1.0), theirs) < 1e-4


def test_image_to_image_counts_from_the_start_of_its_run():
    pipe = fastdiff.accelerate(
        pipeline(diffusers.StableDiffusionImg2ImgPipeline), cache=DeepCache(3)
    )
    for strength, steps in ((0.5, 6), (0.9, 10), (0.5, 6)):
        pipe(
            **prompt(), image=torch.zeros(1, 3, 16, 16), strength=strength,
            num_inference_steps=12, output_type="latent",
        )  # fmt: skip
        assert hows(last(pipe)) == (["full", "reuse", "reuse"] * 4)[:steps]
        assert last(pipe).steps == steps


def test_one_tensor_is_kept():
    """The hidden state that enters the last layer of the way up: [2 B, 16, 8, 8] here."""
    pipe = fastdiff.accelerate(pipeline(), cache=DeepCache(3), exact=False)
    seen = []

    def look(pipe, i, t, values):
        seen.append(kept_bytes(fastdiff.engine.request.current().state))
        return {}

    draw(pipe, 12, callback_on_step_end=look)
    one = 2 * 16 * 8 * 8 * 4
    assert seen == [one] * 12 and not last(pipe).state


def test_an_interrupted_run_leaves_nothing_to_the_next():
    pipe = fastdiff.accelerate(pipeline(), cache=DeepCache(3), exact=False)
    fresh = draw(pipe)

    def interrupt(pipe, i, t, values):
        pipe._interrupt = i >= 4
        return {}

    draw(pipe, callback_on_step_end=interrupt)
    assert not last(pipe).state
    assert torch.equal(draw(pipe), fresh)

    def fail(pipe, i, t, values):
        if i == 4:
            raise RuntimeError("stop")
        return {}

    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, callback_on_step_end=fail)
    assert torch.equal(draw(pipe), fresh)


def test_restored_pipeline_is_plain():
    pipe = pipeline()
    plain = draw(pipe)
    fastdiff.restore(fastdiff.accelerate(pipe, cache=DeepCache(3, 4), exact=False))
    assert torch.equal(draw(pipe), plain)
    assert not any("forward" in m.__dict__ for m in pipe.unet.modules())


# Loops of one's own.


def inputs(batch=2, size=8):
    return torch.randn(batch, 4, size, size), torch.tensor(300), torch.randn(batch, 5, 16)


def call(model, *args):
    return model(*args, return_dict=False)[0]


def test_two_runs_in_turns_are_two_runs_alone():
    model = fastdiff.accelerate(unet(), cache=DeepCache(3, 1), exact=False)
    jobs = [inputs(2, 8), inputs(1, 16)]

    def step(x, t, words, run):
        with torch.no_grad(), run.active():
            return x - 0.1 * call(model, x, t, words)

    alone = []
    for x, t, words in jobs:
        run = fastdiff.engine.request.Request(9, 1)
        for _ in range(9):
            x = step(x, t, words, run)
        alone.append(x)
    runs = [fastdiff.engine.request.Request(9, 1) for _ in jobs]
    states = [x for x, _, _ in jobs]
    for _ in range(9):
        states = [step(x, j[1], j[2], r) for x, j, r in zip(states, jobs, runs, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(states, alone, strict=True))


@torch.no_grad()
def test_guidance_calls_of_one_step_have_their_own_slots():
    model = unet()
    x, t, words = inputs()
    other = words.flip(0)
    with fastdiff.accelerated(model, cache=DeepCache(4), exact=False):
        results = []
        with fastdiff.request(8, calls_per_step=2) as run:
            for i in range(3):
                results.append((call(model, x + i, t, words), call(model, x + i, t, other)))
            assert len(run.state) == 2
        for k, w in enumerate((words, other)):
            with fastdiff.request(8, 1):
                for i in range(3):
                    assert torch.equal(call(model, x + i, t, w), results[i][k])


@torch.no_grad()
def test_another_shape_or_dtype_in_a_run_is_computed():
    model = unet()
    x, t, words = inputs()
    with (
        fastdiff.accelerated(model, cache=DeepCache(50), exact=False),
        fastdiff.request(50, 1) as run,
    ):
        for a, w in ((x, words), (x, words), (x[:1], words[:1]), (x[:1], words[:1]), (x, words)):
            call(model, a, t, w)
        model.double()
        call(model, x.double(), t, words.double())
        assert hows(run) == ["full", "reuse", "full", "reuse", "full", "full"]
        assert len(run.state) == 1


def test_no_cache_in_training_or_with_gradients_or_outside_a_run():
    model = unet()
    x, t, words = inputs()
    plain = call(model, x, t, words)
    with fastdiff.accelerated(model, cache=DeepCache(5), exact=False):
        with torch.no_grad():
            assert torch.equal(call(model, x, t, words), plain)
            assert torch.equal(call(model, x + 0, t, words), plain)
        with fastdiff.request(9, 1) as run:
            call(model, x, t, words).sum().backward()
            model.train()
            with torch.no_grad():
                call(model, x, t, words)
            model.eval()
        assert hows(run) == ["off: gradients are recorded", "off: the network is in training mode"]
        assert model.conv_in.weight.grad is not None and not run.state


@torch.no_grad()
def test_what_is_kept_is_a_copy():
    """Someone who writes into what a layer returned changes nothing later."""
    model = unet()
    x, t, words = inputs()
    plain = call(model, x, t, words)
    entered = []
    model.up_blocks[2].attentions[1].register_forward_hook(lambda m, a, out: entered.append(out[0]))
    with fastdiff.accelerated(model, cache=DeepCache(5), exact=False), fastdiff.request(9, 1):
        call(model, x, t, words)
        entered[0].fill_(torch.nan)
        assert torch.equal(call(model, x, t, words), plain)


@torch.no_grad()
def test_few_steps_are_warned_of():
    model = unet()
    with fastdiff.accelerated(model, cache=DeepCache(2), exact=False):
        with pytest.warns(UserWarning, match="a run of 4 steps"), fastdiff.request(4, 1):
            call(model, *inputs())


@torch.no_grad()
def test_skipped_modules_are_not_called():
    model = unet()
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with fastdiff.accelerated(model, cache=DeepCache(5), exact=False), fastdiff.request(9, 1):
        call(model, *inputs())
        calls.clear()
        call(model, *inputs())
    assert set(calls) == {
        "conv_in", "conv_out", "up_blocks.2.resnets.2.conv1", "up_blocks.2.resnets.2.conv2",
        "up_blocks.2.resnets.2.conv_shortcut", "up_blocks.2.attentions.2.proj_in",
        "up_blocks.2.attentions.2.proj_out",
    }  # fmt: skip
