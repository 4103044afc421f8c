"""What a bench module states: ``cases()`` gives :class:`Case` objects, ``run.py`` does the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Case:
    """One row of a benchmark: the public op and what it is compared with, on the same tensors."""

    name: str  # the shapes and dtype, as a reader would write them
    fast: Callable[[], Any]
    baselines: dict[str, Callable[[], Any]] = field(default_factory=dict)  # "eager", a peer, ...
    flops: float = 0  # of one call, where matrix products are what bounds it
    bytes: float = 0  # that one call must at least read and write
    target: float | None = None  # ratio of the median of `vs` to that of `fast` to be reached
    vs: str = "eager"  # the baseline that target means
    also: dict[str, float] = field(default_factory=dict)  # ratios to be reached to further arms
    comparable: bool = True  # `fast` and baseline `vs` compute the same values
