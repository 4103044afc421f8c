"""Train the small networks on digits and on scenes of digits, on the CPU, in a given time.

The learning rate follows the elapsed share of the time, not a step count, so a run always ends in a
usable checkpoint; one is written every few minutes, and a run can go on from one.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import data
from fastdiff import nn as blocks
from fastdiff.models.baseline import PlainDiT, PlainDiTMoE, PlainUNet
from fastdiff.models.checkpoint import load, save

TRAIN_STEPS = 1000  # diffusion times run over 0..TRAIN_STEPS


class TrainedDiTMoE(PlainDiTMoE):
    """Plain torch but for the experts, whose grouped products have a backward of their own."""

    def _mlp(self, block: Any, h: Tensor) -> Tensor:
        out: Tensor = block.moe(h)
        return out


# Training runs the plain networks: under bfloat16 autocast their products use oneDNN both ways.
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "dit-digits": (
        PlainDiT,
        dict(
            input_size=32,
            patch_size=4,
            in_channels=1,
            hidden_size=192,
            depth=5,
            num_heads=3,
            num_classes=data.CLASSES,
            learn_sigma=False,
            prediction="flow",
        ),
    ),
    "dit-moe-digits": (
        TrainedDiTMoE,
        dict(
            input_size=32,
            patch_size=4,
            in_channels=1,
            hidden_size=96,
            depth=4,
            num_heads=3,
            num_classes=data.CLASSES,
            learn_sigma=False,
            prediction="flow",
            experts=8,
            k=2,
        ),
    ),
    "dit-scenes": (
        PlainDiT,
        dict(
            input_size=data.CANVAS,
            patch_size=2,
            in_channels=1,
            hidden_size=192,
            depth=6,
            num_heads=3,
            num_classes=data.CLASSES,
            learn_sigma=False,
            prediction="flow",
            box_size=data.BOX,
        ),
    ),
    "unet-digits": (
        PlainUNet,
        dict(
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64, 96),
            layers_per_block=1,
            transformer_depth=(0, 0, 1),
            heads=(1, 2, 3),
            groups=8,
            cross_attention_dim=64,
            num_classes=data.CLASSES,
            class_tokens=4,
            prediction="eps",
        ),
    ),
}
# How to sample a network, for its card.
SAMPLING: dict[str, dict[str, Any]] = {
    "dit-digits": dict(sampler="flow_euler", steps=50, guidance=3.0),
    "dit-moe-digits": dict(sampler="flow_euler", steps=50, guidance=3.0),
    "dit-scenes": dict(sampler="flow_euler", steps=28, guidance=2.0),
    "unet-digits": dict(sampler="ddim", steps=50, guidance=2.0, clip=1.0),
}
EXPERTS = ("experts", "k")  # settings of a network that a recipe may choose
WINDOWS, WINDOW = 0.8, 26  # share of the time on parts of scenes, and their side in pixels


@dataclass
class Recipe:
    """How to train. ``resume`` goes on from averaged weights, with a new optimiser; ``balance`` is
    the factor of the experts' balance losses, ``config`` what differs from the network's own."""

    minutes: float = 30.0
    batch: int = 32
    lr: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    ema: float = 0.999
    label_dropout: float = 0.1
    seed: int = 0
    save_minutes: float = 3.0
    resume: str | None = None
    balance: float = 0.01
    config: dict[str, Any] = field(default_factory=dict)


def linear_alpha_bar(steps: int = TRAIN_STEPS) -> Tensor:
    """Cumulative products of 1 - beta for betas 1e-4..0.02 (Ho et al. 2020, section 4)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0).float()


def _digits(recipe: Recipe, share: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Pictures, labels, and further arguments of the network."""
    every = data.digits()
    pick = torch.randint(len(every.x), (recipe.batch,))
    drop = torch.rand(recipe.batch) < recipe.label_dropout
    return data.augment(every.x[pick]), every.y[pick].masked_fill(drop, data.CLASSES), {}


def _scenes(recipe: Recipe, share: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Canvases, layouts, and further arguments; first the surroundings of a digit of each, as most
    of a canvas is empty, then a quarter as many whole ones."""
    count = recipe.batch if share < WINDOWS else max(1, recipe.batch // 4)
    x, layout = data.scenes(data.layouts(count))
    drop = torch.rand(count) < recipe.label_dropout
    more: dict[str, Any] = {}
    if share < WINDOWS:
        at = layout[:, 0, 1:] - 2 * torch.randint((WINDOW - data.BOX) // 2 + 1, (count, 2))
        at = at.clamp(0, data.CANVAS - WINDOW)  # the first slot is never empty
        rows, columns = (at[:, i, None] + torch.arange(WINDOW) for i in range(2))
        x = x[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None]][:, None]
        layout = layout - F.pad(at, (1, 0))[:, None]
        more["window"] = at // 2
    layout[..., 0] = layout[..., 0].masked_fill(drop[:, None], data.EMPTY)
    return x, layout, more


# What a network is trained on.
BATCHES = {
    "dit-digits": _digits,
    "dit-moe-digits": _digits,
    "dit-scenes": _scenes,
    "unet-digits": _digits,
}


def loss_of(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    alpha_bar: Tensor,
    *,
    autocast: bool = True,
    **more: Any,
) -> Tensor:
    """Mean squared error of the prediction at random times.

    flow: x_t = (1-t) x + t e, target e - x, with t logit-normal for 7 of 10 samples and uniform for
    the rest (Esser et al. 2024, arXiv:2403.03206, section 3.1). eps: Ho et al. 2020, eq. 14.
    """
    noise = torch.randn_like(x)
    b = x.shape[0]
    if model.prediction == "flow":
        u = torch.where(torch.rand(b) < 0.3, torch.rand(b), torch.sigmoid(torch.randn(b)))
        a = u.view(-1, 1, 1, 1)
        x_t, target, t = (1 - a) * x + a * noise, noise - x, u * TRAIN_STEPS
    else:
        index = torch.randint(TRAIN_STEPS, (b,))
        a = alpha_bar[index].view(-1, 1, 1, 1)
        x_t, target, t = a.sqrt() * x + (1 - a).sqrt() * noise, noise, index.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x_t, t, y, **more)
    return F.mse_loss(out.float(), target)


@torch.no_grad()
def _average(average: dict[str, Tensor], model: nn.Module, keep: float) -> None:
    state = model.state_dict()
    torch._foreach_lerp_(list(average.values()), [state[k] for k in average], 1 - keep)


def train(name: str, out: str | Path, recipe: Recipe | None = None, *, command: str = "") -> dict:
    """Train network ``name`` and write ``out/name.safetensors`` (float16) and its ``.json`` card.

    Args:
        name: of :data:`NETWORKS`.
        out: folder for the checkpoint.
        recipe: time, batch, learning rate, ...; see :class:`Recipe`.
        command: how the run was started, for the card.

    Returns:
        The card.

    Raises:
        ValueError: no such network, or ``recipe.config`` does not fit it.
    """
    if name not in NETWORKS:
        raise ValueError(f"train: name is {name!r}, need one of {', '.join(NETWORKS)}")
    recipe = recipe or Recipe()
    torch.manual_seed(recipe.seed)
    kind, own = NETWORKS[name]
    config = own | recipe.config
    model = kind(**config)
    before = {"steps": 0, "minutes": 0.0}
    if recipe.resume:
        old, card = load(recipe.resume, plain=True)
        had = card["config"]
        other = [k for k in recipe.config if had.get(k) != recipe.config[k]]
        if other:
            raise ValueError(
                f"train: resume has {other[0]} {had.get(other[0])}, need "
                f"{recipe.config[other[0]]}, as asked for"
            )
        config = config | {k: had[k] for k in EXPERTS if k in had}
        model = kind(**config)
        model.load_state_dict(old.state_dict())
        before = {k: card["training"][k] for k in before}
    source = data.SOURCE
    if name == "dit-scenes":
        source = f"scenes of one to three digits ({data.BOX} x {data.BOX} pixels each) of {source}"
    alpha_bar = linear_alpha_bar()
    average = {k: v.clone() for k, v in model.state_dict().items()}
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    out, start = Path(out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    step, running, saved, card = 0, float("nan"), start, {}
    evenness: float | None = None  # of the experts' use, 1 the best; None without experts

    def write() -> dict:
        minutes = (time.monotonic() - start) / 60
        training = dict(
            data=source,
            seed=recipe.seed,
            steps=before["steps"] + step,
            minutes=round(before["minutes"] + minutes, 1),
            batch=recipe.batch,
            loss=round(running, 5),
            command=command,
            threads=torch.get_num_threads(),
            label_dropout=recipe.label_dropout,
            lr=recipe.lr,
            ema=recipe.ema,
        )
        if evenness is not None:
            training |= dict(balance=recipe.balance, evenness=round(evenness, 4))
        average_model = kind(**config)
        average_model.load_state_dict(average)
        shape = dict(channels=1, image_size=config.get("input_size", data.SIZE))
        shape["num_classes"] = data.CLASSES
        facts = dict(**shape, **SAMPLING[name], training=training)
        return save(average_model, out / f"{name}.safetensors", **facts)

    while (share := (time.monotonic() - start) / (60 * recipe.minutes)) < 1:
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        lr = recipe.lr * warm * (0.5 + 0.5 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, y, more = BATCHES[name](recipe, share)
        with blocks.routes() as routed:
            loss = loss_of(model, x, y, alpha_bar, **more)
        whole = loss
        if routed and recipe.balance:
            balance = blocks.balance_loss(routed)
            whole = loss + recipe.balance * balance
            evenness = balance.item() / len(routed)
        whole.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        _average(average, model, min(recipe.ema, (1 + step) / (10 + step)))
        running = loss.item() if step == 1 else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            print(
                f"step {step} minutes {(time.monotonic() - start) / 60:.1f} loss {running:.4f}",
                flush=True,
            )
        if time.monotonic() - saved > 60 * recipe.save_minutes:
            card, saved = write(), time.monotonic()
    card = write()
    print(json.dumps({"done": name, **card["training"]}), flush=True)
    return card
