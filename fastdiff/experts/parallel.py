"""Experts spread over processes: rows travel to the process that has their expert, and back.

A thin layer over ``torch.distributed``: each process routes its own tokens, one all-to-all brings
the rows of its experts to every process, another takes the outputs home. Sizes of messages are
values, so the host waits once a call; torch has no all-to-all of sizes on the device.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn import functional as collective

from fastdiff import ops
from fastdiff.nn import MoE


class ExpertParallel(nn.Module):
    """A layer of experts of which this process keeps its share, ``E / W`` in the order of ranks.

    Args:
        moe: the whole layer, equal on all processes; its router and shared part stay on each.
        group: of processes; None: all. Gradients of the router and of the shared part are of this
            process's tokens: average them as for any data-parallel layer.

    Raises:
        ValueError: E is no multiple of the number of processes, or ``moe`` has a capacity, which
            would depend on how tokens are spread.
    """

    def __init__(self, moe: MoE, group: Any = None) -> None:
        super().__init__()
        self._group = group
        self.world = distributed.get_world_size(group)
        rank, experts = distributed.get_rank(group), moe.up.shape[0]
        if experts % self.world:
            raise ValueError(
                f"ExpertParallel: moe has {experts} experts, need a multiple of {self.world}, the "
                "processes"
            )
        if moe.capacity is not None:
            raise ValueError(f"ExpertParallel: moe has capacity {moe.capacity}, need None")
        each = experts // self.world
        mine = slice(rank * each, (rank + 1) * each)
        self.moe = copy.copy(moe)
        self.moe._parameters = dict(moe._parameters)
        for name in ("up", "down", "up_bias", "down_bias"):
            whole = getattr(moe, name)
            if whole is not None:
                setattr(self.moe, name, nn.Parameter(whole.detach()[mine].clone()))

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = rows.new_empty(sum(receive), rows.shape[1])
        found: Tensor = collective.all_to_all_single(  # type: ignore[no-untyped-call]
            out, rows.contiguous(), receive, send, group=self._group or distributed.group.WORLD
        )
        return found

    def forward(self, x: Tensor, sample_logits: Tensor | None = None) -> Tensor:
        """``[..., C]``, as :class:`fastdiff.nn.MoE` gives for the tokens of this process."""
        tokens, moe = x.reshape(-1, x.shape[-1]), self.moe
        routing = moe.route(tokens, None, sample_logits)
        each = moe.up.shape[0]
        sizes = routing.offsets.diff().view(self.world, each)
        theirs = torch.empty_like(sizes)
        distributed.all_to_all_single(theirs, sizes.contiguous(), group=self._group)
        send, receive = sizes.sum(1).tolist(), theirs.sum(1).tolist()
        rows = self._exchange(tokens[routing.tokens], send, receive)
        # Rows came by process and expert; experts take them by expert.
        kind = torch.arange(each, device=x.device).repeat(self.world)
        kind = kind.repeat_interleave(theirs.flatten(), output_size=sum(receive))
        order = torch.sort(kind, stable=True).indices
        offsets = torch.cat([theirs.new_zeros(1), theirs.sum(0).cumsum(0)])
        y = moe.layer("down", moe.layer("up", rows, offsets, order), offsets)
        back = self._exchange(y[torch.argsort(order)], receive, send)
        out = ops.moe_combine(back, routing.weights, routing.position).view(x.shape)
        return out if moe.shared is None else out + moe.shared(x)
