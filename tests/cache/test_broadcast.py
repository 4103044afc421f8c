"""Caches of attention and feed-forward modules: schedules, forecasts, ownership, requests."""

from pathlib import Path
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import nn

import fastdiff
from fastdiff import models
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import Broadcast, DeepCache, EncoderPropagation, FirstBlock, Forecast
from fastdiff.cache.broadcast import KINDS
from fastdiff.engine.patch import Patch
from fastdiff.engine.request import Request
from fastdiff.engine.reuse_modules import Part, modules
from fastdiff.integrations import module_views
from fastdiff.testing import draw_weights, load_file

FOLDER = Path(__file__).parents[1] / "integrations"
networks, more = (load_file(FOLDER / f"{name}.py") for name in ("networks", "more_networks"))

ALWAYS = Broadcast(1, 1, 1, temporal_attention=1)
NEVER_YET = Broadcast(2, 2, 2, start=0.5, stop=0.5)  # an empty part of the run
EVERY = Broadcast(9, 9, 9, 0, 1, temporal_attention=9)
every = pytest.mark.parametrize("make", networks.NETWORKS + more.NETWORKS, ids=lambda f: f.__name__)
NAMES = ("self-attention", "cross-attention", "feed-forward", "temporal-attention")


def dit():
    model = models.DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    return draw_weights(model)


def unet():
    model = models.UNet(
        block_out_channels=(32, 32), transformer_depth=(1, 1), layers_per_block=1, groups=8,
        heads=2, cross_attention_dim=16, num_classes=10,
    )  # fmt: skip
    return draw_weights(model)


ours = pytest.mark.parametrize("make", (dit, unet), ids=lambda f: f.__name__)


def inputs(batch, step, size=8):
    g = torch.Generator().manual_seed(batch)
    x, d = (torch.randn(batch, 4, size, size, generator=g) for _ in range(2))
    return x + 0.05 * step * d, torch.full((batch,), 900.0 - 20 * step), torch.arange(batch) % 10


@torch.no_grad()
def run(model, calls):
    with fastdiff.request(steps=len(calls)) as request:
        return [model(*args) for args in calls], request


@torch.no_grad()
def call(model, args, kwargs):
    out = model(*args, **kwargs, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def hows(request, part="self-attention"):
    return [e.how for e in request.trace if e.part == part]


def test_schedule():
    policy = Broadcast(2, 3, 1, start=0.2, stop=0.8)
    for kind, want in zip(KINDS[:3], ("1110101011", "1101001011", "1111111111"), strict=True):
        got = "".join(str(int(policy.computes(kind, s, 10))) for s in range(10))
        assert got == want, kind
        # What is kept is what the next reuse reads, and no more.
        kept = [s for s in range(10) if got[s] == "1" and policy.kept(kind, s, 10)]
        assert kept == [s for s in range(9) if got[s : s + 2] == "10"], kind
        assert policy.most(kind, 10) == ("0" in got)
    policy = Broadcast(1, 7, 1, start=0.07, stop=0.57)  # products that round above and below
    assert [s for s in (6, 7, 8, 56, 57) if not policy.computes(KINDS[1], s, 100)] == [8]
    assert not Broadcast(2, start=0, stop=1).computes(KINDS[0], 1, None)
    policy = Broadcast([0, 1, 4], 1, 1, 0, 0.8)
    assert [s for s in range(10) if policy.computes(KINDS[0], s, 10)] == [0, 1, 4, 8, 9]
    assert [policy.skips(kind) for kind in KINDS] == [True, False, False, True]
    assert Broadcast(4, start=0, stop=1, order=2).kept(KINDS[0], 0, None)
    assert Broadcast(3, 1, 1, 0.5, 0.9, order=1).kept(KINDS[0], 3, 10)
    assert not Broadcast(3, 1, 1, 0.5, 0.9, order=1).kept(KINDS[0], 2, 10)


def test_bad_settings():
    for settings in (
        dict(self_attention=0), dict(cross_attention=2.5), dict(feed_forward=True),
        dict(start=-0.1), dict(start=0.8, stop=0.5), dict(stop=1.1), dict(order=5),
        dict(order=-1), dict(start=float("nan")), dict(stop="end"), dict(self_attention=[1, 2]),
        dict(self_attention="often"), dict(method="magic"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"Broadcast: {list(settings)[-1]} is .*need"):
            Broadcast(**settings)
    model = fastdiff.accelerate(dit(), cache=Broadcast())
    with pytest.raises(ValueError, match=r"stop 0.9 are shares .*need fastdiff.request\(steps"):
        with fastdiff.request(), torch.no_grad():
            model(*inputs(1, 0))


COUNTS = {  # of self-attention, cross-attention, feed-forward, and temporal attention where any
    "dit": (2, 0, 2), "pixart": (2, 2, 2), "sd3": (3, 0, 5), "sd35": (5, 0, 5), "flux": (4, 0, 6),
    "unet": (4, 0, 0), "unet_scale_shift": (4, 0, 0), "sd15": (4, 4, 4), "sdxl": (8, 8, 8),
    "wan": (2, 2, 2), "cogvideox": (2, 0, 2), "latte": (2, 2, 4, 2),
    "animatediff": (4, 4, 11, 14), "svd": (4, 8, 12, 4), "ltx": (2, 2, 2),
    "hunyuan_video": (4, 0, 6), "mochi": (2, 0, 3), "qwen_image": (2, 0, 4), "allegro": (2, 2, 2),
    "sana": (2, 2, 2), "chroma": (4, 0, 6), "cogview4": (2, 0, 2), "flux2": (4, 0, 4),
    "lumina2": (4, 0, 4), "aura_flow": (4, 0, 6), "hunyuan_dit": (2, 2, 2), "wan_vace": (3, 3, 3),
    "z_image": (4, 0, 4),
}  # fmt: skip


@every
@pytest.mark.parametrize("exact", (False, True))
def test_neutral_settings_are_the_plain_model(make, exact):
    model, args, kwargs = make()
    plain = call(model, args, kwargs)
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    want = plain
    if exact:
        with fastdiff.accelerated(model):
            want = call(model, args, kwargs)
    for policy in (ALWAYS,) if exact else (ALWAYS, NEVER_YET):
        with fastdiff.accelerated(model, cache=policy, exact=exact):
            with fastdiff.request(steps=4) as request:
                for _ in range(4):
                    assert torch.equal(call(model, args, kwargs), want)
                assert all(all(e.computed) for e in request.trace) and request.syncs == 0
                assert bool(request.trace) == (policy is NEVER_YET)
                assert not any(k.history.values for kept in request.state.values() for k in kept
                               if hasattr(k, "history"))  # fmt: skip
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before
    assert torch.equal(call(model, args, kwargs), plain)


@every
@pytest.mark.parametrize("exact", (False, True))
def test_the_same_input_again_is_reused_and_gives_the_same(make, exact):
    """Bit for bit, and without a look at the weights of what is reused."""
    model, args, kwargs = make()
    parts = module_views.view(model)
    counts = tuple(sum(p.kind == kind for p in parts) for kind in KINDS)
    assert counts == (*COUNTS[make.__name__], 0)[:4]
    with fastdiff.accelerated(model, cache=EVERY, exact=exact), fastdiff.request() as request:
        first = call(model, args, kwargs)
        with torch.no_grad():
            for part in parts:
                for weight in part.module.parameters():
                    weight.data.fill_(float("nan"))  # unseen: no new version
        second = call(model, args, kwargs)
        known = [name for name, n in zip(NAMES, counts, strict=True) if n]
        assert {(e.step, e.part, e.how) for e in request.trace} == {
            (step, part, how) for step, how in enumerate(("full", "reuse")) for part in known
        }
        assert len(request.trace) == 2 * len(known) and request.syncs == 0
    if parts[0].residual is None:
        assert torch.equal(second, first)
    else:
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)  # x + (y - x) rounds


@ours
def test_trace_of_a_run(make):
    model = make()
    plain = run(model, [inputs(2, s) for s in range(10)])[0]
    with fastdiff.accelerated(model, cache=Broadcast(2, 3, 4, 0.2, 0.8)):
        got, request = run(model, [inputs(2, s) for s in range(10)])
    short = {"full": "1", "reuse": "0"}
    seen = {name: "".join(short[how] for how in hows(request, name)) for name in NAMES}
    cross = "1101001011" if make is unet else ""
    assert seen == dict(zip(NAMES, ("1110101011", cross, "1100100011", ""), strict=True))
    assert all(map(torch.equal, got[:2], plain[:2])) and not torch.equal(got[3], plain[3])
    assert all(e.computed == (e.how == "full",) * 2 for e in request.trace)
    for g, p in zip(got, plain, strict=True):  # close: the inputs change little
        assert (g - p).norm() < 0.2 * p.norm()


@torch.no_grad()
def test_what_is_no_tensor_is_always_computed():
    net, undo = nn.Sequential(nn.Linear(2, 2)).eval(), Patch()
    net[0].forward = lambda x: (x, None)
    modules(net, [Part(net[0], "feed_forward")], EVERY, undo)
    request = Request(calls_per_step=1)
    with request.active():
        for _ in range(2):
            with request.call(net):
                assert net(torch.ones(1, 2))[1] is None
    assert [e.how for e in request.trace] == ["full", "full"]


class Line(nn.Module):
    """A layer whose output is then written to, as some networks do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        h = self.layer(x)
        out = h.clone()
        h.zero_()
        return out


@torch.no_grad()
@pytest.mark.parametrize("order", (0, 1, 2))
def test_forecasts_are_exact_for_polynomials_and_outputs_are_owned(order):
    torch.manual_seed(0)
    net, undo = Line().double().eval(), Patch()
    x, d, c = torch.randn(3, 2, 3, dtype=torch.float64)
    calls = [x + (order > 0) * s * d + (order > 1) * s * s * c for s in range(12)]
    want = [net(x) for x in calls]
    policy = Broadcast(1, 1, 4, start=0.3, stop=1, order=order)  # computes 0 to 3, 4 and 8
    modules(net, [Part(net.layer, "feed_forward")], policy, undo)
    request = Request(steps=12, calls_per_step=1)
    with request.active():
        for x, y in zip(calls, want, strict=True):
            with request.call(net):
                torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)
    how = "reuse" if order == 0 else "forecast"
    need = ["full"] * 5 + [how] * 3 + ["full"] + [how] * 3
    assert [e.how for e in request.trace] == need
    undo.undo()
    assert "forward" not in net.layer.__dict__ and "forward" not in net.__dict__


def test_a_module_of_several_calls_and_a_step_that_is_done_again():
    net, undo = nn.Sequential(nn.Linear(2, 2)).eval(), Patch()
    net.append(net[0])
    modules(net, [Part(net[0], "feed_forward")], Broadcast(1, 1, 2, 0, 1, order=1), undo)
    request, x = Request(), torch.randn(1, 2)
    with request.active(), torch.no_grad():
        for _ in range(2):
            with request.call(net):
                want = net(x)
            request._calls.clear()
        request.advance()
        with request.call(net):
            assert torch.equal(net(x), want)
    assert [e.how for e in request.trace] == ["full", "full", "reuse"]


@ours
@pytest.mark.parametrize("order", (0, 1))
def test_a_batch_gives_what_its_samples_give_alone(make, order):
    model = fastdiff.accelerate(make(), cache=Broadcast(2, 3, 2, 0, 1, order=order))
    calls = [inputs(8, s) for s in range(5)]
    together = run(model, calls)[0]
    for b in range(8):
        alone = run(model, [tuple(a[b : b + 1] for a in args) for args in calls])[0]
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[b : b + 1], want, rtol=1e-4, atol=1e-5)


@ours
def test_interleaved_requests_and_broken_runs_leave_no_trace(make):
    model = fastdiff.accelerate(make(), cache=Broadcast(2, 3, 2, 0, 1, order=1))
    small, large = ([inputs(b, s, size) for s in range(7)] for b, size in ((2, 8), (1, 16)))
    want = [run(model, calls)[0] for calls in (small, large)]

    @torch.no_grad()
    def steps(calls):
        request = Request(calls_per_step=1)
        for args in calls:
            with request.active():
                out = model(*args)
            yield out

    for a, b, wa, wb in zip(steps(small), steps(large), *want, strict=True):
        assert torch.equal(a, wa) and torch.equal(b, wb)
    where, name = (model.up_blocks[-1].resnets[-1], "forward") if make is unet else (model, "mlp")
    plain = getattr(where, name)

    def fail(*args):
        if make is unet or args[0] is model.blocks[-1]:
            raise RuntimeError("broken off")
        return plain(*args)

    # Broken off inside a step, then done again in the same run, then a new run.
    request, got = Request(steps=7, calls_per_step=1), []
    with request.active(), torch.no_grad():
        for s, args in enumerate(small):
            if s in (0, 2, 3):
                with patch.object(where, name, fail), pytest.raises(RuntimeError, match="broken"):
                    model(*args)
            got.append(model(*args))
    assert all(map(torch.equal, got, want[0]))
    assert all(map(torch.equal, run(model, small)[0], want[0]))


@ours
@torch.no_grad()
def test_branches_of_guidance_that_are_called_in_turn_keep_their_own(make):
    model = fastdiff.accelerate(make(), cache=Broadcast(2, 3, 2, 0, 1, order=1))
    branches = [[inputs(b, s) for s in range(6)] for b in (2, 3)]
    want = [run(model, calls)[0] for calls in branches]
    got: list = [[], []]
    with fastdiff.request(steps=6, calls_per_step=2):
        for step in zip(*branches, strict=True):
            for outs, args in zip(got, step, strict=True):
                outs.append(model(*args))
    for g, w in zip(got, want, strict=True):
        assert all(map(torch.equal, g, w))


def test_a_pipeline_knows_its_steps_and_forgets_its_runs():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4).eval()
    pipe = diffusers.DiTPipeline(networks.dit()[0], vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw(steps):
        return pipe(
            class_labels=[1], num_inference_steps=steps, output_type="np", guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    plain = draw(10)
    fastdiff.accelerate(pipe, cache=Broadcast(3, feed_forward=2))
    first = draw(10)
    assert not (first == plain).all()
    run_ = acceleration_of(pipe).last
    assert [h[0] for h in hows(run_)] == list("frrfrrfrrf") and not run_.state
    assert all(len(e.computed) == 2 for e in run_.trace)
    text = fastdiff.summary(pipe)
    assert "feed-forward: 10 calls, 8 of 20 samples' parts not computed" in text
    assert hows(run_, NAMES[2]) == [*["full", "reuse"] * 4, "full", "full"]
    draw(4)
    assert (draw(10) == first).all()
    fastdiff.restore(pipe)
    assert (draw(10) == plain).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_reuses_the_same_bits(dtype):
    model, args, kwargs = networks.flux()
    model, x = model.to(dtype), args[0].to(dtype)
    kwargs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in kwargs.items()}
    for order in (0, 1):
        policy = Broadcast(3, 3, 3, 0, 1, order=order)
        with fastdiff.accelerated(model, cache=policy), fastdiff.request() as request:
            first, second = (call(model, (x,), kwargs) for _ in range(2))
            assert torch.equal(first, second) and first.dtype == dtype
            assert all(t.dtype == dtype for kept in request.state.values() for k in kept.values()
                       for values in k.history.values for t in values)  # fmt: skip


def test_a_guidance_interval_changes_the_rows_and_keeps_anew():
    model = fastdiff.accelerate(dit(), cache=Broadcast(4, 1, 4, 0, 1), exact=False)
    fastdiff.sample(
        model, (2, 4, 8, 8), steps=12, guidance=2.0, guidance_interval=(300.0, 700.0),
        classes=torch.tensor([1, 3]),
    )  # fmt: skip
    events = [e for e in acceleration_of(model).last.trace if e.part == NAMES[0]]
    rows = [len(e.computed) for e in events]
    assert set(rows) == {2, 4}
    for step, (now, before) in enumerate(zip(rows[1:], rows, strict=False), 1):
        assert all(events[step].computed) == (now != before or step % 4 == 0)


@torch.no_grad()
def test_another_size_within_a_run_computes_and_keeps_anew():
    model = fastdiff.accelerate(dit(), cache=Broadcast(9, 1, 9, 0, 1))
    with fastdiff.request() as request:
        for size, batch in ((8, 2), (8, 2), (16, 2), (16, 2), (8, 2), (8, 1)):
            model(*inputs(batch, 0, size))
        model.to(torch.bfloat16)(*inputs(1, 0))
    assert hows(request) == ["full", "reuse", "full", "reuse", "full", "full", "full"]


def test_training_mode_and_gradients_turn_it_off_and_drop_what_was_kept():
    model = fastdiff.accelerate(dit(), cache=EVERY)
    args = inputs(2, 0)
    with fastdiff.request() as request:
        with torch.no_grad():
            model(*args)
        model(*args)
        assert not request.state
        with torch.no_grad():
            model(*args)
            model.train()(*args)
            model.eval()(*args)
    assert [e.how for e in request.trace if e.part in ("modules", NAMES[0])] == [
        "full", "off: gradients are recorded", "full", "off: the network is in training mode",
        "full",
    ]  # fmt: skip
    model(*args)
    assert "1 calls outside a run" in fastdiff.summary(model, request)


@ours
@pytest.mark.parametrize("bad", (0, 1))
def test_nan_is_never_hidden(make, bad):
    """In what is kept, or in the input of a step that reuses."""
    model = fastdiff.accelerate(make(), cache=Broadcast(2, 2, 2, 0, 1))
    calls = [inputs(2, s) for s in range(2)]
    calls[bad][0][0] = float("nan")
    outs, _ = run(model, calls)
    assert outs[1][0].isnan().all() and not outs[1][1].isnan().any()


@ours
def test_sampling_with_guidance(make):
    model = make()
    settings = dict(steps=10, guidance=2.0, classes=torch.tensor([1, 3]))

    def draw(**more):
        return fastdiff.sample(model, (2, 4, 8, 8), **settings, **more)

    plain = draw()
    assert torch.equal(draw(cache=ALWAYS), plain)
    got = draw(cache=Broadcast(2, 3, 2))
    with fastdiff.accelerated(model, cache=Broadcast(2, 3, 2), exact=False):
        assert torch.equal(draw(), got)
        run_ = acceleration_of(model).last
    error = (got - plain).norm() / plain.norm()
    assert 0 < error < 0.5
    assert hows(run_) == ["full" if s in (0, 2, 4, 6, 8, 9) else "reuse" for s in range(10)]


def calls_of(make, size):
    """Ten calls of the network, whose input moves along a line."""
    model, args, kwargs = make()
    name = next((k for k in ("hidden_states", "sample") if k in kwargs), None)
    x = kwargs[name] if name else args[0]
    d = networks.draw(*x.shape, seed=9)
    for s in range(size):
        now = x + 0.1 * s * d
        yield model, (() if name else (now, *args[1:])), {**kwargs, **({name: now} if name else {})}


PAB = [networks.pixart, networks.sd3, networks.flux, networks.sd15, networks.wan]
PAB += [more.cogvideox, more.latte, more.qwen_image]


@pytest.mark.parametrize("make", PAB, ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", (2, 3))
def test_it_is_diffusers_pyramid_attention_broadcast(make, n):
    """Bit for bit, where no module adds its input to its output."""
    model, calls = make()[0], list(calls_of(make, 10))
    plain = [call(model, *given) for _, *given in calls]
    policy = Broadcast(n, 4, 1, 0.2, 0.9, temporal_attention=n + 1)
    with fastdiff.accelerated(model, cache=policy, exact=False):
        with fastdiff.request(steps=10) as request:
            got = [call(model, *given) for _, *given in calls]
    assert "reuse" in hows(request) and not all(map(torch.equal, got, plain))
    now, between = {}, (100, 800)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=n, spatial_attention_timestep_skip_range=between,
        cross_attention_block_skip_range=4, cross_attention_timestep_skip_range=between,
        temporal_attention_block_skip_range=n + 1,
        temporal_attention_timestep_skip_range=between,
        current_timestep_callback=lambda: now["t"],
        spatial_attention_block_identifiers=(r"^(?!.*temporal).*blocks",),
    )  # fmt: skip
    apply_pyramid_attention_broadcast(model, config)
    for s, (_, *given) in enumerate(calls):
        now["t"] = 950 - 100 * s  # steps 2 to 8 lie between 100 and 800
        assert torch.equal(call(model, *given), got[s])


@torch.no_grad()
def test_keys_and_values_of_a_prompt_are_still_projected_once():
    model, args, kwargs = networks.sd15()
    fastdiff.accelerate(model, cache=Broadcast(1, 2, 1, 0, 1))
    text = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    count = []
    text.to_k.register_forward_hook(lambda *_: count.append(1))
    with fastdiff.request():
        for _ in range(6):
            call(model, args, kwargs)
    assert len(count) == 3  # a layer that someone listens to is called at each computed step
    text.to_k._forward_hooks.clear()
    with fastdiff.request() as request:
        for _ in range(6):
            call(model, args, kwargs)
        (entry,) = request.state["text_kv", id(text)]
        assert entry.pair is not None


@torch.no_grad()
def test_memory_is_claimed_before_anything_is_kept():
    model, args = dit(), inputs(2, 0)
    size = 2 * 3 * (2 * 16 * 32) * 4  # halves, blocks, [B, N, D] float32
    policy = Broadcast(2, 1, 2, 0, 1, order=1)
    for limit in (2 * size - 1, 2 * size):
        with fastdiff.accelerated(model, cache=policy, cache_bytes=limit):
            with fastdiff.request() as request:
                if limit < 2 * size:
                    with pytest.raises(ValueError, match=f"run hold {2 * size} bytes"):
                        model(*args)
                    continue
                for _ in range(4):
                    model(*args)
                assert request.peak_bytes == 2 * size


def test_next_to_other_policies():
    model, calls = dit(), [inputs(2, s) for s in range(8)]
    policies = [Forecast(interval=2, order=1), Broadcast(4, 1, 1, 0, 1)]
    with fastdiff.accelerated(model, cache=policies):
        _, request = run(model, calls)
    assert hows(request, "blocks 0-2") == ["full"] + ["full", "forecast"] * 3 + ["full"]
    assert [(e.step, e.how) for e in request.trace if e.part == NAMES[0]] == [
        (0, "full"), (1, "reuse"), (3, "reuse"), (5, "reuse"), (7, "reuse"),
    ]  # fmt: skip
    model = unet()
    with fastdiff.accelerated(model, cache=[Broadcast(2, 2, 2, 0, 1), DeepCache(3)]):
        run(model, [*calls, *calls])
    for pair in ([FirstBlock(0), Broadcast(2)], [FirstBlock(0.1), ALWAYS]):
        fastdiff.restore(fastdiff.accelerate(model, cache=pair))
    for other in (FirstBlock(0.1), EncoderPropagation(2, parallel=2)):
        with pytest.raises(ValueError, match="next to Broadcast"):
            fastdiff.accelerate(model, cache=[other, Broadcast()])
    with pytest.raises(ValueError, match="which skip the same"):
        fastdiff.accelerate(model, cache=[Broadcast(3), Broadcast()])


def test_few_steps_are_warned_of():
    model = fastdiff.accelerate(dit(), cache=Broadcast())
    with pytest.warns(UserWarning, match="Broadcast: a run of 4 steps gains little"):
        run(model, [inputs(1, s) for s in range(4)])


def test_what_it_cannot_run_on_is_said_and_nothing_is_changed():
    model = dit()
    with pytest.raises(ValueError, match="known here are 3 of self_attention, 3 of feed_forward"):
        fastdiff.accelerate(model, cache=Broadcast(1, 2, 1))
    assert not {"attend", "mlp", "forward"} & set(model.__dict__)
    with pytest.raises(ValueError, match="modules of Linear that are known here are none"):
        fastdiff.accelerate(nn.Linear(2, 2), cache=Broadcast())
    text = fastdiff.summary(fastdiff.accelerate(model, cache=Broadcast()))
    assert "3 modules of self-attention are computed or reused" in text
    assert "0 modules of cross-attention" in text
