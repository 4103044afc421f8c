"""Some of a batch's samples, in whatever a call of a network takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def taken(values: Any, rows: Tensor, batch: int) -> Any:
    """Tensors of one entry a sample (``[B, ...]``), for the samples ``rows``; the rest as it is.

    Goes into dicts and lists; tables in tuples (rotary embeddings) are no samples'.
    """
    if isinstance(values, dict):
        return {key: taken(value, rows, batch) for key, value in values.items()}
    if isinstance(values, list):
        return [taken(value, rows, batch) for value in values]
    if isinstance(values, Tensor) and values.dim() >= 1 and values.shape[0] == batch:
        return values[rows]
    return values


def call_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor, batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, for the samples ``rows``; rotary tables are no samples'."""
    some = {k: v if "rotary" in k else taken(v, rows, batch) for k, v in kwargs.items()}
    return tuple(taken(a, rows, batch) for a in args), some


def _sliced(value: Any, rows: slice, batch: int) -> Any:
    if isinstance(value, dict):
        return {key: _sliced(item, rows, batch) for key, item in value.items()}
    if isinstance(value, list | tuple):
        some = [_sliced(item, rows, batch) for item in value]
        return type(value)(*some) if hasattr(value, "_fields") else type(value)(some)
    if isinstance(value, Tensor) and value.dim() >= 1 and value.shape[0] == batch:
        return value[rows]
    return value


def slice_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: slice, batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a network's call, for a run of its samples, as views.

    Other than a block's, a network's tuples hold tensors of samples (ControlNet's residuals);
    rotary tables and the positions of tokens (``img_ids``, ``txt_ids``) are no samples'.
    """
    some = {
        k: v if "rotary" in k or k in ("img_ids", "txt_ids") else _sliced(v, rows, batch)
        for k, v in kwargs.items()
    }
    return tuple(_sliced(a, rows, batch) for a in args), some
