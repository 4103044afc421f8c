"""A feed-forward layer of experts, top 2, 384 -> 1,536 -> 384: against a loop in Python over tokens
sorted by expert, and against one product of the same size; its routing; its backward."""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.nn import MoE
from fastdiff.ops import linear, moe_combine, moe_route

WIDTH, HIDDEN, K = 384, 1536, 2


def loop(moe: MoE, x: Tensor, logits: Tensor) -> Tensor:
    """What plain torch does: one sort, one wait for the counts, and a loop over experts."""
    gates, experts = logits.softmax(1).topk(K)
    order = torch.sort(experts.flatten(), stable=True).indices
    counts = torch.bincount(experts.flatten(), minlength=moe.up.shape[0]).tolist()
    tokens, gates = order // K, gates.flatten()[order].to(x.dtype)
    out, start = torch.zeros_like(x), 0
    for e, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            index = tokens[rows]
            h = F.gelu(F.linear(x[index], moe.up[e]), approximate="tanh")
            y = F.linear(h, moe.down[e]) * gates[rows, None]
            out = (
                out.index_add(0, index, y)
                if torch.is_grad_enabled()
                else out.index_add_(0, index, y)
            )
            start += count
    return out


def _make(experts: int, tokens: int, dtype: torch.dtype) -> tuple[MoE, Tensor, Tensor]:
    moe = MoE(WIDTH, HIDDEN, experts, K, activation="gelu_tanh", router=False).to(dtype)
    return moe, torch.randn(tokens, WIDTH).to(dtype), torch.randn(tokens, experts)


def _forward(experts: int, tokens: int, dtype: torch.dtype, target: float) -> list[Case]:
    moe, x, logits = _make(experts, tokens, dtype)
    moe.requires_grad_(False)
    rows = torch.randn(K * tokens, WIDTH).to(dtype)
    what = f"{experts} experts, {tokens} tokens {str(dtype)[6:]}"
    routing = moe_route(logits, K)

    def one() -> Tensor:
        h = linear(rows, moe.up[0], activation="gelu_tanh")
        return linear(h, moe.down[0])

    layer = Case(
        f"layer {what}",
        lambda: moe(x, logits),
        {"eager": lambda: loop(moe, x, logits), "one product": one},
        flops=4.0 * K * tokens * WIDTH * HIDDEN,
        target=target,
        also={"one product": 0.95} if experts == 8 and dtype == torch.float32 else {},
    )
    # At most a twentieth of the layer: it takes 20 times as long.
    beside = Case(
        f"route and combine {what}",
        lambda: (moe_route(logits, K), moe_combine(rows, routing.weights, routing.position))[1],
        {"layer": lambda: moe(x, logits)},
        bytes=float((K + 1) * x.numel() * x.element_size()),
        target=20,
        vs="layer",
        comparable=False,
    )
    return [layer, beside]


def _backward(experts: int, tokens: int) -> Case:
    moe, x, logits = _make(experts, tokens, torch.float32)
    x.requires_grad_()
    logits.requires_grad_()
    leaves = (x, logits, moe.up, moe.down)

    def grads(out: Tensor) -> Tensor:
        return torch.autograd.grad(out.square().mean(), leaves)[2]

    return Case(
        f"forward and backward {experts} experts, {tokens} tokens float32",
        lambda: grads(moe(x, logits)),
        {"eager": lambda: grads(loop(moe, x, logits))},
        flops=12.0 * K * tokens * WIDTH * HIDDEN,
        target=1.5,
    )


def cases() -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found += _forward(8, 1024, dtype, 1.2 if dtype == torch.float32 else 2.0)
        found += _forward(64, 256, dtype, 2.0) + _forward(64, 1024, dtype, 2.0)
    return [*found, _backward(8, 1024), _backward(64, 1024)]
