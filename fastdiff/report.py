"""What a run computed, reused and forecast, as a picture: steps across, parts down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.engine.request import Event, Request

MARK = "fastdiff"  # the Software field of the PNGs drawn here
# Shares of a row's samples that a cell can show, and how: the same order in the legend.
COLORS = {"full": "#1b4f72", "forecast": "#c77f1a", "reuse": "#d9e2e8", "mixed": "#7fa3b8"}


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


def _kind(event: Event) -> str:
    if all(event.computed):  # a call with caches off has no samples here
        return "full"
    if any(event.computed):
        return "mixed"
    return "forecast" if "forecast" in event.how else "reuse"


def _parts(part: str) -> list[str]:
    """The rows of a part: one a block for ``blocks 1-27``."""
    match = re.fullmatch(r"blocks (\d+)-(\d+)", part)
    if match is None:
        return [part]
    return [f"block {i}" for i in range(int(match[1]), int(match[2]) + 1)]


def cells(trace: Sequence[Event]) -> dict[str, dict[int, str]]:
    """``{part: {step: kind}}``, blocks each on their own; several calls a step that differ are
    "mixed"."""
    found: dict[str, dict[int, str]] = {}
    for event in trace:
        kind = _kind(event)
        for part in _parts(event.part):
            row = found.setdefault(part, {})
            row[event.step] = kind if row.get(event.step, kind) == kind else "mixed"
    return found


def heat_map(run: Request, path: str | Path) -> None:
    """Draw the trace of a run into ``path`` (PNG, SVG or PDF by the name).

    Raises:
        ValueError: the run has no trace: no cache was on.
        ImportError: matplotlib is not installed.
    """
    rows = cells(run.trace)
    if not rows:
        raise ValueError("heat_map: run has an empty trace, need a run with a cache")
    steps = 1 + max(step for row in rows.values() for step in row)
    figure = new_figure("heat_map", (1.5 + 0.25 * steps, 1.2 + 0.3 * len(rows)))
    from matplotlib.patches import Patch

    axes = figure.subplots()
    for y, row in enumerate(rows.values()):
        for step, kind in row.items():
            axes.broken_barh([(step - 0.5, 1)], (y - 0.45, 0.9), color=COLORS[kind], ec="white")
    axes.set(xlim=(-0.5, steps - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="model call")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.legend(
        handles=[Patch(color=color, label=kind) for kind, color in COLORS.items()],
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(COLORS), frameon=False,
    )  # fmt: skip
    save_figure(figure, path)
