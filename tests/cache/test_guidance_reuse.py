"""Reuse of the unconditional branch of guidance: decisions, halves, what is never halved."""

from pathlib import Path

import diffusers
import pytest
import torch

import fastdiff
from fastdiff import models
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import DeepCache, EncoderPropagation, FirstBlock, Forecast, GuidanceReuse
from fastdiff.cache.guidance import low_pass, weigh
from fastdiff.cache.parse import parse
from fastdiff.testing import load_file

HERE = Path(__file__).parents[1] / "integrations"
networks, pipelines = load_file(HERE / "networks.py"), load_file(HERE / "test_pipelines.py")
PLAIN = GuidanceReuse(2, alpha_low=0.0, alpha_high=0.0)


def last(pipe):
    return acceleration_of(pipe).last


class Toy(torch.nn.Module):
    """3 x + c, with c a row's condition: the difference of the branches does not change."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x, t, c):
        self.batches.append(len(x))
        return 3 * x + c.view(-1, 1, 1, 1)


def ours():
    torch.manual_seed(0)
    model = models.DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


@torch.no_grad()
def toy_run(policy, steps=6, batch=2, same=True):
    model, outs = Toy().eval(), []
    g = torch.Generator().manual_seed(0)
    with fastdiff.accelerated(model, cache=policy), fastdiff.request(steps) as run:
        for _ in range(steps):
            x = torch.randn(batch, 4, 8, 8, generator=g)
            other = x if same else torch.randn(x.shape, generator=g)
            x = torch.cat((x, other))
            c = torch.arange(2.0 * batch)
            outs.append((model(x, torch.zeros(2 * batch), c), 3 * x + c.view(-1, 1, 1, 1)))
    return model, outs, run


def test_decisions_and_weights():
    policy = GuidanceReuse(3, start=0.5, alpha_low=0.3, alpha_high=0.1)
    full = [s for s in range(12) if policy.full(s, 12)]
    assert full == [0, 1, 2, 3, 4, 5, 6, 9]
    assert policy.weights(5, 12) == (1.3, 1.0) and policy.weights(6, 12) == (1.0, 1.1)
    assert all(GuidanceReuse(1).full(s, None) for s in range(9))
    assert parse("guidance:3,start=0.5,alpha_low=0.3,alpha_high=0.1") == policy
    with pytest.raises(ValueError, match="switch 0.5 is a share"):
        policy.weights(5, None)
    for bad in ({"interval": 0}, {"start": 2}, {"alpha_low": "a"}, {"order": "first"}):
        with pytest.raises(ValueError, match=f"GuidanceReuse: {next(iter(bad))} is"):
            GuidanceReuse(**bad)


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 7, 5), (1, 2, 3, 6, 9)])
def test_low_and_high_add_up(shape):
    delta = networks.draw(*shape)
    low = low_pass(delta, 0.4)
    low_only, high_only = weigh(delta, (1, 0), 0.4), weigh(delta, (0, 1), 0.4)
    torch.testing.assert_close(low_only + high_only, delta, rtol=0, atol=1e-6)
    torch.testing.assert_close(low_only, low, rtol=0, atol=1e-6)
    assert weigh(delta, (1.0, 1.0), 0.4) is delta
    flat = torch.full(shape, 2.0)
    torch.testing.assert_close(low_pass(flat, 0.4), flat)  # the mean is the lowest frequency


def test_a_constant_difference_is_reused_exactly():
    model, outs, run = toy_run(PLAIN)
    assert model.batches == [4, 4, 4, 2, 4, 2] and run.syncs == 1
    for got, want in outs:
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert run.trace[3].computed == (False, False, True, True) and run.trace[3].how == "reuse"


def test_independent_samples_are_never_halved():
    model, outs, run = toy_run(PLAIN, same=False)
    assert set(model.batches) == {4} and all(torch.equal(a, b) for a, b in outs)
    assert "no guidance seen" in run.trace[-1].how


@torch.no_grad()
def test_one_noise_for_several_samples_is_not_guidance():
    """They are alike at the first step alone."""
    model = Toy().eval()
    x, c = networks.draw(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([0.0, 5.0])
    with fastdiff.accelerated(model, cache=PLAIN), fastdiff.request(6):
        for _ in range(6):
            x = x - 0.1 * model(x, torch.zeros(2), c)
    assert model.batches == [2] * 6


def doubled(value):
    if isinstance(value, dict):
        return {k: v if k.endswith("_ids") and v.shape[0] != 2 else doubled(v)
                for k, v in value.items()}  # fmt: skip
    if isinstance(value, torch.Tensor) and value.shape[0] == 2:
        return torch.cat((value, value.flip(0)))
    return value


@pytest.mark.parametrize("make", networks.NETWORKS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_networks(make):
    """Neutral is the plain model; a reuse step's conditional half is a call of B rows; restore."""
    model, args, kwargs = make()
    x = args[0]
    kwargs2 = doubled(kwargs)
    args2 = (torch.cat((x, x)), *(doubled(a) for a in args[1:]))
    want = model(*args2, **kwargs2, return_dict=False)[0]
    before = model.forward
    with fastdiff.accelerated(model, cache=GuidanceReuse(1), exact=False), fastdiff.request(4):
        for _ in range(4):
            assert torch.equal(model(*args2, **kwargs2, return_dict=False)[0], want)
    cond_first = make is networks.dit
    half = slice(2) if cond_first else slice(2, None)
    few = {k: v[half] if isinstance(v, torch.Tensor) and len(v) == 4 else v
           for k, v in kwargs2.items()}  # fmt: skip
    if "added_cond_kwargs" in few:
        few["added_cond_kwargs"] = {
            k: v if v is None else v[half] for k, v in few["added_cond_kwargs"].items()
        }
    alone = model(*(a[half] for a in args2), **few, return_dict=False)[0]
    with fastdiff.accelerated(model, cache=PLAIN, exact=False), fastdiff.request(4) as run:
        outs = [model(*args2, **kwargs2).sample for _ in range(4)]
    assert torch.equal(outs[3][half], alone) and run.trace[-1].how == "reuse"
    torch.testing.assert_close(outs[3], want, rtol=1e-4, atol=1e-4)
    assert model.forward == before


def sampled(model, policy, batch=4, rows=slice(None), **settings):
    classes, seeds = torch.arange(batch)[rows], torch.arange(batch)[rows]
    settings = {"guidance": 3.0, "steps": 8, **settings}
    return fastdiff.sample(
        model, (len(classes), 4, 8, 8), classes=classes, seed=seeds, cache=policy, **settings
    )


@pytest.mark.filterwarnings("ignore:.*steps gains little")
@pytest.mark.parametrize(
    "policy",
    [GuidanceReuse(2), [GuidanceReuse(2), Forecast(2)], [FirstBlock(0.05), PLAIN]],
    ids=str,
)
def test_a_batch_is_its_samples(policy):
    model = ours()
    together = sampled(model, policy)
    for i in range(4):
        one = sampled(model, policy, rows=slice(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], one, rtol=1e-4, atol=1e-4)
    assert not torch.equal(together, sampled(model, None))


@pytest.mark.filterwarnings("ignore:.*steps gains little")
def test_sample_without_guidance_and_in_an_interval():
    model = ours()
    assert torch.equal(sampled(model, PLAIN, guidance=1.0), sampled(model, None, guidance=1.0))
    fastdiff.accelerate(model, cache=PLAIN, exact=False)
    sampled(model, None, guidance_interval=(300, 800))
    text = fastdiff.summary(model)
    fastdiff.restore(model)
    # Four calls have 8 rows, of which two leave out 4; the others have 4 rows, and are left alone.
    assert "unconditional branch: 8 calls, 8 of 48 samples' parts not computed" in text


@pytest.mark.filterwarnings("ignore:.*steps gains little")
@torch.no_grad()
def test_deepcache_inside_keeps_each_half_on_its_own():
    model, args, kwargs = networks.sd15()
    x, t = torch.cat((args[0],) * 2), args[1].repeat(2)
    text = doubled(kwargs)
    with fastdiff.accelerated(model, cache=[DeepCache(2), PLAIN]), fastdiff.request(8) as run:
        for _ in range(8):
            model(x, t, **text)
    inner = [e for e in run.trace if e.part != "unconditional branch"]
    cond = [(e.step, any(e.computed)) for e in inner if e.slot[1] == "conditional"]
    uncond = [(e.step, any(e.computed)) for e in inner if e.slot[1] == "unconditional"]
    assert [s for s, _ in cond] == [1, 2, 3, 4, 5, 6, 7] and [s for s, _ in uncond] == [1, 2, 4, 6]
    assert [s for s, c in cond if c] == [1, 2, 4, 6]  # 1: nothing is kept of it yet


def test_refusals():
    model = networks.sd15()[0]
    with pytest.raises(ValueError, match="next to GuidanceReuse"):
        fastdiff.accelerate(model, cache=[GuidanceReuse(2), EncoderPropagation(2)])
    with pytest.raises(ValueError, match="need one"):
        fastdiff.accelerate(model, cache=[GuidanceReuse(2), PLAIN])


@torch.no_grad()
def test_a_pipeline_with_and_without_guidance():
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1
    )
    pipe = diffusers.DiTPipeline(networks.dit()[0], vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def run(scale):
        return pipe([1, 2], guidance_scale=scale, num_inference_steps=10, output_type="np",
                    generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    guided, free = run(4.0), run(1.0)
    fastdiff.accelerate(pipe, cache=PLAIN, exact=False)
    close, text = run(4.0), fastdiff.summary(pipe)
    assert "8 of 40 samples' parts not computed" in text
    assert 0 < abs(close - guided).mean() < 0.1
    assert (run(1.0) == free).all() and "no guidance seen" in fastdiff.summary(pipe)
    assert (run(4.0) == close).all()
    fastdiff.restore(pipe)
    assert (run(4.0) == guided).all()


@torch.no_grad()
@pytest.mark.parametrize("order", ("auto", "uncond first"))
def test_two_calls_a_step_leave_out_the_second(order):
    """As Wan's pipeline calls its network: the conditional branch first, both on one tensor."""
    model, args, kwargs = networks.wan()
    other = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"].flip(0)}
    policy = GuidanceReuse(2, alpha_low=0, alpha_high=0, order=order)

    def loop(both=True):
        x, outs = args[0].clone(), []
        with fastdiff.request(6, calls_per_step=2 if both else 1) as run:
            for _ in range(6):
                pair = [model(x, **k, return_dict=False)[0] for k in (kwargs, other)[: 1 + both]]
                outs.append(pair)
                x = x - 0.05 * pair[0]
        return outs, run

    plain, _ = loop()
    single, _ = loop(both=False)
    fastdiff.accelerate(model, cache=policy, exact=False)
    got, run = loop()
    seconds = [e for e in run.trace if e.slot[1] == 1]
    if order == "uncond first":
        assert {e.how[:3] for e in seconds} == {"off"}
        pairs = [(a, b) for p, q in zip(plain, got, strict=True) for a, b in zip(p, q, strict=True)]
        assert all(torch.equal(a, b) for a, b in pairs)
        return
    assert [e.how for e in seconds] == [
        "full" if s < 2 or s % 2 == 0 else "reuse" for s in range(6)
    ]
    for s, ((c, u), (want_c, want_u)) in enumerate(zip(got, plain, strict=True)):
        assert torch.equal(c, want_c)
        if s < 2 or s % 2 == 0:
            assert torch.equal(u, want_u)
            delta = u - c
        else:
            torch.testing.assert_close(u, c + delta)
    alone, run = loop(both=False)  # guidance off: one call a step stays what it is
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, single, strict=True))


@torch.no_grad()
def test_more_than_two_branches_and_rows_of_frames_are_left_alone():
    model, args, kwargs = networks.sd15()
    four = args[0][:1].expand(4, -1, -1, -1)
    text = networks.draw(4, 7, 24, seed=6)
    want = model(four, 10, text, return_dict=False)[0]
    fastdiff.accelerate(model, cache=GuidanceReuse(2), exact=False)
    with fastdiff.request(6) as run:
        for _ in range(5):
            assert torch.equal(model(four, 10, text, return_dict=False)[0], want)
    assert "more than two branches" in run.trace[-1].how
    two = args[0][:1].expand(2, -1, -1, -1)
    with fastdiff.request(6) as run, pytest.raises(Exception):  # noqa: B017
        model(two, 10, encoder_hidden_states=text, return_dict=False)  # the network's own error
    assert "an argument has 4 rows" in run.trace[0].how


@torch.no_grad()
def test_a_caller_may_write_into_the_conditional_output():
    model, args, kwargs = networks.wan()
    other = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"].flip(0)}
    fastdiff.accelerate(model, cache=GuidanceReuse(2, alpha_low=0, alpha_high=0), exact=False)
    outs = []
    for factor in (1.0, 3.0):
        with fastdiff.request(6, calls_per_step=2):
            for _ in range(4):
                cond = model(args[0], **kwargs, return_dict=False)[0]
                cond.mul_(factor)
                uncond = model(args[0], **other, return_dict=False)[0]
        outs.append(uncond)
    assert torch.equal(*outs)


@pytest.mark.parametrize("make", ("sd", "controlnet", "img2img", "inpaint_9", "sd3", "sdxl"))
def test_pipelines_that_say_whether_they_are_guided(make):
    """No wait; and unguided, with an even number of rows, nothing is taken for halves."""
    pipe, kwargs = getattr(pipelines, make)()
    words = {k: torch.cat([v, v.flip(-1)]) for k, v in kwargs.items() if v is not None and
             "embeds" in k and len(v) == 1}  # fmt: skip
    kwargs |= words
    free = {k: v for k, v in kwargs.items() if "negative" not in k} | {"guidance_scale": 1.0}
    plain = pipelines.run(pipe, free)
    fastdiff.accelerate(pipe, cache=PLAIN, exact=False)
    close = pipelines.run(pipe, kwargs)
    events = last(pipe).trace
    assert any(e.how.startswith("reuse") for e in events) and last(pipe).syncs == 0
    assert torch.equal(pipelines.run(pipe, free), plain)
    assert all(e.how.startswith("off: no guidance seen") for e in last(pipe).trace[1:])
    fastdiff.restore(pipe)
    guided = pipelines.run(pipe, kwargs)
    assert 0 < pipelines.error(close, guided) < 0.5


def test_pix2pix_has_three_branches_and_says_nothing():
    pipe, kwargs = pipelines.img2img()
    parts = pipe.components | {"unet": pipelines.wider(pipe.unet, 8)}
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    kwargs = {k: torch.cat([v] * 2) if "embeds" in k else v for k, v in kwargs.items()}
    kwargs.pop("strength")
    pipelines.quiet(pipe)
    plain = pipelines.run(pipe, kwargs)  # 2 prompts, 6 rows: an even number
    fastdiff.accelerate(pipe, cache=PLAIN, exact=False)
    assert torch.equal(pipelines.run(pipe, kwargs), plain)
    assert all(e.how.startswith("off: ") for e in last(pipe).trace[1:])  # told at the second step


def test_told_by_the_policy():
    """Two rows of different latents are halves where the caller says so."""
    model, args, kwargs = networks.sd15()
    with fastdiff.accelerated(model, cache=GuidanceReuse(2, compare=False)), torch.no_grad():
        with fastdiff.request(6) as run:
            for _ in range(6):
                model(*args, **kwargs)
    assert run.syncs == 0
    assert [e.how for e in run.trace] == ["full", "full", "full", "reuse", "full", "reuse"]
    with pytest.raises(ValueError, match="compare is 1, need True or False"):
        GuidanceReuse(compare=1)
    programs = fastdiff.programs(fastdiff.accelerate(model, cache=GuidanceReuse(2)))
    with fastdiff.request(6), pytest.raises(ValueError, match=r"need GuidanceReuse\(compare=False"):
        programs(*args, **kwargs)
