r"""MotionDirector: the motion of a few videos without their looks (Zhao et al. 2023,
arXiv:2310.08465, section 4).

Two low-rank adapters of a video U-Net. The spatial one, in the transformers over a frame, learns
looks from single frames with the temporal one off; the temporal one, in those over time, learns
from whole videos with the spatial one in place but not trained, by

    L_temporal = |e - e_hat|^2 + |phi(e) - phi(e_hat)|^2
    phi(e)_i = sqrt(b^2 + 1) e_i - b e_anchor            (eq. 7, b = 1)

What all frames share weighs ``sqrt(b^2 + 1) - b`` in phi, 0.41 for b = 1, and what differs 1.41.
When sampling the spatial adapter is off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.adapters.base import Hook, Targets, select
from fastdiff.adapters.lora import LoRA

# Transformers by the name of their class, as those of diffusers' UNet3DConditionModel and
# UNetMotionModel.
PATHS = {
    "spatial": ("Transformer2DModel", "DualTransformer2DModel"),
    "temporal": ("TransformerTemporalModel", "AnimateDiffTransformer3D"),
}


class MotionLoRA(LoRA):
    """The low-rank adapters of one path: of the linear layers in its transformers.

    Args:
        network: a U-Net over videos.
        path: "spatial" or "temporal".
        rank: of each.
        videos: spatial adapters, one of each training video (:meth:`LoRA.choose` says which); each
            is a slot.
        targets: of the path's layers, see :func:`fastdiff.adapters.select`; None: all.
        dropout: of what is added, in training.
        alpha: as :class:`LoRA` has it.

    Attributes:
        role: "train"; "frozen": it adds but gets no gradients; "off": it adds nothing. See
            :meth:`acting`.

    Raises:
        ValueError: an argument does not fit, or the network has no such transformers.
    """

    method = "motion"

    def __init__(
        self,
        network: nn.Module,
        path: str,
        rank: int = 32,
        videos: int = 1,
        *,
        targets: Targets = None,
        dropout: float = 0.1,
        alpha: float | None = None,
        **settings: Any,
    ) -> None:
        if path not in PATHS:
            raise ValueError(f"{self.method}: path is {path!r}, need {' or '.join(PATHS)}")
        settings = {n: s for n, s in settings.items() if n not in ("slots", "convolutions")}
        self.path, self.role = path, "train"
        super().__init__(
            network, rank, targets=targets, alpha=alpha, slots=videos, dropout=dropout, path=path,
            videos=videos, **settings,
        )  # fmt: skip

    def find(
        self, network: nn.Module, targets: Targets, kinds: tuple[type[nn.Module], ...]
    ) -> dict[str, nn.Module]:
        mine = _places(network, self.path)
        if not mine:
            raise ValueError(
                f"{self.method}: {type(network).__name__} has no {self.path} transformers, need "
                f"{' or '.join(PATHS[self.path])}"
            )
        every = "^(" + "|".join(re.escape(n) for n in mine) + r")\."
        found = select(self.method, network, every, kinds)
        if targets is None:
            return found
        asked = select(self.method, network, targets, kinds)
        both = {n: m for n, m in found.items() if n in asked}
        if not both:
            raise ValueError(
                f"{self.method}: targets is {targets!r}, which fits no layer of the {self.path} "
                f"transformers; theirs are {', '.join(list(found)[:4])}, ..."
            )
        return both

    def prepare(self) -> None:
        for pair in self.pairs.values():
            if self.rank:
                nn.init.normal_(pair.down, std=1 / self.rank)  # type: ignore[arg-type]

    def _ids(self, rows: int) -> Tensor | None:
        """Rows of a layer are those of samples, then frames or pixels within."""
        if self.ids is None:
            return super()._ids(rows)
        if rows % len(self.ids):
            raise ValueError(
                f"{self.method}: a layer has {rows} rows, need a multiple of the {len(self.ids)} "
                "ids that choose() got, one of each sample"
            )
        return self.ids.repeat_interleave(rows // len(self.ids))

    @contextmanager
    def acting(self, role: str) -> Iterator[None]:
        """Within, calls of the network have the adapter in this role.

        Raises:
            ValueError: there is no such role, the adapter is merged and so in the weights, or the
                network computes parts anew in the backward pass, which comes after.
        """
        if role not in ("train", "frozen", "off"):
            raise ValueError(f"{self.method}: role is {role!r}, need train, frozen or off")
        if self.merged:
            raise ValueError(f"{self.method}: it is merged, need unmerge() before a role")
        anew = any(getattr(m, "gradient_checkpointing", False) for m in self.network.modules())
        if anew and torch.is_grad_enabled():
            raise ValueError(
                f"{self.method}: gradient checkpointing is on, need it off: the backward pass "
                "would compute with another role"
            )
        was, self.role = self.role, role
        self._turns += 1
        try:
            yield
        finally:
            self.role = was
            self._turns += 1

    @property
    def layout(self) -> tuple[Any, ...]:
        return *super().layout, self.role

    def _hook(self, pair: Any) -> Hook:
        train = super()._hook(pair)

        def add(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Any:
            if self.role == "off":
                return y
            if self.role == "train":
                return train(layer, args, kwargs, y)
            held = SimpleNamespace(down=pair.down.detach(), up=pair.up.detach())
            return super(MotionLoRA, self)._hook(held)(layer, args, kwargs, y)

        return add


def motion_director(
    network: nn.Module, rank: int = 32, videos: int = 1, dropout: float = 0.1
) -> tuple[MotionLoRA, MotionLoRA]:
    """The spatial adapters, one of each video, and the temporal one; both attached.

    Raises:
        ValueError: an argument does not fit; the network is as it was then.
    """
    spatial = MotionLoRA(network, "spatial", rank, videos, dropout=dropout)
    try:
        return spatial, MotionLoRA(network, "temporal", rank, dropout=dropout)
    except ValueError:
        spatial.detach()
        raise


def _places(network: nn.Module, path: str) -> list[str]:
    """Names of the transformers of a path; the inner one of two counts."""
    kinds = {kind: name for name, names in PATHS.items() for kind in names}
    return [
        name
        for name, m in network.named_modules()
        if any(kinds.get(c.__name__) == path for c in type(m).__mro__)
    ]


def debias(e: Tensor, beta: float = 1.0, anchor: int | Tensor = 0, dim: int = 2) -> Tensor:
    """phi(e): noise with the part that all frames share made small.

    Args:
        e: ``[B, C, F, H, W]``.
        beta: b, 0 (e itself) or more.
        anchor: a frame, or int64 ``[B]``, one of each sample.
        dim: of the frames.

    Raises:
        ValueError: an argument does not fit.
    """
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"debias: beta is {beta}, need 0 or more")
    frames = e.shape[dim]
    if isinstance(anchor, Tensor) and anchor.dim():
        if anchor.shape != e.shape[:1] or dim % e.dim() == 0:
            raise ValueError(
                f"debias: anchor has shape {list(anchor.shape)}, need [{e.shape[0]}] or one frame"
            )
        shape = [1] * e.dim()
        shape[0] = -1
        size = list(e.shape)
        size[dim] = 1
        still = e.gather(dim, anchor.to(e.device).view(shape).expand(size))
    else:
        at = int(anchor)
        if not 0 <= at < frames:
            raise ValueError(f"debias: anchor is {at}, need 0 to {frames - 1}")
        still = e.narrow(dim, at, 1)
    return e if beta == 0 else math.sqrt(beta**2 + 1) * e - beta * still


def debiased_loss(
    predicted: Tensor, target: Tensor, beta: float = 1.0, anchor: int | Tensor = 0, dim: int = 2
) -> Tensor:
    """Mean square of ``phi(predicted) - phi(target)``, in float32.

    Raises:
        ValueError: shapes differ, or as :func:`debias`.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"debiased_loss: target has shape {list(target.shape)}, need that of predicted, "
            f"{list(predicted.shape)}"
        )
    gap = predicted.float() - target.float()  # phi is linear
    return debias(gap, beta, anchor, dim).square().mean()


def noise_prior(noise: Tensor, inverted: Tensor, weight: float) -> Tensor:
    """Noise to start sampling from: ``sqrt(1 - w) noise + sqrt(w) inverted`` (section 4.3).

    Args:
        noise: any shape, of variance 1.
        inverted: as ``noise``: a training video's, by inversion of DDIM.
        weight: w, 0 (``noise`` to the bit) to 1.

    Raises:
        ValueError: shapes differ or ``weight`` is outside of 0 to 1.
    """
    if noise.shape != inverted.shape:
        raise ValueError(
            f"noise_prior: inverted has shape {list(inverted.shape)}, need {list(noise.shape)}"
        )
    if not 0 <= weight <= 1:
        raise ValueError(f"noise_prior: weight is {weight}, need 0 to 1")
    return math.sqrt(1 - weight) * noise + math.sqrt(weight) * inverted


class Losses(NamedTuple):
    """Of one training step: call ``total.backward()``, or each with an optimiser of its own."""

    spatial: Tensor | None  # None where the spatial adapter was left out of the step
    temporal: Tensor
    frame: int
    anchor: int

    @property
    def total(self) -> Tensor:
        return self.temporal if self.spatial is None else self.spatial + self.temporal


def training_losses(
    spatial: MotionLoRA,
    temporal: MotionLoRA,
    predict: Callable[[Tensor], Tensor],
    noisy: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    leave_out: float = 0.2,
    generator: torch.Generator | None = None,
) -> Losses:
    """One training step of both paths.

    Args:
        spatial, temporal: see :func:`motion_director`.
        predict: the network's prediction of ``[B, C, F, H, W]``, with F frames or one.
        noisy: ``[B, C, F, H, W]``.
        target: as ``noisy``: what ``predict`` should give.
        beta: of :func:`debias`.
        leave_out: how often the spatial adapter takes no part in a step at all.
        generator: draws the frame, the anchor and whether to leave out; on the CPU.

    Raises:
        ValueError: shapes do not fit.
    """
    if noisy.dim() != 5 or noisy.shape != target.shape or not noisy.shape[2]:
        raise ValueError(
            f"training_losses: noisy has shape {list(noisy.shape)} and target "
            f"{list(target.shape)}, need [B, C, F, H, W] of both"
        )
    if not 0 <= leave_out <= 1:
        raise ValueError(f"training_losses: leave_out is {leave_out}, need 0 to 1")
    frames = noisy.shape[2]
    frame, anchor = torch.randint(frames, (2,), generator=generator).tolist()
    out = bool(torch.rand((), generator=generator) < leave_out)
    still = None
    if not out:
        with temporal.acting("off"):
            one = predict(noisy[:, :, frame : frame + 1])
        still = F.mse_loss(one.float(), target[:, :, frame : frame + 1].float())
    with spatial.acting("off" if out else "frozen"):
        every = predict(noisy)
    moving = F.mse_loss(every.float(), target.float())
    moving = moving + debiased_loss(every, target, beta, anchor)
    return Losses(still, moving, frame, anchor)
