"""The choice of survivors among the particles of a few groups, against torch's softmax, cumulative
sum and search. What it is held to is a step of the network: it is called once in each."""

from __future__ import annotations

from functools import partial

import torch
from _case import Case

from fastdiff.ops import resample


def cases() -> list[Case]:
    result = []
    for groups, count in ((1, 8), (4, 16), (16, 64), (4, 1024)):
        logw = torch.randn(groups, count, dtype=torch.float64)
        u = torch.rand(groups, dtype=torch.float64)
        result.append(
            Case(
                f"{groups} groups of {count}",
                partial(resample, logw, u),
                {"eager": partial(resample, logw, u, impl="ref")},
                bytes=24.0 * logw.numel(),
                target=1.2,
            )
        )
    return result
