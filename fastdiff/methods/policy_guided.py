r"""Policy-guided diffusion (Jackson et al. 2024, arXiv:2404.06356): trajectories of a behaviour
model whose actions are moved towards those of a target policy.

With trajectories ``tau = (observation, action, reward, end)`` at every time, steps i = 0 to n - 1,

    lam_i = coef (1 - i / n + cosine sin(pi (i + 1) / n))       0 before ``delay`` and in the last
    tau^  = tau + churn noise                                   (Karras et al., algorithm 2)
    g     = d log pi(a | o) / d a,   g <- g / |g|               of tau^, or of its denoised D(tau^)
    tau^_a <- tau^_a + lam_i g                                  actions alone
    tau   <- Heun's step (or Euler's) from tau^

The step starts from the noised and guided ``tau^`` as Karras's algorithm has it. (The method's
public code takes Euler's slope at ``tau^`` and starts from the state before churn.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.methods.guide import unit
from fastdiff.methods.trajectory import running
from fastdiff.samplers.heun import Euler, Heun
from fastdiff.samplers.run import SAMPLERS

AT = ("noised", "denoised")
MORE = 2  # channels after the actions: reward, end
Policy = Callable[[Tensor, Tensor], Tensor]


def guidance_schedule(
    steps: int, coef: float = 1.0, cosine: float = 0.0, delay: int = 0
) -> list[float]:
    """``lam_i`` of every step."""
    return [
        coef * (1 - i / steps + cosine * math.sin(math.pi * (i + 1) / steps))
        if delay <= i < steps - 1
        else 0.0
        for i in range(steps)
    ]


def action_gradient(
    policy: Policy,
    tau: Tensor,
    observations: int,
    mean: Tensor,
    std: Tensor,
    squash: bool = False,
) -> Tensor:
    """``d log pi(a | o) / d a`` in normalised units, ``[B, T, D]``: 0 but for the actions.

    Args:
        policy: ``policy(o [B, T, O], a [B, T, A]) -> [B]`` or ``[B, T]``, log-probabilities.
        tau: ``[B, T, O + A + 2]``, normalised: what the policy sees is ``mean + std tau``.
        observations: O.
        mean, std: ``[D]``, or broadcast to it.
        squash: the policy sees ``tanh`` of the actions.

    Raises:
        ValueError: the policy gives something else.
    """
    acts = slice(observations, tau.shape[2] - MORE)
    with torch.enable_grad():
        a = tau[..., acts].detach().requires_grad_()
        o = (mean + std * tau)[..., :observations].detach()
        raw = mean[acts] + std[acts] * a
        logp = policy(o, raw.tanh() if squash else raw)
        if not isinstance(logp, Tensor) or logp.shape not in (tau.shape[:1], tau.shape[:2]):
            what = list(logp.shape) if isinstance(logp, Tensor) else type(logp).__name__
            b, t = tau.shape[:2]
            raise ValueError(f"policy gives {what}, need a tensor [{b}] or [{b}, {t}]")
        (own,) = torch.autograd.grad(logp.sum(), a)
    g = torch.zeros_like(tau)
    g[..., acts] = own
    return g


def _statistics(name: str, value: Tensor | None, x: Tensor, default: float) -> Tensor:
    if value is None:
        return x.new_full(x.shape[2:], default)
    if not isinstance(value, Tensor) or value.shape not in ((), x.shape[2:]):
        what = list(value.shape) if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"policy_guided: {name} is {what}, need a tensor [{x.shape[2]}]")
    return value.to(x).expand(x.shape[2:])


def policy_guided(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    policy: Policy,
    *,
    observations: int,
    coef: float = 1.0,
    cosine: float = 0.0,
    delay: int = 0,
    normalise: bool = True,
    at: str = "noised",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    squash: bool = False,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample trajectories of the behaviour model under a target policy.

    Args:
        model: of trajectories; with :class:`fastdiff.samplers.EDM` its prediction is "edm".
        x: ``[B, T, O + A + 2]`` or its shape: observations, actions, reward and end of T times.
        policy: ``policy(o [B, T, O], a [B, T, A]) -> [B]`` or ``[B, T]``, log-probabilities.
        observations: O, at least 0; A is what is left, at least 1.
        coef, cosine, delay: of ``lam``, in units of the normalised actions; coef 0 is plain
            sampling, ``delay`` counts steps without guidance.
        normalise: gradients of length 1 for every trajectory; False: as they are.
        at: "noised": the gradient at the state, without a model call; "denoised": at what the model
            predicts of it, one call more a step.
        mean, std: ``[D]``, of the data that the model was trained on; None: 0 and 1.
        squash: the policy sees ``tanh`` of the actions.
        cache, settings: of :func:`fastdiff.sample`; the sampler is "heun" (default) or "euler", or
            :class:`fastdiff.samplers.Heun` with its churn.

    Returns:
        ``[B, T, D]``, normalised.

    Raises:
        ValueError: an argument does not fit.
    """
    for name, value in (("coef", coef), ("cosine", cosine)):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"policy_guided: {name} is {value!r}, need a finite number")
    if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
        raise ValueError(f"policy_guided: delay is {delay!r}, need an integer of at least 0")
    if at not in AT:
        raise ValueError(f"policy_guided: at is {at!r}, need one of {', '.join(AT)}")
    sampler = settings.setdefault("sampler", "heun")
    if not isinstance(SAMPLERS.get(sampler) if isinstance(sampler, str) else sampler, Euler | Heun):
        raise ValueError(f"policy_guided: sampler is {sampler!r}, need Euler or Heun")
    with running(model, x, cache=cache, **settings) as run:
        shape = list(run.x.shape)
        o = observations
        if run.x.dim() != 3 or isinstance(o, bool) or not isinstance(o, int) or o < 0:
            raise ValueError(
                f"policy_guided: x is {shape} and observations is {o!r}, need [B, T, D] and a count"
            )
        if shape[2] < o + 1 + MORE:
            raise ValueError(
                f"policy_guided: x is {shape}, need at least {o + 1 + MORE} channels for {o} "
                f"observations, an action and {MORE} more"
            )
        middle, spread = _statistics("mean", mean, run.x, 0.0), _statistics("std", std, run.x, 1.0)
        begins = [i for i in range(len(run)) if not run.table.reads[i]]  # not Heun's second calls
        lam = dict(zip(begins, guidance_schedule(len(begins), coef, cosine, delay), strict=True))
        run.start()
        for i in range(len(run)):
            if lam.get(i):
                alpha = float(run.alpha[i])
                tau = run.x / alpha
                if at == "denoised":
                    tau = run.x0(i, run.combined(run.predict(i, independent="not yet guided")))
                g = action_gradient(policy, tau, o, middle, spread, squash)
                if normalise:
                    g = unit(g)
                run.x = run.x + alpha * lam[i] * g
            run.step(i, run.predict(i))
        return run.x
