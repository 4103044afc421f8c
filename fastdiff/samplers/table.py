r"""A sampler as a table of coefficients: one row of :data:`fastdiff.ops.fused_step.COLUMNS` per model call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastdiff.ops.fused_step import COLUMNS
from fastdiff.samplers.schedule import Levels

PREDICTIONS = ("eps", "v", "x0", "flow")


@dataclass(frozen=True, eq=False)
class Table:
    """What a run needs from its sampler; immutable, shared by any number of runs."""

    rows: Tensor  # [n, R] float32
    t: Tensor  # [n] float32, model time 0..1000 of each call
    keep: tuple[bool, ...]  # which calls push their history entry
    histories: int  # entries that a row reads: 0, 1 or 2
    stochastic: bool  # some row draws noise


class Schedule(Protocol):
    """Gives the noise levels of a run: see :class:`fastdiff.samplers.schedule.VP`."""

    def levels(self, steps: int, spacing: str, extra: int = 0) -> Levels: ...


class Sampler(Protocol):
    """A method: makes the table of a run."""

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table: ...


def to_x0(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """``(a_x, a_m)`` of ``x0 = a_x x + a_m m`` at the given levels."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction == "eps":  # m = eps
        if (alpha <= 0).any():
            raise ValueError(
                "prediction is 'eps' and the schedule starts at alpha = 0, where eps says nothing "
                "about x0; need 'v' or 'x0'"
            )
        return one / alpha, -sigma / alpha
    if prediction == "v":  # m = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv:2202.00512)
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm
    if prediction == "flow":  # m = eps - x0
        return one / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction == "x0":
        return zero, one
    raise ValueError(f"prediction is {prediction!r}, need one of {', '.join(PREDICTIONS)}")


def to_eps(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """``(e_x, e_m)`` of ``eps = e_x x + e_m m`` at the given levels; sigma is above 0."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction == "eps":
        return zero, one
    if prediction == "v":
        norm = alpha**2 + sigma**2
        return sigma / norm, alpha / norm
    if prediction == "flow":
        return one / (alpha + sigma), alpha / (alpha + sigma)
    if prediction == "x0":
        return one / sigma, -alpha / sigma
    raise ValueError(f"prediction is {prediction!r}, need one of {', '.join(PREDICTIONS)}")


def build(
    t: Tensor, columns: dict[str, Tensor], *, clip: float | None, keep: tuple[bool, ...] | None = None
) -> Table:
    """The table of float64 ``[n]`` columns (absent ones are 0).

    Without clipping ``x0`` is linear in ``x`` and ``m``, so its terms are folded in float64 into
    theirs: fewer roundings, and none of the cancellation of ``x0 = (x - sigma m) / alpha`` at small
    alpha.
    """
    n = len(t)
    c = {name: columns.get(name, torch.zeros(n, dtype=torch.float64)) for name in COLUMNS}
    if clip is None:
        for out, zero in (("c", "c_0"), ("k", "k_0")):
            c[f"{out}_x"] = c[f"{out}_x"] + c[zero] * c["a_x"]
            c[f"{out}_m"] = c[f"{out}_m"] + c[zero] * c["a_m"]
            c[zero] = torch.zeros_like(c[zero])
        c["a_x"], c["a_m"] = torch.zeros_like(c["a_x"]), torch.zeros_like(c["a_m"])
    c["clip"] = torch.full((n,), float("inf") if clip is None else clip, dtype=torch.float64)
    rows = torch.stack([c[name].expand(n) for name in COLUMNS], 1).float()
    histories = 2 if bool(c["c_h2"].any()) else int(bool(c["c_h1"].any()))
    if keep is None:
        keep = (bool(histories),) * n
    return Table(rows, t.float(), keep, histories, bool(c["sigma"].any()))
