"""``fastdiff tune``: the fastest cache that keeps a quality; ``fastdiff report``: what one did."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fastdiff
from fastdiff import report as pictures
from fastdiff.accelerate import acceleration_of
from fastdiff.cli import UsageError
from fastdiff.cli_sample import Job
from fastdiff.target import search
from fastdiff.tune import Quality, Report, describe

INPUTS = 4  # runs that the pictures are divided into: one half chooses, the other is held out


def parse_target(text: str) -> Quality:
    """``psnr=35`` (dB) or ``relative_l2=0.05``.

    Raises:
        ValueError: neither, or no number.
    """
    name, equals, value = text.partition("=")
    if not equals or name not in ("psnr", "relative_l2"):
        raise ValueError(f"--target is {text!r}, need psnr=DECIBELS or relative_l2=SHARE")
    try:
        level = float(value)
        return Quality(psnr=level) if name == "psnr" else Quality(relative_l2=level)
    except ValueError as error:
        raise ValueError(f"--target is {text!r}: {error}") from None


def _check_png(option: str, path: Path) -> None:
    """``path`` is a PNG in a folder that exists, new or one of our drawings."""
    pictures.new_figure(f"fastdiff {option}", (1, 1))  # matplotlib is there, before the work begins
    if path.suffix.lower() != ".png":
        raise UsageError(f"{option} is {str(path)!r}, need a name that ends in .png")
    if not path.parent.is_dir():
        raise UsageError(f"{option} is {str(path)!r}, need a folder that exists")
    if not path.exists():
        return
    try:
        with Image.open(path) as old:
            ours = old.info.get("Software") == pictures.MARK
    except (OSError, SyntaxError):
        ours = False
    if not ours:
        raise UsageError(f"{option} is {str(path)!r}, which fastdiff did not draw; need another")


def _check_json(path: Path) -> None:
    """``path`` is new, or a report of ours."""
    if not path.parent.is_dir():
        raise UsageError(f"--out is {str(path)!r}, need a folder that exists")
    if path.exists():
        try:
            Report.load(path)
        except ValueError:
            raise UsageError(
                f"--out is {str(path)!r}, which fastdiff tune did not write; need another"
            ) from None


def tune(args: argparse.Namespace) -> int:
    """Print the frontier of a bundled model or a checkpoint, and write it."""
    quality = parse_target(args.target)
    if args.out is not None:
        _check_json(args.out)
    if args.plot is not None:
        _check_png("--plot", args.plot)
    count = min(INPUTS, args.pictures)
    candidates, args.cache = args.cache, None
    args.batch = args.pictures // count
    job = Job(args.model, args)

    def run(seed: int, steps: int) -> Tensor:
        return job.draw(job.model, steps, "", seed=seed)

    def progress(name: str) -> None:
        print(f"fastdiff tune: {name}", file=sys.stderr)

    report = search(
        job.model,
        quality,
        [args.seed + i for i in range(count)],
        run=run,
        steps=args.steps,
        candidates=candidates,
        fewer=args.fewer,
        rounds=args.rounds,
        progress=progress,
        exact=False,
    )
    report.about |= {"model": args.model, "sampler": job.sampler, "guidance": job.guidance}
    report.about |= {"pictures": args.batch * count, "threads": torch.get_num_threads()}
    print(json.dumps(report.as_dict(), indent=1) if args.json else report)
    if args.out is not None:
        report.save(args.out)
    if args.plot is not None:
        report.plot(args.plot)
    return 0


def report(args: argparse.Namespace) -> int:
    """Run a model and draw what was computed: with a cache, or by which experts."""
    _check_png("--out", args.out)
    if args.experts == (args.cache is not None):
        raise UsageError("report: need one of --cache and --experts")
    job = Job(args.model, args)
    if args.experts:
        use = pictures.expert_use(job.model, lambda: job.draw(job.model, args.steps, job.name))
        pictures.expert_map(use, args.out)
        print(f"{args.model}, {job.sampler}, {args.steps} steps")
        for i, layer in enumerate(use.shares.mean(0).tolist()):
            print(f"layer {i}: " + " ".join(f"{share:.1%}" for share in layer))
        print(f"drawn: {args.out}")
        return 0
    with fastdiff.accelerated(job.model, cache=args.cache, exact=False) as model:
        job.draw(model, args.steps, job.name)
        acceleration: Any = acceleration_of(model)
        print(f"{args.model}, {job.sampler}, {args.steps} steps, {describe(args.cache)}")
        print(fastdiff.summary(model))
        pictures.heat_map(acceleration.last, args.out)
    print(f"drawn: {args.out}")
    return 0
