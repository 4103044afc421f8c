"""``fastdiff sample --program``, ``edit``, ``invert``, ``inpaint``: sampling programs on digits."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff import data, models
from fastdiff.cli import MODELS, UsageError
from fastdiff.cli_sample import check_out, save_grid
from fastdiff.methods import (
    Mask,
    cow,
    cycle_diffusion,
    ddim_inversion,
    direct_inversion,
    fk_steering,
    projected,
    red_diff,
    repaint,
    sda,
    steered,
    superdiff,
    svdd,
)
from fastdiff.quality import load_classifier
from fastdiff.samplers import DDIM

Reward = Callable[[Tensor], Tensor]


def reader(labels: Tensor) -> Reward:
    """log p(asked digit) by the bundled classifier; rows may hold each picture several times."""
    classifier = load_classifier()

    def reward(x: Tensor) -> Tensor:
        asked = labels.to(x.device).repeat_interleave(x.shape[0] // len(labels))
        logp = classifier(x.float()).log_softmax(1)
        return logp.gather(1, asked[:, None])[:, 0]

    return reward


def _ink(x: Tensor) -> Tensor:
    return x.float().flatten(1).mean(1)


def _symmetry(x: Tensor) -> Tensor:
    return -(x - x.flip(-1)).float().square().flatten(1).mean(1)


REWARDS: dict[str, Callable[[Tensor], Reward]] = {
    "reader": reader,  # how surely the asked digit is read
    "ink": lambda _: _ink,  # bright pictures
    "thin": lambda _: lambda x: -_ink(x),
    "symmetry": lambda _: _symmetry,  # left and right alike
}


def _fk(
    model: Any, shape: Any, reward: Reward, *, particles: int = 4, lam: float = 2.0, **settings: Any
) -> Tensor:
    return fk_steering(model, shape, reward, particles=particles, lam=lam, **settings).best()


def _svdd(
    model: Any,
    shape: Any,
    reward: Reward,
    *,
    candidates: int = 4,
    alpha: float = 0.5,
    **settings: Any,
) -> Tensor:
    return svdd(model, shape, reward, candidates=candidates, alpha=alpha, **settings)


def _steered(
    model: Any, shape: Any, reward: Reward, *, scale: float = 1.0, loops: int = 1, **settings: Any
) -> Tensor:
    return steered(model, shape, lambda x: -reward(x), scale=scale, loops=loops, **settings)


def _superdiff(
    model: Any, shape: Any, reward: Reward, *, other: int = 0, **settings: Any
) -> Tensor:
    first = settings.pop("classes")
    both = [first, torch.full_like(first, other)]
    for name in ("guidance", "guidance_rescale"):
        settings.pop(name, None)
    return superdiff(model, shape, conditions=both, kind="and", **settings).x


DRAW: dict[str, Callable[..., Tensor]] = {
    "fk": _fk,
    "svdd": _svdd,
    "steered": _steered,
    "superdiff": _superdiff,
}
OPTIONS: dict[str, dict[str, type]] = {
    "fk": {"reward": str, "particles": int, "lam": float},
    "svdd": {"reward": str, "candidates": int, "alpha": float},
    "steered": {"reward": str, "scale": float, "loops": int},
    "superdiff": {"other": int},
}


class Drawing(NamedTuple):
    """A program for ``fastdiff sample``: its name, its options, and what it rewards."""

    name: str
    options: dict[str, Any]
    reward: str

    def __call__(self, model: Any, shape: Any, **settings: Any) -> Tensor:
        """Pictures ``[B, C, H, W]``; ``settings`` as of :func:`fastdiff.sample`."""
        classes = settings["classes"]
        if classes.dim() != 1:
            raise UsageError("--program is given, which runs on models of one digit a picture")
        if settings.get("sampler") != "ddpm":  # copies of one particle have to part
            settings["sampler"] = DDIM(eta=1.0)
        callback = settings.pop("callback", None)
        if callback is not None:
            settings["callback"] = lambda i, run: callback(i, 0.0, run.x)
        reward = REWARDS[self.reward](classes)
        return DRAW[self.name](model, shape, reward, **self.options, **settings)

    def __str__(self) -> str:
        words = [f"{k}={v}" for k, v in self.options.items()]
        return f"{self.name}:{','.join([f'reward={self.reward}', *words])}"


def parse_program(text: str) -> Drawing:
    """``"fk:reward=ink,particles=8"``.

    Raises:
        ArgumentTypeError: there is no such program, option or reward.
    """
    name, _, rest = text.partition(":")
    if name not in DRAW:
        raise argparse.ArgumentTypeError(f"is {name!r}, need one of {', '.join(DRAW)}")
    options: dict[str, Any] = {}
    known = OPTIONS[name]
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise argparse.ArgumentTypeError(f"{name} has no {key!r}, need {', '.join(known)}")
        try:
            options[key] = known[key](value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{key} is {value!r}, need a number") from None
    reward = options.pop("reward", "reader")
    if reward not in REWARDS:
        raise argparse.ArgumentTypeError(f"reward is {reward!r}, need one of {', '.join(REWARDS)}")
    return Drawing(name, options, reward)


EDITS = ("cycle", "direct", "sda", "cow")
FILLS = ("repaint", "projection", "red_diff")
REGIONS = ("left", "right", "top", "bottom", "centre")


def add(commands: Any, drawing: Callable[[Any], None], whole: Callable[..., Any]) -> None:
    """The parsers of ``edit``, ``invert`` and ``inpaint``."""
    name = f"{', '.join(MODELS)}, or the path of a checkpoint"

    def common(p: Any, out: str) -> None:
        p.add_argument("--model", default=MODELS[0], help=f"{name} (default: {MODELS[0]})")
        p.add_argument("--steps", type=whole(1, 10_000), default=50)
        p.add_argument("--count", type=whole(1, 100), default=10, help="held-out digits")
        p.add_argument("--out", type=Path, default=Path(out), help=f"PNG file (default: {out})")
        p.add_argument("--json", action="store_true", help="the report as JSON on stdout")
        drawing(p)

    p = commands.add_parser("edit", help="turn held-out digits into other digits")
    p.add_argument("--method", choices=EDITS, default="cycle")
    p.add_argument("--to", type=whole(0, 9), default=8, help="the digit that is wanted")
    common(p, "edit.png")
    p = commands.add_parser("invert", help="find the noise of held-out digits, and draw them again")
    common(p, "invert.png")
    p = commands.add_parser("inpaint", help="fill in a region of held-out digits")
    p.add_argument("--method", choices=FILLS, default="repaint")
    p.add_argument("--region", choices=REGIONS, default="bottom", help="what is generated")
    common(p, "inpaint.png")


def region_of(name: str, size: int) -> Tensor:
    """``[1, 1, size, size]``: 1 in the region."""
    mask = torch.zeros(1, 1, size, size)
    half, quarter = size // 2, size // 4
    part = {
        "left": (slice(None), slice(0, half)),
        "right": (slice(None), slice(half, None)),
        "top": (slice(0, half), slice(None)),
        "bottom": (slice(half, None), slice(None)),
        "centre": (slice(quarter, size - quarter), slice(quarter, size - quarter)),
    }[name]
    mask[0, 0][part] = 1
    return mask


class Task:
    """Held-out digits, a model, and the settings that every program takes."""

    def __init__(self, args: argparse.Namespace):
        if args.layout or args.adapter:
            raise UsageError(f"--layout and --adapter are not for {args.command}")
        self.args = args
        self.model, card = models.load(args.model, dtype=getattr(torch, args.dtype))
        size = args.size or card.get("image_size", 32)
        if size != 32 or getattr(self.model, "box_size", 0) or self.model.in_channels != 1:
            raise UsageError(f"{args.command}: {args.model} does not draw digits of 32 x 32 pixels")
        held = data.digits()
        classes = torch.tensor(args.classes or range(10))
        which = torch.isin(held.held_y, classes).nonzero()[:, 0]
        order = torch.randperm(len(which), generator=torch.Generator().manual_seed(args.seed))
        which = which[order[: args.count]]
        self.x, self.y = held.held_x[which], held.held_y[which]
        guidance = card.get("guidance", 1.0) if args.guidance is None else args.guidance
        self.settings: dict[str, Any] = dict(
            steps=args.steps,
            guidance=guidance,
            guidance_rescale=args.guidance_rescale,
            seed=args.seed,
        )
        clip = card.get("clip", 0.0) if args.clip is None else args.clip
        self.clip = clip or None

    def progress(self, words: str) -> Any:
        bar = tqdm(desc=words, file=sys.stderr, leave=False, disable=None)
        return bar, lambda *_: bar.update()


def edit(task: Task) -> tuple[Tensor, dict[str, Any]]:
    """Rows of pictures: the digits, and what they became."""
    args, x, model = task.args, task.x, task.model
    target = torch.full_like(task.y, args.to)
    settings = {**task.settings, "classes": target}
    if args.method == "cycle":
        found = cycle_diffusion(
            model, model, x, source_classes=task.y, **settings, sampler=DDIM(eta=0.1)
        )
    elif args.method == "direct":
        del settings["classes"]
        found = direct_inversion(model, x, target, classes=task.y, **settings).target
    elif args.method == "sda":
        found = sda(model, x, **settings, clip=task.clip)
    else:
        found = cow(model, x, region_of("bottom", 32), **settings, cycles=3)
    agree = (load_classifier()(found.float()).argmax(1) == target).float().mean().item()
    return torch.cat((x, found)), {"read_as_asked": agree, "to": args.to}


def invert(task: Task) -> tuple[Tensor, dict[str, Any]]:
    """Rows of pictures: the digits, their noise, and what comes back from it: by the inverted
    path alone, and with the path that was stored."""
    x, model = task.x, task.model
    settings = {**task.settings, "guidance": 1.0, "classes": task.y}
    settings.pop("guidance_rescale")
    store = ddim_inversion(model, x, **settings)
    noise = store.state(0)
    from fastdiff import samplers

    back = samplers.sample(model, noise, **settings)
    both = direct_inversion(model, x, task.y, store=store, **settings)

    def away(y: Tensor) -> float:
        return (y.float() - x).square().mean().sqrt().item()

    facts = {"rms_of_noise": noise.float().square().mean().sqrt().item()}
    facts |= {"rms_of_the_way_back": away(back), "rms_with_the_stored_path": away(both.source)}
    return torch.cat((x, noise / 3, back, both.source)), facts


def inpaint(task: Task) -> tuple[Tensor, dict[str, Any]]:
    """Rows of pictures: the digits, what of them is known, and what is filled in."""
    args, x, model = task.args, task.x, task.model
    mask = region_of(args.region, 32)
    settings = {**task.settings, "classes": task.y}
    shape, known = tuple(x.shape), Mask(1 - mask)
    if args.method == "repaint":
        jump = max(1, args.steps // 25)
        found = repaint(
            model, shape, x, mask, jump=jump, repeats=3, **settings, sampler="ddpm", clip=task.clip
        )
    elif args.method == "projection":
        found = projected(
            model, shape, known, known.apply(x), **settings, sampler=DDIM(eta=1.0), clip=task.clip
        )
    else:
        levels = [[i] for i in range(1, args.steps)]  # the noisiest of a flow has no signal
        found = red_diff(model, shape, known, known.apply(x), at=levels, **settings)
    agree = (load_classifier()(found.float()).argmax(1) == task.y).float().mean().item()
    kept = ((found - x) * (1 - mask)).abs().max().item()
    inside = ((found - x) * mask).square().sum().div(mask.sum() * len(x)).sqrt().item()
    facts = {"read_as_asked": agree, "largest_change_outside": kept, "rms_inside": inside}
    return torch.cat((x, x * (1 - mask) - mask, found)), facts


def main(args: argparse.Namespace) -> int:
    """Run ``edit``, ``invert`` or ``inpaint`` with its parsed arguments."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.sampler is not None:
        raise UsageError(f"--sampler is given, but {args.command} has its own; need none")
    if args.out.suffix.lower() != ".png":
        raise UsageError(f"--out is {str(args.out)!r}, need a name that ends in .png")
    check_out(args.out)
    try:
        task = Task(args)
    except ImportError as error:
        raise UsageError(str(error)) from error
    run = {"edit": edit, "invert": invert, "inpaint": inpaint}[args.command]
    start = time.perf_counter()
    pictures, facts = partial(run, task)()
    report = {
        "command": args.command,
        "model": args.model,
        "method": getattr(args, "method", "ddim"),
        "digits": task.y.tolist(),
        "steps": args.steps,
        "seconds": time.perf_counter() - start,
        "out": str(args.out),
        "finite": bool(torch.isfinite(pictures).all()),
        **facts,
    }
    save_grid(pictures, len(task.y), args.out, {k: v for k, v in report.items() if k != "out"})
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        numbers = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in facts.items())
        print(
            f"{report['command']} by {report['method']} with {args.model}: {len(task.y)} digits, "
            f"{args.steps} steps, {report['seconds']:.1f} s: {numbers} -> {args.out}"
        )
    return 0
