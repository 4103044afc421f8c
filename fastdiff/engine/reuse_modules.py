"""Caches of single modules at work: attention and feed-forward, each computed on its own schedule.

A module's output is kept as a copy and handed out as a fresh tensor, so that what comes after may
write to it. What a module keeps belongs to the shapes, dtypes and devices of the tensors that it
was called with; where they change it computes, and keeps anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdiff import ops
from fastdiff.cache.broadcast import Broadcast
from fastdiff.engine.history import History, Streams
from fastdiff.engine.off import warn_of_few, why_off
from fastdiff.engine.patch import Patch, forward_of
from fastdiff.engine.request import Event, Request, current
from fastdiff.engine.reuse_tokens import current_tokens


class Part(NamedTuple):
    """A module that a policy may skip.

    Attributes:
        module: its ``forward`` gives a tensor or a tuple of tensors.
        kind: one of ``fastdiff.cache.broadcast.KINDS``.
        residual: None; or f of a module that returns ``(x + update) / f`` for its first tensor x,
            of which the update is kept: what is reused then differs by rounding.
    """

    module: nn.Module
    kind: str
    residual: float | None = None


class _Kept(NamedTuple):
    """The last outputs of a module; ``fits`` tells the inputs that they belong to, ``single`` is
    where the output is a tensor and not a tuple of them. The schedule is the same for all samples,
    so to the history the whole batch is one: ``[1, B, ...]``."""

    fits: Hashable
    single: bool
    history: History


def _signature(values: Iterable[Any]) -> Hashable:
    """Shape, dtype and device of the tensors among ``values``, by place."""
    return tuple((v.shape, v.dtype, v.device) if isinstance(v, Tensor) else None for v in values)


def _places(fits: Any, args: Any, kwargs: Any) -> list[Tensor | None]:
    """Of a call on some of the tokens: for each tensor given, ``[B, A]``, the places of its rows in
    the stream that the module was called with before; None where it has all of them. The network's
    first tokens are another stream's, where there are any."""
    tokens = current_tokens()
    assert tokens is not None
    found: list[Tensor | None] = []
    whole = (shape for shape, *_ in filter(None, (*fits[0], *fits[2])))
    given = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    for x, shape in zip(given, whole, strict=True):
        some = x.shape != shape and x.dim() == 3
        found.append(tokens.among(x.shape[1], shape[1] - tokens.total, 0) if some else None)
    return found


def _one(streams: Streams) -> Streams:
    return tuple(t[None] for t in streams)


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Samples of a network's call: rows of the tensor with most dimensions, which is the input; or
    the length of a list of inputs."""
    given = (*args, *kwargs.values())
    if isinstance(given[0], list):
        return len(given[0])
    return max((v for v in given if isinstance(v, Tensor)), key=Tensor.dim).shape[0]


class Call:
    """One call of a network: its modules ask whether to compute, and it notes what they did."""

    def __init__(self, request: Request, policy: Broadcast, batch: int) -> None:
        self._request, self._policy, self._batch = request, policy, batch
        self._turns: dict[str, tuple[bool, bool]] = {}  # of a kind: computes, and is kept
        self._slot = (request.slot, "modules")
        self._state: dict[Hashable, _Kept] = request.state.setdefault(self._slot, {})
        self._runs: Counter[Hashable] = Counter()
        self._how: dict[str, Counter[str]] = {}

    def _turn(self, kind: str) -> tuple[bool, bool]:
        if kind not in self._turns:
            when = kind, self._request.step, self._request.steps
            self._turns[kind] = self._policy.computes(*when), self._policy.kept(*when)
        return self._turns[kind]

    def output(
        self, part: Part, key: Hashable, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """What ``run(*args, **kwargs)`` gives, computed or not; ``key`` names the module."""
        request, policy = self._request, self._policy
        computes, keeps = self._turn(part.kind)
        self._runs[key] += 1  # a feed-forward in chunks runs several times in a call
        key = (key, self._runs[key])
        fits = (_signature(args), tuple(kwargs), _signature(kwargs.values()))
        x: Tensor = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        kept = self._state.get(key)
        tokens = current_tokens()
        if tokens is not None and tokens.index is not None:
            return self._some(part, kept, computes, run, args, kwargs)
        if kept is not None and kept.fits != fits and not request.static:
            del self._state[key]  # before the new one takes memory
            kept = None
        if kept is not None and kept.history.values and not computes:
            return self._reused(part, kept, x)
        self._note(part.kind, "full")
        out = run(*args, **kwargs)
        single = isinstance(out, Tensor)
        tensors: tuple[Tensor, ...] = (out,) if single else tuple(out)
        if not all(isinstance(t, Tensor) for t in tensors):
            return out  # not something that can be continued: always computed
        if kept is None:
            size = sum(t.numel() * t.element_size() for t in tensors)
            most = policy.order + 1 if tokens else policy.most(part.kind, request.steps)
            request.claim((*self._slot, key), size * most)
            kept = self._state[key] = _Kept(fits, single, self._history(part.kind))
        if not keeps and tokens is None and not request.static:  # some tokens may come next
            self._state[key] = kept._replace(history=self._history(part.kind))
        elif part.residual is None:
            kept.history.put(request.step, _one(tensors))
        else:
            kept.history.put(request.step, _one((out * part.residual,)), _one((x,)))
        return out

    def _some(
        self,
        part: Part,
        kept: _Kept | None,
        computes: bool,
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """The output for some of the tokens: what is kept is of all, the i-th output's rows are
        those of the i-th tensor given."""
        if kept is None or not kept.history.values:
            self._note(part.kind, "full")
            return run(*args, **kwargs)
        history, step, places = kept.history, self._request.step, _places(kept.fits, args, kwargs)
        if not computes:
            self._note(part.kind, "forecast" if len(history.values) > 1 else "reuse")
            whole = [t[0] for t in history.forecast(step, self._policy.method)]
            some = tuple(
                t.clone() if at is None else ops.gather_tokens(t, at)
                for t, at in zip(whole, places, strict=False)
            )
            return some[0] if kept.single else some
        self._note(part.kind, "full")
        out = run(*args, **kwargs)
        last = zip((out,) if kept.single else out, history.values[0], places, strict=False)
        new = (t if at is None else ops.update_tokens_(o[0].clone(), at, t) for t, o, at in last)
        history.put(step, _one(tuple(new)))
        return out

    def _reused(self, part: Part, kept: _Kept, x: Tensor) -> Any:
        """A fresh tensor, or a tuple of them."""
        step, method, several = self._request.step, self._policy.method, len(kept.history.values)
        self._note(part.kind, "forecast" if several > 1 else "reuse")
        if part.residual is not None:
            return kept.history.onto(_one((x,)), step, method)[0][0] / part.residual
        found = tuple(t[0] for t in kept.history.forecast(step, method))
        if several == 1:
            found = tuple(t.clone() for t in found)
        return found[0] if kept.single else found

    def _history(self, kind: str) -> History:
        observe = getattr(self._policy, "observe", None)
        return History(self._policy.order + 1, observe and partial(observe, kind))

    def _note(self, kind: str, how: str) -> None:
        self._how.setdefault(kind, Counter())[how] += 1

    def close(self) -> None:
        """At the end of the call: an event for each kind of module. Where some of them computed
        and others did not, their numbers are told, and the kind counts as computed."""
        request = self._request
        for kind, how in self._how.items():
            words = ", ".join(how if len(how) == 1 else (f"{n} {h}" for h, n in how.items()))
            computed = (how["full"] > 0,) * self._batch
            part = kind.replace("_", "-")
            request.trace.append(Event(request.step, request.slot, part, computed, words))


_call: ContextVar[Call | None] = ContextVar("fastdiff_modules", default=None)


def wrapped(part: Part, key: Hashable, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which computes ``part``, as a function that runs it only where its turn has come."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None:
            return run(*args, **kwargs)
        return call.output(part, key, run, args, kwargs)

    return forward


def drive(network: nn.Module, policy: Broadcast, patch: Patch) -> None:
    """Around every call of the network: caches are on within a run, and nowhere else."""
    plain = forward_of(network)

    def forward(*args: Any, **kwargs: Any) -> Any:
        request, call = current(), None
        if request is not None and request.slot is not None:
            off = why_off(network)
            if off:
                request.trace.append(
                    Event(request.step, request.slot, "modules", (), f"off: {off}")
                )
                request.state.pop((request.slot, "modules"), None)
            else:
                warn_of_few(request, policy)
                call = Call(request, policy, _batch(args, kwargs))
        token = _call.set(call)
        try:
            out = plain(*args, **kwargs)
        finally:
            _call.reset(token)
        if call is not None:
            call.close()
        return out

    patch.set(network, "forward", forward)


def modules(network: nn.Module, parts: Sequence[Part], policy: Broadcast, patch: Patch) -> None:
    """Run ``policy`` on those ``parts`` of a network that it does not always compute."""
    for i, part in enumerate(parts):
        if policy.skips(part.kind):
            patch.set(part.module, "forward", wrapped(part, i, forward_of(part.module)))
    drive(network, policy, patch)
