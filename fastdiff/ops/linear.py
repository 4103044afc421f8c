r"""A linear layer and the activation after it, through the fastest matrix product at hand.

y = act(x W^T + bias),   act in {identity, GELU (tanh form), SiLU}
"""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, needs_grad, pick, refuse_grad
from fastdiff.ops._check import check_like, check_shape, check_tensor, wide

ACTIVATIONS = (None, "gelu_tanh", "silu")
_FUSED = {
    None: ("none", ""),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}  # oneDNN's names


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return F.silu(y) if activation == "silu" else y


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    y = F.linear(wide(x), wide(weight), None if bias is None else wide(bias))
    return _activate(y, activation).to(x.dtype)


def _torch_row(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return _activate(F.linear(x, weight, bias), activation)


# ---- few rows ------------------------------------------------------------------------------------

# Modulations of a batch, embeddings of times: the weight's way from memory bounds them, and up to 8
# rows this kernel is 1.0 to 5 times as fast as oneDNN (bfloat16: 1.0 to 2.5; two Zen 5 cores).
_FEW = 8


def _few_rows_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> str | None:
    why = why_not_native(x, weight, bias) or refuse_grad(x, weight, bias)
    if why is not None:
        return why
    if not x.numel() or not weight.numel():
        return "an operand is empty"
    rows = x.numel() // x.shape[-1]
    return f"x has {rows} rows; this row is for at most {_FEW}" if rows > _FEW else None


# ---- oneDNN --------------------------------------------------------------------------------------


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: weight has shape {list(weight.shape)}, need [N, {x.shape[-1]}]")
    if activation == "gelu_tanh" and x.dtype == torch.float32 and _gelu_apart():
        return torch.ops.fastdiff.gelu_tanh(_onednn(x, weight, bias, None), None)
    post, form = _FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, post, [], form)


@functools.cache
def _time_gelu() -> bool:
    x, weight = torch.ones(256, 256), torch.ones(512, 256)
    fused, apart = [], []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "gelu", [], "tanh")
            middle = time.perf_counter()
            torch.ops.fastdiff.gelu_tanh(_onednn(x, weight, None, None), None)
            fused.append(middle - start)
            apart.append(time.perf_counter() - middle)
    return min(apart) < min(fused)


def _gelu_apart() -> bool:
    """Whether our GELU after oneDNN's product beats oneDNN's own within it; once per process. With
    AVX2 alone oneDNN's costs half of a product: 17.7 ms against 11.3 at [2048, 192] x [768, 192],
    106 against 79 at [1024, 1152] x [4608, 1152] (EPYC, 2 threads, 2026-11)."""
    if not hasattr(torch.ops.fastdiff, "gelu_tanh") or why_not_native(torch.empty(0)) is not None:
        return False
    with torch._C._DisableTorchDispatch():
        return _time_gelu()


# An op of our own around it, because inductor lowers mkldnn's only for weights that it has frozen.
_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias, str? activation) -> Tensor")
_library.impl("linear", _onednn, "CPU")


@torch.library.register_fake("fastdiff::linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _onednn_row(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    run = torch.ops.fastdiff.linear if torch.compiler.is_compiling() else _onednn
    return run(x, weight, bias, activation)


def _upcast_row(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    args = x.float(), weight.float(), None if bias is None else bias.float(), activation
    row = _torch_row if needs_grad(x, weight, bias) else _onednn_row
    return row(*args).to(x.dtype)


# ---- which library -------------------------------------------------------------------------------


@functools.cache
def _time_products(dtype: torch.dtype) -> tuple[float, float]:
    """Time of a 64 x 512 x 512 product in ``dtype``, and of it through float32; once per process.

    Instruction sets do not tell: among processors with AVX512-BF16 some run bfloat16 products at
    twice the rate of float32 and some at half of it.
    """
    x, weight = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(6):
            for seen, row in zip(times, (_torch_row, _upcast_row), strict=True):
                start = time.perf_counter()
                row(x, weight, None, None)
                seen.append(1e3 * (time.perf_counter() - start))
    return min(times[0]), min(times[1])


@torch.compiler.assume_constant_result
def _product_ms(dtype: torch.dtype) -> tuple[float, float]:
    with torch._C._DisableTorchDispatch():
        return _time_products(dtype)


_HAS_ONEDNN = torch.backends.mkldnn.is_available()


@torch.compiler.assume_constant_result
def _onednn_enabled() -> bool:
    return _HAS_ONEDNN and torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.enabled


@torch.compiler.assume_constant_result
@functools.cache
def _onednn_bfloat16() -> bool:
    """Tried: torch says that processors with AVX2 alone have it, and oneDNN refuses there."""
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            _onednn(x, x, None, None)
    except RuntimeError:
        return False
    return True


def _why_not_cpu(x: Tensor, weight: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}; this row is for the cpu"
    if not _onednn_enabled():
        return "this torch has no oneDNN, or torch.backends.mkldnn.flags(enabled=False) is in force"
    if not x.numel() or not weight.numel():
        return "an operand is empty"
    return None


def _why_not_small(x: Tensor, weight: Tensor) -> str | None:
    # A call of oneDNN costs: par with torch at 2^20 multiply-adds (one Zen 5 core, 256 x 64 x 64),
    # half as fast at 2^18.
    rows = x.numel() // x.shape[-1]
    if rows < 4 or rows * weight.numel() <= 2**20:
        return "the product is too small to gain (need 4 rows and above 2^20 multiply-adds)"
    return None


def _onednn_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> str | None:
    why = _why_not_cpu(x, weight) or refuse_grad(x, weight, bias)
    if why is not None:
        return why
    if x.dtype == torch.float32:
        return _why_not_small(x, weight)
    if x.dtype != torch.bfloat16:
        return f"dtype {x.dtype} is not float32 or bfloat16"
    if not _onednn_bfloat16():
        return "oneDNN has no bfloat16 products on this processor (they need AVX-512)"
    own, float32 = _product_ms(x.dtype)
    if own > float32:
        return f"a bfloat16 product takes {own:.2g} ms here and through float32 {float32:.2g} ms"
    return None


def _upcast_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return "x is not float16 or bfloat16"
    why = _why_not_cpu(x, weight)
    if why is not None:
        return why
    own, float32 = _product_ms(x.dtype)
    if own <= float32:
        return (
            f"a product in {x.dtype} takes {own:.2g} ms here and through float32 {float32:.2g} ms"
        )
    return _why_not_small(x, weight)


IMPLS = (
    Impl("few_rows", native("linear_few_rows"), _few_rows_why_not),
    Impl("onednn", _onednn_row, _onednn_why_not),
    Impl("upcast", _upcast_row, _upcast_why_not),
    Impl("torch", _torch_row, always),
    Impl("ref", linear_ref, always),
)


def row_args(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None, str | None]:
    """Check the public arguments and give those of a row."""
    check_tensor("linear", "x", x)
    check_tensor("linear", "weight", weight, dim=2)
    check_like("linear", "weight", weight, x)
    check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]))
    if bias is not None:
        check_like("linear", "bias", bias, x)
        check_shape("linear", "bias", bias, weight.shape[:1])
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}, need None, 'gelu_tanh' or 'silu'")
    return x, weight, bias, activation


TABLES = {"linear": (IMPLS, row_args)}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """``act(x @ weight.T + bias)``, by the library that is fastest for these operands.

    Rows: "few_rows" (at most 8 of x, on the CPU, no gradient), "onednn" (activation fused, no
    gradient), "upcast" (16-bit operands through float32, where the processor is slow in their
    dtype), "torch" and "ref". The first 16-bit call of a process times both ways once.

    Args:
        x: ``[..., K]``; float16, bfloat16, float32 or float64.
        weight: ``[N, K]``, dtype and device of ``x``.
        bias: ``[N]``, dtype and device of ``x``; None for 0.
        activation: None, "gelu_tanh" or "silu".
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[..., N]``, dtype and device of ``x``; never a view of it.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or ``activation`` is no name of
            these; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, weight, bias, activation=activation)
    return pick("linear", IMPLS, impl, *args)(*args)


if hasattr(torch.ops.fastdiff, "linear_few_rows"):

    @torch.library.register_fake("fastdiff::linear_few_rows")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
