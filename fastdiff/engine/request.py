"""What lives across the steps of one run, and the run that is current in this thread or task.

A :class:`Request` holds everything that a cache keeps from step to step. Modules, classes and
globals hold nothing of a run: the current request stands in a context variable, so that runs in
several threads, or generators that take turns, each see their own, and an exception drops it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.engine.held import Fixed, held_in, permute, rows_of

_current: ContextVar[Request | None] = ContextVar("fastdiff_request", default=None)


class Part(NamedTuple):
    """What a decision is about.

    Attributes:
        name: "blocks 1-27", ...
        layout: name of every block or stage of the network in its order, and whether the decision
            is about it; the others always run. Empty where that is not known.
    """

    name: str
    layout: tuple[tuple[str, bool], ...] = ()


class Event(NamedTuple):
    """What one model call did: ``computed[b]`` of a part of the network, for every sample b."""

    step: int
    slot: Hashable  # (model, call within the step)
    part: str  # "blocks 1-27", "down 1-3", ...
    computed: tuple[bool, ...]  # False: reused or forecast
    how: str  # "full", "reuse", "forecast", ...
    layout: tuple[tuple[str, bool], ...] = ()  # of Part: one object for all calls


def _memory(value: Any, found: dict[int, int]) -> None:
    """Bytes of the tensors in a tree of dicts, lists, tuples and objects, by address."""
    if isinstance(value, Tensor):
        memory = value.untyped_storage()
        found[memory.data_ptr()] = memory.nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            _memory(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            _memory(item, found)
    elif hasattr(value, "__dict__"):
        _memory(vars(value), found)


def _mentions(key: Hashable, number: int) -> bool:
    if isinstance(key, tuple):
        return any(_mentions(part, number) for part in key)
    return key is not True and key == number


class Request:
    """State of one run.

    Attributes:
        steps: model evaluations to come in all, None where nobody knows.
        times: ``[steps]``, model times of the steps, where the loop knows them ahead.
        slot: of the model call in work, None between calls.
        step: the evaluation in work, from 0. The caller counts, never a search for a timestep:
            samplers may visit one level twice.
        state: what policies keep, by a key that begins with ``slot``.
        trace: what every model call did.
        syncs: how often the host waited for a decision.
        limit: bytes that caches may hold at a time, None for any number.
        samples: of the run, None where nobody says: a batch of twice as many rows holds both
            branches of guidance.
        prediction: the noise that the last step used, ``[samples, C, ...]``, all branches of
            guidance in one; None where nobody says.
        static: shapes are the same in every call, caches keep their memory, and nothing is kept
            that depends on an input's identity: a call depends on its step alone.
        peak_bytes: the most that :attr:`state` held after a model call.
        rows: which row of which op ran how often, ``{("attention", "native"): 24}``.
        owner: whose run it is, None for one that the user opened.
        marks: of each model, by id: what its weights were when caches last looked.
        notes: sentences about the run as a whole.
        off: why caches are off in the calls that come, "" where they are on.
    """

    def __init__(
        self,
        steps: int | None = None,
        calls_per_step: int | None = None,
        owner: object | None = None,
    ):
        for name, value in (("steps", steps), ("calls_per_step", calls_per_step)):
            if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
                raise ValueError(f"request: {name} is {value!r}, need an integer of at least 1")
        self.steps, self._calls_per_step = steps, calls_per_step
        self.step = 0
        self.times: Tensor | None = None
        self.slot: Hashable = None
        self.state: dict[Hashable, Any] = {}
        self.trace: list[Event] = []
        self.syncs = 0
        self.rows: Counter[tuple[str, str]] = Counter()
        self.owner = owner
        self.limit: int | None = None
        self.peak_bytes = 0
        self.samples: int | None = None
        self.prediction: Tensor | None = None
        self.static = False
        self.marks: dict[int, Hashable] = {}
        self.notes: list[str] = []
        self.off = ""
        self._calls: dict[int, int] = {}
        self._claims: dict[Hashable, int] = {}

    def advance(self) -> None:
        """The next step begins."""
        self.step += 1
        self._calls.clear()

    def at(self, step: int) -> None:
        """The calls that come are those of ``step``: where a loop visits levels as it likes."""
        self.step = step
        self._calls.clear()

    def permute(self, index: Tensor, samples: int) -> None:
        """Sample ``b`` of the run becomes what sample ``index[b]`` was, in all that is kept; what
        cannot change places is dropped and will be computed anew.

        Args:
            index: int64 ``[samples]``, on the device.
        """
        done: dict[int, int] = {}
        for key in list(self.state):
            try:
                self.state[key] = permute(self.state[key], index, samples, done)
            except Fixed:
                self._drop(key)
        self.syncs += sum(done.values())
        if self.prediction is not None:
            rows = rows_of(index, samples, self.prediction.shape[0])
            self.prediction = self.prediction[rows]

    def mark_dirty(self) -> None:
        """The state of all samples has been replaced: what is kept does not count any more."""
        for key in list(self.state):
            self._drop(key)
        self.prediction = None

    def _drop(self, key: Hashable) -> None:
        found = list(held_in(self.state[key]))
        for held in found:  # of programs, whose memory stays
            held.forget()
        if not (isinstance(key, tuple) and key[0] == "programs"):
            del self.state[key]
            self._claims.pop(key, None)

    @contextmanager
    def without(self, reason: str) -> Iterator[None]:
        """Inside the block caches are off: its calls have nothing to do with those around."""
        outer, self.off = self.off, reason
        try:
            yield
        finally:
            self.off = outer

    def count(self, model: object, number: int) -> None:
        """The next call of ``model`` is the one with ``number`` of its step."""
        self._calls[id(model)] = number

    def claim(self, key: Hashable, size: int) -> None:
        """A cache says how many bytes it will hold under ``key`` of :attr:`state`, before it holds
        any: in the first model call of a run, when it knows the shapes.

        Raises:
            ValueError: with what is claimed already it is more than :attr:`limit`.
        """
        total = sum(self._claims.values()) - self._claims.get(key, 0) + size
        if self.limit is not None and total > self.limit:
            raise ValueError(
                f"accelerate: cache_bytes is {self.limit}, but the caches of this run hold {total} "
                "bytes; need a larger limit, a smaller batch or another policy"
            )
        self._claims[key] = size

    def allows(self, key: Hashable, size: int) -> bool:
        """As :meth:`claim`, for what can as well be left out: False where it does not fit."""
        try:
            self.claim(key, size)
        except ValueError:
            return False
        return True

    def forget(self, model: object) -> None:
        """Drop what is kept of ``model``: its caches begin anew."""
        for key in [key for key in self.state if _mentions(key, id(model))]:
            del self.state[key]
            self._claims.pop(key, None)

    def bytes(self) -> int:
        """What :attr:`state` holds now, every tensor's memory counted once."""
        found: dict[int, int] = {}
        _memory(self.state, found)
        return sum(found.values())

    @contextmanager
    def call(self, model: object) -> Iterator[tuple[int, int]]:
        """Around one call of ``model``; gives its slot: guidance branches that are called one by
        one within a step each have their own."""
        number = self._calls.get(id(model), 0)
        self._calls[id(model)] = number + 1
        outer, slot = self.slot, (id(model), number)
        self.slot = slot
        try:
            yield slot
        except BaseException:
            self._calls[id(model)] = number  # it did not take place
            raise
        finally:
            self.slot = outer
        self.peak_bytes = max(self.peak_bytes, self.bytes())
        if self._calls_per_step is not None and number + 1 == self._calls_per_step:
            self.advance()

    @contextmanager
    def active(self) -> Iterator[Request]:
        """Inside the block this is the run that model calls belong to."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)


def current() -> Request | None:
    """The request that calls in this context belong to."""
    return _current.get()
