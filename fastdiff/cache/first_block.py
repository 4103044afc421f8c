r"""First-block cache: the change of the first block's residual decides whether the rest runs.

The rule of ParaAttention's and diffusers' FirstBlockCache, for every sample on its own:

    d_b = mean |r_b - r'_b| / mean |r'_b|,   r = block_1(x) - x

with r' of the last step at which sample b was computed. Where d_b <= threshold, the residual of the
remaining blocks is reused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fastdiff.cache._check import number


@dataclass(frozen=True)
class FirstBlock:
    """Reuse the residual of all blocks but the first while the first one's changes little.

    Args:
        threshold: relative L1 change up to which a sample reuses; 0 reuses nothing.

    Raises:
        ValueError: threshold is negative or not finite.
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        most = math.nextafter(math.inf, 0)
        number("FirstBlock", "threshold", self.threshold, 0, most, "a number of at least 0")

    def change(self, residual: Tensor, before: Tensor) -> Tensor:
        """``[B]`` from residuals ``[B, ...]``; NaN where either is."""
        now, then = residual.flatten(1), before.flatten(1)
        return (now - then).abs().mean(1) / then.abs().mean(1)
