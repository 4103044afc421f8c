"""Fine-tune the small networks on other digits, through an adapter or as a whole.

The network is the plain one of a checkpoint; what is trained, how much memory gradients and moments
take, and what the run cost stand in the card beside the adapter's file.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import data, quality
from fastdiff.adapters import METHODS as ADAPTERS
from fastdiff.adapters import Adapter, LoRA, SaRA, SparseAdamW
from fastdiff.models.checkpoint import load, save
from fastdiff.train import linear_alpha_bar, loss_of

METHODS = ("sara", "lora", "difffit", "diffscaler", "full")
LR = {"sara": 2e-3, "lora": 2e-3, "difffit": 5e-3, "diffscaler": 3e-3, "full": 5e-4}
HEAD = 20  # batches of the loss that is reported, at the beginning and at the end


@dataclass
class Recipe:
    """How to fine-tune.

    ``data`` is of :data:`fastdiff.data.TARGETS`, ``method`` of :data:`METHODS`. ``ratio`` (or
    ``threshold``) is SaRA's; ``rank`` LoRA's and Diffscaler's, None: as many parameters as SaRA's
    ``ratio``. ``reselect`` is the share of the steps after which SaRA selects again,
    ``rank_weight`` the factor of its nuclear norm. ``lr`` None: :data:`LR` of the method.
    ``minutes`` ends the run earlier than ``steps``, and the learning rate falls with whichever is
    nearer its end.
    """

    data: str = "rotated"
    method: str = "sara"
    steps: int = 600
    minutes: float = 1000.0
    batch: int = 32
    lr: float | None = None
    ratio: float = 0.05
    threshold: float | None = None
    rank: int | None = None
    reselect: float | None = None
    rank_weight: float = 0.0
    weight_decay: float = 0.0
    warmup_steps: int = 20
    label_dropout: float = 0.1
    seed: int = 0


def rank_for(network: nn.Module, count: int) -> int:
    """The rank at which LoRA on every linear layer has about ``count`` parameters, at least 1."""
    each = sum(
        m.in_features + m.out_features for m in network.modules() if isinstance(m, nn.Linear)
    )
    if not each:
        raise ValueError("finetune: the network has no linear layer for LoRA")
    return max(1, round(count / each))


def _entries(network: nn.Module) -> int:
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def prepare(
    network: nn.Module, recipe: Recipe
) -> tuple[Adapter | None, torch.optim.Optimizer, list[nn.Parameter]]:
    """The adapter (None: the whole network), its optimiser, and what is trained.

    Raises:
        ValueError: the method is not known, or a setting does not fit it.
    """
    if recipe.method not in METHODS:
        raise ValueError(f"finetune: method is {recipe.method!r}, need one of {', '.join(METHODS)}")
    lr = LR[recipe.method] if recipe.lr is None else recipe.lr
    rank = recipe.rank
    if rank is None and recipe.method in ("lora", "diffscaler"):
        rank = rank_for(network, round(recipe.ratio * _entries(network)))
    adapter: Adapter | None
    trained: list[nn.Parameter]
    if recipe.method == "sara":
        theta = recipe.threshold
        sara = SaRA(network, threshold=theta, ratio=recipe.ratio if theta is None else None)
        at = None if recipe.reselect is None else max(1, round(recipe.reselect * recipe.steps))
        sparse = SparseAdamW(
            sara,
            lr,
            weight_decay=recipe.weight_decay,
            reselect_at=at,
            rank_weight=recipe.rank_weight,
            seed=recipe.seed,
        )
        return sara, sparse, sara.trainable()
    if recipe.method == "full":
        adapter, trained = None, [p for p in network.parameters() if p.requires_grad]
    else:
        adapter = (
            LoRA(network, rank or 1)
            if recipe.method == "lora"
            else ADAPTERS[recipe.method](network, **({} if rank is None else {"rank": rank}))
        )
        trained = adapter.trainable()
    return adapter, torch.optim.AdamW(trained, lr, weight_decay=recipe.weight_decay), trained


def _peak() -> int:
    """The most memory the process has had, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _batch(recipe: Recipe, every: data.Digits) -> tuple[Tensor, Tensor]:
    pick = torch.randint(len(every.x), (recipe.batch,))
    drop = torch.rand(recipe.batch) < recipe.label_dropout
    x = data.change(recipe.data, data.augment(every.x[pick]))
    return x, every.y[pick].masked_fill(drop, data.CLASSES)


def _train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    every: data.Digits,
    progress: Callable[[int, int, float], None] | None,
) -> tuple[list[float], int, bool]:
    """The losses, the bytes of gradients, and whether a person stopped it."""
    alpha_bar, lr, start = linear_alpha_bar(), optimizer.param_groups[0]["lr"], time.monotonic()
    curve: list[float] = []
    gradients = 0
    try:
        for step in range(recipe.steps):
            share = max(step / recipe.steps, (time.monotonic() - start) / (60 * recipe.minutes))
            if step and share >= 1:
                break
            warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
            now = lr * warm * (0.5 + 0.5 * math.cos(math.pi * min(share, 1.0)))
            optimizer.param_groups[0]["lr"] = now
            x, y = _batch(recipe, every)
            loss = loss_of(network, x, y, alpha_bar, autocast=False)
            loss.backward()
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = _bytes([p.grad for p in trained if p.grad is not None])
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
            if not math.isfinite(curve[-1]):
                raise ValueError(
                    f"finetune: the loss of step {step} is {curve[-1]}, need a lower lr"
                )
            if progress is not None:
                progress(step + 1, recipe.steps, curve[-1])
    except KeyboardInterrupt:
        if not curve:
            raise
        return curve, gradients, True
    return curve, gradients, False


def finetune(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    evaluate: dict[str, Any] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Fine-tune a checkpoint and write ``out``, the adapter (of "full": a whole checkpoint), and
    its card, the same name with ``.json``.

    Args:
        model: name or path of a checkpoint of digits.
        out: path of the file, which ends in ``.safetensors``.
        recipe: see :class:`Recipe`.
        evaluate: arguments of :func:`fastdiff.quality.evaluate` such as ``per_class``: quality
            before and after then stands in the card.
        progress: is told step, steps and loss.
        command: for the card.

    Stopped by a person (KeyboardInterrupt), it writes what there is, and the interrupt goes on.

    Returns:
        The card: parameters trained, losses (every step's under "curve"), time, bytes.

    Raises:
        ValueError: a name or setting does not fit; nothing is written then.
    """
    recipe, out = recipe or Recipe(), Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"finetune: out is {str(out)!r}, need a name that ends in .safetensors")
    if not out.parent.is_dir():
        raise ValueError(f"finetune: out is {str(out)!r}, need a folder that exists")
    if recipe.steps < 1 or recipe.batch < 1:
        raise ValueError(
            f"finetune: steps is {recipe.steps}, batch {recipe.batch}, need at least 1"
        )
    every = data.target(recipe.data if recipe.data == "sklearn" else "digits")
    data.target(recipe.data)  # there is such a set
    network, card = load(model, plain=True)
    if getattr(network, "box_size", 0):
        raise ValueError(f"finetune: model is {str(model)!r}, need one of digits, not of scenes")
    shape = {k: card[k] for k in ("sampler", "guidance", "clip") if k in card}
    found: dict[str, Any] = {}
    if evaluate is not None:
        settings = {**shape, **evaluate, "target": recipe.data}
        found["before"] = quality.evaluate(network, **settings)
    torch.manual_seed(recipe.seed)
    network.train()
    network.requires_grad_(True)
    if hasattr(network, "pos_embed"):
        network.pos_embed.requires_grad_(False)
    whole = sum(p.numel() for p in network.parameters())
    adapter, optimizer, trained = prepare(network, recipe)
    lr = optimizer.param_groups[0]["lr"]
    _forget_peak()
    start, idle = time.monotonic(), _peak()
    curve, gradients, stopped = _train(network, optimizer, recipe, every, progress)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    seconds = time.monotonic() - start
    network.eval()
    moments = [
        t
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, Tensor) and t.dim()
    ]
    found |= {
        "recipe": {**asdict(recipe), "lr": lr},
        "base": str(model),
        "base_parameters": whole,
        "trained_parameters": sum(p.numel() for p in trained),
        "steps": len(curve),
        "seconds": round(seconds, 2),
        "seconds_a_step": round(seconds / len(curve), 5),
        "loss_first": round(sum(curve[:HEAD]) / len(curve[:HEAD]), 5),
        "loss_last": round(sum(curve[-HEAD:]) / len(curve[-HEAD:]), 5),
        "gradient_bytes": gradients,
        "moment_bytes": _bytes(moments),
        "peak_bytes": _peak() - idle,
        "command": command,
        "curve": [round(v, 5) for v in curve],
    }
    if stopped:
        found["stopped"] = True
    elif evaluate is not None:
        found["after"] = quality.evaluate(network, **settings)
    if adapter is None:
        own = ("model", "config", "parameters", "dtype", "training")
        facts = {k: v for k, v in card.items() if k not in own}
        training = {k: v for k, v in found.items() if k != "curve"}
        save(network, out, **facts, training=training)
        found["file_bytes"] = out.stat().st_size
    else:
        adapter.save(out)
        found["file_bytes"] = out.stat().st_size
        out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    if stopped:
        raise KeyboardInterrupt
    return found
