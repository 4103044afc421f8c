"""What a run did, as a picture: what it computed, reused and forecast, steps across, parts down; or
which experts it used, by layer and noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.engine.request import Event, Request
from fastdiff.nn import routes

MARK = "fastdiff"  # the Software field of the PNGs drawn here
# What a cell can show, in the legend's order; "mixed": some samples or calls of the step computed,
# and the share of them stands in the cell; "off": all computed, as no cache was allowed.
COLORS = {
    "full": "#1b4f72",
    "mixed": "#7fa3b8",
    "forecast": "#c77f1a",
    "reuse": "#d9e2e8",
    "off": "#8e5572",
}


def new_figure(who: str, size: tuple[float, float]) -> Any:
    """An empty figure of ``size`` in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{who}: needs matplotlib, which is not installed (pip install matplotlib)"
        ) from error
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: str | Path) -> None:
    """Into PNG, SVG or PDF by the name; a PNG says that we drew it."""
    mark = {"Software": MARK} if Path(path).suffix.lower() == ".png" else None
    figure.savefig(Path(path), metadata=mark)


class Cell(NamedTuple):
    """One part in one step: a key of :data:`COLORS`, and the share of its samples that computed."""

    kind: str
    share: float


def _kind(event: Event) -> str:
    if event.how.startswith("off"):
        return "off"
    if all(event.computed):
        return "full"
    if any(event.computed):
        return "mixed"
    return "forecast" if event.how.startswith("forecast") else "reuse"


def _share(event: Event) -> float:
    return sum(event.computed) / len(event.computed) if event.computed else 1.0


def _parts(trace: Sequence[Event]) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    for event in trace:
        found.setdefault(event.part, []).append(event)
    return found


def _by_step(events: Sequence[Event]) -> dict[int, Cell]:
    """Several calls a step that differ are "mixed"."""
    steps: dict[int, list[Event]] = {}
    for event in events:
        steps.setdefault(event.step, []).append(event)
    cells = {}
    for step, calls in steps.items():
        kinds = {_kind(event) for event in calls}
        share = sum(map(_share, calls)) / len(calls)
        cells[step] = Cell(kinds.pop() if len(kinds) == 1 else "mixed", share)
    return cells


def cells(trace: Sequence[Event]) -> dict[str, dict[int, Cell]]:
    """``{part: {step: cell}}``, with a row for every block or stage of the parts that have them;
    those that always run are "full". Two networks, or two policies, with blocks of one name are
    told apart by the part that they belong to."""
    rows: dict[str, dict[int, Cell]] = {}
    for part, events in _parts(trace).items():
        decided = _by_step(events)
        if not events[0].layout:
            rows[part] = decided
        for name, skipped in events[0].layout:
            row = {step: cell if skipped else Cell("full", 1.0) for step, cell in decided.items()}
            rows[f"{part}: {name}" if name in rows else name] = row
    return rows


def heat_map(run: Request, path: str | Path) -> None:
    """Draw the trace of a run into ``path`` (PNG, SVG or PDF by the name): a row for every block or
    stage where blocks are skipped, and for every kind of module where modules are.

    Raises:
        ValueError: the run has no trace: no cache was on.
        ImportError: matplotlib is not installed.
    """
    rows = cells(run.trace)
    if not rows:
        raise ValueError("heat_map: run has an empty trace, need a run with a cache")
    steps = 1 + max(step for row in rows.values() for step in row)
    figure = new_figure("heat_map", (2.2 + 0.25 * steps, 1.2 + 0.22 * len(rows)))
    from matplotlib.patches import Patch

    axes = figure.subplots()
    for y, row in enumerate(rows.values()):
        for step, (kind, share) in row.items():
            axes.broken_barh([(step - 0.5, 1)], (y - 0.45, 0.9), color=COLORS[kind], ec="white")
            if kind == "mixed":
                axes.text(step, y, f"{share:.0%}", ha="center", va="center", fontsize=5)
    axes.set(xlim=(-0.5, steps - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="step of the run")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    seen = {cell.kind for row in rows.values() for cell in row.values()}
    axes.legend(
        handles=[Patch(color=color, label=kind) for kind, color in COLORS.items() if kind in seen],
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(COLORS), frameon=False,
    )  # fmt: skip
    save_figure(figure, path)


class ExpertUse(NamedTuple):
    """Shares of the tokens' choices that fell on each expert.

    Attributes:
        times: ``[N]``, noise levels as the model was called with, descending.
        shares: ``[N, layers, E]``; those of a layer at a level add up to 1.
    """

    times: Tensor
    shares: Tensor


def expert_use(model: nn.Module, run: Callable[[], object]) -> ExpertUse:
    """What the experts of ``model`` did in ``run()``, whose calls of it are ``model(x, t, ...)``.

    Raises:
        ValueError: no layer of experts ran, or layers differ in their number of experts.
    """
    seen: list[float] = []

    def call(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(float(args[1].float().mean()))

    hook = model.register_forward_pre_hook(call)
    try:
        with routes() as found:
            run()
    finally:
        hook.remove()
    widths = {len(layer.counts) for layer in found}
    if not seen or len(widths) != 1 or len(found) % len(seen):
        raise ValueError(
            f"expert_use: model is {type(model).__name__}, in which {len(found)} layers of experts "
            f"ran in {len(seen)} calls; need one with the same layers, of as many experts, in each"
        )
    counts = torch.stack([layer.counts.cpu() for layer in found]).double()
    counts = counts.view(len(seen), -1, widths.pop())
    times, which = torch.tensor(seen).unique(return_inverse=True)
    total = torch.zeros(len(times), *counts.shape[1:], dtype=torch.float64)
    total.index_add_(0, which, counts)
    shares = total / total.sum(-1, keepdim=True)
    return ExpertUse(times.flip(0), shares.flip(0).float())


def expert_map(use: ExpertUse, path: str | Path) -> None:
    """Draw ``use`` into ``path`` (PNG, SVG or PDF by the name): a panel for each layer, noise
    levels across, shares of the experts above one another.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers = use.shares.shape[1]
    columns = min(4, layers)
    rows = -(-layers // columns)
    figure = new_figure("expert_map", (1 + 2.6 * columns, 0.8 + 1.7 * rows))
    every = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    times = use.times.tolist()
    for i, axes in enumerate(every):
        if i >= layers:
            axes.set_visible(False)
            continue
        bands = axes.stackplot(times, use.shares[:, i].T.tolist())
        axes.set(title=f"layer {i}", ylim=(0, 1))
        if len(times) > 1:
            axes.set_xlim(times[0], times[-1])  # noise on the left, as a run goes
    names = [f"expert {e}" for e in range(use.shares.shape[2])]
    figure.legend(bands, names, loc="outside upper center", ncols=min(8, len(names)), frameon=False)
    figure.supxlabel("noise level (model time)")
    figure.supylabel("share of choices")
    save_figure(figure, path)
