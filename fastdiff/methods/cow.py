r"""Cyclic One-Way diffusion (Wang et al. 2023, arXiv:2306.08247): a region is kept and spreads into
the rest, the rest does not spread into the region.

    x*_n ... x*_back                            DDIM inversion of the canvas with the seed in it
    x = x*_replace
    cycles times:
        x ~ q(x_back | x_replace)                               disturb
        at every level from back to replace:
            x <- M x + (1 - M) x*_i, then a step                reconstruct
        x <- M x + (1 - M) x*_replace
    steps to the clean end; at the level ``preserve`` once more x <- M x + (1 - M) x*_i

Levels are given as the share of the steps that is still to come there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdiff.methods.inversion import clean, ddim_inversion
from fastdiff.methods.repaint import like, mask_of
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.samplers.ddim import DDIM
from fastdiff.samplers.run import Run
from fastdiff.samplers.table import Sampler


def cow(
    model: Callable[..., Tensor],
    x: Tensor,
    mask: Tensor,
    *,
    background: Tensor | None = None,
    cycles: int = 10,
    back: float = 0.7,
    replace: float = 0.5,
    preserve: float | None = 0.4,
    sampler: Sampler | str = DDIM(eta=0.1),  # noqa: B008 (immutable)
    cycle_sampler: Sampler | str = DDIM(),  # noqa: B008
    inverse_guidance: float | Tensor | None = None,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Generate around the region of ``x`` where ``mask`` is 0.

    Args:
        model, settings: as for :func:`fastdiff.sample`; ``classes`` say what is wanted.
        x: ``[B, C, ...]``, clean: the seed at its place on a canvas.
        mask: ``[B|1, C|1, ...]`` in [0, 1]: 1 is generated, 0 is the seed's region.
        background: ``[B, C, ...]``, clean: another canvas to start from; None: ``x``.
        cycles: how often the levels from ``back`` to ``replace`` are walked.
        back, replace, preserve: shares in [0, 1), of which ``back`` is the largest; preserve None:
            nothing is pasted after the cycles.
        sampler: after the cycles; without a history.
        cycle_sampler: in the cycles, with the same levels.
        inverse_guidance: guidance of the inversion; None: that of the settings, as in the authors'
            code.
        callback: ``callback(i, run)`` after every step from level i.
        cache: of the inversion and the run; a paste drops what it keeps, so that it works after
            the cycles alone.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit.
    """
    clean("cow", x)
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 0:
        raise ValueError(f"cow: cycles is {cycles!r}, need an integer of at least 0")
    lowest = 0.0 if preserve is None else preserve
    if not 0 <= lowest <= replace <= back < 1:
        raise ValueError(
            f"cow: (preserve, replace, back) is {(preserve, replace, back)}, need shares that "
            "ascend from 0 and are below 1"
        )
    plain = Run(model, x, sampler=sampler, **settings)
    n, rows = len(plain), Run(model, x, sampler=cycle_sampler, **settings).table
    if any(plain.table.reads) or any(rows.reads):
        raise ValueError("cow: a sampler keeps a history, need samplers of single steps")
    if not (rows.alpha == plain.table.alpha and rows.sigma == plain.table.sigma):
        raise ValueError("cow: cycle_sampler has other levels than sampler, need the same")
    cycle_rows = rows.rows.to(plain.x.device)
    high, low = (n - int(share * n + 1e-9) for share in (back, replace))
    once = None if preserve is None else n - int(preserve * n + 1e-9)

    inverse = dict(settings)
    if inverse_guidance is not None:
        inverse["guidance"] = inverse_guidance
    store = ddim_inversion(model, x, until=high, sampler=sampler, cache=cache, **inverse)
    start = store
    if background is not None:
        background = like("cow", background, store.state(n))
        start = ddim_inversion(
            model, background, until=low, sampler=sampler, cache=cache, **inverse
        )
    with running(model, start.state(low), cache=cache, sampler=sampler, **settings) as run:
        mask = mask_of("cow", mask, run.x)
        run.dirty()
        for _ in range(cycles):
            run.renoise(low, high)
            for i in range(high, low):
                run.paste(mask, store.state(i))
                run.step(i, run.predict(i), rows=cycle_rows)
                if callback is not None:
                    callback(i, run)
            run.paste(mask, store.state(low))
        for i in range(low, n):
            if i == once:
                run.paste(mask, store.state(i))
            run.step(i, run.predict(i))
            if callback is not None:
                callback(i, run)
        if once == n:
            run.paste(mask, store.state(n))
        return run.x
