r"""Faster Diffusion (Li et al. 2023, arXiv:2312.09608): the encoder of a U-Net, at key steps only.

The features that the way down and the middle hand to the way up change little from step to step.
At key steps everything is computed and they are kept; at the others the way up alone runs, on the
kept features and the step's own time. As those steps do not look at the noisy input, several of
them can be decoded at once. Prior noise injection gives back the texture that this smooths away:

    x_t <- x_t + inject * x_T    where t < inject_below
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fastdiff.cache._check import number, step_list, whole

# Key steps of the authors' code, for runs of 50 steps.
NAMED = {
    "50ls": (0, 1, 2, 3, 5, 10, 15, 25, 35),
    "50ls2": (0, 10, 11, 12, 15, 20, 25, 30, 35, 45),
    "50ls3": (0, 20, 25, 30, 35, 45, 46, 47, 48, 49),
    "50ls4": (0, 9, 13, 14, 15, 28, 29, 32, 36, 45),
}


@dataclass(frozen=True)
class EncoderPropagation:
    """Which steps of a run compute the encoder, and how the others are decoded.

    Args:
        key_steps: a name of ``NAMED``; every how many steps; or the key steps themselves,
            ascending from 0.
        of: the number of steps for which ``key_steps`` is written. In a run of T steps, step k is
            then ``k * T // of``. None: 50 for a name, and a list is taken as it is.
        parallel: how many neighbouring non-key steps may be decoded in one batch, where the loop
            knows its times ahead (``fastdiff.sample`` on our U-Net); 1: one by one.
        inject: the share of the initial noise that is added before each late step, 0 to 1; 0: not.
            The authors use 0.003. Needs a pipeline with a scheduler of first order.
        inject_below: the late steps: those at less than this share of the training times.

    Raises:
        ValueError: an argument does not fit.
    """

    key_steps: str | int | Sequence[int] = "50ls"
    of: int | None = None
    parallel: int = 1
    inject: float = 0.0
    inject_below: float = 0.5

    def __post_init__(self) -> None:
        who, keys = type(self).__name__, self.key_steps
        if isinstance(keys, str):
            if keys not in NAMED:
                raise ValueError(f"{who}: key_steps is {keys!r}, need one of {', '.join(NAMED)}")
            if self.of not in (None, 50):
                raise ValueError(f"{who}: of is {self.of}, but {keys!r} is written for 50 steps")
            object.__setattr__(self, "of", 50)
        elif isinstance(keys, int):
            whole(who, "key_steps", keys, 1)
            if self.of is not None:
                raise ValueError(f"{who}: of is {self.of}, need None with key_steps {keys}")
        else:
            object.__setattr__(self, "key_steps", step_list(who, "key_steps", keys))
            if self.of is not None:
                whole(who, "of", self.of, max(keys) + 1)
        whole(who, "parallel", self.parallel, 1)
        for name in ("inject", "inject_below"):
            number(who, name, getattr(self, name), 0, 1, "a number from 0 to 1")

    @property
    def neutral(self) -> bool:
        """It computes everything."""
        return self.key_steps == 1

    def full(self, step: int, steps: int | None) -> bool:
        """Step ``step`` of ``steps``, from 0, is a key step.

        Raises:
            ValueError: the key steps are scaled, and ``steps`` is not known.
        """
        if isinstance(self.key_steps, int):
            return step % self.key_steps == 0
        keys = NAMED[self.key_steps] if isinstance(self.key_steps, str) else self.key_steps
        if self.of is None:
            return step in keys
        if steps is None:
            raise ValueError(
                f"EncoderPropagation: key_steps is {self.key_steps!r} of {self.of}, need the "
                "number of steps"
            )
        return step in _scaled(tuple(keys), self.of, steps)


@lru_cache(maxsize=64)
def _scaled(keys: tuple[int, ...], of: int, steps: int) -> frozenset[int]:
    return frozenset(k * steps // of for k in keys)
