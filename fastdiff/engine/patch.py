"""Changes to other people's objects that can be taken back exactly."""

from __future__ import annotations

from types import FunctionType
from typing import Any

_ABSENT = object()


class Patch:
    """A list of attribute changes on instances; ``undo`` takes them back, last first.

    Only the object itself is written, never its class: other instances see nothing.
    """

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any, Any]] = []  # target, name, old, new

    def set(self, target: Any, name: str, value: Any) -> None:
        """``target.name = value`` in the instance's dictionary. A function keeps the signature of
        what it replaces: pipelines look there for what they may pass (``generator``, ``eta``)."""
        if isinstance(value, FunctionType) and callable(getattr(target, name, None)):
            value.__dict__["__wrapped__"] = getattr(target, name)
        self._changes.append((target, name, target.__dict__.get(name, _ABSENT), value))
        target.__dict__[name] = value

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
            now = target.__class__ if name == "__class__" else target.__dict__.get(name, _ABSENT)
            if now is not new:
                return f"{name} of a {type(target).__name__} was changed by someone else since"
        return None

    def undo(self) -> None:
        """Every object as it was."""
        while self._changes:
            target, name, old, _ = self._changes.pop()
            if name == "__class__":
                target.__class__ = old
            elif old is _ABSENT:
                target.__dict__.pop(name, None)
            else:
                target.__dict__[name] = old
