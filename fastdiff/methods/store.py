r"""What a trajectory leaves behind for a later run: its states, its residuals, and its plan.

A state ``x_i`` is of level i. A residual ``r_i = x_{i+1} - mean_i(x_i)`` is what the model's step
from level i misses of the stored path (for a sampler that draws noise: ``sigma z``). Residuals are
kept as they are, not divided by sigma: where sigma is small z is large, and narrow numbers lose it.

A path that is walked again is the same only if it is walked in the same way: the plan says how, and
a run with another plan is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastdiff.accelerate import acceleration_of, network_of
from fastdiff.methods.trajectory import Trajectory

WIDE = (torch.float32, torch.float64)


def _digest(*parts: Sequence[float]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """How a trajectory is walked.

    Attributes:
        levels: digest of alpha, sigma and model time of every level.
        table: digest of the sampler's rows, with the prediction and the clipping.
        calls: levels of the model calls, in their order.
        cache: the policies of the model.
        guidance: scales, rescale, and the levels that are guided.
    """

    levels: str
    table: str
    calls: tuple[int, ...]
    cache: tuple[str, ...]
    guidance: str

    @classmethod
    def of(cls, run: Trajectory, calls: Iterable[int], *, cached: bool = True) -> Plan:
        """The plan of an open run, before its first call (the host reads guidance scales).

        Args:
            calls: levels that it is going to visit.
            cached: False: its calls go past all caches.
        """
        found = acceleration_of(network_of(run.model)) if cached else None
        policies = () if found is None else tuple(repr(policy) for policy in found.policies)
        each = run.guidance
        scales = each.tolist() if isinstance(each, Tensor) else [each]  # the host waits for these
        scales = scales if len(set(scales)) > 1 else scales[:1]
        guided = [i for i, on in enumerate(run.guided) if on]  # an interval
        return cls(
            _digest(run.table.alpha, run.table.sigma, run.table.times),
            f"{run.table.digest} of {run.prediction}",
            tuple(calls),
            policies,
            f"scale {scales}, rescale {run.rescale}, calls {guided[:1]} to {guided[-1:]}",
        )

    @property
    def hash(self) -> str:
        """One word for all of it."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def check(self, other: Plan, may_differ: Sequence[str] = ()) -> None:
        """Whether a run with the plan ``other`` may walk a trajectory of this plan.

        Raises:
            ValueError: it differs in something that ``may_differ`` does not name.
        """
        names = [field.name for field in fields(self)]
        for name in may_differ:
            if name not in names:
                raise ValueError(f"plan: may_differ has {name!r}, need some of {', '.join(names)}")
        for name in names:
            stored, found = getattr(self, name), getattr(other, name)
            if stored != found and name not in may_differ:
                raise ValueError(
                    f"plan: {name} is {found!r}, need {stored!r}, that of the stored trajectory"
                )


class Store:
    """A stored trajectory.

    Args:
        plan: how it was walked.
        dtype: of residuals: float32 or float64. A residual that is wider than the states makes the
            way back exact to the bit; as wide, exact to one rounding a step.

    Attributes:
        states: ``[B, C, ...]`` by level, in the dtype of the state.
        residuals: ``[B, C, ...]`` by the level where the step begins.

    Raises:
        ValueError: ``dtype`` is another one.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype = torch.float32):
        if dtype not in WIDE:
            raise ValueError(f"store: dtype is {dtype}, need torch.float32 or torch.float64")
        self.plan, self.dtype = plan, dtype
        self.states: dict[int, Tensor] = {}
        self.residuals: dict[int, Tensor] = {}

    def keep(self, level: int, x: Tensor) -> None:
        """A copy of the state ``x`` at ``level``."""
        self.states[level] = x.detach().clone()

    def keep_residual(self, level: int, x: Tensor, mean: Tensor) -> None:
        """What the step from ``level`` to ``mean`` misses of the path's next state ``x``."""
        self.residuals[level] = x.detach().to(self.dtype) - mean.to(self.dtype)

    def state(self, level: int) -> Tensor:
        """The state at a level.

        Raises:
            ValueError: it is not stored.
        """
        if level not in self.states:
            raise ValueError(f"store: level is {level}, need one of {sorted(self.states)}")
        return self.states[level]

    def add_residual(self, level: int, mean: Tensor) -> Tensor:
        """``mean`` of the step from ``level`` with its residual, in the dtype of ``mean``.

        Raises:
            ValueError: no residual is stored there.
        """
        if level not in self.residuals:
            raise ValueError(f"store: level is {level}, need one of {sorted(self.residuals)}")
        return (mean.to(self.dtype) + self.residuals[level]).to(mean.dtype)
