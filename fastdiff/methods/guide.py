r"""Gradients of energies, the steering of most guided samplers.

    through "model":  g = d E(x0_hat(x_t)) / d x_t, through the network
    through "x0":     g = d E(x0_hat) / d x0_hat
    through "x":      g = d E(x_t) / d x_t

Energies are one number for each sample, and so are norms: a sample's gradient does not depend on
the others of its batch. ``scope="batch"`` takes one norm for the whole batch, as some published
code does: the guidance of a sample then shrinks with the size of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.samplers.run import Run

Energy = Callable[[Tensor], Tensor]
THROUGH = ("model", "x0", "x")


def total(*terms: tuple[Energy, float]) -> Energy:
    """The weighted sum of energies ``(energy, weight)``."""

    def energy(x: Tensor) -> Tensor:
        return torch.stack([weight * one(x) for one, weight in terms]).sum(0)

    return energy


def norms(g: Tensor, scope: str = "sample") -> Tensor:
    """Euclidean norms ``[B, 1, ...]`` of ``g [B, ...]``; one for all with scope "batch"."""
    if scope == "batch":
        return torch.linalg.vector_norm(g).expand(g.shape[0]).view(-1, *[1] * (g.dim() - 1))
    if scope == "sample":
        square = ops.sample_sums(g)
        zero = square == 0  # where the root has no derivative: 0 is taken for it
        n = torch.where(zero, 1.0, square).sqrt().masked_fill(zero, 0.0)
        return n.to(g.dtype).view(-1, *[1] * (g.dim() - 1))
    raise ValueError(f"guide: scope is {scope!r}, need 'sample' or 'batch'")


def unit(g: Tensor, scope: str = "sample") -> Tensor:
    """``g`` over its norm; 0 stays 0."""
    n = norms(g, scope)
    return g / torch.where(n > 0, n, 1.0)


class Gradient(NamedTuple):
    """``g [B, C, ...]``; the prediction ``m [K, B, C, ...]`` that it went through, or that x0 came
    from (None through "x"); energies ``[B]``."""

    g: Tensor
    m: Tensor | None
    energy: Tensor


def energies(energy: Energy, x: Tensor) -> Tensor:
    """``energy(x)``, one number for each sample.

    Raises:
        ValueError: it gives something else.
    """
    value = energy(x)
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"energy gives {what}, need a tensor [{x.shape[0]}], one for each sample")
    return value


@dataclass(frozen=True)
class Guide:
    """An energy and how its gradient is taken.

    Args:
        energy: ``energy(x [B, C, ...]) -> [B]`` of the predicted clean state, or with through "x"
            of the state itself; low is good.
        through: "model", "x0" or "x".
        norm: None: the gradient as it is; "l2": of length 1.
        scope: of the norm: "sample" or "batch".

    Raises:
        ValueError: an argument does not fit.
    """

    energy: Energy
    through: str = "model"
    norm: str | None = None
    scope: str = "sample"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("through", self.through, THROUGH),
            ("norm", self.norm, (None, "l2")),
            ("scope", self.scope, ("sample", "batch")),
        ):
            if value not in known:
                raise ValueError(f"guide: {name} is {value!r}, need one of {known}")

    def gradient(self, run: Run, i: int, *, guided: bool | None = None) -> Gradient:
        """At the run's state and level ``i``; the model is called unless through "x"."""
        m: Tensor | None = None
        if self.through == "model":
            with torch.enable_grad():
                x = run.x.detach().requires_grad_()
                m = run.predict(i, x, guided=guided)
                value = energies(self.energy, run.x0(i, run.combined(m), x))
                (g,) = torch.autograd.grad(value.sum(), x)
            m = m.detach()
        else:
            if self.through == "x0":
                m = run.predict(i, guided=guided)
                start = run.x0(i, run.combined(m))
            else:
                start = run.x
            with torch.enable_grad():
                x = start.detach().requires_grad_()
                value = energies(self.energy, x)
                (g,) = torch.autograd.grad(value.sum(), x)
        if self.norm == "l2":
            g = unit(g, self.scope)
        return Gradient(g, m, value.detach())


def schedule_of(scale: float | Sequence[float] | Callable[[int], float], n: int) -> list[float]:
    """A scale for every call: one number, ``n`` of them, or a function of the call's number."""
    if callable(scale):
        return [float(scale(i)) for i in range(n)]
    if isinstance(scale, int | float):
        return [float(scale)] * n
    if len(scale) != n:
        raise ValueError(f"guide: scale has {len(scale)} entries, need {n}, one for each call")
    return [float(s) for s in scale]
