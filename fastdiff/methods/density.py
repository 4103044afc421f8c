r"""Log densities along an ODE (Chen et al. 2018, arXiv:1806.07366; Song et al. 2021,
arXiv:2011.13456, section 4.3), and divergences.

    dx = f(x, t) dt,    d log rho(x_t) = -div f(x_t, t) dt
    div f = tr J                      exactly: one Jacobian product for each dimension
    div f ~ v^T J v, mean over probes of v = +-1

The last is Hutchinson's; numbers of +-1 (Rademacher) have the least variance, 2 sum_{i != j}
J_ij^2 for symmetric J and 0 for diagonal.

Of a diffusion model, in ``u = x / alpha`` and ``tau = sigma / alpha``: ``du / dtau = eps``. Of an
interpolant: ``f = b``. Heun's steps carry state and integral, to second order.

Jacobian products are forward mode. Kernels without one would give zeros, so the reference rows of
all operations run within.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.dispatch import use
from fastdiff.methods.interpolant import Velocity
from fastdiff.methods.uncached import uncached
from fastdiff.ops.fused_step import Noise, philox_normal
from fastdiff.samplers.interpolant import Drift, Interpolant
from fastdiff.samplers.run import Run
from fastdiff.samplers.schedule import TIME, Schedule
from fastdiff.samplers.table import Table, build

PROBE_STREAM = 16
Field = Callable[[Tensor, int], Tensor]


class Density(NamedTuple):
    """``x [B, C, ...]``: where the path ends; ``logp [B]`` float64: log density where it began."""

    x: Tensor
    logp: Tensor


def rademacher(shape: Sequence[int], noise: Noise, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers -1 and 1 ``[B, ...]`` that depend on their counters alone."""
    z = philox_normal(shape, *noise)
    return torch.where(z < 0, -1.0, 1.0).to(dtype)


def divergence(
    f: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``f(x)`` and its divergence ``[B]`` in float64.

    Args:
        f: ``[B, C, ...]`` to the same, each sample by itself.
        x: ``[B, C, ...]``.
        probes: ``[P, B, C, ...]``; None: the exact trace.

    Raises:
        ValueError: a shape does not fit.
    """
    if probes is not None and (probes.dim() != x.dim() + 1 or probes.shape[1:] != x.shape):
        raise ValueError(f"density: probes is {list(probes.shape)}, need [P, *{list(x.shape)}]")
    total = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    count = x[0].numel() if probes is None else len(probes)
    x, value = x.contiguous(), None  # tangents of expanded tensors are refused
    with use("ref"):
        for j in range(count):
            if probes is None:
                v = torch.zeros_like(x).flatten(1)
                v[:, j] = 1
                v = v.view_as(x)
            else:
                v = probes[j].to(x.dtype)
            value, jv = torch.func.jvp(f, (x,), (v,))[:2]
            total = total + (v * jv).double().flatten(1).sum(1)
    if value is None or value.shape != x.shape:
        raise ValueError(
            f"density: f gives {None if value is None else list(value.shape)}, need {list(x.shape)}"
        )
    return value, total if probes is None else total / count


def transport(
    f: Field, x: Tensor, times: Sequence[float], probes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Heun's steps of ``dx = f dt`` over ``times``, and the integral of div f along them.

    Args:
        f: ``f(x, j)`` at ``times[j]``.
        x: ``[B, C, ...]`` at ``times[0]``.
        times: increasing or decreasing.
        probes: as for :func:`divergence`; the same in all steps, so that the sum is that of a
            smooth function.

    Returns:
        ``x`` at the last time, and the integral ``[B]`` float64.
    """

    def at(j: int) -> Callable[[Tensor], Tensor]:
        return lambda z: f(z, j)

    integral = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    for j in range(len(times) - 1):
        dt = times[j + 1] - times[j]
        here, div = divergence(at(j), x, probes)
        ahead, div_ahead = divergence(at(j + 1), x + dt * here, probes)
        x = x + 0.5 * dt * (here + ahead)
        integral = integral + 0.5 * dt * (div + div_ahead)
    return x, integral


def standard_normal(x: Tensor, spread: float = 1.0) -> Tensor:
    """``log N(x; 0, spread^2)`` ``[B]`` float64, summed over dimensions."""
    z = x.double().flatten(1) / spread
    return (-0.5 * z.square() - 0.5 * math.log(2 * math.pi) - math.log(spread)).sum(1)


def _probes(run: Run, count: int | None, dtype: torch.dtype) -> Tensor | None:
    if count is None:
        return None
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"density: probes is {count!r}, need an integer of at least 1, or None")
    return torch.stack(
        [
            rademacher(run.x.shape, Noise(run.seeds, run.slots, j, PROBE_STREAM), dtype)
            for j in range(count)
        ]
    )


@torch.no_grad()
def log_density(
    model: Callable[..., Tensor], x: Tensor, *, probes: int | None = None, **settings: Any
) -> Density:
    """Log density of clean samples under a diffusion model, without caches.

    Args:
        model, settings: as for :func:`fastdiff.samplers.sample`; the levels are those of the
            sampler ("ddim" where none is given), each visited once. ``guidance`` above 1 gives the
            density of the guided path.
        x: ``[B, C, ...]``, taken for ``x / alpha`` at the cleanest level that the model knows.
        probes: Hutchinson probes, the same in all steps; None: the exact trace, which asks the
            model once for each dimension and half step.

    Returns:
        :class:`Density`: the noise that the sample comes from, and the log density in nats.

    Raises:
        ValueError: an argument does not fit.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"density: x is {type(x).__name__}, need a tensor")
    uncached("density", model, "which have no divergence")
    run = Run(model, x, **settings)
    n = len(run)
    if run.clip is not None or run.rescale:
        raise ValueError("density: clip or guidance_rescale is given, need neither")
    tau = (run.sigma / run.alpha)[:n]
    if not torch.isfinite(tau).all() or (tau[1:] >= tau[:-1]).any():
        raise ValueError(
            "density: levels do not fall from a finite sigma / alpha, need a sampler that visits "
            "each once and a schedule with alpha above 0 (of a flow: levels after the first)"
        )
    levels = list(range(n))[::-1]  # the cleanest first

    def eps(u: Tensor, j: int) -> Tensor:
        i = levels[j]
        state = float(run.alpha[i]) * u
        return run.eps(i, run.combined(run.predict(i, state)), state)

    times = [float(tau[i]) for i in levels]
    u, integral = transport(eps, run.x, times, _probes(run, probes, run.x.dtype))
    # What x is at the noisiest level, to alpha^2: data of variance 1 under noise.
    spread = math.hypot(1.0, times[-1])
    return Density(float(run.alpha[0]) * u, standard_normal(u, spread) + integral)


@dataclass(frozen=True, eq=False)
class _Nodes:
    """A call at each of some times of an interpolant."""

    times: Tensor

    def table(self, schedule: Schedule, steps: int, prediction: str, clip: float | None) -> Table:
        one = torch.ones_like(self.times)
        return build(TIME * self.times, {"c_x": one}, at=(one, one), clip=None)


@torch.no_grad()
def interpolant_log_density(
    network: Callable[..., Tensor],
    x: Tensor,
    base: Callable[[Tensor], Tensor],
    *,
    interpolant: Interpolant | None = None,
    fields: str = "b,s",
    backward: bool = False,
    steps: int = 50,
    start: float = 0.0,
    stop: float = 1.0,
    probes: int | None = None,
    **settings: Any,
) -> Density:
    """Log density of states of rho_1 (backward: of rho_0) from that of the other end.

    Args:
        network, interpolant, fields, start, stop: of
            :func:`fastdiff.methods.interpolant.interpolate`.
        x: ``[B, C, ...]`` of the law whose density is asked for.
        base: ``log rho(x [B, C, ...]) -> [B]`` of the other.
        backward: x is of rho_0, base of rho_1.
        steps, probes: of equal length; as for :func:`log_density`.
        settings: classes, guidance, seed of a run.

    Raises:
        ValueError: an argument does not fit.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"density: steps is {steps!r}, need an integer of at least 1")
    uncached("density", network, "which have no divergence")
    drift = Velocity(network, interpolant, fields)
    times = Drift(not backward, start=start, stop=stop).times(steps)  # of rho_1: back in time
    run = Run(drift, x, prediction="eps", sampler=_Nodes(times), **settings)

    def b(z: Tensor, j: int) -> Tensor:
        return run.combined(run.predict(j, z)).to(z.dtype)

    end, integral = transport(b, run.x, times.tolist(), _probes(run, probes, run.x.dtype))
    logp = base(end)
    if logp.shape != x.shape[:1]:
        raise ValueError(f"density: base gives {list(logp.shape)}, need [{x.shape[0]}]")
    return Density(end, logp.double() + integral)
