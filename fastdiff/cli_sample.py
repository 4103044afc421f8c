"""``fastdiff sample``: pictures of one or more models as PNG grids, compared with plain torch."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

import fastdiff
from fastdiff import adapters, data, models
from fastdiff.accelerate import acceleration_of
from fastdiff.cli import MODELS, UsageError
from fastdiff.samplers import SAMPLERS
from fastdiff.tune import describe, psnr

MARK = "fastdiff sample"  # the PNG's Software field: files that carry it may be overwritten
SIZE = 32  # of a checkpoint whose card does not tell
PAD, ZOOM = 2, 2  # pixels between pictures; whole-number enlargement


def check_out(path: Path) -> None:
    """``path`` can be written: its folder exists and no foreign file is there."""
    if not path.parent.is_dir():
        raise UsageError(f"--out is {str(path)!r}, need a folder that exists")
    if not path.exists():
        return
    try:
        with Image.open(path) as old:
            ours = old.info.get("Software") == MARK
    except (OSError, SyntaxError):
        ours = False
    if not ours:
        raise UsageError(
            f"--out is {str(path)!r}, which fastdiff sample did not write; need another"
        )


def save_grid(x: Tensor, columns: int, path: Path, facts: dict[str, Any]) -> None:
    """Pictures ``x [B,C,H,W]`` in [-1, 1], C 1 or 3, row by row into a PNG with ``facts`` in it."""
    b, c, h, w = x.shape
    rows = -(-b // columns)
    sheet = torch.full((c, rows * (h + PAD) + PAD, columns * (w + PAD) + PAD), 255.0)
    pixels = x.float().nan_to_num(0.0).clamp(-1, 1).add(1).mul(127.5).round()
    for i, picture in enumerate(pixels):
        top, left = PAD + i // columns * (h + PAD), PAD + i % columns * (w + PAD)
        sheet[:, top : top + h, left : left + w] = picture
    sheet = sheet.repeat_interleave(ZOOM, 1).repeat_interleave(ZOOM, 2).byte()
    image = Image.fromarray(sheet[0].numpy() if c == 1 else sheet.permute(1, 2, 0).numpy())
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", MARK)
    text.add_text("Settings", json.dumps(facts))
    image.save(path, pnginfo=text)


def _scenes(model: Any, size: int, args: argparse.Namespace) -> list[list[list[int]]]:
    """The layout of every picture: those asked for in turn, or random ones from the seed."""
    box, classes = model.box_size, model.num_classes
    if args.layout:
        for kind, top, left in (box for boxes in args.layout for box in boxes):
            if kind >= classes or max(top, left) > size - box:
                raise UsageError(
                    f"--layout has {kind}@{top},{left}, need a class below {classes} and a place "
                    f"up to {size - box} for its box of {box} pixels"
                )
        most = max(len(boxes) for boxes in args.layout)
        full = [boxes + [[classes, 0, 0]] * (most - len(boxes)) for boxes in args.layout]
        return [full[i % len(full)] for i in range(args.batch or len(full))]
    g = torch.Generator().manual_seed(args.seed % 2**63)
    layout = data.layouts(args.batch or 16, size, size, g)
    if args.classes:
        _labels(classes, args)  # they are all there
        some = torch.tensor(args.classes)
        picked = some[torch.randint(len(some), layout.shape[:2], generator=g)]
        layout[..., 0] = torch.where(layout[..., 0] < classes, picked, classes)
    found: list[list[list[int]]] = layout.tolist()
    return found


def _labels(count: int, args: argparse.Namespace) -> list[int]:
    """The label of every picture: the classes, repeated to the batch size."""
    classes = args.classes or list(range(count))
    bad = [label for label in classes if label >= count]
    if bad:
        raise UsageError(f"--classes has {bad[0]}, need labels 0 to {count - 1} for this model")
    batch = args.batch or 2 * len(classes)
    return [classes[i % len(classes)] for i in range(batch)]


class Job:
    """One model with its settings: what every arm of the comparison runs."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.program = getattr(args, "program", None)  # of sample alone
        self.model: Any
        self.model, card = models.load(name, dtype=getattr(torch, args.dtype))
        self.listening: list[str] = []  # adapters that cannot be merged
        for path in args.adapter or []:
            adapter = adapters.load(self.model, path)
            try:
                adapter.merge()
            except ValueError:
                self.listening.append(path)
        size = args.size or card.get("image_size", SIZE)
        scenes = getattr(self.model, "box_size", 0) > 0
        if args.layout and not scenes:
            raise UsageError(f"--layout is given, which {name} does not take; need --classes")
        self.labels: Any = (
            _scenes(self.model, size, args) if scenes else _labels(self.model.num_classes, args)
        )
        self.columns = 8 if scenes else len(args.classes or range(self.model.num_classes))
        self.sampler = args.sampler or card.get("sampler", "ddim")
        self.guidance = card.get("guidance", 1.0) if args.guidance is None else args.guidance
        # Pictures whose noise was predicted overshoot under guidance where x0 is not clipped.
        self.clip = card.get("clip", 0.0) if args.clip is None else args.clip
        self.shape = (len(self.labels), self.model.in_channels, size, size)
        if args.cache is not None:  # an error now, before anything is written
            with fastdiff.accelerated(self.model, cache=args.cache, exact=False):
                pass

    def draw(
        self,
        model: nn.Module,
        steps: int,
        progress: str = "",
        cache: Any = None,
        seed: int | None = None,
    ) -> Tensor:
        """Pictures ``[B,C,H,W]``; the same noise in every call with one ``seed``, None: --seed."""
        hidden = None if progress else True  # None: hidden where stderr is no terminal
        bar = tqdm(total=steps, desc=progress, disable=hidden, file=sys.stderr, leave=False)
        draw: Callable[..., Tensor] = fastdiff.sample if self.program is None else self.program
        with bar:
            return draw(
                model,
                self.shape,
                cache=cache,
                sampler=self.sampler,
                steps=steps,
                classes=torch.tensor(self.labels),
                guidance=self.guidance,
                guidance_rescale=self.args.guidance_rescale,
                seed=self.args.seed if seed is None else seed,
                clip=self.clip or None,
                callback=lambda *_: bar.update(),
            )


class Arm(NamedTuple):
    """One arm of the comparison: a network, the rows it may run, and its cache."""

    model: nn.Module
    rows: Callable[[], AbstractContextManager[None]]
    cache: Any = None


def compare(job: Job, report: dict[str, Any], fast: Tensor) -> None:
    """Time the same weights in plain torch: eager, and compiled where asked for."""
    args = job.args
    plain = models.plain(job.model)
    for path in job.listening:  # the others are in the weights, which both have
        adapters.load(plain, path)
    arms: dict[str, Arm] = {"fastdiff": Arm(job.model, nullcontext, args.cache)}
    if args.cache is not None:
        arms["without cache"] = Arm(job.model, nullcontext)
    arms["torch eager"] = Arm(plain, lambda: fastdiff.use("ref"))
    if args.compile:
        compiled: Any = torch.compile(plain)
        arms["torch.compile"] = Arm(compiled, lambda: fastdiff.use("ref"))
    pictures, times = {"fastdiff": fast}, {arm: [] for arm in arms}  # type: ignore[var-annotated]
    for name, arm in arms.items():  # warm up, and compile
        with arm.rows():
            job.draw(arm.model, min(2, args.steps), f"{job.name}: warming up {name}")
    for i in range(args.repeat):
        for name in list(arms) if i % 2 == 0 else reversed(list(arms)):
            arm = arms[name]
            with arm.rows():
                start = time.perf_counter()
                pictures[name] = job.draw(arm.model, args.steps, cache=arm.cache)
                times[name].append(time.perf_counter() - start)
    base = statistics.median(times["fastdiff"])
    report["compare"] = {
        name: {
            "seconds": statistics.median(seen),
            "ratio": statistics.median(seen) / base,
            "largest_difference": (pictures[name].float() - fast.float()).abs().max().item(),
        }
        for name, seen in times.items()
    }
    if args.cache is not None:
        found = psnr(fast, pictures["without cache"])
        report["compare"]["without cache"]["psnr"] = found.mean().item()
        report["compare"]["without cache"]["worst_psnr"] = found.min().item()


def run_cached(job: Job) -> tuple[Tensor, Counter[tuple[str, str]], dict[str, Any]]:
    """Pictures with the cache, the rows that ran, and what was computed."""
    with fastdiff.accelerated(job.model, cache=job.args.cache, exact=False) as model:
        x = job.draw(model, job.args.steps, job.name)
        acceleration = acceleration_of(model)
        assert acceleration is not None and acceleration.last is not None
        run = acceleration.last
    done = [computed for event in run.trace for computed in event.computed]
    facts = {
        "policy": describe(job.args.cache),
        "calls": len({(event.step, event.slot) for event in run.trace}),
        "parts": len(done),
        "parts_reused": len(done) - sum(done),
    }
    return x, run.rows, facts


def sample_one(job: Job, out: Path) -> dict[str, Any]:
    """Draw the pictures of one model, write them, and give the report."""
    name, args = job.name, job.args
    cached = None
    ran: Counter[tuple[str, str]]
    start = time.perf_counter()
    if args.cache is None:
        with fastdiff.record() as ran:
            x = job.draw(job.model, args.steps, name)
    else:
        x, ran, cached = run_cached(job)
    seconds = time.perf_counter() - start
    report: dict[str, Any] = {
        "model": name,
        "sampler": job.sampler,
        "steps": args.steps,
        "guidance": job.guidance,
        "guidance_rescale": args.guidance_rescale,
        "program": None if args.program is None else str(args.program),
        "clip": job.clip,
        "seed": args.seed,
        "dtype": args.dtype,
        "pictures": len(job.labels),
        "threads": torch.get_num_threads(),
        "cpu_level": fastdiff.cpu_level(),
        "finite": bool(torch.isfinite(x).all()),
        "seconds": seconds,
        "out": str(out),
        "adapters": args.adapter or [],
        "cache": cached,
        "rows": rows_of(ran),
    }
    if args.compare:
        compare(job, report, x)
    columns = min(len(job.labels), job.columns, 20)
    facts = {k: v for k, v in report.items() if k not in ("rows", "compare", "seconds", "out")}
    save_grid(x, columns, out, facts)
    return report


def rows_of(ran: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """``{"attention": {"native": 125}}``: how often which row of which op ran."""
    rows: dict[str, dict[str, int]] = {}
    for (op, row), count in sorted(ran.items()):
        rows.setdefault(op, {})[row] = count
    return rows


def show(report: dict[str, Any]) -> None:
    print(
        f"{report['model']}: {report['pictures']} pictures, {report['sampler']}, "
        f"{report['steps']} steps, guidance {report['guidance']:g}, {report['dtype']}, "
        f"{report['threads']} threads, {report['cpu_level']}: "
        f"{report['seconds']:.2f} s -> {report['out']}"
    )
    if not report["finite"]:
        print(f"  some pictures are not finite; {report['dtype']} may be too narrow for this model")
    cache = report["cache"]
    if cache is not None:
        print(
            f"  {cache['policy']}: {cache['calls']} calls, "
            f"{cache['parts_reused']} of {cache['parts']} samples' parts reused"
        )
    for arm, row in report.get("compare", {}).items():
        words = f"  {arm:<14} {row['seconds']:8.3f} s  {row['ratio']:5.2f} x"
        if arm != "fastdiff":
            words += (
                f"  largest difference {row['largest_difference']:.2g} (pictures are in [-1, 1])"
            )
        if "psnr" in row:
            words += f"; PSNR {row['psnr']:.1f} dB, worst {row['worst_psnr']:.1f}"
        print(words)
    if "compare" in report:
        rows = report["rows"].items()
        print("  rows that ran: " + ", ".join(f"{op} {'/'.join(seen)}" for op, seen in rows))


def main(args: argparse.Namespace) -> int:
    """Run ``fastdiff sample`` with its parsed arguments."""
    if args.compile and not args.compare:
        raise UsageError("--compile is one more arm of --compare; need --compare too")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.sampler is not None and args.sampler not in SAMPLERS:
        raise UsageError(f"--sampler is {args.sampler!r}, need one of {', '.join(SAMPLERS)}")
    if args.program is not None and args.sampler not in (None, "ddpm"):
        raise UsageError(
            f"--sampler is {args.sampler!r}, but --program needs noise in every step; need ddpm, "
            "or none for DDIM with eta 1"
        )
    if args.out.suffix.lower() != ".png":
        raise UsageError(f"--out is {str(args.out)!r}, need a name that ends in .png")
    names = args.model or list(MODELS)
    if args.adapter and len(names) > 1:
        raise UsageError(f"--adapter is given for {len(names)} models, need one --model")
    outs = [args.out]
    if len(names) > 1:
        outs = [args.out.with_stem(f"{args.out.stem}-{Path(name).stem}") for name in names]
    repeated = [str(out) for i, out in enumerate(outs) if out in outs[:i]]
    if repeated:
        raise UsageError(
            f"--model: two models would write {repeated[0]}; need different file names"
        )
    for out in outs:
        check_out(out)
    jobs = [Job(name, args) for name in names]
    reports = [sample_one(job, out) for job, out in zip(jobs, outs, strict=True)]
    if args.json:
        print(json.dumps(reports, indent=1))
    else:
        for report in reports:
            show(report)
    return 0
