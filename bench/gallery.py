"""Every sampling program that draws pictures, on a trained digit model: one PNG each, and all of
them in one sheet.

    python bench/gallery.py --out gallery --steps 50

Rows of a picture are named in the list that is printed: what goes in first, what comes out last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastdiff import data, methods, models, samplers
from fastdiff.cli_methods import REWARDS, region_of
from fastdiff.cli_sample import save_grid
from fastdiff.methods.diffeditor import Term, unlike
from fastdiff.samplers import DDIM

Rows = dict[str, Tensor]


def programs(model: Any, guidance: float, steps: int) -> dict[str, Callable[[], Rows]]:
    """Name of a program to a call that gives its rows of ten pictures."""
    held = data.digits()
    first = torch.stack([(held.held_y == c).nonzero()[0, 0] for c in range(10)])
    x, y = held.held_x[first], held.held_y[first]
    shape, target = tuple(x.shape), torch.roll(y, 1)
    mask, ancestral = region_of("bottom", 32), DDIM(eta=1.0)
    how: dict[str, Any] = dict(steps=steps, classes=y, guidance=guidance)
    known = methods.Mask(1 - mask)
    small = methods.BoxDown(4)
    tap = f"blocks.{len(model.blocks) // 2}"
    reader, symmetry, ink = (REWARDS[name](y) for name in ("reader", "symmetry", "ink"))
    later = [[i] for i in range(1, steps)]  # a flow's noisiest level has no signal

    def inverted() -> Rows:
        bare = dict(steps=steps, classes=y)
        store = methods.ddim_inversion(model, x, **bare)
        back = samplers.sample(model, store.state(0), **bare)
        return {"digits": x, "noise / 3": store.state(0) / 3, "back": back}

    def unlike_shifted(a: Any, b: Any) -> Tensor:
        """The features as they are one token further right."""
        side = int(a[tap].shape[1] ** 0.5)
        grid = (v.unflatten(1, (side, side)) for v in (a[tap], b[tap]))
        now, then = grid
        return unlike(now[:, :, 1:].flatten(1, 2), then[:, :, :-1].flatten(1, 2))

    return {
        "plain sampling": lambda: {"out": samplers.sample(model, shape, **how)},
        "FK steering to bright pictures": lambda: {
            "out": methods.fk_steering(model, shape, ink, lam=50.0, sampler=ancestral, **how).best()
        },
        "value-based decoding to what is read well": lambda: {
            "out": methods.svdd(
                model, shape, reader, candidates=4, alpha=0.2, sampler=ancestral, **how
            )
        },
        "steered to symmetry, 2 loops": lambda: {
            "out": methods.steered(
                model, shape, lambda v: -symmetry(v), scale=3.0, loops=2, sampler=ancestral, **how
            )
        },
        "LaCon: small features": lambda: {
            "out": methods.lacon(
                model, shape, lambda f: f[tap].square().flatten(1).mean(1), taps=[tap],
                strength=0.5, **how,
            )
        },
        "SDA: coarse content of other digits": lambda: {
            "digits": x,
            "out": methods.sda(model, x, **{**how, "classes": target}),
        },
        "latent guidance: background of a digit": lambda: {
            "target": x,
            "out": methods.latent_guidance(
                model, shape, [(lambda v: -ink(v), 1.0)], mask=mask, target=x, **how
            ),
        },
        "DDIM inversion": inverted,
        "direct inversion to the class before": lambda: {
            "digits": x,
            "out": methods.direct_inversion(
                model, x, target, classes=y, guidance=guidance, steps=steps
            ).target,
        },
        "CycleDiffusion to the class before": lambda: {
            "digits": x,
            "out": methods.cycle_diffusion(
                model, model, x, source_classes=y, **{**how, "classes": target}
            ),
        },
        "Cyclic One-Way from the upper half": lambda: {
            "digits": x,
            "out": methods.cow(model, x, mask, cycles=5, **{**how, "classes": target}),
        },
        "DiffEditor: one token to the right": lambda: {
            "digits": x,
            "out": methods.diffeditor(
                model, x, [Term(unlike_shifted, 200.0)], taps=[tap], mask=torch.ones(1, 1, 32, 32),
                steps=steps, classes=y,
            ),
        },
        "RePaint, jumps": lambda: {
            "known": x * (1 - mask) - mask,
            "out": methods.repaint(
                model, shape, x, mask, jump=5, repeats=3, sampler="ddpm", clip=1.0, **how
            ),
        },
        "projection, 4 x 4 boxes": lambda: {
            "known": small.adjoint(small.apply(x)) * 16,
            "out": methods.projected(
                model, shape, small, small.apply(x), sampler=ancestral, **how
            ),
        },
        "RED-Diff, inpainting": lambda: {
            "known": x * (1 - mask) - mask,
            "out": methods.red_diff(model, shape, known, known.apply(x), at=later, **how),
        },
        "SuperDiff: a digit and the one before": lambda: {
            "out": methods.superdiff(
                model, shape, conditions=[y, target], kind="and", steps=steps, sampler=ancestral
            ).x
        },
        "MultiDiffusion, 32 x 80": lambda: {
            "out": methods.multi_diffusion(
                model, (10, 1, 32, 80), size=(32, 32), stride=(16, 16), **how
            )
        },
        "score distillation of pixels": lambda: {
            "out": methods.score_distillation(
                model, torch.zeros(shape), lambda theta, _: theta, updates=4 * steps, lr=0.05,
                levels=(steps // 10, steps), **how,
            )
        },
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", default="dit-digits")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--out", type=Path, default=Path("gallery"), help="folder")
    p.add_argument("--only", help="programs whose name has this in it")
    args = p.parse_args()
    args.out.mkdir(exist_ok=True)
    model, card = models.load(args.model)
    model.requires_grad_(False)
    sheets = []
    for name, program in programs(model, card["guidance"], args.steps).items():
        if args.only and args.only not in name:
            continue
        start = time.perf_counter()
        rows = program()
        path = args.out / f"{''.join(c if c.isalnum() else '-' for c in name)}.png"
        save_grid(torch.cat(list(rows.values())), 10, path, {"program": name, "rows": list(rows)})
        seconds = time.perf_counter() - start
        print(f"{name}: {', '.join(rows)}; {seconds:.1f} s -> {path}", flush=True)
        sheets.append((name, Image.open(path).convert("L")))
    height = sum(image.height + 18 for _, image in sheets)
    whole = Image.new("L", (max(image.width for _, image in sheets), height), 255)
    top = 0
    for name, image in sheets:
        ImageDraw.Draw(whole).text((4, top + 3), name, fill=0)
        whole.paste(image, (0, top + 16))
        top += image.height + 18
    whole.save(args.out / "all.png")


if __name__ == "__main__":
    main()
