"""Caches of a U-Net's depths at work: what enters the join of a skip is kept and reused.

The forwards of stages are replaced once; each asks which call it is part of. A call outside a run
is nobody's, and everything is plain then. A stage that is skipped hands on an empty tensor, a view
of its input: nothing is allocated or copied for it. Where only some samples compute, the stages
below the join see these alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from fastdiff.adapters import samples
from fastdiff.cache.accumulated import AccumulatedDistance
from fastdiff.cache.deepcache import DeepCache
from fastdiff.cache.first_block import FirstBlock
from fastdiff.cache.forecast import Forecast
from fastdiff.cache.magnitude import MagnitudeRatio
from fastdiff.engine.decide import Decision, Kept, decide
from fastdiff.engine.off import warn_of_few, why_off
from fastdiff.engine.patch import Patch, forward_of
from fastdiff.engine.request import Event, Part, Request, current
from fastdiff.engine.rows import call_of
from fastdiff.engine.view import Join, Stage, UNetView

Policy = AccumulatedDistance | DeepCache | FirstBlock | Forecast | MagnitudeRatio
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


def nothing(args: _Args, kwargs: _Kwargs) -> Tensor:
    """An empty tensor, ``[0, C, h, w]``, in the place of what is not computed."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden[:0]


class Depths:
    """One call of a network: which samples compute what is below the join, what the others get."""

    def __init__(self, request: Request, policy: Policy, part: Part, x: Tensor) -> None:
        self._request, self._policy, self._part, self.batch = request, policy, part, x.shape[0]
        fits = (x.shape, x.dtype, x.device)
        self._kept = Kept.of(request, "unet", fits, policy)
        self._decision: Decision | None = None

    @property
    def rows(self) -> str | Tensor | None:
        """ "all", the indices of the samples that compute, or None: none."""
        return "all" if self._decision is None else self._decision.rows

    def decide(self, signal: Tensor | None = None) -> None:
        """Before the first stage that may be skipped."""
        args = self._request, self._policy, self._kept, self._part, self.batch, signal
        self._decision = decide(*args)

    def keep(self, hidden: Tensor) -> Tensor:
        """The feature at the join, of the samples that computed it: that of all."""
        assert self._decision is not None
        step, history, rows = self._request.step, self._kept.history, self.rows
        whole = hidden
        if not self._kept.storing:
            return whole
        if not isinstance(rows, str):
            (whole,) = history.forecast(step, self._policy.method)
        if isinstance(rows, Tensor):
            whole = whole.index_copy(0, rows, hidden)
            history.put_rows(step, rows, self._decision.which, (hidden,))
        elif rows is not None:
            self._kept.claim(self._request, (hidden,))
            history.put(step, (hidden,))
        self._decision.remember()
        return whole


_call: ContextVar[Depths | None] = ContextVar("fastdiff_depths", default=None)


def _unread(request: Request, policy: Policy) -> bool:
    """This step is full and so is the next: nobody will read what it keeps."""
    if not isinstance(policy, DeepCache | Forecast | MagnitudeRatio) or policy.order:
        return False
    step, steps = request.step, request.steps
    last = steps is not None and step + 1 >= steps
    if request.static:  # memory is not given back
        return False
    return policy.full(step, steps) and (last or policy.full(step + 1, steps))


def _drive(
    network: nn.Module,
    view: UNetView,
    policy: Policy,
    part: Part,
    trim: Callable[[_Args, _Kwargs], tuple[_Args, _Kwargs]],
    patch: Patch,
) -> None:
    """Around a call of the network: decide, say so in the trace, and let the stages know."""
    plain = forward_of(network)
    measured = isinstance(policy, AccumulatedDistance | FirstBlock)

    def forward(*args: Any, **kwargs: Any) -> Any:
        request = current()
        if request is None or request.slot is None:
            return plain(*args, **kwargs)
        x = view.sample(args, kwargs)
        why, call = why_off(network), None
        if not why and measured and view.whole(args, kwargs):
            why = "residuals are added from outside, which a rule cannot foresee"
        if why or policy.neutral or _unread(request, policy):
            request.state.pop((request.slot, "unet"), None)
            computed = (True,) * x.shape[0]
            how = f"off: {why}" if why else "full"
            request.trace.append(
                Event(request.step, request.slot, part.name, computed, how, part.layout)
            )
        else:
            call = Depths(request, policy, part, x)
            if not measured:
                call.decide()
        if not measured and not policy.neutral:
            warn_of_few(request, policy)
        if call is not None and call.rows is None:
            args, kwargs = trim(args, kwargs)
        token = _call.set(call)
        try:
            return plain(*args, **kwargs)
        finally:
            _call.reset(token)

    patch.set(network, "forward", forward)


def _some(call: Depths, run: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    """``run``, a stage or a part of one, for the samples that compute."""
    if not isinstance(call.rows, Tensor):
        return run(*args, **kwargs)
    args, kwargs = call_of(args, kwargs, call.rows, call.batch)
    with samples(call.rows, call.batch):
        return run(*args, **kwargs)


def _skip(module: nn.Module, patch: Patch, skips: int | None = None) -> None:
    """``module`` runs for the samples that compute; ``skips`` of a stage of the way down."""
    plain = forward_of(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None:
            return plain(*args, **kwargs)
        if call.rows is not None:
            return _some(call, plain, args, kwargs)
        empty = nothing(args, kwargs)
        return empty if skips is None else (empty, (empty,) * skips)

    patch.set(module, "forward", forward)


def _skip_down(stage: Stage, patch: Patch) -> None:
    _skip(stage.module, patch, stage.layers + stage.resamples)


def _shorten(stage: Stage, layers: int, policy: Policy, patch: Patch) -> None:
    """A stage of the way down always runs its first ``layers`` layers; what a rule measures is
    their result, or what they add to their input."""
    plain = forward_of(stage.module)
    head, tail = stage.part(0, layers, False), stage.part(layers, stage.layers, True)
    missing = stage.layers + stage.resamples - layers
    measured = isinstance(policy, AccumulatedDistance | FirstBlock)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None or (call.rows is not None and not measured):
            return plain(*args, **kwargs)
        hidden, skips = head(*args, **kwargs)
        if measured:
            before = args[0] if args else kwargs["hidden_states"]
            call.decide(hidden - before if isinstance(policy, FirstBlock) else hidden)
        if call.rows is None:
            empty = nothing(args, kwargs)
            return empty, skips + (empty,) * missing
        args, kwargs = _with(stage, args, kwargs, hidden)
        hidden, more = _some(call, tail, args, kwargs)
        return hidden, skips + more

    patch.set(stage.module, "forward", forward)


def _with(stage: Stage, args: _Args, kwargs: _Kwargs, hidden: Tensor) -> tuple[_Args, _Kwargs]:
    """A stage's arguments with another hidden state, the first of them."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _enter(stage: Stage, layers: int, patch: Patch) -> None:
    """A stage of the way up keeps what enters its last ``layers`` layers, or starts from it."""
    plain = forward_of(stage.module)
    head = stage.part(0, stage.layers - layers, False)
    tail = stage.part(stage.layers - layers, stage.layers, True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None:
            return plain(*args, **kwargs)
        join = stage.read(args, kwargs)
        hidden = join.hidden
        if call.rows is not None:
            above = Join(join.hidden, join.skips[layers:], join.size)
            args_above, kwargs_above = stage.write(args, kwargs, above)
            hidden = _some(call, head, args_above, kwargs_above)
        hidden = call.keep(hidden)
        args, kwargs = stage.write(args, kwargs, Join(hidden, join.skips[:layers], join.size))
        return tail(*args, **kwargs)

    patch.set(stage.module, "forward", forward)


def _enter_mid(mid: nn.Module, patch: Patch) -> None:
    """The middle's result is kept. Networks add to it in place, so a copy is handed out."""
    plain = forward_of(mid)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is None:
            return plain(*args, **kwargs)
        if call.rows is None:
            return call.keep(nothing(args, kwargs)).clone()
        return call.keep(_some(call, plain, args, kwargs))

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


def _layers(stage: str, first: int, stop: int, skipped: bool) -> list[tuple[str, bool]]:
    """Some layers of a stage as a row of a layout, if there are any."""
    return [(f"{stage}, layers {first}-{stop - 1}", skipped)] if first < stop else []


def _layout(view: UNetView, level: int, layer: int) -> tuple[tuple[str, bool], ...]:
    """The stages and the middle, and which of them lie below the join of a skip."""
    down: list[tuple[str, bool]] = []
    up: list[tuple[str, bool]] = []
    for i, stage in enumerate(view.down):
        if i == level and layer:
            down += _layers(f"down {i}", 0, layer, False)
            down += _layers(f"down {i}", layer, stage.layers, True)
        else:
            down.append((f"down {i}", i >= level))
    for i, stage in reversed(list(enumerate(reversed(view.up)))):
        if i == level:
            join = stage.layers - layer - 1
            up += _layers(f"up {i}", 0, join, True) + _layers(f"up {i}", join, stage.layers, False)
        else:
            up.append((f"up {i}", i > level))
    return (*down, *([("middle", True)] if view.mid is not None else []), *up)


def branch_of(policy: Policy) -> int:
    """The skip at whose join a policy keeps features: a rule sees one layer first."""
    if isinstance(policy, DeepCache):
        return policy.branch
    return 1 if isinstance(policy, AccumulatedDistance | FirstBlock) else 0


def depths(network: nn.Module, view: UNetView, policy: Policy, patch: Patch) -> list[str]:
    """Run ``policy`` on a U-Net; a sentence that says what is skipped.

    Raises:
        ValueError: the network has no such branch.
    """
    branch = branch_of(policy)
    level, layer = _place(view, branch)
    up = list(reversed(view.up))
    here = view.down[level]
    whole = layer == here.layers and not here.resamples
    deepest = level == len(up) - 1 and layer + 1 == up[level].layers
    if layer == 0:
        _skip_down(here, patch)
    elif not whole:
        _shorten(here, layer, policy, patch)
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
    name = f"below skip {branch} (level {level}, layer {layer})"
    part = Part(name, _layout(view, level, layer))

    def trim(args: _Args, kwargs: _Kwargs) -> Any:
        return view.trim(args, kwargs, skips, deepest)

    _drive(network, view, policy, part, trim, patch)
    return [f"{policy}: reuse steps leave out what is {name}"]
