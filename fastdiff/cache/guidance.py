r"""Reuse of a guidance branch (CFG-Cache of FasterCache, Lv et al. 2024, arXiv:2410.19355).

The unconditional output differs from the conditional one of the same step by a difference that
changes slowly. It is kept at full steps; at the others only the conditional branch runs, and

    uncond = cond + w_low * LP(delta) + w_high * HP(delta),    delta = (uncond - cond)_full,

where LP keeps the low spatial frequencies and HP = 1 - LP. Low frequencies weigh ``1 + alpha_low``
in the early part of a run, high ones ``1 + alpha_high`` in the late part; all others weigh 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.cache._check import number, whole

ORDERS = ("auto", "uncond first", "cond first")
SURE = 2  # full calls in which guidance is told from a batch of independent samples


@dataclass(frozen=True)
class GuidanceReuse:
    """At every how many steps the unconditional branch is evaluated.

    Args:
        interval: n: steps that n divides are full; 1: all of them.
        start: share of the run's steps, 0 to 1, before which all steps are full. The first two
            always are: samples that start from one noise differ from the second on.
        switch: share of the run's steps at which the early part ends.
        alpha_low: additional weight of low frequencies in the early part.
        alpha_high: additional weight of high frequencies in the late part.
        cutoff: radius of the low frequencies, in units of the highest one along an axis.
        order: which half of a batch is unconditional; "auto": as pipelines of the network's class
            have it ("cond first" for diffusers' DiT, "uncond first" for all others).
        compare: where nobody says whether a batch of an even number of rows holds both branches
            (``fastdiff.sample`` and diffusers' schedulers say how many samples there are), the
            host waits once to compare its halves. False: it does hold them, as you know.

    Raises:
        ValueError: an argument does not fit.
    """

    interval: int = 2
    start: float = 0.0
    switch: float = 0.5
    alpha_low: float = 0.2
    alpha_high: float = 0.2
    cutoff: float = 0.25
    order: str = "auto"
    compare: bool = True

    def __post_init__(self) -> None:
        who = "GuidanceReuse"
        whole(who, "interval", self.interval, 1)
        for name in ("start", "switch"):
            number(who, name, getattr(self, name), 0, 1, "a share of the steps, 0 to 1")
        most = math.nextafter(math.inf, 0)
        for name in ("alpha_low", "alpha_high"):
            number(who, name, getattr(self, name), -1, most, "a number of at least -1")
        number(who, "cutoff", self.cutoff, 0, most, "a number of at least 0")
        if not isinstance(self.compare, bool):
            raise ValueError(f"{who}: compare is {self.compare!r}, need True or False")
        if self.order not in ORDERS:
            raise ValueError(f"{who}: order is {self.order!r}, need one of {', '.join(ORDERS)}")

    @property
    def neutral(self) -> bool:
        """It computes everything."""
        return self.interval == 1

    def full(self, step: int, steps: int | None) -> bool:
        """Step ``step`` of ``steps``, from 0, evaluates both branches.

        Raises:
            ValueError: ``start`` cuts the run, and ``steps`` is not known.
        """
        if self.interval == 1 or step < SURE or step % self.interval == 0:
            return True
        return bool(self.start) and step < self._at("start", steps)

    def weights(self, step: int, steps: int | None) -> tuple[float, float]:
        """``(w_low, w_high)`` of a step that reuses.

        Raises:
            ValueError: the parts weigh differently, and ``steps`` is not known.
        """
        if not self.alpha_low and not self.alpha_high:
            return 1.0, 1.0
        early = step < self._at("switch", steps)
        return (1 + self.alpha_low, 1.0) if early else (1.0, 1 + self.alpha_high)

    def _at(self, name: str, steps: int | None) -> int:
        share: float = getattr(self, name)
        if steps is None:
            raise ValueError(
                f"GuidanceReuse: {name} {share} is a share of a number of steps that is not known; "
                "need fastdiff.request(steps=...), or start 0 with alpha_low 0 and alpha_high 0"
            )
        return math.ceil(share * steps - 1e-9)  # 0.07 of 100 rounds above 7


def low_pass(delta: Tensor, cutoff: float) -> Tensor:
    """Frequencies of ``delta`` ``[..., H, W]`` within a radius of ``cutoff``, in float32.

    1 is the highest frequency along an axis (half a cycle a pixel), and corners lie at sqrt(2).
    """
    height, width = delta.shape[-2:]
    fy = 2 * torch.fft.fftfreq(height, device=delta.device)
    fx = 2 * torch.fft.rfftfreq(width, device=delta.device)
    mask = fy[:, None] ** 2 + fx**2 <= cutoff**2
    found: Tensor = torch.fft.irfft2(torch.fft.rfft2(delta.float()) * mask, s=(height, width))
    return found


def weigh(delta: Tensor, weights: tuple[float, float], cutoff: float) -> Tensor:
    """``w_low * LP(delta) + w_high * HP(delta)``, in the dtype of ``delta``.

    ``delta`` is ``[B, C, H, W]`` or, a frame each, ``[B, C, F, H, W]``; of tokens
    ``[B, N, C]`` no grid is known, and they stay as they were.
    """
    w_low, w_high = weights
    if delta.dim() < 4 or (w_low == 1 and w_high == 1):
        return delta
    low = low_pass(delta, cutoff)
    return (w_low * low + w_high * (delta.float() - low)).to(delta.dtype)
