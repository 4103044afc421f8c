"""Triton kernels of fused_step: the step, the moments of guidance rescale, and the noise alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# BLOCK is in groups of 64 elements.
CONFIGS = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((16, 4), (32, 4), (8, 2))]
MOMENTS = 4096  # elements of one partial sum; fixed, so that the sums do not depend on the config


@triton.jit
def _log(u):
    """ln(u), u > 0, to 1 ulp (Cephes logf): the hardware's is only absolutely accurate near 1."""
    i = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (i >> 23).to(tl.float32)
    x = ((i & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = x * x
    p = 7.0376836292e-2
    p = p * x - 1.1514610310e-1
    p = p * x + 1.1676998740e-1
    p = p * x - 1.2420140846e-1
    p = p * x + 1.4249322787e-1
    p = p * x - 1.6668057665e-1
    p = p * x + 2.0000714765e-1
    p = p * x - 2.4999993993e-1
    p = p * x + 3.3333331174e-1
    y = x * z * p - 2.12194440e-4 * e - 0.5 * z
    return x + y + 0.693359375 * e


@triton.jit
def _cos_sin(r):
    """cos, sin of 2 pi r / 2^32: exact quadrant from integers, so no slow path of a library."""
    quadrant = (r + 0x20000000) >> 30
    rest = (r - (quadrant << 30)).to(tl.int32, bitcast=True)
    a = rest.to(tl.float32) * 1.4629180792671596e-09  # pi/2 2^-30
    z = a * a
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * a + a
    c = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    c = c * z * z + (1.0 - 0.5 * z)
    odd = (quadrant & 1) != 0
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    return cosine, tl.where((quadrant & 2) != 0, -sine, sine)


@triton.jit
def _box_muller(a, angle):
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    radius = tl.sqrt(-2.0 * _log(u))
    cosine, sine = _cos_sin(angle)
    return radius * cosine, radius * sine


@triton.jit
def _normals(seed, slot, step, stream, counter):
    """Four tiles of noise: words 0..3 of the tile of int64 counters."""
    zero = tl.zeros_like(counter)
    c0 = counter.to(tl.uint32)
    c1, c2 = (zero + slot).to(tl.uint32), (zero + step).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, (zero + stream).to(tl.uint32), 10)
    z0, z1 = _box_muller(r0, r1)
    z2, z3 = _box_muller(r2, r3)
    return z0, z1, z2, z3


@triton.jit
def _combined(m_ptr, w_ptr, at, inside, m_branch, BRANCHES: tl.constexpr, WEIGHTED: tl.constexpr):
    g = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        g *= tl.load(w_ptr)
        for k in tl.static_range(1, BRANCHES):
            m = tl.load(m_ptr + k * m_branch + at, mask=inside, other=0.0).to(tl.float32)
            g += tl.load(w_ptr + k) * m
    return g


@triton.jit
def _moments_kernel(
    m_ptr,  # [K, B, n]
    w_ptr,  # [B, K]
    out_ptr,  # [B, parts, 4]
    n, m_branch, m_sample, parts,
    BRANCHES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    m_ptr += b * m_sample
    last_ptr = m_ptr + (BRANCHES - 1) * m_branch
    w_ptr += b * BRANCHES
    first = tl.zeros([1], tl.int64)
    g = _combined(m_ptr, w_ptr, at, inside, m_branch, BRANCHES, WEIGHTED)
    g0 = _combined(m_ptr, w_ptr, first, first == 0, m_branch, BRANCHES, WEIGHTED)
    p = tl.load(last_ptr + at, mask=inside, other=0.0).to(tl.float32)
    p0 = tl.load(last_ptr + first).to(tl.float32)
    g = tl.where(inside, g - g0, 0.0)
    p = tl.where(inside, p - p0, 0.0)
    out_ptr += (b * parts + part) * 4
    tl.store(out_ptr, tl.sum(g, 0))
    tl.store(out_ptr + 1, tl.sum(g * g, 0))
    tl.store(out_ptr + 2, tl.sum(p, 0))
    tl.store(out_ptr + 3, tl.sum(p * p, 0))


@triton.jit
def _factor(moments_ptr, phi, n, parts, PARTS: tl.constexpr):
    """Rescale factor of one sample from its partial sums: ``rescale`` of fused_step_ref."""
    at = tl.arange(0, PARTS)
    use = at < parts
    g1 = tl.sum(tl.load(moments_ptr + 4 * at, mask=use, other=0.0), 0) / n
    g2 = tl.sum(tl.load(moments_ptr + 4 * at + 1, mask=use, other=0.0), 0) / n
    p1 = tl.sum(tl.load(moments_ptr + 4 * at + 2, mask=use, other=0.0), 0) / n
    p2 = tl.sum(tl.load(moments_ptr + 4 * at + 3, mask=use, other=0.0), 0) / n
    var = g2 - g1 * g1
    last = tl.maximum(p2 - p1 * p1, 0.0)
    spread = (var != 0.0) & (phi != 0.0)
    ratio = tl.sqrt(last / tl.where(spread, var, 1.0))
    return tl.where(spread, phi * ratio + (1.0 - phi), 1.0)


@triton.jit
def _fused_step_kernel(
    x_ptr, m_ptr, w_ptr, coef_ptr, step_ptr, h1_ptr, h2_ptr, phi_ptr, moments_ptr,
    seed_ptr, slot_ptr, noise_step_ptr, mask_ptr, ref_ptr, select_ptr, stored_ptr, y_ptr, kept_ptr,
    n, rows, m_branch, m_sample, row_stride, step_stride, noise_stride, stream, mask_sample, plane,
    parts,
    BRANCHES: tl.constexpr, WEIGHTED: tl.constexpr, STEP: tl.constexpr, H1: tl.constexpr,
    H2: tl.constexpr, PHI: tl.constexpr, NOISE: tl.constexpr, MASK: tl.constexpr,
    SELECT: tl.constexpr, KEEP: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK groups of 64 elements of one sample, as four tiles [BLOCK, 16].

    Tile j holds elements 16 j .. 16 j + 15 of each group, which is word j of the group's counters:
    no noise is drawn twice. Bytes per element: every input once, each output once.
    """
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    lane = tl.arange(0, 16)[None, :]
    if STEP:  # clamped: an index out of range must not read outside the table
        row = tl.minimum(tl.maximum(tl.load(step_ptr + b * step_stride), 0), rows - 1)
    else:
        row = b * row_stride
    c = coef_ptr + row * COLUMNS
    a_x, a_m, c_x, c_0 = tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3)
    c_m, clip = tl.load(c + 4), tl.load(c + 11)
    m_ptr += b * m_sample
    w_ptr += b * BRANCHES
    base = b * n
    factor = 1.0
    if PHI:
        factor = _factor(moments_ptr + b * parts * 4, tl.load(phi_ptr + b), n, parts, PARTS)
    z = (0.0, 0.0, 0.0, 0.0)
    z_ref = (0.0, 0.0, 0.0, 0.0)
    if NOISE:
        seed, slot = tl.load(seed_ptr + b), tl.load(slot_ptr + b)
        drawn = tl.load(noise_step_ptr + b * noise_stride)
        z = _normals(seed, slot, drawn, stream, group * 16 + lane)
        if MASK:
            z_ref = _normals(seed, slot, drawn, stream + 1, group * 16 + lane)
    for j in tl.static_range(4):
        at = group * 64 + j * 16 + lane
        inside = at < n
        x = tl.load(x_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
        g = _combined(m_ptr, w_ptr, at, inside, m_branch, BRANCHES, WEIGHTED) * factor
        x0 = a_x * x + a_m * g
        x0 = tl.where(x0 < -clip, -clip, tl.where(x0 > clip, clip, x0))  # NaN stays NaN
        y = c_x * x + c_0 * x0 + c_m * g
        if H1:
            y += tl.load(c + 5) * tl.load(h1_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
        if H2:
            y += tl.load(c + 6) * tl.load(h2_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
        if NOISE:
            y += tl.load(c + 7) * z[j]
        if KEEP:
            kept = tl.load(c + 8) * x + tl.load(c + 9) * x0 + tl.load(c + 10) * g
            tl.store(kept_ptr + base + at, kept.to(kept_ptr.dtype.element_ty), mask=inside)
        if MASK:
            where = at
            if plane > 0:
                where = at % plane
            share = tl.load(mask_ptr + b * mask_sample + where, mask=inside, other=0.0)
            ref = tl.load(ref_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
            pasted = tl.load(c + 12) * ref
            if NOISE:
                pasted += tl.load(c + 13) * z_ref[j]
            y = share * y + (1.0 - share) * pasted
        y = y.to(y_ptr.dtype.element_ty)
        if SELECT:
            take = tl.load(select_ptr + b) != 0
            old = tl.load(stored_ptr + base + at, mask=inside, other=0.0)
            y = tl.where(take, old, y)
        tl.store(y_ptr + base + at, y, mask=inside)


@triton.jit
def _philox_normal_kernel(
    seed_ptr, slot_ptr, step_ptr, z_ptr, n, step_stride, stream, BLOCK: tl.constexpr
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    lane = tl.arange(0, 16)[None, :]
    step = tl.load(step_ptr + b * step_stride)
    z = _normals(tl.load(seed_ptr + b), tl.load(slot_ptr + b), step, stream, group * 16 + lane)
    for j in tl.static_range(4):
        at = group * 64 + j * 16 + lane
        tl.store(z_ptr + b * n + at, z[j], mask=at < n)


def fused_step(
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
    *,
    config: triton.Config = CONFIGS[0],
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; arguments as ``fastdiff.ops.fused_step.fused_step_ref``."""
    x = x.contiguous()
    y = torch.empty_like(x)
    kept = torch.empty_like(x) if keep else x.new_empty(0)
    batch = x.shape[0]
    if x.numel() == 0:
        return y, kept
    n = x[0].numel()
    if not m[0, 0].is_contiguous():
        m = m.contiguous()
    coef = coef.contiguous()

    def flat(t: Tensor | None) -> Tensor:
        return x if t is None else t.contiguous()

    branches, parts, moments = m.shape[0], triton.cdiv(n, MOMENTS), x
    if rescale is not None:
        moments = torch.empty((batch, parts, 4), dtype=torch.float32, device=x.device)
        _moments_kernel[parts, batch](
            m, flat(w), moments, n, m.stride(0), m.stride(1), parts,
            BRANCHES=branches, WEIGHTED=w is not None, BLOCK=MOMENTS, num_warps=8,
        )  # fmt: skip
    plane = 0 if mask is None or mask.shape[1] == x.shape[1] else n // x.shape[1]
    mask = flat(mask)
    grid = (triton.cdiv(n, 64 * config.kwargs["BLOCK"]), batch)
    _fused_step_kernel[grid](
        x, m, flat(w), coef, flat(step), flat(h1), flat(h2), flat(rescale), moments, flat(seed),
        flat(slot), flat(noise_step), mask, flat(ref), flat(select), flat(stored), y,
        kept if keep else y, n, coef.shape[0], m.stride(0), m.stride(1),
        int(coef.shape[0] > 1), int(step is not None and step.shape[0] > 1),
        int(noise_step is not None and noise_step.shape[0] > 1), stream,
        mask.stride(0) if mask.shape[0] > 1 else 0, plane, parts,
        BRANCHES=branches, WEIGHTED=w is not None, STEP=step is not None, H1=h1 is not None,
        H2=h2 is not None, PHI=rescale is not None, NOISE=seed is not None, MASK=ref is not None,
        SELECT=select is not None, KEEP=keep, COLUMNS=coef.shape[1],
        PARTS=triton.next_power_of_2(parts), **config.kwargs, num_warps=config.num_warps,
    )  # fmt: skip
    return y, kept


def philox_normal(
    seed: Tensor,
    slot: Tensor,
    step: Tensor,
    stream: int,
    numel: int,
    *,
    config: triton.Config = CONFIGS[0],
) -> Tensor:
    """Launch on the current stream; arguments as ``fastdiff.ops.fused_step.philox_normal_ref``."""
    z = torch.empty((seed.shape[0], numel), dtype=torch.float32, device=seed.device)
    if z.numel():
        grid = (triton.cdiv(numel, 64 * config.kwargs["BLOCK"]), seed.shape[0])
        _philox_normal_kernel[grid](
            seed.contiguous(), slot.contiguous(), step.contiguous(), z, numel,
            int(step.shape[0] > 1), stream, **config.kwargs, num_warps=config.num_warps,
        )  # fmt: skip
    return z
