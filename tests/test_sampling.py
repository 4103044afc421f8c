"""fastdiff.sample with a cache: steps, exactness where neutral, accelerated models, errors."""

import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import DeepCache, EncoderPropagation
from fastdiff.models import DiT, UNet
from fastdiff.testing import draw_weights


def unet():
    return draw_weights(
        UNet(
            block_out_channels=(16, 32, 32), layers_per_block=2, transformer_depth=(1, 1, 0),
            heads=2, groups=8, cross_attention_dim=24, num_classes=5, class_tokens=3,
        )
    )  # fmt: skip


def draw(model, draw=fastdiff.sample, **settings):
    settings = {"steps": 12, "guidance": 2.0, "classes": torch.tensor([0, 3]), **settings}
    return draw(model, (2, 4, 8, 8), **settings)


def run_of(model, **settings):
    """The run of one call, on a model that stays accelerated."""
    draw(model, **settings)
    return acceleration_of(model).last


@pytest.mark.parametrize("cache", [DeepCache(1), EncoderPropagation(1)], ids=str)
def test_neutral_cache_is_plain_and_leaves_the_model_alone(cache):
    model = unet()
    plain = draw(model)
    assert torch.equal(plain, draw(model, samplers.sample))
    assert torch.equal(draw(model, cache=cache), plain)
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("sampler, calls", [("ddim", 12), ("heun", 23), ("dpmpp_2m", 12)])
def test_every_evaluation_is_a_step(sampler, calls):
    model = fastdiff.accelerate(unet(), cache=DeepCache(3), exact=False)
    run = run_of(model, sampler=sampler)
    assert run.steps == calls and run.step == calls and not run.state
    assert [e.how for e in run.trace] == (["full", "reuse", "reuse"] * 8)[:calls]
    assert "samples' parts not computed" in fastdiff.summary(model)


def test_a_cache_for_one_call_is_that_of_an_accelerated_model():
    model = unet()
    once, plain = draw(model, cache=DeepCache(3)), draw(model)
    assert not torch.equal(once, plain)
    with fastdiff.accelerated(model, cache=DeepCache(3), exact=False):
        assert torch.equal(draw(model), once)
        with pytest.raises(ValueError, match="accelerated already"):
            draw(model, cache=DeepCache(3))
    assert torch.equal(draw(model), plain)


def test_a_run_that_is_open_stays_the_run():
    model = unet()
    need = draw(model, cache=DeepCache(3))
    with fastdiff.accelerated(model, cache=DeepCache(3), exact=False):
        with fastdiff.request(12, calls_per_step=1) as run:
            assert torch.equal(draw(model), need)
    assert [e.how for e in run.trace] == ["full", "reuse", "reuse"] * 4


def test_guidance_interval_changes_the_rows_and_computes():
    model = fastdiff.accelerate(unet(), cache=DeepCache(50), exact=False)
    run = run_of(model, guidance_interval=(300.0, 700.0))
    rows = [len(e.computed) for e in run.trace]
    assert set(rows) == {2, 4}
    changes = [i for i in range(12) if i == 0 or rows[i] != rows[i - 1]]
    assert [i for i, e in enumerate(run.trace) if e.how == "full"] == changes


@pytest.mark.parametrize("parallel", [2, 3, 16])
def test_parallel_decoding_is_serial_decoding(parallel):
    model = unet().double()  # other batch sizes round otherwise, which steps then amplify
    keys, double = (0, 1, 2, 7), dict(dtype=torch.float64)
    serial = draw(model, cache=EncoderPropagation(keys), **double)
    calls = []
    last = model.up_blocks[-1]
    hook = last.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    got = draw(model, cache=EncoderPropagation(keys, parallel=parallel), **double)
    hook.remove()
    torch.testing.assert_close(got, serial, rtol=1e-10, atol=1e-10)
    groups = {2: [2, 2, 2, 2], 3: [3, 1, 3, 1], 16: [4, 4]}[parallel]
    decoded = sum(groups)
    assert decoded == 8 and sorted(calls) == sorted([4] * 4 + [4 * g for g in groups])


def test_parallel_decoding_keeps_to_the_rows_of_a_guidance_interval():
    model = unet().double()
    settings = dict(guidance_interval=(300.0, 700.0), dtype=torch.float64)
    serial = draw(model, cache=EncoderPropagation((0, 7)), **settings)
    got = draw(model, cache=EncoderPropagation((0, 7), parallel=16), **settings)
    torch.testing.assert_close(got, serial, rtol=1e-10, atol=1e-10)


def test_what_a_model_cannot():
    dit = DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=5,
        learn_sigma=False,
    ).eval()  # fmt: skip
    for model, cache, need in (
        (dit, EncoderPropagation(3), "does not run on DiT: DiT is none of"),
        (dit, DeepCache(3, branch=1), "needs 3 blocks or more, and this DiT has 2"),
        (unet(), DeepCache(3, branch=99), "this network has branches 0 to"),
        (unet(), EncoderPropagation(3, inject=0.003), "which needs a pipeline"),
        (lambda x, t, y: x, DeepCache(3), "target is function"),
    ):
        with pytest.raises(ValueError, match=need):
            draw(model, cache=cache)


def test_rows_of_samples_do_not_meet():
    """A batch gives what its samples give alone."""
    model = unet().double()  # its output is amplified, and so is how batches round
    seeds = torch.tensor([7, 8])
    both = draw(model, cache=DeepCache(3), seed=seeds, dtype=torch.float64)
    for i in range(2):
        alone = fastdiff.sample(
            model, (1, 4, 8, 8), steps=12, guidance=2.0, classes=torch.tensor([[0], [3]][i]),
            seed=seeds[i : i + 1], cache=DeepCache(3), dtype=torch.float64,
        )  # fmt: skip
        torch.testing.assert_close(alone, both[i : i + 1], rtol=1e-10, atol=1e-10)
