r"""Feynman-Kac steering (Singhal et al. 2025, arXiv:2501.06848): particles whose weights follow a
reward, so that samples come from ``p(x0) exp(lam r(x0)) / Z``.

    w <- w G(r_t)    at the chosen steps, r_t = r(x0_hat(x_t)), r = 0 before the first
    diff: G = exp(lam (r_t - r_before))
    max: G = exp(lam max_s r_s),    add: G = exp(lam sum_s r_s)
    last: G = exp(lam r(x0)) / (what G multiplied to before)

so that the weights of a whole path multiply to ``exp(lam r(x0))`` whatever the rewards in between
were: those of approximate or stale predictions cost variance, not correctness. Where particles are
not resampled their weights are kept and go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.methods import particles as ps
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops.fused_step import Noise

POTENTIALS = ("diff", "max", "add")
RESAMPLE_STREAM = 8
Reward = Callable[[Tensor], Tensor]


class Steered(NamedTuple):
    """Particles of each sample: ``x [B, K, C, ...]``, their rewards and log-weights ``[B, K]``
    (normalise over K), and how often each sample was resampled ``[B]``."""

    x: Tensor
    rewards: Tensor
    logw: Tensor
    resampled: Tensor

    def best(self) -> Tensor:
        """``[B, C, ...]``: of each sample the particle of the largest reward."""
        at = ps.argmax(self.rewards)[:, 0]
        return self.x[torch.arange(self.x.shape[0], device=self.x.device), at]


def rewards_of(reward: Reward, x: Tensor, micro_batch: int | None = None) -> Tensor:
    """``reward(x)`` in float64 ``[rows]``, ``micro_batch`` rows at a time.

    Raises:
        ValueError: it gives something else than one number a row.
    """
    parts = [x] if micro_batch is None else x.split(micro_batch)
    found = []
    for part in parts:
        value = reward(part)
        if not isinstance(value, Tensor) or value.shape != part.shape[:1]:
            what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"reward gives {what}, need a tensor [{part.shape[0]}]")
        found.append(value.double())
    return torch.cat(found) if len(found) > 1 else found[0]


class Potential:
    """Log-weights ``[B, K]`` of a run of ``B K`` rows, which travel with the samples."""

    def __init__(self, run: Trajectory, kind: str, lam: float):
        if kind not in POTENTIALS:
            raise ValueError(f"fk: potential is {kind!r}, need one of {', '.join(POTENTIALS)}")
        self.run, self.kind, self.lam = run, kind, lam
        zero = torch.zeros(run.batch, dtype=torch.float64, device=run.x.device)
        run.carried |= {"reward": zero, "spent": zero, "logw": zero}
        if kind == "max":
            run.carried["most"] = torch.full_like(zero, -math.inf)

    def update(self, r: Tensor, last: bool) -> None:
        """Rewards ``[B K]`` of this step; NaN is no weight."""
        carried, lam = self.run.carried, self.lam
        r = r.nan_to_num(nan=-math.inf)
        if last:
            more = lam * r - carried["spent"]
        elif self.kind == "diff":
            more = lam * (r - carried["reward"])
        elif self.kind == "max":
            carried["most"] = torch.maximum(carried["most"], r)
            more = lam * carried["most"]
        else:
            more = lam * (carried["reward"] + r)
        if lam == 0:
            more = torch.zeros_like(r)
        # A particle that was given up (-inf) stays so: -inf minus -inf is no number.
        gone = carried["logw"] == -math.inf
        more = more.nan_to_num(nan=-math.inf).masked_fill(gone, -math.inf)
        carried["spent"] = carried["spent"] + more
        carried["reward"] = carried["reward"] + r if self.kind == "add" else r
        carried["logw"] = carried["logw"] + more


def fk_steering(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    reward: Reward,
    *,
    particles: int = 4,
    lam: float = 10.0,
    potential: str = "diff",
    at: Sequence[int] | None = None,
    scheme: str = "systematic",
    ess_below: float = 0.5,
    micro_batch: int | None = None,
    callback: Callable[[int, Trajectory], None] | None = None,
    check: bool = True,
    cache: Any = None,
    **settings: Any,
) -> Steered:
    """Steer samples towards a reward with ``particles`` of each.

    Args:
        model, x: as for :func:`fastdiff.sample`; ``x`` is one state (or shape) for each sample.
        reward: ``reward(x0 [N, C, ...]) -> [N]``, without gradients; NaN and -inf: no weight.
        particles: K of each sample; copy k of sample b draws from slot ``K b + k``, and its first
            noise is its own where ``x`` is a shape.
        lam: strength; 0 is plain sampling.
        potential: "diff", "max" or "add".
        at: calls (0 to n - 1) whose prediction is weighed; None: every fifth of the last three
            quarters. The end always is.
        scheme: "systematic" or "multinomial".
        ess_below: resample where the effective number of particles is below this share of K.
        micro_batch: rows that ``reward`` takes at a time; None: all.
        callback: ``callback(i, run)`` after every step; the run is not to be changed.
        check: the host looks at the end whether every sample has a particle with a weight; False
            where the loop is captured: nothing then waits.
        cache, settings: of :func:`fastdiff.sample`; the sampler has to draw noise ("ddpm", DDIM
            with eta above 0, ...), or copies of one particle stay equal.

    Returns:
        :class:`Steered`; weights of the last step are in ``logw`` (the particles are not resampled
        after it: ``best()``, or a draw by ``softmax(logw)``).

    Raises:
        ValueError: an argument does not fit.
        Degenerate: all particles of a sample have a reward of -inf or NaN.
    """
    if isinstance(particles, bool) or not isinstance(particles, int) or particles < 1:
        raise ValueError(f"fk: particles is {particles!r}, need an integer of at least 1")
    if not isinstance(lam, int | float) or not math.isfinite(lam):
        raise ValueError(f"fk: lam is {lam!r}, need a finite number")
    if not 0 < ess_below <= 1:
        raise ValueError(f"fk: ess_below is {ess_below!r}, need a number in (0, 1]")
    settings.setdefault("sampler", "ddpm")
    with running(model, x, cache=cache, **settings) as run:
        samples, n = run.batch, len(run)
        steps = set(range(n // 4, n, 5) if at is None else at)
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n for i in steps):
            raise ValueError(f"fk: at is {at!r}, need calls from 0 to {n - 1}")
        run.fork(particles)
        if not isinstance(x, Tensor):
            run.x = run.drawn()
        weights = Potential(run, potential, lam)
        resampled = torch.zeros(samples, dtype=torch.int64, device=run.x.device)
        run.start()
        for i in range(n):
            m = run.predict(i)
            x0 = run.x0(i, run.combined(m)) if i in steps and i < n - 1 else None
            run.step(i, m)
            if x0 is not None:
                weights.update(rewards_of(reward, x0, micro_batch), last=False)
                drawn = run.noise(RESAMPLE_STREAM)
                noise = Noise(
                    run.seeds[::particles], run.slots[::particles], drawn.step, drawn.stream
                )
                logw = run.carried["logw"].view(samples, particles)
                found = ps.resample(logw, noise, scheme=scheme, ess_below=ess_below)
                run.permute(found.rows)
                run.carried["logw"] = found.logw.flatten()
                resampled = resampled + found.did
            if callback is not None:
                callback(i, run)
        last = rewards_of(reward, run.x, micro_batch)
        weights.update(last, last=True)
        logw = run.carried["logw"].view(samples, particles)
        if check:
            ps.check(logw)
        shape = (samples, particles, *run.x.shape[1:])
        return Steered(run.x.view(shape), last.view(samples, particles), logw, resampled)
