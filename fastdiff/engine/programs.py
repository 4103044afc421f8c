"""The calls of a network over a run as a few programs on one state: captured, or run eagerly.

A static schedule has few kinds of steps: those that compute and keep, and those that reuse or
forecast from values that are so and so old. Each kind is one :class:`Program` for the runner of
:mod:`fastdiff.engine.graphs`, a CUDA graph on a GPU; all of them share the buffers of the inputs
and of what caches keep. Python decides by the step's number alone which one is replayed: the host
never waits, and a graph is captured once for each kind and shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff import adapters
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
from fastdiff.engine.held import Held, held_in
from fastdiff.engine.request import Event, Request, current
from fastdiff.engine.token_state import PART, Choice, open_region
from fastdiff.engine.weights import Watch
from fastdiff.tokens.region import RegionAdaptive

_LAYOUTS = 4  # of adapters, whose programs are kept
_MOST = 64  # steps after which a cache that has not filled its memory is taken to need no more


def _decisions(policies: Sequence[Any], step: int, steps: int | None) -> Hashable:
    """What static policies say of a step."""
    found: list[Hashable] = []
    for policy in policies:
        if isinstance(policy, Broadcast):
            found += [policy.computes(kind, step, steps) for kind in KINDS]
            continue
        found.append(policy.full(step, steps))
        if isinstance(policy, RegionAdaptive):  # dense steps keep what the next one needs
            found += [policy.full(step + 1, steps), policy.share(step, steps)]
        if isinstance(policy, GuidanceReuse) and not found[-1]:
            found.append(policy.weights(step, steps))
    return tuple(found)


class Program:
    """One kind of step: ``step(inputs, kept)``, with what caches keep as buffers.

    Attributes:
        at: the step of the next run.
        before, after: the Python values of what is held, from which it starts and at which it ends.
        ran: the inner request of the last run in Python; None after a replay of a graph.
    """

    def __init__(self, slot: Slot, number: int, at: int, steps: int | None, before: list[Hashable]):
        self._slot, self._number, self._steps = slot, number, steps
        self.at, self.before = at, before
        self.after: list[Hashable] = []
        self.ran: Request | None = None
        self.runner: Runner | None = None
        self.events: list[Event] = []

    def step(self, inputs: Any, kept: Any) -> Any:
        """Run the network on ``inputs`` (leaves of its arguments) and the buffers ``kept``."""
        slot = self._slot
        slot.become(kept, self.before, self.at)
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
        choice: of tokens, which the calls of a step share; None: no policy chooses any.
    """

    def __init__(
        self,
        network: nn.Module,
        leaves: Sequence[Any],
        spec: pytree.TreeSpec,
        samples: int | None,
        choice: Choice | None,
    ):
        self.network, self._spec, self._samples = network, spec, samples
        self._constants = [None if isinstance(v, Tensor) else v for v in leaves]
        self._places = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
        self.inputs = [leaves[i].detach().clone() for i in self._places]
        self.choice = choice
        self.state: dict[Hashable, Any] = {}
        if choice is not None:
            self.state[id(network), PART] = choice
        self.held: list[Held] = []
        self.programs: dict[tuple[Hashable, ...], Program] = {}

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
        inner.prediction = None if self.choice is None else self.choice.seen
        inner.count(self.network, number)
        return inner

    def prepare(self, number: int, steps: int | None) -> None:
        """Run steps until caches have their memory, then forget what they hold."""
        step, most = 0, min(steps or _MOST, _MOST)
        args, kwargs = self.arguments(self.inputs)
        while step < most and (not step or not all(h.complete for h in self.held)):
            inner = self.request(number, step, steps)
            with torch.no_grad(), inner.active():
                self.network(*args, **kwargs)
            self.held = list(held_in(self.state))
            step += 1
        for held in self.held:
            held.fill()
            held.forget()

    @property
    def size(self) -> int:
        """Bytes of what caches keep."""
        return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(self.kept()))

    @property
    def versions(self) -> list[int]:
        return [h.version for h in self.held]

    def forget(self) -> None:
        """What the calls before this one have kept is of no use. (A choice is the run's own.)"""
        for held in self.held:
            if held is not self.choice:
                held.forget()

    def look(self, step: int) -> list[Hashable]:
        return [h.look(step) for h in self.held]

    def kept(self) -> list[Any]:
        return [h.tensors() for h in self.held]

    def become(self, kept: Sequence[Any], look: Sequence[Any], step: int) -> None:
        for held, tensors, values in zip(self.held, kept, look, strict=True):
            held.become(tensors, values, step)


class Programs(nn.Module):
    """A network whose calls within a run are replays of a few programs.

    Takes the place of the network in a sampling loop, ``fastdiff.sample(programs, ...)``. Runs come
    one after another, as they share buffers; an output is valid until the next call. Weights and
    the values of adapters may change in place. Where an adapter is attached, detached, merged or
    unmerged, programs are made for the network as it is then, and those of before are kept for when
    it is so again. After any other change of the network make new programs.

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
            if isinstance(policy, EncoderPropagation) and policy.parallel > 1:
                raise ValueError(
                    f"Programs: cache is {policy!r}, which decodes several steps at once; need "
                    "parallel 1"
                )
        self.network, self._policies, self._make = network, list(policies), make
        self._slots: dict[Hashable, Slot] = {}
        self._choices: dict[Hashable, Choice] = {}
        self._shapes: dict[int, Hashable] = {}  # of the run's last call with each number
        self._pool, self._watch = Pool(), Watch(network)
        self._layout: Hashable = None  # of adapters, at the last call
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
        self._look(request)
        with request.call(self.network) as place:
            number: int = place[1]
            key, slot = self._slot(request, number, args, kwargs)
            if self._shapes.get(number, key) != key:  # as guidance begins or ends within the run
                slot.forget()
            self._shapes[number] = key
            try:
                return self._run(slot, number, request, _tensors((args, kwargs)))
            except BaseException:
                del self._slots[key]  # some of what it holds is of this step, some of the last
                raise

    def _run(self, slot: Slot, number: int, request: Request, inputs: list[Tensor]) -> Any:
        request.claim(("programs", number), slot.size)
        request.state["programs", number] = slot.held  # counted, and let go, with it
        for buffer, value in zip(slot.inputs, inputs, strict=True):
            buffer.copy_(value)
        choice = slot.choice
        if choice is not None:
            choice.seen = request.prediction
            choice.fill()
            request.syncs += choice.force(open_region())
            request.state[id(self.network), PART] = choice
        program = self._program(slot, number, request)
        program.at, program.before = request.step, slot.look(request.step)
        program.ran = None
        assert program.runner is not None
        out = program.runner.replay()
        if program.ran is None:  # a graph: Python's part of the state moves on alone
            slot.become(slot.kept(), program.after, request.step)
        request.trace += [e._replace(step=request.step, slot=request.slot) for e in program.events]
        return out

    def _look(self, request: Request) -> None:
        """Before a call: have weights or adapters changed since the last one?"""
        if self._policies and self._watch.look(request):
            self._forget()
        layout = adapters.layout(self.network)
        if self._layout is not None and layout != self._layout:
            request.notes.append(
                f"adapters changed before step {request.step}: other programs run from there"
            )
        self._layout = layout

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
        self._shapes = {}
        self._forget()

    def _forget(self) -> None:
        for slot in self._slots.values():
            slot.forget()
        for choice in self._choices.values():
            choice.forget()

    def _slot(self, request: Request, number: int, args: Any, kwargs: Any) -> tuple[Hashable, Slot]:
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
            choice, was = self._choice(request, leaves), None
            if choice is not None:  # calls before this one of its step have chosen
                was = pytree.tree_map(torch.clone, choice.tensors()), choice.look(request.step)
            slot = Slot(self.network, leaves, spec, request.samples, choice)
            slot.prepare(number, request.steps)
            if choice is not None and was is not None:
                for name, value in was[0].items():
                    choice.memory[name][: value.numel()] = value
                choice.become({}, was[1], request.step)
            self._slots[key] = slot
        return key, self._slots[key]

    def _choice(self, request: Request, leaves: Sequence[Any]) -> Choice | None:
        """That of calls on states of one shape, whatever their rows and conditions are."""
        if all(p.neutral for p in self._policies if isinstance(p, RegionAdaptive)):
            return None
        x = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        key = x.shape[1:], x.dtype, x.device, request.samples
        return self._choices.setdefault(key, Choice())

    def _program(self, slot: Slot, number: int, request: Request) -> Program:
        """That of the current step's kind, made where it is new."""
        step, before = request.step, slot.look(request.step)
        versions = slot.versions
        decisions = _decisions(self._policies, step, request.steps)
        key = (decisions, tuple(before), tuple(versions), self._layout)
        if key not in slot.programs:
            program = Program(slot, number, step, request.steps, before)
            kept = slot.kept()
            inputs = {"inputs": slot.inputs, "kept": kept}
            program.runner = self._make(program.step, inputs, pool=self._pool, share=True)
            assert program.ran is not None
            program.events, program.after = program.ran.trace, slot.look(step)
            if slot.versions != versions:
                raise RuntimeError("Programs: a step made memory of its own; need it before")
            slot.become(kept, before, step)
            others = dict.fromkeys(k[3] for k in slot.programs if k[3] != key[3])
            layouts = [*others, key[3]][-_LAYOUTS:]
            slot.programs = {  # without those on memory of before
                k: p
                for k, p in [*slot.programs.items(), (key, program)]
                if k[2] == key[2] and k[3] in layouts
            }
        return slot.programs[key]

    def check(self, steps: int = 3) -> list[Report]:
        """:func:`fastdiff.engine.check` of every program that there is; the state stays."""
        reports = []
        for slot in self._slots.values():
            was, kept = slot.look(0), slot.kept()
            for program in slot.programs.values():
                inputs = {"inputs": slot.inputs, "kept": kept}
                reports.append(check(program.step, inputs, steps))
            slot.become(kept, was, 0)
        return reports


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
