r"""DDIM inversion (Song et al. 2021, arXiv:2010.02502, eq. 14 read backwards; Dhariwal & Nichol
2021, arXiv:2105.05233, appendix F): from a clean state to the noise that would give it.

    eps = eps_theta(x_s, t),   x_t = alpha_t (x_s - sigma_s eps) / alpha_s + sigma_t eps,   s < t

The model is asked at the cleaner state with the time of the noisier level, so that every level's
time is used once in either direction. The error of a whole inversion is of order 1/n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdiff.methods.store import Plan, Store
from fastdiff.methods.trajectory import Trajectory, running


def clean(who: str, x: Any) -> Tensor:
    """``x``, which has to be a state and not the shape of one.

    Raises:
        ValueError: it is not a tensor.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{who}: x is {x!r}, need a tensor [B, C, ...], a clean state")
    return x


def ddim_inversion(
    model: Callable[..., Tensor],
    x: Tensor,
    *,
    until: int = 0,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Store:
    """The states that lead from noise to ``x``.

    Args:
        model, cache, settings: as for :func:`fastdiff.sample`; ``classes`` describe ``x``. Of the
            sampler the levels alone are used.
        x: ``[B, C, ...]``, clean.
        until: noisiest level to go to, 0 is the first of a run.
        callback: ``callback(i, run)`` when level i is reached.

    Returns:
        :class:`~fastdiff.methods.store.Store` with the states of the levels n (``x`` itself) to
        ``until``.

    Raises:
        ValueError: an argument does not fit, or the model predicts x0, which says nothing about
            the noise at the clean end.
    """
    with running(model, clean("ddim_inversion", x), cache=cache, **settings) as run:
        n = len(run)
        if isinstance(until, bool) or not isinstance(until, int) or not 0 <= until < n:
            raise ValueError(f"ddim_inversion: until is {until!r}, need a level from 0 to {n - 1}")
        run.dirty()
        store = Store(Plan.of(run, range(n - 1, until - 1, -1)))
        store.keep(n, run.x)
        for i in reversed(range(until, n)):
            m = run.predict(i)
            run.back(i, m)
            store.keep(i, run.x)
            if callback is not None:
                callback(i, run)
        return store
