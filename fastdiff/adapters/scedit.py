r"""SCEdit: a U-Net's skips are edited, the network is not (Jiang et al. 2023, arXiv:2312.11392,
section 3). At every pixel of a skip s of C channels, with hidden width ratio C,

    SC-Tuner:   s' = s + scale T(s),                         T(x) = W_2 gelu(W_1 x + b_1) + b_2
    CSC-Tuner:  s' = s + scale sum_k scale_k (h_k + T_k(s + h_k))

h_k is control image k at the skip's size; W_2 = b_2 = h_k = 0 at first. What is trained lies on the
way up, so backward ends where the way up begins; and h_k depends on the image alone, so that all
steps of a run share it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.adapters.base import Adapter, Before, Hook, kept
from fastdiff.adapters.tap import whole

_NAMES = ("skips", "res_hidden_states_tuple")  # of a stage's argument: ours, diffusers'
# Channels and stride of the convolutions that bring an image to a latent's size.
_ENCODER = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2))


class Tuner(nn.Module):
    """T: ``dim`` C to ``hidden`` to C, at every pixel."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        nn.init.zeros_(self.up.weight), nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]``, the dtype of ``x``."""
        h = F.gelu(_linear(self.down, x.permute(0, 2, 3, 1)))
        return _linear(self.up, h).permute(0, 3, 1, 2)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class HintEncoder(nn.Module):
    """A control image to a feature map of each skip.

    Args:
        channels: of the image.
        skips: channels of each skip, and whether it is half the size of the one before.
    """

    def __init__(self, channels: int, skips: Sequence[tuple[int, bool]]) -> None:
        super().__init__()
        self.first: Any = nn.ModuleList()
        for width, stride in _ENCODER:
            self.first.append(nn.Conv2d(channels, width, 3, stride, 1))
            channels = width
        self.zero: Any = nn.ModuleList()
        for width, down in skips:
            conv = nn.Conv2d(channels, width, 3, 2 if down else 1, 1)
            nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.zero.append(conv)
            channels = width

    def forward(self, image: Tensor) -> list[Tensor]:
        h = image.to(self.first[0].weight.dtype)
        for i, conv in enumerate(self.first):
            h = conv(F.silu(h) if i else h)
        hints = []
        for conv in self.zero:
            h = conv(F.silu(h))
            hints.append(h)
        return hints


class _Skips(Adapter):
    """Changes skips where a U-Net's stages of the way up take them."""

    frozen: bool
    numbers: list[int]

    def find(self, network: Any, skips: Sequence[int] | None) -> list[tuple[int, bool]]:
        """Channels of every skip of the network, and whether it is half the size of the one before.

        Raises:
            ValueError: the network is no U-Net that is known, or ``skips`` has a number of none.
        """
        if not all(hasattr(network, n) for n in ("conv_in", "down_blocks", "up_blocks")):
            raise ValueError(
                f"{self.method}: network is {type(network).__name__}, need a U-Net with conv_in, "
                "down_blocks and up_blocks"
            )
        found = [(network.conv_in.out_channels, False)]
        for block in network.down_blocks:
            found += [(r.conv2.out_channels, False) for r in block.resnets]
            if block.downsamplers is not None:
                found.append((block.resnets[-1].conv2.out_channels, True))
        self.stages: list[tuple[Any, int, str, int]] = []  # block, its first skip, the argument
        stop = len(found)
        for block in network.up_blocks:
            names = list(inspect.signature(type(block).forward).parameters)[1:]
            known = [n for n in _NAMES if n in names]
            stop -= len(getattr(block, "resnets", ()))
            if not known or stop < 0:
                raise ValueError(
                    f"{self.method}: block {type(block).__name__} of the way up takes no skips "
                    "that are known"
                )
            self.stages.append((block, stop, known[0], names.index(known[0])))
        if stop:
            raise ValueError(
                f"{self.method}: the way up takes {len(found) - stop} skips, the way down gives "
                f"{len(found)}"
            )
        numbers = list(range(len(found))) if skips is None else list(skips)
        whole(self.method, 0, len(found) - 1, **{f"skips[{i}]": n for i, n in enumerate(numbers)})
        if not numbers or len(set(numbers)) != len(numbers):
            raise ValueError(f"{self.method}: skips is {skips}, need numbers, each once")
        self.numbers = sorted(numbers)
        return found

    def change(self, number: int, skip: Tensor) -> Tensor:
        """One of ``numbers``."""
        raise NotImplementedError

    def before(self) -> Iterator[tuple[nn.Module, Before]]:
        for i, (block, start, name, at) in enumerate(self.stages):
            yield block, self._entering(start, name, at, i == 0)

    def _entering(self, start: int, name: str, at: int, deepest: bool) -> Before:
        def enter(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = list(args)
            skips = given[at] if at < len(given) else kwargs[name]
            cut = self.frozen and self.training
            new = tuple(self._one(start + i, s.detach() if cut else s) for i, s in enumerate(skips))
            if at < len(given):
                given[at] = new
            else:
                kwargs = {**kwargs, name: new}
            return tuple(given), kwargs

        return enter

    def _one(self, number: int, skip: Tensor) -> Tensor:
        # One without rows stands for a skip that a cache leaves out.
        return self.change(number, skip) if number in self.numbers and len(skip) else skip

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        if self.frozen:  # of every stage, so that what is in it is given back before the next
            network: Any = self.network
            for block in (*network.down_blocks, getattr(network, "mid_block", None)):
                if block is not None:
                    yield block, self._cut

    def _cut(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if not self.training:
            return out
        if isinstance(out, Tensor):
            return out.detach()
        return tuple(self._cut(block, args, kwargs, o) for o in out)

    def parts(self) -> Any:
        raise ValueError(f"{self.method}: what it adds is no change of weights, nothing to merge")


def _hidden(who: str, ratio: float, dim: int) -> int:
    if not 0 < ratio <= 16:
        raise ValueError(f"{who}: ratio is {ratio}, need above 0, 16 at most")
    return max(1, round(ratio * dim))


class SCTuner(_Skips):
    """Tuners of the skips of a U-Net: fastdiff's, or one of diffusers.

    Args:
        network: with ``conv_in``, ``down_blocks``, ``mid_block`` and ``up_blocks``.
        ratio: hidden width over channels.
        skips: numbers of those that are tuned, 0 the result of ``conv_in``; None: all.
        frozen_encoder: in training, no gradients go to the way down and the middle, and nothing is
            saved for them: not for the network's input and not for what else is trained there.

    Attributes:
        scale: float32 ``[1]``, of what is added; in place changes need no new capture.

    Raises:
        ValueError: an argument does not fit, or the network is no U-Net that is known.
    """

    method = "sc_tuner"
    scale: Tensor

    def __init__(
        self,
        network: nn.Module,
        ratio: float = 1.0,
        *,
        skips: Sequence[int] | None = None,
        frozen_encoder: bool = True,
    ) -> None:
        numbers = None if skips is None else list(skips)
        super().__init__(network, ratio=ratio, skips=numbers, frozen_encoder=bool(frozen_encoder))
        self.frozen = bool(frozen_encoder)
        found = self.find(network, numbers)
        device = next(network.parameters()).device
        self.tuners: Any = nn.ModuleDict()
        for k in self.numbers:
            dim = found[k][0]
            self.tuners[str(k)] = Tuner(dim, _hidden(self.method, ratio, dim)).to(device)
        self.register_buffer("scale", torch.ones(1, device=device))
        self.attach()

    def change(self, number: int, skip: Tensor) -> Tensor:
        return skip + self.scale.to(skip.dtype) * self.tuners[str(number)](skip)


class CSCTuner(_Skips):
    """Tuners that are given control images.

    Attached after an :class:`SCTuner`, it takes that one's skips.

    Args:
        network, ratio, skips, frozen_encoder: as of :class:`SCTuner`.
        hints: how many control images there are.
        channels: of each.

    Attributes:
        scale: float32 ``[1]``, of what is added; in place changes need no new capture.
        scales: float32 ``[hints]``, of each image's.

    Raises:
        ValueError: an argument does not fit, or the network is no U-Net that is known.
    """

    method = "csc_tuner"
    scale: Tensor
    scales: Tensor

    def __init__(
        self,
        network: nn.Module,
        ratio: float = 1.0,
        *,
        hints: int = 1,
        channels: int = 3,
        skips: Sequence[int] | None = None,
        frozen_encoder: bool = True,
    ) -> None:
        whole(self.method, hints=hints, channels=channels)
        numbers = None if skips is None else list(skips)
        super().__init__(
            network, ratio=ratio, hints=hints, channels=channels, skips=numbers,
            frozen_encoder=bool(frozen_encoder),
        )  # fmt: skip
        self.frozen, self.channels = bool(frozen_encoder), channels
        found = self.find(network, numbers)
        last = max(self.numbers)
        device = next(network.parameters()).device
        self.encoders: Any = nn.ModuleList()
        self.tuners: Any = nn.ModuleList()
        for _ in range(hints):
            self.encoders.append(HintEncoder(channels, found[: last + 1]).to(device))
            own = {}
            for k in self.numbers:
                dim = found[k][0]
                own[str(k)] = Tuner(dim, _hidden(self.method, ratio, dim))
            self.tuners.append(nn.ModuleDict(own).to(device))
        self.register_buffer("scale", torch.ones(1, device=device))
        self.register_buffer("scales", torch.ones(hints, device=device))
        self.images: list[Tensor | None] = [None] * hints
        self._known: list[list[Tensor] | None] = [None] * hints
        self._counts: list[int] = [-1] * hints
        self._fresh: list[list[Tensor] | None] = [None] * hints
        self.computed = 0  # maps of images, so far
        self.attach()

    def see(self, images: Tensor | Sequence[Tensor | None] | None) -> None:
        """The control images of the calls to come; their maps are computed once.

        Images of the shapes before are copied to where they were, and their maps too: captured
        programs go on. A batch of several times as many rows repeats them (branches of guidance).

        Args:
            images: ``[B, channels, 8 H, 8 W]``, H and W those of the network's input, or one of
                each hint, None where there is none; None: nothing is added.

        Raises:
            ValueError: the number of images or a shape does not fit.
        """
        many = len(self.images)
        if isinstance(images, Tensor):
            images = [images]
        new = [None] * many if images is None else list(images)
        if len(new) != many:
            raise ValueError(f"{self.method}: images has {len(new)} entries, need {many}")
        for i, image in enumerate(new):
            if image is not None and (
                image.dim() != 4 or image.shape[1] != self.channels or not image.numel()
            ):
                raise ValueError(
                    f"{self.method}: image {i} has shape {list(image.shape)}, need "
                    f"[B, {self.channels}, 8 H, 8 W]"
                )
        for i, image in enumerate(new):
            old = self.images[i]
            if image is None or old is None or old.shape != image.shape or old.dtype != image.dtype:
                self.images[i], self._known[i] = None if image is None else kept(image), None
            else:
                with torch.no_grad():
                    old.copy_(image)
            self._counts[i] = -1
        self._turns += 1
        self._refresh()

    def _refresh(self) -> None:
        """Maps of all images, now: a captured program calls nothing of ours."""
        self._fresh = [None] * len(self.images)
        trains = torch.is_grad_enabled()
        with torch.no_grad():
            for i, image in enumerate(self.images):
                if image is not None and (self._known[i] is not None or not trains):
                    self._maps(i)

    def fill(self, tensors: dict[str, Tensor]) -> None:
        super().fill(tensors)
        self._refresh()

    @property
    def layout(self) -> tuple[Any, ...]:
        where = (h.data_ptr() for known in self._known for h in known or ())
        return *super().layout, *(i is None for i in self.images), *where

    def _maps(self, i: int) -> list[Tensor]:
        """Of image ``i``; from before where nothing has changed since."""
        encoder, image = self.encoders[i], self.images[i]
        assert image is not None
        if torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters()):
            fresh = self._fresh[i]
            if fresh is None:  # until the next call of the network
                self.computed += 1
                fresh = self._fresh[i] = encoder(image)
            return fresh
        count = sum(p._version for p in encoder.parameters() if not p.is_inference())
        known = self._known[i]
        if known is not None and self._counts[i] == count:
            return known
        with torch.inference_mode(False), torch.no_grad():
            maps: list[Tensor] = encoder(image)
            self.computed += 1
            if known is not None:
                for a, b in zip(known, maps, strict=True):
                    a.copy_(b)
                maps = known
        self._known[i], self._counts[i] = maps, count
        return maps

    def change(self, number: int, skip: Tensor) -> Tensor:
        total: Tensor | None = None
        for i, image in enumerate(self.images):
            if image is None:
                continue
            hint = self._maps(i)[number]
            times = len(skip) // len(hint)
            if times * len(hint) != len(skip) or hint.shape[1:] != skip.shape[1:]:
                raise ValueError(
                    f"{self.method}: image {i} has shape {list(image.shape)}, skip {number} "
                    f"{list(skip.shape)}, need an image of 8 times the network's input, and a "
                    "part of its batch"
                )
            hint = hint.to(skip.dtype).repeat(times, 1, 1, 1)
            out = hint + self.tuners[i][str(number)](skip + hint)
            out = self.scales[i].to(skip.dtype) * out
            total = out if total is None else total + out
        return skip if total is None else skip + self.scale.to(skip.dtype) * total

    def _entering(self, start: int, name: str, at: int, deepest: bool) -> Before:
        enter = super()._entering(start, name, at, deepest)
        if not deepest:
            return enter

        def begin(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._fresh = [None] * len(self.images)
            return enter(block, args, kwargs)

        return begin
