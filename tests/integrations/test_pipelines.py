"""Whole pipelines of diffusers: exact mode, caches, and all that a user of them does."""

import contextlib
import inspect
from pathlib import Path

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.cache import AccumulatedDistance, Broadcast, DeepCache, FirstBlock, Forecast
from fastdiff.testing import draw_weights, load_file

HERE = Path(__file__).parent
networks = load_file(HERE / "networks.py")
more = load_file(HERE / "more_networks.py")
stable = load_file(HERE.parents[0] / "cache" / "test_deepcache.py")


def vae(channels=4):
    return draw_weights(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )
    ).eval()  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(seed=4):
    return torch.Generator().manual_seed(seed)


def sd():
    pipe = stable.pipeline()
    return pipe, dict(**stable.prompt(2), num_images_per_prompt=2, height=16, width=24)


def wider(unet, channels):
    """A U-Net like ``unet`` with as many input channels."""
    config = {k: v for k, v in unet.config.items() if k[0] != "_"} | {"in_channels": channels}
    new = draw_weights(diffusers.UNet2DConditionModel.from_config(config), 0.02).eval()
    assert new.conv_in.in_channels == channels
    return new


def inpaint(channels=4):
    pipe = stable.pipeline(diffusers.StableDiffusionInpaintPipeline)
    if channels == 9:
        pipe.unet = wider(pipe.unet, 9)
    image, mask = networks.draw(1, 3, 16, 24).clamp(-1, 1), torch.zeros(1, 1, 16, 24)
    mask[..., 8:] = 1
    return pipe, dict(**stable.prompt(), image=image, mask_image=mask, height=16, width=24)


def inpaint_9():
    return inpaint(9)


def img2img():
    pipe = stable.pipeline(diffusers.StableDiffusionImg2ImgPipeline)
    return pipe, dict(**stable.prompt(), image=networks.draw(1, 3, 16, 24), strength=0.7)


def controlnet():
    base = stable.pipeline()
    net = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8))
    draw_weights(net, 0.1).eval()
    parts = {k: v for k, v in base.components.items() if k != "image_encoder"}
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=net, requires_safety_checker=False
    )
    return quiet(pipe), dict(
        **stable.prompt(), image=networks.draw(1, 3, 16, 24), height=16, width=24
    )


def ip_adapter():
    pipe = stable.pipeline()
    weights, key = {}, 1
    for name, _ in pipe.unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            layer = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"{key}.{part}.weight"] = networks.draw(*layer.weight.shape, seed=key) * 0.2
            key += 2
    projection = {
        "proj.weight": networks.draw(4 * 16, 8, seed=5), "proj.bias": torch.zeros(4 * 16),
        "norm.weight": torch.ones(16), "norm.bias": torch.zeros(16),
    }  # fmt: skip
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    return pipe, dict(
        **stable.prompt(), ip_adapter_image_embeds=[networks.draw(2, 1, 8)], height=16, width=16
    )


def dit():
    model, _, _ = networks.dit()
    pipe = diffusers.DiTPipeline(model.eval(), vae(), diffusers.DDIMScheduler())
    return quiet(pipe), dict(class_labels=[1, 5], guidance_scale=3.0)


def pixart():
    model, _, _ = networks.pixart()
    pipe = diffusers.PixArtAlphaPipeline(
        None, None, vae(), model.eval(), diffusers.DPMSolverMultistepScheduler()
    )
    words = {
        f"{kind}prompt_{what}": value
        for kind in ("", "negative_")
        for what, value in (
            ("embeds", networks.draw(2, 7, 24, seed=len(kind))),
            ("attention_mask", torch.ones(2, 7)),
        )
    }
    return quiet(pipe), dict(
        prompt=None,
        negative_prompt=None,
        **words,
        height=16,
        width=24,
        use_resolution_binning=False,
    )


def sd3():
    model, _, kwargs = networks.sd3()
    pipe = diffusers.StableDiffusion3Pipeline(
        model.eval(), diffusers.FlowMatchEulerDiscreteScheduler(), vae(), *[None] * 6
    )
    words = dict(
        prompt_embeds=kwargs["encoder_hidden_states"],
        negative_prompt_embeds=networks.draw(2, 7, 24, seed=8),
        pooled_prompt_embeds=kwargs["pooled_projections"],
        negative_pooled_prompt_embeds=networks.draw(2, 20, seed=9),
    )
    return quiet(pipe), dict(**words, height=16, width=24)


def flux():
    model, _, kwargs = networks.flux()
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae(1), None, None, None, None, model.eval()
    )
    return quiet(pipe), dict(
        prompt_embeds=kwargs["encoder_hidden_states"],
        pooled_prompt_embeds=kwargs["pooled_projections"], height=16, width=24,
    )  # fmt: skip


def sdxl():
    model, _, kwargs = networks.sdxl()
    pipe = diffusers.StableDiffusionXLPipeline(
        vae(), *[None] * 4, model.eval(), diffusers.EulerDiscreteScheduler(), add_watermarker=False
    )
    words = dict(
        prompt_embeds=kwargs["encoder_hidden_states"],
        negative_prompt_embeds=networks.draw(2, 7, 24, seed=8),
        pooled_prompt_embeds=kwargs["added_cond_kwargs"]["text_embeds"],
        negative_pooled_prompt_embeds=networks.draw(2, 20, seed=9),
    )
    return quiet(pipe), dict(**words, height=32, width=48)


def _video(pipe):
    words = {f"{kind}prompt_embeds": networks.draw(2, 7, 24, seed=len(kind)) for kind in
             ("", "negative_")}  # fmt: skip
    return quiet(pipe), dict(**words, height=64, width=64, num_frames=5)


def wan():
    model, _, _ = networks.wan()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return _video(diffusers.WanPipeline(None, None, None, scheduler, model.eval()))


def cogvideox():
    model, _, _ = more.cogvideox()
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return _video(diffusers.CogVideoXPipeline(None, None, None, model.eval(), scheduler))


def ddpm():
    model, _, _ = networks.unet()
    pipe = diffusers.DDPMPipeline(model.eval(), diffusers.DDPMScheduler())
    return quiet(pipe), dict(batch_size=2)


UNETS = (sd, inpaint, inpaint_9, img2img, controlnet, ip_adapter, sdxl, ddpm)
TRANSFORMERS = (dit, pixart, sd3, flux, wan, cogvideox)
every = pytest.mark.parametrize("make", (*UNETS, *TRANSFORMERS), ids=lambda f: f.__name__)


@torch.no_grad()
def run(pipe, kwargs, steps=10, seed=4, **more):
    kind = "np" if type(pipe).__name__ in ("DiTPipeline", "DDPMPipeline") else "latent"
    how = {"output_type": kind} | kwargs | more
    out = pipe(**how, num_inference_steps=steps, generator=noise(seed))[0]
    return out if isinstance(out, torch.Tensor) else torch.from_numpy(out)


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@every
def test_exact_mode_and_caches(make):
    pipe, kwargs = make()
    plain = run(pipe, kwargs)
    assert plain.isfinite().all() and plain.std() > 0
    fastdiff.accelerate(pipe)
    exact = run(pipe, kwargs)
    assert error(exact, plain) < 1e-4
    fastdiff.restore(pipe)
    neutral, working = (
        ((DeepCache(1), FirstBlock(0)), (DeepCache(3), Forecast(3)))
        if make in UNETS
        else ((Forecast(1), AccumulatedDistance(0)), (Forecast(3), Broadcast(2, 2)))
    )
    for policy in neutral:
        with fastdiff.accelerated(pipe, cache=policy):
            assert torch.equal(run(pipe, kwargs), exact), policy
    for policy in working:
        with fastdiff.accelerated(pipe, cache=policy):
            got = run(pipe, kwargs)
            assert got.isfinite().all() and not torch.equal(got, exact)
            assert torch.equal(run(pipe, kwargs), got)
            assert "never hit" not in fastdiff.summary(pipe), fastdiff.summary(pipe)
    assert torch.equal(run(pipe, kwargs), plain)


@pytest.mark.parametrize("make", (sd, sd3), ids=lambda f: f.__name__)
def test_callbacks_interrupts_and_guidance_1(make):
    pipe, kwargs = make()
    policy = DeepCache(3) if make is sd else Forecast(3)

    def darker(pipe, step, time, state):
        state["latents"] = state["latents"] * 0.9
        return state

    def stop(pipe, step, time, state):
        pipe._interrupt = step >= 4
        return state

    def fail(pipe, step, time, state):
        if step == 4:
            raise KeyboardInterrupt
        return state

    unguided = {k: v for k, v in kwargs.items() if not k.startswith("negative")}
    variants = [dict(callback_on_step_end=darker), dict(callback_on_step_end=stop), {}]
    want = []
    for more in variants:
        with fastdiff.accelerated(pipe, cache=policy):
            want.append(run(pipe, kwargs, **more))
    with fastdiff.accelerated(pipe, cache=policy):
        alone = run(pipe, unguided, guidance_scale=1.0)
    fastdiff.accelerate(pipe, cache=policy)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, kwargs, callback_on_step_end=fail)
    for more, w in zip(variants, want, strict=True):
        assert torch.equal(run(pipe, kwargs, **more), w)
    assert not torch.equal(want[0], want[2])
    assert torch.equal(run(pipe, unguided, guidance_scale=1.0), alone)


def test_another_scheduler_size_strength_and_batch_between_runs():
    pipe, kwargs = sd()
    schedulers = [
        diffusers.EulerDiscreteScheduler(), diffusers.HeunDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(), diffusers.LCMScheduler(),
    ]  # fmt: skip
    calls = [dict(), dict(height=24, width=16), dict(num_images_per_prompt=1), dict(steps=13)]

    def draw(scheduler, more):
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
        return run(
            pipe, kwargs | {k: v for k, v in more.items() if k != "steps"}, more.get("steps", 10)
        )

    pairs = [(s, c) for s in schedulers for c in calls]
    want = []
    for scheduler, more in pairs:
        with fastdiff.accelerated(pipe, cache=DeepCache(2, order=1)):
            want.append(draw(scheduler, more))
    fastdiff.accelerate(pipe, cache=DeepCache(2, order=1))
    for (scheduler, more), w in zip(pairs, want, strict=True):
        assert torch.equal(draw(scheduler, more), w)
    times = run(pipe, kwargs | dict(timesteps=[900, 500, 400, 100, 50]), None)
    assert times.isfinite().all()


def test_weights_that_change_within_a_run_are_seen():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    for make, policy in ((sd, DeepCache(4)), (sd3, Forecast(9, order=0, warmup=1))):
        pipe, kwargs = make()
        net = pipe.unet if make is sd else pipe.transformer
        torch.manual_seed(1)
        net.add_adapter(config, "one")
        fastdiff.accelerate(pipe, cache=policy)
        quietly = run(pipe, kwargs)
        full = sum(all(e.computed) for e in pipe._fastdiff.last.trace)
        bias = (net.conv_in if make is sd else net.proj_out).bias

        def change(pipe, step, time, state, net=net, bias=bias):
            if step == 5:
                net.set_adapters(["one"], [3.0])
            if step == 6:
                bias.add_(1)
            return state

        got = run(pipe, kwargs, callback_on_step_end=change)
        trace = pipe._fastdiff.last.trace
        assert all(trace[6].computed) and all(trace[7].computed)
        assert sum(all(e.computed) for e in trace) > full
        assert not torch.equal(got, quietly)
        text = fastdiff.summary(pipe)
        assert "weights changed before step 6" in text and "before step 7" in text
        fastdiff.restore(pipe)


@every
def test_signatures_stay(make):
    """Pipelines look at them for what a scheduler or network may be given."""
    pipe, _ = make()
    parts = [pipe.__call__, pipe.scheduler.step]
    network = pipe.unet if make in UNETS else pipe.transformer
    parts.append(network.forward)
    before = [inspect.signature(part) for part in parts]
    with fastdiff.accelerated(pipe, cache=DeepCache(2) if make in UNETS else Forecast(2)):
        with contextlib.suppress(Exception):
            run(pipe, {}, steps=1)  # the scheduler is wrapped when a run begins
        after = [
            inspect.signature(f) for f in (pipe.__call__, pipe.scheduler.step, network.forward)
        ]
    assert after == before


def state_of(pipe):
    """Everything that accelerate might leave behind in a pipeline's modules."""
    found = {}
    for name, part in pipe.components.items():
        for path, m in part.named_modules() if isinstance(part, torch.nn.Module) else ():
            hooks = [len(getattr(m, h)) for h in ("_forward_hooks", "_forward_pre_hooks")]
            found[name, path] = type(m), sorted(m.__dict__), m.forward.__func__, hooks
        if isinstance(part, torch.nn.Module):
            found[name] = {k: v.data_ptr() for k, v in part.state_dict().items()}
    return found, type(pipe), sorted(pipe.__dict__), sorted(vars(pipe.scheduler))


@every
def test_restore_leaves_all_as_it_was(make):
    pipe, kwargs = make()
    want = run(pipe, kwargs, steps=4)
    before = state_of(pipe)
    with fastdiff.accelerated(pipe, cache=DeepCache(2) if make in UNETS else Forecast(2)):
        run(pipe, kwargs, steps=4)
    assert state_of(pipe) == before
    assert torch.equal(run(pipe, kwargs, steps=4), want)


def test_a_hundred_cycles_leak_nothing():
    import gc
    import tracemalloc

    pipe, kwargs = dit()

    def cycle():
        with fastdiff.accelerated(pipe, cache=[Broadcast(2, 2), Forecast(2)]):
            run(pipe, kwargs, steps=2)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    for _ in range(3):
        cycle()
    count = tensors()
    tracemalloc.start()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(100):
        with fastdiff.accelerated(pipe, cache=[Broadcast(2, 2), Forecast(2)]):
            pass
    for _ in range(3):
        cycle()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert tensors() == count and grown < 50_000


@pytest.mark.parametrize("first", ("hook", "accelerate"))
def test_hooks_that_come_and_go_with_every_run(first):
    """As those of ``enable_model_cpu_offload``, which a pipeline takes off and puts on again."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Hook(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Hook.calls += 1
            return args, kwargs

    pipe, kwargs = sd()
    plain = run(pipe, kwargs)
    with fastdiff.accelerated(pipe, cache=DeepCache(3)):
        want = run(pipe, kwargs)
    steps = [lambda: hooks.add_hook_to_module(pipe.unet, Hook()),
             lambda: fastdiff.accelerate(pipe, cache=DeepCache(3))]  # fmt: skip
    for step in steps if first == "hook" else reversed(steps):
        step()
    for i in range(1, 4):
        assert torch.equal(run(pipe, kwargs), want) and Hook.calls == 10 * i
        assert "never hit" not in fastdiff.summary(pipe)
        hooks.remove_hook_from_module(pipe.unet)
        hooks.add_hook_to_module(pipe.unet, Hook())
    fastdiff.restore(pipe)
    assert torch.equal(run(pipe, kwargs), plain) and Hook.calls == 40
    fastdiff.accelerate(pipe, cache=DeepCache(3))
    hooks.remove_hook_from_module(pipe.unet)
    assert torch.equal(run(pipe, kwargs), want) and Hook.calls == 40
    fastdiff.restore(pipe)
    assert torch.equal(run(pipe, kwargs), plain)
