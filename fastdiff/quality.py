"""How good samples of digits, and of scenes of digits, are: read by a classifier, and Frechet
distance in its features.

The classifier is a small convolutional network trained on the same 4,500 digits as the generators
(``train_classifier``). The Frechet distance (Heusel et al. 2017, arXiv:1706.08500, eq. 6) is taken
in its penultimate features, so its scale is its own: read it beside the distance between two halves
of real digits, which ``evaluate`` reports too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import data
from fastdiff.models.checkpoint import FOLDER, read_tensors, write_pair
from fastdiff.samplers import sample

CLASSIFIER = FOLDER / "classifier-digits.safetensors"


class Classifier(nn.Module):
    """Three 3x3 convolution stages, then one hidden layer of 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 16, 64)
        self.out = nn.Linear(64, data.CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """``[B, 1, 32, 32]`` in -1..1 -> ``[B, 64]``."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 10]``."""
        return self.out(F.dropout(self.features(x), 0.3, self.training))


def load_classifier(path: str | Path = CLASSIFIER) -> Classifier:
    """The trained classifier; ValueError where its file is damaged."""
    with torch.device("meta"):
        model = Classifier()
    read_tensors(Path(path), model, torch.float32)
    return model.eval()


def train_classifier(
    path: str | Path = CLASSIFIER, *, steps: int = 2500, batch: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Train on the 4,500 digits, write the safetensors file and its card; minutes on one core."""
    torch.manual_seed(seed)
    digits, model, start = data.digits(), Classifier(), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(digits.x), (batch,))
        loss = F.cross_entropy(
            model(data.augment(digits.x[pick])), digits.y[pick], label_smoothing=0.05
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = (model(digits.held_x).argmax(1) == digits.held_y).float().mean().item()
    return write_pair(
        model,
        Path(path),
        {
            "classifier": "digits",
            "held_out_accuracy": round(right, 4),
            "training": dict(
                data=data.SOURCE,
                seed=seed,
                steps=steps,
                batch=batch,
                minutes=round((time.monotonic() - start) / 60, 1),
                command="python bench/quality.py --train-classifier",
            ),
        },
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features ``[N, D]``, in float64."""
    a, b = a.double(), b.double()
    s_a, s_b = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues of S_a S_b are those of the symmetric S_a^(1/2) S_b S_a^(1/2).
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return (shift + s_a.trace() + s_b.trace() - 2 * cross).item()


@torch.no_grad()
def score(
    samples: Tensor,
    classes: Tensor,
    classifier: Classifier | None = None,
    digits: data.Digits | None = None,
) -> dict[str, Any]:
    """Read samples of digits.

    Args:
        samples: ``[N, 1, 32, 32]`` in -1..1.
        classes: ``[N]`` int64, the digit each was asked for.
        classifier: None loads the shipped one.
        digits: what to compare with; None: those that the checkpoints are trained on.

    Returns:
        agreement (share read as asked), agreement per class, the Frechet distance to the held-out
        digits, and beside it that of as many real training digits to the held-out ones
        and of two halves of the held-out ones.
    """
    classifier = classifier or load_classifier()
    digits = digits or data.digits()
    read = classifier(samples).argmax(1) == classes
    held = classifier.features(digits.held_x)
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    half = len(held) // 2
    some = torch.randperm(len(digits.x), generator=torch.Generator().manual_seed(0))[: len(samples)]
    real = classifier.features(digits.x[some])
    return {
        "samples": len(samples),
        "agreement": round(read.float().mean().item(), 4),
        "agreement_per_class": [
            round(read[classes == c].float().mean().item(), 3) for c in range(data.CLASSES)
        ],
        "frechet_to_held_out": round(frechet_distance(classifier.features(samples), held), 3),
        "frechet_training_to_held_out": round(frechet_distance(real, held), 3),
        "frechet_halves_of_held_out": round(
            frechet_distance(held[order[:half]], held[order[half:]]), 3
        ),
        "classifier_on_held_out": round(
            (classifier.out(held).argmax(1) == digits.held_y).float().mean().item(), 4
        ),
    }


def _boxes(pictures: Tensor, layout: Tensor) -> tuple[Tensor, Tensor]:
    """The digits of scenes as the classifier sees digits, ``[M, 1, 32, 32]``, and where in the
    layout each stands, ``[M, 2]``."""
    slots = torch.nonzero(layout[..., 0] < data.EMPTY)
    inside = torch.arange(data.BOX)
    _, tops, lefts = layout[slots[:, 0], slots[:, 1]].unbind(1)
    rows, columns = tops[:, None] + inside, lefts[:, None] + inside
    found = pictures[slots[:, 0, None, None], 0, rows[:, :, None], columns[:, None]]
    edge = (data.SIZE - data.BOX) // 2
    return F.pad(found[:, None], (edge,) * 4, value=-1.0), slots


@torch.no_grad()
def read_scene(pictures: Tensor, layout: Tensor, classifier: Classifier | None = None) -> Tensor:
    """What stands in the boxes of scenes.

    Args:
        pictures: ``[B, 1, H, W]`` in -1..1.
        layout: ``[B, K, 3]`` int64: class, top and left of each box, class 10 where there is none.
        classifier: None loads the shipped one.

    Returns:
        int64 ``[B, K]``: the digit that is read in each box, 10 where there is none.
    """
    digits, slots = _boxes(pictures, layout)
    found = torch.full_like(layout[..., 0], data.EMPTY)
    if len(slots):
        logits = (classifier or load_classifier())(digits)
        found[slots[:, 0], slots[:, 1]] = logits.argmax(1)
    return found


def stray_ink(pictures: Tensor, layout: Tensor) -> float:
    """Share of the pixels outside of all boxes that are bright (above 0)."""
    outside = torch.ones_like(pictures, dtype=torch.bool)
    for b, boxes in enumerate(layout.tolist()):
        for kind, top, left in boxes:
            if kind < data.EMPTY:
                outside[b, :, top : top + data.BOX, left : left + data.BOX] = False
    return (pictures[outside] > 0).float().mean().item()


@torch.no_grad()
def score_scenes(
    pictures: Tensor, layout: Tensor, classifier: Classifier | None = None
) -> dict[str, Any]:
    """Read samples of scenes: what stands where.

    Args:
        pictures: ``[B, 1, H, W]`` in -1..1.
        layout: ``[B, K, 3]``, what each was asked for.
        classifier: None loads the shipped one.

    Returns:
        digits asked for; agreement (share read as asked, where asked), also per class; stray ink;
        the Frechet distance of the boxes' features to those of the held-out digits, and beside it
        that of as many training digits.
    """
    classifier = classifier or load_classifier()
    every = data.digits()
    asked = layout[..., 0]
    there = asked < data.EMPTY
    right = read_scene(pictures, layout, classifier) == asked
    edge = (data.SIZE - data.BOX) // 2

    def as_boxes(x: Tensor) -> Tensor:
        return F.pad(x[..., edge:-edge, edge:-edge], (edge,) * 4, value=-1.0)

    held = classifier.features(as_boxes(every.held_x))
    some = torch.randperm(len(every.x), generator=torch.Generator().manual_seed(0))
    real = classifier.features(as_boxes(every.x[some[: int(there.sum())]]))
    boxes = classifier.features(_boxes(pictures, layout)[0])
    return {
        "samples": len(pictures),
        "digits": int(there.sum()),
        "agreement": round(right[there].float().mean().item(), 4),
        "agreement_per_class": [
            round(right[asked == c].float().mean().item(), 3) for c in range(data.CLASSES)
        ],
        "stray_ink": round(stray_ink(pictures, layout), 6),
        "frechet_to_held_out": round(frechet_distance(boxes, held), 3),
        "frechet_training_to_held_out": round(frechet_distance(real, held), 3),
    }


def evaluate_scenes(
    model: Callable[..., Tensor],
    *,
    count: int = 200,
    sampler: str = "flow_euler",
    steps: int = 28,
    guidance: float = 2.0,
    clip: float | None = None,
    seed: int = 0,
    batch: int = 20,
) -> dict[str, Any]:
    """Sample ``count`` scenes of random layouts and :func:`score_scenes` them."""
    layout = data.layouts(count, generator=torch.Generator().manual_seed(seed))
    start, parts = time.monotonic(), []
    for i, part in enumerate(layout.split(batch)):
        shape = (len(part), 1, data.CANVAS, data.CANVAS)
        options: dict[str, Any] = dict(sampler=sampler, steps=steps, guidance=guidance, clip=clip)
        parts.append(sample(model, shape, classes=part, seed=seed + i, **options))
    seconds = time.monotonic() - start
    settings = dict(sampler=sampler, steps=steps, guidance=guidance, clip=clip, seed=seed)
    result = score_scenes(torch.cat(parts).clamp(-1, 1), layout)
    return {**result, **settings, "seconds": round(seconds, 1)}


def evaluate(
    model: Callable[..., Tensor],
    *,
    per_class: int = 100,
    sampler: str = "ddim",
    steps: int = 50,
    guidance: float = 2.0,
    clip: float | None = None,
    seed: int = 0,
    batch: int = 100,
    target: str = "digits",
) -> dict[str, Any]:
    """Sample ``per_class`` digits of each class and :func:`score` them; settings, time beside.
    Samples of a ``target`` that changes the digits are changed back first."""
    classes = torch.arange(data.CLASSES).repeat_interleave(per_class)
    start, parts = time.monotonic(), []
    for i, part in enumerate(classes.split(batch)):
        shape = (len(part), 1, data.SIZE, data.SIZE)
        options: dict[str, Any] = dict(sampler=sampler, steps=steps, guidance=guidance, clip=clip)
        parts.append(sample(model, shape, classes=part, seed=seed + i, **options))
    seconds = time.monotonic() - start
    settings = dict(sampler=sampler, steps=steps, guidance=guidance, clip=clip, seed=seed)
    samples = data.change_back(target, torch.cat(parts).clamp(-1, 1))
    digits = data.target("sklearn") if target == "sklearn" else data.digits()
    result = score(samples, classes, digits=digits)
    return {**result, **settings, "seconds": round(seconds, 1)}
