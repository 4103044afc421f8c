"""accelerate, restore and requests, on a network and a pipeline of diffusers."""

import copy

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.engine.request import current


def dit():
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def pipeline():
    scheduler = diffusers.DDIMScheduler()
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4).eval()
    pipe = diffusers.DiTPipeline(dit(), vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def attributes(module):
    return {name: set(m.__dict__) for name, m in module.named_modules()}


def test_restore_gives_back_types_and_attributes():
    pipe = pipeline()
    cls, before, keys = type(pipe), attributes(pipe.transformer), set(pipe.__dict__)
    steps = set(pipe.scheduler.__dict__)
    assert fastdiff.accelerate(pipe) is pipe
    assert isinstance(pipe, cls) and type(pipe).__name__ == cls.__name__
    pipe(class_labels=[1], num_inference_steps=2, output_type="np")
    with pytest.raises(ValueError, match="already"):
        fastdiff.accelerate(pipe)
    fastdiff.restore(pipe)
    assert type(pipe) is cls and attributes(pipe.transformer) == before
    assert set(pipe.__dict__) == keys and "step" not in set(pipe.scheduler.__dict__) - steps
    with pytest.raises(ValueError, match="not accelerated"):
        fastdiff.restore(pipe)


def test_a_failed_accelerate_changes_nothing():
    pipe = pipeline()
    cls, before = type(pipe), attributes(pipe.transformer)
    with pytest.raises(ValueError, match="cache is 'nonsense'"):
        fastdiff.accelerate(pipe, cache="nonsense")
    assert type(pipe) is cls and attributes(pipe.transformer) == before


def test_steps_are_counted_also_with_a_scheduler_put_in_later():
    pipe = fastdiff.accelerate(pipeline())
    seen = []
    for scheduler in (pipe.scheduler, diffusers.HeunDiscreteScheduler()):
        pipe.scheduler = scheduler

        def look(*args, **kwargs):
            seen.append((current().step, current().steps))

        hook = pipe.transformer.register_forward_hook(look)
        pipe(class_labels=[1, 2], num_inference_steps=3, output_type="np")
        hook.remove()
    assert seen == [(0, 3), (1, 3), (2, 3)] + [(i, 5) for i in range(5)]
    assert current() is None


def test_an_error_in_a_step_drops_the_request():
    pipe = fastdiff.accelerate(pipeline())

    def fail(*_):
        raise RuntimeError("interrupted")

    hook = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        pipe(class_labels=[1], num_inference_steps=3, output_type="np")
    hook.remove()
    assert current() is None


def test_what_is_no_network():
    with pytest.raises(ValueError, match="target is dict"):
        fastdiff.accelerate({})


def test_a_copy_is_refused_and_possible_again_after_restore():
    model = fastdiff.accelerate(dit())
    with pytest.raises(ValueError, match="need fastdiff.restore"):
        copy.deepcopy(model)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 7]), torch.tensor([1, 2])
    want = fastdiff.restore(model)(x, timestep=t, class_labels=y).sample
    assert torch.equal(copy.deepcopy(model)(x, timestep=t, class_labels=y).sample, want)


def test_restore_refuses_where_someone_else_came_later():
    model = fastdiff.accelerate(dit())
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match="forward of a DiT.* was changed by someone else"):
        fastdiff.restore(model)
    model.forward = ours
    fastdiff.restore(model)
    assert "forward" not in model.__dict__


def test_summary_tells_hits_misses_and_calls_outside_a_run():
    pipe = pipeline()
    with pytest.raises(ValueError, match="not accelerated"):
        fastdiff.summary(pipe)
    fastdiff.accelerate(pipe, cache=fastdiff.cache.Forecast(interval=2, warmup=1))
    assert "no run yet" in fastdiff.summary(pipe)
    pipe(class_labels=[1], num_inference_steps=4, output_type="np")
    text = fastdiff.summary(pipe)
    assert "blocks 0-2: 4 calls, 4 of 8 samples' parts" in text and "WARNING" not in text
    assert "waited 0 times" in text and "attention native" in text
    fastdiff.restore(pipe)
    fastdiff.accelerate(pipe, cache=fastdiff.cache.FirstBlock(1e-9))
    pipe(class_labels=[1], num_inference_steps=3, output_type="np")
    pipe.transformer(
        torch.randn(1, 4, 8, 8), timestep=torch.tensor([5]), class_labels=torch.tensor([1])
    )
    text = fastdiff.summary(pipe)
    assert "the cache never hit" in text and "1 calls outside a run" in text
    assert "waited 2 times" in text
