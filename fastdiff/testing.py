"""What every op test needs: tolerances, layouts, levels, and the checks of STYLE.md's test list."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.dispatch import Impl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Unit roundoff of the output's dtype: roundings to it are allowed on top of twice the eager error.
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


def assert_close(
    got: Tensor, exact: Tensor, eager: Tensor, *, factor: float = 2.0, what: str = ""
) -> None:
    """Error against float64 at most ``factor`` times that of eager torch, plus a few roundings.

    ``exact`` is the float64 result, ``eager`` what plain torch gives in the dtype of ``got``. The
    floor under the eager error is four roundoffs of the largest magnitude, for ops whose eager
    error is 0 by luck. Infinities and NaN must lie where those of ``exact`` do.
    """
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, need {list(exact.shape)}"
    if got.numel() == 0:
        return
    finite = torch.isfinite(exact.to(got.dtype))
    special = got.double()[~finite], exact.to(got.dtype).double()[~finite]
    assert torch.equal(torch.isfinite(got), finite) and torch.allclose(*special, equal_nan=True), (
        f"{what}: non-finite values differ"
    )
    error = (got.double() - exact)[finite].abs().max() if finite.any() else torch.zeros(())
    base = (eager.double() - exact)[finite].abs().max() if finite.any() else torch.zeros(())
    size = exact[finite].abs().max() if finite.any() else torch.zeros(())
    bound = factor * base.item() + 4 * ROUNDOFF[got.dtype] * size.item()
    assert error.item() <= bound, f"{what}: error {error.item():.3g} above {bound:.3g}"


def draw_weights(model: torch.nn.Module, std: float = 0.05) -> Any:
    """``model`` in evaluation mode, every parameter drawn anew from one seed, weights of norms
    around 1: no branch is closed, as zero-initialised ones are, and no norm trivial."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator))
            if p.dim() == 1 and "norm" in name and name.endswith("weight"):
                p.add_(1)
    return model.eval()


def load_file(path: Path) -> ModuleType:
    """A Python file as a module: what a test shares that is in no package."""
    spec = importlib.util.spec_from_file_location(f"fastdiff_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LAYOUTS = ("contiguous", "sliced", "transposed", "misaligned")


def lay(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` in another memory layout: same shape, other strides or base pointer."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "sliced":  # every second row of a wider buffer
        fill = torch.nan if t.dtype.is_floating_point else -1
        buffer = t.new_full([*t.shape[:-1], t.shape[-1] + 5], fill)
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

    def bits(t: Tensor) -> Tensor:
        return t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)

    kept = [(t, bits(t)) for t in tensors if t is not None]
    yield
    for t, before in kept:
        assert torch.equal(bits(t), before), f"an input of shape {list(t.shape)} was written to"


def check_compile(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """``torch.compile(fullgraph=True)`` gives what eager gives."""
    torch._dynamo.reset()
    eager = fn(*args, **kwargs)
    compiled = torch.compile(fn, fullgraph=True)(*args, **kwargs)
    torch.testing.assert_close(compiled, eager, equal_nan=True)


GUARD = 4096  # bytes; a multiple of every vector width and of the alignment of torch's allocator


@contextmanager
def guarded(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Contiguous copies of ``tensors`` between two zones that no kernel may write to.

    The zones are full of NaN (0x7f bytes for other dtypes), so a read that strays into one shows up
    in the result; on exit a write into one is an AssertionError.
    """
    buffers, copies = [], []
    for t in tensors:
        zone = GUARD // t.element_size()
        buffer = torch.empty(t.numel() + 2 * zone, dtype=t.dtype, device=t.device)
        if t.dtype.is_floating_point:
            buffer.fill_(float("nan"))
        else:
            buffer.view(torch.uint8).fill_(0x7F)
        copies.append(buffer[zone : zone + t.numel()].view(t.shape).copy_(t))
        bits = buffer.view(torch.uint8)
        buffers.append((bits, bits[:GUARD].clone(), bits[-GUARD:].clone()))
    yield copies
    for i, (bits, before, after) in enumerate(buffers):
        assert torch.equal(bits[:GUARD], before), f"a write before the start of tensor {i}"
        assert torch.equal(bits[-GUARD:], after), f"a write past the end of tensor {i}"


def run_configs(
    launch: Callable[..., Any], configs: Sequence[Any], *args: Any, **kwargs: Any
) -> Iterator[tuple[str, Any]]:
    """``(name, launch(*args, config=config))`` for every configuration of a Triton launcher.

    Inputs are compared after each launch: no configuration may write to them.
    """
    assert configs, f"{launch.__name__}: no configuration"
    for config in configs:
        with unchanged(*(a for a in args if isinstance(a, Tensor))):
            result = launch(*args, config=config, **kwargs)
        yield str(config), result
