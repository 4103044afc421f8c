"""Caches of a stack of blocks at work: the residual of the blocks past a head is kept and reused.

Decisions are per sample. Samples that compute are taken out of the batch and go through the blocks
alone; the others get what they had. What a rule decides from features is read by the host once a
call and counted; a schedule is known before and costs no wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.cache.first_block import FirstBlock
from fastdiff.cache.forecast import Forecast, lagrange
from fastdiff.engine.patch import Patch
from fastdiff.engine.request import Event, Request, current
from fastdiff.engine.view import BlockView, Streams

Policy = FirstBlock | Forecast
_ALL = "all"


class Stack:
    """One call of a network: which samples compute, and what the others get.

    ``rows`` is "all", or the indices of the samples that compute (None: none).
    """

    def __init__(self, request: Request, policy: Policy, part: str, compact: bool) -> None:
        self._request, self._policy, self._part, self._compact = request, policy, part, compact
        self._key = (request.slot, "blocks")
        self.rows: str | Tensor | None = _ALL
        self._start: Streams = ()
        self._reused: Streams = ()
        self._head: Tensor | None = None  # residual of the head that this call will keep
        self.batch = 0

    def enter(self, before: Streams, start: Streams) -> None:
        """At the end of the head: ``before`` and ``start`` are the streams around it."""
        kept = self._request.state.get(self._key)
        fits = tuple((s.shape, s.dtype, s.device) for s in start)
        if kept is not None and kept["fits"] != fits:
            kept = None  # another size: a run of its own
        if kept is None:
            kept = self._request.state[self._key] = {"fits": fits, "past": []}
        self._kept, self._start = kept, start
        if isinstance(self._policy, Forecast):
            self._scheduled(self._policy)
        else:
            self._measured(self._policy, start[0] - before[0])

    def _note(self, computed: tuple[bool, ...], how: str) -> None:
        request = self._request
        request.trace.append(Event(request.step, request.slot, self._part, computed, how))

    def _scheduled(self, policy: Forecast) -> None:
        step, batch, past = self._request.step, self._start[0].shape[0], self._kept["past"]
        if not past or policy.full(step, self._request.steps):
            self._note((True,) * batch, "full")
            return
        self.rows = None
        weights = lagrange([node for node, _ in past], step)
        self._reused = tuple(
            sum((w * r for w, r in zip(weights[1:], rest, strict=True)), weights[0] * first)
            for first, *rest in zip(*(residuals for _, residuals in past), strict=True)
        )
        self._note((False,) * batch, "forecast" if len(past) > 1 else "reuse")

    def _measured(self, policy: FirstBlock, residual: Tensor) -> None:
        batch, kept = residual.shape[0], self._kept
        if "head" not in kept or policy.threshold == 0:
            self._note((True,) * batch, "full")
            self._head = residual
            return
        change = policy.change(residual, kept["head"])
        self._request.syncs += 1
        values = change.tolist()  # the one wait of a call
        computed = tuple(not value <= policy.threshold for value in values)
        if any(computed) and not self._compact:
            computed = (True,) * batch
        nan = any(value != value for value in values)
        self._note(computed, "full, as the change is NaN" if nan else "by the change")
        if all(computed):
            self._head = residual
            return
        self._reused = kept["past"][0][1]
        self.rows = None
        if any(computed):
            self.rows = torch.tensor([i for i, c in enumerate(computed) if c]).to(residual.device)
            self._head = kept["head"].index_copy(0, self.rows, residual[self.rows])

    def leave(self, out: Streams) -> Streams:
        """After the last block, with what the rows that compute gave: the streams of all.

        A last block may end a stream, which is then not kept.
        """
        if self.rows is None:
            return tuple(s + r for s, r in zip(self._start, self._reused, strict=False))
        if not isinstance(self.rows, Tensor):
            self._keep(tuple(o - s for o, s in zip(out, self._start, strict=False)))
            return out
        rows, whole, residuals = self.rows, [], []
        for o, s, r in zip(out, self._start, self._reused, strict=False):
            residuals.append(r.index_copy(0, rows, o - s[rows]))
            whole.append((s + r).index_copy(0, rows, o))
        self._keep(tuple(residuals))
        return tuple(whole)

    def _keep(self, residuals: Streams) -> None:
        if isinstance(self._policy, Forecast):
            if self._policy.interval == 1:
                return
            past = [*self._kept["past"], (self._request.step, residuals)]
            self._kept["past"] = past[-self._policy.order - 1 :]
        elif self._policy.threshold > 0:
            # Together, and only now: a call that breaks off leaves the pair before it.
            self._kept["head"] = self._head
            self._kept["past"] = [(self._request.step, residuals)]


_stack: ContextVar[Stack | None] = ContextVar("fastdiff_stack", default=None)


def current_stack() -> Stack | None:
    """The call of a network that is in work here, None where its caches are off."""
    return _stack.get()


def head_of(policy: Policy) -> int:
    """How many blocks always run: a rule has to see something."""
    return 1 if isinstance(policy, FirstBlock) else 0


def _taken(values: Any, rows: Tensor, batch: int) -> Any:
    """Tensors of one entry a sample, for some of the samples. Tables in tuples are no samples'."""
    if isinstance(values, dict):
        return {key: _taken(value, rows, batch) for key, value in values.items()}
    if isinstance(values, list):
        return [_taken(value, rows, batch) for value in values]
    if isinstance(values, Tensor) and values.dim() > 1 and values.shape[0] == batch:
        return values[rows]
    if isinstance(values, Tensor) and values.shape == (batch,):
        return values[rows]
    return values


def _run(plain: Callable[..., Any], args: Any, kwargs: Any, batch: int) -> Any:
    stack = _stack.get()
    assert stack is not None
    if not isinstance(stack.rows, Tensor):
        return plain(*args, **kwargs)
    rows = stack.rows  # the streams past the head's end have these rows alone already
    args = tuple(_taken(a, rows, batch) for a in args)
    kwargs = {k: v if "rotary" in k else _taken(v, rows, batch) for k, v in kwargs.items()}
    return plain(*args, **kwargs)


def _wrap(view: BlockView, i: int, head: int, patch: Patch) -> None:
    block, last = view.blocks[i], i == len(view.blocks) - 1
    plain = block.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        stack = _stack.get()
        if stack is None:
            return plain(*args, **kwargs)
        streams = block.read(args, kwargs)
        if i < head:
            out = plain(*args, **kwargs)
            stack.enter(streams, block.unpack(out))
            return out
        if i == 0:
            stack.enter(streams, streams)
        if i == head:
            stack.batch = streams[0].shape[0]
        if stack.rows is not None:
            out = _run(plain, args, kwargs, stack.batch)
            if not last:
                return out
            streams = block.unpack(out)
        return block.pack(stack.leave(streams)) if last else block.pack(streams)

    patch.set(block.module, "forward", forward)


def drive(
    network: nn.Module,
    policy: Policy,
    part: str,
    patch: Patch,
    view: BlockView,
) -> None:
    """Around every call of the network: caches are on within a run, and nowhere else."""
    plain = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        request, stack = current(), None
        if request is not None and request.slot is not None:
            off = "training mode" if network.training else ""
            off = off or ("gradients are recorded" if torch.is_grad_enabled() else "")
            off = off or view.off(args, kwargs)
            if off:
                request.trace.append(Event(request.step, request.slot, part, (), f"off: {off}"))
                request.state.pop((request.slot, "blocks"), None)
            else:
                stack = Stack(request, policy, part, not view.whole(args, kwargs))
        token = _stack.set(stack)
        try:
            return plain(*args, **kwargs)
        finally:
            _stack.reset(token)

    patch.set(network, "forward", forward)


def blocks(network: nn.Module, view: BlockView, policy: Policy, patch: Patch) -> list[str]:
    """Run ``policy`` on a list of blocks; a sentence that says which.

    Raises:
        ValueError: there are too few blocks.
    """
    head, count = head_of(policy), len(view.blocks)
    if count < head + 1:
        raise ValueError(f"accelerate: cache is {policy!r}, which needs {head + 1} blocks or more")
    for i in range(count):
        _wrap(view, i, head, patch)
    part = f"blocks {head}-{count - 1}"
    drive(network, policy, part, patch, view)
    return [f"{policy}: {part} are computed or reused"]
