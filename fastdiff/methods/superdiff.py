r"""Superposition of diffusion models (Skreta et al. 2024, arXiv:2412.17762): several models, or
several conditions of one, sample together, weighted by how dense each finds the state on its way.

With ``u = x / alpha`` and ``tau = sigma / alpha`` a step from tau to tau' changes the log density
of model i at the moving state by (Ito, without a divergence; scores ``s_i = -eps_i / tau``)

    d log q_i(u) = <du, s_i> - 1/2 (tau^2 - tau'^2) |s_i|^2
    log q_i(x) = log q_i(u) - d log alpha      in d dimensions
    OR:  kappa = softmax(T log q + l)          a sample of the mixture of the models
    AND: sum kappa = 1 and d log q_i = d log q_j for all i, j: the densities stay in balance

The step itself is the sampler's with ``eps = sum_i kappa_i eps_i``. In u it is ``du = base + h
sum_i kappa_i s_i``, base what it is without a score (its noise), so AND asks of kappa

    b_i + h sum_j <s_i, s_j> kappa_j  equal for all i,    b_i = <base, s_i> - 1/2 D <s_i, s_i>

Where the scores agree that has no answer: a ridge keeps kappa near 1/K, a clamp bounds it.
Differences of ``log q`` are good to the order of a step where the models' covariances are alike
(elsewhere a part of half that order remains), absolute values to its root.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops.fused_step import COLUMNS, philox_normal
from fastdiff.samplers.run import STEP_STREAM, prediction_of
from fastdiff.samplers.table import to_eps, to_x0

KINDS = ("or", "and")
INDEPENDENT = "superdiff: density estimates add up the scores of every step"


class Superposed(NamedTuple):
    """``x [B, C, ...]``; estimates ``logq [B, K]`` float64 of each model's log density at x (their
    differences are what counts); the weights of every step ``kappa [n, B, K]`` float64."""

    x: Tensor
    logq: Tensor
    kappa: Tensor


def or_weights(logq: Tensor, temperature: float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    """``softmax(temperature logq + bias)`` ``[B, K]``, in float64."""
    return torch.softmax(temperature * logq.double() + bias, 1)


def and_weights(b: Tensor, gram: Tensor, h: float, ridge: float, clamp: float) -> Tensor:
    """kappa ``[B, K]`` of sum 1 for which ``b + h gram kappa`` is the same for all models.

    Args:
        b: ``[B, K]``; gram: ``[B, K, K]``, scalar products of the scores; float64.
        h: what the step makes of a score.
        ridge: times the mean square of the scores: what is added to the system.
        clamp: the largest ``|kappa - 1/K|``.
    """
    k = b.shape[1]
    # An orthonormal basis of the changes of kappa that keep its sum (rows of Helmert's matrix).
    basis = b.new_zeros(k - 1, k)
    for i in range(1, k):
        basis[i - 1, :i] = 1 / math.sqrt(i * (i + 1))
        basis[i - 1, i] = -math.sqrt(i / (i + 1))
    even = torch.full_like(b, 1 / k)
    right = (b + h * (gram @ even[..., None])[..., 0]) @ basis.T
    system = h * (basis @ gram @ basis.T)
    square = gram.diagonal(dim1=1, dim2=2).mean(1)
    system = system + abs(h) * ridge * square[:, None, None] * torch.eye(
        k - 1, dtype=b.dtype, device=b.device
    )
    if k == 2:
        change = -right / torch.where(system[:, 0] != 0, system[:, 0], math.inf)
    else:
        change = -torch.linalg.solve_ex(system, right[..., None]).result[..., 0]
    away = (change @ basis).nan_to_num(nan=0.0)
    most = away.abs().amax(1, keepdim=True)
    return even + away * (clamp / torch.where(most > clamp, most, clamp))


def _change(eps: Tensor, other: Tensor, along: Tensor, half: float) -> Tensor:
    """``d log q`` of ``eps [B, ...]`` less that of ``other``, ``[B]`` float64: with along = du/tau
    and half = (tau^2 - tau'^2) / (2 tau^2) it is ``<other - eps, along + half (eps + other)>``."""
    return ops.sample_sums(other - eps, along + half * (eps + other), kind="product").double()


class Superposition:
    """The estimates of a run, which travel with its samples in ``run.carried["logq"]``."""

    def __init__(self, run: Trajectory, models: Sequence[Any], conditions: Sequence[Tensor | None]):
        self.run, self.models, self.conditions = run, models, conditions
        run.known_variance("superdiff")
        table = run.table
        if table.first is not None or any(table.reads) or run.clip is not None:
            raise ValueError(
                "superdiff: sampler has churn, a history or clip, need single steps that are "
                "affine in the prediction (DDIM, DDPM, Euler)"
            )
        if run.rescale:
            raise ValueError(f"superdiff: guidance_rescale is {run.rescale}, need 0")
        self.predictions = [run.prediction, *(prediction_of(m, None) for m in models[1:])]
        x = run.x.double().flatten(1)
        start = -0.5 * (x.square() + math.log(2 * math.pi)).sum(1)
        run.carried["logq"] = start[:, None].repeat(1, len(models))

    def predict(self, i: int) -> Tensor:
        """What each model says at level ``i``, in the run's kind of prediction: ``[K, B, ...]``.

        Affine maps of one level, all of them: what is mixed with weights of sum 1 is so in eps too.
        """
        run, found = self.run, []
        own, y = run.model, run.y
        at = run.alpha[i], run.sigma[i]
        a_x, a_m = (float(a) for a in to_x0(run.prediction, *at))
        try:
            for k, (model, condition) in enumerate(zip(self.models, self.conditions, strict=True)):
                run.model, run.y, run._both = model, condition, None
                m = run.combined(run.predict(i, independent=INDEPENDENT, again=k > 0))
                m = m.to(run.x.dtype)
                if self.predictions[k] != run.prediction:
                    b_x, b_m = (float(b) for b in to_x0(self.predictions[k], *at))
                    m = ((b_x - a_x) * run.x + b_m * m) / a_m
                found.append(m)
        finally:
            run.model, run.y, run._both = own, y, None
        return torch.stack(found)

    def coefficients(self, i: int) -> tuple[float, float, float]:
        """``(A, E, s)`` of the step ``x' = A x + E eps + s z``."""
        c = dict(zip(COLUMNS, self.run.table.host[i], strict=True))
        e_x, e_m = to_eps(self.run.prediction, self.run.alpha[i], self.run.sigma[i])
        ratio = c["c_m"] / float(e_m)
        return c["c_x"] - ratio * float(e_x), ratio, c["sigma"]

    def noise(self) -> Tensor:
        """What the step that comes will draw."""
        run = self.run
        drawn = run.noise(STEP_STREAM)
        run.draws[STEP_STREAM] -= 1
        return philox_normal(run.x.shape, *drawn)

    def balanced(self, i: int, eps: Tensor, ridge: float, clamp: float) -> Tensor:
        """AND's weights ``[B, K]`` of the step from level ``i``."""
        run = self.run
        (a, tau), (a_s, tau_s) = self._level(i), self._level(i + 1)
        keep, gain, spread = self.coefficients(i)
        s = -eps.double().flatten(2) / tau
        base = (keep / a_s - 1 / a) * run.x.double()
        if spread:
            base = base + spread / a_s * self.noise().double()
        gram = torch.einsum("kbd,lbd->bkl", s, s)
        b = torch.einsum("kbd,bd->bk", s, base.flatten(1))
        b = b - 0.5 * (tau**2 - tau_s**2) * gram.diagonal(dim1=1, dim2=2)
        return and_weights(b, gram, -gain / a_s * tau, ridge, clamp)

    def moved(self, i: int, eps: Tensor, x: Tensor) -> None:
        """Add what the step from level ``i`` at state ``x`` to the run's has changed."""
        (a, tau), (a_s, tau_s) = self._level(i), self._level(i + 1)
        # One rounding of x', not of x' / alpha' and x / alpha, which are large at the noisy end.
        du = (self.run.x.double() - a_s / a * x.double()) / a_s
        eps = eps.to(torch.promote_types(eps.dtype, torch.float32))
        along, half = (du / tau).to(eps.dtype), 0.5 * (tau**2 - tau_s**2) / tau**2
        # What the models differ by is a sum of its own: of two large ones its digits would be lost.
        more = [_change(eps[0], torch.zeros_like(eps[0]), along, half)]
        more += [more[0] + _change(e, eps[0], along, half) for e in eps[1:]]
        volume = x[0].numel() * math.log(a_s / a)
        self.run.carried["logq"] = self.run.carried["logq"] + torch.stack(more, 1) - volume

    def _level(self, i: int) -> tuple[float, float]:
        alpha, sigma = float(self.run.alpha[i]), float(self.run.sigma[i])
        return alpha, sigma / alpha


def superdiff(
    models: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    x: Tensor | Sequence[int],
    *,
    conditions: Sequence[Tensor | None] | None = None,
    kind: str = "or",
    temperature: float = 1.0,
    bias: Sequence[float] | Tensor | None = None,
    ridge: float = 1e-6,
    clamp: float = 100.0,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Superposed:
    """Sample from several models, or several conditions of one, at once.

    Args:
        models: K models of one schedule, each with its own prediction; or one, for all conditions.
        x: as for :func:`fastdiff.sample`.
        conditions: what each model is told, int64 ``[B]`` or None; None: nothing.
        kind: "or" or "and".
        temperature, bias: T and l (``[K]`` or ``[B, K]``) of "or".
        ridge, clamp: of "and"; ridge is relative to the scores' mean square.
        callback: ``callback(i, run)`` after every step; the run is not to be changed.
        cache, settings: of :func:`fastdiff.sample` but for ``classes``; caches are off in the calls
            of K > 1 models. The sampler takes single steps ("ddpm" where none is given).

    Returns:
        :class:`Superposed`. One model alone is plain sampling, bit for bit.

    Raises:
        ValueError: an argument does not fit.
    """
    several = [models] if callable(models) else list(models)
    told = [None] * len(several) if conditions is None else list(conditions)
    if len(several) == 1:
        several = several * max(1, len(told))
    if not several or len(told) != len(several):
        raise ValueError(f"superdiff: conditions has {len(told)} entries, need {len(several)}")
    if "classes" in settings:
        raise ValueError("superdiff: classes is given, need conditions, one for each model")
    if kind not in KINDS:
        raise ValueError(f"superdiff: kind is {kind!r}, need one of {', '.join(KINDS)}")
    for name, value, low in (("temperature", temperature, 0), ("ridge", ridge, 0)):
        if not isinstance(value, int | float) or not low <= value < math.inf:
            raise ValueError(f"superdiff: {name} is {value!r}, need a number of at least {low}")
    if not isinstance(clamp, int | float) or not clamp > 0:
        raise ValueError(f"superdiff: clamp is {clamp!r}, need a number above 0")
    settings.setdefault("sampler", "ddpm")
    k = len(several)
    with running(several[0], x, cache=cache, classes=told[0], **settings) as run:
        device, weights = run.x.device, []
        if k > 1:
            told = [None if y is None else y.to(device) for y in told]
            told[0] = run.y
            joint = Superposition(run, several, told)
        else:
            run.carried["logq"] = run.x.new_zeros(run.batch, 1, dtype=torch.float64)
        if bias is None:
            lift = torch.zeros((), dtype=torch.float64, device=device)
        else:
            lift = torch.as_tensor(bias, dtype=torch.float64).to(device)
        if lift.shape not in ((), (k,), (run.batch, k)):
            raise ValueError(
                f"superdiff: bias is {list(lift.shape)}, need [{k}] or [{run.batch}, {k}]"
            )
        run.start()
        for i in range(len(run)):
            kappa = run.carried["logq"].new_full((run.batch, k), 1 / k)
            if k == 1:
                run.step(i, run.predict(i))
            else:
                m, before = joint.predict(i), run.x
                # At alpha 0 the state is noise alone, of which all models think alike.
                eps = run.eps(i, m) if float(run.alpha[i]) > 0 else None
                if kind == "or":
                    kappa = or_weights(run.carried["logq"], temperature, lift)
                elif eps is not None:
                    kappa = joint.balanced(i, eps, ridge, clamp)
                run.step(i, torch.einsum("kb...,bk->b...", m, kappa.to(m.dtype)))
                if eps is not None:
                    joint.moved(i, eps, before)
            weights.append(kappa)
            if callback is not None:
                callback(i, run)
        return Superposed(run.x, run.carried["logq"], torch.stack(weights))
