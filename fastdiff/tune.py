"""Cache policies by the quality they keep: the frontier of speed and quality, and the fastest that
meets a target on inputs it was not chosen on.

"Fewer steps" is a row of every frontier: a cache that does not beat it is not worth its memory.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import cache as policies
from fastdiff.precision import Precision
from fastdiff.report import new_figure, save_figure

Run = Callable[..., Tensor]  # run(input, cache=policy or None, steps=None or n) -> [B, ...]


def psnr(got: Tensor, want: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every sample, ``[B]``; the peak is the range of ``want``.

    Infinite where the two are equal.
    """
    got, want = got.double().flatten(1), want.double().flatten(1)
    peak = want.amax(1) - want.amin(1)
    return 10 * torch.log10(peak.square() / (got - want).square().mean(1))


def relative_l2(got: Tensor, want: Tensor) -> Tensor:
    """``|got - want| / |want|`` of every sample, ``[B]``."""
    got, want = got.double().flatten(1), want.double().flatten(1)
    return (got - want).norm(dim=1) / want.norm(dim=1)


@dataclass(frozen=True)
class Quality:
    """What an accelerated run must keep of the plain run, on average over samples.

    Args:
        psnr: at least so many dB.
        relative_l2: at most this.
        metric: ``metric(got, want)`` gives one value a sample ``[B]``, larger is better; at least
            ``at_least``.

    Raises:
        ValueError: not exactly one of the three is given.
    """

    psnr: float | None = None
    relative_l2: float | None = None
    metric: Callable[[Tensor, Tensor], Tensor] | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.psnr, self.relative_l2, self.metric)) != 1:
            raise ValueError("Quality: need exactly one of psnr, relative_l2 and metric")
        if (self.metric is None) != (self.at_least is None):
            raise ValueError("Quality: metric and at_least go together, and one of them is None")
        for name in ("psnr", "relative_l2", "at_least"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"Quality: {name} is {value!r}, need a finite number")

    def margin(self, got: Tensor, want: Tensor) -> float:
        """How far the mean over samples is on the good side of the target; negative: missed.
        NaN counts as missed by everything."""
        if self.metric is not None:
            value = self.metric(got, want).double().mean().item() - float(self.at_least or 0)
        elif self.psnr is not None:
            value = psnr(got, want).mean().item() - self.psnr
        else:
            value = float(self.relative_l2 or 0) - relative_l2(got, want).mean().item()
        return -math.inf if math.isnan(value) else value

    def hopeless(self, margin: float) -> bool:
        """One input missed the target by so much that others are not worth the time: by more than
        6 dB, or by a relative L2 more than twice that of the target. Of another metric the scale is
        not known: then NaN alone."""
        if self.psnr is not None:
            return margin < -6
        if self.relative_l2 is not None:
            return margin < -self.relative_l2
        return margin == -math.inf

    def __str__(self) -> str:
        if self.metric is not None:
            return f"{getattr(self.metric, '__name__', 'metric')} >= {self.at_least:g}"
        if self.psnr is not None:
            return f"PSNR >= {self.psnr:g} dB"
        return f"relative L2 <= {self.relative_l2:g}"


Policy = dict[str, Any] | list[dict[str, Any]]  # as JSON: one, or a list that goes together


@dataclass
class Row:
    """One candidate: a policy with all steps, or plain with fewer.

    Where it was ``stopped`` after the first input, which it missed by far, the figures are of that
    input and ``held_out`` is -infinity.
    """

    name: str
    policy: Policy | None
    steps: int | None
    speedup: float
    psnr: float  # dB, mean over the held-out samples
    relative_l2: float
    margin: float  # against the target on the inputs it was chosen on
    held_out: float  # and on the others
    worst_psnr: float = math.nan  # dB, of the worst held-out sample
    stopped: bool = False
    refused: str = ""  # why it did not run at all: more than cache_bytes, say


@dataclass
class Report:
    """The frontier, as JSON and as text; ``chosen`` is None where nothing met the target."""

    target: str
    rows: list[Row]
    chosen: str | None
    about: dict[str, Any] = field(default_factory=dict)

    def row(self) -> Row | None:
        """The chosen row."""
        return next((r for r in self.rows if r.name == self.chosen), None)

    def policy(self) -> Any:
        """The chosen policy, or list of them; None where nothing or "fewer steps" was chosen."""
        row = self.row()
        return None if row is None or row.policy is None else policy_from(row.policy)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no report.
        """
        try:
            data = json.loads(Path(path).read_text())
            report = cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})
            report.policy()
            return report
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Report.load: {path} is no report of fastdiff tune: {error}"
            ) from None

    def verdict(self) -> str:
        """A sentence: what was chosen and what that means."""
        row = self.row()
        if row is None:
            return "nothing meets the target and is faster than the plain run: no cache is applied"
        if row.policy is None:
            return (
                f"{row.name} beat every cache that meets the target: no cache is applied, run "
                f"{row.steps} steps instead of {self.about.get('steps', 'more')}"
            )
        return f"chosen: {row.name}"

    def __str__(self) -> str:
        lines = [f"target: {self.target}; {self.verdict()}", ""]
        lines.append("| way | speed-up | PSNR, dB | worst | relative L2 | meets it, held out |")
        lines.append("|---|---|---|---|---|---|")
        for r in sorted(self.rows, key=lambda r: r.speedup):
            met = "yes" if r.held_out >= 0 else "no"
            met = "stopped: missed by far" if r.stopped else met
            met = f"refused: {r.refused}" if r.refused else met
            lines.append(
                f"| {r.name} | {r.speedup:.2f} x | {r.psnr:.1f} | {r.worst_psnr:.1f} | "
                f"{r.relative_l2:.4f} | {met} |"
            )
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Quality against speed-up, as a picture (PNG, SVG or PDF by the name).

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = new_figure("Report.plot", (7, 4.5))
        axes = figure.subplots()
        fewer = sorted((r for r in self.rows if r.steps is not None), key=lambda r: r.speedup)
        caches = [r for r in self.rows if r.steps is None and not r.refused]
        axes.plot([r.speedup for r in fewer], [r.psnr for r in fewer], "o--", label="fewer steps")
        axes.plot([r.speedup for r in caches], [r.psnr for r in caches], "s", label="caches")
        for r in caches:
            axes.annotate(r.name, (r.speedup, r.psnr), fontsize=6)
        axes.set(xlabel="speed-up over the plain run", ylabel="PSNR against it, dB")
        axes.legend()
        save_figure(figure, path)


def policy_dict(policy: Any) -> Policy:
    """A policy of ``fastdiff.cache``, or a list of them, as JSON-ready values."""
    if isinstance(policy, list | tuple):
        return [{"name": type(one).__name__, **asdict(one)} for one in policy]
    return {"name": type(policy).__name__, **asdict(policy)}


def policy_from(values: Policy) -> Any:
    """What :func:`policy_dict` wrote.

    Raises:
        ValueError: there is no such policy.
    """
    if isinstance(values, list):
        return [policy_from(one) for one in values]
    rest = dict(values)
    name = rest.pop("name", None)
    known = {one: getattr(policies, one) for one in policies.__all__} | {"Precision": Precision}
    if name not in known:
        raise ValueError(f"policy is {name!r}, need one of {', '.join(known)}")
    return known[name](**rest)


def describe(policy: Any) -> str:
    """``DeepCache(interval=3)``: the class and what differs from its defaults; a list with +."""
    if isinstance(policy, list | tuple):
        return " + ".join(describe(one) for one in policy)
    plain = {f.name: f.default for f in policy.__dataclass_fields__.values()}
    values = [(k, v) for k, v in asdict(policy).items() if v != plain[k]]
    words = (f"{k}={v!r}" if len(repr(v)) <= 40 else f"{k}=<{len(v)} values>" for k, v in values)
    return f"{type(policy).__name__}({', '.join(words)})"


def _timed(run: Run, inputs: Sequence[Any], **how: Any) -> tuple[list[Tensor], float]:
    start = time.perf_counter()
    out = [run(one, **how) for one in inputs]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out, time.perf_counter() - start


def _same(one: Any, other: Any) -> bool:
    """Two inputs are equal, tensors in them too."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    equal = one == other
    return bool(equal.all() if hasattr(equal, "all") else equal)


def _check(inputs: Sequence[Any], fewer: Sequence[int], steps: int) -> int:
    """How many of the inputs are not held out."""
    if len(inputs) < 2:
        raise ValueError(f"tune: inputs has {len(inputs)}, need at least 2: one half is held out")
    half = len(inputs) // 2
    for i, one in enumerate(inputs[:half]):
        for k, other in enumerate(inputs[half:], half):
            if _same(one, other):
                raise ValueError(
                    f"tune: inputs {i} and {k} are equal, and {k} is held out; need other seeds or "
                    "conditions there"
                )
    wrong = [n for n in fewer if not 1 <= n < steps]
    if wrong:
        raise ValueError(f"tune: fewer has {wrong[0]}, need numbers of steps in [1, {steps})")
    return half


class _Trial(NamedTuple):
    """A row to be: what ``run`` is called with."""

    name: str
    policy: Policy | None
    steps: int | None
    how: dict[str, Any]


def _measure(
    run: Run,
    trial: _Trial,
    inputs: Sequence[Any],
    want: Sequence[Tensor],
    half: int,
    target: Quality,
    rounds: int,
    plain: dict[str, Any],
) -> Row:
    """The row of one candidate, stopped after the first input where that is missed by far."""
    try:
        first, fast = _timed(run, inputs[:1], **trial.how)
    except ValueError as error:  # plain runs went well: it is this candidate's own
        if trial.policy is None:
            raise
        nan, missed = math.nan, -math.inf
        return Row(trial.name, trial.policy, None, 0, nan, nan, missed, missed, refused=str(error))
    _fits(trial.name, first[0], want[0])
    margin = target.margin(first[0], want[0])
    one = psnr(first[0], want[0])
    if trial.steps is None and target.hopeless(margin):
        speedup = _timed(run, inputs[:1], **plain)[1] / fast
        distance = relative_l2(first[0], want[0]).mean().item()
        figures = speedup, one.mean().item(), distance, margin, -math.inf, one.min().item()
        return Row(trial.name, trial.policy, None, *figures, stopped=True)
    ratios = []
    for _ in range(rounds):
        out, fast = _timed(run, inputs, **trial.how)
        ratios.append(_timed(run, inputs, **plain)[1] / fast)
    chosen_on = torch.cat(out[:half]), torch.cat(list(want[:half]))
    held_out = torch.cat(out[half:]), torch.cat(list(want[half:]))
    each = psnr(*held_out)
    return Row(
        trial.name,
        trial.policy,
        trial.steps,
        median(ratios),
        each.mean().item(),
        relative_l2(*held_out).mean().item(),
        target.margin(*chosen_on),
        target.margin(*held_out),
        each.min().item(),
    )


def _fits(name: str, got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape:
        raise ValueError(
            f"tune: {name} gives {list(got.shape)} and the plain run {list(want.shape)}, need "
            "run() to give samples of one shape"
        )


def tune(
    run: Run,
    inputs: Sequence[Any],
    target: Quality,
    candidates: Sequence[Any],
    *,
    steps: int,
    fewer: Sequence[int] = (),
    rounds: int = 3,
    progress: Callable[[str], None] = lambda name: None,
) -> Report:
    """Measure every candidate and choose the fastest that meets ``target``.

    Candidates are judged on the first half of the inputs; the choice must also meet the target on
    the second half, or the next fastest is taken. Each candidate is timed next to a plain run. One
    that misses by far on the first input (:meth:`Quality.hopeless`) is not run on the others; fewer
    steps always are. A policy that raises ValueError in its first run has a row that says why.

    Args:
        run: ``run(input, cache=None, steps=n)`` gives samples ``[B, ...]``, the same for the same
            arguments.
        inputs: at least two; equal in shape, different in seed or condition.
        target: the quality to keep.
        candidates: policies of ``fastdiff.cache``, or lists of them that go together.
        steps: of the plain run.
        fewer: smaller numbers of steps, the rows to beat.
        rounds: timed runs of each candidate; the median counts.
        progress: told the name of every candidate before it runs.

    Raises:
        ValueError: an argument does not fit, an input of the one half is also in the other, or two
            plain runs differ.
    """
    half = _check(inputs, fewer, steps)
    plain: dict[str, Any] = dict(cache=None, steps=steps)
    progress(f"{steps} steps without a cache")
    want, _ = _timed(run, inputs, **plain)  # warm-up too
    for i, one in enumerate(want):
        if not one.isfinite().all():
            raise ValueError(f"tune: the plain run of input {i} is not finite")
    if not torch.equal(run(inputs[0], **plain), want[0]):
        raise ValueError("tune: two plain runs of one input differ, need run() to fix its seeds")
    trials = [
        _Trial(describe(c), policy_dict(c), None, dict(cache=c, steps=steps)) for c in candidates
    ]
    trials += [_Trial(f"{n} steps", None, n, dict(cache=None, steps=n)) for n in fewer]
    rows = []
    for trial in trials:
        progress(trial.name)
        rows.append(_measure(run, trial, inputs, want, half, target, rounds, plain))
    good = [r for r in rows if r.margin >= 0 and r.held_out >= 0]
    best = max(good, key=lambda r: r.speedup, default=None)
    if best is not None and best.speedup <= 1:
        best = None  # nothing that meets the target is faster than the plain run
    about = {
        "steps": steps,
        "inputs": len(inputs),
        "chosen on": half,
        "rounds": rounds,
        "torch": torch.__version__,
    }
    return Report(str(target), rows, best.name if best else None, about)
