r"""Inpainting by replacement (RePaint: Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1; and as
text-to-image pipelines do it, pasting before every step).

    x_i <- M x_i + (1 - M) (alpha_i x_ref + sigma_i z)      fresh z at every visit of a level
    x_{i+1} = step(x_i)

RePaint goes back ``jump`` levels every ``jump`` levels, ``repeats - 1`` times each, by
``x_j ~ q(x_j | x_i)``, so that what is generated fits what is known.

A multistep sampler continues its last prediction. Where the state was pasted that prediction is
of another state: there, history "reset" makes the step one of first order. "keep" leaves it, as
some published code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops.fused_step import fused_step

HISTORY = ("reset", "keep")


def timeline(n: int, jump: int, repeats: int) -> Iterator[tuple[int, int]]:
    """Moves ``(i, j)`` of a run of n levels: a step where ``j = i + 1``, else a jump back.

    Jumps begin ``0, jump, 2 jump, ...`` levels before the clean end, as far as they fit in.
    """
    left = {n - back: repeats - 1 for back in range(0, n - jump, jump)}
    i = 0
    while True:
        if left.get(i, 0) > 0:
            left[i] -= 1
            yield i, i - jump
            i -= jump
        elif i == n:
            return
        else:
            yield i, i + 1
            i += 1


def repaint(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    reference: Tensor,
    mask: Tensor,
    *,
    history: str = "reset",
    until: int | None = None,
    jump: int = 10,
    repeats: int = 1,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Generate what ``mask`` leaves open of ``reference``.

    Args:
        model, x, cache, settings: as for :func:`fastdiff.sample`. What caches keep does not outlive
            a paste.
        reference: ``[B, C, ...]``, clean.
        mask: ``[B|1, C|1, ...]`` in [0, 1]: 1 is generated, 0 is known; all 1 is plain sampling.
        history: of multistep samplers: "reset" or "keep".
        until: levels below it are pasted; None: all, the clean end too, where the known region is
            then ``reference`` bit for bit. The number of calls: before every step, but not in the
            end.
        jump: levels that a jump goes back.
        repeats: how often the levels between two jumps are walked; 1: no jumps. RePaint has
            jump 10 and repeats 10 of 250 steps.
        callback: ``callback(i, run)`` after every step from level i.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit.
    """
    if history not in HISTORY:
        raise ValueError(f"repaint: history is {history!r}, need 'reset' or 'keep'")
    for name, value in (("jump", jump), ("repeats", repeats)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"repaint: {name} is {value!r}, need an integer of at least 1")
    with running(model, x, cache=cache, **settings) as run:
        n, table = len(run), run.table
        end = n + 1 if until is None else until
        if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end <= n + 1:
            raise ValueError(f"repaint: until is {until!r}, need a level from 0 to {n + 1}")
        two = any(table.reads) and table.multistep is None  # second calls of a step
        if two and repeats > 1:
            raise ValueError(
                f"repaint: repeats is {repeats}, but the sampler has two calls a step; need 1"
            )
        mask, reference = mask_of("repaint", mask, run.x), like("repaint", reference, run.x)

        def paste(i: int) -> None:
            if i < end and not (two and i < n and table.reads[i]):
                run.paste(mask, run.noised(reference, i), history="keep")

        run.start()
        for i, j in timeline(n, jump, repeats):
            paste(i)
            if j < i:
                run.renoise(i, j)
                continue
            m = run.predict(i)
            if not two:
                begin_anew(run, i, m, mask if i < end and history == "reset" else None)
            run.step(i, m)
            if callback is not None:
                callback(i, run)
        paste(n)
        return run.x


def begin_anew(run: Trajectory, i: int, m: Tensor, mask: Tensor | None) -> None:
    """Make the coming step of a multistep sampler one of first order where ``mask`` is not 1, and
    everywhere where it has no history: the entry before is then this step's own."""
    reads = run.table.reads[i]
    if not reads or (mask is None and len(run.history) >= reads):
        return
    w = run.weights if m.shape[0] > 1 else None
    rescale = run.rescale if m.shape[0] > 1 else 0.0
    _, own = fused_step(run.x, m, run.rows[i], w=w, rescale=rescale, keep=True)
    before = [*run.history, *[own] * reads][:reads]
    run.history = before if mask is None else [torch.where(mask == 1, h, own) for h in before]


def mask_of(who: str, mask: Any, x: Tensor) -> Tensor:
    """A mask ``[B|1, C|1, ...]`` of the state ``x``, float32, on its device.

    Raises:
        ValueError: it has another shape.
    """
    lead = [(b, c, *x.shape[2:]) for b in (x.shape[0], 1) for c in (x.shape[1], 1)]
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in lead:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{who}: mask is {found}, need [B|1, C|1, ...] of {list(x.shape)}")
    return mask.to(device=x.device, dtype=torch.float32)


def like(who: str, reference: Any, x: Tensor) -> Tensor:
    """A reference of the state's shape, in its dtype and on its device.

    Raises:
        ValueError: it has another shape.
    """
    if not isinstance(reference, Tensor) or reference.shape != x.shape:
        good = isinstance(reference, Tensor)
        found = list(reference.shape) if good else type(reference).__name__
        raise ValueError(f"{who}: reference is {found}, need a tensor {list(x.shape)}")
    return reference.to(x)
