r"""Linear forward operators of inverse problems: ``y = H x``.

Each has ``apply`` (H), ``adjoint`` (H^T), ``pinv`` (the pseudo-inverse H^+) and ``project``: the
nearest state that explains the measurement,

    x + H^T (H H^T)^-1 (y - H x) = x + H^+ (y - H x)

All of them treat every sample alike and apart, so a batch of B is B singles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """A linear map of states ``x [B, C, ...]`` to measurements ``y [B, ...]``."""

    def apply(self, x: Tensor) -> Tensor:
        """``H x``."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """``H^T y``, of the shape of a state."""
        ...

    def pinv(self, y: Tensor) -> Tensor:
        """``H^+ y``, of the shape of a state: the smallest state that explains ``y``."""
        ...

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """The state nearest to ``x`` that explains ``y``."""
        ...


class Mask:
    """Inpainting: ``y = mask x``, of the state's shape, 0 where nothing is observed.

    Args:
        mask: ``[B|1, C|1, ...]`` of 0 and 1 or bool: 1 is observed.

    Raises:
        ValueError: ``mask`` has other values.
    """

    def __init__(self, mask: Tensor):
        if not isinstance(mask, Tensor) or not ((mask == 0) | (mask == 1)).all():
            raise ValueError("Mask: mask has values other than 0 and 1, need 1 where x is observed")
        self.on = mask.bool()

    def apply(self, x: Tensor) -> Tensor:
        return torch.where(self.on, x, 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.where(self.on, y, 0.0)

    pinv = adjoint  # H H^T is the identity where something is observed

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """A selection: ``x + (y - x)`` would not be ``y`` bit for bit."""
        return torch.where(self.on, y, x)


class BoxDown:
    """Super-resolution: means of boxes of ``factor`` along every dimension after the channels.

    Raises:
        ValueError: ``factor`` is no integer of at least 1; or, in use, does not divide a size.
    """

    def __init__(self, factor: int):
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"BoxDown: factor is {factor!r}, need an integer of at least 1")
        self.factor = factor

    def apply(self, x: Tensor) -> Tensor:
        for d in range(2, x.dim()):
            if x.shape[d] % self.factor:
                raise ValueError(
                    f"BoxDown: factor is {self.factor}, x is {list(x.shape)}, need a divisor of "
                    f"{x.shape[d]}"
                )
            boxes = (*x.shape[:d], -1, self.factor, *x.shape[d + 1 :])
            x = x.reshape(boxes).mean(d + 1)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return self.pinv(y) / float(self.factor) ** (y.dim() - 2)

    def pinv(self, y: Tensor) -> Tensor:
        """Every box is its mean: ``H H^T = factor^-d``."""
        for d in range(2, y.dim()):
            y = y.repeat_interleave(self.factor, d)
        return y

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.pinv(y - self.apply(x))


class Matrix:
    """Any matrix on the flattened state: ``y[b] = a vec(x[b])``, ``[B, M]``.

    Args:
        a: ``[M, N]``; of any rank: what no state explains is left aside.
        shape: of one sample, ``(C, ...)``, N elements.

    Raises:
        ValueError: they do not fit.
    """

    def __init__(self, a: Tensor, shape: Sequence[int]):
        if a.dim() != 2 or a.shape[1] != math.prod(shape):
            raise ValueError(
                f"Matrix: a is {list(a.shape)}, need [M, {math.prod(shape)}] for samples of "
                f"{list(shape)}"
            )
        self.a, self.shape = a, tuple(shape)
        self.inverse: Tensor = torch.linalg.pinv(a.double()).to(a.dtype)

    def apply(self, x: Tensor) -> Tensor:
        return torch.mm(x.flatten(1), self.a.T)

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.a).view(-1, *self.shape)

    def pinv(self, y: Tensor) -> Tensor:
        return (y @ self.inverse.T).view(-1, *self.shape)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.pinv(y - self.apply(x))


def measured(operator: Operator, x: Tensor, y: Tensor) -> Tensor:
    """``y`` on the device and in the dtype of ``x``.

    Raises:
        ValueError: it is no measurement of ``x [B, C, ...]``.
    """
    shape = operator.apply(x).shape
    if not isinstance(y, Tensor) or y.shape != shape:
        found = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"y is {found}, need {list(shape)}: what the operator gives of x {list(x.shape)}"
        )
    return y.to(device=x.device, dtype=x.dtype)
