"""What a run keeps of tokens from step to step: keys, values and outputs, and the choice of tokens.

Everything lies in memory that stays where it is (:mod:`fastdiff.engine.held`), so that programs can
be captured over it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.engine.held import Cell, Cells, permute_rows_, rows_of
from fastdiff.engine.request import Request
from fastdiff.tokens.region import forced_tokens

PART = "tokens"


class Region(NamedTuple):
    """Pixels whose tokens are always computed: bool ``[S|1, H, W]`` or ``[S|1, F, H, W]``."""

    mask: Tensor
    halo: int


_region: ContextVar[Region | None] = ContextVar("fastdiff_region", default=None)


@contextmanager
def region(mask: Tensor, halo: int = 1) -> Iterator[None]:
    """Inside the block, sparse steps always compute the tokens that touch ``mask``.

    Args:
        mask: bool or numbers (above 0.5 is inside), ``[H, W]``, ``[S, H, W]`` or ``[S, 1, H, W]``
            of any resolution with the picture's aspect; ``[S, F, H, W]`` of a video. S is the
            samples of the run, or 1.
        halo: tokens around those, in every direction, that are computed too.

    Raises:
        ValueError: ``mask`` has another shape, or ``halo`` is no integer of at least 0.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4) or 0 in mask.shape:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"region: mask is {found}, need a tensor [H, W], [S, H, W] or [S, F, H, W]"
        )
    if isinstance(halo, bool) or not isinstance(halo, int) or halo < 0:
        raise ValueError(f"region: halo is {halo!r}, need an integer of at least 0")
    mask = mask if mask.dtype == torch.bool else mask > 0.5
    mask = mask[None] if mask.dim() == 2 else mask
    mask = mask[:, 0] if mask.dim() == 4 and mask.shape[1] == 1 else mask
    token = _region.set(Region(mask, halo))
    try:
        yield
    finally:
        _region.reset(token)


def open_region() -> Region | None:
    """The region that calls in this context belong to."""
    return _region.get()


class Kept(Cells):
    """What a slot keeps: keys and values of every attention, and the output of every token.

    Attributes:
        fits, batch: what calls must have in common, and their rows.
        keys: k and v ``[B, H, T, D]`` of every attention.
        full: they are those of a step.
        output: ``[B, N, V]``.
    """

    output = Cell()

    def __init__(self, fits: Hashable, batch: int) -> None:
        super().__init__()
        self.fits, self.batch = fits, batch
        self.keys: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self.full = False

    @property
    def complete(self) -> bool:
        return bool(self.keys) and "output" in self.memory

    def tensors(self) -> Any:
        return {"cells": super().tensors(), "keys": [list(pair) for pair in self.keys.values()]}

    def look(self, step: int) -> Hashable:
        return super().look(step), self.full

    def become(self, tensors: Any, look: Any, step: int) -> None:
        super().become(tensors["cells"], look[0], step)
        self.full = look[1]
        self.keys = {o: (k, v) for o, (k, v) in zip(self.keys, tensors["keys"], strict=True)}

    def forget(self) -> None:
        super().forget()
        self.full = False

    def permute(self, index: Tensor, samples: int) -> int:
        for value in (self.output, *(t for pair in self.keys.values() for t in pair)):
            if value is not None:
                permute_rows_(value, index, samples)
        return 0


class Choice(Cells):
    """The tokens of a run's samples: those of the step, and how long the others were left out.

    Attributes:
        step: the last one that was counted.
        chosen_at: the last one at which tokens were chosen.
        owed: a dense step at which a block cache left out all blocks is still to come.
        index: ``[S, A]``, the choice of the last sparse step, None where it was all tokens.
        fresh: bool ``[S, N]``, tokens that ran when their sample's blocks last ran; None: all.
        drops: int32 ``[S, N]``, how often in a row each was left out.
        since: int64 ``[S, N]``, steps since the prediction of each was made; None: 0 for all.
        gaps: the same before the last step, plus 1; None: 1 for all.
        noise: float32 ``[S, N, P, C]``, what the step before the last used; for "change".
        change: float32 ``[S, N]``, by how much each token's noise changed a step when it last ran.
        grid: tokens along each dimension of the picture; None: those of a region's mask.
        region: of the run.
        forced: bool ``[S|1, N]``, its tokens.
        least: the most that a sample has of them.
        size: S, N, and the device.
        seen: the run's prediction, where programs work on a copy of it.
    """

    index, fresh, drops, since, gaps = Cell(), Cell(), Cell(), Cell(), Cell()
    noise, change, forced, seen = Cell(), Cell(), Cell(), Cell()

    def __init__(self) -> None:
        super().__init__()
        self.step = self.chosen_at = -1
        self.owed = False
        self.grid: Sequence[int] | None = None
        self.region: Region | None = None
        self.least = 0
        self.size: tuple[int, int, torch.device] | None = None

    @classmethod
    def of(cls, request: Request, network: nn.Module) -> Choice:
        """That of the run."""
        found: Choice = request.state.setdefault((id(network), PART), cls())
        return found

    def run(self, ran: Tensor | None, rows: Tensor | None) -> None:
        """Blocks run the tokens ``ran [S, N]`` (None: all) of the rows ``rows`` of a batch."""
        if rows is None:
            self.fresh = ran
        elif self.drops is not None:
            here = self._of_samples(rows)
            ran = torch.ones_like(self.drops, dtype=torch.bool) if ran is None else ran
            fresh = torch.ones_like(ran) if self.fresh is None else self.fresh
            self.fresh = torch.where(here, ran, fresh)

    def _of_samples(self, rows: Tensor) -> Tensor:
        """bool ``[S, 1]``: samples of which a branch is among the rows of a batch."""
        assert self.drops is not None
        samples = self.drops.shape[0]
        return self.drops.new_zeros(samples, dtype=torch.bool).index_fill(0, rows % samples, True)[
            :, None
        ]

    def dropped(self, drops: Tensor, rows: Tensor | None) -> None:
        """New counts, for the samples whose blocks run."""
        if rows is None or self.drops is None:
            self.drops = drops
        else:
            self.drops = torch.where(self._of_samples(rows), drops, self.drops)

    def observe(self, noise: Tensor) -> None:
        """At the start of a step, with the noise ``[S, N, P, C]`` that the last one used."""
        noise = noise.float()
        if self.noise is not None and self.noise.shape == noise.shape:
            delta = (noise - self.noise).abs().mean((2, 3))
            if self.gaps is not None:
                delta = delta / self.gaps
            if self.change is not None and self.fresh is not None:
                delta = torch.where(self.fresh, delta, self.change)
            self.change = delta
        self.noise = noise

    def expected(self) -> Tensor:
        """``[S, N]``: how much each token will have changed since it last ran."""
        assert self.change is not None
        return self.change if self.since is None else self.change * (self.since + 1)

    def tick(self, step: int) -> None:
        """At the end of the first call of a step."""
        if self.step == step:
            return
        self.step = step
        self.gaps = None if self.since is None else self.since + 1
        if self.fresh is None:
            self.since = None
            return
        gaps = self.gaps
        if gaps is None or gaps.shape != self.fresh.shape:
            gaps = self.gaps = torch.ones_like(self.fresh, dtype=torch.int64)
        self.since = gaps.masked_fill(self.fresh, 0)

    @property
    def complete(self) -> bool:
        return self.size is not None

    def force(self, region: Region | None) -> int:
        """Take over the run's region, in the choice's size; how often the host waited for that."""
        if region is None or self.size is None:
            self.region, self.forced, self.least = None, None, 0
        elif region is not self.region:
            samples, tokens, device = self.size
            mask = region.mask.to(device)
            if mask.shape[0] not in (1, samples):
                raise ValueError(f"region: mask is of {mask.shape[0]} samples, need {samples} or 1")
            grid = self.grid or aspect(tokens, mask.shape[1:])
            if len(grid) != mask.dim() - 1:
                mask = mask[:, None].expand(-1, grid[0], -1, -1) if len(grid) == 3 else mask.any(1)
            forced = forced_tokens(mask, grid, region.halo)
            self.region, self.forced, self.least = region, forced, int(forced.sum(1).max())
            return 1
        return 0

    def fill(self) -> None:
        if self.size is None:
            return
        samples, tokens, device = self.size
        for name, dtype in _PER_TOKEN.items():
            self.reserve(name, samples * tokens, dtype, device)
        if self.seen is not None:
            self.reserve("noise", self.seen.numel(), torch.float32, device)

    def look(self, step: int) -> Hashable:
        """``index`` counts within its step alone."""
        cells = tuple(p for p in sorted(self.shapes.items()) if p[0] != "index")
        index = self.shapes.get("index") if self.chosen_at == step else None
        return cells, index, self.step == step, self.chosen_at == step, self.owed, self.least

    def become(self, tensors: Any, look: Any, step: int) -> None:
        cells, index, counted, chosen, self.owed, self.least = look
        super().become(tensors, cells if index is None else (*cells, ("index", index)), step)
        self.step, self.chosen_at = (step if now else -1 for now in (counted, chosen))

    def forget(self) -> None:
        super().forget()
        self.step = self.chosen_at = -1
        self.owed, self.region, self.least = False, None, 0

    def permute(self, index: Tensor, samples: int) -> int:
        for name in self.shapes:
            if name != "forced":  # a region belongs to the place in the batch
                value = getattr(self, name)
                setattr(self, name, value[rows_of(index, samples, value.shape[0])])
        return 0


_PER_TOKEN = {
    "index": torch.int64,
    "fresh": torch.bool,
    "drops": torch.int32,
    "since": torch.int64,
    "gaps": torch.int64,
    "change": torch.float32,
    "forced": torch.bool,
}


def aspect(tokens: int, shape: Sequence[int]) -> tuple[int, int]:
    """The grid of so many tokens with the aspect of a mask ``(H, W)``."""
    height, width = shape[-2:]
    rows = round((tokens * height / width) ** 0.5)
    if not rows or tokens % rows or rows * width != tokens // rows * height:
        raise ValueError(
            f"region: mask is {height} x {width}, of which {tokens} tokens are no grid; need the "
            "aspect of the picture"
        )
    return rows, tokens // rows


def gaps_of(request: Request, network: nn.Module, x: Tensor) -> Tensor | None:
    """How many steps ago the prediction of each element of the state ``x`` was made before that of
    the step in work: int64 that broadcasts to ``x``; None: 1 for all, or not known."""
    choice: Choice | None = request.state.get((id(network), PART))
    if choice is None or choice.gaps is None or choice.gaps.shape[0] != x.shape[0]:
        return None
    if x.dim() == 3:
        return choice.gaps[:, :, None]
    if choice.grid is None:
        return None
    gaps = choice.gaps.unflatten(1, tuple(choice.grid))[:, None]
    for i, size in enumerate(x.shape[2:]):
        gaps = gaps.repeat_interleave(size // gaps.shape[2 + i], 2 + i)
    return gaps
