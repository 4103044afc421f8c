"""Repairs and watches Triton's interpreter, so that a test on the CPU means something for a GPU.

:func:`install` patches ``triton.runtime.interpreter`` of this process.

Numbers, as the hardware has them: bfloat16 (which the interpreter holds as uint16 bits and would do
integer arithmetic on) computes in float32 and rounds to nearest even; ``tl.dot`` reads float32
operands as tf32 unless the kernel asks for "ieee" or "tf32x3"; float8e4nv is rounded to nearest
even, saturates, and keeps its carries and its smallest values (the interpreter loses both).

Memory, which the hardware would not report: every address that an unmasked lane touches lies inside
an argument of the launch; lanes masked off without ``other`` give NaN (undefined on a GPU, 0 in the
plain interpreter); no program reads or changes what another program of the launch wrote, or changes
what another one read (programs have no order). ``fastdiff.testing.guarded`` is the check that needs
no interpreter.

Written against triton 3.9, whose method names it patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


class IllegalAccess(RuntimeError):
    """A kernel touched memory outside its arguments, or two of its programs race."""


# ---- bfloat16 ------------------------------------------------------------------------------------


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """bfloat16 bits of ``x``, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def widen_float8(bits: np.ndarray) -> np.ndarray:
    """float32 of the bits of float8e4nv, exactly."""
    bits = np.ascontiguousarray(bits)
    return torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()


def round_float8(x: np.ndarray) -> np.ndarray:
    """Bits of float8e4nv of ``x``, rounded to nearest even, at most 448; NaN stays NaN."""
    x = np.clip(np.ascontiguousarray(x, dtype=np.float32), -448.0, 448.0)
    return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def tf32(x: np.ndarray) -> np.ndarray:
    """What a tensor core reads of a float32: sign, exponent, upper 10 bits of the fraction."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bf16(h: Any) -> bool:
    return (
        isinstance(h, TensorHandle) and h.dtype.scalar == tl.bfloat16 and h.data.dtype == np.uint16
    )


def _is_float8(h: Any) -> bool:
    return isinstance(h, TensorHandle) and h.dtype.scalar == tl.float8e4nv


def _widened(h: Any) -> Any:
    if _is_float8(h):
        return TensorHandle(widen_float8(h.data), tl.float32)
    return TensorHandle(widen_bf16(h.data), tl.float32) if _is_bf16(h) else h


def _lifted(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """``stock`` on float32 copies of its bfloat16 operands, its float32 result rounded back."""

    def run(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        if not any(map(_is_bf16, args)):
            return stock(self, *args)
        out = stock(self, *map(_widened, args))
        if out.data.dtype == np.bool_:
            return TensorHandle(out.data, tl.int1)
        return TensorHandle(round_bf16(out.data), tl.bfloat16)

    return run


def _cast(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def run(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar != tl.bfloat16:
            return stock(self, _widened(src), dst_type)
        if _is_bf16(src):
            return src
        return TensorHandle(round_bf16(src.data.astype(np.float32)), tl.bfloat16)

    return run


def _fp_to_fp(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def run(self: InterpreterBuilder, src: TensorHandle, dst_type: Any, mode: Any) -> TensorHandle:
        kinds = (tl.float16, tl.bfloat16, tl.float32)
        if _is_float8(src) and dst_type.scalar in kinds:
            return self.cast_impl(_widened(src), dst_type)
        if src.dtype.scalar in kinds and dst_type.scalar == tl.float8e4nv:
            if mode == ir.ROUNDING_MODE.RTZ:
                raise NotImplementedError("casting to float8e4nv rounded towards zero")
            return TensorHandle(round_float8(_widened(src).data), tl.float8e4nv)
        if src.dtype.scalar not in kinds or dst_type.scalar not in kinds:
            return stock(self, src, dst_type, mode)
        if mode == ir.ROUNDING_MODE.RTZ and dst_type.scalar != tl.float32:
            raise NotImplementedError(f"casting to {dst_type} rounded towards zero")
        return self.cast_impl(src, dst_type)

    return run


def _dot(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def run(
        self: InterpreterBuilder,
        a: TensorHandle,
        b: TensorHandle,
        d: TensorHandle,
        precision: Any,
        *rest: Any,
    ) -> TensorHandle:
        if precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == b.dtype.scalar == tl.float32:
            a, b = TensorHandle(tf32(a.data), tl.float32), TensorHandle(tf32(b.data), tl.float32)
        out = stock(self, _widened(a), _widened(b), _widened(d), precision, *rest)
        return TensorHandle(round_bf16(out.data), tl.bfloat16) if _is_bf16(d) else out

    return run


def _reduced(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A numpy reduction of one tensor, in float32 where that is bfloat16."""

    def run(self: Any, x: tl.tensor, *args: Any, **kwargs: Any) -> Any:
        if not _is_bf16(x.handle):
            return stock(self, x, *args, **kwargs)
        out = stock(self, self.to_tensor(widen_bf16(x.handle.data), tl.float32), *args, **kwargs)
        parts = out if isinstance(out, (list, tuple)) else (out,)
        back = [
            self.to_tensor(round_bf16(t.handle.data).reshape(t.shape), tl.bfloat16)
            if t.handle.dtype.scalar == tl.float32
            else t
            for t in parts
        ]
        return type(out)(back) if isinstance(out, (list, tuple)) else back[0]

    return run


# ---- memory --------------------------------------------------------------------------------------

_NOBODY, _MANY = -1, -2


class _Region:
    """One tensor argument of a launch: its bytes, first to last element, and who was there."""

    def __init__(self, name: str, t: Any) -> None:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        self.name, self.itemsize = name, t.element_size()
        self.first = t.data_ptr()
        self.end = self.first + (last + 1) * self.itemsize if t.numel() else self.first
        elements = (self.end - self.first) // self.itemsize
        self.writer = np.full(elements, _NOBODY, dtype=np.int64)
        self.reader = np.full(elements, _NOBODY, dtype=np.int64)


class _Launch:
    """The memory that one launch may touch."""

    def __init__(self) -> None:
        self.regions: list[_Region] = []

    def locate(self, what: str, ptrs: TensorHandle, mask: np.ndarray | None) -> list[Any]:
        """[(region, element indices, lanes)] of every unmasked lane.

        Raises:
            IllegalAccess: an address lies in no argument of the launch.
        """
        address = np.atleast_1d(ptrs.data).astype(np.int64).ravel()
        lanes = np.arange(address.size)
        if mask is not None:
            lanes = lanes[np.broadcast_to(mask, ptrs.data.shape).ravel()]
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        found = []
        for region in self.regions:
            at = address[lanes]
            inside = (at >= region.first) & (at + size <= region.end)
            if inside.any():
                index = (at[inside] - region.first) // region.itemsize
                found.append((region, index, lanes[inside]))
                lanes = lanes[~inside]
            if not lanes.size:
                return found
        if not lanes.size:
            return found
        bad = address[lanes[0]]
        near = [
            f"{(bad - r.first) // r.itemsize} of {r.name} [{r.writer.size}]" for r in self.regions
        ]
        raise IllegalAccess(f"{what} outside of every argument: element {', or '.join(near)}")


_launch = _Launch()


def _program(builder: InterpreterBuilder) -> int:
    (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
    return (x * ny + y) * nz + z


def _load(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def run(
        self: InterpreterBuilder, ptrs: TensorHandle, mask: TensorHandle, other: Any, *rest: Any
    ) -> TensorHandle:
        me = _program(self)
        for region, index, _ in _launch.locate("load", ptrs, mask.data):
            writer, reader = region.writer[index], region.reader[index]
            if ((writer != _NOBODY) & (writer != me)).any():
                raise IllegalAccess(f"load of {region.name} reads what another program wrote")
            region.reader[index] = np.where((reader == _NOBODY) | (reader == me), me, _MANY)
        out = stock(self, ptrs, mask, other, *rest)
        off = ~np.broadcast_to(mask.data, out.data.shape)
        if other is None and off.any():
            if out.dtype.scalar == tl.bfloat16:
                out.data[off] = 0x7FC0
            elif out.dtype.scalar.is_floating() and out.dtype.scalar.primitive_bitwidth >= 16:
                out.data[off] = np.nan
        return out

    return run


def _store(stock: Callable[..., Any]) -> Callable[..., Any]:
    def run(
        self: InterpreterBuilder,
        ptrs: TensorHandle,
        value: TensorHandle,
        mask: TensorHandle,
        *rest: Any,
    ) -> Any:
        me = _program(self)
        found = _launch.locate("store", ptrs, mask.data)
        want = np.ascontiguousarray(np.broadcast_to(value.data, ptrs.data.shape))
        changed = _bits(_peek(ptrs, mask, want)) != _bits(want)
        for region, index, lanes in found:
            writer, reader = region.writer[index], region.reader[index]
            if ((writer != _NOBODY) & (writer != me) & changed[lanes]).any():
                raise IllegalAccess(f"store to {region.name} overwrites what another program wrote")
            if ((reader != _NOBODY) & (reader != me) & changed[lanes]).any():
                raise IllegalAccess(f"store to {region.name} overwrites what another program read")
            region.writer[index] = me
        out = stock(self, ptrs, value, mask, *rest)
        if (_bits(_peek(ptrs, mask, want)) != _bits(want)).any():
            raise IllegalAccess("store: two lanes give one address different values")
        return out

    return run


def _peek(ptrs: TensorHandle, mask: TensorHandle, other: np.ndarray) -> np.ndarray:
    return interpreter._interpreter.load(ptrs.data, mask.data, other, other.dtype)


def _bits(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x)
    return x.view(f"u{x.itemsize}").ravel()


def _atomic(stock: Callable[..., Any], mask_at: int | None) -> Callable[..., Any]:
    def run(self: InterpreterBuilder, *args: Any) -> Any:
        handles = [a for a in args if isinstance(a, TensorHandle)]
        if any(map(_is_bf16, handles)):
            raise NotImplementedError("atomics on bfloat16: accumulate in float32")
        mask = None if mask_at is None else args[mask_at].data
        _launch.locate("atomic", handles[0], mask)
        return stock(self, *args)

    return run


def _begin(stock: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: GridExecutor, args: Any, kwargs: Any) -> Any:
        args_host, kwargs_host = stock(self, args, kwargs)
        named = [*zip(self.arg_names, args_host, strict=False), *kwargs_host.items()]
        _launch.regions = [_Region(name, t) for name, t in named if hasattr(t, "data_ptr")]
        for name, t in named:
            if hasattr(t, "base") and hasattr(t.base, "data_ptr"):
                _launch.regions.append(_Region(name, t.base))  # a tensor descriptor
        return args_host, kwargs_host

    return run


def _quiet(stock: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        try:
            with np.errstate(all="ignore"):  # overflow to infinity is silent on a GPU
                return stock(self, *args, **kwargs)
        finally:
            _launch.regions = []

    return run


_installed = False


def install() -> None:
    """Patch the interpreter of this process; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    B = InterpreterBuilder
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf"):
        setattr(B, name, _lifted(getattr(B, name)))
    B.cast_impl = _cast(B.cast_impl)
    B.create_fp_to_fp = _fp_to_fp(B.create_fp_to_fp)
    B.create_dot = _dot(B.create_dot)
    for owner, name in (
        (interpreter.ReduceOps, "sum"),
        (interpreter.ReduceOps, "min_max"),
        (interpreter.ScanOps, "cumsum"),
        (interpreter.ScanOps, "cumprod"),
    ):
        setattr(owner, name, _reduced(getattr(owner, name)))
    B.create_masked_load = _load(B.create_masked_load)
    B.create_masked_store = _store(B.create_masked_store)
    B.create_atomic_rmw = _atomic(B.create_atomic_rmw, 3)
    B.create_atomic_cas = _atomic(B.create_atomic_cas, None)
    GridExecutor._init_args_hst = _begin(GridExecutor._init_args_hst)
    GridExecutor.__call__ = _quiet(GridExecutor.__call__)
