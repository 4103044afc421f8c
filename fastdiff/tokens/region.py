r"""Region-adaptive sampling (Liu et al. 2025, arXiv:2502.10389): tokens in focus are computed at
every step, the others keep the noise that was last predicted for them.

With m_n the metric of token n in the noise that the step before used, and d_n how many steps in a
row n was left out, the tokens that a step leaves out are

    the (1 - high) share of lowest m_n exp(k d_n), then of the rest those of highest m_n exp(-k d_n)

so that on either side a token comes nearer to being computed with every step that leaves it out.
(The published code sorts once, by m_n exp(+k d_n), which keeps tokens of the high end out for good;
``compatible`` does that.) Steps before ``start``, and ``resets``, compute everything.

The paper's metric is the spread of a token's noise; its settings for SD 3 are ``RegionAdaptive(0.5,
4, (12, 20), metric="std", high=0.3)``. Ours, the default, is how much the noise of a token changes:
over 28 steps of dit-scenes it kept 40 dB of the dense run's pictures with a quarter of the tokens,
where the paper's settings kept 36 dB with a half (``bench/sparse.py whole``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.cache._check import number, whole

METRICS = ("std", "norm", "change")


@dataclass(frozen=True)
class RegionAdaptive:
    """Compute a share of the tokens at most steps.

    Args:
        ratio: share of the tokens that a sparse step computes, 0 to 1, rounded up to whole tokens;
            1 computes everything. With 0 only forced tokens (:func:`fastdiff.region`), or one.
        start: first steps, all dense, at least 1.
        resets: dense steps in between, which refresh everything that is kept.
        end: first step of the dense ones that end a run; None: there are none.
        end_ratio: share at the last step; the share changes from ``ratio`` in a straight line.
        metric: of a token's noise: "std", over channels, averaged over its pixels (over pixels
            where there is one channel); "norm", the Euclidean norm over channels, likewise; or
            "change" (ours): how much it changed a step when it was last computed, times the steps
            since, which is what leaving the token out is expected to cost.
        high: share of the left-out tokens that is taken from the highest metric, 0 to 1.
        starvation: k above, at least 0.
        most: steps in a row after which a token comes first; no token is then left out more than
            ``most + ceil(1 / ratio)`` times in a row. None: no such limit.
        compatible: the published code's rule, with its counts of all steps left out.
        own_times: multistep samplers of ours take the slope of a token's prediction over the time
            since it was last computed, and not over one step. That is right where predictions are
            linear in log-SNR; off by default, as it kept 0.1 to 0.8 dB less of dit-digits (DPM++ 2M
            at 14 and 28 steps): the steeper slope makes up for what a waiting token has missed.

    Raises:
        ValueError: an argument does not fit.
    """

    ratio: float = 0.5
    start: int = 2
    resets: Sequence[int] = (10, 20, 30, 40)
    end: int | None = None
    end_ratio: float | None = None
    metric: str = "change"
    high: float = 0.0
    starvation: float = 0.1
    most: int | None = None
    compatible: bool = False
    own_times: bool = False

    def __post_init__(self) -> None:
        who = "RegionAdaptive"
        number(who, "ratio", self.ratio, 0, 1, "a number from 0 to 1")
        number(who, "high", self.high, 0, 1, "a number from 0 to 1")
        number(who, "starvation", self.starvation, 0, 100, "a number from 0 to 100")
        whole(who, "start", self.start, 1)
        if self.end is not None:
            whole(who, "end", self.end, 1)
        if self.end_ratio is not None:
            number(who, "end_ratio", self.end_ratio, 0, 1, "a number from 0 to 1, or None")
        if self.most is not None:
            whole(who, "most", self.most, 1)
        if self.metric not in METRICS:
            raise ValueError(f"{who}: metric is {self.metric!r}, need one of {', '.join(METRICS)}")
        resets = [self.resets] if isinstance(self.resets, int) else list(self.resets)
        for step in resets:
            whole(who, "resets", step, 0)
        object.__setattr__(self, "resets", tuple(sorted(set(resets))))
        if self.compatible and self.most is not None:
            raise ValueError(f"{who}: most is {self.most} and compatible is set, need one of them")

    @property
    def neutral(self) -> bool:
        """It computes everything."""
        return self.ratio == 1 and self.end_ratio in (None, 1)

    def full(self, step: int, steps: int | None) -> bool:
        """Whether a step computes all tokens."""
        late = self.end is not None and step >= self.end
        return self.neutral or step < self.start or step in self.resets or late

    def share(self, step: int, steps: int | None) -> float:
        """Of the tokens that a step computes."""
        if self.full(step, steps):
            return 1.0
        if self.end_ratio is None or steps is None or steps - 1 <= self.start:
            return float(self.ratio)
        way = min(1.0, (step - self.start) / (steps - 1 - self.start))
        return self.ratio + (self.end_ratio - self.ratio) * way

    def left_out(self, step: int, steps: int | None, tokens: int) -> tuple[int, int]:
        """How many of ``tokens`` tokens a step leaves out: of the lowest, and of the highest. At
        least one is computed. (The published code rounds both ends down.)"""
        skip = min(int((1 - self.share(step, steps)) * tokens + 1e-9), tokens - 1)
        low = int((1 - self.high) * skip + 1e-9)
        return low, int(self.high * skip + 1e-9) if self.compatible else skip - low


def score(noise: Tensor, metric: str) -> Tensor:
    """What a choice of tokens goes by.

    Args:
        noise: ``[S, N, P, C]``: of every token its P pixels of C channels.
        metric: of :class:`RegionAdaptive`.

    Returns:
        ``[S, N]`` float32, at least 0.
    """
    noise = noise.float()
    if metric == "norm":
        return noise.norm(dim=3).mean(2)
    if noise.shape[3] > 1:
        return noise.std(dim=3).mean(2)
    pixels = noise[..., 0]
    return pixels.std(dim=2) if pixels.shape[2] > 1 else pixels[..., 0].abs()


def forced_tokens(region: Tensor, grid: Sequence[int], halo: int) -> Tensor:
    """Tokens that touch a region of the picture, and those around them.

    Args:
        region: bool ``[S|1, H, W]``, or ``[S|1, F, H, W]`` of a video.
        grid: tokens along each of its dimensions; a token covers an equal share of the picture.
        halo: tokens around those, in every direction.

    Returns:
        bool ``[S|1, N]``.
    """
    x = region[:, None].float()
    size = tuple(grid)
    pool: Any = torch.nn.functional.adaptive_max_pool2d
    spread: Any = torch.nn.functional.max_pool2d
    if len(size) == 3:
        pool = torch.nn.functional.adaptive_max_pool3d
        spread = torch.nn.functional.max_pool3d
    x = pool(x, size)
    if halo:
        x = spread(x, 2 * halo + 1, stride=1, padding=halo)
    return x.flatten(1) > 0
