"""Encoder propagation at work: at non-key steps the way up of a U-Net runs on what was kept.

The forwards of stages are replaced once; each asks which call it is part of. A stage that is
skipped hands on an empty tensor, a view of its input: nothing is allocated or copied for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdiff.cache.faster_diffusion import EncoderPropagation
from fastdiff.engine.history import History
from fastdiff.engine.off import warn_of_few, why_off
from fastdiff.engine.patch import Patch, forward_of
from fastdiff.engine.request import Event, Part, Request, current
from fastdiff.engine.reuse_unet import nothing
from fastdiff.engine.view import Join, Stage, UNetView

_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]
_Run = Callable[..., Any]


class Kept:
    """What a slot keeps between steps.

    Attributes:
        fits: the shape, dtype and device that it belongs to.
        stages: what the way down gave each stage of the way up, by place.
        sizes: that each of them grows to.
        waiting: outputs of steps to come, by step.
    """

    def __init__(self, fits: Hashable) -> None:
        self.fits = fits
        self.stages: dict[int, History] = {}
        self.sizes: dict[int, Any] = {}
        self.waiting: dict[int, Tensor] = {}


class Call(NamedTuple):
    """One model call that stores or, where ``reuse``, reads what is kept.

    ``rows`` times the rows of what was stored: as many steps are decoded at once.
    """

    reuse: bool
    kept: Kept
    request: Request
    rows: int = 1

    def store(self, place: int, streams: tuple[Tensor, ...], size: Any) -> None:
        """Copies of ``streams`` for the stage at ``place``."""
        if place not in self.kept.stages:
            key = (self.request.slot, "unet", place)
            self.request.claim(key, sum(s.numel() * s.element_size() for s in streams))
            self.kept.stages[place] = History(1)
        self.kept.stages[place].put(self.request.step, streams)
        self.kept.sizes[place] = size


_Reuse = Callable[[_Run, Call, Request, _Args, _Kwargs], Any]
_call: ContextVar[Call | None] = ContextVar("fastdiff_unet_call", default=None)


@contextmanager
def _within(call: Call | None) -> Iterator[None]:
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def _plan(request: Request, policy: EncoderPropagation, x: Tensor) -> Call | None:
    """How the call of the request's slot runs; None where it neither stores nor reads."""
    step, steps = request.step, request.steps
    warn_of_few(request, policy)
    key = (request.slot, "unet")
    fits = (x.shape, x.dtype, x.device)
    kept = request.state.get(key)
    if kept is not None and kept.fits != fits and not request.static:
        del request.state[key]
        kept = None
    started = kept is not None and any(h.order for h in kept.stages.values())
    if kept is not None and started and not policy.full(step, steps):
        return Call(True, kept, request)
    last = steps is not None and step + 1 >= steps
    if (last or policy.full(step + 1, steps)) and not request.static:  # nobody will read it
        request.state.pop(key, None)
        return None
    if kept is None:
        kept = request.state[key] = Kept(fits)
    return Call(False, kept, request)


def _alone(run: _Run, call: Call, request: Request, args: _Args, kwargs: _Kwargs) -> Any:
    """A reuse step that runs on its own."""
    with _within(call):
        return run(*args, **kwargs)


def _drive(
    network: nn.Module,
    view: UNetView,
    policy: EncoderPropagation,
    part: Part,
    patch: Patch,
    reuse: _Reuse,
) -> None:
    """Around a call of the network: decide, say so in the trace, and let the stages know."""
    plain = forward_of(network)

    def forward(*args: Any, **kwargs: Any) -> Any:
        request = current()
        if request is None or request.slot is None:
            return plain(*args, **kwargs)
        x = view.sample(args, kwargs)
        off, call = why_off(network), None
        how = f"off: {off}"
        if not off:
            call = _plan(request, policy, x)
            how = "reuse" if call is not None and call.reuse else "full"
        else:
            request.state.pop((request.slot, "unet"), None)
        computed = (how != "reuse",) * x.shape[0]
        request.trace.append(
            Event(request.step, request.slot, part.name, computed, how, part.layout)
        )
        if call is not None and call.reuse:
            args, kwargs = view.trim(args, kwargs, 0, False)
            return reuse(plain, call, request, args, kwargs)
        with _within(call):
            return plain(*args, **kwargs)

    patch.set(network, "forward", forward)


def _skip(module: nn.Module, patch: Patch, skips: int | None = None) -> None:
    """``module`` does nothing at reuse steps; ``skips`` of a stage of the way down."""
    plain = forward_of(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None or not call.reuse:
            return plain(*args, **kwargs)
        empty = nothing(args, kwargs)
        return empty if skips is None else (empty, (empty,) * skips)

    patch.set(module, "forward", forward)


def _skip_down(stage: Stage, patch: Patch) -> None:
    _skip(stage.module, patch, stage.layers + stage.resamples)


def _repeat(t: Tensor, rows: int) -> Tensor:
    return t if rows == 1 else t.expand(rows, *t.shape).flatten(0, 1)


def _decode(stage: Stage, place: int, patch: Patch) -> None:
    """Stage ``place`` of the way up keeps what the way down gave it, or runs on that."""
    plain = forward_of(stage.module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None:
            return plain(*args, **kwargs)
        join = stage.read(args, kwargs)
        if not call.reuse:
            first = (join.hidden,) if place == 0 else ()  # the others get their own step's
            call.store(place, (*first, *join.skips), join.size)
            return plain(*args, **kwargs)
        (kept,) = call.kept.stages[place].values
        streams = tuple(_repeat(s, call.rows) for s in kept)
        hidden, skips = (join.hidden, streams) if place else (streams[0], streams[1:])
        args, kwargs = stage.write(args, kwargs, Join(hidden, skips, call.kept.sizes[place]))
        return plain(*args, **kwargs)

    patch.set(stage.module, "forward", forward)


def _several(view: UNetView, policy: EncoderPropagation) -> _Reuse:
    """Non-key steps to come are decoded together with this one, and wait for their turn."""

    def reuse(run: _Run, call: Call, request: Request, args: _Args, kwargs: _Kwargs) -> Any:
        step, steps = request.step, request.steps
        waiting = call.kept.waiting
        if step in waiting:
            return waiting.pop(step)
        if request.times is None or steps is None or view.at_times is None:
            return _alone(run, call, request, args, kwargs)
        last = step + 1
        while last < min(steps, step + policy.parallel) and not policy.full(last, steps):
            last += 1
        count = last - step
        args, kwargs = view.at_times(args, kwargs, request.times[step:last])
        out = _alone(run, call._replace(rows=count), request, args, kwargs).unflatten(
            0, (count, -1)
        )
        waiting.update({step + i: out[i] for i in range(1, count)})
        return out[0]

    return reuse


def encoder_propagation(
    network: nn.Module, view: UNetView, policy: EncoderPropagation, patch: Patch
) -> list[str]:
    """Run :class:`~fastdiff.cache.EncoderPropagation` on a U-Net; a sentence that says how."""
    _skip(view.conv_in, patch)
    for stage in view.down:
        _skip_down(stage, patch)
    if view.mid is not None:
        _skip(view.mid, patch)
    for place, stage in enumerate(view.up):
        _decode(stage, place, patch)

    several = policy.parallel > 1 and view.at_times is not None
    reuse = _several(view, policy) if several else _alone
    levels = list(range(len(view.down)))
    layout = [(f"down {i}", True) for i in levels]
    layout += [("middle", True)] if view.mid is not None else []
    layout += [(f"up {i}", False) for i in reversed(levels)]
    part = Part("the encoder", tuple(layout))
    _drive(network, view, policy, part, patch, reuse)
    how = f"up to {policy.parallel} at once" if several else "one by one"
    return [f"{policy}: the encoder runs at key steps, the others are decoded {how}"]
