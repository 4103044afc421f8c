"""Caches of a stack of blocks at work: the residual of the blocks past a head is kept and reused.

Decisions are per sample. Samples that compute are taken out of the batch and go through the blocks
alone; the others get what they had, or a forecast from it. What a rule decides from features is
read by the host once a call and counted; a schedule is known before and costs no wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from fastdiff import ops
from fastdiff.adapters import samples
from fastdiff.cache.accumulated import AccumulatedDistance
from fastdiff.cache.deepcache import DeepCache
from fastdiff.cache.first_block import FirstBlock
from fastdiff.cache.forecast import Forecast
from fastdiff.cache.magnitude import MagnitudeRatio
from fastdiff.engine.decide import Kept, decide
from fastdiff.engine.history import Streams, fits_of
from fastdiff.engine.off import why_off
from fastdiff.engine.patch import Patch, forward_of
from fastdiff.engine.request import Event, Part, Request, current
from fastdiff.engine.reuse_tokens import TokenCall, current_tokens
from fastdiff.engine.rows import call_of
from fastdiff.engine.view import BlockView

Policy = FirstBlock | AccumulatedDistance | Forecast | MagnitudeRatio | DeepCache
_ALL = "all"


class Stack:
    """One call of a network: which samples compute, and what the others get.

    ``rows`` is "all", or the indices of the samples that compute (None: none).
    """

    def __init__(self, request: Request, policy: Policy, part: Part, compact: bool) -> None:
        self._request, self._policy, self._part, self._compact = request, policy, part, compact
        self.rows: str | Tensor | None = _ALL
        self._start: Streams = ()
        self.batch = 0

    def enter(self, start: Streams, signal: Tensor | None = None) -> None:
        """At the end of the head, with the streams there and what a rule measures."""
        self._kept = Kept.of(self._request, "blocks", fits_of(start), self._policy)
        self._kept.claim(self._request, start)
        self._start, self.batch = start, start[0].shape[0]
        self.decision = decide(
            self._request, self._policy, self._kept, self._part, self.batch, signal, self._compact
        )
        self.rows = self.decision.rows
        tokens = current_tokens()
        if tokens is not None:
            tokens.rows = self.rows if isinstance(self.rows, Tensor) else None

    def leave(self, out: Streams) -> Streams:
        """After the last block, with what the rows that compute gave: the streams of all.

        A last block may end a stream, which is then not kept.
        """
        if not self._kept.storing:
            return out
        step, history, start = self._request.step, self._kept.history, self._start
        tokens = current_tokens()
        if tokens is not None:
            if out and out[0].shape[1] != start[0].shape[1]:
                out = self._all_tokens(tokens, out)
            tokens.rows = None
        if not isinstance(self.rows, str):
            # In this order: a call that breaks off leaves all as it was.
            whole = history.onto(start, step, self._policy.method)
        if isinstance(self.rows, Tensor):
            rows = self.rows
            whole = tuple(w.index_copy_(0, rows, o) for w, o in zip(whole, out, strict=False))
            residuals = tuple(o - s[rows] for o, s in zip(out, start, strict=False))
            history.put_rows(step, rows, self.decision.which, residuals)
        elif self.rows is not None:
            history.put(step, out, start)
            whole = out
        self.decision.remember()
        return whole

    def _all_tokens(self, call: TokenCall, out: Streams) -> Streams:
        """Streams of all tokens: those that did not run get the residual that they had."""
        start, rows = self._start[0], self.rows
        kept = self._kept.history.values[0][0]
        index = call.index
        assert index is not None
        if isinstance(rows, Tensor):
            start, kept, index = start[rows], kept[rows], index[rows]
        return ops.update_tokens_((start + kept).contiguous(), index, out[0]), *out[1:]


_stack: ContextVar[Stack | None] = ContextVar("fastdiff_stack", default=None)


def current_stack() -> Stack | None:
    """The call of a network that is in work here, None where its caches are off."""
    return _stack.get()


def ends_of(policy: Policy) -> tuple[int, int]:
    """How many blocks always run, at the start (a rule has to see something) and at the end."""
    if isinstance(policy, DeepCache):
        return policy.branch, policy.branch
    return (1, 0) if isinstance(policy, FirstBlock) else (0, 0)


def part_of(first: int, stop: int, count: int) -> Part:
    """Blocks ``first`` to ``stop - 1`` of ``count``."""
    layout = tuple((f"block {i}", first <= i < stop) for i in range(count))
    return Part(f"blocks {first}-{stop - 1}", layout)


def _run(plain: Callable[..., Any], args: Any, kwargs: Any, batch: int) -> Any:
    stack = _stack.get()
    assert stack is not None
    if not isinstance(stack.rows, Tensor):
        return plain(*args, **kwargs)
    # The streams past the head's end have these rows alone already.
    args, kwargs = call_of(args, kwargs, stack.rows, batch)
    with samples(stack.rows, batch):
        return plain(*args, **kwargs)


def _signal(view: BlockView, policy: Policy, args: Any, kwargs: Any) -> Tensor | None:
    """What :class:`AccumulatedDistance` measures, from a call of the first block."""
    if not isinstance(policy, AccumulatedDistance) or policy.neutral:
        return None
    if view.signal is not None:
        return view.signal(args, kwargs)
    return view.blocks[0].read(args, kwargs)[0]


def _wrap(view: BlockView, i: int, policy: Policy, patch: Patch) -> None:
    block, plain = view.blocks[i], forward_of(view.blocks[i].module)
    head, tail = ends_of(policy)
    last = len(view.blocks) - 1 - tail

    def forward(*args: Any, **kwargs: Any) -> Any:
        stack = _stack.get()
        if stack is None or i > last:
            return plain(*args, **kwargs)
        streams = block.read(args, kwargs)
        if i < head:
            out = plain(*args, **kwargs)
            if i == head - 1:
                after = block.unpack(out)
                measured = isinstance(policy, FirstBlock) and not policy.neutral
                stack.enter(after, after[0] - streams[0] if measured else None)
            return out
        if i == 0:
            stack.enter(streams, _signal(view, policy, args, kwargs))
        if stack.rows is not None:
            out = _run(plain, args, kwargs, stack.batch)
            if i != last:
                return out
            streams = block.unpack(out)
        return block.pack(stack.leave(streams)) if i == last else block.pack(streams)

    patch.set(block.module, "forward", forward)


def drive(
    network: nn.Module,
    policy: Policy,
    part: Part,
    patch: Patch,
    view: BlockView,
) -> None:
    """Around every call of the network: caches are on within a run, and nowhere else."""
    plain = forward_of(network)

    def forward(*args: Any, **kwargs: Any) -> Any:
        request, stack = current(), None
        if request is not None and request.slot is not None:
            off = why_off(network) or view.off(args, kwargs)
            if off:
                event = Event(request.step, request.slot, part.name, (), f"off: {off}", part.layout)
                request.trace.append(event)
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
    (head, tail), count = ends_of(policy), len(view.blocks)
    if count < head + tail + 1:
        raise ValueError(
            f"accelerate: cache is {policy!r}, which needs {head + tail + 1} blocks or more, and "
            f"{type(network).__name__} has {count}"
        )
    for i in range(count):
        _wrap(view, i, policy, patch)
    part = part_of(head, count - tail, count)
    drive(network, policy, part, patch, view)
    return [f"{policy}: {part.name} are computed or reused"]
