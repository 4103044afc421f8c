r"""Attention broadcast by range (PAB, Zhao et al. 2024, arXiv:2408.12588), or forecasts instead.

What attention and feed-forward modules give changes little over the middle steps of a run, and the
less the farther what they look at is: attention to a prompt least, attention between the frames of
a video more, attention within a picture most.
Each kind of module is therefore computed at every n-th step of that part of the run. Between, its
last output is broadcast to the steps that follow; or, with ``order`` > 0, continued from the last
``order + 1`` outputs (the idea of TaylorSeer, Liu et al. 2025, arXiv:2503.06923).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastdiff.cache._check import extrapolation, number, step_list, whole

KINDS = ("self_attention", "cross_attention", "feed_forward", "temporal_attention")


@dataclass(frozen=True)
class Broadcast:
    """Every how many steps each kind of module is computed, and in which part of a run.

    Step s of a run computes a kind where n divides s, or s lies outside [start, stop). In the place
    of any n stand the computed steps themselves, ascending from 0, for runs of one length:
    :func:`fastdiff.calibrate.module_schedules` finds them.

    Args:
        self_attention: n of attention within the picture, joint attention with text included;
            1: always computed, and these modules are then left as they are.
        cross_attention: n of attention to a prompt.
        feed_forward: n of the feed-forward modules.
        start: share of the run's steps, 0 to 1, before which everything is computed.
        stop: share of the run's steps from which on everything is computed again. Both need the
            number of steps to be known, but for start 0 with stop 1.
        order: of the forecast, 0 (reuse) to 4; lower while fewer outputs have been computed. A
            module keeps ``order + 1`` outputs.
        method: of :mod:`fastdiff.cache.extrapolate`.
        temporal_attention: n of attention between frames, in networks that part it from attention
            within a frame.

    Raises:
        ValueError: an argument does not fit.
    """

    self_attention: int | Sequence[int] = 2
    cross_attention: int | Sequence[int] = 3
    feed_forward: int | Sequence[int] = 1
    start: float = 0.1
    stop: float = 0.9
    order: int = 0
    method: str = "lagrange"
    temporal_attention: int | Sequence[int] = 2

    def __post_init__(self) -> None:
        for kind in KINDS:
            n = getattr(self, kind)
            if isinstance(n, Sequence) and not isinstance(n, str):
                object.__setattr__(self, kind, step_list("Broadcast", kind, n))
            else:
                whole("Broadcast", kind, n, 1)
        number("Broadcast", "start", self.start, 0, 1, "a share of the steps, 0 to 1")
        need = f"a share of the steps, from start {self.start} to 1"
        number("Broadcast", "stop", self.stop, self.start, 1, need)
        extrapolation("Broadcast", self.order, self.method)

    @property
    def neutral(self) -> bool:
        """It computes everything."""
        return not any(self.skips(kind) for kind in KINDS)

    def skips(self, kind: str) -> bool:
        """Modules of a kind of ``KINDS`` are not always computed."""
        return getattr(self, kind) != 1

    def computes(self, kind: str, step: int, steps: int | None) -> bool:
        """Step ``step`` of ``steps``, from 0, computes the modules of ``kind``.

        Raises:
            ValueError: ``start`` or ``stop`` cuts the run, and ``steps`` is not known.
        """
        if not self.skips(kind):
            return True
        inside = True
        if (self.start, self.stop) != (0, 1):
            if steps is None:
                raise ValueError(
                    f"Broadcast: start {self.start} and stop {self.stop} are shares of a number of "
                    "steps that is not known; need fastdiff.request(steps=...), or start 0 and "
                    "stop 1"
                )
            # 1e-9: a share such as 0.07 of 100 steps is to be step 7, though it rounds above.
            first, end = (math.ceil(share * steps - 1e-9) for share in (self.start, self.stop))
            inside = first <= step < end
        n = getattr(self, kind)
        return not inside or (step in n if isinstance(n, tuple) else step % n == 0)

    def full(self, step: int, steps: int | None) -> bool:
        """Step ``step`` of ``steps``, from 0, computes all modules."""
        return all(self.computes(kind, step, steps) for kind in KINDS)

    def kept(self, kind: str, step: int, steps: int | None) -> bool:
        """Some later step will read what ``step`` computes."""
        computed, later = 0, step + 1
        while computed <= self.order and (steps is None or later < steps):
            if not self.computes(kind, later, steps):
                return True
            computed += 1
            later += 1
        return False

    def most(self, kind: str, steps: int | None) -> int:
        """Outputs that a module of ``kind`` holds at a time, at the most."""
        if steps is not None and all(self.computes(kind, s, steps) for s in range(steps)):
            return 0
        return self.order + 1 if self.skips(kind) else 0
