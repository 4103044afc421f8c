r"""One step of any sampler in one pass over memory, and the counter-based noise that it draws.

With row ``(a_x, a_m, c_x, c_0, c_m, c_h1, c_h2, sigma, k_x, k_0, k_m, clip, r_a, r_b)``:

    m   = sum_k w[b, k] m_k                                  branches (guidance)
    m   = phi m std(m_last) / std(m) + (1 - phi) m           rescale, Lin et al. 2023, eq. 15-16
    x0  = clamp(a_x x + a_m m, -clip, clip)                  conversion of the prediction
    x'  = c_x x + c_0 x0 + c_m m + c_h1 h1 + c_h2 h2 + sigma z
    h   = k_x x + k_0 x0 + k_m m                             what a multistep method keeps
    x'  = M x' + (1 - M) (r_a ref + r_b z_ref)               regions
    x'[b] = stored[b] where select[b]                        stored trajectories

An epsilon re-derived from the clipped ``x0`` is ``(x - alpha x0) / sigma``, so it needs no column
of its own: it goes into ``c_x`` and ``c_0``.

Noise is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with
Box-Muller. Sample ``b`` has the key ``seed[b]`` (low word, high word) and the counters ``(j,
slot[b], step, stream)``. Element ``i`` of a sample is word ``i % 64 // 16`` of counter ``j = i //
64 * 16 + i % 16``: 16 neighbours come from 16 counters, which is what vector units want. Words
``(r0, r1)`` give words 0 and 1 of the noise, ``(r2, r3)`` words 2 and 3:

    u = float32(float32(r0) 2^-32 + 2^-33),  (z0, z1) = sqrt(-2 ln u) (cos, sin)(2 pi r1 2^-32)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import (
    check_index,
    check_like,
    check_range,
    check_shape,
    check_strided,
    check_tensor,
    wide,
)

COLUMNS = (
    "a_x", "a_m", "c_x", "c_0", "c_m", "c_h1", "c_h2", "sigma",
    "k_x", "k_0", "k_m", "clip", "r_a", "r_b",
)  # fmt: skip
GROUP = 64  # elements that share 16 Philox counters
MAX_ELEMENTS = 2**34  # per sample: the element counter has 32 bits and gives 4 words


class Noise(NamedTuple):
    """Which noise a step draws: ``philox_normal(x.shape, *noise)``, ``z_ref`` at ``stream + 1``."""

    seed: Tensor | int  # [B] int64, or one for all in [0, 2**63)
    slot: Tensor | int | None = None  # [B] int64 or one for all, in [0, 2**32); None: philox_normal
    step: Tensor | int = 0  # [], [1] or [B] int64, in [0, 2**32)
    stream: int = 0


def _philox_words(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps in int64; both halves stay right
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def philox_normal_ref(seed: Tensor, slot: Tensor, step: Tensor, stream: int, numel: int) -> Tensor:
    """The specification: ``[B, numel]``; exact integers, Box-Muller in float64, one rounding."""
    low = 0xFFFFFFFF
    batch, groups = seed.shape[0], -(-numel // GROUP)
    j = torch.arange(groups * 16, device=seed.device).view(1, groups, 16)
    seed, slot, step = (t.view(-1, 1, 1) for t in (seed, slot, step))
    counter = [j, slot & low, step & low, torch.full_like(j, stream)]
    r = _philox_words(counter, [seed & low, seed >> 32 & low])
    z = []
    for r0, r1 in ((r[0], r[1]), (r[2], r[3])):
        u = (r0.to(torch.float32) * 2.0**-32 + 2.0**-33).double()
        radius = torch.sqrt(-2 * torch.log(u))
        angle = r1.double() * (2 * math.pi * 2.0**-32)
        z += [radius * torch.cos(angle), radius * torch.sin(angle)]
    block = torch.stack([t.expand(batch, groups, 16) for t in z], 2)
    return block.reshape(batch, groups * GROUP)[:, :numel].float()


def _std(t: Tensor) -> Tensor:
    """``[B, 1, ...]``; shifted by the first element: no cancellation, exactly 0 for a constant."""
    flat = t.flatten(1)
    shifted = flat - flat[:, :1]
    centred = shifted - shifted.mean(1, keepdim=True)
    return centred.square().mean(1).sqrt().view(-1, *[1] * (t.dim() - 1))


def fused_step_ref(
    x: Tensor,
    m: Tensor,
    w: Tensor | None,
    coef: Tensor,
    step: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    rescale: Tensor | None,
    seed: Tensor | None,
    slot: Tensor | None,
    noise_step: Tensor | None,
    stream: int,
    mask: Tensor | None,
    ref: Tensor | None,
    select: Tensor | None,
    stored: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The specification: float32 inside (float64 for float64 ``x``), one rounding at the end."""
    x32 = wide(x)
    if step is not None:
        check_range("fused_step", "step", step, 0, coef.shape[0])
    rows = coef if step is None else coef.index_select(0, step)
    rows = rows.to(x32.dtype)

    def per_sample(t: Tensor) -> Tensor:
        return t.to(x32.dtype).view(-1, *[1] * (x.dim() - 1))

    a_x, a_m, c_x, c_0, c_m, c_h1, c_h2, sigma, k_x, k_0, k_m, clip, r_a, r_b = (
        per_sample(column) for column in rows.unbind(1)
    )

    def noise(which: int) -> Tensor:
        assert seed is not None and slot is not None and noise_step is not None
        numel = x[0].numel() if x.shape[0] else 0
        return philox_normal_ref(seed, slot, noise_step, which, numel).view(x.shape).to(x32.dtype)

    branches = m.to(x32.dtype)
    guided = branches[0]
    if w is not None:
        guided = per_sample(w[:, 0]) * guided
        for k in range(1, m.shape[0]):
            guided = guided + per_sample(w[:, k]) * branches[k]
    if rescale is not None:
        std = _std(guided)
        ratio = _std(branches[-1]) / std.where(std != 0, 1.0)
        phi = per_sample(rescale)
        guided = guided * torch.where((phi != 0) & (std != 0), phi * ratio + (1 - phi), 1.0)
    x0 = torch.minimum(torch.maximum(a_x * x32 + a_m * guided, -clip), clip)
    y = c_x * x32 + c_0 * x0 + c_m * guided
    if h1 is not None:
        y = y + c_h1 * wide(h1)
    if h2 is not None:
        y = y + c_h2 * wide(h2)
    if seed is not None:
        y = y + sigma * noise(stream)
    kept = k_x * x32 + k_0 * x0 + k_m * guided if keep else x32.new_empty(0)
    if mask is not None and ref is not None:
        pasted = r_a * wide(ref)
        if seed is not None:
            pasted = pasted + r_b * noise(stream + 1)
        y = mask.to(x32.dtype) * y + (1 - mask.to(x32.dtype)) * pasted
    y = y.to(x.dtype)
    if select is not None and stored is not None:
        y = torch.where(select.view(-1, *[1] * (x.dim() - 1)), stored, y)
    return y.contiguous(), kept.to(x.dtype).contiguous()


def _native_why_not(*args: Any) -> str | None:
    x, m, w, _, _, h1, h2, rescale, *_ = args
    return why_not_native(x, m, gpu="fused_step") or refuse_grad(x, m, w, h1, h2, rescale)


def _triton_why_not(*args: Any) -> str | None:
    x, m, w, _, _, h1, h2, rescale, *_ = args
    return why_not_triton(x, m) or refuse_grad(x, m, w, h1, h2, rescale)


def _native_noise_why_not(seed: Tensor, *_: Any) -> str | None:
    return why_not_native(seed, dtypes=(torch.int64,), gpu="philox_normal")


def _triton_noise_why_not(seed: Tensor, *_: Any) -> str | None:
    return why_not_triton(seed.new_empty(0, dtype=torch.float32))


IMPLS = (
    Impl("native", native("fused_step"), _native_why_not),
    Impl("triton", triton_row("fused_step"), _triton_why_not),
    Impl("ref", fused_step_ref, always),
)
NOISE_IMPLS = (
    Impl("native", native("philox_normal"), _native_noise_why_not),
    Impl("triton", triton_row("fused_step", "philox_normal"), _triton_noise_why_not),
    Impl("ref", philox_normal_ref, always),
)


def _check_word(op: str, name: str, value: object, high: int = 2**32) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < high:
        raise ValueError(f"{op}: {name} is {value!r}, need an integer in [0, {high})")
    return value


def _counters(
    op: str, batch: int, device: torch.device, noise: Noise
) -> tuple[Tensor, Tensor, Tensor]:
    """``seed``, ``slot``, ``step`` as int64 [B] or [1] tensors on ``device``."""
    out = []
    slot = noise.slot
    if slot is None:
        slot = 0 if isinstance(noise.seed, Tensor) else torch.arange(batch, device=device)
    values = (noise.seed, slot, noise.step)
    for name, value in zip(("seed", "slot", "step"), values, strict=True):
        if isinstance(value, Tensor):
            check_strided(op, name, value)
            if value.dtype != torch.int64 or value.device != device:
                raise ValueError(
                    f"{op}: {name} is {value.dtype} on {value.device}, need torch.int64 on {device}"
                )
            if value.numel() != 1 or value.dim() > 1:
                check_shape(op, name, value, (batch,))
            out.append(value.reshape(-1))
        else:
            high = 2**63 if name == "seed" else 2**32
            _check_word(op, name, value, high)
            out.append(torch.full((1,), value, dtype=torch.int64, device=device))
    _check_word(op, "stream", noise.stream, 2**32 - 1)
    return out[0].expand(batch).contiguous(), out[1].expand(batch).contiguous(), out[2]


def _row_index(
    op: str, coef: Tensor, step: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``coef`` as [n, R], ``step`` as [1] or [B] row indices (None: row b, or the only one)."""
    batch, width = x.shape[0], len(COLUMNS)
    if not isinstance(coef, Tensor) or coef.dtype != torch.float32 or coef.device != x.device:
        found = (
            f"{coef.dtype} on {coef.device}" if isinstance(coef, Tensor) else type(coef).__name__
        )
        raise ValueError(f"{op}: coef is {found}, need torch.float32 on {x.device}")
    check_strided(op, "coef", coef)
    if coef.dim() not in (1, 2) or coef.shape[-1] != width:
        raise ValueError(
            f"{op}: coef has shape {list(coef.shape)}, need [{width}], [B, {width}] or [n, {width}]"
        )
    if coef.dim() == 1:
        coef = coef[None]
    if step is None:
        if coef.shape[0] not in (1, batch):
            raise ValueError(
                f"{op}: coef has {coef.shape[0]} rows and no step picks one, need 1 or B = {batch}"
            )
        return coef, None
    check_index(op, "step", step, x)
    if step.numel() != 1 or step.dim() > 1:
        check_shape(op, "step", step, (batch,))
    if coef.shape[0] == 0:
        raise ValueError(f"{op}: coef has 0 rows, need at least 1")
    return coef, step.reshape(-1)


def _branches(x: Tensor, m: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``m`` as [K, *x.shape] and ``w`` as float32 [B, K] (None for a single branch of weight 1)."""
    check_tensor("fused_step", "m", m)
    if m.device != x.device:
        raise ValueError(f"fused_step: m is on {m.device}, need {x.device}, the device of x")
    if m.dim() == x.dim():
        m = m[None]
    if m.dim() != x.dim() + 1 or m.shape[1:] != x.shape or m.shape[0] == 0:
        raise ValueError(
            f"fused_step: m has shape {list(m.shape)}, need {list(x.shape)} or [K, *x.shape]"
        )
    if w is None:
        if m.shape[0] != 1:
            raise ValueError(
                f"fused_step: m has {m.shape[0]} branches and w is None, need w [B, K]"
            )
        return m, None
    check_tensor("fused_step", "w", w)
    if w.device != x.device:
        raise ValueError(f"fused_step: w is on {w.device}, need {x.device}, the device of x")
    check_shape("fused_step", "w", w, (m.shape[0],), (x.shape[0], m.shape[0]))
    return m, w.to(torch.float32).expand(x.shape[0], m.shape[0]).contiguous()


def row_args(
    x: Tensor,
    m: Tensor,
    coef: Tensor,
    *,
    step: Tensor | None = None,
    w: Tensor | None = None,
    rescale: Tensor | float = 0.0,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    noise: Noise | None = None,
    mask: Tensor | None = None,
    ref: Tensor | None = None,
    select: Tensor | None = None,
    stored: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor | int | bool | None, ...]:
    """Check the public arguments and give those of a row."""
    op = "fused_step"
    check_tensor(op, "x", x, min_dim=2)
    batch = x.shape[0]
    m, w = _branches(x, m, w)
    coef, step = _row_index(op, coef, step, x)
    for name, t in (("h1", h1), ("h2", h2), ("ref", ref), ("stored", stored)):
        if t is not None:
            check_like(op, name, t, x)
            check_shape(op, name, t, x.shape)
    if isinstance(rescale, Tensor):
        check_tensor(op, "rescale", rescale, min_dim=0)
        if rescale.device != x.device:
            raise ValueError(f"{op}: rescale is on {rescale.device}, need {x.device}")
        check_shape(op, "rescale", rescale, (), (batch,))
        phi: Tensor | None = rescale.to(torch.float32).expand(batch).contiguous()
    else:
        if not isinstance(rescale, int | float) or not 0 <= rescale <= 1:
            raise ValueError(f"{op}: rescale is {rescale!r}, need a number in [0, 1] or a tensor")
        phi = x.new_full((batch,), rescale, dtype=torch.float32) if rescale else None
    if (mask is None) != (ref is None):
        raise ValueError(f"{op}: mask and ref go together, and one of them is None")
    if mask is not None:
        check_tensor(op, "mask", mask, dim=x.dim())
        if mask.device != x.device:
            raise ValueError(f"{op}: mask is on {mask.device}, need {x.device}, the device of x")
        lead = [(b, c, *x.shape[2:]) for b in (batch, 1) for c in (x.shape[1], 1)]
        check_shape(op, "mask", mask, *dict.fromkeys(lead))
        mask = mask.to(torch.float32)
    if (select is None) != (stored is None):
        raise ValueError(f"{op}: select and stored go together, and one of them is None")
    if select is not None:
        if not isinstance(select, Tensor):
            raise ValueError(f"{op}: select is {type(select).__name__}, need a torch.Tensor")
        check_strided(op, "select", select)
        if select.dtype != torch.bool or select.device != x.device:
            raise ValueError(
                f"{op}: select is {select.dtype} on {select.device}, need torch.bool on {x.device}"
            )
        check_shape(op, "select", select, (batch,))
    seed = slot = noise_step = None
    if noise is not None:
        seed, slot, noise_step = _counters(op, batch, x.device, noise)
    return (
        x, m, w, coef, step, h1, h2, phi, seed, slot, noise_step, noise.stream if noise else 0,
        mask, ref, select, stored, bool(keep),
    )  # fmt: skip


def noise_row_args(
    shape: Sequence[int],
    seed: Tensor | int,
    slot: Tensor | int | None = None,
    step: Tensor | int = 0,
    stream: int = 0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Check the public arguments of :func:`philox_normal` and give those of a row."""
    op = "philox_normal"
    if len(shape) < 1 or any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"{op}: shape is {shape!r}, need [B, ...] with sizes of 0 and above")
    numel = math.prod(shape[1:])
    if numel > MAX_ELEMENTS:
        raise ValueError(f"{op}: {numel} elements a sample, need at most {MAX_ELEMENTS}")
    if device is None:
        device = next((t.device for t in (seed, slot, step) if isinstance(t, Tensor)), "cpu")
    device = torch.empty(0, device=device).device  # "cuda" becomes the cuda:0 that tensors have
    noise = Noise(seed, slot, step, stream)
    return (*_counters(op, shape[0], device, noise), stream, numel)


TABLES = {"fused_step": (IMPLS, row_args), "philox_normal": (NOISE_IMPLS, noise_row_args)}


def fused_step(
    x: Tensor,
    m: Tensor,
    coef: Tensor,
    *,
    step: Tensor | None = None,
    w: Tensor | None = None,
    rescale: Tensor | float = 0.0,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    noise: Noise | None = None,
    mask: Tensor | None = None,
    ref: Tensor | None = None,
    select: Tensor | None = None,
    stored: Tensor | None = None,
    keep: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One sampler step; the algebra stands at the top of this module.

    Args:
        x: ``[B, C, ...]`` (or ``[B, N]``), the state; float16, bfloat16 or float32 (float64 on the
            reference row).
        m: model output, ``x.shape`` or ``[K, *x.shape]``, in any float dtype.
        coef: float32 rows of ``COLUMNS``: ``[R]``; ``[B, R]``, one a sample; or with ``step`` a
            table ``[n, R]``. ``clip`` is inf for no clipping.
        step: int64 ``[]``, ``[1]`` or ``[B]``: row of the table, read on the device. Out of range
            is an error on the cpu; on a GPU it is clamped, as a check would wait for the device.
        w: ``[K]`` or ``[B, K]``, weights of the branches; needed where K > 1. Classifier-free
            guidance with ``m = (unconditional, conditional)`` is ``(1 - g, g)``.
        rescale: phi in [0, 1], or a tensor ``[]`` or ``[B]``: guidance rescale (arXiv:2305.08891)
            towards the standard deviation of the last branch. 0 is off, exactly. A sample whose
            combined prediction has no spread is left alone.
        h1, h2: ``x.shape``, dtype of ``x``: history entries, weighted by ``c_h1`` and ``c_h2``.
        noise: which noise to draw; None for none, whatever ``sigma`` and ``r_b`` are.
        mask: ``[B|1, C|1, ...]``: 1 takes the step, 0 the region of ``ref``; with ``ref``.
        ref: ``x.shape``, dtype of ``x``.
        select: bool ``[B]``: samples that take ``stored`` as it is; with ``stored``.
        stored: ``x.shape``, dtype of ``x``.
        keep: also give the history entry ``k_x x + k_0 x0 + k_m m``.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``(x', h)`` in shape and dtype of ``x``, contiguous; ``h`` is ``[0]`` where not ``keep``.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message says which.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(
        x, m, coef, step=step, w=w, rescale=rescale, h1=h1, h2=h2, noise=noise, mask=mask, ref=ref,
        select=select, stored=stored, keep=keep,
    )  # fmt: skip
    return pick("fused_step", IMPLS, impl, *args)(*args)


def philox_normal(
    shape: Sequence[int],
    seed: Tensor | int,
    slot: Tensor | int | None = None,
    step: Tensor | int = 0,
    stream: int = 0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> Tensor:
    """Standard normal noise that depends on its counters only, not on batch, threads or device.

    Args:
        shape: ``[B, ...]``; at most 2**34 elements a sample.
        seed: int64 ``[B]``, or one integer in [0, 2**63) for all samples.
        slot: int64 ``[B]`` or one integer in [0, 2**32): which sample of a run. None: 0 where each
            sample has its own seed, else 0..B-1.
        step: int64 ``[]``, ``[1]`` or ``[B]``, or an integer in [0, 2**32): which step of a run.
        stream: integer in [0, 2**32 - 1): which use within a step.
        device: None takes that of a tensor argument, else the cpu.
        dtype: of the result; the noise is float32, rounded once.
        impl: row of ``NOISE_IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``shape`` in ``dtype``. The integers behind it are the same in every row; the values agree
        to a few float32 roundings.

    Raises:
        ValueError: a counter is out of range, or has the wrong shape, dtype or device.
        NoImpl: the forced row refuses; the message says why.
    """
    args = noise_row_args(shape, seed, slot, step, stream, device=device, dtype=dtype)
    return pick("philox_normal", NOISE_IMPLS, impl, *args)(*args).view(*shape).to(dtype)


if hasattr(torch.ops.fastdiff, "fused_step"):

    @torch.library.register_fake("fastdiff::fused_step")
    def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        return y, torch.empty_like(y) if args[-1] else x.new_empty(0)

    @torch.library.register_fake("fastdiff::philox_normal")
    def _(seed: Tensor, slot: Tensor, step: Tensor, stream: int, numel: int) -> Tensor:
        return seed.new_empty((seed.shape[0], numel), dtype=torch.float32)
