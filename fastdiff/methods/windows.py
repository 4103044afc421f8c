r"""Large images and long videos from a model of one size.

Joint windows (Bar-Tal et al. 2023, arXiv:2302.08113, eq. 4): in every step each window is predicted
by itself, and where windows overlap their predictions are averaged,

    m = sum_i w_i m_i / sum_i w_i

(the paper averages the steps; a step is linear in the prediction, so without clipping and noise of
their own this is the same). Windows may wrap around the end (360-degree panoramas, loops).

Windows in turn (Melnik et al. 2024, arXiv:2405.03150, section on long videos): a video is continued
window by window. The first frames of a window are the last of the one before: their states are
stored at every level and taken, so that the overlap is the stored one bit for bit. Noise belongs to
absolute frames: a video continued from what was stored is the one that would have been made in one
go.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops._check import wide
from fastdiff.ops.fused_step import philox_normal

FRAME_START, FRAME_STEP = 16, 17  # streams
FRAMES = 2**20  # slots of one sample's frames


def places(n: int, size: int, stride: int, wrap: bool) -> list[int]:
    """Where windows of ``size`` begin along ``n``; without ``wrap`` the last ends at ``n``."""
    if wrap:
        return list(range(0, n, stride)) if size < n else [0]
    return [*range(0, n - size, stride), n - size]


def windows(
    shape: Sequence[int], size: Sequence[int], stride: Sequence[int], wrap: Sequence[bool]
) -> list[tuple[int, ...]]:
    """First places of all windows in ``shape``, one number for each dimension.

    Raises:
        ValueError: a size or stride does not fit.
    """
    if not len(shape) == len(size) == len(stride) == len(wrap):
        raise ValueError(
            f"windows: size, stride, wrap are {tuple(size)}, {tuple(stride)}, {tuple(wrap)}, need "
            f"{len(shape)} numbers each, for {tuple(shape)}"
        )
    for n, s, d, w in zip(shape, size, stride, wrap, strict=True):
        if not (1 <= s <= n and 1 <= d <= s):
            raise ValueError(f"windows: size, stride are {s}, {d}, need 1 <= stride <= size <= {n}")
        if w and s < n and n % d:
            raise ValueError(f"windows: stride is {d}, need a divisor of {n}, which wraps around")
    along = map(places, shape, size, stride, wrap)
    return list(itertools.product(*along))


def crop(x: Tensor, place: Sequence[int], size: Sequence[int]) -> Tensor:
    """The window at ``place`` of the last dimensions; it may reach around their ends."""
    for d, (start, n) in enumerate(zip(place, size, strict=True), x.dim() - len(size)):
        if start + n <= x.shape[d]:
            x = x.narrow(d, start, n)
        else:
            head = x.shape[d] - start
            x = torch.cat((x.narrow(d, start, head), x.narrow(d, 0, n - head)), d)
    return x


def _pieces(
    place: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Where parts of a window go: slices of the whole and of the window."""
    along: list[list[tuple[slice, slice]]] = []
    for start, n, full in zip(place, size, shape, strict=True):
        head = min(n, full - start)
        parts = [(slice(start, start + head), slice(0, head))]
        if head < n:
            parts.append((slice(0, n - head), slice(head, n)))
        along.append(parts)
    for chosen in itertools.product(*along):
        yield tuple(c[0] for c in chosen), tuple(c[1] for c in chosen)


def multi_diffusion(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    *,
    size: Sequence[int],
    stride: Sequence[int],
    wrap: bool | Sequence[bool] = False,
    weight: Tensor | None = None,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample states larger than the model's.

    Args:
        model, x, cache, settings: as for :func:`fastdiff.sample`; ``x [B, C, ...]`` is the whole. A
            cache keeps every window by itself.
        size, stride: of windows, one number for every dimension after the channels.
        wrap: which of those dimensions wrap around; the stride divides those.
        weight: of every element of a window, positive, of shape ``size``; None: 1.
        callback: ``callback(i, run)`` after every step; the run is not to be changed.

    Returns:
        ``[B, C, ...]``; with one window of weight 1 plain sampling bit for bit.

    Raises:
        ValueError: an argument does not fit.
    """
    with running(model, x, cache=cache, **settings) as run:
        shape = run.x.shape[2:]
        ends = [wrap] * len(shape) if isinstance(wrap, bool) else list(wrap)
        found = windows(shape, size, stride, ends)
        if weight is not None and weight.shape != tuple(size):
            raise ValueError(f"windows: weight is {list(weight.shape)}, need {list(size)}")
        if weight is None:
            w = torch.ones(*size, device=run.x.device)
        else:
            w = weight.to(run.x.device, torch.float32)
        total = torch.zeros(*shape, device=run.x.device)
        for place in found:
            for whole, part in _pieces(place, size, shape):
                total[whole] += w[part]
        if run.watched and len(found) > 1:
            raise ValueError(
                "windows: cache has RegionAdaptive, which follows one state's tokens; need another "
                f"for {len(found)} windows"
            )
        run.start()
        for i in range(len(run)):
            summed: Tensor | None = None
            for k, place in enumerate(found):
                m = w * wide(run.predict(i, crop(run.x, place, size), again=k > 0))
                if summed is None:
                    summed = m.new_zeros(*m.shape[:3], *shape)
                for whole, part in _pieces(place, size, shape):
                    lead = (slice(None),) * 3  # branches, samples, channels
                    summed[lead + whole] += m[lead + part]
            assert summed is not None
            run.step(i, summed / total)
            if callback is not None:
                callback(i, run)
        return run.x


class Stored(NamedTuple):
    """What a video is continued from: states ``[n + 1, B, C, O, ...]`` of its last O frames at
    every level, and the absolute number of the frame after them."""

    states: Tensor
    frame: int


class Video(NamedTuple):
    """``x [B, C, F, ...]``, the new frames in full; what follows begins from ``stored``."""

    x: Tensor
    stored: Stored


def frame_noise(run: Trajectory, first: int, stream: int, number: int | Tensor) -> Tensor:
    """Standard noise like the run's state: frame f of sample b draws from slot
    ``FRAMES slot[b] + first + f``."""
    shape = run.x.shape  # [B, C, F, ...]
    frames = torch.arange(first, first + shape[2], device=run.x.device)
    slots = (run.slots[:, None] * FRAMES + frames).flatten()
    seeds = run.seeds.repeat_interleave(shape[2])
    rows = (shape[0] * shape[2], shape[1], *shape[3:])
    z = philox_normal(rows, seeds, slots, number, stream, dtype=run.x.dtype)
    return z.view(shape[0], shape[2], shape[1], *shape[3:]).movedim(1, 2)


def _window(run: Trajectory, first: int, before: Tensor | None) -> Tensor:
    """States ``[n + 1, B, C, F, ...]`` of one window whose first frame is ``first``, with those
    that ``before`` has of its first frames."""
    known = 0 if before is None else before.shape[3]

    def taken(level: int) -> None:
        if before is not None:
            run.x = torch.cat((before[level], run.x[:, :, known:]), 2)

    run.x = frame_noise(run, first, FRAME_START, 0)
    # From the first level on the stored frames are on a path of their own, smooth like that of the
    # others: caches and the histories of multistep samplers go on.
    taken(0)
    states = [run.x]
    for i in range(len(run)):
        run.step(i, run.predict(i), noise=False)
        if run.table.draws[i]:
            sigma = run.rows[i, 7].to(run.x.dtype)
            run.x = run.x + sigma * frame_noise(run, first, FRAME_STEP, i)
        taken(i + 1)
        states.append(run.x)
    return torch.stack(states)


def long_video(
    model: Callable[..., Tensor],
    shape: Sequence[int],
    *,
    window: int,
    overlap: int,
    after: Stored | None = None,
    cache: Any = None,
    **settings: Any,
) -> Video:
    """Sample a video window by window, or continue one.

    Args:
        model, cache, settings: as for :func:`fastdiff.sample`; samplers with churn at the first
            level are not taken.
        shape: of the frames to make, ``[B, C, F, ...]``; F is a number of windows, each
            ``window - overlap`` new frames, the first of all ``window``.
        window: frames that the model sees.
        overlap: O, frames that a window has in common with the one before, 0 to ``window - 1``.
        after: of an earlier call with the same settings: this one goes on where that ended.

    Returns:
        :class:`Video`.

    Raises:
        ValueError: an argument does not fit.
    """
    if not 1 <= window or not 0 <= overlap < window:
        raise ValueError(
            f"long_video: window, overlap are {window}, {overlap}, need 0 <= overlap < window"
        )
    new = window - overlap
    most = shape[2] - (overlap if after is None else 0)
    if len(shape) < 3 or most < new or most % new:
        first = f"{window} + " if after is None else ""
        raise ValueError(f"long_video: shape is {list(shape)}, need {first}k x {new} frames")
    if after is not None and after.states.shape[3] != overlap:
        raise ValueError(
            f"long_video: after has {after.states.shape[3]} frames, need overlap = {overlap}"
        )
    before = None if after is None or overlap == 0 else after.states
    frame = 0 if after is None else after.frame
    found: list[Tensor] = []
    while sum(part.shape[2] for part in found) < shape[2]:
        known = 0 if frame == 0 else overlap
        size = (shape[0], shape[1], window, *shape[3:])
        with running(model, size, cache=cache, **settings) as run:
            if run.table.first is not None:
                raise ValueError("long_video: the sampler has churn at the first level, need none")
            if before is not None and before.shape[0] != len(run) + 1:
                raise ValueError(
                    f"long_video: after has {before.shape[0]} levels, need {len(run) + 1}"
                )
            states = _window(run, frame - known, before)
        found.append(states[-1][:, :, known:])
        frame += window - known
        before = states[:, :, :, window - overlap :] if overlap else None
    empty = states[:, :, :, window - overlap :]
    return Video(torch.cat(found, 2), Stored(empty, frame))
