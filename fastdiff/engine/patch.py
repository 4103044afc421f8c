"""Changes to other people's objects that can be taken back exactly."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class Patch:
    """A list of attribute changes on instances; ``undo`` takes them back, last first.

    Only the object itself is written, never its class: other instances see nothing.
    """

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """``target.name = value`` in the instance's dictionary."""
        self._changes.append((target, name, target.__dict__.get(name, _ABSENT)))
        target.__dict__[name] = value

    def set_class(self, target: Any, cls: type) -> None:
        """``target`` becomes an instance of ``cls``, a subclass of its class."""
        self._changes.append((target, "__class__", target.__class__))
        target.__class__ = cls

    def undo(self) -> None:
        """Every object as it was."""
        while self._changes:
            target, name, old = self._changes.pop()
            if name == "__class__":
                target.__class__ = old
            elif old is _ABSENT:
                target.__dict__.pop(name, None)
            else:
                target.__dict__[name] = old
