"""``fastdiff finetune``: adapt a small network to other digits, on the CPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastdiff.cli import MODELS, UsageError, _finite, _whole

METHODS = ("sara", "lora", "difffit", "diffscaler", "full")  # as fastdiff.finetune has them
DATA = ("rotated", "inverted", "sklearn", "digits")


def add(commands: Any) -> None:
    """The command's options."""
    p = commands.add_parser("finetune", help="adapt a model to other digits through an adapter")
    p.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or a checkpoint's path")
    p.add_argument("--data", choices=DATA, default="rotated", help="default: rotated")
    p.add_argument("--method", choices=METHODS, default="sara", help="default: sara")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("adapter.safetensors"),
        help="the adapter's file (of full: a checkpoint); its card gets .json",
    )
    p.add_argument("--plot", type=Path, help="PNG file: the loss")
    p.add_argument("--steps", type=_whole(1, 10_000_000), default=600)
    p.add_argument(
        "--minutes", type=_finite(0.001, 100_000), default=1000.0, help="at most (default: 1000)"
    )
    p.add_argument("--batch", type=_whole(1, 65_536), default=32)
    p.add_argument("--lr", type=_finite(0, 10), help="default: the method's own")
    p.add_argument(
        "--ratio",
        type=_finite(0, 1),
        default=0.05,
        help="of sara: the share of weights that is trained; of lora and diffscaler without "
        "--rank: as many parameters (default: 0.05)",
    )
    p.add_argument("--threshold", type=_finite(0, 1e30), help="of sara, in place of --ratio")
    p.add_argument("--rank", type=_whole(1, 256), help="of lora and diffscaler")
    p.add_argument(
        "--reselect",
        type=_finite(0, 1),
        help="of sara: the share of the steps after which weights that have grown past the "
        "threshold stay as they are",
    )
    p.add_argument(
        "--rank-weight", type=_finite(0, 1e6), default=0.0, help="of sara: of the nuclear norm"
    )
    p.add_argument("--weight-decay", type=_finite(0, 100), default=0.0)
    p.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0)
    p.add_argument(
        "--evaluate",
        type=_whole(1, 1000),
        metavar="N",
        help="read N samples of every class before and after (default: not)",
    )
    p.add_argument("--json", action="store_true", help="the card as JSON on stdout")
    p.add_argument("--threads", type=_whole(1, 4096), help="default: torch's own choice")


def plot(curve: list[float], title: str, path: Path) -> None:
    """The loss of every step, and its mean over 25."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(curve) + 1), curve, color="0.8", linewidth=0.8, label="each step")
    wide = min(25, len(curve))
    means = [sum(curve[i - wide : i]) / wide for i in range(wide, len(curve) + 1)]
    axes.plot(range(wide, len(curve) + 1), means, label=f"mean of {wide}")
    axes.set(xlabel="step", ylabel="loss", title=title, yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> int:
    """Run ``fastdiff finetune`` with its parsed arguments."""
    import torch
    from tqdm import tqdm

    from fastdiff.finetune import Recipe, finetune

    if args.threads:
        torch.set_num_threads(args.threads)
    for name, path in (("--out", args.out), ("--plot", args.plot)):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{name} is {str(path)!r}, need a folder that exists")
    names = "data method steps minutes batch lr ratio threshold rank reselect rank_weight"
    names += " weight_decay seed"
    recipe = Recipe(**{n: getattr(args, n) for n in names.split()})
    bar = tqdm(total=args.steps, disable=None, file=sys.stderr, leave=False)

    def told(step: int, steps: int, loss: float) -> None:
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    command = " ".join(["fastdiff", *sys.argv[1:]])
    evaluate = None if args.evaluate is None else {"per_class": args.evaluate}
    try:
        with bar:
            card = finetune(
                args.model, args.out, recipe, evaluate=evaluate, progress=told, command=command
            )
        if args.plot is not None:
            plot(card["curve"], f"{args.method} on {args.data}", args.plot)
    except ImportError as error:  # of the data or the plot: optional dependencies
        raise UsageError(str(error)) from error
    if args.json:
        print(json.dumps(card, indent=1))
        return 0
    share = card["trained_parameters"] / card["base_parameters"]
    print(
        f"{args.method} on {args.data}: {card['trained_parameters']:,} of "
        f"{card['base_parameters']:,} parameters ({share:.2%}), {card['steps']} steps in "
        f"{card['seconds']:.1f} s; loss {card['loss_first']:.4f} -> {card['loss_last']:.4f} -> "
        f"{args.out} ({card['file_bytes'] / 1e6:.2f} MB)"
    )
    print(
        f"  gradients {card['gradient_bytes'] / 1e6:.2f} MB, moments "
        f"{card['moment_bytes'] / 1e6:.2f} MB, peak {card['peak_bytes'] / 1e6:.0f} MB"
    )
    if args.evaluate is not None:
        for when in ("before", "after"):
            seen = card[when]
            print(
                f"  {when}: {seen['agreement']:.1%} read as asked, Frechet distance "
                f"{seen['frechet_to_held_out']:.2f} (real digits "
                f"{seen['frechet_training_to_held_out']:.2f})"
            )
    return 0
