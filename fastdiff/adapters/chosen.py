"""Several adapters of one kind in a network, of which every sample of a batch has one or none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.adapters.base import Adapter, kept


class Chosen(Adapter):
    """An adapter with ``slots``; :meth:`choose` says which sample has which.

    Attributes:
        slots: how many there are.
        ids: what :meth:`choose` got, int64 ``[B]``, or None.
    """

    slots: int
    ids: Tensor | None

    def choose(self, ids: Sequence[int] | Tensor | None) -> None:
        """The adapter of every sample of the batches to come; 0 is none, a + 1 the one in slot a.

        A batch of several times as many rows repeats them (branches of guidance: all conditional,
        all unconditional). As many ids as before are copied to where they were: captured programs
        go on. None: all samples have the one in slot 0.

        Raises:
            ValueError: an id is outside of 0 to ``slots``.
        """
        if ids is None:
            self.ids = None
            self._turns += 1
            return
        given = torch.as_tensor(ids)
        whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        fits = whole and given.dim() == 1 and len(given) > 0
        if fits and given.device.type == "cpu":  # elsewhere looking at them would wait
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
        self._turns += 1

    def _ids(self, rows: int) -> Tensor | None:
        if self.ids is None:
            if self.slots == 1:
                return None
            return torch.ones(rows, dtype=torch.int64, device=self._where)
        if rows % len(self.ids):
            raise ValueError(
                f"{self.method}: a batch has {rows} rows, need a multiple of the {len(self.ids)} "
                "ids that choose() got"
            )
        return self.ids.repeat(rows // len(self.ids))

    @property
    def _where(self) -> torch.device:
        device: torch.device = next(itertools.chain(self.parameters(), self.buffers())).device
        return device
