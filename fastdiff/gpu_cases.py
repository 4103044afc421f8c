"""Calls of every op with a GPU kernel at the shapes of real models, for kernels that nothing runs.

Tensors are left uninitialised, and their memory untouched: kernels are compiled for them, or their
launches recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.fused_step import COLUMNS

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Case(NamedTuple):
    """``getattr(ops, op)(*args, **kwargs)`` with what ``make`` gives."""

    op: str
    name: str  # the model and the shape
    make: Callable[[], Call]


def _call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


def _regions(dtype: torch.dtype) -> Call:
    q, k, v = (torch.empty(2, 16, 1024, 72, dtype=dtype) for _ in range(3))
    of_row, of_key = (torch.empty(1, 1024, dtype=torch.int64) for _ in range(2))
    return _call(q, k, v, bias=ops.GroupBias(of_row, of_key, torch.empty(1, 16, 4, 4)))


def _packed(dtype: torch.dtype) -> Call:
    """Of four samples as many rows as one has, in unequal parts."""
    q, k, v = (torch.empty(b, 24, 4096, 64, dtype=dtype) for b in (1, 4, 4))
    return _call(q, k, v, q_starts=torch.empty(5, dtype=torch.int64))


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """All of them, with tensors of ``dtype``."""

    def t(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        return t(*shape), t(*shape), t(*shape)

    def rope(heads: int, tokens: int, dim: int, half: int, **kwargs: Any) -> Call:
        table = {"cos": torch.empty(tokens, half), "sin": torch.empty(tokens, half)}
        return _call(t(1, heads, tokens, dim), t(1, heads, tokens, dim), **table, **kwargs)

    def step(guided: bool) -> Call:
        x, coef = t(2, 4, 128, 128), torch.empty(1, len(COLUMNS))
        if not guided:
            return _call(x, t(2, 4, 128, 128), coef, h1=t(2, 4, 128, 128), keep=True)
        branches, w = t(2, 2, 4, 128, 128), torch.empty(2, 2)
        return _call(x, branches, coef, w=w, rescale=0.7, noise=ops.Noise(0, 0))

    # DiT-XL/2 at 512 px: 1024 tokens of 1152; Flux at 1024 px: 4096 + 512 tokens, 24 heads of 128
    tokens, vector = (2, 1024, 1152), (2, 1152)
    image = (2, 320, 64, 64)  # Stable Diffusion at 512 px, the finest level of its U-Net
    yield Case("attention", "SD 3, 2x24x4096x64", lambda: _call(*qkv(2, 24, 4096, 64)))
    yield Case("attention", "DiT-XL/2 2x16x1024x72, 4x4 regions", lambda: _regions(dtype))
    yield Case("attention", "Flux 1x24x4608x128", lambda: _call(*qkv(1, 24, 4608, 128)))
    yield Case(
        "attention",
        "SD 1.5 2x8x64x160, bias per key",
        lambda: _call(*qkv(2, 8, 64, 160), bias=t(2, 1, 64)),
    )
    yield Case("attention", "SD 3, a quarter of 4x24x4096x64, packed", lambda: _packed(dtype))
    yield Case("fused_step", "SDXL 2x4x128x128, second order", lambda: step(False))
    yield Case("fused_step", "SDXL 2x4x128x128, guided, rescaled, noise", lambda: step(True))
    yield Case(
        "philox_normal",
        "SDXL 2x4x128x128",
        lambda: _call((2, 4, 128, 128), 0, 0, device=torch.empty(0).device),
    )
    yield Case("gelu_tanh", "DiT-XL/2 2x1024x4608", lambda: _call(t(2, 1024, 4608), t(4608)))
    yield Case("gelu_tanh", "DiT-XL/2 2x1024x4608, no bias", lambda: _call(t(2, 1024, 4608)))
    yield Case("geglu", "SD 1.5 2x4096x2560", lambda: _call(t(2, 4096, 2560), t(2560)))
    yield Case(
        "geglu",
        "SD 1.5 2x4096x2560, no bias, tanh",
        lambda: _call(t(2, 4096, 2560), approximate="tanh"),
    )
    yield Case(
        "group_norm_silu", "SD 1.5 2x320x64x64", lambda: _call(t(*image), 32, t(320), t(320))
    )
    yield Case(
        "group_norm_silu",
        "SD 1.5 2x320x64x64, channels last",
        lambda: _call(t(*image).to(memory_format=torch.channels_last), 32, t(320), t(320)),
    )
    yield from _norms(dtype)
    quarter = (2, 256, 1152)
    yield Case(
        "gather_tokens",
        "DiT-XL/2 2x1024x1152, a quarter",
        lambda: _call(t(*tokens), torch.empty(quarter[:2], dtype=torch.int64)),
    )
    yield Case(
        "scatter_tokens",
        "DiT-XL/2 2x1024x1152, a quarter",
        lambda: _call(t(*tokens), torch.empty(quarter[:2], dtype=torch.int64), t(*quarter)),
    )
    yield Case(
        "scatter_tokens",
        "DiT-XL/2 2x1024x1152, a quarter, gate",
        lambda: _call(
            t(*tokens), torch.empty(quarter[:2], dtype=torch.int64), t(*quarter), t(*vector)
        ),
    )
    quarter_of_heads = (2, 24, 1024, 64)
    yield Case(
        "update_tokens_",
        "SD 3, 2x24x4096x64, a quarter",
        lambda: _call(
            t(2, 4096, 24, 64).transpose(1, 2),
            torch.empty(2, 1024, dtype=torch.int64),
            t(*quarter_of_heads),
        ),
    )
    yield Case(
        "select_tokens",
        "SD 3, a quarter of 2x4096",
        lambda: _call(t(2, 4096), 1024, high=0.3, forced=torch.empty(2, 4096, dtype=torch.bool)),
    )
    yield Case(
        "qk_norm_rope",
        "Flux 1x24x4608x128",
        lambda: rope(24, 4608, 128, 64, q_weight=t(128), k_weight=t(128)),
    )
    yield Case(
        "qk_norm_rope",
        "DiT-XL/2 1x16x1024x72, halves, positions",
        lambda: rope(
            16, 1024, 72, 36, interleaved=False, position=torch.empty(1, 1024, dtype=torch.int64)
        ),
    )
    few = _steps, _adapters, _low_rank, _aggregations, _small_experts, _experts
    for some in (*few, _sparse, _quantized, _quantized_experts, _int8_scores):
        yield from some(dtype)


def _norms(dtype: torch.dtype) -> Iterator[Case]:
    def t(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    tokens, vector = (2, 1024, 1152), (2, 1152)
    yield Case(
        "layer_norm_modulate",
        "DiT-XL/2 2x1024x1152",
        lambda: _call(t(*tokens), t(*vector), t(*vector)),
    )
    yield Case(
        "layer_norm_modulate",
        "Flux 1x4608x3072",
        lambda: _call(t(1, 4608, 3072), t(1, 3072), t(1, 3072)),
    )
    yield Case(
        "gate_residual", "DiT-XL/2 2x1024x1152", lambda: _call(t(*tokens), t(*tokens), t(*vector))
    )
    yield Case(
        "gate_residual_norm_modulate",
        "DiT-XL/2 2x1024x1152",
        lambda: _call(t(*tokens), t(*tokens), t(*vector), t(*vector), t(*vector)),
    )
    yield Case(
        "gate_residual_norm_quantize",
        "DiT-XL/2 2x1024x1152",
        lambda: _call(
            t(*tokens), t(*tokens), t(*vector), t(*vector), t(*vector),
            smooth=torch.empty(1152),
        ),
    )  # fmt: skip


def _steps(dtype: torch.dtype) -> Iterator[Case]:
    """Latents of Stable Diffusion at 512 px, of SD 3 at 1024, and of many particles."""

    def t(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def groups(count: int, size: int, of: torch.dtype) -> Call:
        return _call(torch.empty(count, size, dtype=of), torch.empty(count, dtype=torch.float64))

    small, large = (2, 4, 64, 64), (2, 16, 128, 128)
    yield Case("sample_sums", "SD 1.5 2x4x64x64", lambda: _call(t(*small)))
    yield Case(
        "sample_sums",
        "SD 3 2x16x128x128, difference",
        lambda: _call(t(*large), t(*large), kind="difference"),
    )
    yield Case(
        "sample_sums",
        "SD 1.5 16x4x64x64, product with one for all",
        lambda: _call(t(16, *small[1:]), t(1, *small[1:]), kind="product"),
    )
    yield Case(
        "sample_sums",
        "2x63x61, sizes no multiple of 4",
        lambda: _call(t(2, 63, 61), t(2, 63, 61), kind="product"),
    )
    yield Case("resample", "4 groups of 16", lambda: groups(4, 16, torch.float64))
    yield Case("resample", "4 groups of 1000", lambda: groups(4, 1000, torch.float32))


def _adapters(dtype: torch.dtype) -> Iterator[Case]:
    """DiT-XL/2 at 512 px, and the finest level of Stable Diffusion's U-Net."""

    def t(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def tasks() -> Tensor:
        return torch.empty(2, dtype=torch.int64)

    tokens, image = (2, 1024, 1152), (2, 320, 64, 64)
    yield Case("scale_shift", "DiT-XL/2 2x1024x1152", lambda: _call(t(*tokens), t(1152), t(1152)))
    yield Case(
        "scale_shift",
        "DiT-XL/2 2x1024x1152, 8 tasks, float32 scale",
        lambda: _call(t(*tokens), torch.empty(8, 1152), index=tasks()),
    )
    yield Case("scale_shift", "SD 1.5 2x320x64x64", lambda: _call(t(*image), t(320), t(320), dim=1))
    yield Case(
        "scale_shift_backward",
        "DiT-XL/2 2x1024x1152",
        lambda: _call(t(*tokens), t(*tokens), t(1152)),
    )
    yield Case(
        "scale_shift_backward",
        "SD 1.5 2x320x64x64, 8 tasks",
        lambda: _call(t(*image), t(*image), t(8, 320), dim=1, index=tasks()),
    )


def _low_rank(dtype: torch.dtype) -> Iterator[Case]:
    """DiT-XL/2 at 512 px, eight samples with an adapter each; Stable Diffusion's U-Net with one."""

    def t(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def call(tokens: int, k: int, n: int, rank: int, adapters: int) -> Call:
        index = torch.empty(8, dtype=torch.int64) if adapters > 1 else None
        factors = t(adapters, rank, k), t(adapters, n, rank)
        return _call(t(8, tokens, n), t(8, tokens, k), *factors, torch.empty(adapters), index)

    for k, n in ((1152, 3456), (4608, 1152)):
        yield Case(
            "lora_add",
            f"DiT-XL/2 8x1024, {k} to {n}, 8 of rank 16",
            lambda k=k, n=n: call(1024, k, n, 16, 8),  # type: ignore[misc]
        )
    yield Case("lora_add", "SD 1.5 8x4096, 320, rank 4", lambda: call(4096, 320, 320, 4, 1))
    yield Case("lora_add", "DiT-XL/2 8x256, 1152, rank 256", lambda: call(256, 1152, 1152, 256, 2))


def _aggregations(dtype: torch.dtype) -> Iterator[Case]:
    """Of three models: the finest level of Stable Diffusion's U-Net, and DiT-XL/2 at 512 px."""

    def t(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    image, map_, tokens = (2, 320, 64, 64), (3, 2, 1, 64, 64), (2, 1024, 1152)

    def both(name: str, *logits: int) -> Iterator[Case]:
        what = f"3 of SD 1.5 2x320x64x64, {name}"
        yield Case("aggregate_features", what, lambda: _call(t(3, *image), t(*logits)))
        yield Case(
            "aggregate_features_backward",
            what,
            lambda: _call(t(*image), t(3, *image), t(*logits)),
        )

    yield from both("one map", *map_)
    yield from both("a map of each channel", 3, *image)
    yield Case(
        "aggregate_features",
        "3 of DiT-XL/2 2x1024x1152, float32 maps",
        lambda: _call(t(3, *tokens).movedim(-1, 2), torch.empty(3, 2, 1, 1024)),
    )
    yield Case(
        "aggregate_features_backward",
        "3 of DiT-XL/2 2x1024x1152, float32 maps",
        lambda: _call(
            t(*tokens).movedim(-1, 1), t(3, *tokens).movedim(-1, 2), torch.empty(3, 2, 1, 1024)
        ),
    )


def _small_experts(dtype: torch.dtype) -> Iterator[Case]:
    """DiT-MoE-S at 256 px, guided: 512 tokens of 384, two of 8 or 16 experts; and a large one."""

    def t(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def index(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64)

    slots = 1024
    yield Case("moe_route", "DiT-MoE-S, 2 of 8, 512 tokens", lambda: _call(t(512, 8), 2))
    yield Case(
        "moe_route",
        "8 of 64, 16384 tokens, by sample, capacity",
        lambda: _call(
            t(16384, 64),
            8,
            sample_logits=t(4, 64),
            gate="sigmoid",
            renormalise=True,
            capacity=2560,
        ),
    )
    yield Case(
        "moe_combine",
        "DiT-MoE-S, 2 of 8, 512x384",
        lambda: _call(t(slots, 384), torch.empty(512, 2), index(512, 2)),
    )
    yield Case(
        "grouped_linear",
        "DiT-MoE-S 8 experts, up, swiglu",
        lambda: _call(
            t(512, 384),
            t(8, 3072, 384),
            index(9),
            bias=t(8, 3072),
            index=index(slots),
            activation="swiglu",
        ),
    )
    yield Case(
        "grouped_linear",
        "DiT-MoE-S 8 experts, down",
        lambda: _call(t(slots, 1536), t(8, 384, 1536), index(9)),
    )
    yield Case(
        "grouped_linear",
        "DiT-MoE-S 16 experts, up, gelu",
        lambda: _call(t(slots, 384), t(16, 1536, 384), index(17), activation="gelu"),
    )
    yield Case(
        "grouped_linear",
        "DiT-MoE-S 8 experts, gradient of the tokens",
        lambda: _call(t(slots, 3072), t(8, 3072, 384).transpose(1, 2), index(9)),
    )
    yield Case(
        "grouped_weight_grad",
        "DiT-MoE-S 8 experts, up",
        lambda: _call(t(slots, 3072), t(512, 384), index(9), index=index(slots)),
    )


def _experts(dtype: torch.dtype) -> Iterator[Case]:
    """DiT-MoE-B/2 at 256 px: 2 of 8 experts for each of 2x256 tokens of 768."""

    def t(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def whole(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64)

    yield Case("moe_route", "DiT-MoE-B/2, 2 of 8 for 512 tokens", lambda: _call(t(512, 8), 2))
    yield Case(
        "moe_route",
        "8 of 256 for 4096 tokens, logits of samples, capacity",
        lambda: _call(t(4096, 256), 8, sample_logits=t(2, 256), renormalise=True, capacity=160),
    )
    yield Case(
        "moe_combine",
        "DiT-MoE-B/2 2x512x768",
        lambda: _call(t(1024, 768), torch.empty(512, 2), whole(512, 2)),
    )
    yield Case(
        "grouped_linear",
        "DiT-MoE-B/2 1024 rows, 768 to 2x3072, gathered, SwiGLU",
        lambda: _call(
            t(512, 768), t(8, 6144, 768), whole(9), index=whole(1024), activation="swiglu"
        ),
    )
    yield Case(
        "grouped_linear",
        "DiT-MoE-B/2 8192 rows, 3072 to 768",
        lambda: _call(t(8192, 3072), t(8, 768, 3072), whole(9)),
    )
    yield Case(
        "grouped_linear",
        "64 experts, 1024 rows, 768 to 768, transposed, bias",
        lambda: _call(t(1024, 768), t(64, 768, 768).transpose(1, 2), whole(65), bias=t(64, 768)),
    )
    yield Case(
        "grouped_weight_grad",
        "DiT-MoE-B/2 1024 rows, 3072 to 768",
        lambda: _call(t(1024, 768), t(1024, 3072), whole(9)),
    )


def _sparse(dtype: torch.dtype) -> Iterator[Case]:
    """SaRA: a twentieth of a weight's entries, of its blocks, of a convolution's."""

    def t(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def index(shape: tuple[int, ...], rows: int, entries: int, block: int = 1) -> ops.SparseIndex:
        crow, col = (torch.empty(n, dtype=torch.int32) for n in (rows + 1, entries))
        return ops.SparseIndex(crow, col, shape, (block, block))

    yield Case(
        "sparse_weight_grad",
        "DiT-XL/2 512 tokens, 5 % of 1152x1152",
        lambda: _call(t(512, 1152), t(512, 1152), index((1152, 1152), 1152, 66355)),
    )
    yield Case(
        "sparse_weight_grad",
        "SD 1.5 2048 tokens, 5 % of 640x640 in blocks of 16x16",
        lambda: _call(t(2048, 640), t(2048, 640), index((640, 640), 40, 80, 16)),
    )
    yield Case(
        "sparse_conv2d_weight_grad",
        "SD 1.5 2x320x64x64, 5 % of a 3x3 convolution",
        lambda: _call(
            t(2, 320, 64, 64), t(2, 320, 64, 64), index((320, 320, 3, 3), 320, 46080), padding=1
        ),
    )
    yield Case(
        "sparse_conv2d_weight_grad",
        "SD 1.5 2x640x32x32, 5 % of a 3x3 convolution of stride 2, channels last",
        lambda: _call(
            t(2, 640, 16, 16).to(memory_format=torch.channels_last),
            t(2, 640, 32, 32).to(memory_format=torch.channels_last),
            index((640, 640, 3, 3), 640, 184320),
            stride=2,
            padding=1,
        ),
    )
    yield from _trained(dtype)


def _trained(dtype: torch.dtype) -> Iterator[Case]:
    """5 % of DiT-XL/2's first feed-forward weight, [4608, 1152]."""
    count = 4608 * 1152 // 20
    numbers = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)

    def call(index: torch.dtype, step: int | Tensor) -> Call:
        packed = [torch.empty(count) for _ in range(4)]
        weight = torch.empty(4608, 1152, dtype=dtype)
        return _call(*packed, weight, torch.empty(count, dtype=index), **numbers, step=step)

    yield Case("sparse_adamw_", "DiT-XL/2, 5 % of 4608x1152", lambda: call(torch.int32, 3))
    yield Case(
        "sparse_adamw_",
        "DiT-XL/2, 5 % of 4608x1152, int64, step on the device",
        lambda: call(torch.int64, torch.empty(1)),
    )


def _int8_scores(dtype: torch.dtype) -> Iterator[Case]:
    """Self-attention of SD 3, DiT-XL/2 at 512 px, and Flux."""

    def call(*shape: int) -> Call:
        return _call(*(torch.empty(shape, dtype=dtype) for _ in range(3)))

    yield Case("quant_attention", "SD 3, 2x24x4096x64", lambda: call(2, 24, 4096, 64))
    yield Case("quant_attention", "DiT-XL/2 2x16x1024x72", lambda: call(2, 16, 1024, 72))
    yield Case("quant_attention", "Flux 1x24x4608x128", lambda: call(1, 24, 4608, 128))


def _quantized(dtype: torch.dtype, values: torch.dtype = torch.int8) -> Iterator[Case]:
    """DiT-XL/2 at 512 px: its feed-forward layers on 2x1024 tokens, and few tokens."""
    choice = {} if values == torch.int8 else {"dtype": values}

    def tokens(count: int, width: int, **how: Any) -> Call:
        return _call(torch.empty(2, count, width, dtype=dtype), **how, **choice)

    def product(count: int, k: int, n: int, groups: int, **how: Any) -> Call:
        x = ops.Quantized(torch.empty(2, count, k, dtype=values), torch.empty(2, count), dtype)
        weight = ops.QuantWeight(torch.empty(n, k, dtype=values), torch.empty(n, groups), 8)
        return _call(x, weight, torch.empty(n, dtype=dtype), **how)

    yield Case("quantize", "DiT-XL/2 2x1024x1152", lambda: tokens(1024, 1152))
    yield Case(
        "quantize",
        "DiT-XL/2 2x1024x4608, gelu_tanh, smoothed",
        lambda: tokens(1024, 4608, activation="gelu_tanh", smooth=torch.empty(4608)),
    )
    yield Case("quantize", "DiT-S/2 2x256x384", lambda: tokens(256, 384, smooth=torch.empty(384)))
    yield Case(
        "quantize", "SD 1.5 2x1024x2x2560, geglu", lambda: tokens(1024, 5120, activation="geglu")
    )
    if values == torch.int8:
        yield from _patches(dtype)
    yield Case(
        "quant_linear",
        "DiT-XL/2 2x1024, 1152 to 4608, gelu_tanh",
        lambda: product(1024, 1152, 4608, 1, activation="gelu_tanh"),
    )
    yield Case(
        "quant_linear",
        "DiT-XL/2 2x1024, 4608 to 1152, groups of 128",
        lambda: product(1024, 4608, 1152, 36),
    )
    yield Case(
        "quant_linear",
        "DiT-XL/2 2x64, 1152 to 3456",
        lambda: product(64, 1152, 3456, 1),
    )
    yield Case(
        "quant_linear",
        "DiT-XL/2 2x64, 1152 to 3456, groups of 96",
        lambda: product(64, 1152, 3456, 12),
    )


def _patches(dtype: torch.dtype) -> Iterator[Case]:
    """Convolutions of Stable Diffusion's U-Net at 512 px."""

    def call(*shape: int, **how: Any) -> Call:
        x = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return _call(x, 3, padding=1, **how)

    yield Case("quantize_patches", "SD 1.5 2x320x64x64", lambda: call(2, 320, 64, 64))
    yield Case(
        "quantize_patches", "SD 1.5 2x640x32x32, stride 2", lambda: call(2, 640, 32, 32, stride=2)
    )
    yield Case(
        "quantize_patches",
        "SD 1.5 2x1280x16x16, doubled",
        lambda: call(2, 1280, 16, 16, upsample=True),
    )
    yield Case("quantize_patches", "SD 1.5 2x4x64x64", lambda: call(2, 4, 64, 64))


def _quantized_experts(dtype: torch.dtype) -> Iterator[Case]:
    """DiT-MoE-B/2 at 256 px: 2 of 8 experts for each of 2x256 tokens of 768."""

    def call(tokens: int, slots: int, k: int, n: int, groups: int, **how: Any) -> Call:
        x = ops.Quantized(torch.empty(tokens, k, dtype=torch.int8), torch.empty(tokens), dtype)
        values, scale = torch.empty(8, n, k, dtype=torch.int8), torch.empty(8, n, groups)
        more = {} if tokens == slots else {"index": torch.empty(slots, dtype=torch.int64)}
        offsets = torch.empty(9, dtype=torch.int64)
        return _call(x, ops.ExpertWeight(values, scale, 8), offsets, **more, **how)

    yield Case(
        "grouped_quant_linear",
        "DiT-MoE-B/2 1024 rows, 768 to 2x3072, gathered, SwiGLU",
        lambda: call(512, 1024, 768, 6144, 1, activation="swiglu"),
    )
    yield Case(
        "grouped_quant_linear",
        "DiT-MoE-B/2 8192 rows, 3072 to 768, bias",
        lambda: call(8192, 8192, 3072, 768, 1, bias=torch.empty(8, 768, dtype=dtype)),
    )
    yield Case(
        "grouped_quant_linear",
        "DiT-MoE-B/2 1024 rows, 768 to 2x3072, groups of 64, SwiGLU",
        lambda: call(512, 1024, 768, 6144, 12, activation="swiglu"),
    )
    yield Case(
        "grouped_quant_linear",
        "DiT-MoE-B/2 64 rows, 3072 to 768, GELU",
        lambda: call(64, 64, 3072, 768, 1, activation="gelu"),
    )


def float8_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Those of int8 in float8_e4m3fn, whose products not every GPU has."""
    for case in _quantized(dtype, torch.float8_e4m3fn):
        yield case._replace(name=f"{case.name}, float8")


def moved(*values: Any) -> int:
    """Bytes of the tensors in ``values``, each counted once: what a call must read and write."""
    seen: dict[int, int] = {}
    for value in values:
        for t in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(t, Tensor):
                seen[t.data_ptr()] = t.numel() * t.element_size()
    return sum(seen.values())


def traffic(op: str, args: tuple[Any, ...], out: Any) -> int:
    """Bytes that a call of ``op`` must read and write."""
    if op == "gather_tokens":  # of the tokens only those asked for
        return moved(args[1]) + 2 * moved(out)
    if op == "update_tokens_":
        return moved(args[1]) + 2 * moved(args[2])
    if op == "sparse_adamw_":  # all but the gradient and the index is read and written
        count, packed = args[0].numel(), moved(args[0], *args[2:4])
        return 2 * packed + moved(args[1], args[5]) + count * args[4].element_size()
    return moved(*args, out)
