r"""First-block cache: the change of the first block's residual decides whether the rest runs.

The rule of ParaAttention's and diffusers' FirstBlockCache, for every sample on its own:

    d_b = mean |r_b - r'_b| / mean |r'_b|,   r = block_1(x) - x

with r' of the last step at which sample b was computed. Where d_b <= threshold, the residual of the
remaining blocks is reused, or continued from the last ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.cache._check import rule

Memory = dict[str, Tensor]


def relative_change(now: Tensor, then: Tensor) -> Tensor:
    """Mean absolute change over mean absolute value ``[B]`` of signals ``[B, ...]``; NaN where
    either has one, or both changes and values are zero. The means of half-precision signals are
    float32: what is added up over steps must not stop at three digits."""
    now, then = now.flatten(1), then.flatten(1)
    wide = torch.promote_types(now.dtype, torch.float32)
    return (now - then).abs().mean(1, dtype=wide) / then.abs().mean(1, dtype=wide)


@dataclass(frozen=True)
class FirstBlock:
    """Reuse the residual of all blocks but the first while the first one's changes little.

    On a U-Net the first block is the first residual layer of the way down, and what is reused is
    what its depths hand to the join of skip 1.

    Args:
        threshold: relative L1 change up to which a sample reuses; 0 reuses nothing.
        order: of the forecast from what was computed, 0 (reuse) to 4.
        warmup: first steps that are all computed, at least 1.
        most: reuses in a row after which a sample is computed; None: no such limit.
        method: of :mod:`fastdiff.cache.extrapolate`.

    Raises:
        ValueError: an argument does not fit.
    """

    threshold: float = 0.1
    order: int = 0
    warmup: int = 1
    most: int | None = None
    method: str = "lagrange"

    def __post_init__(self) -> None:
        rule("FirstBlock", self)

    @property
    def neutral(self) -> bool:
        """It computes everything."""
        return self.threshold == 0

    def distance(self, memory: Memory, signal: Tensor) -> Tensor:
        """``[B]``: how far the residual ``signal`` is from that of the last computed step."""
        return relative_change(signal, memory["signal"])

    def update(
        self, memory: Memory, signal: Tensor, rows: Tensor | None, distance: Tensor | None
    ) -> Memory:
        """Memory for the next step; the samples ``rows`` were computed, None: all of them."""
        if rows is None or not memory:
            return {"signal": signal}
        return {"signal": memory["signal"].index_copy(0, rows, signal[rows])}
