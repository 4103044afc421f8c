"""Reuse of the unconditional branch in pipelines of diffusers: which half it is, and no wait."""

from pathlib import Path

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.cache import DeepCache, GuidanceReuse
from fastdiff.engine.patch import Patch
from fastdiff.testing import load_file

pipelines = load_file(Path(__file__).parent / "test_pipelines.py")
POLICY = GuidanceReuse(3, alpha_low=0.0, alpha_high=0.0)
STEPS = 8
GUIDED = (
    pipelines.sd,
    pipelines.inpaint_9,
    pipelines.controlnet,
    pipelines.dit,
    pipelines.pixart,
    pipelines.sd3,
)


def network_of(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def by_hand(pipe, kwargs, cond_first):
    """The run with every output computed, and the unconditional half written over."""
    network, patch = network_of(pipe), Patch()
    plain, state = network.forward, {"step": 0}

    def forward(*args, **kw):
        out = plain(*args, **kw)
        whole = out[0] if isinstance(out, tuple) else out.sample
        cond, uncond = whole.chunk(2) if cond_first else whole.chunk(2)[::-1]
        if POLICY.full(state["step"], None):
            state["delta"] = uncond - cond
        else:
            uncond.copy_(cond + state["delta"])
        state["step"] += 1
        return out

    patch.set(network, "forward", forward)
    try:
        return pipelines.run(pipe, kwargs, STEPS), state["step"]
    finally:
        patch.undo()


@pytest.mark.parametrize("make", GUIDED, ids=lambda f: f.__name__)
def test_guided_pipelines_reuse_the_right_half_without_a_wait(make):
    pipe, kwargs = make()
    plain = pipelines.run(pipe, kwargs, STEPS)
    want, calls = by_hand(pipe, kwargs, cond_first=make is pipelines.dit)
    fastdiff.accelerate(pipe, cache=POLICY, exact=False)
    got = pipelines.run(pipe, kwargs, STEPS)
    text, trace = fastdiff.summary(pipe), pipe._fastdiff.last.trace
    assert "the host waited 0 times" in text, text
    assert [e.how for e in trace] == [
        "full" if POLICY.full(s, None) else "reuse" for s in range(calls)
    ]
    half = len(trace[-1].computed) // 2
    assert sum(trace[4].computed) == half
    assert 20 * pipelines.error(got, want) < pipelines.error(plain, want)
    assert torch.equal(pipelines.run(pipe, kwargs, STEPS), got)


@pytest.mark.parametrize("make", GUIDED, ids=lambda f: f.__name__)
def test_pipelines_without_guidance_are_left_alone(make):
    """Their batches are even, and of independent samples or of equal ones."""
    pipe, kwargs = make()
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith("negative")}
    kwargs["guidance_scale"] = 1.0
    if make in (pipelines.inpaint_9, pipelines.controlnet):
        kwargs["num_images_per_prompt"] = 2
    plain = pipelines.run(pipe, kwargs, STEPS)
    fastdiff.accelerate(pipe, cache=POLICY, exact=False)
    assert torch.equal(pipelines.run(pipe, kwargs, STEPS), plain)
    text = fastdiff.summary(pipe)
    assert "the host waited 0 times" in text and "no guidance seen" in text, text


@pytest.mark.parametrize("scale, images", ((5.0, 2), (1.0, 1)))
def test_perturbed_attention_is_left_alone(scale, images):
    """Three branches with guidance; without it two, neither of which is unconditional."""
    base, kwargs = pipelines.sd()
    parts = {k: v for k, v in base.components.items() if k != "image_encoder"}
    pipe = diffusers.StableDiffusionPAGPipeline(
        **parts, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    pipelines.quiet(pipe)
    kwargs = pipelines.stable.prompt(1, scale)
    kwargs |= dict(num_images_per_prompt=images, height=16, width=24)
    plain = pipelines.run(pipe, kwargs, STEPS, pag_scale=3.0)
    assert not torch.equal(plain, pipelines.run(pipe, kwargs, STEPS, pag_scale=0.0))
    fastdiff.accelerate(pipe, cache=POLICY, exact=False)
    assert torch.equal(pipelines.run(pipe, kwargs, STEPS, pag_scale=3.0), plain)
    text = fastdiff.summary(pipe)
    assert "the host waited 0 times" in text and "the cache never hit" in text, text
    pipelines.run(pipe, kwargs, STEPS, pag_scale=0.0)  # nothing of it stays behind
    assert ("never hit" in fastdiff.summary(pipe)) == (scale == 1)


def test_next_to_another_cache_there_is_no_wait_either():
    pipe, kwargs = pipelines.sd()
    fastdiff.accelerate(pipe, cache=[POLICY, DeepCache(2)])
    got = pipelines.run(pipe, kwargs, STEPS)
    assert got.isfinite().all() and "the host waited 0 times" in fastdiff.summary(pipe)
