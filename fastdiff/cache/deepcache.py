r"""DeepCache (Ma, Fang, Wang 2024, arXiv:2312.00858): the deep features of a U-Net, reused.

A U-Net joins its way down and its way up at every skip. At a full step the hidden state that
enters the join of skip ``branch`` on the way up is kept. At the steps between, the network runs
only what is above that join: the way down as far as the skip, then the join with the kept state,
then the rest of the way up. The time embedding and the skips above the join are the step's own.

With ``order`` the kept state is continued from its last values instead of reused. A transformer has
no skips: there ``branch`` blocks at each end always run, and the residual of the others is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fastdiff.cache._check import extrapolation, number, step_list, whole


@dataclass(frozen=True)
class DeepCache:
    """Which steps of a run are full, and how much of the network runs at the others.

    Args:
        interval: N: every N-th step is full under "uniform", ``ceil(T / N)`` of T steps under
            "quad". 1 reuses nothing. A step is one call of the scheduler: Heun's method has two
            a noise level.
        branch: the skip at whose join the deep features are kept, numbered from the outermost:
            0 is the input convolution's, and reuse is then cheapest. A level of ``n`` residual
            blocks has ``n + 1`` skips, so Stable Diffusion's skip ``layer`` of ``block`` is
            ``3 * block + layer``, as in the authors' code.
        schedule: "uniform"; "quad", full steps dense around ``center``; or the full steps
            themselves, ascending from 0.
        center: of "quad", a step; None is 0.
        power: of "quad", above 1; lowered by 0.02 until the full steps are distinct.
        order: of the forecast from what was computed, 0 (reuse: the paper's) to 4.
        method: of :mod:`fastdiff.cache.extrapolate`.

    Raises:
        ValueError: an argument does not fit.
    """

    interval: int = 3
    branch: int = 0
    schedule: str | Sequence[int] = "uniform"
    center: int | None = None
    power: float = 1.2
    order: int = 0
    method: str = "lagrange"

    def __post_init__(self) -> None:
        whole("DeepCache", "interval", self.interval, 1)
        whole("DeepCache", "branch", self.branch, 0)
        if self.center is not None:
            whole("DeepCache", "center", self.center, 0)
        extrapolation("DeepCache", self.order, self.method)
        above = math.nextafter(1, 2)
        number("DeepCache", "power", self.power, above, 1e9, "a number above 1")
        if isinstance(self.schedule, str):
            if self.schedule not in ("uniform", "quad"):
                raise ValueError(
                    f"DeepCache: schedule is {self.schedule!r}, need 'uniform', 'quad' or a list "
                    "of full steps"
                )
        else:
            steps = step_list("DeepCache", "schedule", self.schedule)
            object.__setattr__(self, "schedule", steps)

    @property
    def neutral(self) -> bool:
        """It computes everything."""
        return self.interval == 1 and isinstance(self.schedule, str)

    def full(self, step: int, steps: int | None) -> bool:
        """Step ``step`` of ``steps``, from 0, computes the whole network.

        Raises:
            ValueError: "quad", and ``steps`` is not known or does not suit.
        """
        if self.schedule == "uniform":
            return step % self.interval == 0
        if self.schedule == "quad":
            if steps is None:
                raise ValueError("DeepCache: schedule is 'quad', need the number of steps")
            return step in quad_steps(steps, self.interval, self.center or 0, self.power)
        return step in self.schedule


@lru_cache(maxsize=64)
def quad_steps(steps: int, interval: int, center: int, power: float) -> frozenset[int]:
    """The full steps of schedule "quad": ``ceil(steps / interval)`` of them.

    Points that are even between the ends of ``x = (step - center)^(1/power)`` are raised back and
    cut to integers. As in the authors' code the root of a negative number is the complex one, of
    which the real part is taken in the end.

    Raises:
        ValueError: no power above 1 gives that many distinct steps.
    """
    count, p = math.ceil(steps / interval), power
    while p > 1:
        low, high = complex(-center) ** (1 / p), complex(steps - center) ** (1 / p)
        points = [low + (high - low) * i / count for i in range(count + 1)]
        cut = sorted({int((x**p).real) for x in points})
        found = frozenset([0, *(c + center for c in cut[1:-1])])
        if len(cut) - 1 == count:
            return found
        p -= 0.02
    raise ValueError(
        f"DeepCache: schedule 'quad' finds no {count} distinct steps of {steps} around center "
        f"{center}; need a larger interval or a smaller center"
    )
