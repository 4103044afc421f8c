"""Quality against time on the shipped digit networks: ours and every peer, all policies searched.

python bench/frontier.py unet-digits dit-digits --csv bench/results/frontier.csv

The plain run is the network as a diffusers class, eager, with ``--steps`` steps. Every way (a cache
of ours, of diffusers' hooks, of cache-dit, of the DeepCache package; int8, ours or torchao's where
that is installed; fewer steps, eager or compiled; and the better of these on fewer steps) is run
once for its PSNR against the plain run's
pictures. At each target the fastest ways of both sides that meet it are then timed again,
interleaved, next to the plain run. With ``--whole N`` the winners' pictures are also read by the
classifier and compared with real digits (Frechet distance), N pictures each. A way that a peer
cannot do is told, not left out.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff import cache, quality  # noqa: E402
from fastdiff.calibrate import magnitude_ratios, slower  # noqa: E402
from fastdiff.info import processor  # noqa: E402
from fastdiff.precision import Precision  # noqa: E402
from fastdiff.testing import load_file  # noqa: E402
from fastdiff.tune import describe, psnr  # noqa: E402

digits = load_file(HERE / "_digits.py")


class Way(NamedTuple):
    """One way to draw: ``draw(seed)`` gives pictures ``[B, 1, 32, 32]``."""

    who: str
    name: str
    draw: Callable[[int], Tensor]


class Seen(NamedTuple):
    """A way with what it gave: PSNR in dB (mean, worst), seconds of one run."""

    way: Way
    psnr: float
    worst: float
    seconds: float


# ---- the peers -----------------------------------------------------------------------------------


def _torchao(model: Any) -> Any:
    """``model`` with torchao's dynamic int8; None where that is not installed."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _hooked(
    d: Any, steps: int, apply: Callable[[Any], None], int8: bool = False
) -> Callable[[int], Tensor]:
    """Diffusers' hooks on a twin, which torchao may have changed before. Its pipelines for DiT open
    no cache context and clear nothing (the hooks fail there as shipped), so that is done here for
    them."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    model = _torchao(d.plain.twin()) if int8 else d.plain.twin()
    apply(model.net)

    def draw(seed: int) -> Tensor:
        HookRegistry.check_if_exists_or_initialize(model.net).reset_stateful_hooks(recurse=True)
        _set_cache_context(model.net, CacheContext("run"))
        try:
            return d.draw(model, steps, seed)
        finally:
            _set_cache_context(model.net, None)

    return draw


def _diffusers(steps: int, ratios: Any, short: bool) -> Iterator[tuple[str, Callable[[Any], None]]]:
    from diffusers import hooks

    for threshold in (0.1, 0.2) if short else (0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4):
        yield (
            f"FirstBlockCache({threshold})",
            lambda net, v=threshold: hooks.apply_first_block_cache(
                net, hooks.FirstBlockCacheConfig(threshold=v)
            ),
        )
    parts = [r"^transformer_blocks\.\d+\.attn1$", r"^transformer_blocks\.\d+\.ff$"]
    grid = ((2, 3, 4), (1,), (2,)) if short else ((2, 3, 4, 5, 6), (0, 1, 2), (2, 3))
    for interval, order, before in itertools.product(*grid):
        yield (
            f"TaylorSeer(interval={interval}, order={order}, from={before})",
            lambda net, i=interval, o=order, b=before: hooks.apply_taylorseer_cache(
                net,
                hooks.TaylorSeerCacheConfig(
                    cache_interval=i, max_order=o, disable_cache_before_step=b,
                    taylor_factors_dtype=torch.float32, cache_identifiers=parts,
                ),
            ),
        )  # fmt: skip
    for skip in () if short else (2, 3, 4):

        def broadcast(net: Any, n: int = skip) -> None:
            config = hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=n,
                spatial_attention_timestep_skip_range=(-1, 1001),
                spatial_attention_block_identifiers=("transformer_blocks",),
                current_timestep_callback=lambda: 500,
            )
            hooks.apply_pyramid_attention_broadcast(net, config)

        yield f"PAB({skip})", broadcast
    grid = ((0.12,), (2,)) if short else ((0.06, 0.12, 0.24), (2, 3, 5))
    for threshold, most in itertools.product(*grid):
        yield (
            f"MagCache({threshold}, {most})",
            lambda net, v=threshold, k=most: hooks.apply_mag_cache(
                net,
                hooks.MagCacheConfig(
                    threshold=v,
                    max_skip_steps=k,
                    num_inference_steps=steps,
                    mag_ratios=list(ratios),
                ),
            ),
        )


def _cache_dit(d: Any, steps: int, threshold: float, order: int) -> Callable[[int], Tensor]:
    import cache_dit
    from cache_dit.caching.cache_blocks.pattern_3_4_5 import CachedBlocks_Pattern_3_4_5 as Blocks

    model = d.plain.twin()
    # DiT asks its first block for an embedding, which the package's stand-in for the blocks lacks.
    Blocks.norm1 = property(lambda self: self.transformer_blocks[0].norm1)
    adapter = cache_dit.BlockAdapter(
        transformer=model.net,
        blocks=model.net.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        check_forward_pattern=False,
    )
    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold,
        max_warmup_steps=2, num_inference_steps=steps,
    )  # fmt: skip
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=taylor)

    def draw(seed: int) -> Tensor:
        cache_dit.refresh_context(model.net, num_inference_steps=steps)
        return d.draw(model, steps, seed)

    return draw


@contextmanager
def _package(d: Any, model: Any, steps: int, interval: int, branch: int) -> Iterator[None]:
    from DeepCache.extension.deepcache import DeepCacheSDHelper

    times = [torch.tensor(t) for t in d.times(steps).tolist()]
    pipe = SimpleNamespace(unet=model.net, scheduler=SimpleNamespace(timesteps=times))
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def peers(
    d: Any, name: str, steps: int, ratios: Any, short: bool, failed: list[str]
) -> Iterator[Way]:
    """Every way of every peer with ``steps`` steps; ``short``: the better ones alone."""
    yield Way("peer", f"eager, {steps} steps", lambda seed: d.draw(d.plain, steps, seed))
    yield Way("peer", f"torch.compile, {steps} steps", lambda seed: d.draw(d.compiled, steps, seed))
    if d.int8 is not None:
        label = f"torchao int8 compiled, {steps} steps"
        yield Way("peer", label, lambda seed: d.draw(d.int8, steps, seed))
    if name.startswith("unet"):
        grid = ((2, 3), (0, 3)) if short else ((2, 3, 4, 5, 7), (0, 3, 6))
        for interval, branch in itertools.product(*grid):

            def draw(seed: int, i: int = interval, b: int = branch) -> Tensor:
                with _package(d, d.plain, steps, i, b):
                    return d.draw(d.plain, steps, seed)

            yield Way("peer", f"DeepCache({interval}, {branch}), {steps} steps", draw)
        return
    for label, apply in _diffusers(steps, ratios, short):
        try:
            yield Way("peer", f"{label}, {steps} steps", _hooked(d, steps, apply))
        except Exception as error:  # noqa: BLE001
            failed.append(f"{label}: {type(error).__name__}: {str(error)[:150]}")
    for label, apply in _diffusers(steps, ratios, True) if d.int8 is not None else ():
        try:
            draw = _hooked(d, steps, apply, int8=True)
            yield Way("peer", f"torchao int8, {label}, {steps} steps", draw)
        except Exception as error:  # noqa: BLE001
            failed.append(f"torchao, {label}: {type(error).__name__}: {str(error)[:150]}")
    grid = ((0.12, 0.24), (1,)) if short else ((0.05, 0.08, 0.12, 0.16, 0.24, 0.4), (0, 1, 2))
    for threshold, order in itertools.product(*grid):
        label = f"cache-dit F1B0({threshold}, Taylor {order})"
        try:
            yield Way("peer", f"{label}, {steps} steps", _cache_dit(d, steps, threshold, order))
        except Exception as error:  # noqa: BLE001
            failed.append(f"{label}: {type(error).__name__}: {str(error)[:150]}")


# ---- ours ----------------------------------------------------------------------------------------


def policies(name: str, ratios: Any, short: bool) -> Iterator[Any]:
    """Caches of ours; None computes everything."""
    yield None
    if name.startswith("unet"):
        grid = ((2, 3), (0, 1), (1,)) if short else ((2, 3, 4, 5, 6), (0, 1, 2), (0, 1, 2))
        for interval, branch, order in itertools.product(*grid):
            yield cache.DeepCache(interval, branch, order=order)
            if order == 2:
                yield cache.DeepCache(interval, branch, order=order, method="adams")
    else:
        grid = ((2, 3, 4), (1, 2), (2,)) if short else ((2, 3, 4, 5, 6), (1, 2, 3), (2, 3, 4))
        for interval, order, warmup in itertools.product(*grid):
            yield cache.Forecast(interval, order, warmup)
            if order == 2:
                yield cache.Forecast(interval, order, warmup, method="adams")
    deep = cache.DeepCache if name.startswith("unet") else cache.Forecast
    grid = ((2, 3), (1,), (2,)) if short else ((2, 3, 4, 5), (1, 2), (2, 3))
    for interval, order, turns in itertools.product(*grid):
        yield [deep(interval, order=order), cache.GuidanceReuse(turns)]
    grid = ((0.2,), (1,), (2,)) if short else ((0.05, 0.1, 0.2, 0.4), (0, 1), (2, 3))
    for threshold, order, most in itertools.product(*grid):
        yield cache.FirstBlock(threshold, order=order, warmup=3, most=most)
        yield cache.AccumulatedDistance(threshold, order=order, warmup=3, most=most)
        yield cache.MagnitudeRatio(ratios, threshold, most, order=order)


def ours(d: Any, name: str, steps: int, ratios: Any, short: bool) -> Iterator[Way]:
    """Every way of ours with ``steps`` steps; ``short``: the better ones alone."""
    for policy, form in itertools.product(policies(name, ratios, short), d.formats):
        model, words = d.model, "no cache" if policy is None else describe(policy)
        if isinstance(policy, cache.MagnitudeRatio):
            words = f"MagnitudeRatio({policy.threshold}, {policy.most}, order={policy.order})"
        if policy is not None or form is not None:
            model = fastdiff.accelerate(copy.deepcopy(d.model), cache=policy, precision=form)
        label = words if form is None else f"{words}, {d.formats[form]}"
        yield Way("fastdiff", f"{label}, {steps} steps", partial(d.draw, model, steps))


def formats(d: Any, name: str) -> dict[Precision | None, str]:
    """Policies of precision by their names; None: floats. Of a U-Net also the convolutions for
    which int8 is faster on this machine."""
    found: dict[Precision | None, str] = {None: "", Precision(): "int8"}
    if not name.startswith("unet"):
        return found | {Precision(attention="int8"): "int8 and int8 scores"}
    every = Precision(convolutions="all")
    slow = slower(d.model, partial(d.draw, d.model, 2, 7), every)
    count = len(slow)
    return found | {replace(every, layers=slow): f"int8 and convolutions but {count} layers"}


# ---- measuring -----------------------------------------------------------------------------------


def look(ways: list[Way], want: Tensor, failed: list[str]) -> list[Seen]:
    """Each way once: enough to rank them."""
    seen = []
    for way in ways:
        try:
            start = time.perf_counter()
            got = way.draw(0)
            seconds = time.perf_counter() - start
        except Exception as error:  # noqa: BLE001
            failed.append(f"{way.name}: {type(error).__name__}: {str(error)[:150]}")
            continue
        each = psnr(got, want)
        seen.append(Seen(way, each.mean().item(), each.min().item(), seconds))
        print(f"  {seen[-1].psnr:6.1f} dB {seconds:7.3f} s  {way.who} {way.name}", flush=True)
    return seen


def timed(arms: dict[str, Callable[[int], Tensor]], rounds: int) -> dict[str, float]:
    """Median seconds of each arm; the order alternates."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds):
        for name in list(arms) if i % 2 == 0 else list(reversed(arms)):
            start = time.perf_counter()
            arms[name](0)
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def whole(d: Any, way: Way, count: int) -> dict[str, Any]:
    """Classifier agreement and Frechet distance of ``count`` pictures."""
    runs = -(-count // len(d.labels))
    x = torch.cat([way.draw(1000 + i) for i in range(runs)]).clamp(-1, 1)
    found = quality.score(x, d.labels.repeat(runs))
    return {k: found[k] for k in ("samples", "agreement", "frechet_to_held_out")}


def main() -> None:
    """Search, time, print; write a CSV row for each target and side."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    fastdiff.keep_memory()
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("names", nargs="*", default=["unet-digits", "dit-digits"])
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--fewer", type=int, nargs="*", default=[20, 18, 15, 12, 10, 8])
    p.add_argument("--targets", type=float, nargs="*", default=[40, 35, 30])
    p.add_argument("--batch", type=int, default=10)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--top", type=int, default=4, help="ways of each side timed again at a target")
    p.add_argument("--whole", type=int, default=0, help="pictures for the classifier and Frechet")
    p.add_argument("--csv", type=Path)
    args = p.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.names:
        d = digits.Digits(name, args.batch)
        d.compiled = torch.compile(d.plain)
        d.int8 = _torchao(d.plain.twin())
        d.int8 = d.int8 and torch.compile(d.int8)
        d.formats = formats(d, name)
        failed: list[str] = []
        want = d.draw(d.plain, args.steps)
        d.draw(d.compiled, 2)  # compiles
        ways: list[Way] = []
        for steps in (args.steps, *args.fewer):
            ratios = magnitude_ratios(d.model, partial(d.draw, d.model, steps, 7))
            short = steps < args.steps
            ways += peers(d, name, steps, ratios, short, failed)
            ways += ours(d, name, steps, ratios, short)
        print(f"{name}: {len(ways)} ways")
        seen = look(ways, want, failed)
        for target in args.targets:
            best = []
            for who in ("fastdiff", "peer"):
                good = [s for s in seen if s.way.who == who and s.psnr >= target]
                best += sorted(good, key=lambda s: s.seconds)[: args.top]
            arms = {f"{s.way.who} {s.way.name}": s.way.draw for s in best}
            plain = Way("plain", f"eager, {args.steps} steps", ways[0].draw)
            times = timed({"plain": plain.draw, **arms}, args.rounds)
            fastest = {}
            for s in best:
                taken = times[f"{s.way.who} {s.way.name}"]
                row = {
                    "model": name, "target_db": target, "who": s.way.who, "way": s.way.name,
                    "psnr": round(s.psnr, 2), "worst_psnr": round(s.worst, 2),
                    "seconds": round(taken, 4), "speedup": round(times["plain"] / taken, 3),
                }  # fmt: skip
                rows.append(row)
                before = fastest.get(s.way.who)
                if before is None or taken < before[1]["seconds"]:
                    fastest[s.way.who] = s.way, row
            for way, row in fastest.values() if args.whole else ():
                row |= whole(d, way, args.whole)
            for row in rows[-len(best) :]:
                print(json.dumps(row), flush=True)
            sides = {w: min(times[f"{s.way.who} {s.way.name}"] for s in best if s.way.who == w)
                     for w in {s.way.who for s in best}}  # fmt: skip
            if len(sides) == 2:
                ratio = sides["peer"] / sides["fastdiff"]
                print(f"{name} at {target:g} dB: fastest of ours {ratio:.2f} x fastest of peers")
        if args.whole:
            print(f"{name} plain: {json.dumps(whole(d, plain, args.whole))}", flush=True)
        for line in sorted(set(failed)):
            print(f"  failed: {line}")
    if args.csv and rows:
        about = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "processor": processor(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "batch": args.batch,
            "steps": args.steps,
        }  # fmt: skip
        with args.csv.open("w", newline="") as file:
            out = csv.DictWriter(file, [*about, *dict.fromkeys(k for r in rows for k in r)])
            out.writeheader()
            out.writerows({**about, **row} for row in rows)


if __name__ == "__main__":
    main()
