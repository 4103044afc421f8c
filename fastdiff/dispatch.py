"""The one dispatcher: an op is a table of rows, and the first row that does not refuse runs.

A row refuses with a sentence. ``explain(op, *args)`` prints them all; forcing a row that refuses
raises its sentence. Nothing here looks at values: shapes, dtypes, strides, devices, grad flags.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class NoImpl(RuntimeError):
    """A forced row refuses, or no such row exists; the message says why."""


class Impl(NamedTuple):
    """One row: ``why_not``, with the arguments of ``fn``, gives None (usable) or a sentence."""

    name: str
    fn: Callable[..., Any]
    why_not: Callable[..., str | None]


def always(*_: Any) -> None:
    """The ``why_not`` of a row that takes everything."""
    return None


def _parse(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


_START = _parse(os.environ.get("FASTDIFF_IMPL"))
_forced: ContextVar[tuple[str, ...]] = ContextVar("fastdiff_impl", default=_START)
_record: ContextVar[Rows | None] = ContextVar("fastdiff_record", default=None)


@torch.compiler.assume_constant_result
def _force_in_effect() -> tuple[str, ...]:
    return _forced.get()  # under torch.compile: read once, when the graph is traced


@contextmanager
def use(*names: str) -> Iterator[None]:
    """Inside the block every op runs the first of ``names`` that its table has: ``use("ref")``.

    A named row that refuses raises :class:`NoImpl` with its sentence. ``use()`` lifts an outer
    force. The start value comes from ``FASTDIFF_IMPL``, e.g. ``FASTDIFF_IMPL=triton,ref``. A
    function under ``torch.compile`` keeps the row that was in force when it was traced.
    """
    token = _forced.set(names)
    try:
        yield
    finally:
        _forced.reset(token)


class Rows(Counter[tuple[str, str]]):
    """Counts of the rows that ran; ``why`` has, of every row that is not its op's first, the
    sentences of those before it in its first call: none where it was forced."""

    def __init__(self) -> None:
        super().__init__()
        self.why: dict[tuple[str, str], dict[str, str]] = {}


@contextmanager
def record() -> Iterator[Rows]:
    """Count the rows that run in the block: ``{("attention", "native"): 24, ...}``."""
    counter = Rows()
    token = _record.set(counter)
    try:
        yield counter
    finally:
        _record.reset(token)


def note(op: str, row: str) -> None:
    """Count one run of ``row`` where :func:`record` is on."""
    counter = _record.get()
    if counter is not None:
        counter[op, row] += 1


def _has_tangent(args: Sequence[Any]) -> bool:
    """Forward-mode derivatives are being taken (``torch.func.jvp``) of some of these."""
    if forward_ad._current_level < 0:
        return False
    return any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    )


def pick(op: str, impls: Sequence[Impl], impl: str | None, *args: Any) -> Callable[..., Any]:
    """The function of the row to run for ``args``: forced (``impl``, :func:`use`) or first usable.

    Raises:
        NoImpl: the forced row does not exist or refuses.
    """
    names = (impl,) if impl is not None else _force_in_effect()
    if names:
        row = next((r for name in names for r in impls if r.name == name), None)
        if row is None:
            have = ", ".join(r.name for r in impls)
            raise NoImpl(f"{op}: no row named {' or '.join(names)}; this op has {have}")
        reason = row.why_not(*args)
        if reason is None and row is not impls[-1] and _has_tangent(args):
            reason = "an input has a tangent, and this row has no forward-mode derivative"
        if reason is not None:
            raise NoImpl(f"{op}: row {row.name} refuses: {reason}")
    else:
        usable = impls[-1:] if _has_tangent(args) else impls  # the reference alone is torch's
        for row in usable:
            if row.why_not(*args) is None:
                break
        else:
            reasons = "; ".join(f"{r.name}: {r.why_not(*args)}" for r in usable)
            raise NoImpl(f"{op}: every row refuses: {reasons}")
    if not torch.compiler.is_compiling():
        counter = _record.get()
        if counter is not None:
            key = (op, row.name)
            if key not in counter and row is not impls[0]:
                before = () if names else impls[: list(impls).index(row)]
                counter.why[key] = {r.name: r.why_not(*args) or "" for r in before}
            counter[key] += 1
    return row.fn


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Why each row of a public op would or would not run on these arguments (None: usable).

    The op's module must hold ``IMPLS`` and ``row_args(*args, **kwargs)``, which normalises the
    public arguments into those that its rows take.
    """
    import sys

    module = sys.modules[op.__module__]
    rows, row_args = module.TABLES[op.__name__]
    return {row.name: row.why_not(*row_args(*args, **kwargs)) for row in rows}


def needs_grad(*tensors: Tensor | None) -> bool:
    """Grad mode is on and some tensor asks for a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_grad(*tensors: Tensor | None) -> str | None:
    """The sentence of a row without a backward."""
    if needs_grad(*tensors):
        return "this row has no backward and an input requires a gradient"
    return None
