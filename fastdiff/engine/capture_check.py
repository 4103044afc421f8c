"""What can be proved, with no GPU, of a step that is to be captured as a CUDA graph.

The step runs on CPU tensors, twice over:

1. as if on ``cuda:0``: its tensors say that they are on a GPU (``x.device``, ``x.is_cuda``), and
   what it creates is marked as on the GPU or on the host, as it asks for. This finds transfers and
   host tensors that only a GPU would show, and whatever waits for a value. All ops run their
   reference row.
2. as it is, with the rows that the CPU takes. Checks of values that only run on the CPU are no
   violation here.

Both watch every call of torch's Python interface and every operation of its dispatcher. Each run is
written down as operations on memory; the runs must not differ, and replaying the first one (which
is what a graph does) on new inputs must give the bits that the step gives.

No fake tensors: values are real, so a step goes on after its first violation, and nothing fake can
stay behind in a cache of the model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.dispatch import use
from fastdiff.engine._buffers import Buffers, Inputs, flatten
from fastdiff.engine._tape import Entry, Made, Tape
from fastdiff.engine._watch import Calls, Hosts, Log, Ops, Step, Violation

NOT_PROVED = (
    "that a kernel or library does not itself wait, allocate or use another stream",
    "that Python state changes nothing in later calls than those that were run",
    "that CUDA accepts the capture, which only a GPU shows",
)


class Report(NamedTuple):
    """What :func:`check` found; ``ops`` is the number of operations of one run on the CPU."""

    violations: tuple[Violation, ...]
    ops: int
    steps: int
    not_proved: tuple[str, ...] = NOT_PROVED

    @property
    def ok(self) -> bool:
        return not self.violations

    def __str__(self) -> str:
        if self.ok:
            return f"capturable as far as can be proved: {self.ops} operations, {self.steps} steps"
        return "\n".join(v.sentence for v in self.violations)


class NotCapturable(RuntimeError):
    """:func:`require` found violations: the sentences, one a line; ``report`` has the details."""

    def __init__(self, report: Report):
        super().__init__(str(report))
        self.report = report


def _generators() -> tuple[Any, ...]:
    """The states of the host's global random generators."""
    numpy_state: Any = np.random.get_state()
    host = bytes(torch.get_rng_state().numpy())
    return random.getstate(), (bytes(numpy_state[1]), numpy_state[2]), host


def _run(
    step: Step, buffers: Buffers, log: Log, earlier: Made, device: torch.device | None
) -> tuple[Tape, list[Tensor | None]] | None:
    """One watched run; None where the step raised."""
    tape, hosts = Tape(buffers.tensors, earlier), Hosts()
    calls = Calls(log, hosts, device)
    random_before = _generators()
    tree = buffers.tree
    try:
        with torch.no_grad(), calls, Ops(log, hosts, calls, tape):
            out = step(**tree) if isinstance(tree, dict) else step(*tree)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        what = f"raises {type(error).__name__}: {first}"
        log.add("error", "the step", what, log.raised_at(error))
        return None
    if not log.has("random"):
        for name, was, now in zip(
            ("random", "numpy.random", "torch's CPU generator"), random_before, _generators(),
            strict=True,
        ):  # fmt: skip
            if was != now:
                log.add("random", name, "is drawn from by the step", log.definition())
    moved = buffers.moved(tree)
    if moved is not None:
        log.add("address", "the step", moved, log.definition())
    outputs: list[Tensor | None] = []
    for name, leaf in zip(*flatten("output", out)[:2], strict=True):
        if leaf is not None and not isinstance(leaf, Tensor):
            what = f"is {type(leaf).__name__} {leaf!r}, which a capture freezes"
            log.add("output", name, what, log.definition())
        elif leaf is not None and leaf in hosts and device is not None:
            log.add("output", name, "is on the host", log.definition())
        outputs.append(leaf if isinstance(leaf, Tensor) else None)
    tape.finish(outputs, earlier)
    return tape, [None if t is None else t.clone() for t in outputs]


def _advance(buffers: Buffers, given: Inputs | None) -> None:
    """New inputs: those given, or every float input rolled by one element and scaled."""
    if given is not None:
        if isinstance(given, dict):
            buffers.update("check", (), given)
        else:
            buffers.update("check", given, {})
        return
    for t in buffers.tensors:
        if t.is_floating_point():
            t.copy_(t.clone().flatten().roll(1).view(t.shape) * 0.9375)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """The same bits."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    same = [t.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*same)


def _report_difference(log: Log, first: Tape, later: Tape, i: int) -> None:
    pair = first.difference(later)
    if pair is None:
        return
    was, now = pair
    entry = now or was
    if entry is None:
        log.add("frozen", "the step", f"gives other outputs in run {i + 1}", log.definition())
        return
    parts = [_plain(e) for e in (was, now)]
    what = f"differs between runs: {parts[0]} in the first one, {parts[1]} in run {i + 1}"
    if any(log.found.get((kind, *entry.where[:2])) for kind in ("sync", "kept", "copy")):
        return  # the reason is known
    log.add("frozen", str(entry.func), what, entry.where)


def _plain(entry: Entry | None) -> str:
    """An operation with its Python values, for a sentence."""
    if entry is None:
        return "nothing"
    values = [
        f"{v.storage[0]} {list(v.size)}" if hasattr(v, "storage") else repr(v) for v in entry.leaves
    ]
    text = f" = {entry.constant.hex()}" if entry.constant else ""
    return f"{entry.func}({', '.join(values)}){text}"


def _examine(
    step: Step, inputs: Inputs, steps: int, more: Sequence[Inputs], log: Log,
    device: torch.device | None,
) -> int:  # fmt: skip
    """One pass: a warm-up, then ``steps`` runs against replays of the first."""
    live, twin = (Buffers("check", inputs) for _ in range(2))
    earlier, first = Made(), None
    before = live.values()
    if _run(step, live, log, earlier, device) is None or log.has("address"):
        return 0
    live.set(before)
    for i in range(steps):
        if i:
            for buffers in (live, twin):
                _advance(buffers, more[i - 1] if i <= len(more) else None)
        result = _run(step, live, log, earlier, device)
        if result is None or log.has("address", "error"):
            return 0
        tape, outputs = result
        first = tape if first is None else first
        _report_difference(log, first, tape, i)
        replayed = first.replay(twin.tensors)
        same = len(outputs) == len(replayed) and all(map(_equal, outputs, replayed))
        same = same and all(map(_equal, live.tensors, twin.tensors))
        if not same and not log.has("frozen", "kept", "random", "sync", "state"):
            what = f"gives other bits in run {i + 1} than a replay of the first run"
            log.add("replay", "the step", what, log.definition())
    return 0 if first is None else len(first.entries)


def check(step: Step, inputs: Inputs, steps: int = 3, *, more: Sequence[Inputs] = ()) -> Report:
    """Look for what would make a captured ``step`` fail, or differ from the step itself.

    The step runs ``2 (steps + 1)`` times, so Python state that it has moves on. Tensors from
    outside the step (weights, tables) count as on the device.

    Args:
        step: called as ``step(**inputs)`` or ``step(*inputs)``, without gradients.
        inputs: dict or tuple of CPU tensors (or trees of them); copied, never written to.
        steps: runs to compare with replays, at least 2.
        more: inputs of the runs after the first, in the signature of the step; what is left out
            stays. By default floating-point inputs are rolled by one element and scaled by 15/16,
            and integers stay as the step leaves them.

    Returns:
        A :class:`Report`: one sentence for each violation, which names the operation, file and
        line, and what to do instead; and what is not proved.

    Raises:
        ValueError: ``inputs`` are no CPU tensors, or ``steps`` is below 2.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"check: steps is {steps!r}, need an integer of at least 2")
    buffers = Buffers("check", inputs)
    if buffers.device.type != "cpu":
        raise ValueError(f"check: inputs are on {buffers.device}, need the cpu")
    log = Log(step, _run.__code__)
    with use("ref"):  # the row that runs on either device
        _examine(step, inputs, steps, more, log, torch.device("cuda:0"))
    ops = _examine(step, inputs, steps, more, log, None)
    return Report(tuple(log.found.values()), ops, steps)


def require(step: Step, inputs: Inputs, steps: int = 3, *, more: Sequence[Inputs] = ()) -> Report:
    """:func:`check`, which raises.

    Raises:
        NotCapturable: there are violations; the message has their sentences.
        ValueError: as :func:`check`.
    """
    report = check(step, inputs, steps, more=more)
    if not report.ok:
        raise NotCapturable(report)
    return report
