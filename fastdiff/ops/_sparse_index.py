"""Positions of trainable entries in a weight, as ``ops.sparse_grad`` takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_MOST = 2**31 - 1  # of an int32


def rows_of_entries(crow: Tensor, count: int) -> Tensor:
    """int64 ``[count]``: the row of every entry of a CSR; no wait for the device."""
    rows = torch.arange(crow.shape[0] - 1, device=crow.device)
    return torch.repeat_interleave(rows, crow.diff(), output_size=count)


@dataclass(frozen=True)
class SparseIndex:
    """The CSR of a weight's trainable entries, or of blocks of them, in the order of its rows.

    Attributes:
        crow: int32 ``[O / block_rows + 1]``: entries (blocks) of row r are those from ``crow[r]``
            to ``crow[r + 1]``.
        col: int32 ``[nnz]``: their columns (in blocks), ascending and distinct within a row; of a
            convolution's weight those of ``weight.view(O, -1)``.
        shape: of the weight, ``[O, ...]``.
        block: rows and columns of a block; ``(1, 1)``: single entries.

    The constructors below check values too, and wait for the device; this one does not.

    Raises:
        ValueError: a dtype, shape, device or layout differs from the above.
    """

    crow: Tensor
    col: Tensor
    shape: tuple[int, ...]
    block: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _shape(self.shape))
        object.__setattr__(self, "block", tuple(self.block))
        (down, across), (rows, columns) = self.block, self.sizes
        if down < 1 or across < 1 or rows % down or columns % across:
            raise ValueError(
                f"SparseIndex: block is {self.block}, need divisors of {rows} rows and {columns} "
                "columns"
            )
        for name, t in (("crow", self.crow), ("col", self.col)):
            if not isinstance(t, Tensor):
                raise ValueError(f"SparseIndex: {name} is {type(t).__name__}, need a torch.Tensor")
            if t.dtype != torch.int32 or t.layout != torch.strided or t.dim() != 1:
                raise ValueError(
                    f"SparseIndex: {name} is {t.dtype} of shape {list(t.shape)}, need a vector of "
                    "torch.int32"
                )
            if not t.is_contiguous():
                object.__setattr__(self, name, t.contiguous())
        if self.crow.shape[0] != rows // down + 1:
            raise ValueError(
                f"SparseIndex: crow has shape {list(self.crow.shape)}, need [{rows // down + 1}]"
            )
        if self.crow.device != self.col.device:
            raise ValueError(
                f"SparseIndex: col is on {self.col.device}, need {self.crow.device}, the device of "
                "crow"
            )

    @classmethod
    def of_mask(cls, mask: Tensor) -> SparseIndex:
        """The entries where ``mask``, bool of the weight's shape, is true.

        Raises:
            ValueError: ``mask`` is not bool, or has fewer than two dimensions.
        """
        return cls.of_blocks(mask, (1, 1), mask.shape if isinstance(mask, Tensor) else ())

    @classmethod
    def of_blocks(
        cls, block_mask: Tensor, block: tuple[int, int], shape: Sequence[int] | None = None
    ) -> SparseIndex:
        """The blocks where ``block_mask``, bool ``[O / rows, K / columns]``, is true.

        Args:
            block_mask: one value for every block of ``weight.view(O, K)``.
            block: rows and columns of a block.
            shape: of the weight; None: two dimensions.

        Raises:
            ValueError: ``block_mask`` is not bool, or does not fit ``shape``.
        """
        name = "mask" if tuple(block) == (1, 1) else "block_mask"
        if not isinstance(block_mask, Tensor) or block_mask.dtype != torch.bool:
            kind = block_mask.dtype if isinstance(block_mask, Tensor) else type(block_mask).__name__
            raise ValueError(f"SparseIndex: {name} is {kind}, need torch.bool")
        if block_mask.dim() < 2:
            raise ValueError(
                f"SparseIndex: {name} has shape {list(block_mask.shape)}, need at least 2 "
                "dimensions"
            )
        flat = block_mask.reshape(block_mask.shape[0], math.prod(block_mask.shape[1:]))
        if shape is None:
            shape = (flat.shape[0] * block[0], flat.shape[1] * block[1])
        rows, columns = _sizes(_shape(shape))
        if flat.shape[0] * block[0] != rows or flat.shape[1] * block[1] != columns:
            raise ValueError(
                f"SparseIndex: {name} has shape {list(block_mask.shape)} with blocks of {block[0]} "
                f"x {block[1]}, need a weight of shape {list(shape)}"
            )
        return cls(_starts(flat.sum(1)), flat.nonzero()[:, 1].int(), tuple(shape), block)

    @classmethod
    def of_positions(
        cls, positions: Tensor | tuple[Tensor, Tensor], shape: Sequence[int]
    ) -> SparseIndex:
        """Single entries by their int64 positions in ``weight.flatten()``, or by (rows, columns) in
        ``weight.view(O, -1)``; ascending in either case.

        Raises:
            ValueError: a dtype or shape differs, a position is outside of the weight, stands twice,
                or comes after a larger one.
        """
        shape = _shape(shape)
        rows, columns = _sizes(shape)
        if isinstance(positions, (tuple, list)):
            if len(positions) != 2:
                raise ValueError(
                    f"SparseIndex: positions has {len(positions)} parts, need rows and columns"
                )
            row, column = positions
            _check_whole("rows", row)
            _check_whole("columns", column)
            if row.shape != column.shape:
                raise ValueError(
                    f"SparseIndex: columns has shape {list(column.shape)}, need "
                    f"{list(row.shape)}, that of rows"
                )
            _check_range("rows", row, rows)
            _check_range("columns", column, columns)
            positions = row * columns + column
        _check_whole("positions", positions)
        _check_range("positions", positions, rows * columns)
        _check_ascending("positions", positions)
        row = positions // max(columns, 1)
        column = positions - row * columns
        return cls(_starts(torch.bincount(row, minlength=rows)), column.int(), shape)

    @classmethod
    def of_csr(
        cls,
        crow: Tensor,
        col: Tensor,
        shape: Sequence[int],
        block: tuple[int, int] = (1, 1),
    ) -> SparseIndex:
        """A CSR of entries or blocks, int32 or int64, as torch's ``crow_indices`` are.

        Raises:
            ValueError: a dtype or shape differs, ``crow`` does not ascend from 0 to the number of
                entries, or columns of a row are outside of the weight, stand twice or descend.
        """
        for name, t in (("crow", crow), ("col", col)):
            _check_whole(name, t, (torch.int32, torch.int64))
        _check_range("crow", crow, col.shape[0] + 1)
        found = cls(crow.int(), col.int(), tuple(shape), block)
        _check_range("col", col, found.sizes[1] // found.block[1])
        if not _readable(crow):
            return found
        if int(crow[0]) or int(crow[-1]) != col.shape[0]:
            raise ValueError(
                f"SparseIndex: crow goes from {int(crow[0])} to {int(crow[-1])}, need 0 to "
                f"{col.shape[0]}, the entries"
            )
        _check_ascending("crow", crow, distinct=False)
        row = rows_of_entries(crow, col.shape[0])
        within = row[1:] == row[:-1]
        step = torch.where(within, col.diff(), 1)
        if bool((step <= 0).any()):
            at = int((step <= 0).nonzero()[0, 0])
            _complain(f"col, in row {int(row[at])},", int(col[at]), int(col[at + 1]))
        return found

    @classmethod
    def of_rows(cls, rows: Tensor, shape: Sequence[int]) -> SparseIndex:
        """Whole rows of the weight, int64 and ascending: blocks of one row and all columns.

        Raises:
            ValueError: a dtype or shape differs, a row is outside of the weight, stands twice, or
                comes after a larger one.
        """
        shape = _shape(shape)
        count, columns = _sizes(shape)
        _check_whole("rows", rows)
        _check_range("rows", rows, count)
        _check_ascending("rows", rows)
        crow = _starts(torch.bincount(rows, minlength=count))
        return cls(crow, torch.zeros_like(rows, dtype=torch.int32), shape, (1, columns))

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of ``weight.view(O, -1)``."""
        return _sizes(self.shape)

    @property
    def values_shape(self) -> tuple[int, ...]:
        """``[nnz]``, or ``[nnz, rows, columns]`` of blocks."""
        return tuple(self.col.shape) + (self.block if self.block != (1, 1) else ())

    @property
    def count(self) -> int:
        """Trainable entries."""
        return math.prod(self.values_shape)

    @property
    def linear(self) -> Tensor:
        """int64 of shape ``values_shape``: the position in ``weight.flatten()`` of every value."""
        (down, across), columns = self.block, self.sizes[1]
        first = rows_of_entries(self.crow, self.col.shape[0]) * (down * columns)
        first = first + self.col.long() * across
        if self.block == (1, 1):
            return first
        down_, across_ = (torch.arange(n, device=first.device) for n in self.block)
        return first[:, None, None] + columns * down_[:, None] + across_

    def to(self, device: torch.device | str) -> SparseIndex:
        """The same on ``device``."""
        return replace(self, crow=self.crow.to(device), col=self.col.to(device))

    def take(self, weight: Tensor) -> Tensor:
        """The values at the positions, of shape ``values_shape``; differentiable.

        Raises:
            ValueError: ``weight`` has another shape or device.
        """
        self._check(weight)
        return weight.take(self.linear)

    @torch.no_grad()
    def put_(self, weight: Tensor, values: Tensor) -> Tensor:
        """Write ``values`` to the positions of ``weight``, rounded to its dtype; no other entry
        changes.

        Raises:
            ValueError: ``weight`` or ``values`` has another shape or device.
        """
        self._check(weight)
        if tuple(values.shape) != self.values_shape:
            raise ValueError(
                f"SparseIndex: values has shape {list(values.shape)}, need "
                f"{list(self.values_shape)}"
            )
        # Not put_, of which torch has no deterministic version.
        at = torch.unravel_index(self.linear, weight.shape)
        return weight.index_put_(at, values.to(weight.dtype))

    def _check(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.shape or weight.device != self.crow.device:
            raise ValueError(
                f"SparseIndex: weight has shape {list(weight.shape)} on {weight.device}, need "
                f"{list(self.shape)} on {self.crow.device}"
            )


# ---- checks --------------------------------------------------------------------------------------


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    if len(sizes) < 2:
        raise ValueError(f"SparseIndex: shape is {list(sizes)}, need at least 2 dimensions")
    if sizes[0] > _MOST or math.prod(sizes[1:]) > _MOST:
        raise ValueError(f"SparseIndex: shape is {list(sizes)}, need rows and columns below 2^31")
    return sizes


def _sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _starts(counts: Tensor) -> Tensor:
    ends = counts.cumsum(0)
    if _readable(ends) and ends.numel() and int(ends[-1]) > _MOST:
        raise ValueError(f"SparseIndex: there are {int(ends[-1])} entries, need below 2^31")
    return torch.cat([ends.new_zeros(1), ends]).int()


def _readable(t: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or isinstance(t, FakeTensor) or t.is_meta)


def _check_whole(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.int64,)) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"SparseIndex: {name} is {type(t).__name__}, need a torch.Tensor")
    if t.dtype not in dtypes or t.dim() != 1 or t.layout != torch.strided:
        need = " or ".join(str(d) for d in dtypes)
        raise ValueError(
            f"SparseIndex: {name} is {t.dtype} of shape {list(t.shape)}, need a vector of {need}"
        )


def _check_range(name: str, t: Tensor, high: int) -> None:
    if t.numel() and _readable(t):
        least, most = (int(v) for v in t.aminmax())
        if least < 0 or most >= high:
            bad = least if least < 0 else most
            raise ValueError(f"SparseIndex: {name} has value {bad}, need 0 to {high - 1}")


def _check_ascending(name: str, t: Tensor, distinct: bool = True) -> None:
    if t.shape[0] < 2 or not _readable(t):
        return
    wrong = t.diff() < int(distinct)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        _complain(name, int(t[at]), int(t[at + 1]))


def _complain(name: str, before: int, after: int) -> None:
    if before == after:
        raise ValueError(f"SparseIndex: {name} has value {after} twice, need each at most once")
    raise ValueError(f"SparseIndex: {name} has value {after} after {before}, need ascending values")
