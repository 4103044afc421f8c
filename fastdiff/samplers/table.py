r"""A sampler as a table: one row of ``fastdiff.ops.fused_step.COLUMNS`` per model call."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff.ops.fused_step import COLUMNS
from fastdiff.samplers.schedule import Schedule

PREDICTIONS = ("eps", "v", "x0", "flow", "edm")


class Multistep(NamedTuple):
    """What a step needs where parts of the state were last predicted several calls ago.

    Attributes:
        x0: ``[n, 2]`` float32: ``x0 = x0[i, 0] x + x0[i, 1] m``, then clipped.
        clip: of x0, None for none.
        share: ``[n, n + 1]`` float32: by which the slope of x0 shrinks at call i where the last
            prediction is g calls old: 1 at g = 1.
    """

    x0: Tensor
    clip: float | None
    share: Tensor

    @classmethod
    def of(cls, lam: Tensor, a_x: Tensor, a_m: Tensor, clip: float | None) -> Multistep:
        """From ``[n]`` float64: log-SNR ``lam`` of each call, and ``x0 = a_x x + a_m m``."""
        n = len(lam)
        share = torch.ones(n, n + 1, dtype=torch.float64)
        for i in range(n):
            for gap in range(2, i + 1):
                share[i, gap] = (lam[i] - lam[i - 1]) / (lam[i] - lam[i - gap])  # 0 after infinity
        return cls(torch.stack([a_x, a_m], 1).float(), clip, share.float())

    def history(self, i: int, x: Tensor, m: Tensor, before: Tensor, gaps: Tensor) -> Tensor:
        """The x0 of the call before as it would be if every element had been predicted then.

        Args:
            i: the call.
            x, m: state and prediction ``[B, C, ...]`` of this call.
            before: x0 of the call before ``[B, C, ...]``, or what the last prediction implies.
            gaps: int64, broadcasts to those: calls since the last prediction, at least 1.
        """
        x0 = self.x0[i, 0] * x.float() + self.x0[i, 1] * m.float()
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        share = self.share.to(x.device)[i][gaps.clamp(max=self.share.shape[1] - 1)]
        return torch.lerp(x0, before.float(), share).to(before.dtype)


@dataclass(frozen=True, eq=False)
class Table:
    """What a run needs from its sampler; immutable, shared by any number of runs."""

    rows: Tensor  # [n, R] float32
    t: Tensor  # [n] float32, model time of each call
    reads: tuple[int, ...]  # history entries that a call's row reads: 0, 1 or 2
    keep: tuple[bool, ...]  # calls whose history entry a later one reads
    draws: tuple[bool, ...]  # calls whose row draws noise
    alpha: tuple[float, ...]  # of the level of each call: x = alpha x0 + sigma eps
    sigma: tuple[float, ...]
    times: tuple[float, ...]  # t, for the host
    host: tuple[tuple[float, ...], ...]  # rows, for the host
    digest: str  # of the rows
    # Log-variances (smallest, largest) of each call between which the model says its own; their
    # noise is the row's h2. Empty: the variance is the row's.
    learned: tuple[tuple[float, float], ...]
    first: Tensor | None = None  # [R] float32: a step of the first state before the first call
    multistep: Multistep | None = None  # of samplers that continue their last predictions in time


@dataclass(frozen=True, eq=False)
class Ready:
    """A sampler whose table is made and on its device: see :func:`fastdiff.samplers.ready`."""

    made: Table
    prediction: str
    clip: float | None
    rows: Tensor  # of the table, on the device
    t: Tensor
    numbers: Tensor  # int64 [n]: 0, 1, ...

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table:
        for name, value, need in (
            ("prediction", prediction, self.prediction),
            ("clip", clip, self.clip),
        ):
            if value != need:
                raise ValueError(f"sampler was made ready for {name} {need!r}, and it is {value!r}")
        return self.made


class Sampler(Protocol):
    """A method: makes the table of a run."""

    def table(
        self, schedule: Schedule, steps: int, prediction: str, clip: float | None
    ) -> Table: ...


def to_x0(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """``(a_x, a_m)`` of ``x0 = a_x x + a_m m`` at the given levels."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction in ("eps", "edm") and (alpha <= 0).any():
        raise ValueError(
            f"prediction is {prediction!r} and the schedule starts at alpha = 0, where it does not "
            "determine x0; need 'v', 'x0' or 'flow'"
        )
    if prediction == "eps":  # m = eps
        return one / alpha, -sigma / alpha
    if prediction == "v":  # m = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv:2202.00512)
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm
    if prediction == "flow":  # m = eps - x0
        return one / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction == "x0":
        return zero, one
    if prediction == "edm":  # alpha is c_in, sigma = c_in sigma_ve: c_skip = 1 - sigma^2
        return (1 - sigma**2) / alpha, sigma * (1 - sigma**2).sqrt() / alpha
    raise ValueError(f"prediction is {prediction!r}, need one of {', '.join(PREDICTIONS)}")


def to_eps(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """``(e_x, e_m)`` of ``eps = (x - alpha x0) / sigma = e_x x + e_m m``; sigma is above 0."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction == "eps":
        return zero, one
    if prediction == "v":
        norm = alpha**2 + sigma**2
        return sigma / norm, alpha / norm
    if prediction == "flow":
        return one / (alpha + sigma), alpha / (alpha + sigma)
    if prediction == "edm":
        return sigma, -(1 - sigma**2).sqrt()
    a_x, a_m = to_x0(prediction, alpha, sigma)
    return (one - alpha * a_x) / sigma, -alpha * a_m / sigma


def eps_columns(
    prediction: str, alpha: Tensor, sigma: Tensor, rederive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """eps as weights of ``(x, x0, m)``; with ``rederive`` of x and the (clipped) x0 alone."""
    if rederive:
        return 1 / sigma, -alpha / sigma, torch.zeros_like(alpha)
    e_x, e_m = to_eps(prediction, alpha, sigma)
    return e_x, torch.zeros_like(alpha), e_m


def build(
    t: Tensor,
    columns: dict[str, Tensor],
    *,
    at: tuple[Tensor, Tensor],
    clip: float | None,
    learned: tuple[Tensor, Tensor] | None = None,
    first: dict[str, float] | None = None,
    multistep: Multistep | None = None,
) -> Table:
    """The table of float64 ``[n]`` columns (absent ones are 0), and of a ``first`` row's; ``at``:
    alpha and sigma of the calls; ``learned``: the smallest and largest log-variances.

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
    rows = torch.stack([c[name].expand(n) for name in COLUMNS], 1)
    if not torch.isfinite(rows[:, : COLUMNS.index("clip")]).all():
        raise ValueError("this sampler has no finite coefficients on this schedule: see its levels")
    reads = tuple(2 if h2 else 1 if h1 else 0 for h1, h2 in zip(c["c_h1"], c["c_h2"], strict=True))
    kept: list[int] = []
    keep = [False] * n
    keeps = (c["k_x"] != 0) | (c["k_0"] != 0) | (c["k_m"] != 0)
    for i, count in enumerate(reads):
        for entry in kept[:count]:
            keep[entry] = True
        if keeps[i]:
            kept.insert(0, i)
    draws = tuple(bool(s) for s in c["sigma"])
    if learned is not None:  # each element has its own: Run.step gives the noise as h2
        rows[:, COLUMNS.index("c_h2")] = (c["sigma"] != 0).double()
        rows[:, COLUMNS.index("sigma")] = 0
    logs = () if learned is None else tuple(zip(*(v.tolist() for v in learned), strict=True))
    start = None
    if first is not None:
        row = {"clip": float("inf")} | first
        start = torch.tensor([row.get(name, 0.0) for name in COLUMNS])
    alpha, sigma = (tuple(level.tolist()) for level in at)
    rows, t = rows.float(), t.float()
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
    times, host = tuple(t.tolist()), tuple(map(tuple, rows.tolist()))
    return Table(
        rows,
        t,
        reads,
        tuple(keep),
        draws,
        alpha,
        sigma,
        times,
        host,
        digest,
        logs,
        start,
        multistep,
    )
