"""One DPM-Solver++(2M) SDE step with guidance and guidance rescale, on latents of 512 and 1024 px
images and of 16-channel autoencoders, against the chain of torch calls that it fuses; and the noise
alone."""

from __future__ import annotations

import torch
from _case import Case
from torch import Tensor

from fastdiff.ops import Noise, fused_step, philox_normal
from fastdiff.samplers import VP, DPMpp2M

SHAPES = ((2, 4, 64, 64), (2, 4, 128, 128), (2, 16, 128, 128))
GUIDANCE, PHI, STEP = 4.0, 0.7, 10


def _eager(
    x: Tensor, m: Tensor, h1: Tensor, row: list[float], noise: bool
) -> tuple[Tensor, Tensor]:
    """The same step as pipelines write it, one torch call per operation."""
    _, _, c_x, c_0, c_m, c_h1, _, sigma, k_x, _, k_m, *_ = row
    uncond, cond = m
    guided = uncond + GUIDANCE * (cond - uncond)
    dims = list(range(1, x.dim()))
    rescaled = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    guided = PHI * rescaled + (1 - PHI) * guided
    x0 = k_x * x + k_m * guided
    out = c_x * x + c_m * guided + c_h1 * h1
    if noise:
        out = out + sigma * torch.randn_like(x)
    return out, x0


def _case(shape: tuple[int, ...], dtype: torch.dtype, noise: bool) -> Case:
    x, h1 = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    m = torch.randn(2, *shape).to(dtype)
    with torch.device("cpu"):
        table = DPMpp2M(sde=noise).table(VP(), 20, "eps", None).rows
    rows, row = table.to(x.device), table[STEP].tolist()
    w = torch.tensor([[1 - GUIDANCE, GUIDANCE]]).expand(shape[0], 2).contiguous()
    step, seeds = torch.tensor(STEP), torch.arange(shape[0])
    drawn = Noise(seeds, 0, step) if noise else None

    def fast() -> tuple[Tensor, Tensor]:
        return fused_step(x, m, rows, step=step, w=w, rescale=PHI, h1=h1, noise=drawn, keep=True)

    return Case(
        f"{list(shape)} {str(dtype)[6:]}{' noise' if noise else ''}",
        fast,
        {"eager": lambda: _eager(x, m, h1, row, noise)},
        bytes=6.0 * x.numel() * x.element_size(),
        target=3.0 if shape[-1] == 128 and dtype == torch.float32 else None,
        comparable=not noise,  # two generators
    )


def cases() -> list[Case]:
    result = [_case(shape, torch.float32, noise) for shape in SHAPES for noise in (True, False)]
    result += [_case(SHAPES[1], torch.bfloat16, True)]
    z = torch.empty(SHAPES[1])
    result.append(
        Case(
            f"philox_normal {list(z.shape)} float32",
            lambda: philox_normal(z.shape, 0, device=z.device),
            {"eager": lambda: torch.randn_like(z)},
            bytes=4.0 * z.numel(),
            comparable=False,
        )
    )
    return result
