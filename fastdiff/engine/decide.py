"""What a policy says of a call: which samples compute. Schedules know; rules measure and wait."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.cache.first_block import Memory
from fastdiff.engine.history import History, Streams
from fastdiff.engine.request import Event, Part, Request


class Kept:
    """What a slot keeps between steps.

    Attributes:
        key: in the request's state.
        fits: the shape, dtype and device that it belongs to.
        history: of the features.
        memory: of the rule.
        storing: False where the policy is neutral: nothing is kept then.
    """

    def __init__(self, key: Hashable, fits: Hashable, policy: Any) -> None:
        self.key, self.fits, self.storing = key, fits, not policy.neutral
        self.history = History(policy.order + 1, getattr(policy, "observe", None))
        self.memory: Memory = {}

    @classmethod
    def of(cls, request: Request, kind: str, fits: Hashable, policy: Any) -> Kept:
        """That of the request's slot, a new one for features of another size."""
        key = (request.slot, kind)
        found = request.state.get(key)
        if found is None or (found.fits != fits and not request.static):
            found = request.state[key] = cls(key, fits, policy)
        return found

    def claim(self, request: Request, features: Streams) -> None:
        """Say what this will hold at most.

        Raises:
            ValueError: it is more than the request's limit allows.
        """
        if self.storing and not self.history.values:
            one = sum(f.numel() * f.element_size() for f in features)
            request.claim(self.key, self.history.length * one)


class Decision(NamedTuple):
    """``rows``: "all", or the indices of the samples that compute on the device (None: none);
    ``which``: the same for the host; ``remember()``: to be called when the call has succeeded."""

    rows: str | Tensor | None
    which: Sequence[int]
    remember: Callable[[], None]


def _nothing() -> None:
    pass


def decide(
    request: Request,
    policy: Any,
    kept: Kept,
    part: Part,
    batch: int,
    signal: Tensor | None = None,
    compact: bool = True,
) -> Decision:
    """Which samples of a call compute, and an event in the trace that says so.

    Args:
        signal: ``[B, ...]``: what a rule measures; None for schedules.
        compact: samples may be taken out of the batch; else all compute where one does.
    """
    step = request.step

    def note(computed: tuple[bool, ...], how: str) -> None:
        request.trace.append(Event(step, request.slot, part.name, computed, how, part.layout))

    def update(rows: Tensor | None, distance: Tensor | None = None) -> Callable[[], None]:
        if signal is None or not kept.storing:
            return _nothing

        def remember() -> None:
            kept.memory = policy.update(kept.memory, signal, rows, distance)
            size = sum(t.numel() * t.element_size() for t in kept.memory.values())
            request.claim((kept.key, "rule"), size)

        return remember

    forecast = "forecast" if len(kept.history.values) > 1 else "reuse"
    if not kept.history.nodes or policy.neutral:
        note((True,) * batch, "full")
        return Decision("all", range(batch), update(None))
    if signal is None:
        if policy.full(step, request.steps):
            note((True,) * batch, "full")
            return Decision("all", range(batch), _nothing)
        note((False,) * batch, forecast)
        return Decision(None, (), _nothing)

    if step < policy.warmup:
        note((True,) * batch, "full")
        return Decision("all", range(batch), update(None))
    distance = policy.distance(kept.memory, signal)
    values = distance.tolist()
    request.syncs += 1
    gaps = [step - nodes[0] for nodes in kept.history.nodes]
    computed = tuple(
        not v <= policy.threshold or (policy.most is not None and gap > policy.most)
        for v, gap in zip(values, gaps, strict=True)
    )
    if any(computed) and not compact:
        computed = (True,) * batch
    nan = any(v != v for v in values)
    note(computed, "full, as the change is NaN" if nan else "by the change")
    if all(computed):
        return Decision("all", range(batch), update(None))
    which = [b for b, c in enumerate(computed) if c]
    rows = torch.tensor(which, dtype=torch.int64).to(signal.device)
    return Decision(rows if which else None, which, update(rows, distance))
