"""What every op test needs: tolerances, layouts, levels, and the checks of STYLE.md's test list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.dispatch import Impl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Unit roundoff of the output's dtype: one rounding to it is allowed on top of twice the eager error.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
# Rows of an op: full shapes in tests; 77 and 1152 are CLIP's length and DiT-XL's width.
ROWS = (0, 1, 7, 64, 65, 77)


def rows_of(impls: Sequence[Impl]) -> list[str]:
    """Names of the rows, for ``pytest.mark.parametrize``."""
    return [row.name for row in impls]


@contextmanager
def cpu_level(name: str) -> Iterator[None]:
    """Run the native kernels of one instruction-set level."""
    before = fastdiff.cpu_level()
    fastdiff.set_cpu_level(name)
    try:
        yield
    finally:
        fastdiff.set_cpu_level(before)


def assert_close(got: Tensor, exact: Tensor, eager: Tensor, *, factor: float = 2.0, what: str = "") -> None:
    """Error against float64 at most ``factor`` times that of the same-dtype eager op, plus roundings.

    ``exact`` is the float64 result, ``eager`` what plain torch gives in the dtype of ``got``. The
    floor under the eager error is four roundoffs of the largest magnitude, for ops whose eager
    error is 0 by luck.
    """
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, need {list(exact.shape)}"
    if got.numel() == 0:
        return
    assert torch.equal(torch.isfinite(got), torch.isfinite(exact.to(got.dtype))), (
        f"{what}: non-finite values differ"
    )
    finite = torch.isfinite(exact.to(got.dtype))
    error = (got.double() - exact)[finite].abs().max() if finite.any() else torch.zeros(())
    base = (eager.double() - exact)[finite].abs().max() if finite.any() else torch.zeros(())
    size = exact[finite].abs().max() if finite.any() else torch.zeros(())
    bound = factor * base.item() + 4 * ROUNDOFF[got.dtype] * size.item()
    assert error.item() <= bound, f"{what}: error {error.item():.3g} above {bound:.3g}"


LAYOUTS = ("contiguous", "sliced", "transposed", "misaligned")


def lay(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` in another memory layout: same shape, other strides or base pointer."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "sliced":  # every second row of a wider buffer
        buffer = t.new_full([*t.shape[:-1], t.shape[-1] + 5], float("nan"))
        view = buffer[..., 2 : 2 + t.shape[-1]]
    elif layout == "transposed":  # last two (or only) dimensions swapped in memory
        if t.dim() < 2:
            return lay(t, "sliced")
        view = torch.empty_like(t.transpose(-1, -2).contiguous()).transpose(-1, -2)
    elif layout == "misaligned":  # base pointer one element past an aligned address
        view = t.new_empty(t.numel() + 1)[1:].view(t.shape)
    else:
        raise ValueError(f"lay: layout is {layout!r}, need one of {LAYOUTS}")
    return view.copy_(t)


@contextmanager
def unchanged(*tensors: Tensor | None) -> Iterator[None]:
    """No hidden writes: every tensor holds the same bits after the block."""
    kept = [(t, t.clone()) for t in tensors if t is not None]
    yield
    for t, before in kept:
        same = torch.equal(t, before) or torch.equal(t.isnan(), before.isnan())
        assert same, f"an input of shape {list(t.shape)} was written to"


def check_compile(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """``torch.compile(fullgraph=True)`` gives what eager gives."""
    torch._dynamo.reset()
    eager = fn(*args, **kwargs)
    compiled = torch.compile(fn, fullgraph=True)(*args, **kwargs)
    torch.testing.assert_close(compiled, eager, equal_nan=True)
