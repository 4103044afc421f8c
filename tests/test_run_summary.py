"""The words of a summary: steps, samples, NaN, hits, modules that fell back."""

import diffusers
import pytest
import torch

import fastdiff
from fastdiff import run_summary
from fastdiff.cache import FirstBlock
from fastdiff.engine.request import Event
from fastdiff.testing import draw_weights


def pipeline():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = diffusers.DiTPipeline(
        draw_weights(transformer).eval(), vae.eval(), diffusers.DDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_words_of_a_summary():
    def event(step, computed, how="by the change"):
        return Event(step, (1, 0), "blocks 1-3", computed, how)

    trace = [event(0, (True, True), "full"), event(1, (False, True)), event(2, (False, False))]
    assert run_summary.steps_line(trace) == "steps 0 full, 1 1 of 2 samples, 2 reused"
    assert run_summary.hit_rates(trace) == pytest.approx([2 / 3, 1 / 3])
    run = fastdiff.engine.request.Request()
    run.trace = [*trace, event(3, (True, True), "full, as the change is NaN")]
    run.trace.append(event(4, (), "off: gradients are recorded"))
    text = "\n".join(run_summary.lines(run))
    assert "1 of 5 decisions met NaN" in text and "off: gradients are recorded" in text
    run.trace = [event(s, (True, True)) for s in range(3)]
    assert "WARNING: the cache never hit" in "\n".join(run_summary.lines(run))


def test_modules_that_fall_back_are_counted():
    pipe = pipeline()
    fastdiff.accelerate(pipe, cache=FirstBlock(0.1))
    how = dict(class_labels=[1], num_inference_steps=2, output_type="np")
    pipe(**how)
    assert "fell back" not in fastdiff.summary(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pipe(**how)
    assert "calls of modules fell back to their own forward" in fastdiff.summary(pipe)
