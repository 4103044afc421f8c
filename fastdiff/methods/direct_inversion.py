r"""Direct Inversion (Ju et al. 2023, "PnP Inversion", arXiv:2310.01506): edits from an inversion
that is exact by force.

    x*_n ... x*_0                DDIM inversion of the source
    x_{i+1} = step(x_i)          source and target together, both from x*_0
    x_{i+1}[source] = x*_{i+1}

The paper adds the difference ``x* - x`` to the source; in floating point ``x + (x* - x)`` is not
x*, so the rows are selected. The target is left alone: it differs from plain sampling by what it
reads from the source rows (shared attention), which are on the true path at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.methods.inversion import clean, ddim_inversion
from fastdiff.methods.store import Plan, Store
from fastdiff.methods.trajectory import Trajectory, running


class Edited(NamedTuple):
    """``source [B, C, ...]``, bit for bit what was inverted; ``target [B, C, ...]``, its edit; the
    inversion, for more edits of the same source."""

    source: Tensor
    target: Tensor
    store: Store


def direct_inversion(
    model: Callable[..., Tensor],
    x: Tensor,
    target: Tensor | None = None,
    *,
    classes: Tensor | None = None,
    guidance: float | Tensor = 7.5,
    inverse_guidance: float | Tensor = 1.0,
    source_calls: int | None = None,
    store: Store | None = None,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    seed: int | Tensor = 0,
    **settings: Any,
) -> Edited:
    """Edit ``x`` from what ``classes`` say it is to ``target``.

    Rows of the model's batch are the B sources and then the B targets (with guidance: both without
    condition, then both with it), so that a model that shares attention finds them.

    Args:
        model, cache, settings: as for :func:`fastdiff.sample`.
        x: ``[B, C, ...]``, clean.
        target: int64 ``[B]``; None where the model takes no classes.
        classes: of the source, int64 ``[B]``.
        guidance: scale of the way down, or one a sample ``[B]``; 7.5 is the paper's.
        inverse_guidance: scale of the inversion; 1 is the paper's.
        source_calls: after that many calls the source rows leave the batch, as nobody shares
            them any more: half the work. None: never. Caches begin anew there.
        store: an inversion of ``x`` at these levels; None: it is made.
        callback: ``callback(i, run)`` after every step.
        seed: as for :func:`fastdiff.sample`; source and target b both have the noise of sample b.

    Raises:
        ValueError: an argument does not fit, or ``store`` has other levels.
    """
    clean("direct_inversion", x)
    if (target is None) != (classes is None):
        raise ValueError(
            "direct_inversion: target and classes go together, and one of them is None"
        )
    if store is None:
        store = ddim_inversion(
            model, x, classes=classes, guidance=inverse_guidance, cache=cache, **settings
        )
    batch = len(x)
    both = None if classes is None or target is None else torch.cat((classes, target))
    seed = torch.cat((seed, seed)) if isinstance(seed, Tensor) else seed
    if isinstance(guidance, Tensor) and guidance.dim() == 1:
        guidance = torch.cat((guidance, guidance))
    start = store.state(0)
    with running(
        model, torch.cat((start, start)), cache=cache, classes=both, guidance=guidance, seed=seed,
        **settings,
    ) as run:  # fmt: skip
        n = len(run)
        store.plan.check(Plan.of(run, ()), ("table", "calls", "cache", "guidance"))
        calls = n if source_calls is None else source_calls
        if isinstance(calls, bool) or not isinstance(calls, int) or not 0 <= calls <= n:
            raise ValueError(
                f"direct_inversion: source_calls is {source_calls!r}, need an integer from 0 to {n}"
            )
        run.slots = run.slots[:batch].repeat(2)
        number = torch.arange(2 * batch, device=run.x.device)
        source = number < batch
        run.dirty()
        for i in range(n):
            if i == calls:
                keep_rows(run, number[batch:])
            m = run.predict(i)
            if i < calls:
                star = store.state(i + 1)
                run.step(i, m, select=source, stored=torch.cat((star, star)))
            else:
                run.step(i, m)
            if callback is not None:
                callback(i, run)
        return Edited(store.state(n), run.x[-batch:].contiguous(), store)


def keep_rows(run: Trajectory, index: Tensor) -> None:
    """Of the run's samples those at ``index`` (int64, on the device) go on, with their noise; what
    caches keep is dropped."""
    run.x, run.history = run.x[index], [h[index] for h in run.history]
    run.carried = {name: value[index] for name, value in run.carried.items()}
    run.seeds, run.slots = run.seeds[index], run.slots[index]
    run.y = None if run.y is None else run.y[index]
    run.weights = None if run.weights is None else run.weights[index]
    run._both = None
    run.dirty()
    if run.request is not None:
        run.request.samples = run.batch
