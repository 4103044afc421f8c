"""U-Net caches at work: what a policy says of each step, done to the stages of a network.

The forwards of stages are replaced once; each asks which call it is part of. A call outside a run
is nobody's, and everything is plain then. A stage that is skipped hands on an empty tensor, a view
of its input: nothing is allocated or copied for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdiff.cache.deepcache import DeepCache
from fastdiff.cache.faster_diffusion import EncoderPropagation
from fastdiff.engine.patch import Patch
from fastdiff.engine.request import Event, Request, current
from fastdiff.engine.view import Join, Stage, UNetView

FEW = 8  # steps of a distilled model: neighbours differ too much for a cache to be of use

_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]
_Run = Callable[..., Any]
_Trim = Callable[[_Args, _Kwargs], tuple[_Args, _Kwargs]]


class Schedule(Protocol):
    """A policy that knows its full steps before the first one."""

    def full(self, step: int, steps: int | None) -> bool: ...


class Kept(NamedTuple):
    """What a slot keeps between steps; ``fits`` is the shape, dtype and device it belongs to."""

    fits: Hashable
    tensors: dict[Hashable, Any]


class Call(NamedTuple):
    """One model call that stores into ``tensors`` or, where ``reuse``, reads them.

    ``rows`` times the rows of what was stored: as many steps are decoded at once.
    """

    reuse: bool
    tensors: dict[Hashable, Any]
    rows: int = 1


_Reuse = Callable[[_Run, Call, Request, _Args, _Kwargs], Any]
_call: ContextVar[Call | None] = ContextVar("fastdiff_unet_call", default=None)


@contextmanager
def _within(call: Call | None) -> Iterator[None]:
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def _off(network: nn.Module) -> str | None:
    if network.training:
        return "off: the network is in training mode"
    if torch.is_grad_enabled():
        return "off: gradients are recorded"
    return None


def _plan(request: Request, policy: Schedule, x: Tensor) -> Call | None:
    """How the call of the request's slot runs; None where it neither stores nor reads."""
    step, steps = request.step, request.steps
    if step == 0 and steps is not None and steps <= FEW and not policy.full(1, steps):
        name = type(policy).__name__
        warnings.warn(f"{name}: a run of {steps} steps gains little and loses much", stacklevel=4)
    key = (request.slot, "unet")
    fits = (x.shape, x.dtype, x.device)
    kept = request.state.get(key)
    if kept is not None and kept.fits != fits:
        del request.state[key]
        kept = None
    if kept is not None and not policy.full(step, steps):
        return Call(True, kept.tensors)
    last = steps is not None and step + 1 >= steps
    if last or policy.full(step + 1, steps):  # nobody will read it
        request.state.pop(key, None)
        return None
    request.state[key] = Kept(fits, {})
    return Call(False, request.state[key].tensors)


def _alone(run: _Run, call: Call, request: Request, args: _Args, kwargs: _Kwargs) -> Any:
    """A reuse step that runs on its own."""
    with _within(call):
        return run(*args, **kwargs)


def _drive(
    network: nn.Module,
    view: UNetView,
    policy: Schedule,
    part: str,
    trim: _Trim,
    patch: Patch,
    reuse: _Reuse = _alone,
) -> None:
    """Around a call of the network: decide, say so in the trace, and let the stages know."""
    plain = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        request = current()
        if request is None or request.slot is None:
            return plain(*args, **kwargs)
        x = view.sample(args, kwargs)
        how, call = _off(network), None
        if how is None:
            call = _plan(request, policy, x)
            how = "reuse" if call is not None and call.reuse else "full"
        else:
            request.state.pop((request.slot, "unet"), None)
        computed = (how != "reuse",) * x.shape[0]
        request.trace.append(Event(request.step, request.slot, part, computed, how))
        if call is not None and call.reuse:
            args, kwargs = trim(args, kwargs)
            return reuse(plain, call, request, args, kwargs)
        with _within(call):
            return plain(*args, **kwargs)

    patch.set(network, "forward", forward)


def _nothing(args: _Args, kwargs: _Kwargs) -> Tensor:
    """An empty tensor, ``[0, C, h, w]``, in the place of what is not computed."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden[:0]


def _skip(module: nn.Module, patch: Patch, skips: int | None = None) -> None:
    """``module`` does nothing at reuse steps; ``skips`` of a stage of the way down."""
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None or not call.reuse:
            return plain(*args, **kwargs)
        nothing = _nothing(args, kwargs)
        return nothing if skips is None else (nothing, (nothing,) * skips)

    patch.set(module, "forward", forward)


def _skip_down(stage: Stage, patch: Patch) -> None:
    _skip(stage.module, patch, stage.layers + stage.resamples)


def _shorten(stage: Stage, layers: int, patch: Patch) -> None:
    """A stage of the way down runs its first ``layers`` layers at reuse steps."""
    plain, run = stage.module.forward, stage.part(0, layers, False)
    missing = stage.layers + stage.resamples - layers

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None or not call.reuse:
            return plain(*args, **kwargs)
        _, skips = run(*args, **kwargs)
        nothing = _nothing(args, kwargs)
        return nothing, skips + (nothing,) * missing

    patch.set(stage.module, "forward", forward)


def _enter(stage: Stage, layers: int, patch: Patch) -> None:
    """A stage of the way up keeps what enters its last ``layers`` layers, or starts from it."""
    plain = stage.module.forward
    head = stage.part(0, stage.layers - layers, False)
    tail = stage.part(stage.layers - layers, stage.layers, True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None:
            return plain(*args, **kwargs)
        join = stage.read(args, kwargs)
        if not call.reuse:
            above = Join(join.hidden, join.skips[layers:], join.size)
            args_above, kwargs_above = stage.write(args, kwargs, above)
            hidden = head(*args_above, **kwargs_above)
            call.tensors["feature"] = hidden.clone()
        else:
            hidden = call.tensors["feature"]
        args, kwargs = stage.write(args, kwargs, Join(hidden, join.skips[:layers], join.size))
        return tail(*args, **kwargs)

    patch.set(stage.module, "forward", forward)


def _enter_mid(mid: nn.Module, patch: Patch) -> None:
    """The middle's result is kept. Networks add to it in place, so a copy is handed out."""
    plain = mid.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is not None and call.reuse:
            return call.tensors["feature"].clone()
        out = plain(*args, **kwargs)
        if call is not None:
            call.tensors["feature"] = out.clone()
        return out

    patch.set(mid, "forward", forward)


def _place(view: UNetView, branch: int) -> tuple[int, int]:
    """Level and layer of a branch: the stage of the way down (from the outermost), its skip."""
    level, layer = 0, branch
    stages = list(reversed(view.up))
    while level < len(stages) and layer >= stages[level].layers:
        layer -= stages[level].layers
        level += 1
    if level == len(stages):
        most = sum(stage.layers for stage in stages) - 1
        raise ValueError(f"DeepCache: branch is {branch}, this network has branches 0 to {most}")
    return level, layer


def deepcache(network: nn.Module, view: UNetView, policy: DeepCache, patch: Patch) -> list[str]:
    """Run :class:`~fastdiff.cache.DeepCache` on a U-Net; a sentence that says what is skipped.

    Raises:
        ValueError: the network has no such branch.
    """
    level, layer = _place(view, policy.branch)
    up = list(reversed(view.up))
    here = view.down[level]
    whole = layer == here.layers and not here.resamples
    deepest = level == len(up) - 1 and layer + 1 == up[level].layers
    if layer == 0:
        _skip_down(here, patch)
    elif not whole:
        _shorten(here, layer, patch)
    for stage in view.down[level + 1 :]:
        _skip_down(stage, patch)
    for stage in up[level + 1 :]:
        _skip(stage.module, patch)
    if deepest and view.mid is not None:
        _enter_mid(view.mid, patch)
    else:
        if view.mid is not None:
            _skip(view.mid, patch)
        _enter(up[level], layer + 1, patch)
    skips = sum(stage.layers for stage in up[:level]) + layer + 1
    part = f"below skip {policy.branch} (level {level}, layer {layer})"

    def trim(args: _Args, kwargs: _Kwargs) -> Any:
        return view.trim(args, kwargs, skips, deepest)

    _drive(network, view, policy, part, trim, patch)
    return [f"{policy}: reuse steps leave out what is {part}"]


def _repeat(t: Tensor, rows: int) -> Tensor:
    return t if rows == 1 else t.expand(rows, *t.shape).flatten(0, 1)


def _decode(stage: Stage, place: int, patch: Patch) -> None:
    """Stage ``place`` of the way up keeps what the way down gave it, or runs on that."""
    plain = stage.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None:
            return plain(*args, **kwargs)
        join = stage.read(args, kwargs)
        if not call.reuse:
            hidden = join.hidden.clone() if place == 0 else None
            call.tensors[place] = (hidden, tuple(s.clone() for s in join.skips), join.size)
            return plain(*args, **kwargs)
        hidden, skips, size = call.tensors[place]
        hidden = join.hidden if hidden is None else _repeat(hidden, call.rows)
        skips = tuple(_repeat(s, call.rows) for s in skips)
        args, kwargs = stage.write(args, kwargs, Join(hidden, skips, size))
        return plain(*args, **kwargs)

    patch.set(stage.module, "forward", forward)


def _several(view: UNetView, policy: EncoderPropagation) -> _Reuse:
    """Non-key steps to come are decoded together with this one, and wait for their turn."""

    def reuse(run: _Run, call: Call, request: Request, args: _Args, kwargs: _Kwargs) -> Any:
        step, steps = request.step, request.steps
        waiting = call.tensors.setdefault("waiting", {})
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

    def trim(args: _Args, kwargs: _Kwargs) -> Any:
        return view.trim(args, kwargs, 0, False)

    several = policy.parallel > 1 and view.at_times is not None
    reuse = _several(view, policy) if several else _alone
    _drive(network, view, policy, "the encoder", trim, patch, reuse)
    how = f"up to {policy.parallel} at once" if several else "one by one"
    return [f"{policy}: the encoder runs at key steps, the others are decoded {how}"]
