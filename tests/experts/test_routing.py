"""Routes that are kept over steps."""

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.cache import Broadcast, DeepCache, FirstBlock, Forecast, GuidanceReuse
from fastdiff.experts import RoutingReuse
from fastdiff.models import DiTMoE
from fastdiff.nn import MoE
from fastdiff.testing import draw_weights
from fastdiff.tokens import RegionAdaptive


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(MoE(16, 8, 4, 2) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@torch.no_grad()
def run(net, xs, steps=None):
    with fastdiff.request(steps or len(xs)) as request:
        return [net(x).clone() for x in xs], request


def test_schedule():
    policy = RoutingReuse(3, warmup=2)
    assert [s for s in range(12) if policy.full(s, 12)] == [0, 1, 4, 7, 10]
    assert RoutingReuse(1).neutral and all(RoutingReuse(1).full(s, 9) for s in range(9))


@torch.no_grad()
def test_neutral_is_exact_and_kept_routes_are_those_of_the_step_that_routed():
    net, xs = Net().eval(), [torch.randn(2, 6, 16) for _ in range(5)]
    want, _ = run(net, xs)
    with fastdiff.accelerated(net, cache=RoutingReuse(1)):
        assert all(map(torch.equal, run(net, xs)[0], want))
    same = [xs[0]] * 4
    with fastdiff.accelerated(net, cache=RoutingReuse(2)):
        got, request = run(net, xs)
        assert torch.equal(got[0], want[0]) and not torch.equal(got[1], want[1])
        assert [e.how for e in request.trace] == ["full", "reuse", "full", "reuse", "full"]
        assert request.syncs == 0 and request.peak_bytes > 0
        assert all(torch.equal(g, got[0]) for g in run(net, same)[0])
    # By hand: every layer with the routes of step 0.
    routes, x = [], xs[0]
    for layer in net.layers:
        routes.append(layer.route(x.view(-1, 16)))
        x = x + layer(x)
    y = xs[1]
    for layer, routing in zip(net.layers, routes, strict=True):
        y = y + layer.experts_of(y.view(-1, 16), routing).view(y.shape)
    torch.testing.assert_close(got[1], y, rtol=0, atol=0)
    assert all(map(torch.equal, run(net, xs)[0], want))  # restored


@torch.no_grad()
def test_another_size_routes_anew_and_runs_do_not_meet():
    net = Net().eval()
    xs = [torch.randn(2, 6, 16), torch.randn(1, 6, 16), torch.randn(1, 6, 16)]
    want, _ = run(net, xs)
    with fastdiff.accelerated(net, cache=RoutingReuse(9)):
        got, _ = run(net, xs)
        assert torch.equal(got[1], want[1]) and not torch.equal(got[2], want[2])
        assert torch.equal(run(net, xs[2:])[0][0], want[2])
        assert torch.equal(net(xs[2]), want[2])  # outside of a run


def test_as_programs():
    net = Net().eval()
    xs = [torch.randn(2, 6, 16) for _ in range(7)]
    with fastdiff.accelerated(net, cache=RoutingReuse(3)):
        want, _ = run(net, xs)
        programs = fastdiff.programs(net)
        for _ in range(2):
            assert all(map(torch.equal, run(programs, xs)[0], want))
        reports = programs.check()
        assert reports and all(r.ok for r in reports), "\n".join(map(str, reports))


def test_refusals():
    with pytest.raises(ValueError, match="interval is 0"):
        RoutingReuse(0)
    with pytest.raises(ValueError, match="which runs on layers of experts"):
        fastdiff.accelerate(nn.Sequential(nn.Linear(2, 2)), cache=RoutingReuse(2))
    for other in (RegionAdaptive(0.5), FirstBlock(0.1)):
        with pytest.raises(ValueError, match="need one of them"):
            fastdiff.accelerate(Net(), cache=[RoutingReuse(2), other])


@pytest.mark.parametrize(
    "others",
    [[], [Forecast(2)], [DeepCache(2)], [GuidanceReuse(2)], [Broadcast(2, start=0, stop=1)]],
    ids=str,
)
def test_a_dit_of_experts_with_caches(others):
    torch.manual_seed(0)
    model = draw_weights(
        DiTMoE(
            input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=5,
            learn_sigma=False, experts=4,
        )
    ).eval()  # fmt: skip
    how = dict(steps=7, classes=torch.tensor([1, 3]), guidance=2.0, seed=1)
    shape = (2, 4, 8, 12)
    plain = fastdiff.sample(model, shape, cache=others, **how)
    neutral = fastdiff.sample(model, shape, cache=[RoutingReuse(1), *others], **how)
    assert torch.equal(neutral, plain)
    got = fastdiff.sample(model, shape, cache=[RoutingReuse(3), *others], **how)
    assert got.isfinite().all() and not torch.equal(got, plain)
    assert torch.equal(got, fastdiff.sample(model, shape, cache=[RoutingReuse(3), *others], **how))
    alone = fastdiff.sample(model, shape, cache=RegionAdaptive(0.5, start=2, resets=(4,)), **how)
    assert alone.isfinite().all()
