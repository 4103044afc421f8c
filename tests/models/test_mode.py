"""MoDE: an oracle in float64, routing by the level, the cache of experts, experts on disk."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff import nn
from fastdiff.engine import capture_check
from fastdiff.models import ExpertStore, MoDE
from fastdiff.testing import assert_close

TINY = dict(state_dim=7, goal_dim=5, action_dim=3, width=32, depth=3, num_heads=4, chunk=6, goals=2)


def made(seed=0, std=0.3, **more):
    torch.manual_seed(seed)
    policy = MoDE(**{**TINY, **more})
    for name, p in policy.named_parameters():
        around = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(p, around, std)
        if "router" in name:
            p.data *= 3  # levels differ in their experts
    return policy.eval()


def inputs(batch=2, states=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 6, 3, generator=g)
    return x, torch.randn(batch, states, 7, generator=g), torch.randn(batch, 2, 5, generator=g)


def oracle(policy, x, sigma, state, goal):
    """Sample after sample from the state dict, in float64."""
    w = {k: v.double() for k, v in policy.state_dict().items()}
    heads, k, out = policy.num_heads, policy.k, []

    def rms(h, weight):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    for a, s, st, go in zip(x.double(), sigma.double(), state.double(), goal.double(), strict=True):
        total = s**2 + 0.25
        c = (s.log() / 4) * w["sigma_emb.weight"][:, 0] + w["sigma_emb.bias"]
        c = w["sigma_linear.weight"] @ c
        pos = w["pos_emb"][0]
        h = torch.cat([
            c[None],
            go @ w["goal_emb.weight"].T + pos[:2],
            st @ w["state_emb.weight"].T + pos[2],
            (a / total.sqrt()) @ w["action_emb.weight"].T + pos[2:],
        ])  # fmt: skip
        n, d = h.shape
        for i in range(len(policy.blocks)):
            b = f"blocks.{i}."
            full = (rms(h, w[b + "norm1"]) + c) @ w[b + "qkv.weight"].T + w[b + "qkv.bias"]
            q, key, v = (t.view(n, heads, -1).transpose(0, 1) for t in full.chunk(3, 1))
            q, key = rms(q, w[b + "q_norm"]), rms(key, w[b + "k_norm"])
            score = q @ key.transpose(1, 2) / math.sqrt(d // heads)
            if policy.causal:
                score = score.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
            h = h + (score.softmax(-1) @ v).transpose(0, 1).reshape(n, d) @ w[b + "proj.weight"].T
            h = rms(h, w[b + "norm2"])
            r = F.gelu(w[b + "router.fc1.weight"] @ c + w[b + "router.fc1.bias"])
            p = (w[b + "router.fc2.weight"] @ r + w[b + "router.fc2.bias"]).softmax(0)
            p, chosen = p.clamp(1e-9, 1 - 1e-9).topk(k)
            add = 0
            for g, e in zip(p / p.sum(), chosen.tolist(), strict=True):
                u = h @ w[b + "moe.up"][e].T + w[b + "moe.up_bias"][e]
                value, gate = u.chunk(2, 1)
                add = add + g * ((value * F.silu(gate)) @ w[b + "moe.down"][e].T)
            h = h + add
        found = rms(h[-len(a) :], w["norm"]) @ w["out.weight"].T + w["out.bias"]
        out.append(0.25 / total * a + s * 0.5 / total.sqrt() * found)
    return torch.stack(out)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("more", [{}, dict(k=1), dict(k=4), dict(causal=False), dict(k=3)], ids=str)
@torch.no_grad()
def test_equals_an_oracle(more):
    policy = made(**more)
    x, state, goal = inputs(3)
    sigma = torch.tensor([0.002, 1.0, 70.0])
    want = oracle(policy, x, sigma, state, goal)
    assert relative(policy(x, sigma, state, goal), want) < 1e-5
    got = policy(x, 1.0, state, goal)
    assert relative(got[1], want[1]) < 1e-5  # a number is a level for all


@torch.no_grad()
def test_default_size_is_the_papers():
    with torch.device("meta"):
        policy = MoDE(512, 512, 7)
    block = policy.blocks[0]
    assert (len(policy.blocks), policy.num_heads, policy.k) == (12, 8, 2)
    assert block.moe.up.shape == (4, 8192, 1024) and block.moe.down.shape == (4, 1024, 4096)
    assert block.moe.up_bias.shape == (4, 8192) and block.moe.down_bias is None
    assert block.router.fc1.weight.shape == (2048, 1024)


@torch.no_grad()
def test_levels_of_one_batch_give_what_singles_give():
    policy = made()
    x, state, goal = inputs(5)
    sigma = torch.tensor([0.001, 0.02, 0.7, 9.0, 80.0])
    together = policy(x, sigma, state, goal)
    with nn.routes() as found:
        alone = [
            policy(x[i : i + 1], s, state[i : i + 1], goal[i : i + 1])
            for i, s in enumerate(sigma.tolist())
        ]
    assert relative(together, torch.cat(alone)) < 1e-5
    chosen = {tuple(sorted(set(r.experts.flatten().tolist()))) for r in found[::3]}
    assert len(chosen) > 1  # levels do differ
    assert relative(policy(x, 0.7, state, goal)[2], alone[2][0]) < 1e-5


@torch.no_grad()
def test_routing_depends_on_the_level_alone():
    policy = made()
    with nn.routes() as found:
        for seed in (1, 2):
            x, state, goal = inputs(seed=seed)
            policy(x, 0.5, state, goal)
    assert torch.equal(found[0].experts, found[3].experts)
    assert (found[0].experts == found[0].experts[0]).all()


@torch.no_grad()
def test_without_a_goal_and_causality():
    policy = made()
    x, state, goal = inputs()
    assert relative(policy(x, 0.5, state), policy(x, 0.5, state, torch.zeros_like(goal))) < 1e-6
    other = x.clone()
    other[:, 4:] += 1
    one, two = policy(x, 0.5, state, goal), policy(other, 0.5, state, goal)
    assert torch.allclose(one[:, :4], two[:, :4], atol=1e-6) and not torch.allclose(one, two)


@torch.no_grad()
def test_bfloat16():
    policy = made(k=4)
    x, state, goal = inputs()
    for p in policy.parameters():
        p.copy_(p.bfloat16())
    want = oracle(policy, x, torch.tensor([0.5, 0.5]), state, goal)
    with fastdiff.use("ref"):
        eager = policy.bfloat16()(x, 0.5, state, goal)
    got = policy(x, 0.5, state, goal)
    assert got.dtype == torch.float32 and relative(got, want) < 0.05
    assert_close(got, want, eager, what="MoDE bf16")
    cache = policy.cache()
    assert torch.equal(policy.act(state, goal), policy.act(state, goal, cache=cache))


def test_training_and_its_balance():
    policy = made().train()
    x, state, goal = inputs(4)
    sigma = torch.rand(4) + 0.1
    with nn.routes() as found:
        loss = policy(x, sigma, state, goal).square().mean()
    assert len(found) == 3
    (loss + 0.01 * nn.balance_loss(found)).backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert policy.blocks[0].router.fc1.weight.grad.any()


@torch.no_grad()
def test_actions_of_a_perfect_network_and_of_a_seed():
    policy = made()
    _, state, goal = inputs()
    levels = policy.levels(10)
    assert levels[0] == pytest.approx(80) and levels[-1] == pytest.approx(0.001)
    ratios = [b / a for a, b in zip(levels, levels[1:], strict=False)]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-5)
    one = policy.act(state, goal, seed=3)
    assert one.shape == (2, 6, 3) and torch.equal(one, policy.act(state, goal, seed=3))
    assert not torch.equal(one, policy.act(state, goal, seed=4))
    noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one, policy.act(state, goal, noise=noise))
    x = 80 * noise  # the loop, written out
    for s, after in zip(levels, [*levels[1:], 0.0], strict=True):
        d = policy(x, s, state, goal)
        x = (after / s) * x + (1 - after / s) * d
    assert relative(one, x) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@torch.no_grad()
def test_cached_is_routed_to_the_bit(batch, k):
    policy = made(k=k)
    x, state, goal = inputs(batch)
    cache = policy.cache(policy.levels(4))
    for s in policy.levels(4):
        want = policy(x, s, state, goal)
        assert torch.equal(policy(x, s, state, goal, cache=cache), want), s
        with nn.routes() as found:
            policy(x, s, state, goal)
        for route, (experts, gates), chosen in zip(
            found, cache.gates(s), cache.chosen(s), strict=True
        ):
            assert torch.equal(route.experts[0], experts) and len(gates) == k
            assert sorted(experts.tolist()) == list(chosen)
            assert gates.sum().item() == pytest.approx(1)
    plain = policy.act(state, goal, steps=4)
    assert torch.equal(policy.act(state, goal, steps=4, cache=cache), plain)


@torch.no_grad()
def test_cached_routings_are_those_of_the_op():
    policy = made()
    x, state, goal = inputs(3)
    cache = policy.cache([0.3])
    seen = []
    plain = nn.MoE.experts_of
    nn.MoE.experts_of = lambda self, t, r, w=None: (seen.append(r), plain(self, t, r, w))[1]
    try:
        policy(x, 0.3, state, goal)
        policy(x, 0.3, state, goal, cache=cache)
    finally:
        nn.MoE.experts_of = plain
    for routed, cached in zip(seen[:3], seen[3:], strict=True):
        for name, a, b in zip(routed._fields, routed, cached, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype and b.is_contiguous(), name


@torch.no_grad()
def test_cached_levels_mixed_in_a_batch():
    policy = made()
    x, state, goal = inputs(3)
    sigma = torch.tensor([0.1, 7.0, 0.1])
    cache = policy.cache([7.0, 0.1])
    got = policy(x, sigma, state, goal, cache=cache)
    assert relative(got, policy(x, sigma, state, goal)) < 1e-6
    with pytest.raises(ValueError, match="sigma is 0.3.*none of the 2 levels from 7 to 0.1; need"):
        policy(x, torch.tensor([0.1, 0.3, 0.1]), state, goal, cache=cache)


@torch.no_grad()
def test_unknown_and_neighbouring_levels():
    policy = made()
    x, state, goal = inputs()
    cache = policy.cache([1.0])
    policy(x, 1.0 + 1e-9, state, goal, cache=cache)  # the same float32
    for s in (1.0 + 1e-6, 0.999999, 80.0):
        with pytest.raises(ValueError, match="none of the 1 levels"):
            policy(x, s, state, goal, cache=cache)
    with pytest.raises(ValueError, match="none of the 1 levels"):
        policy.act(state, goal, cache=cache)
    for bad in ([], [0.0], [math.nan], [-1.0], [math.inf]):
        with pytest.raises(ValueError, match="need numbers above 0"):
            policy.cache(bad)
    with pytest.raises(ValueError, match="policy is another"):
        made()(x, 1.0, state, goal, cache=cache)


def test_a_cache_of_other_weights_is_stale():
    policy = made()
    _, state, goal = inputs()

    def step():
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        x = torch.randn(2, 6, 3)
        policy(x, torch.rand(2) + 0.1, state, goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def swap():
        policy.blocks[1].router = made(seed=5).blocks[1].router

    for change in (
        step,
        lambda: policy.load_state_dict(made(seed=3).state_dict()),
        lambda: policy.load_state_dict(made(seed=4).state_dict(), assign=True),
        swap,
        lambda: torch.nn.init.zeros_(policy.sigma_emb.bias),
    ):
        cache = policy.cache()
        policy.act(state, goal, cache=cache)
        assert not cache.stale()
        change()
        assert cache.stale()
        with pytest.raises(ValueError, match="has changed since the cache was made"):
            policy.act(state, goal, cache=cache)
    cache = policy.cache()
    with torch.no_grad():
        policy.blocks[0].moe.up.mul_(1.1)  # read in place: the cache stays good
        assert torch.equal(policy.act(state, goal, cache=cache), policy.act(state, goal))


@torch.no_grad()
def test_cost_is_what_torch_counts():
    policy = made(k=4)  # the reference row computes every expert for every row
    x, state, goal = inputs(3)
    cache = policy.cache([0.5])
    flops = {}
    with fastdiff.use("ref"):
        for name, how in (("routed", {}), ("cached", dict(cache=cache))):
            with FlopCounterMode(display=False) as counter:
                policy(x, 0.5, state, goal, **how)
            flops[name] = counter.get_total_flops() / 2
    cost = cache.cost(3, 2)
    assert flops["routed"] - flops["cached"] == cost["routed"].routers > 0
    assert cost["cached"].routers == 0
    per_row = 3 * 3 * 11 * 4 * 3 * 32 * 128  # depth, tokens, rows of one, up and down
    assert cost["cached"].experts == per_row
    extra = 3 * per_row  # 4 experts for each of 4 rows
    assert flops["cached"] == cost["cached"].total + extra


@torch.no_grad()
def test_a_cached_step_can_be_captured():
    policy = made(depth=1)
    x, state, goal = inputs(1)
    cache = policy.cache([0.5])
    policy(x, 0.5, state, goal, cache=cache)
    for how in (dict(cache=cache), {}):
        found = capture_check.check(
            lambda x, s, how=how: policy(x, 0.5, s, goal, **how), (x, state)
        )
        assert found.ok, str(found)


@pytest.mark.parametrize("stacks", [1, 2, 5, 100])
@torch.no_grad()
def test_experts_on_disk(tmp_path, stacks):
    policy = made()
    _, state, goal = inputs()
    want = policy.act(state, goal, steps=5)
    path = tmp_path / "experts.safetensors"
    total = ExpertStore.write(policy, path)
    one = total // (3 * 4) * 2  # layers, experts; two of each are chosen
    ExpertStore.strip(policy)
    assert all(p.is_meta for n, p in policy.named_parameters() if ".moe." in n)
    store = ExpertStore(path, budget=stacks * one)
    cache = policy.cache(policy.levels(5))
    for _ in range(2):
        assert torch.equal(policy.act(state, goal, steps=5, cache=cache, store=store), want)
    assert one <= store.peak <= stacks * one and (stacks > 5 or store.peak < total)
    needed = {(i, e) for s in cache.sigmas for i, e in enumerate(cache.chosen(s))}
    if stacks == 100:
        assert store.loaded == 2 * one * len(needed)  # of each run, once


@torch.no_grad()
def test_errors_of_experts_on_disk(tmp_path):
    policy = made()
    x, state, goal = inputs()
    path = tmp_path / "experts.safetensors"
    ExpertStore.write(policy, path)
    cache = policy.cache()
    small = ExpertStore(path, budget=1000)
    with pytest.raises(ValueError, match="budget is 1000 bytes, need at least"):
        policy.act(state, goal, cache=cache, store=small)
    with pytest.raises(ValueError, match="store is given without cache"):
        policy.act(state, goal, store=small)
    with pytest.raises(ValueError, match="fetch is given, need a cache and one level"):
        policy(x, 0.5, state, goal, fetch=lambda: None)
    store = ExpertStore(path, budget=10**9)
    with (
        pytest.raises(ValueError, match="has no expert 9 of layer 0"),
        store.run([(0, (0, 9))]),
    ):
        pass
    with store.run([(0, (0, 1))]) as take:
        take()
        with pytest.raises(ValueError, match="the plan's 1 entries are all taken"):
            take()
    with store.run([(0, (0, 1))] * 50):
        pass  # broken off: the thread ends
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="other.safetensors is not readable"):
        ExpertStore(tmp_path / "other.safetensors", budget=1)


@torch.no_grad()
def test_bad_input():
    policy = made()
    x, state, goal = inputs()
    for args, message in (
        ((x[:, :5], 0.5, state, goal), r"x has shape \[2, 5, 3\], need \[B, 6, 3\]"),
        ((x[0], 0.5, state, goal), "need 3 dimensions"),
        ((x, 0.0, state, goal), "sigma is 0.0, need a number above 0"),
        ((x, "1", state, goal), "sigma is '1'"),
        ((x, torch.ones(3), state, goal), r"sigma has shape \[3\], need \[2\]"),
        ((x, 0.5, state[..., :6], goal), r"state has shape \[2, 2, 6\], need \[2, S, 7\]"),
        ((x, 0.5, state[:1], goal), r"state has shape \[1, 2, 7\]"),
        ((x, 0.5, state, goal[:, :1]), r"goal has shape \[2, 1, 5\], need \[2, 2, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            policy(*args)
    for steps in (0, 2.0, True):
        with pytest.raises(ValueError, match="steps is"):
            policy.act(state, goal, steps=steps)
    for change, message in (
        (dict(num_heads=5), "width is 32, need a multiple of num_heads 5"),
        (dict(sigma_min=0.0), "sigma_min is 0.0"),
        (dict(k=5), "k is 5, need at most 4"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**change)
