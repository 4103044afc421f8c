"""``accelerate``: other people's pipelines and networks, faster, and back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

from fastdiff import adapters, integrations, run_summary
from fastdiff.cache import EncoderPropagation
from fastdiff.dispatch import record
from fastdiff.engine.patch import Patch, forward_of
from fastdiff.engine.prior_noise import inject
from fastdiff.engine.programs import Programs
from fastdiff.engine.quant_forward import QuantForward, QuantScores
from fastdiff.engine.quant_layers import Given, layer_lines, quantize_layers, quantize_scores
from fastdiff.engine.request import Request, current
from fastdiff.engine.view import BlockView
from fastdiff.engine.weights import Watch
from fastdiff.integrations.conditioned import Conditioned
from fastdiff.precision import Precision
from fastdiff.tune import Quality, Report

_NETWORKS = ("unet", "transformer", "transformer_2", "prior")
_SEARCH = {"calibrate", "candidates", "fewer", "progress", "rounds", "run", "steps"}
_KEY = "_fastdiff"  # where an accelerated object keeps its Acceleration


class Acceleration:
    """What ``accelerate`` did to one pipeline or network.

    Attributes:
        patch: the changes, to be undone.
        parts: sentences, one a changed part.
        last: the last run that ended or broke off.
        inject: the policy whose noise is added after every step of the scheduler, or None.
        lonely: calls of a network outside any run, for which caches were off.
        cache_bytes: what the caches of a run may hold at a time, None for any number.
        policies: of its caches.
        precision: the policy of its layers' formats, or None.
        layers, attentions: those in another format, by name.
    """

    def __init__(self, cache_bytes: int | None = None, policies: Sequence[Any] = ()) -> None:
        self.cache_bytes, self.policies = cache_bytes, policies
        self.precision: Precision | None = None
        self.layers: dict[str, QuantForward] = {}
        self.attentions: dict[str, QuantScores] = {}
        self.patch = Patch()
        self.parts: list[str] = []
        self.last: Request | None = None
        self.inject: EncoderPropagation | None = None
        self.lonely = 0

    def formats(self) -> list[QuantForward | QuantScores]:
        """Layers and attentions in another format."""
        return [*self.layers.values(), *self.attentions.values()]


def network_of(model: Any) -> Any:
    """The network within ``programs`` and :class:`~fastdiff.integrations.Conditioned`."""
    while isinstance(model, Programs | Conditioned):
        model = model.network
    return model


def _networks(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, Conditioned):
        return {"": network_of(target)}
    if isinstance(target, nn.Module):
        return {"": target}
    found = {name: getattr(target, name, None) for name in _NETWORKS}
    return {name: m for name, m in found.items() if isinstance(m, nn.Module)}


def _refuse_copy(_: Any) -> Any:
    raise ValueError("deepcopy: this object is accelerated, need fastdiff.restore() before")


def _steps_to_come(pipe: Any) -> int | None:
    """Model evaluations of the run that begins: known once the pipeline has set its timesteps."""
    counted = getattr(pipe, "_num_timesteps", None)  # set by most, without what strength cuts off
    if counted is not None:
        return int(counted)
    scheduler = getattr(pipe, "scheduler", None)
    times = getattr(scheduler, "timesteps", None)
    if times is None:
        return None
    return len(times) - int(getattr(scheduler, "begin_index", None) or 0)


def _samples(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Samples of a call, where the scheduler will not tell: DiT's steps both halves of a guided
    batch."""
    if not any(cls.__name__ == "DiTPipeline" for cls in type(pipe).__mro__):
        return None
    labels = args[0] if args else kwargs.get("class_labels")
    return len(labels) if isinstance(labels, list) and labels else None


def _count_calls(network: nn.Module, pipe: Any, acceleration: Acceleration) -> None:
    plain, weights = forward_of(network), Watch(network)

    def forward(*args: Any, **kwargs: Any) -> Any:
        request = current()
        if request is None:
            acceleration.lonely += 1
            return plain(*args, **kwargs)
        if request.steps is None and request.owner is acceleration:
            request.steps = _steps_to_come(pipe)
        if acceleration.cache_bytes is not None:
            request.limit = acceleration.cache_bytes
        if acceleration.policies and not request.static:
            weights.look(request)
        with request.call(network):
            return plain(*args, **kwargs)

    acceleration.patch.set(network, "forward", forward)


def _count_steps(pipe: Any, acceleration: Acceleration) -> None:
    """The pipeline's scheduler says when a step ends, and how many samples there are; it may be
    another one than last time."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or getattr(scheduler.__dict__.get("step"), "owner", None) is acceleration:
        return
    plain = scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        request = current()
        if request is not None and request.owner is acceleration:
            if acceleration.inject is not None:
                x = kwargs["sample"] if "sample" in kwargs else args[2]
                inject(request, scheduler, x, out, acceleration.inject)
            if request.samples is None:
                result = args[0] if args else kwargs.get("model_output")
                if isinstance(result, Tensor) and result.dim() > 1:
                    request.samples = result.shape[0] or None
            request.prediction = args[0] if args else kwargs.get("model_output")
            request.advance()
        return out

    step.owner = acceleration  # type: ignore[attr-defined]
    acceleration.patch.set(scheduler, "step", step)


def _open_requests(pipe: Any, acceleration: Acceleration) -> None:
    """Every call of the pipeline is one request."""
    plain = type(pipe)

    @wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _count_steps(self, acceleration)
        run = Request(owner=acceleration)
        run.samples = _samples(self, args, kwargs)
        try:
            with run.active(), record() as run.rows:
                return plain.__call__(self, *args, **kwargs)
        finally:
            run.state.clear()
            acceleration.last = run

    names = {"__call__": call, "__module__": plain.__module__, "__doc__": plain.__doc__}
    acceleration.patch.set_class(pipe, type(plain.__name__, (plain,), names))


def _policies(cache: Any) -> list[Any]:
    """``cache`` of a caller as a list: None, one policy or several."""
    if cache is None:
        return []
    return list(cache) if isinstance(cache, list | tuple) else [cache]


def _part(policies: list[Any], precision: Any) -> tuple[list[Any], Any]:
    """Caches, and the one policy of formats, or None."""
    formats = [p for p in policies if isinstance(p, Precision | Given)]
    if precision is not None:
        if not isinstance(precision, Precision | Given):
            raise ValueError(
                f"accelerate: precision is {precision!r}, need a fastdiff.Precision, or what "
                "fastdiff.stored.load gave"
            )
        formats.append(precision)
    if len(formats) > 1:
        raise ValueError(f"accelerate: there are {len(formats)} policies of precision, need one")
    caches = [p for p in policies if not isinstance(p, Precision | Given)]
    return caches, formats[0] if formats else None


def accelerate(
    pipe: Any,
    /,
    *,
    cache: Any = None,
    precision: Precision | Given | None = None,
    exact: bool = True,
    cache_bytes: int | None = None,
    view: BlockView | None = None,
    target: Quality | None = None,
    **search: Any,
) -> Any:
    """Make a diffusers pipeline, or a network on its own, faster.

    Args:
        pipe: a pipeline with a ``unet`` or ``transformer``, or an ``nn.Module``. Changed in
            place; :func:`restore` takes every change back.
        cache: a policy of ``fastdiff.cache``, or a list of policies that skip different things; or
            a :class:`~fastdiff.tune.Report`, for what it chose; None computes everything. Caches
            work within a run: a call of the pipeline, or ``with fastdiff.request():`` around a loop
            of your own.
        precision: a :class:`~fastdiff.precision.Precision`: what linear layers compute in; or what
            :func:`fastdiff.stored.load` read. May also stand in the list ``cache``.
        exact: attention, norms, activations and residuals run on our operations.
        cache_bytes: what the caches of a run may hold at a time. A run that needs more ends with a
            ValueError in its first model call, before the first step.
        view: the blocks of a network that fastdiff does not know, for caches of blocks:
            ``BlockView.of(net.blocks)`` where each is ``block(x, ...) -> x``.
        target: the quality to keep. Policies are then tried, and the fastest that keeps it on
            inputs it was not chosen on is applied. Where none does, or fewer steps are faster
            still, ``cache`` stays None and the report says so.
        search: only with ``target``: ``calibrate``, at least two inputs, each a dict of the
            pipeline's arguments, an int under "generator" being the seed of every run's own
            generator; ``candidates``, policies or lists of them (None:
            :func:`fastdiff.target.candidates`); ``fewer``, numbers of steps to beat; ``rounds`` of
            timing; ``progress``, told each name. For a network on its own also ``run(input,
            steps)``, which gives samples ``[B, ...]``, and ``steps``.

    Returns:
        ``pipe``; with ``target`` the :class:`~fastdiff.tune.Report`.

    Raises:
        ValueError: ``pipe`` is accelerated already, has no network, or is one that ``cache``
            cannot run on; or the search cannot run; nothing is changed then.
    """
    settings: dict[str, Any] = dict(
        exact=exact, cache_bytes=cache_bytes, view=view, precision=precision
    )
    unknown = search.keys() - _SEARCH
    if unknown:
        raise TypeError(f"accelerate: no argument is called {min(unknown)}")
    if target is None:
        if search:
            raise ValueError(f"accelerate: {min(search)} is given without target, need both")
        if isinstance(cache, Report):
            cache = cache.policy()
        return _apply(pipe, cache, **settings)
    if cache is not None:
        raise ValueError("accelerate: cache and target are both given, need one of them")
    if "calibrate" not in search:
        raise ValueError("accelerate: target needs calibrate, a list of at least 2 inputs")
    from fastdiff import target as searching  # it calls accelerate

    report = searching.search(pipe, target, search.pop("calibrate"), **search, **settings)
    _apply(pipe, cache=report.policy(), **settings)
    return report


def _apply(
    target: Any,
    cache: Any,
    exact: bool,
    cache_bytes: int | None,
    view: BlockView | None,
    precision: Any,
) -> Any:
    """What :func:`accelerate` does without a quality to keep."""
    if _KEY in getattr(target, "__dict__", {}):
        raise ValueError("accelerate: target is accelerated already, need restore(target) before")
    networks = _networks(target)
    if not networks:
        raise ValueError(
            f"accelerate: target is {type(target).__name__}, need an nn.Module or a pipeline "
            f"with one of {', '.join(_NETWORKS)}"
        )
    for name, network in networks.items():
        if _KEY in network.__dict__:
            raise ValueError(f"accelerate: {name} is accelerated already, need restore before")
    if view is not None and len(networks) > 1:
        raise ValueError(
            f"accelerate: view is given, but target has {len(networks)} networks, "
            f"{', '.join(networks)}; need one of them as the target"
        )
    if cache_bytes is not None and (not isinstance(cache_bytes, int) or cache_bytes < 0):
        raise ValueError(f"accelerate: cache_bytes is {cache_bytes!r}, need an integer of bytes")
    policies, formats = _part(_policies(cache), precision)
    acceleration = Acceleration(cache_bytes, policies)
    acceleration.precision = formats.policy if isinstance(formats, Given) else formats
    for policy in policies:
        if isinstance(policy, EncoderPropagation) and policy.inject:
            if isinstance(target, nn.Module):
                raise ValueError(
                    f"accelerate: cache has inject {policy.inject}, which needs a pipeline; target "
                    f"is {type(target).__name__}"
                )
            acceleration.inject = policy
    patch = acceleration.patch
    try:
        for name, network in networks.items():
            parts = integrations.exact(network, patch) if exact else []
            if acceleration.precision is not None:
                asking = dict(integrations.asking(network))
                words, found = quantize_layers(network, formats, patch, asking)
                more, scores = quantize_scores(asking, acceleration.precision, patch)
                parts += words + more
                begin = f"{name}." if name else ""
                acceleration.layers |= {begin + k: v for k, v in found.items()}
                acceleration.attentions |= {begin + k: v for k, v in scores.items()}
            parts += integrations.reuse(network, policies, patch, view)
            acceleration.parts += [f"{name}: {part}" if name else part for part in parts]
            _count_calls(network, target, acceleration)
            patch.set(network, _KEY, acceleration)
            patch.set(network, "__deepcopy__", _refuse_copy)  # it would run the original's parts
        if target not in networks.values():
            if not isinstance(target, nn.Module):
                _open_requests(target, acceleration)
            patch.set(target, _KEY, acceleration)
    except BaseException:
        patch.undo()
        raise
    return target


def acceleration_of(target: Any) -> Acceleration | None:
    """What was done to ``target``, None where nothing was."""
    return getattr(target, "__dict__", {}).get(_KEY)


def _acceleration(who: str, target: Any) -> Acceleration:
    found = acceleration_of(target)
    if found is None:
        raise ValueError(f"{who}: target is {type(target).__name__}, which is not accelerated")
    return found


def programs(network: nn.Module) -> Any:
    """An accelerated network as a few captured programs, for ``fastdiff.sample(programs, ...)``;
    of a :class:`~fastdiff.integrations.Conditioned` one that has them within.

    On a GPU each kind of step is a CUDA graph; elsewhere it runs eagerly under the same rules.

    Raises:
        ValueError: ``network`` is not accelerated, or a policy of its caches cannot be captured.
    """
    own = _acceleration("programs", network)
    policies = list(own.policies)
    if own.precision is not None:
        policies.append(own.precision)  # its steps in floats are a kind of their own
    if isinstance(network, Conditioned):
        return network.over(Programs(network_of(network), policies))
    return Programs(network, policies)


def restore(target: Any) -> Any:
    """Take back what :func:`accelerate` changed; gives ``target``.

    Raises:
        ValueError: it is not accelerated.
        RuntimeError: something else (an offloading hook, say) has replaced what ``accelerate``
            replaced; nothing is taken back then. Remove that first.
    """
    own = _acceleration("restore", target)
    gone = [layer.name for layer in own.layers.values() if layer.released]
    if gone:
        raise RuntimeError(
            f"restore: the float weights of {len(gone)} layers were released, {gone[0]} first; "
            "need the network loaded anew"
        )
    patch = own.patch
    reason = patch.foreign()
    if reason is not None:
        raise RuntimeError(f"restore: {reason}; need that taken back first")
    patch.undo()
    return target


def summary(target: Any, run: Request | None = None) -> str:
    """What :func:`accelerate` changed in ``target``, and what a run did, as text.

    Args:
        target: an accelerated pipeline or network.
        run: what ``with fastdiff.request() as run`` gave; None: the pipeline's last call.

    Raises:
        ValueError: ``target`` is not accelerated.
    """
    acceleration = _acceleration("summary", target)
    run = run or acceleration.last
    lines = [*acceleration.parts, *layer_lines(acceleration.formats())]
    for name, network in _networks(target).items():
        states = [a.state() for a in adapters.attached(network)]
        lines += [f"{name}: {state}" if name else state for state in states]
    if acceleration.lonely:
        lines.append(f"WARNING: {acceleration.lonely} calls outside a run, with caches off")
    if run is None:
        return "\n".join([*lines, "no run yet"])
    return "\n".join([*lines, *run_summary.lines(run)])


@contextmanager
def accelerated(target: Any, **settings: Any) -> Iterator[Any]:
    """:func:`accelerate` for the length of a ``with`` block."""
    accelerate(target, **settings)
    try:
        yield target
    finally:
        restore(target)


@contextmanager
def request(steps: int | None = None, calls_per_step: int | None = 1) -> Iterator[Request]:
    """One run of a loop of your own, in which caches work from step to step.

    Args:
        steps: model evaluations to come, for policies that plan ahead.
        calls_per_step: calls of the network in a step: 2 where guidance calls it twice. None where
            the number varies (guidance in an interval): then ``run.advance()`` ends each step.
    """
    run = Request(steps, calls_per_step)
    try:
        with run.active(), record() as run.rows:
            yield run
    finally:
        run.state.clear()
