"""What trains or measures a model asks it without caches, and says so."""

from __future__ import annotations

from typing import Any

from fastdiff.accelerate import acceleration_of, network_of


def uncached(who: str, model: Any, why: str) -> None:
    """``model`` has no caches.

    Raises:
        ValueError: it has; ``why`` says what is wrong with that.
    """
    acceleration = acceleration_of(network_of(model))
    if acceleration is not None and acceleration.policies:
        raise ValueError(f"{who}: model has caches, {why}; need it without, see restore(model)")
