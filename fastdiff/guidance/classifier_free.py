r"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), in a limited interval of noise
levels (Kynkaanniemi et al. 2024, arXiv:2404.07724).

    m = (1 - g) m_unconditional + g m_conditional
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassifierFree(NamedTuple):
    """``scale`` g for all samples or one each ``[B]``; guidance is on where ``low <= t <= high``.

    ``t`` is the model's time in 0..1000. Outside the interval, and where every g is 1, the
    unconditional branch does not run.
    """

    scale: float | Tensor
    interval: tuple[float, float] | None = None

    def active(self, t: float) -> bool:
        """Whether the unconditional branch runs at model time ``t``; needs no device value."""
        if not isinstance(self.scale, Tensor) and self.scale == 1:
            return False
        return self.interval is None or self.interval[0] <= t <= self.interval[1]

    def weights(self, batch: int, device: torch.device) -> Tensor:
        """``[B, 2]`` float32 weights of (unconditional, conditional)."""
        if isinstance(self.scale, Tensor):
            g = self.scale.to(device, torch.float32).expand(batch)
        else:  # written on the device: no copy from the host
            g = torch.full((batch,), self.scale, dtype=torch.float32, device=device)
        return torch.stack((1 - g, g), 1)
