"""Tokens in focus next to modules whose outputs are reused."""

from contextvars import ContextVar
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import models
from fastdiff.cache import Broadcast, GuidanceReuse
from fastdiff.engine import reuse_tokens
from fastdiff.engine.patch import Patch
from fastdiff.engine.request import Request
from fastdiff.engine.reuse_modules import Part, modules
from fastdiff.engine.reuse_tokens import TokenCall
from fastdiff.engine.token_state import Choice, Kept
from fastdiff.testing import draw_weights, load_file
from fastdiff.tokens import RegionAdaptive

networks = load_file(Path(__file__).parents[1] / "integrations" / "networks.py")
TOKENS = RegionAdaptive(0.5, start=2, resets=(5,), metric="std")


def call_dit():
    torch.manual_seed(0)
    net = models.DiT(8, 2, 4, 32, 3, 2, num_classes=5).eval()
    draw_weights(net)
    return net, (torch.randn(3, 4, 8, 8), torch.full((3,), 500.0), torch.arange(3)), {}


MAKERS = {
    "ours": call_dit, "dit": networks.dit, "pixart": networks.pixart, "sd3": networks.sd3,
    "flux": networks.flux, "wan": networks.wan,
}  # fmt: skip


@torch.no_grad()
def outputs(make, policies, steps=8, rows=slice(None)):
    net, args, kwargs = make()
    args = tuple(a[rows] if isinstance(a, torch.Tensor) and a.dim() else a for a in args)
    x, rest = args[0], args[1:]
    g = torch.Generator().manual_seed(3)
    move = 0.1 * torch.randn(x.shape[1:], generator=g)
    found = []
    with fastdiff.accelerated(net, cache=policies), fastdiff.request(steps) as run:
        for i in range(steps):
            out = net(x + i * move, *rest, **kwargs)
            found.append(out if isinstance(out, torch.Tensor) else out[0])
    return found, run


@torch.no_grad()
def test_kept_outputs_are_of_the_step_at_which_each_token_ran(monkeypatch):
    """By hand, two tokens of text before six of the picture; text runs at every step."""
    net, patch = nn.Sequential(nn.Linear(4, 4)).eval(), Patch()
    modules(net, [Part(net[0], "self_attention")], Broadcast([0, 1], start=0, stop=1), patch)
    xs, request, outs = [torch.randn(2, 8, 4) for _ in range(3)], Request(3, 1), []
    chosen = [None, torch.tensor([[1, 3, 5], [0, 1, 2]]), torch.tensor([[0, 3], [1, 5]])]
    for x, index in zip(xs, chosen, strict=True):
        call = TokenCall(request, Kept(None, 2), Choice(), None, True)
        call.index, call.total = index, 6
        if index is not None:
            x = x.gather(1, _rows(index))
        monkeypatch.setattr(reuse_tokens, "_call", ContextVar("call", default=call))
        with request.active(), request.call(net):
            outs.append(net(x))
    want = [nn.functional.linear(x, net[0].weight, net[0].bias) for x in xs]
    torch.testing.assert_close(outs[1], want[1].gather(1, _rows(chosen[1])))
    kept = want[0].scatter(1, _rows(chosen[1]), outs[1])
    torch.testing.assert_close(outs[2], kept.gather(1, _rows(chosen[2])))
    patch.undo()


def _rows(index):
    """Both tokens of text, and those of the picture, of every channel."""
    rows = torch.cat([torch.tensor([[0, 1]] * 2), index + 2], 1)
    return rows[:, :, None].expand(-1, -1, 4)


@pytest.mark.parametrize("name", MAKERS)
def test_every_network_of_tokens(name):
    make = MAKERS[name]
    alone, _ = outputs(make, TOKENS)
    policies = [TOKENS, Broadcast(2, 3, 2, 0, 1)]
    got, run = outputs(make, policies)
    assert torch.equal(got[0], alone[0]) and not torch.equal(got[3], alone[3])
    kinds = {(e.part, e.how) for e in run.trace}
    assert ("self-attention", "reuse") in kinds and ("feed-forward", "reuse") in kinds
    assert any(e.part == "tokens" and " of " in e.how for e in run.trace)
    assert all(t.isfinite().all() for t in got)
    assert all(map(torch.equal, got, outputs(make, policies)[0]))


@pytest.mark.parametrize("name", MAKERS)
def test_an_input_that_stays_gives_what_the_network_gives(name):
    make = MAKERS[name]

    @torch.no_grad()
    def still(policies):
        net, args, kwargs = make()
        found = []
        with fastdiff.accelerated(net, cache=policies), fastdiff.request(6):
            for _ in range(6):
                out = net(*args, **kwargs)
                found.append(out if isinstance(out, torch.Tensor) else out[0])
        return found

    plain, *_ = still([])
    for policies in (
        [TOKENS, Broadcast(2, 2, 2, 0, 1)],
        [TOKENS, Broadcast(3, 2, 1, 0, 1, order=1)],
    ):
        for got in still(policies):
            torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


def test_samples_of_a_batch_are_as_alone():
    policies = [TOKENS, Broadcast(2, 2, 2, 0, 1)]
    whole, _ = outputs(call_dit, policies)
    for b in range(3):
        one, _ = outputs(call_dit, policies, rows=slice(b, b + 1))
        for w, o in zip(whole, one, strict=True):
            torch.testing.assert_close(w[b : b + 1], o, rtol=1e-4, atol=1e-5)


def test_with_guidance_reused_too():
    def make():
        net, (x, t, y), kwargs = call_dit()
        return net, (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y + 1])), kwargs

    policies = [TOKENS, Broadcast(2, 2, 2, 0, 1), GuidanceReuse(2)]
    got, _ = outputs(make, policies)
    assert all(t.isfinite().all() for t in got)
