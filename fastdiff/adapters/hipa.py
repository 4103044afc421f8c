r"""HiPA: one step in the place of many, by low-rank adapters that learn the high frequencies which
one step lacks (Zhang & Hooi 2023, arXiv:2311.18158, section 4).

    x_0 = (x_T - sigma_T eps(x_T, T)) / alpha_T
    L   = spatial(x, y) + a |high(x) - high(y)|_1 + b |edges(x) - edges(y)|_1

y is what the frozen network gives in many steps from the same noise, high is what lies above a
radius in the Fourier plane, edges are Sobel's derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.adapters.base import Targets
from fastdiff.adapters.lora import LoRA

# The projections of self- and cross-attention in diffusers' networks.
ATTENTION = r"(^|\.)attn[12]\.(to_q|to_k|to_v|to_out\.0)$"


class HiPA(LoRA):
    """The adapters of HiPA: of attention's projections, rank 16.

    On the U-Net of Stable Diffusion 2.1 these are 3.3 million parameters, the paper's number: 0.38
    % of that U-Net (866 million), 0.26 % with text encoder and decoder. (The paper's 0.04 % is the
    share of no base of Stable Diffusion 2.1: it would have 8.3 thousand million.)

    Args:
        network: any module.
        rank: of each.
        targets: None: attention's projections as diffusers names them.
        settings: see :class:`LoRA`.
    """

    method = "hipa"

    def __init__(
        self, network: nn.Module, rank: int = 16, *, targets: Targets = None, **settings: Any
    ) -> None:
        super().__init__(
            network, rank, targets=ATTENTION if targets is None else targets, **settings
        )


def share(adapter: nn.Module, *modules: nn.Module) -> float:
    """The trainable parameters of an adapter over all parameters of ``modules``.

    Raises:
        ValueError: those have none.
    """
    base = sum(p.numel() for m in modules for p in m.parameters())
    if not base:
        raise ValueError("share: modules have no parameters, need a network or more")
    return sum(p.numel() for p in adapter.parameters() if p.requires_grad) / base


def one_step(
    x: Tensor,
    prediction: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    kind: str = "eps",
) -> Tensor:
    """The clean sample of one step, in float32: over a small alpha half precision overflows.

    Args:
        x: x_T, ``[B, ...]``.
        prediction: of the network at x_T, as ``x``.
        alpha, sigma: of level T: numbers or ``[B]``. Tensors on a GPU are read by the host.
        kind: what ``prediction`` is: "eps", or "v" (``alpha x - sigma v``, at any alpha).

    Raises:
        ValueError: shapes differ, or alpha is 0 with "eps", of which x_T tells nothing then.
    """
    if x.shape != prediction.shape:
        raise ValueError(
            f"one_step: prediction has shape {list(prediction.shape)}, need that of x, "
            f"{list(x.shape)}"
        )
    if kind not in ("eps", "v"):
        raise ValueError(f"one_step: kind is {kind!r}, need 'eps' or 'v'")
    wide = torch.promote_types(x.dtype, torch.float32)
    a, s = (_level(name, level, x, wide) for name, level in (("alpha", alpha), ("sigma", sigma)))
    x, prediction = x.to(wide), prediction.to(wide)
    if kind == "v":
        return a * x - s * prediction
    if bool((torch.as_tensor(alpha) == 0).any()):
        raise ValueError(
            "one_step: alpha is 0 and kind 'eps', need alpha above 0, or a network that predicts v"
        )
    return (x - s * prediction) / a


def _level(name: str, value: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    level = torch.as_tensor(value, dtype=dtype, device=x.device)
    if level.dim() and level.shape != x.shape[:1]:
        raise ValueError(
            f"one_step: {name} has shape {list(level.shape)}, need a number or [{x.shape[0]}]"
        )
    return level.view(-1, *[1] * (x.dim() - 1)) if level.dim() else level


def _bands(x: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The spectrum of ``x``, and where it is low."""
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"high_pass: x is {x.dtype} of shape {list(x.shape)}, need [..., H, W], floating"
        )
    if not 0 <= radius <= math.sqrt(2):
        raise ValueError(
            f"high_pass: radius is {radius}, need 0 to 1.414 (of half a cycle a pixel)"
        )
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    h, w = x.shape[-2:]
    down = 2 * torch.fft.fftfreq(h, device=x.device)[:, None]
    across = 2 * torch.fft.rfftfreq(w, device=x.device)
    return torch.fft.rfft2(x, norm="ortho"), down.square() + across.square() < radius**2


def high_pass(x: Tensor, radius: float = 0.25) -> Tensor:
    """What of an image lies at a frequency of ``radius`` or above.

    Args:
        x: ``[..., H, W]``, any floating dtype; not square too.
        radius: over the highest frequency of a row, half a cycle a pixel: 0 is all of x, above 0
            the mean is not in it.

    Returns:
        As ``x``, float32 (float64 for float64). ``high_pass(x) + low_pass(x)`` is x, and their
        squares sum to its.

    Raises:
        ValueError: an argument does not fit.
    """
    spectrum, low = _bands(x, radius)
    out: Tensor = torch.fft.irfft2(spectrum.masked_fill(low, 0), s=x.shape[-2:], norm="ortho")
    return out


def low_pass(x: Tensor, radius: float = 0.25) -> Tensor:
    """The rest of :func:`high_pass`."""
    spectrum, low = _bands(x, radius)
    out: Tensor = torch.fft.irfft2(spectrum.masked_fill(~low, 0), s=x.shape[-2:], norm="ortho")
    return out


def edges(x: Tensor) -> Tensor:
    """Sobel's derivatives across and down, by channel; past the border lies the nearest pixel.

    Args:
        x: ``[B, C, H, W]``.

    Returns:
        ``[B, 2, C, H, W]``, float32 (float64 for float64): 1 for a slope of 1 a pixel.

    Raises:
        ValueError: the shape does not fit.
    """
    if x.dim() != 4:
        raise ValueError(f"edges: x has shape {list(x.shape)}, need [B, C, H, W]")
    x = F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (1, 1, 1, 1), mode="replicate")
    found = []
    for flip in (False, True):  # a difference one way, [1, 2, 1] / 4 the other
        y = x.transpose(2, 3) if flip else x
        slope = (y[..., 2:] - y[..., :-2]) / 2
        slope = (slope[:, :, :-2] + 2 * slope[:, :, 1:-1] + slope[:, :, 2:]) / 4
        found.append(slope.transpose(2, 3) if flip else slope)
    return torch.stack(found, dim=1)


def high_frequency_loss(
    x: Tensor,
    target: Tensor,
    *,
    radius: float = 0.25,
    spatial: float = 1.0,
    fourier: float = 1.0,
    edge: float = 1.0,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss that promotes high frequencies, a scalar.

    With ``spatial`` above 0 and the default distance it is 0 where x equals the target and nowhere
    else; the other two do not see the mean.

    Args:
        x, target: ``[B, C, H, W]``; no gradient goes to the latter.
        radius: of :func:`high_pass`.
        spatial, fourier, edge: weights, 0 or more (the paper gives none).
        distance: of the spatial term, such as LPIPS or DISTS, a scalar or one of each sample; None:
            the mean absolute difference.

    Raises:
        ValueError: shapes differ, or weights are negative or all 0.
    """
    if x.shape != target.shape or x.dim() != 4:
        raise ValueError(
            f"high_frequency_loss: target has shape {list(target.shape)}, need that of x, "
            f"{list(x.shape)}, [B, C, H, W]"
        )
    weights = dict(spatial=spatial, fourier=fourier, edge=edge)
    if not all(0 <= w < math.inf for w in weights.values()) or not any(weights.values()):
        raise ValueError(f"high_frequency_loss: weights are {weights}, need 0 or more, one above 0")
    wide = torch.promote_types(x.dtype, torch.float32)
    x, target = x.to(wide), target.detach().to(wide)
    gap = x - target  # both transforms are linear
    loss = x.new_zeros(())
    if spatial:
        near = gap.abs() if distance is None else distance(x, target)
        loss = loss + spatial * near.mean()
    if fourier:
        loss = loss + fourier * high_pass(gap, radius).abs().mean()
    if edge:
        loss = loss + edge * edges(gap).abs().mean()
    return loss
