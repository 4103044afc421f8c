"""Triton kernel of sparse_adamw_: one program per BLOCK entries.

Reads 20 bytes an entry (24 with an index of int64) and writes 12 and the weight's entry, each once.
Every product and sum is rounded as in fastdiff/ops/sparse_adamw.py: the compiler fuses none.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((1024, 4), (256, 4), (2048, 8))]


@triton.jit
def _power(step, high, low):
    """beta^step in float64, of log(beta) in two parts."""
    return tl.exp(step * high + step * low)


@triton.jit
def _sparse_adamw_kernel(
    values_ptr,  # [n] float32; written
    grad_ptr,  # [n] float32
    exp_avg_ptr,  # [n] float32; written
    exp_avg_sq_ptr,  # [n] float32; written
    weight_ptr,  # [size]; written at index
    index_ptr,  # [n]
    step_ptr,  # [1] float32 where STEP
    n,
    size,
    decay,
    weight1,  # from exp_avg where NEAR, else from grad, as torch's lerp
    beta2,
    weight2,
    eps,
    step_size,
    root,
    lr_high, lr_low, log1_high, log1_low, log2_high, log2_low,
    NEAR: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    if STEP:
        t = tl.load(step_ptr).to(tl.float64)
        correction = 1.0 - _power(t, log1_high, log1_low)
        step_size = (-(lr_high / correction + lr_low / correction)).to(tl.float32)
        root = tl.sqrt(1.0 - _power(t, log2_high, log2_low)).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=live, other=0.0)
    m = tl.load(exp_avg_ptr + i, mask=live, other=0.0)
    v = tl.load(exp_avg_sq_ptr + i, mask=live, other=0.0)
    value = tl.load(values_ptr + i, mask=live, other=0.0)
    at = tl.load(index_ptr + i, mask=live, other=-1).to(tl.int64)
    m = tl.fma(grad - m, tl.zeros_like(m) + weight1, m if NEAR else grad)
    v = tl.fma(weight2 * grad, grad, v * beta2)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root) + eps
    value = value * decay + tl.div_rn(step_size * m, denominator)
    tl.store(exp_avg_ptr + i, m, mask=live)
    tl.store(exp_avg_sq_ptr + i, v, mask=live)
    tl.store(values_ptr + i, value, mask=live)
    inside = (at >= 0) & (at < size)
    tl.store(weight_ptr + at, value.to(weight_ptr.dtype.element_ty), mask=inside)


def _parts(x: float) -> tuple[float, float]:
    """``x`` as the sum of two float32, which is what a number is to a kernel (Veltkamp 1968)."""
    if math.isinf(x):
        return x, 0.0
    spread = x * (2.0**29 + 1)
    high = spread + (x - spread)
    return high, x - high


def sparse_adamw_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    index: Tensor,
    step: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step_size: float,
    root: float,
    *,
    config: triton.Config = CONFIGS[0],
) -> None:
    """Launch on the current stream; shapes as in ``fastdiff.ops.sparse_adamw_``."""
    n = values.shape[0]
    if not n:
        return
    logs = [math.log(b) if b else -math.inf for b in (beta1, beta2)]
    exact = [part for x in (lr, *logs) for part in _parts(x)]
    weight1 = _parts(1 - beta1)[0]
    near = weight1 < 0.5
    block = config.kwargs["BLOCK"]
    _sparse_adamw_kernel[(triton.cdiv(n, block),)](
        values, grad.contiguous(), exp_avg, exp_avg_sq, weight, index.contiguous(),
        values if step is None else step, n, weight.numel(),
        1 - lr * weight_decay, weight1 if near else weight1 - 1, beta2, 1 - beta2,
        eps, -step_size, root, *exact,
        NEAR=near, STEP=step is not None, BLOCK=block,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
