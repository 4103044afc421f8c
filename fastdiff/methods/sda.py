r"""Diffusion-driven adaptation of test inputs: DDA (Gao et al. 2022, arXiv:2207.03442), also the
last stage of SDA (Guo et al. 2024, arXiv:2406.04295), which fine-tunes on its output.

    x_N = alpha_N x_ref + sigma_N z                        N: half way
    x_s = step(x_t) - scale grad_{x_t} || phi(x_ref) - phi(x0_hat(x_t)) ||_2

``phi`` is a linear low-pass filter, down and up by a factor: the coarse content stays that of the
reference, the rest is drawn anew. The gradient goes through the model. The norm is one for each
sample; with scope "batch" it is one for all, as in public code, where guidance shrinks as
``1 / sqrt(B)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastdiff.methods.guide import Guide, norms, schedule_of
from fastdiff.methods.trajectory import Trajectory, running

Filter = Callable[[Tensor], Tensor]
MODES = ("box", "bicubic")


def low_pass(factor: int = 4, mode: str = "box") -> Filter:
    """Down and up by ``factor`` over the last two dimensions of ``[B, C, H, W]``.

    "box": means over squares, a projection (``phi(phi(x)) = phi(x)``); H and W have to be multiples
    of ``factor``. "bicubic": as the paper's, with antialiasing; any size of at least ``factor``.
    """
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ValueError(f"sda: factor is {factor!r}, need an integer of at least 1")
    if mode not in MODES:
        raise ValueError(f"sda: mode is {mode!r}, need one of {', '.join(MODES)}")

    def phi(x: Tensor) -> Tensor:
        if x.dim() != 4 or min(x.shape[2:]) < factor:
            raise ValueError(
                f"sda: x is {list(x.shape)}, need [B, C, H, W] with H and W of at least {factor}"
            )
        height, width = x.shape[2:]
        if mode == "bicubic":
            small = F.interpolate(
                x, (height // factor, width // factor), mode="bicubic", antialias=True
            )
            return F.interpolate(small, (height, width), mode="bicubic", antialias=True)
        if height % factor or width % factor:
            raise ValueError(
                f"sda: x is {list(x.shape)}, need H and W that are multiples of factor {factor}"
            )
        rows, columns = height // factor, width // factor
        squares = x.reshape(*x.shape[:2], rows, factor, columns, factor)
        return squares.mean((3, 5), keepdim=True).expand_as(squares).reshape(x.shape)

    return phi


def sda(
    model: Callable[..., Tensor],
    x: Tensor,
    *,
    scale: float | Sequence[float] | Callable[[int], float] = 6.0,
    start: int | None = None,
    phi: Filter | None = None,
    scope: str = "sample",
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Bring ``x`` to the data of the model, with its coarse content kept.

    Args:
        model: as for :func:`fastdiff.sample`, differentiable.
        x: the reference, clean: ``[B, C, H, W]``, or ``[B, C, ...]`` with a ``phi`` of one's own.
        scale: of the gradient: a number, one for each call of the table, or a function of the
            call's number. 0: no gradient is taken, the sampler runs from the noised reference.
        start: call to begin with, None: half way; 0 begins from the noisiest level.
        phi: linear filter ``[B, C, ...] -> [B, ...]``; None: ``low_pass(4)``.
        scope: of the norm, "sample" or "batch".
        callback: ``callback(i, run)`` after every step; the run is not to be changed.
        cache, settings: of :func:`fastdiff.sample`; None of the sampler: "ddpm", 100 steps.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit, or the sampler keeps a history.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"sda: x is {x!r}, need a tensor [B, C, ...], the reference")
    settings = {"sampler": "ddpm", "steps": 100} | settings
    phi = low_pass() if phi is None else phi
    with running(model, x, cache=cache, **settings) as run:
        n, reference = len(run), run.x
        first = n // 2 if start is None else start
        if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < n:
            raise ValueError(f"sda: start is {start!r}, need a call from 0 to {n - 1}")
        if any(run.table.reads):
            raise ValueError(f"sda: sampler is {settings['sampler']!r}, need one of single steps")
        scales, target = schedule_of(scale, n), phi(reference)

        def energy(x0: Tensor) -> Tensor:
            away = norms(target - phi(x0), scope).flatten()
            return away if scope == "sample" else away / len(away)  # the sum is the norm

        guide = Guide(energy, through="model", scope=scope)
        run.x = run.noised(reference, first)
        for i in range(first, n):
            if scales[i] == 0:
                run.step(i, run.predict(i))
            else:
                found = guide.gradient(run, i)
                assert found.m is not None
                run.x = run.step(i, found.m) - scales[i] * found.g
            if callback is not None:
                callback(i, run)
        return run.x
