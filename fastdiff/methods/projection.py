r"""Data consistency in every step (Kazerouni et al. 2023, arXiv:2211.07804, section 3 on inverse
problems; Wang et al. 2022, arXiv:2212.00490, algorithm 1): the predicted clean state is replaced by
the nearest one that explains the measurement.

    x0 <- x0 + H^T (H H^T)^-1 (y - H x0),   then the sampler's step with that x0

The null space of H is left to the model, its range is the measurement's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.methods.guide import schedule_of
from fastdiff.methods.operators import Operator, measured
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.samplers.table import to_x0


def correction(run: Trajectory, i: int, m: Tensor, operator: Operator, y: Tensor) -> Tensor:
    """What is to be added to the prediction ``m [B, C, ...]`` for it to mean the projected x0;
    exactly 0 where the projection changes nothing, clipping included."""
    x0 = run.x0(i, m)
    near = operator.project(x0, y)
    # From the x0 that m means before the run's clip: the step itself begins there.
    a_x, a_m = (float(a) for a in to_x0(run.prediction, run.alpha[i], run.sigma[i]))
    raw = a_x * run.x + a_m * m.to(run.x.dtype)
    return torch.where(near == x0, 0.0, (near - raw) / a_m)


def projected(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    operator: Operator,
    y: Tensor,
    *,
    weight: float | Sequence[float] | Callable[[int], float] = 1.0,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample a state that explains ``y``.

    Args:
        model, x, cache, settings: as for :func:`fastdiff.sample`. With ``clip`` the projected state
            is clipped in the step, so measurements have to lie within.
        operator: H.
        y: ``[B, ...]``, ``operator.apply`` of a state.
        weight: of the correction, in [0, 1]: a number, one for every call, or a function of the
            call's number. 0 is plain sampling, below 1 is for noisy measurements.
        callback: ``callback(i, run)`` after every step; the run is not to be changed.

    Returns:
        ``[B, C, ...]``; where the last weight is 1 it is projected once more, so that ``H x = y``
        to rounding (with a mask bit for bit).

    Raises:
        ValueError: an argument does not fit.
    """
    with running(model, x, cache=cache, **settings) as run:
        weights = schedule_of(weight, len(run))
        if not all(0 <= w <= 1 for w in weights):
            raise ValueError(f"projected: weight is {weight!r}, need numbers in [0, 1]")
        if run.rescale:
            raise ValueError(f"projected: guidance_rescale is {run.rescale}, need 0")
        y = measured(operator, run.x, y)
        run.start()
        for i in range(len(run)):
            m = run.predict(i)
            if weights[i]:  # on every branch of guidance: their weights have the sum 1
                m = m + weights[i] * correction(run, i, run.combined(m), operator, y)
            run.step(i, m)
            if callback is not None:
                callback(i, run)
        return operator.project(run.x, y) if weights[-1] == 1 else run.x
