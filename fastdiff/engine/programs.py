"""The calls of a network over a run as a few programs on one state: captured, or run eagerly.

A static schedule has few kinds of steps: those that compute and keep, and those that reuse or
forecast from values that are so and so old. Each kind is one :class:`Program` for the runner of
:mod:`fastdiff.engine.graphs`, a CUDA graph on a GPU; all of them share the buffers of the inputs
and of what caches keep. Python decides by the step's number alone which one is replayed: the host
never waits, and a graph is captured once for each kind and shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.cache import (
    AccumulatedDistance,
    Broadcast,
    EncoderPropagation,
    FirstBlock,
    GuidanceReuse,
)
from fastdiff.cache.broadcast import KINDS
from fastdiff.engine.capture_check import Report, check
from fastdiff.engine.graphs import Pool, Runner, runner
from fastdiff.engine.history import History
from fastdiff.engine.request import Event, Request, current
from fastdiff.tokens.region import RegionAdaptive

_MOST = 64  # steps after which a cache that has not filled its memory is taken to need no more

Skeleton = list[tuple[list[int], list[list[int]]]]  # order and nodes of every history


def _histories(value: Any) -> Iterator[History]:
    """Every history in a tree of dicts, lists, tuples and objects, in a fixed order."""
    if isinstance(value, History):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _histories(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _histories(item)
    elif hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module):
        yield from _histories(vars(value))


def _decisions(policies: Sequence[Any], step: int, steps: int | None) -> Hashable:
    """What static policies say of a step."""
    found: list[Hashable] = []
    for policy in policies:
        if isinstance(policy, Broadcast):
            found += [policy.computes(kind, step, steps) for kind in KINDS]
            continue
        found.append(policy.full(step, steps))
        if isinstance(policy, GuidanceReuse) and not found[-1]:
            found.append(policy.weights(step, steps))
    return tuple(found)


class Program:
    """One kind of step: ``step(inputs, kept)``, with what caches keep as buffers.

    Attributes:
        at: the step of the next run.
        before: order and nodes of the histories from which it starts.
        ran: the inner request of the last run in Python; None after a replay of a graph.
    """

    def __init__(self, slot: Slot, number: int, at: int, steps: int | None, before: Skeleton):
        self._slot, self._number, self._steps = slot, number, steps
        self.at, self.before = at, before
        self.ran: Request | None = None
        self.runner: Runner | None = None
        self.events: list[Event] = []
        self.moved: list[bool] = []

    def step(self, inputs: Any, kept: Any) -> Any:
        """Run the network on ``inputs`` (leaves of its arguments) and the buffers ``kept``."""
        slot = self._slot
        for history, buffers, (order, nodes) in zip(slot.histories, kept, self.before, strict=True):
            history.buffers = [tuple(buffer) for buffer in buffers]
            history.order, history.nodes = list(order), [list(n) for n in nodes]
        self.ran = slot.request(self._number, self.at, self._steps)
        args, kwargs = slot.arguments(inputs)
        with self.ran.active():
            return slot.network(*args, **kwargs)


class Slot:
    """The calls with one number within a step and one shape of arguments.

    Args:
        network: accelerated.
        leaves: of the arguments; tensors become buffers, anything else is a constant.
        spec: their structure.
        samples: of the run.
    """

    def __init__(
        self,
        network: nn.Module,
        leaves: Sequence[Any],
        spec: pytree.TreeSpec,
        samples: int | None,
    ):
        self.network, self._spec, self._samples = network, spec, samples
        self._constants = [None if isinstance(v, Tensor) else v for v in leaves]
        self._places = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
        self.inputs = [leaves[i].detach().clone() for i in self._places]
        self.state: dict[Hashable, Any] = {}
        self.histories: list[History] = []
        self.programs: dict[Hashable, Program] = {}

    def arguments(self, inputs: Sequence[Tensor]) -> Any:
        """``(args, kwargs)`` of a call with these tensors."""
        leaves = list(self._constants)
        for i, value in zip(self._places, inputs, strict=True):
            leaves[i] = value
        return pytree.tree_unflatten(leaves, self._spec)

    def request(self, number: int, step: int, steps: int | None) -> Request:
        """The request under which one call runs."""
        inner = Request(steps)
        inner.static, inner.step, inner.state = True, step, self.state
        inner.samples = self._samples
        inner.count(self.network, number)
        return inner

    def prepare(self, number: int, steps: int | None) -> None:
        """Run steps until caches have their memory, then forget what they hold."""
        step, most = 0, min(steps or _MOST, _MOST)
        args, kwargs = self.arguments(self.inputs)
        while step < most and (not step or any(len(h.buffers) < h.length for h in self.histories)):
            inner = self.request(number, step, steps)
            with torch.no_grad(), inner.active():
                self.network(*args, **kwargs)
            self.histories = list(_histories(self.state))
            step += 1
        for history in self.histories:
            while history.buffers and len(history.buffers) < history.length:
                history.buffers.append(tuple(torch.zeros_like(v) for v in history.buffers[0]))
        self.forget()

    @property
    def size(self) -> int:
        """Bytes of what caches keep."""
        tensors = (t for h in self.histories for buffer in h.buffers for t in buffer)
        return sum(t.numel() * t.element_size() for t in tensors)

    def forget(self) -> None:
        """A new run begins."""
        for history in self.histories:
            history.order, history.nodes = [], []

    def skeleton(self) -> Skeleton:
        return [(list(h.order), [list(n) for n in h.nodes]) for h in self.histories]

    def kept(self) -> list[list[list[Tensor]]]:
        return [[list(buffer) for buffer in h.buffers] for h in self.histories]


class Programs(nn.Module):
    """A network whose calls within a run are replays of a few programs.

    Takes the place of the network in a sampling loop, ``fastdiff.sample(programs, ...)``. Runs come
    one after another, as they share buffers; an output is valid until the next call. Weights may
    change in place; after any other change of the network make new programs.

    Args:
        network: accelerated, with ``policies`` that know their steps before the run.
        policies: those.
        make: ``make(step, inputs, pool=, share=)`` gives a runner.

    Raises:
        ValueError: a policy decides from features, or decodes several steps at once.
    """

    def __init__(
        self, network: nn.Module, policies: Sequence[Any], make: Callable[..., Runner] = runner
    ):
        super().__init__()
        for policy in policies:
            if isinstance(policy, FirstBlock | AccumulatedDistance) and not policy.neutral:
                raise ValueError(
                    f"Programs: cache is {policy!r}, which decides from features and waits for "
                    "them; need a schedule, such as fastdiff.calibrate.frozen makes of it"
                )
            if isinstance(policy, RegionAdaptive) and not policy.neutral:
                raise ValueError(
                    f"Programs: cache is {policy!r}, whose choice of tokens is not a buffer of a "
                    "program; need a run without programs, or another policy"
                )
            if isinstance(policy, EncoderPropagation) and policy.parallel > 1:
                raise ValueError(
                    f"Programs: cache is {policy!r}, which decodes several steps at once; need "
                    "parallel 1"
                )
        self.network, self._policies, self._make = network, list(policies), make
        self._slots: dict[Hashable, Slot] = {}
        self._pool = Pool()
        self._last: weakref.ref[Request] | None = None
        self._over: weakref.WeakSet[Request] = weakref.WeakSet()

    def __getattr__(self, name: str) -> Any:
        """The network's own (``num_classes``, ``prediction``, ``schedule``)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    @property
    def kinds(self) -> int:
        """How many programs there are."""
        return sum(len(slot.programs) for slot in self._slots.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives.

        Raises:
            RuntimeError: another run has begun since the current one did.
            ValueError: the caches would hold more than the run's limit, or one has to wait.
        """
        request = current()
        if request is None:
            return self.network(*args, **kwargs)
        self._begin(request)
        with request.call(self.network) as place:
            number: int = place[1]
            slot = self._slot(request, number, args, kwargs)
            request.claim(("programs", number), slot.size)
            request.state["programs", number] = slot.histories  # counted, and let go, with it
            program = self._program(slot, number, request)
            for buffer, value in zip(slot.inputs, _tensors((args, kwargs)), strict=True):
                buffer.copy_(value)
            program.at, program.before, program.ran = request.step, slot.skeleton(), None
            assert program.runner is not None
            out = program.runner.replay()
            if program.ran is None:  # a graph: Python's part of the state moves on alone
                for history, moves in zip(slot.histories, program.moved, strict=True):
                    if moves:
                        history.move_on(request.step, history.buffers[0][0].shape[0])
            request.trace += [
                e._replace(step=request.step, slot=request.slot) for e in program.events
            ]
            return out

    def _begin(self, request: Request) -> None:
        last = self._last() if self._last is not None else None
        if last is request:
            return
        if request in self._over:
            raise RuntimeError(
                "Programs: another run has begun since this one did, and they share memory; need "
                "one run after another, or programs for each"
            )
        if last is not None:
            self._over.add(last)
        self._last = weakref.ref(request)
        for slot in self._slots.values():
            slot.forget()

    def _slot(self, request: Request, number: int, args: Any, kwargs: Any) -> Slot:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        look = [(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else repr(v) for v in leaves]
        key = (number, str(spec), tuple(look), request.samples)
        if key not in self._slots:
            compares = (p for p in self._policies if isinstance(p, GuidanceReuse) and p.compare)
            if request.samples is None and any(not p.neutral for p in compares):
                raise ValueError(
                    "Programs: GuidanceReuse compares the halves of a batch and waits for that, as "
                    "the run does not say what a batch holds; need GuidanceReuse(compare=False)"
                )
            slot = Slot(self.network, leaves, spec, request.samples)
            slot.prepare(number, request.steps)
            self._slots[key] = slot
        return self._slots[key]

    def _program(self, slot: Slot, number: int, request: Request) -> Program:
        """That of the current step's kind, made where it is new."""
        step, before = request.step, slot.skeleton()
        ages = tuple(
            (tuple(order), tuple(tuple(step - s for s in n) for n in nodes))
            for order, nodes in before
        )
        key = (_decisions(self._policies, step, request.steps), ages)
        if key not in slot.programs:
            program = Program(slot, number, step, request.steps, before)
            inputs = {"inputs": slot.inputs, "kept": slot.kept()}
            program.runner = self._make(program.step, inputs, pool=self._pool, share=True)
            assert program.ran is not None
            program.events = program.ran.trace
            after = slot.skeleton()
            program.moved = [a != b for a, b in zip(before, after, strict=True)]
            for history, (order, nodes) in zip(slot.histories, before, strict=True):
                history.order, history.nodes = order, nodes
            slot.programs[key] = program
        return slot.programs[key]

    def check(self, steps: int = 3) -> list[Report]:
        """:func:`fastdiff.engine.check` of every program that there is; the state stays."""
        reports = []
        for slot in self._slots.values():
            was, kept = slot.skeleton(), [h.buffers for h in slot.histories]
            for program in slot.programs.values():
                inputs = {"inputs": slot.inputs, "kept": slot.kept()}
                reports.append(check(program.step, inputs, steps))
            for history, buffers, (order, nodes) in zip(slot.histories, kept, was, strict=True):
                history.buffers, history.order, history.nodes = buffers, order, nodes
        return reports


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
