"""Steps on some of the tokens, against full steps and against what they cost at least.

python bench/sparse.py steps            a step at ratios 1/2, 1/4, 1/8 of our DiT and of SD 3's kind
python bench/sparse.py linear           a step of 256 to 16,384 active tokens; --plot draws it
python bench/sparse.py whole            28 steps of dit-scenes: policies, caches, fewer steps

A step's bound is ratio x the dense step without its attention, plus attention of the active rows
over all keys; attention is timed on its own, at the same shapes, in the same run, with keys and
values of its own for every block, as they are kept. "over_rows" is the step over the same bound
with the share of all rows that are computed in the place of the ratio: text is not left out. The
overhead is what a sparse step does beside: choice, taking tokens out, refreshing keys and values,
putting outputs back. Arms take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff import cache, data, models, ops, quality  # noqa: E402
from fastdiff.engine.request import Request  # noqa: E402
from fastdiff.info import processor  # noqa: E402
from fastdiff.testing import draw_weights  # noqa: E402
from fastdiff.tokens import RegionAdaptive  # noqa: E402
from fastdiff.tune import describe, psnr  # noqa: E402

Arms = dict[str, Callable[[], Any]]


def timed(arms: Arms, rounds: int) -> dict[str, float]:
    """Median milliseconds of each arm; the order alternates, the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name in list(arms) if i % 2 == 0 else list(reversed(arms)):
            start = time.perf_counter()
            arms[name]()
            if i:
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


class Network:
    """A network with its call, and what a block's attention looks like."""

    def __init__(self, kind: str, tokens: int, batch: int):
        side = 2 * int(tokens**0.5)
        self.tokens, self.batch, self.kind = tokens, batch, kind
        torch.manual_seed(0)
        self.model: Any
        if kind == "dit":  # DiT-S/2
            self.model = models.DiT.preset("DiT-S/2", input_size=side, in_channels=4)
            self.heads, self.dim, self.text = 6, 64, 0
            self.blocks, self.width = len(self.model.blocks), 384
            t, y = torch.full((batch,), 500.0), torch.arange(batch)
            self.args: tuple[Any, ...] = (torch.randn(batch, 4, side, side), t, y)
            self.kwargs: dict[str, Any] = {}
        else:  # SD 3 with six joint blocks of width 768
            import diffusers

            self.model = diffusers.SD3Transformer2DModel(
                sample_size=side, patch_size=2, in_channels=16, num_layers=6,
                attention_head_dim=64, num_attention_heads=12, joint_attention_dim=512,
                caption_projection_dim=768, pooled_projection_dim=256, out_channels=16,
                pos_embed_max_size=side // 2, qk_norm="rms_norm",
            )  # fmt: skip
            self.heads, self.dim, self.text, self.blocks, self.width = 12, 64, 77, 6, 768
            self.args = (torch.randn(batch, 16, side, side),)
            self.kwargs = dict(
                encoder_hidden_states=torch.randn(batch, 77, 512),
                pooled_projections=torch.randn(batch, 256),
                timestep=torch.full((batch,), 500.0), return_dict=False,
            )  # fmt: skip
        draw_weights(self.model).eval()

    def attention(self, rows: int) -> Callable[[], Any]:
        """What the attention of all blocks costs for so many rows of the picture."""
        shape = self.batch, self.heads, self.tokens + self.text, self.dim
        blocks = 1 if rows == self.tokens else self.blocks  # a dense step has just computed them
        kept = [(torch.randn(shape), torch.randn(shape)) for _ in range(blocks)]
        q = torch.randn(self.batch, self.heads, rows + self.text, self.dim)

        def run() -> None:
            for i in range(self.blocks):
                ops.attention(q, *kept[i % blocks])

        return run

    def beside(self, rows: int) -> Callable[[], Any]:
        """What a sparse step does beside computing."""
        b, n, c = self.batch, self.tokens, self.width
        noise = torch.randn(b, n, 4, 4)
        x = torch.randn(b, n, c)
        keys = [(torch.randn(b, n, c), torch.randn(b, n, c)) for _ in range(self.blocks)]
        few, out, kept = torch.randn(b, rows, c), torch.randn(b, rows, 16), torch.randn(b, n, 16)

        def run() -> None:
            index, _ = ops.select_tokens(noise.std(dim=3).mean(2), rows, high=0.3)
            ops.gather_tokens(x, index)
            ops.gather_tokens(x, index)
            for k, v in keys:
                ops.update_tokens_(k, index, few)
                ops.update_tokens_(v, index, few)
            ops.update_tokens_(kept, index, out).clone()

        return run


class Sparse:
    """A step of a network in a run that goes on: its third, and all after it, are sparse."""

    def __init__(self, net: Network, ratio: float):
        self.net = net
        fastdiff.accelerate(net.model, cache=RegionAdaptive(ratio, start=2, resets=()))
        self.run = Request(10**6, 1)
        for _ in range(3):
            self()

    @torch.no_grad()
    def __call__(self) -> None:
        with self.run.active():
            self.net.model(*self.net.args, **self.net.kwargs)


@torch.no_grad()
def steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A step against the dense one and its bound."""
    rows = []
    for kind in ("dit", "sd3"):
        for tokens in args.tokens:
            ratios = (0.5, 0.25, 0.125)
            nets = {ratio: Network(kind, tokens, args.batch) for ratio in (1.0, *ratios)}
            fastdiff.accelerate(nets[1.0].model)
            net = nets[1.0]
            arms: Arms = {
                "dense": lambda net=net: net.model(*net.args, **net.kwargs),
                "attention": net.attention(tokens),
            }
            for ratio in ratios:
                count = int(ratio * tokens)
                arms[f"step {ratio}"] = Sparse(nets[ratio], ratio)
                arms[f"attention {ratio}"] = net.attention(count)
                arms[f"beside {ratio}"] = net.beside(count)
            found = timed(arms, args.rounds)
            linear = found["dense"] - found["attention"]
            for ratio in ratios:
                bound = ratio * linear + found[f"attention {ratio}"]
                share = (int(ratio * tokens) + net.text) / (tokens + net.text)
                rows_bound = share * linear + found[f"attention {ratio}"]
                step = found[f"step {ratio}"]
                row = {
                    "network": kind, "tokens": tokens, "batch": args.batch, "ratio": ratio,
                    "dense_ms": found["dense"], "dense_attention_ms": found["attention"],
                    "step_ms": step, "attention_ms": found[f"attention {ratio}"],
                    "bound_ms": bound, "over_bound": step / bound,
                    "over_rows": step / rows_bound,
                    "speedup": found["dense"] / step,
                    "overhead_share": found[f"beside {ratio}"] / found["dense"],
                }  # fmt: skip
                rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                print(json.dumps(rows[-1]), flush=True)
    return rows


@torch.no_grad()
def linear(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A step of 256 to 16,384 active tokens of 16,384."""
    rows, total = [], 16384
    for count in (256, 512, 1024, 2048, 4096, 8192, 16384):
        net = Network("dit", total, 1)
        if count == total:
            fastdiff.accelerate(net.model)
            arm: Callable[[], Any] = partial(net.model, *net.args)
        else:
            arm = Sparse(net, count / total)
        found = timed({"step": arm, "attention": net.attention(count)}, max(2, args.rounds // 3))
        rows.append(
            {"active": count, "tokens": total, "step_ms": round(found["step"], 2),
             "attention_ms": round(found["attention"], 2),
             "per_token_us": round(1e3 * found["step"] / count, 3)}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    if args.plot:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(5, 4))
        for name in ("step_ms", "attention_ms"):
            axes.plot([r["active"] for r in rows], [r[name] for r in rows], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel=f"active tokens of {total}", ylabel="ms")
        axes.legend()
        figure.savefig(args.plot, dpi=100, bbox_inches="tight")
    return rows


class Scenes:
    """dit-scenes with its card's settings on seeded layouts."""

    def __init__(self, batch: int):
        self.model, card = models.load("dit-scenes")
        g = torch.Generator().manual_seed(11)
        self.layout = data.layouts(batch, generator=g)
        self.how = dict(sampler=card["sampler"], guidance=card["guidance"])

    def draw(self, steps: int, policy: Any = None, seed: int = 0, **how: Any) -> Tensor:
        """Canvases ``[B, 1, 64, 64]``."""
        shape = (len(self.layout), 1, data.CANVAS, data.CANVAS)
        return fastdiff.sample(
            self.model, shape, cache=policy, steps=steps, seed=seed, classes=self.layout,
            **self.how | how,
        )  # fmt: skip


def paper(ratio: float, **more: Any) -> RegionAdaptive:
    """The paper's settings for SD 3 and 28 steps."""
    return RegionAdaptive(ratio, 4, (12, 20), metric="std", high=0.3, **more)


def ways(full: int) -> list[tuple[str, int, Any]]:
    """Kind, steps and policy of every way to be faster."""
    found: list[tuple[str, int, Any]] = [("dense", full, None)]
    found += [("fewer steps", n, None) for n in (20, 17, 14, 12, 10, 8, 6)]
    found += [("tokens, paper's", full, paper(r)) for r in (0.5, 0.22, 0.125)]
    found.append(("tokens, published rule", full, paper(0.22, compatible=True)))
    found += [("tokens", full, RegionAdaptive(r)) for r in (0.5, 0.35, 0.25, 0.15, 0.08)]
    found.append(("tokens", full, RegionAdaptive(0.15, resets=(8, 14, 20, 25))))
    found += [("cache", full, cache.Forecast(n)) for n in (2, 3, 4, 5, 6)]
    found += [("cache", full, cache.Forecast(n, order=2)) for n in (3, 4, 5)]
    found.append(("cache", full, cache.Forecast(3, order=0)))
    found += [("cache", full, cache.FirstBlock(v)) for v in (0.1, 0.2)]
    found.append(("cache", full, cache.GuidanceReuse(2)))
    for ratio, inner in itertools.product((0.5, 0.35, 0.25), (2, 3, 4)):
        found.append(("both", full, [RegionAdaptive(ratio), cache.Forecast(inner)]))
    found.append(("both", full, [RegionAdaptive(0.25), cache.FirstBlock(0.1)]))
    found.append(("both", full, [RegionAdaptive(0.25), cache.GuidanceReuse(2)]))
    for n, ratio in itertools.product((20, 14, 12, 10, 8), (0.5, 0.25)):
        found.append(("tokens and fewer steps", n, RegionAdaptive(ratio)))
    for n, inner in itertools.product((20, 14, 12, 10, 8), (2, 3)):
        found.append(("cache and fewer steps", n, cache.Forecast(inner)))
    return found


def whole(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole runs: PSNR to the dense run, speed, and what is read."""
    scenes = Scenes(args.batch)
    want, rows = scenes.draw(args.steps), []
    every = ways(args.steps)
    for kind, count, policy in every:
        start = time.perf_counter()
        got = scenes.draw(count, policy)
        seconds, each = time.perf_counter() - start, psnr(got, want)
        row = {
            "kind": kind, "steps": count, "policy": "" if policy is None else describe(policy),
            "psnr": round(each.mean().item(), 2), "worst_psnr": round(each.min().item(), 2),
            "seconds": round(seconds, 3),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.rounds > 1:  # arms take turns
        arms: Arms = {str(i): partial(scenes.draw, n, p) for i, (_, n, p) in enumerate(every)}
        found = timed(arms, args.rounds)
        for i, row in enumerate(rows):
            row["seconds"] = round(found[str(i)] / 1e3, 4)
            row["speedup"] = round(found["0"] / found[str(i)], 3)
    if args.score:
        for row, (_, count, policy) in zip(rows, every, strict=True):
            parts = [scenes.draw(count, policy, seed=100 + s) for s in range(args.score)]
            layout = scenes.layout.repeat(args.score, 1, 1)
            row |= {
                k: v
                for k, v in quality.score_scenes(torch.cat(parts), layout).items()
                if k in ("agreement", "frechet_to_held_out")
            }
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure, print, write a CSV."""
    fastdiff.keep_memory()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("what", choices=("steps", "linear", "whole"))
    p.add_argument("--tokens", type=int, nargs="*", default=[1024, 4096])
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--steps", type=int, default=28)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--score", type=int, default=0, help="batches of canvases that are read")
    p.add_argument("--plot", type=Path)
    p.add_argument("--csv", type=Path)
    args = p.parse_args()
    rows = {"steps": steps, "linear": linear, "whole": whole}[args.what](args)
    if args.csv:
        about = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "processor": processor(),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        }  # fmt: skip
        with args.csv.open("w", newline="") as file:
            out = csv.DictWriter(file, [*about, *dict.fromkeys(k for r in rows for k in r)])
            out.writeheader()
            out.writerows({**about, **row} for row in rows)


if __name__ == "__main__":
    main()
