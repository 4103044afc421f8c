"""A policy that routes by the noise level (MoDE at its published size: 12 blocks of width 1,024, 4
experts, 2 of them at a level), batch 1, ten steps: with the experts of its levels known before the
run, routed at every step, and routed at every step in plain torch with a loop over experts."""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

import fastdiff
from fastdiff.models import MoDE
from fastdiff.nn import MoE
from fastdiff.ops import Routing


def _loop(moe: MoE, x: Tensor, routing: Routing) -> Tensor:
    """Experts one after another, on the tokens that chose them."""
    out = torch.zeros_like(x)
    for e in range(moe.up.shape[0]):
        token, j = (routing.experts == e).nonzero(as_tuple=True)
        if token.numel():
            h, gate = F.linear(x[token], moe.up[e], moe.up_bias[e]).chunk(2, -1)
            y = F.linear(h * F.silu(gate), moe.down[e])
            out.index_add_(0, token, routing.weights[token, j, None] * y)
    return out


def _case(batch: int) -> Case:
    policy = MoDE(64, 512, 7).eval().requires_grad_(False)
    state, goal = torch.randn(batch, 2, 64), torch.randn(batch, 1, 512)
    cache = policy.cache()

    def plain() -> Tensor:
        own = MoE.experts_of
        MoE.experts_of = lambda moe, x, routing, weights=None: _loop(moe, x, routing)
        try:
            with fastdiff.use("torch", "ref"):
                return policy.act(state, goal)
        finally:
            MoE.experts_of = own

    cost = cache.cost(batch, 2)["cached"]
    return Case(
        f"policy, cached experts, batch {batch} float32",
        lambda: policy.act(state, goal, cache=cache),
        {"eager": plain, "routed": lambda: policy.act(state, goal)},
        flops=20.0 * cost.total,
        target=2.0,
    )


def cases() -> list[Case]:
    return [_case(1), _case(8)]
