r"""Forecasts of a feature as weighted sums of its last values.

With divided differences f[s_0 .. s_i] of the values F_j at steps s_0 > s_1 > ... (the newest first)
and x = s - s_0, the order-k forecast for step s is

    F(s) = sum_i f[s_0 .. s_i] p_i(x)

- "lagrange": p_i = prod_{m < i} (s - s_m), Newton's form: the polynomial through all k + 1 values.
- "taylor": p_i = x^i, differences in the place of derivatives, as TaylorSeer (arXiv:2503.06923).
- "hermite": p_i = sigma^i H_i(sigma x) with the physicists' Hermite polynomials and sigma = 0.5, as
  HiCache (arXiv:2508.16984): damped, so that errors of high differences do not grow.
- "adams": F_0 plus the integral over [s_0, s] of the polynomial through the slopes
  (F_j - F_{j+1}) / (s_j - s_{j+1}) at s_j: Adams-Bashforth on slopes instead of derivatives.

Order 0 is the newest value, and order 1 is the same line for all but "hermite".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import numpy as np

METHODS = ("lagrange", "taylor", "hermite", "adams")
SIGMA = 0.5  # of "hermite", the paper's


def _hermite(i: int, x: float) -> float:
    low, high = 1.0, 2 * x
    for n in range(1, i):
        low, high = high, 2 * x * high - 2 * n * low
    return high if i else low


def _basis(method: str, i: int, nodes: Sequence[int], step: int) -> float:
    x = step - nodes[0]
    if method == "taylor":
        return float(x) ** i
    if method == "hermite":
        return SIGMA**i * _hermite(i, SIGMA * x)
    return float(prod(step - s for s in nodes[:i]))


def _adams(nodes: Sequence[int], step: int) -> list[float]:
    weights = [1.0] + [0.0] * (len(nodes) - 1)
    places = nodes[:-1]  # of the slopes
    for j, here in enumerate(places):
        others = [s for s in places if s != here]
        line = np.polynomial.Polynomial.fromroots(others) if others else None
        share = np.polynomial.Polynomial([1.0]) if line is None else line / line(here)
        whole = share.integ(lbnd=nodes[0])(step)
        slope = whole / (here - nodes[j + 1])
        weights[j] += float(slope)
        weights[j + 1] -= float(slope)
    return weights


@lru_cache(maxsize=4096)
def weights(method: str, nodes: tuple[int, ...], step: int) -> tuple[float, ...]:
    """Weights of the values at ``nodes`` (descending, distinct) in the forecast for ``step``."""
    if method == "adams":
        return tuple(_adams(nodes, step))
    found = [0.0] * len(nodes)
    for i in range(len(nodes)):
        p = _basis(method, i, nodes, step)
        for j in range(i + 1):
            found[j] += p / prod(nodes[j] - s for s in nodes[: i + 1] if s != nodes[j])
    return tuple(found)
