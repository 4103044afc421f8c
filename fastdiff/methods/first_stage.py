r"""The first stage of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.1), whole
or in tiles.

    z = scale (encode(image) - shift),   image = decode(z / scale + shift)

A tile is computed with a halo around it that is cut off again. Where the halo covers the receptive
field of a convolutional network (zero padding at the true borders included) the tiles are the whole
result. Networks that look further (attention, GroupNorm over the map) leave seams: overlapping
tiles are blended with weights that rise across the overlap and have the sum 1. A blend is then
nowhere further from the whole result than the worst of its tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]


class Span(NamedTuple):
    """A tile along one dimension of the input: its own part, and with the halo."""

    start: int
    stop: int
    low: int
    high: int


def spans(n: int, tile: int, halo: int, overlap: int) -> list[Span]:
    """Tiles of ``tile`` that cover ``n``, the last as short as need be."""
    found = []
    for start in range(0, n, tile - overlap):
        stop = min(start + tile, n)
        found.append(Span(start, stop, max(start - halo, 0), min(stop + halo, n)))
        if stop == n:
            break
    return found


def ramp(
    span: Span, n: int, overlap: int, ratio: Fraction, device: torch.device | None = None
) -> Tensor:
    """Weights of a tile's outputs along one dimension: rising from its start and falling to its end
    over the overlap, but not at the borders of the whole."""
    size, over = int((span.stop - span.start) * ratio), int(overlap * ratio)
    j = torch.arange(size, dtype=torch.float64, device=device) + 0.5
    weight = torch.ones_like(j)
    if over and span.start > 0:
        weight = torch.minimum(weight, j / over)
    if over and span.stop < n:
        weight = torch.minimum(weight, (size - j) / over)
    return weight


def tiled(
    network: Network,
    x: Tensor,
    *,
    tile: tuple[int, int],
    ratio: Fraction | int = 1,
    halo: int = 0,
    overlap: int = 0,
) -> Tensor:
    """``network(x)`` in tiles, one at a time: as much memory as one tile needs.

    Args:
        network: ``[B, C, h, w]`` to ``[B, C', ratio h, ratio w]``; local, and shifted where its
            input is (by whole output pixels).
        x: ``[B, C, H, W]``.
        tile: height and width of a tile, in pixels of ``x``.
        ratio: output size over input size: 8 of a decoder, ``Fraction(1, 8)`` of its encoder.
        halo: pixels of ``x`` around a tile that are computed and cut off.
        overlap: pixels of ``x`` that neighbouring tiles share, at most half a tile.

    Returns:
        ``[B, C', ratio H, ratio W]``; with one tile ``network(x)`` bit for bit. Gradients go
        through.

    Raises:
        ValueError: a size does not fit, or ``network`` gives another size than ``ratio`` says.
    """
    ratio, size = Fraction(ratio), x.shape[-2:]
    if x.dim() != 4:
        raise ValueError(f"tiled: x is {list(x.shape)}, need [B, C, H, W]")
    if halo < 0 or overlap < 0 or 2 * overlap > min(tile):
        raise ValueError(
            f"tiled: tile, halo, overlap are {tile}, {halo}, {overlap}, need halo >= 0 and overlap "
            "from 0 to half a tile"
        )
    for name, value in (("tile", tile), ("x", size), ("halo", (halo,)), ("overlap", (overlap,))):
        if any(v * ratio % 1 for v in value):
            need = f"multiples of {ratio.denominator}, the pixels of one output"
            raise ValueError(f"tiled: {name} is {tuple(value)}, need {need}")
    rows, columns = (spans(n, t, halo, overlap) for n, t in zip(size, tile, strict=True))
    if len(rows) * len(columns) == 1:
        return network(x)
    out: Tensor | None = None
    for row, column in itertools.product(rows, columns):
        y = network(x[..., row.low : row.high, column.low : column.high])
        want = [int((s.high - s.low) * ratio) for s in (row, column)]
        if list(y.shape[-2:]) != want:
            raise ValueError(f"tiled: network gives {list(y.shape)}, need [..., {want}] by ratio")
        if out is None:
            out = y.new_zeros(*y.shape[:-2], *(int(n * ratio) for n in size))
        inner = [
            slice(int((s.start - s.low) * ratio), int((s.stop - s.low) * ratio))
            for s in (row, column)
        ]
        place = tuple(slice(int(s.start * ratio), int(s.stop * ratio)) for s in (row, column))
        own = y[..., inner[0], inner[1]]
        if not overlap:
            out[..., place[0], place[1]] = own
            continue
        down = ramp(row, size[0], overlap, ratio, y.device)
        across = ramp(column, size[1], overlap, ratio, y.device)
        weight = (down[:, None] * across).to(y.dtype)
        out[..., place[0], place[1]] += weight * own  # weights have the sum 1 everywhere
    assert out is not None
    return out


@dataclass(frozen=True)
class FirstStage:
    """An autoencoder with the scale of its latents, whole or in tiles.

    Args:
        encode: image ``[B, C, H, W]`` to latent ``[B, c, H / factor, W / factor]``.
        decode: back.
        scale, shift: of the latents: 0.18215 and 0 of Stable Diffusion.
        factor: pixels of an image along one of a latent.
        tile: of the latent, height and width; None: whole.
        halo, overlap: of tiles, in pixels of the latent: see :func:`tiled`.

    Raises:
        ValueError: ``scale`` is 0 or less.
    """

    encode: Network
    decode: Network
    scale: float = 0.18215
    shift: float = 0.0
    factor: int = 8
    tile: tuple[int, int] | None = None
    halo: int = 0
    overlap: int = 0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"FirstStage: scale is {self.scale!r}, need a number above 0")

    def to_latent(self, image: Tensor) -> Tensor:
        """The latent that the diffusion model sees, of mean 0 and spread 1."""
        f = self.factor
        if self.tile is None:
            z = self.encode(image)
        else:
            z = tiled(
                self.encode, image, tile=(f * self.tile[0], f * self.tile[1]),
                ratio=Fraction(1, f), halo=f * self.halo, overlap=f * self.overlap,
            )  # fmt: skip
        return (z - self.shift) * self.scale

    def to_image(self, z: Tensor) -> Tensor:
        """The image of a latent."""
        z = z / self.scale + self.shift
        if self.tile is None:
            return self.decode(z)
        return tiled(
            self.decode, z, tile=self.tile, ratio=self.factor, halo=self.halo, overlap=self.overlap
        )
