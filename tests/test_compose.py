"""All policies, alone and in pairs, on one network of each kind; blocks that a user names."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import adapters, cache
from fastdiff.cache.parse import POLICIES
from fastdiff.precision import Precision
from fastdiff.testing import load_file
from fastdiff.tokens import Merge, RegionAdaptive

HERE = Path(__file__).parent / "integrations"
networks, more = load_file(HERE / "networks.py"), load_file(HERE / "more_networks.py")

# Settings that compute everything, and some that do not, for every policy there is.
NEUTRAL = {
    "accumulated": cache.AccumulatedDistance(0),
    "broadcast": cache.Broadcast(1, 1, 1, temporal_attention=1),
    "deepcache": cache.DeepCache(1),
    "encoder": cache.EncoderPropagation(1),
    "firstblock": cache.FirstBlock(0),
    "guidance": cache.GuidanceReuse(1),
    "magnitude": cache.MagnitudeRatio(),
    "merge": Merge(0.0),
    "precision": Precision("float"),
    "taylor": cache.Forecast(1),
    "tokens": RegionAdaptive(1.0),
}
WORKING = {
    "accumulated": cache.AccumulatedDistance(9.0, order=1),
    "broadcast": cache.Broadcast(2, 3, 2, 0, 1),
    "deepcache": cache.DeepCache(3, order=1),
    "encoder": cache.EncoderPropagation(3),
    "firstblock": cache.FirstBlock(9.0),
    "guidance": cache.GuidanceReuse(2),
    "magnitude": cache.MagnitudeRatio((1.0,) * 9, retention=0.2),
    "merge": Merge(0.4),
    "precision": Precision(least=256),
    "taylor": cache.Forecast(3),
    "tokens": RegionAdaptive(0.4, start=2, resets=(5,)),
}
PAIRS = [*combinations(POLICIES, 1), *combinations(POLICIES, 2)]
KINDS = {"unet": networks.sd15, "transformer": networks.pixart}


def test_every_policy_is_here():
    assert set(NEUTRAL) == set(WORKING) == set(POLICIES)
    for name, policy in POLICIES.items():
        assert isinstance(NEUTRAL[name], policy) and isinstance(WORKING[name], policy)


@torch.no_grad()
def run(model, args, kwargs, steps=9):
    """Outputs of a run whose input, the same for both samples, moves on from step to step."""
    g = torch.Generator().manual_seed(3)
    x, rest = args[0][:1].expand_as(args[0]), args[1:]
    move = 0.05 * torch.randn(x[:1].shape, generator=g)
    with fastdiff.request(steps) as request:
        outs = [model(x + i * move, *rest, **kwargs, return_dict=False)[0] for i in range(steps)]
    return torch.stack(outs), request


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names", [*combinations(POLICIES, 1), *combinations(POLICIES, 2)], ids="+".join
)
def test_policies_compose_or_refuse_with_a_sentence(kind, names):
    model, args, kwargs = KINDS[kind]()
    before = dict(model.__dict__), [dict(m.__dict__) for m in model.modules()]
    plain, _ = run(model, args, kwargs)
    for settings, neutral in ((NEUTRAL, True), (WORKING, False)):
        policies = [settings[name] for name in names]
        try:
            fastdiff.accelerate(model, cache=policies, exact=False)
        except ValueError as error:
            assert str(error).startswith(("accelerate: cache ", "Broadcast: "))
            assert "need" in str(error) or "does not run on" in str(error)
        else:
            got, request = run(model, args, kwargs)
            if neutral:
                assert torch.equal(got, plain) and request.bytes() == 0
            else:
                assert got.isfinite().all() and not torch.equal(got, plain)
                assert torch.equal(run(model, args, kwargs)[0], got)
                keeps = set(names) - {"merge", "precision"}
                assert request.peak_bytes > 0 or not keeps
            fastdiff.restore(model)
        after = dict(model.__dict__), [dict(m.__dict__) for m in model.modules()]
        assert after[0].keys() == before[0].keys()
        assert [d.keys() for d in after[1]] == [d.keys() for d in before[1]]
    assert torch.equal(run(model, args, kwargs)[0], plain)


def cached(model, args, kwargs, policies, steps):
    """Outputs of a run; None where the policies are refused with a sentence."""
    try:
        fastdiff.accelerate(model, cache=policies)
    except ValueError as error:
        assert str(error).startswith(("accelerate: cache ", "Broadcast: "))
        return None
    try:
        return run(model, args, kwargs, steps)[0]
    finally:
        fastdiff.restore(model)


@pytest.mark.parametrize("make", (*networks.NETWORKS, more.cogvideox), ids=lambda f: f.__name__)
def test_neutral_settings_leave_every_network_alone(make):
    """To the bit, each policy and each pair of them, on the exact mode."""
    model, args, kwargs = make()
    exact, ran = cached(model, args, kwargs, [], 3), set()
    for names in PAIRS:
        got = cached(model, args, kwargs, [NEUTRAL[name] for name in names], 3)
        if got is not None:
            assert torch.equal(got, exact), names
            ran.add(names)
    alone = {name for (name,) in (names for names in ran if len(names) == 1)}
    assert alone >= set(POLICIES) - {"encoder"}  # which is for U-Nets
    assert {("broadcast", "guidance"), ("broadcast", "deepcache"), ("deepcache", "guidance")} <= ran


@pytest.mark.parametrize("make", (networks.sd15, networks.flux, networks.wan))
def test_a_neutral_policy_next_to_a_working_one_changes_nothing(make):
    model, args, kwargs = make()
    for name in POLICIES:
        alone = cached(model, args, kwargs, [WORKING[name]], 5)
        for other in set(POLICIES) - {name} if alone is not None else ():
            got = cached(model, args, kwargs, [WORKING[name], NEUTRAL[other]], 5)
            assert got is None or torch.equal(got, alone), (name, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_two_interleaved_runs_of_two_sizes_are_as_alone(kind, name):
    model, args, kwargs = KINDS[kind]()
    try:
        fastdiff.accelerate(model, cache=WORKING[name])
    except ValueError:
        pytest.skip(f"{name} does not run on a {kind}")
    wide = torch.cat([args[0], args[0].flip(-1)], dim=-1)
    inputs = [[(x + 0.05 * i * x.flip(0), *args[1:]) for i in range(7)] for x in (args[0], wide)]

    @torch.no_grad()
    def alone(calls):
        with fastdiff.request(7):
            return [model(*a, **kwargs, return_dict=False)[0] for a in calls]

    want = [alone(calls) for calls in inputs]
    runs = [fastdiff.engine.request.Request(7, 1) for _ in inputs]
    for i in range(7):
        for calls, one, outs in zip(inputs, runs, want, strict=True):
            with torch.no_grad(), one.active():
                assert torch.equal(model(*calls[i], **kwargs, return_dict=False)[0], outs[i])
    broken = torch.full_like(args[0], float("nan"))
    with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)), torch.no_grad():
        with fastdiff.request(7):
            model(*inputs[0][0], **kwargs)
            model(broken[:, :1], *args[1:], **kwargs)  # a step that fails
    assert all(map(torch.equal, alone(inputs[0]), want[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [*PAIRS[: len(POLICIES)], ("taylor", "broadcast")], ids="+".join)
def test_what_is_held_is_what_was_claimed_and_a_limit_is_obeyed(kind, names):
    """With the prompt's keys and values, which are left out where there is no room."""
    model, args, kwargs = KINDS[kind]()
    policies = [WORKING[name] for name in names]
    try:
        fastdiff.accelerate(model, cache=policies)
    except ValueError:
        pytest.skip(f"{names} do not run on a {kind}")
    free, request = run(model, args, kwargs)
    held = request.peak_bytes
    if kind == "transformer" and names in (("merge",), ("precision",)):
        assert held == 0  # masked: the prompt is projected at every step
        return
    claimed = sum(request._claims.values())  # the most; a sample that reuses may keep less
    assert 0 < held <= claimed
    for limit in (claimed, held - 1, held // 2, 0):
        fastdiff.restore(model)
        fastdiff.accelerate(model, cache=policies, cache_bytes=limit)
        try:
            got, request = run(model, args, kwargs)
        except ValueError as error:
            assert f"cache_bytes is {limit}, but the caches of this run hold" in str(error)
            assert limit < claimed
        else:
            assert request.peak_bytes <= limit
            torch.testing.assert_close(got, free)


# ---- adapters beside caches ----


def adapted(model, rank=4, seed=0):
    """An adapter of its layers for each of two samples."""
    lora = adapters.LoRA(model, rank, slots=2)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    lora.choose([1, 2])
    return lora


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_adapters_beside_every_policy(kind, name):
    """Neutral settings of either leave the other alone, to the bit; with both at work a sample
    without an adapter is what it is where there is none."""
    model, args, kwargs = KINDS[kind]()
    try:
        fastdiff.accelerate(model, cache=NEUTRAL[name], exact=False)
    except ValueError:
        pytest.skip(f"{name} does not run on a {kind}")
    plain = run(model, args, kwargs)[0]
    lora = adapted(model)
    both = run(model, args, kwargs)[0]
    fastdiff.restore(model)
    assert torch.equal(run(model, args, kwargs)[0], both) and not torch.equal(both, plain)
    lora.detach()
    try:
        fastdiff.accelerate(model, cache=WORKING[name], exact=False)
    except ValueError:
        return  # neutral, it is fine on any network
    alone = run(model, args, kwargs)[0]
    nothing = adapted(model, rank=0)
    assert torch.equal(run(model, args, kwargs)[0], alone)
    nothing.detach()
    lora.attach()
    got, request = run(model, args, kwargs)
    assert got.isfinite().all() and not request.notes
    assert not torch.equal(got, both) and not torch.equal(got, alone)
    assert torch.equal(run(model, args, kwargs)[0], got)
    if name != "guidance":  # which takes the halves of a batch for one sample
        lora.choose([0, 2])
        got = run(model, args, kwargs)[0]
        assert torch.equal(got[:, 0], alone[:, 0]) and not torch.equal(got[:, 1], alone[:, 1])
    lora.detach()
    assert torch.equal(run(model, args, kwargs)[0], alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_runs_that_take_turns_with_adapters_of_their_own(kind, name):
    """Each chooses its ids before every step, and both are as one after the other."""
    model, args, kwargs = KINDS[kind]()
    try:
        fastdiff.accelerate(model, cache=WORKING[name])
    except ValueError:
        pytest.skip(f"{name} does not run on a {kind}")
    lora = adapted(model)
    inputs = [(args[0] + 0.05 * i * args[0].flip(0), *args[1:]) for i in range(7)]
    wants = []
    for ids in ([1, 2], [2, 0]):
        lora.choose(ids)
        with fastdiff.request(7) as one, torch.no_grad():
            outs = [model(*a, **kwargs, return_dict=False)[0] for a in inputs]
        wants.append((ids, outs, one))
    assert not torch.equal(wants[0][1][6], wants[1][1][6])
    turns = [fastdiff.engine.request.Request(7, 1) for _ in wants]
    for i, a in enumerate(inputs):
        for (ids, outs, _), mine in zip(wants, turns, strict=True):
            lora.choose(ids)
            with torch.no_grad(), mine.active():
                assert torch.equal(model(*a, **kwargs, return_dict=False)[0], outs[i])
    for (_, _, one), mine in zip(wants, turns, strict=True):
        assert not mine.notes and [e[:4] for e in mine.trace] == [e[:4] for e in one.trace]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [cache.FirstBlock, cache.AccumulatedDistance])
def test_samples_that_compute_alone_keep_their_adapters(kind, make):
    """A rule that takes some samples out of the batch: each as in a batch of itself."""
    model, args, kwargs = KINDS[kind]()
    lora, steps = adapted(model), 9
    g = torch.Generator().manual_seed(3)
    move = torch.randn(args[0].shape, generator=g) * torch.tensor([0.02, 0.4])[:, None, None, None]

    def some(values, b):
        return {
            k: v[b : b + 1] if torch.is_tensor(v) and v.dim() and len(v) == 2 else v
            for k, v in values.items()
        }

    def outputs(ids, b=None):
        lora.choose(ids)
        x, how = (args[0], kwargs) if b is None else (args[0][b : b + 1], some(kwargs, b))
        step = move if b is None else move[b : b + 1]
        rest = [r if b is None or not r.dim() else r[b : b + 1] for r in args[1:]]
        with fastdiff.request(steps) as one:
            outs = [model(x + i * step, *rest, **how, return_dict=False)[0] for i in range(steps)]
        return torch.stack(outs), one

    for threshold in (0.02, 0.05, 0.1, 0.2, 0.4):
        fastdiff.accelerate(model, cache=make(threshold))
        both, one = outputs([1, 2])
        if any(any(e.computed) and not all(e.computed) for e in one.trace):
            for b in (0, 1):
                alone, _ = outputs([b + 1], b)
                torch.testing.assert_close(both[:, b : b + 1], alone, rtol=1e-3, atol=1e-4)
            return
        fastdiff.restore(model)
    raise AssertionError("no threshold took one sample out of the batch")


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x, scale):
        return x + self.up(self.norm(x)) * scale[:, None, None]


class Mine(nn.Module):
    """Somebody's network: a list of blocks of one shape."""

    def __init__(self, width=16, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x, t)
        return x


@torch.no_grad()
def test_a_network_of_ones_own_with_a_view():
    torch.manual_seed(0)
    net, other = Mine().eval(), Mine()
    view = fastdiff.BlockView.of(net.blocks)
    x, t = torch.randn(3, 5, 16), torch.tensor([0.1, 0.5, 0.9])
    plain = [net(x * (1 + 0.1 * i), t) for i in range(6)]

    def outputs(policy, rows=slice(None)):
        with fastdiff.accelerated(net, cache=policy, view=view), fastdiff.request(6) as run:
            return [net(x[rows] * (1 + 0.1 * i), t[rows]) for i in range(6)], run

    for policy in (cache.Forecast(1), cache.FirstBlock(0), cache.DeepCache(1, branch=1)):
        assert all(map(torch.equal, outputs(policy)[0], plain))
    got, run = outputs(cache.Forecast(2, order=1))
    assert [e.how for e in run.trace] == ["full", "full", "forecast", "full", "forecast", "full"]
    for policy in (cache.FirstBlock(0.15), cache.AccumulatedDistance(0.15)):
        got, run = outputs(policy)
        assert any(not all(e.computed) for e in run.trace)
        for b in range(3):
            alone, _ = outputs(policy, slice(b, b + 1))
            for g, a in zip(got, alone, strict=True):
                torch.testing.assert_close(g[b : b + 1], a, rtol=1e-5, atol=1e-5)
    for bad, need in (
        (dict(cache=cache.Forecast(), view=fastdiff.BlockView.of(other.blocks)), "not part of"),
        (dict(cache=cache.Broadcast(), view=view), "does not run on a list of blocks"),
        (dict(cache=cache.Forecast()), "does not run on Mine"),
        (
            dict(cache=cache.DeepCache(branch=2), view=view),
            "needs 5 blocks or more",
        ),
    ):
        with pytest.raises(ValueError, match=need):
            fastdiff.accelerate(net, **bad)
    assert "forward" not in net.__dict__ and "forward" not in net.blocks[0].__dict__
