"""Changes to other people's objects that can be taken back exactly."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

_ABSENT = object()


def _place(target: Any, name: str) -> str:
    """Where ``target.name`` is kept: ``forward`` lies below a hook of accelerate (offloading), as
    pipelines take hooks off and put them on again after every run."""
    mine = target.__dict__
    hooked = name == "forward" and "_hf_hook" in mine and "_old_forward" in mine
    return "_old_forward" if hooked else name


def forward_of(module: Any) -> Any:
    """What a ``forward`` that :class:`Patch` sets takes the place of."""
    return getattr(module, _place(module, "forward"))


class Patch:
    """A list of attribute changes on instances; ``undo`` takes them back, last first.

    Only the object itself is written, never its class: other instances see nothing.
    """

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any, Any]] = []  # target, name, old, new
        self._after: list[Callable[[], None]] = []

    def on_undo(self, do: Callable[[], None]) -> None:
        """``do()`` once all attributes are as they were: for what is no attribute."""
        self._after.append(do)

    def set(self, target: Any, name: str, value: Any) -> None:
        """``target.name = value`` in the instance's dictionary. A function keeps the signature of
        what it replaces: pipelines look there for what they may pass (``generator``, ``eta``)."""
        place = _place(target, name)
        if isinstance(value, FunctionType) and callable(getattr(target, place, None)):
            value.__dict__["__wrapped__"] = getattr(target, place)
        self._changes.append((target, name, target.__dict__.get(place, _ABSENT), value))
        target.__dict__[place] = value

    def set_class(self, target: Any, cls: type) -> None:
        """``target`` becomes an instance of ``cls``, a subclass of its class."""
        self._changes.append((target, "__class__", target.__class__, cls))
        target.__class__ = cls

    def foreign(self) -> str | None:
        """A sentence about an attribute that someone else has changed since, or None."""
        seen = set()
        for target, name, _, new in reversed(self._changes):
            if (id(target), name) in seen:
                continue  # changed twice by us: the last one counts
            seen.add((id(target), name))
            now = target.__dict__.get(_place(target, name), _ABSENT)
            if name == "__class__":
                now = target.__class__
            if now is not new:
                return f"{name} of a {type(target).__name__} was changed by someone else since"
        return None

    def undo(self) -> None:
        """Every object as it was."""
        while self._changes:
            target, name, old, _ = self._changes.pop()
            if name == "__class__":
                target.__class__ = old
                continue
            place = _place(target, name)
            if old is not _ABSENT:
                target.__dict__[place] = old
            elif place == name:
                target.__dict__.pop(name, None)
            else:  # a hook came later
                target.__dict__[place] = MethodType(type(target).forward, target)
        while self._after:
            self._after.pop()()
