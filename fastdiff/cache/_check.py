"""Checks of policies' arguments: errors that name the policy, the argument, its value, the need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastdiff.cache.extrapolate import METHODS


def whole(who: str, name: str, value: object, low: int) -> int:
    """``value`` as an integer of at least ``low``.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{who}: {name} is {value!r}, need an integer of at least {low}")
    return value


def step_list(who: str, name: str, value: Sequence[int]) -> tuple[int, ...]:
    """``value`` as ascending steps, of which the first is 0: nothing can be reused before.

    Raises:
        ValueError: not integers, not ascending, or not from 0.
    """
    steps = tuple(value)
    good = all(isinstance(s, int) and not isinstance(s, bool) for s in steps)
    if not good or not steps or steps[0] != 0 or list(steps) != sorted(set(steps)):
        raise ValueError(f"{who}: {name} is {list(steps)!r}, need ascending integers from 0")
    return steps


def number(who: str, name: str, value: object, low: float, high: float, need: str) -> None:
    """``value`` is a number with ``low <= value <= high``; ``need`` says so in words.

    Raises:
        ValueError: it is none.
    """
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise ValueError(f"{who}: {name} is {value!r}, need {need}")


def extrapolation(who: str, order: int, method: str) -> None:
    """``order`` and ``method`` of a forecast.

    Raises:
        ValueError: there is no such forecast.
    """
    whole(who, "order", order, 0)
    if order > 4:
        raise ValueError(f"{who}: order is {order}, need at most 4")
    if method not in METHODS:
        raise ValueError(f"{who}: method is {method!r}, need one of {', '.join(METHODS)}")


def rule(who: str, policy: Any) -> None:
    """What all rules that measure have: threshold, warmup, most, order and method.

    Raises:
        ValueError: one of them does not fit.
    """
    most = math.nextafter(math.inf, 0)
    number(who, "threshold", policy.threshold, 0, most, "a number of at least 0")
    whole(who, "warmup", policy.warmup, 1)
    if policy.most is not None:
        whole(who, "most", policy.most, 1)
    extrapolation(who, policy.order, policy.method)
