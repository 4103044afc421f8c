"""Several adapters of one kind in a network, of which every sample of a batch has one or none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.adapters.base import Adapter, kept, rows_in_work


class Chosen(Adapter):
    """An adapter with ``slots``; :meth:`choose` says which sample has which.

    Attributes:
        slots: how many there are.
        ids: what :meth:`choose` got, int64 ``[B]``, or None.
    """

    slots: int
    ids: Tensor | None

    _chosen: tuple[int, ...] | None = None
    _written = 0

    def choose(self, ids: Sequence[int] | Tensor | None) -> None:
        """The adapter of every sample of the batches to come; 0 is none, a + 1 the one in slot a.

        A batch of several times as many rows repeats them (branches of guidance: all conditional,
        all unconditional). As many ids as before are copied to where they were: captured programs
        go on. None: all samples have the one in slot 0.

        Raises:
            ValueError: an id is outside of 0 to ``slots``.
        """
        if ids is None:
            self.ids = self._chosen = None
            return
        given = torch.as_tensor(ids)
        whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        fits = whole and given.dim() == 1 and len(given) > 0
        on_host = given.device.type == "cpu"  # elsewhere looking at them would wait
        if fits and on_host:
            fits = bool(((given >= 0) & (given <= self.slots)).all())
        if not fits:
            raise ValueError(
                f"{self.method}: ids is {ids!r}, need whole numbers [B] of 0 to {self.slots}"
            )
        new = given.to(self._where, torch.int64)
        if self.ids is not None and self.ids.shape == new.shape:
            self.ids.copy_(new)
        else:
            self.ids = kept(new)
        self._chosen = tuple(given.tolist()) if on_host else None
        self._written = self.ids._version
        self._turns += not on_host

    @property
    def version(self) -> tuple[Any, ...]:
        """As :attr:`Adapter.version`; ids count by their values, so that two runs may take turns,
        each choosing its own before every step."""
        number, turns, writes = super().version
        if self.ids is None:
            return number, turns, writes, None
        own = self.ids._version
        return number, turns, writes - own, (self._chosen, own - self._written)

    def _ids(self, rows: int) -> Tensor | None:
        if self.ids is None:
            if self.slots == 1:
                return None
            return torch.ones(rows, dtype=torch.int64, device=self._where)
        some = rows_in_work()
        batch = some[0][1] if some else rows
        if batch % len(self.ids):
            raise ValueError(
                f"{self.method}: a batch has {batch} rows, need a multiple of the {len(self.ids)} "
                "ids that choose() got"
            )
        ids = self.ids.repeat(batch // len(self.ids))
        for chosen, _ in some:
            ids = ids[chosen]
        if len(ids) != rows:
            raise ValueError(
                f"{self.method}: a layer has {rows} rows where a cache computes {len(ids)} samples "
                f"of {batch}, need choose(None) or another cache"
            )
        return ids

    @property
    def _where(self) -> torch.device:
        device: torch.device = next(itertools.chain(self.parameters(), self.buffers())).device
        return device
