r"""Masked discrete diffusion (MDLM: Sahoo et al. 2024, arXiv:2406.07524), and Feynman-Kac steering
of it (Singhal et al. 2025, arXiv:2501.06848).

A token is masked at time t with chance ``m_t`` (1 at the noisy end, 0 at the clean one), and of a
masked one the network says what it may be, ``p(v)``. From t to s < t,

    q_s(v) = p(v) (m_t - m_s) / m_t,   q_s(mask) = m_s / m_t      a masked token
    x_s = x_t                                                     one that is not
    v = argmax_v q_s(v) / -log u_v,    u_v ~ U(0, 1)              a draw of q_s (Gumbel-max)

The law of a token that is drawn by p at any of its steps is p: for tokens that do not depend on
each other the sampler is exact with any number of steps. Logarithms are in float64: in float32 the
largest Gumbel numbers are cut off, which is the same as a lower temperature (arXiv:2409.02908).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.methods import particles as ps
from fastdiff.methods.fk import RESAMPLE_STREAM, Potential, Reward, Steered, rewards_of
from fastdiff.ops.fused_step import Noise
from fastdiff.samplers.run import STEP_STREAM

GUESS_STREAM = 14
GUESSES = ("sample", "argmax")
Network = Callable[[Tensor, Tensor], Tensor]


class Levels(NamedTuple):
    """``t [n]``, model time 0..1000 of each call; ``masked [n + 1]`` float64, the chance of a mask
    at each level, the last 0."""

    t: Tensor
    masked: Tensor


def log_linear(steps: int) -> Levels:
    """The mask's chance is the time, evenly spaced: MDLM's schedule."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"masked: steps is {steps!r}, need an integer of at least 1")
    masked = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return Levels((1000 * masked[:-1]).float(), masked)


def log_categorical(logits: Tensor, m_t: float, m_s: float) -> Tensor:
    """``log q_s [B, L, V + 1]`` float64 of masked tokens: V values, then the mask.

    Args:
        logits: ``[B, L, V]``.
        m_t, m_s: chances of a mask before and after, ``m_s < m_t``.
    """
    values = logits.double().log_softmax(-1) + math.log((m_t - m_s) / m_t)
    stay = math.log(m_s / m_t) if m_s > 0 else -math.inf
    return torch.cat((values, torch.full_like(values[..., :1], stay)), -1)


def gumbel_argmax(logq: Tensor, noise: Noise) -> Tensor:
    """A draw ``[B, L]`` int64 of each ``exp(logq) [B, L, K]``, by the counters of ``noise``."""
    u = ps.uniform(tuple(logq.shape), noise)
    return (logq - torch.log(-torch.log(u))).argmax(-1)


class MaskedRun:
    """A run of tokens: what :class:`fastdiff.methods.trajectory.Trajectory` is of states.

    Args:
        model: ``model(tokens [B, L], t [B]) -> logits [B, L, V]``; ``t`` is in 0..1000.
        x: int64 ``[B, L]``; tokens that are not masks stay.
        mask_id: the token of the mask, at least V.
        steps: of the schedule, at least 1.
        seed: one for all, or int64 ``[B]``.
    """

    def __init__(
        self,
        model: Network,
        x: Tensor,
        *,
        mask_id: int,
        steps: int = 50,
        seed: int | Tensor = 0,
        levels: Levels | None = None,
    ):
        if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.dim() != 2:
            what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else repr(x)
            raise ValueError(f"masked: x is {what}, need torch.int64 [B, L]")
        if isinstance(mask_id, bool) or not isinstance(mask_id, int) or mask_id < 1:
            raise ValueError(f"masked: mask_id is {mask_id!r}, need an integer of at least 1")
        self.model, self.x, self.mask_id = model, x, mask_id
        self.levels = log_linear(steps) if levels is None else levels
        self.times = self.levels.t.to(x.device)
        self.masked = [float(v) for v in self.levels.masked]
        if any(b >= a for a, b in zip(self.masked, self.masked[1:], strict=False)):
            raise ValueError("masked: levels do not fall, need chances of a mask that fall to 0")
        if self.masked[-1] != 0 or len(self.masked) != len(self.times) + 1:
            raise ValueError("masked: levels end in a mask, need [n] times and [n + 1] chances")
        batch = x.shape[0]
        if isinstance(seed, Tensor):
            if seed.dtype != torch.int64 or seed.shape != (batch,):
                raise ValueError(
                    f"masked: seed is {seed.dtype} {list(seed.shape)}, need torch.int64 [{batch}]"
                )
            self.seeds = seed.to(x.device)
            self.slots = torch.zeros_like(self.seeds)
        else:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
                raise ValueError(f"masked: seed is {seed!r}, need an integer in [0, 2**63)")
            self.seeds = torch.full((batch,), seed, dtype=torch.int64, device=x.device)
            self.slots = torch.arange(batch, device=x.device)
        self.carried: dict[str, Tensor] = {}
        self.draws: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.times)

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    def noise(self, stream: int) -> Noise:
        """The next draw of a stream."""
        self.draws[stream] += 1
        return Noise(self.seeds, self.slots, self.draws[stream] - 1, stream)

    def predict(self, i: int) -> Tensor:
        """Logits ``[B, L, V]`` at level ``i``.

        Raises:
            ValueError: the model gives something else, or the mask as a value.
        """
        logits = self.model(self.x, self.times[i].expand(self.batch))
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if not isinstance(logits, Tensor) or logits.shape[:-1] != self.x.shape:
            raise ValueError(f"masked: the model gives {shape}, need {[*self.x.shape]} and V")
        if logits.shape[-1] > self.mask_id:
            raise ValueError(
                f"masked: mask_id is {self.mask_id} and the model gives {shape[-1]} values, need "
                "the mask to be none of them"
            )
        return logits

    def step(self, i: int, logits: Tensor) -> Tensor:
        """From level ``i`` to ``i + 1``: some masks become values."""
        logq = log_categorical(logits, self.masked[i], self.masked[i + 1])
        drawn = gumbel_argmax(logq, self.noise(STEP_STREAM))
        drawn = drawn.masked_fill(drawn == logits.shape[-1], self.mask_id)
        self.x = torch.where(self.x == self.mask_id, drawn, self.x)
        return self.x

    def guess(self, logits: Tensor, how: str) -> Tensor:
        """Clean tokens as the network has them: ``x0 ~ p`` ("sample") or the likeliest."""
        if how == "argmax":
            values = logits.argmax(-1)
        else:
            values = gumbel_argmax(logits.double(), self.noise(GUESS_STREAM))
        return torch.where(self.x == self.mask_id, values, self.x)

    def permute(self, index: Tensor) -> None:
        """Sample ``b`` becomes what ``index[b]`` was; whose noise is whose stays."""
        self.x = self.x[index]
        self.carried = {name: value[index] for name, value in self.carried.items()}

    def fork(self, k: int) -> None:
        """Every sample ``k`` times, next to each other; copy j of b draws from slot
        ``k slot[b] + j``."""
        number = torch.arange(k, device=self.slots.device).repeat(self.batch)
        self.x, self.seeds = self.x.repeat_interleave(k, 0), self.seeds.repeat_interleave(k)
        self.slots = self.slots.repeat_interleave(k) * k + number


@torch.no_grad()
def masked_sample(model: Network, x: Tensor, **settings: Any) -> Tensor:
    """Fill the masks of ``x``.

    Args:
        model, x, settings: of :class:`MaskedRun`.

    Returns:
        int64 ``[B, L]`` without masks; other tokens are those of ``x``.

    Raises:
        ValueError: an argument does not fit.
    """
    run = MaskedRun(model, x, **settings)
    for i in range(len(run)):
        run.step(i, run.predict(i))
    return run.x


@torch.no_grad()
def masked_fk(
    model: Network,
    x: Tensor,
    reward: Reward,
    *,
    particles: int = 4,
    lam: float = 10.0,
    potential: str = "diff",
    at: Sequence[int] | None = None,
    guess: str = "sample",
    scheme: str = "systematic",
    ess_below: float = 0.5,
    micro_batch: int | None = None,
    **settings: Any,
) -> Steered:
    """Fill the masks of ``x`` so that samples come from ``p(x0) exp(lam r(x0)) / Z``.

    Args:
        model, x, settings: of :class:`MaskedRun`.
        reward: ``reward(x0 [N, L]) -> [N]`` of clean tokens; NaN and -inf: no weight.
        particles, lam, potential, at, scheme, ess_below, micro_batch: of
            :func:`fastdiff.methods.fk.fk_steering`.
        guess: of the clean tokens on the way: "sample" or "argmax".

    Returns:
        :class:`fastdiff.methods.fk.Steered`, of tokens ``[B, K, L]``.

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
    if guess not in GUESSES:
        raise ValueError(f"masked: guess is {guess!r}, need one of {', '.join(GUESSES)}")
    run = MaskedRun(model, x, **settings)
    samples, n = run.batch, len(run)
    steps = set(range(n // 4, n, 5) if at is None else at)
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n for i in steps):
        raise ValueError(f"fk: at is {at!r}, need calls from 0 to {n - 1}")
    run.fork(particles)
    anyone: Any = run  # a potential needs no more than a batch and what is carried
    weights = Potential(anyone, potential, lam)
    resampled = torch.zeros(samples, dtype=torch.int64, device=run.x.device)
    for i in range(n):
        logits = run.predict(i)
        run.step(i, logits)
        if i in steps and i < n - 1:
            weights.update(rewards_of(reward, run.guess(logits, guess), micro_batch), last=False)
            drawn = run.noise(RESAMPLE_STREAM)
            groups = slice(None, None, particles)
            noise = drawn._replace(seed=run.seeds[groups], slot=run.slots[groups])
            logw = run.carried["logw"].view(samples, particles)
            found = ps.resample(logw, noise, scheme=scheme, ess_below=ess_below)
            run.permute(found.rows)
            run.carried["logw"] = found.logw.flatten()
            resampled = resampled + found.did
    last = rewards_of(reward, run.x, micro_batch)
    weights.update(last, last=True)
    logw = run.carried["logw"].view(samples, particles)
    ps.check(logw)
    shape = (samples, particles, run.x.shape[1])
    return Steered(run.x.view(shape), last.view(samples, particles), logw, resampled)
