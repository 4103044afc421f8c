"""The ``fastdiff`` command: sample pictures, train, time kernels, tell what runs here.

Exit codes: 0 done; 1 a benchmark is red; 2 bad usage or input, with one line on stderr; 130
interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastdiff._memory import keep_memory

MODELS = ("dit-digits", "unet-digits")  # bundled with the package; the default of sample
SCENES = "dit-scenes"  # bundled as well
EXPERTS = "dit-moe-digits"  # trained by a person
DTYPES = ("float32", "bfloat16", "float16")


class UsageError(ValueError):
    """Bad input of a person: reported in one line, without a traceback."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the options)\n")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {text!r}, need a whole number {low} to {high}")
        return value

    return parse


def _finite(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {text!r}, need a number {low:g} to {high:g}")
        return value

    return parse


def parse_classes(text: str) -> list[int]:
    """``"0-3,7"`` gives ``[0, 1, 2, 3, 7]``."""
    classes: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise argparse.ArgumentTypeError(
                f"is {text!r}, need labels and ranges such as 0-9 or 0,3,5-7"
            )
        first, last = int(low), int(high or low)
        if last < first or last - first > 10_000:
            raise argparse.ArgumentTypeError(
                f"range {part.strip()!r} is empty or above 10000 labels"
            )
        classes += range(first, last + 1)
    return classes


def parse_layout(text: str) -> list[list[int]]:
    """``"3@10,12 7@40,30"`` gives ``[[3, 10, 12], [7, 40, 30]]``."""
    boxes = []
    for part in text.split():
        match = re.fullmatch(r"(\d+)@(\d+),(\d+)", part)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"is {text!r}, need class@top,left of each digit, such as '3@10,12 7@40,30'"
            )
        boxes.append([int(n) for n in match.groups()])
    return boxes


def _policy(text: str) -> Any:
    from fastdiff.cache.parse import parse
    from fastdiff.tune import Report

    try:
        if not text.endswith(".json"):
            policies = [parse(one) for one in text.split("/")]
            return policies if len(policies) > 1 else policies[0]
        report = Report.load(text)
        if report.policy() is None:
            raise ValueError(f"cache is {text!r}: {report.verdict()}; need a report with a cache")
        return report.policy()
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _program(text: str) -> Any:
    from fastdiff.cli_methods import parse_program

    return parse_program(text)


def _drawing(p: Parser) -> None:
    """The options of every command that draws pictures."""
    p.add_argument(
        "--sampler", help="a name of fastdiff.samplers.SAMPLERS (default: the model card's)"
    )
    p.add_argument("--classes", type=parse_classes, help="such as 0-9 or 0,3,5-7 (default: all)")
    p.add_argument(
        "--layout",
        type=parse_layout,
        action="append",
        help=f"of {SCENES}: class@top,left in pixels for each digit of a picture, such as "
        "'3@10,12 7@40,30'; may be given several times (default: random)",
    )
    p.add_argument("--size", type=_whole(1, 4096), help="pixels (default: what it was trained at)")
    p.add_argument(
        "--guidance", type=_finite(0, 1000), help="1 is none (default: the model card's)"
    )
    p.add_argument("--guidance-rescale", type=_finite(0, 1), default=0.0)
    p.add_argument(
        "--clip",
        type=_finite(0, 1000),
        help="predicted pictures are clipped to [-CLIP, CLIP], 0: not (default: the model card's)",
    )
    p.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0)
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument(
        "--adapter",
        action="append",
        help="a file of fastdiff finetune for the model; may be given several times",
    )
    p.add_argument("--threads", type=_whole(1, 4096), help="default: torch's own choice")


def _add_tune(commands: Any) -> None:
    """``fastdiff tune`` and ``fastdiff report``."""
    name = f"{', '.join(MODELS)} or {SCENES}, or the path of a checkpoint"
    p = commands.add_parser("tune", help="find the fastest cache that keeps a quality")
    p.add_argument("--model", required=True, help=name)
    p.add_argument("--target", required=True, help="psnr=35 (dB), or relative_l2=0.05")
    p.add_argument("--steps", type=_whole(2, 10_000), default=25, help="of the plain run")
    p.add_argument(
        "--pictures",
        type=_whole(2, 16_384),
        default=16,
        help="of which one half is held out from the choice (default: 16)",
    )
    p.add_argument(
        "--cache",
        type=_policy,
        action="append",
        help="a candidate, as in fastdiff sample; may be given several times (default: those of "
        "fastdiff.target.candidates)",
    )
    p.add_argument(
        "--fewer",
        type=_whole(1, 10_000),
        action="append",
        help="a number of steps to beat; may be given several times (default: 3/4, 1/2, 1/3 and "
        "1/4 of --steps)",
    )
    p.add_argument("--rounds", type=_whole(1, 1000), default=3, help="timed runs of a candidate")
    p.add_argument("--out", type=Path, help="JSON file, which --cache of the others takes")
    p.add_argument("--plot", type=Path, help="PNG file: quality against speed-up")
    p.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    _drawing(p)

    p = commands.add_parser(
        "report", help="draw what a run with a cache computed and reused, or which experts it used"
    )
    p.add_argument("--model", required=True, help=name)
    p.add_argument("--cache", type=_policy, help="as in fastdiff sample")
    p.add_argument(
        "--experts",
        action="store_true",
        help="of a model of experts, in place of --cache: each expert's share of tokens, by layer "
        "and noise level",
    )
    p.add_argument("--steps", type=_whole(1, 10_000), default=25)
    p.add_argument("--batch", type=_whole(1, 4096), help="pictures (default: 2 of each class)")
    p.add_argument("--out", type=Path, default=Path("report.png"), help="PNG file")
    _drawing(p)


def parser() -> Parser:
    """The command line."""
    top = Parser(prog="fastdiff", description="Kernel-optimised acceleration engine for diffusion.")
    commands = top.add_subparsers(
        dest="command",
        required=True,
        metavar="sample|edit|invert|inpaint|tune|report|train|finetune|bench|info",
        parser_class=Parser,
    )

    p = commands.add_parser("sample", help="draw pictures into a PNG grid")
    p.add_argument(
        "--model",
        action="append",
        help=f"{', '.join(MODELS)} or {SCENES}, or the path of a checkpoint; may be given several "
        f"times (default: {' and '.join(MODELS)})",
    )
    p.add_argument("--steps", type=_whole(1, 10_000), default=25)
    _drawing(p)
    p.add_argument("--batch", type=_whole(1, 4096), help="pictures (default: 2 of each class)")
    p.add_argument(
        "--cache",
        type=_policy,
        help="reuse work from step to step: deepcache:3, firstblock:0.1, taylor:3, broadcast:2, or "
        "encoder:50ls for U-Nets, tokens:0.5 for transformers; more settings as "
        "deepcache:3,branch=1; several together as taylor:3/broadcast:2; or the JSON file "
        "of fastdiff tune (default: none)",
    )
    p.add_argument(
        "--program",
        type=_program,
        help="steer the pictures: fk:reward=reader,particles=4,lam=2; "
        "svdd:reward=ink,candidates=4,alpha=0.5; steered:reward=symmetry,scale=1,loops=1 (rewards: "
        "reader, ink, thin, symmetry); superdiff:other=3: two digits in one (default: none)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="PNG file, with the model's name put in where there are several models; a file that "
        "fastdiff sample wrote is overwritten, any other is not (default: samples.png)",
    )
    p.add_argument(
        "--compare", action="store_true", help="time plain torch on the same weights too"
    )
    p.add_argument("--compile", action="store_true", help="with --compare: torch.compile as well")
    p.add_argument("--repeat", type=_whole(1, 1000), default=3, help="timed runs of --compare")
    p.add_argument("--json", action="store_true", help="the report as JSON on stdout")

    from fastdiff import cli_methods

    cli_methods.add(commands, _drawing, _whole)
    _add_tune(commands)

    p = commands.add_parser("train", help="train one of the small models on digits, on the CPU")
    p.add_argument("name", nargs="?", choices=(*MODELS, EXPERTS, SCENES))
    p.add_argument(
        "--data", choices=("digits", "scenes"), help=f"scenes: {SCENES}, in place of its name"
    )
    p.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and its card")
    p.add_argument("--minutes", type=_finite(0.01, 100_000), default=30.0)
    p.add_argument("--batch", type=_whole(1, 65_536), default=64)
    p.add_argument("--lr", type=_finite(0, 1), default=1e-3)
    p.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0)
    p.add_argument("--experts", type=_whole(1, 64), help=f"of a block of {EXPERTS} (default: 8)")
    p.add_argument(
        "--top-k", type=_whole(1, 64), help=f"experts of a token of {EXPERTS} (default: 2)"
    )
    p.add_argument(
        "--balance",
        type=_finite(0, 1000),
        help="factor of the loss that keeps experts in even use (default: 0.01)",
    )
    p.add_argument("--resume", help="a checkpoint to go on from: its path or name")
    p.add_argument("--threads", type=_whole(1, 4096), help="default: torch's own choice")

    from fastdiff import cli_finetune

    cli_finetune.add(commands)

    commands.add_parser(
        "bench", help="time the ops against torch (--help lists its options)", add_help=False
    )

    p = commands.add_parser("info", help="which row of which op runs here, and why not the others")
    p.add_argument("--json", action="store_true", help="as JSON on stdout")
    p.add_argument("--markdown", action="store_true", help="the README's table of ops and rows")
    p.add_argument(
        "--kernels",
        action="store_true",
        help="the README's table of kernels, compiled for it: minutes; needs triton and nvcc",
    )
    return top


def bench(argv: Sequence[str]) -> int:
    """Run ``bench/run.py``: beside the package in a source tree, inside it where installed."""
    package = Path(__file__).resolve().parent
    places = (package / "bench" / "run.py", package.parent / "bench" / "run.py")
    path = next((p for p in places if p.exists()), None)
    if path is None:
        raise UsageError(f"no bench/run.py in {package} nor beside it; install the package again")
    spec = importlib.util.spec_from_file_location("fastdiff_bench_run", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return int(module.main(list(argv)))


def train(args: argparse.Namespace) -> int:
    """Run :func:`fastdiff.train.train`."""
    import torch

    from fastdiff.train import Recipe
    from fastdiff.train import train as run_training

    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.name or (SCENES if args.data == "scenes" else None)
    wanted = {"--experts": args.experts, "--top-k": args.top_k, "--balance": args.balance}
    given = [option for option, value in wanted.items() if value is not None]
    if given and name is None:
        name = EXPERTS
    if given and name != EXPERTS:
        raise UsageError(f"{given[0]} is given, which {name} does not have; need {EXPERTS}")
    if name is None:
        raise UsageError(
            f"train: no name is given, need {', '.join((*MODELS, EXPERTS))} or {SCENES}"
        )
    if args.data is not None and (args.data == "scenes") != (name == SCENES):
        raise UsageError(f"--data is {args.data}, which {name} is not trained on")
    recipe = Recipe(
        minutes=args.minutes, batch=args.batch, lr=args.lr, seed=args.seed, resume=args.resume
    )
    if args.balance is not None:
        recipe.balance = args.balance
    sizes = {"experts": args.experts, "k": args.top_k}
    recipe.config = {key: value for key, value in sizes.items() if value is not None}
    try:
        run_training(name, args.out, recipe, command=" ".join(["fastdiff", *sys.argv[1:]]))
    except ImportError as error:  # the data's package is an optional dependency
        raise UsageError(str(error)) from error
    return 0


def info(args: argparse.Namespace) -> int:
    """Print :mod:`fastdiff.info`."""
    from fastdiff import info as page

    if args.kernels:
        from fastdiff import info_kernels

        try:
            print(info_kernels.markdown())
        except RuntimeError as error:  # a compiler is missing or fails
            raise UsageError(str(error)) from error
    elif args.markdown:
        print(page.markdown())
    elif args.json:
        print(json.dumps(page.collect(), indent=1))
    else:
        print(page.text(page.collect()))
    return 0


def run(argv: Sequence[str]) -> int:
    """Dispatch to the sub-command; raises on bad input."""
    keep_memory()
    if argv[:1] == ["bench"]:
        return bench(argv[1:])
    args = parser().parse_args(argv)
    if args.command == "info":
        return info(args)
    if args.command == "train":
        return train(args)
    if args.command == "finetune":
        from fastdiff import cli_finetune

        return cli_finetune.main(args)
    if args.command in ("edit", "invert", "inpaint"):
        from fastdiff import cli_methods

        return cli_methods.main(args)
    if args.command in ("tune", "report"):
        return _with_plots(args)
    from fastdiff import cli_sample

    return cli_sample.main(args)


def _with_plots(args: argparse.Namespace) -> int:
    """Run :mod:`fastdiff.cli_tune`."""
    import torch

    from fastdiff import cli_tune
    from fastdiff.samplers import SAMPLERS

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.sampler is not None and args.sampler not in SAMPLERS:
        raise UsageError(f"--sampler is {args.sampler!r}, need one of {', '.join(SAMPLERS)}")
    try:
        return cli_tune.tune(args) if args.command == "tune" else cli_tune.report(args)
    except ImportError as error:  # matplotlib is an optional dependency
        raise UsageError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; gives the exit code."""
    from fastdiff.dispatch import NoImpl

    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return run(argv)
    except (ValueError, OSError, NoImpl) as error:  # anything else is a bug: let it show where
        print(f"fastdiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdiff: interrupted", file=sys.stderr)
        return 130
