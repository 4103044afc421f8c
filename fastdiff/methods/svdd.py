r"""Soft value-based decoding (Li et al. 2024, arXiv:2408.08252): of K candidates for the next state
one goes on, with probability proportional to ``exp(v / alpha)``.

    x_s^(k) ~ p(x_s | x_t),   v_k = r(x0_hat(x_s^(k))),   x_s = x_s^(j),  j ~ softmax(v / alpha)

The candidates share the model call at ``x_t``. The call that gives a candidate its value is, for
the one that is chosen, the next step's: K calls a sample and step in the place of 2 K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.methods import particles as ps
from fastdiff.methods.fk import RESAMPLE_STREAM, Reward, rewards_of
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops.fused_step import Noise

SELECT = ("soft", "argmax")


def svdd(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    reward: Reward,
    *,
    candidates: int = 8,
    alpha: float = 1.0,
    select: str = "soft",
    value: Callable[[Tensor, Tensor], Tensor] | None = None,
    share: bool = True,
    micro_batch: int | None = None,
    callback: Callable[[int, Trajectory], None] | None = None,
    check: bool = True,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample with the best of ``candidates`` next states at every step.

    Args:
        model, x, cache, settings: as for :func:`fastdiff.sample`; the sampler has to draw noise.
        reward: ``reward(x0 [N, C, ...]) -> [N]``.
        candidates: K; candidate k of sample b draws from slot ``K b + k``. 1 is plain sampling.
        alpha: temperature of "soft", above 0.
        select: "soft" draws by ``exp(v / alpha)`` as the paper has it, "argmax" takes the largest
            as its public code does: another law.
        value: ``value(x_s [N, C, ...], t [N]) -> [N]``: a value of its own in the place of the
            reward of the predicted x0; candidates then need no model call, and K is free.
        share: False calls the model anew for the chosen candidates: the same result, for checks.
        check: the host looks at the end whether every choice had a candidate with a value; False
            where the loop is captured: nothing then waits.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit.
        Degenerate: all candidates of a sample have a value of -inf or NaN.
    """
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise ValueError(f"svdd: candidates is {candidates!r}, need an integer of at least 1")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise ValueError(f"svdd: alpha is {alpha!r}, need a number above 0")
    if select not in SELECT:
        raise ValueError(f"svdd: select is {select!r}, need one of {', '.join(SELECT)}")
    settings.setdefault("sampler", "ddpm")
    k = candidates
    with running(model, x, cache=cache, **settings) as run:
        samples, n = run.batch, len(run)
        if value is not None and run.watched:
            raise ValueError(
                "svdd: value is given and cache has RegionAdaptive, which follows every row's "
                "prediction; need another cache"
            )
        run.fork(k)
        run.start()
        dead = torch.zeros(samples, dtype=torch.bool, device=run.x.device)
        rows = torch.arange(samples, device=run.x.device)[:, None] * k
        m: Tensor | None = None
        for i in range(n):
            if value is not None:  # the K copies of a sample are equal here, and one is asked
                y = None if run.y is None else run.y[::k]
                m = run.predict(i, run.x[::k], y=y).repeat_interleave(k, 1)
                if run.variance is not None:
                    run.variance = run.variance.repeat_interleave(k, 0)
            elif m is None or not share:
                m = run.predict(i)
            run.step(i, m)
            last, ahead = i == n - 1, None
            if last or value is None:
                x0 = run.x
                if not last:
                    ahead = run.predict(i + 1)
                    x0 = run.x0(i + 1, run.combined(ahead))
                v = rewards_of(reward, x0, micro_batch)
            else:
                v = value(run.x, run.times[i + 1].expand(run.batch)).double()
            logw = (v / alpha).view(samples, k)
            dead |= ~(logw > -torch.inf).any(1)
            if k > 1:
                chosen = ps.argmax(logw) if select == "argmax" else _soft(run, logw)
                index = (rows + chosen).expand(samples, k).flatten()
                run.permute(index)
                ahead = None if ahead is None else ahead[:, index]
            m = ahead
            if callback is not None:
                callback(i, run)
        if check and bool(dead.any()):
            raise ps.Degenerate(
                f"svdd: all {k} candidates of a sample had values of -inf or NaN, need one finite"
            )
        return run.x[::k].contiguous()


def _soft(run: Trajectory, logw: Tensor) -> Tensor:
    k = logw.shape[1]
    noise = run.noise(RESAMPLE_STREAM)
    drawn = Noise(run.seeds[::k], run.slots[::k], noise.step, noise.stream)
    return ps.gumbel(logw, ps.uniform(tuple(logw.shape), drawn))
