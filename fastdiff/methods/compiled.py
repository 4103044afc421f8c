"""A sampling program over static buffers, in the way that measures fastest: its whole loop captured
as one graph, or one graph for each kind of step of the network, or neither.

Which one wins depends on the program: a loop in one graph has no launches from Python at all but
holds the memory of all its steps and takes as long to capture as to run some times; a graph for
each kind of step leaves gradients, selections and pastes between the calls to Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff import samplers
from fastdiff.accelerate import acceleration_of, network_of, programs
from fastdiff.engine.capture_check import check
from fastdiff.engine.graphs import Runner, runner

WAYS = ("loop", "steps", "eager")


class Measured(NamedTuple):
    """Seconds that one way took: ``prepare`` once, ``run`` for each run (the median)."""

    prepare: float
    run: float


class Compiled:
    """A program that is called with new values for its tensors; see :func:`compiled`.

    Attributes:
        way: "loop", "steps" or "eager".
        measured: of every way that was tried.
        refused: a sentence for every way that was not.
        inputs: the tensors, at their addresses: what a call leaves out stays.
    """

    def __init__(
        self,
        way: str,
        call: Callable[[], Any],
        inputs: dict[str, Tensor],
        measured: dict[str, Measured],
        refused: dict[str, str],
    ):
        self.way, self._call, self.inputs = way, call, inputs
        self.measured, self.refused = measured, refused

    def __call__(self, **inputs: Tensor) -> Any:
        """Run the program; what it gives is valid until the next call.

        Raises:
            ValueError: an input has another name, shape, dtype or device than the program was made
                for; nothing is written then.
        """
        for name, value in inputs.items():
            own = self.inputs.get(name)
            if own is None:
                known = ", ".join(self.inputs)
                raise ValueError(f"compiled: no input is called {name!r}, need one of {known}")
            if (
                not isinstance(value, Tensor)
                or value.shape != own.shape
                or value.dtype != own.dtype
            ):
                found = (
                    f"{value.dtype} {list(value.shape)}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise ValueError(
                    f"compiled: {name} is {found}, need {own.dtype} {list(own.shape)}, which the "
                    "program was made for"
                )
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        return self._call()

    def __str__(self) -> str:
        lines = [f"runs as {self.way}"]
        for way, took in self.measured.items():
            lines.append(f"{way}: {took.run:.4g} s a run, {took.prepare:.4g} s to prepare")
        return "\n".join([*lines, *(f"not {way}: {why}" for way, why in self.refused.items())])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiled(
    program: Callable[..., Any],
    model: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    *,
    sampler: str | samplers.Sampler,
    steps: int = 50,
    clip: float | None = None,
    prediction: str | None = None,
    schedule: samplers.Schedule | None = None,
    ways: Sequence[str] = WAYS,
    runs: int = 100,
    rounds: int = 3,
    **settings: Any,
) -> Compiled:
    """Make ``program(model, **inputs, **settings)`` ready to run often.

    Args:
        program: of :mod:`fastdiff.methods`, :func:`fastdiff.sample`, or a function of your own that
            takes the arguments of a sampling loop and gives tensors (or trees of them).
        model: as for :func:`fastdiff.sample`; accelerated, with a cache that has a schedule, it can
            also run as "steps".
        inputs: tensors by the names of their arguments (``x``, and ``classes``, ``seed``, ...), all
            on one device; copied.
        sampler, steps, clip, prediction, schedule: of the run; programs have samplers of their own
            where none is given, so it has to be said here.
        ways: those that may be chosen, of "loop" (captured as one CUDA graph on a GPU; elsewhere
            run over the same static buffers), "steps" (``fastdiff.programs`` in the model's place)
            and "eager".
        runs: how many are to come: what preparing takes is shared by them.
        rounds: timed runs of each way, interleaved; the median counts.
        settings: other arguments of ``program``. What looks at values on the host has to be off
            (``check=False`` of FK steering), or "loop" is refused.

    Returns:
        :class:`Compiled`.

    Raises:
        ValueError: an argument does not fit, or every way is refused.
    """
    bad = [w for w in ways if w not in WAYS]
    if bad or not ways:
        raise ValueError(f"compiled: ways is {ways!r}, need some of {', '.join(WAYS)}")
    for name, number in (("runs", runs), ("rounds", rounds)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"compiled: {name} is {number!r}, need an integer of at least 1")
    if not inputs or not all(isinstance(t, Tensor) for t in inputs.values()):
        raise ValueError("compiled: inputs is empty or has what is no tensor, need tensors by name")
    own = {name: t.detach().clone() for name, t in inputs.items()}
    devices = {t.device for t in own.values()}
    if len(devices) > 1:
        raise ValueError(f"compiled: inputs are on {devices}, need one device")
    device = devices.pop()
    how = dict(sampler=sampler, steps=steps, clip=clip, prediction=prediction, schedule=schedule)
    made = samplers.ready(model, device=device, **how)  # type: ignore[arg-type]
    how["sampler"] = made

    def loop(**tensors: Tensor) -> Any:
        return program(model, **tensors, **how, **settings)

    loop(**own)  # what a network or program makes at its first call is there from here on
    calls: dict[str, Callable[[], Any]] = {}
    refused: dict[str, str] = {}
    prepared: dict[str, float] = {}
    for way in WAYS:
        if way not in ways:
            continue
        _wait(device)
        start = time.perf_counter()
        try:
            if way == "loop":
                calls[way] = _loop(loop, own)
            elif way == "steps":
                calls[way] = _steps(program, model, own, how, settings)
            else:
                calls[way] = lambda: loop(**own)
            calls[way]()  # warm: what is made at the first run is part of preparing
        except _Refused as error:
            calls.pop(way, None)
            refused[way] = str(error)
        _wait(device)
        prepared[way] = time.perf_counter() - start
    if not calls:
        why = "; ".join(f"{way}: {reason}" for way, reason in refused.items())
        raise ValueError(f"compiled: every way is refused: {why}")
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(rounds if len(calls) > 1 else 1):
        for way, call in calls.items():
            start = time.perf_counter()
            call()
            _wait(device)
            times[way].append(time.perf_counter() - start)
    measured = {way: Measured(prepared[way], median(took)) for way, took in times.items()}
    way = min(measured, key=lambda w: measured[w].run + measured[w].prepare / runs)
    return Compiled(way, calls[way], own, measured, refused)


class _Refused(Exception):
    """A way cannot run this program; the message is a sentence."""


def _loop(loop: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """The whole loop as one runner on ``inputs`` themselves."""
    if next(iter(inputs.values())).is_cuda:
        try:
            made: Runner = runner(loop, inputs, share=True)
        except RuntimeError as error:
            raise _Refused(str(error)) from error
        return made.replay
    report = check(loop, inputs, 2)
    if not report.ok:
        raise _Refused(report.violations[0].sentence)
    return runner(loop, inputs, share=True).replay


def _steps(
    program: Callable[..., Any],
    model: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    how: dict[str, Any],
    settings: dict[str, Any],
) -> Callable[[], Any]:
    """The network's calls as a few programs."""
    if not isinstance(model, nn.Module) or acceleration_of(network_of(model)) is None:
        raise _Refused("the model is not accelerated, and programs are of an accelerated network")
    try:
        network = programs(model)
    except ValueError as error:
        raise _Refused(str(error)) from error

    def call() -> Any:
        return program(network, **inputs, **how, **settings)

    try:
        call()
    except RuntimeError as error:  # a program has no gradient
        raise _Refused(str(error).splitlines()[0]) from error
    return call
