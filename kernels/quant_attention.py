"""Triton kernels of quant_attention: the keys' mean, rows as int8, and attention over them.

_key_mean_kernel: a program per head and BLOCK channels sums over the keys in float64.
_int8_rows_kernel: a program per BLOCK_M rows of a head takes the mean off (of k), and gives int8
rows with a scale each; products are rounded before they are rounded to integers (no fused
multiply-add), so that the values are those of the reference, bit for bit.
_quant_attention_kernel: a program per BLOCK_M query rows of a head with the online softmax, as in
kernels/attention.py: scores are int8 products in int32, times both scales; P V is in the dtype of v
with float32 sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastdiff.kernels import INTERPRET

# Chosen by compiling (triton 3.9), not by timing: no call of fastdiff/gpu_cases.py spills registers
# on sm_80, sm_90, sm_100, sm_120 or gfx942, or has a block above 96 KiB of shared memory.
CONFIGS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=1),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=4, num_stages=1),
]
_TINY = 127 * 2.0**-126  # below it 127 / max is no float32


def _on_amd() -> bool:
    return not INTERPRET and driver.active.get_current_target().backend == "hip"


# The largest tile that stays in registers, as an index into CONFIGS; column: the wider of the
# head's dimensions up to 64, 128, 256. An operand of float32 is held twice, as two tf32 numbers.
_TILES_16_BIT = (0, 1, 2)
_TILES_16_BIT_AMD = (0, 2, 2)
_TILES_FLOAT32 = (2, 3, 3)


def _config(dtype: torch.dtype, widest: int, amd: bool) -> triton.Config:
    half = _TILES_16_BIT_AMD if amd else _TILES_16_BIT
    tiles = _TILES_FLOAT32 if dtype == torch.float32 else half
    return CONFIGS[tiles[0 if widest <= 64 else 1 if widest <= 128 else 2]]


@triton.jit
def _key_mean_kernel(
    k_ptr,  # [B, H, T, D], unit last stride
    mean_ptr,  # [B, H, D], contiguous
    heads,
    keys,  # T
    k_b, k_h, k_s,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    head = tl.program_id(0) // parts
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    at_d = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    at_t = tl.arange(0, BLOCK_N)
    base = k_ptr + b * k_b + h * k_h
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, keys, BLOCK_N):
        seen = (start + at_t < keys)[:, None] & (at_d < DIM)[None, :]
        k = tl.load(base + at_t[:, None] * k_s + at_d[None, :], mask=seen, other=0.0)
        base += BLOCK_N * k_s.to(tl.int64)
        total += tl.sum(k.to(tl.float64), 0)
    mean = (total / keys).to(tl.float32)
    tl.store(mean_ptr + head.to(tl.int64) * DIM + at_d, mean, mask=at_d < DIM)


@triton.jit
def _int8_rows_kernel(
    x_ptr,  # [B, H, R, D], unit last stride
    mean_ptr,  # [B, H, D], contiguous
    q_ptr,  # [B, H, R, WIDTH], contiguous
    s_ptr,  # [B, H, R], contiguous
    heads,
    rows,  # R
    x_b, x_h, x_s,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = ((tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    at_d = tl.arange(0, BLOCK_D)
    live, known = row < rows, at_d < DIM
    base = x_ptr + (head // heads) * x_b + (head % heads) * x_h
    x = tl.load(
        base + row[:, None] * x_s + at_d[None, :], mask=live[:, None] & known[None, :], other=0.0
    )
    y = x.to(tl.float32)
    if MEAN:
        y -= tl.load(mean_ptr + head * DIM + at_d, mask=known, other=0.0)[None, :]
    size = tl.abs(y)
    most = tl.max(tl.where(size < float("inf"), size, float("inf")), 1)  # infinite for a NaN too
    finite = most < float("inf")
    usable = finite & (most >= TINY)
    one = tl.full([BLOCK_M], 1.0, tl.float32)
    inverse = tl.div_rn(one, tl.where(usable, most, 1.0)) * 127.0
    v = y * inverse[:, None]
    v = (v + 12582912.0) - 12582912.0  # 1.5 2^23: to an integer, ties to even
    v = tl.where(usable[:, None], tl.minimum(tl.maximum(v, -127.0), 127.0), 0.0)
    scale = tl.where(usable, tl.div_rn(most, one * 127.0), 0.0)
    at = head * rows + row
    tl.store(s_ptr + at, tl.where(finite, scale, float("nan")), mask=live)
    tl.store(
        q_ptr + at[:, None] * WIDTH + at_d[None, :],
        v.to(tl.int8),
        mask=live[:, None] & (at_d < WIDTH)[None, :],
    )


@triton.jit
def _quant_attention_kernel(
    q_ptr,  # [B, H, S, WIDTH] int8, contiguous
    q_scale_ptr,  # [B, H, S], contiguous
    k_ptr,  # [B, H, T, WIDTH] int8, contiguous
    k_scale_ptr,  # [B, H, T], contiguous
    v_ptr,  # [B, H, T, Dv], unit last stride
    out_ptr,  # [B, S, H, Dv], contiguous
    scale,
    heads,
    rows,  # S
    keys,  # T
    v_b, v_h, v_s,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    log2e: tl.constexpr = 1.4426950408889634
    tiles = tl.cdiv(rows, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_d = tl.arange(0, BLOCK_D)
    at_v = tl.arange(0, BLOCK_V)
    at_t = tl.arange(0, BLOCK_N)
    live = row < rows
    at = head * rows + row
    q = tl.load(
        q_ptr + at[:, None] * WIDTH + at_d[None, :],
        mask=live[:, None] & (at_d < WIDTH)[None, :],
        other=0,
    )
    q_scale = tl.load(q_scale_ptr + at, mask=live, other=0.0) * (scale * log2e)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    k_base = k_ptr + head * keys * WIDTH
    s_base = k_scale_ptr + head * keys
    v_base = v_ptr + (head // heads) * v_b + (head % heads) * v_h
    k_tile = at_t[None, :] * WIDTH + at_d[:, None]
    v_tile = at_t[:, None] * v_s + at_v[None, :]
    for start in range(0, keys, BLOCK_N):
        seen = start + at_t < keys
        k = tl.load(k_base + k_tile, mask=seen[None, :] & (at_d < WIDTH)[:, None], other=0)
        k_scale = tl.load(s_base + start + at_t, mask=seen, other=0.0)
        v = tl.load(v_base + v_tile, mask=seen[:, None] & (at_v < VALUE_DIM)[None, :], other=0.0)
        k_base += BLOCK_N * WIDTH
        v_base += BLOCK_N * v_s.to(tl.int64)
        products = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
        score = products * (k_scale[None, :] * q_scale[:, None])
        score = tl.where(seen[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        acc += tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    tl.store(
        out_ptr + ((head // heads * rows + row)[:, None] * heads + head % heads) * VALUE_DIM
        + at_v[None, :],
        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (at_v < VALUE_DIM)[None, :],
    )  # fmt: skip


def _int8_rows(x: Tensor, mean: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = x.shape
    q = torch.empty(batch, heads, rows, width, dtype=torch.int8, device=x.device)
    s = torch.empty(batch, heads, rows, dtype=torch.float32, device=x.device)
    block_d = triton.next_power_of_2(width)
    block_m = max(1, 4096 // block_d)
    _int8_rows_kernel[(batch * heads * triton.cdiv(rows, block_m),)](
        x, x if mean is None else mean, q, s, heads, rows, *x.stride()[:3],
        DIM=dim, WIDTH=width, MEAN=mean is not None, TINY=_TINY, BLOCK_M=block_m, BLOCK_D=block_d,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return q, s


def quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    smooth: bool,
    *,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch on the current stream; shapes as in ``fastdiff.ops.quant_attention``."""
    batch, heads, rows, dim = q.shape
    keys, value_dim = v.shape[2:]
    out = q.new_empty(batch, rows, heads, value_dim)
    if out.numel() == 0 or keys == 0:
        return out.zero_().transpose(1, 2)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    mean = None
    if smooth:
        mean = torch.empty(batch, heads, dim, dtype=torch.float32, device=q.device)
        _key_mean_kernel[(batch * heads * triton.cdiv(dim, 32),)](
            k, mean, heads, keys, *k.stride()[:3], DIM=dim, BLOCK=32, BLOCK_N=128, num_warps=4
        )
    width = (dim + 15) // 16 * 16  # int8 rows begin at multiples of 16 bytes
    q8, q_scale = _int8_rows(q, None, width)
    k8, k_scale = _int8_rows(k, mean, width)
    block_d = max(32, triton.next_power_of_2(width))  # what int8 matrix instructions take
    block_v = max(16, triton.next_power_of_2(value_dim))
    amd = _on_amd()
    config = config or _config(q.dtype, max(block_d, block_v), amd)
    _quant_attention_kernel[(batch * heads * triton.cdiv(rows, config.kwargs["BLOCK_M"]),)](
        q8, q_scale, k8, k_scale, v, out, scale, heads, rows, keys, *v.stride()[:3],
        WIDTH=width, VALUE_DIM=value_dim,
        # Three tf32 products keep float32's bits on tensor cores, where plain float32 runs on none.
        PRECISION="ieee" if amd else "tf32x3",
        BLOCK_D=block_d, BLOCK_V=block_v, **config.kwargs,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out.transpose(1, 2)
