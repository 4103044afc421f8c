r"""Several modalities from one diffusion process (MT-Diffusion: Chen et al. 2024,
arXiv:2407.17571): a shared backbone, and a head for each that runs where it is asked for.

Data of all modalities shift the noising of a shared state, by ``e = E(x_1, ..., x_M)``:

    q(z_t | z_(t-1), x) = N(sqrt(a_t) (z_(t-1) + w_t e), (1 - a_t) I)
    z_t = sqrt(abar_t) z_0 + c_t e + sqrt(1 - abar_t) eps,   c_t = sqrt(a_t) (c_(t-1) + w_t)

c_0 = 0, and with w = 0 it is DDPM. Heads read the backbone's features, ``x_i ~ p_i(x_i | z_t)``;
the loss is the sum over modalities of what is known of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.methods.trajectory import running

Loss = Callable[[Tensor, Tensor], Tensor]


class MultiHead(nn.Module):
    """A denoiser as backbone and heads; called, it is the denoiser.

    Args:
        backbone: ``backbone(x [B, C, ...], t [B], y) -> features [B, ...]``.
        denoise: features to the prediction ``[B, C, ...]``.
        heads: features to each modality, by name.

    ``num_classes``, ``prediction``, ``schedule`` and ``box_size`` are the backbone's, where it has
    them.
    """

    def __init__(
        self, backbone: nn.Module, denoise: nn.Module, heads: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.backbone, self.denoise = backbone, denoise
        self.heads = nn.ModuleDict(heads)
        for name in ("num_classes", "prediction", "schedule", "box_size"):
            if hasattr(backbone, name):
                setattr(self, name, getattr(backbone, name))

    def check(self, names: Sequence[str]) -> None:
        """Raises a ValueError where a head is not there."""
        for name in names:
            if name not in self.heads:
                have = ", ".join(self.heads) or "none"
                raise ValueError(f"multitask: heads has {name!r}, need of {have}")

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.denoise(self.backbone(x, t, y))
        return out

    def decode(self, features: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """What the heads ``names`` make of features; no other head runs.

        Raises:
            ValueError: there is no such head.
        """
        self.check(names)
        return {name: self.heads[name](features) for name in names}

    def outputs(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, heads: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction and what ``heads`` give, with one call of the backbone: for training."""
        self.check(heads)
        features = self.backbone(x, t, y)
        return self.denoise(features), self.decode(features, heads)


class Generated(NamedTuple):
    """The sample ``x [B, C, ...]``, and each head's output of it."""

    x: Tensor
    tasks: dict[str, Tensor]


def multitask(
    model: MultiHead,
    x: Tensor | Sequence[int],
    heads: Sequence[str] = (),
    *,
    cache: Any = None,
    **settings: Any,
) -> Generated:
    """Sample, and decode the modalities that are asked for.

    Heads read the features of the last call, which the sampler makes anyway: with guidance those
    of the conditional branch. Caches are off in that call where there are heads.

    Args:
        model: a denoiser with heads.
        x, cache, settings: as for :func:`fastdiff.sample`.
        heads: names; none is plain sampling.

    Raises:
        ValueError: an argument does not fit.
    """
    if not isinstance(model, MultiHead):
        raise ValueError(f"multitask: model is {type(model).__name__}, need a MultiHead")
    if isinstance(heads, str):
        raise ValueError(f"multitask: heads is {heads!r}, need a list of names")
    model.check(heads)
    with running(model, x, cache=cache, **settings) as run:
        run.start()
        tasks: dict[str, Tensor] = {}
        kept: list[Tensor] = []
        for i in range(len(run)):
            if i < len(run) - 1 or not heads:
                run.step(i, run.predict(i))
                continue
            hook = model.backbone.register_forward_hook(lambda m, args, out: kept.append(out))
            try:
                m = run.predict(i, independent="heads read the backbone's features")
            finally:
                hook.remove()
            tasks = model.decode(kept[-1][-run.batch :], heads)
            run.step(i, m)
        return Generated(run.x, tasks)


def shifts(alpha_bar: Tensor, weights: Tensor) -> Tensor:
    """``c_t``, float64 ``[T]``, of levels t = 1 to T.

    Args:
        alpha_bar: ``[T]``, as :func:`fastdiff.samplers.alphas_cumprod` gives it.
        weights: ``[T]``, w_t.

    Raises:
        ValueError: they differ in length.
    """
    if alpha_bar.dim() != 1 or alpha_bar.shape != weights.shape:
        raise ValueError(
            f"multitask: weights has shape {list(weights.shape)}, need {list(alpha_bar.shape)}"
        )
    bar, w = alpha_bar.double(), weights.double()
    root = (bar / torch.cat((bar.new_ones(1), bar[:-1]))).sqrt()
    c, found = bar.new_zeros(()), []
    for a, own in zip(root, w, strict=True):
        c = a * (c + own)
        found.append(c)
    return torch.stack(found) if found else bar


def noised(
    z0: Tensor, e: Tensor, levels: Tensor, alpha_bar: Tensor, c: Tensor, eps: Tensor
) -> Tensor:
    """``sqrt(abar_t) z_0 + c_t e + sqrt(1 - abar_t) eps``, ``[B, C, ...]``.

    Args:
        z0, e, eps: ``[B, C, ...]``.
        levels: int64 ``[B]``, indices of ``alpha_bar``, on the device.
        alpha_bar, c: ``[T]`` on the device.
    """
    bar, shift = (v[levels].to(z0.dtype).view(-1, *[1] * (z0.dim() - 1)) for v in (alpha_bar, c))
    return bar.sqrt() * z0 + shift * e + (1 - bar).sqrt() * eps


def task_loss(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    *,
    losses: Mapping[str, Loss] | None = None,
    weights: Mapping[str, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum over modalities, and each one's mean over the rows in which it is known.

    Args:
        outputs, targets: ``[B, ...]`` each; rows of targets that are not present may be anything,
            NaN too.
        present: bool ``[B]`` each.
        losses: ``loss(output, target) -> [B]``; None: the mean square of a row.
        weights: of each, 1 where there is none.

    Raises:
        ValueError: a modality has no target or mask, or they do not fit.
    """
    parts: dict[str, Tensor] = {}
    for name, out in outputs.items():
        if name not in targets or name not in present:
            raise ValueError(f"multitask: {name!r} has no target or no mask, need both")
        target, known = targets[name], present[name]
        if known.dtype != torch.bool or known.shape != out.shape[:1]:
            raise ValueError(
                f"multitask: present[{name!r}] is {known.dtype} {list(known.shape)}, need "
                f"torch.bool [{out.shape[0]}]"
            )
        if len(target) != len(out):
            raise ValueError(f"multitask: {name!r} has {len(target)} targets, need {len(out)}")
        # Rows without a target get one that is a number: 0 times NaN would be NaN.
        rows = known.view(-1, *[1] * (target.dim() - 1))
        filled = torch.where(rows, target, torch.zeros_like(target))
        one = (losses or {}).get(name, _mean_square)(out, filled)
        if one.shape != known.shape:
            raise ValueError(f"multitask: loss {name!r} is {list(one.shape)}, need [{len(out)}]")
        parts[name] = torch.where(known, one, 0.0).sum() / known.sum().clamp(min=1)
    if not parts:
        raise ValueError("multitask: outputs is empty, need at least one modality")
    total = torch.stack([(weights or {}).get(n, 1.0) * p for n, p in parts.items()]).sum()
    return total, parts


def _mean_square(out: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(out, target, reduction="none").flatten(1).mean(1)
