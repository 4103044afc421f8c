"""What a run did, as text: what was computed at which step, hits of each sample, waits, memory."""

from __future__ import annotations

from collections.abc import Sequence

from fastdiff.engine.request import Event, Request

_PLAIN = {"full": "full", "reuse": "reused", "forecast": "forecast"}


def _kind(event: Event) -> str:
    """One word or share for what a call did."""
    if not event.computed or event.how.startswith("off"):
        return "off"
    if all(event.computed):
        return "full"
    if any(event.computed):
        return f"{sum(event.computed)} of {len(event.computed)} samples"
    if event.how.endswith(" tokens"):
        return event.how
    return _PLAIN.get(event.how.split(",")[0], "reused")


def steps_line(events: Sequence[Event]) -> str:
    """``steps 0-1 full, 2-3 forecast, 4 full``; calls of one step that differ are joined by /."""
    kinds: dict[int, str] = {}
    for event in events:
        kind, known = _kind(event), kinds.get(event.step)
        kinds[event.step] = kind if known in (None, kind) else f"{known}/{kind}"
    runs: list[tuple[int, int, str]] = []
    for step, kind in sorted(kinds.items()):
        if runs and runs[-1][2] == kind and runs[-1][1] == step - 1:
            runs[-1] = (runs[-1][0], step, kind)
        else:
            runs.append((step, step, kind))
    words = (f"{a if a == b else f'{a}-{b}'} {kind}" for a, b, kind in runs)
    return "steps " + ", ".join(words)


def hit_rates(events: Sequence[Event]) -> list[float]:
    """Share of the calls at which each sample was not computed; of calls of the largest batch."""
    batch = max((len(e.computed) for e in events), default=0)
    rows = [e.computed for e in events if len(e.computed) == batch]
    return [1 - sum(r[b] for r in rows) / len(rows) for b in range(batch)] if batch else []


def _part(part: str, events: Sequence[Event]) -> list[str]:
    done = [computed for event in events for computed in event.computed]
    reused = len(done) - sum(done)
    words = f"{part}: {len(events)} calls, {reused} of {len(done)} samples' parts not computed"
    if not reused:
        words += "; WARNING: the cache never hit"
    odd = sorted({e.how for e in events if "NaN" in e.how or e.how.startswith("off")})
    lines = ["; ".join([words, *odd]), "  " + steps_line(events)]
    nan = sum("NaN" in e.how for e in events)
    if nan:
        lines.append(f"  WARNING: {nan} of {len(events)} decisions met NaN and computed")
    rates = hit_rates(events)
    if rates and 0 < reused:
        lines.append("  hit rate of each sample: " + ", ".join(f"{r:.0%}" for r in rates))
    return lines


def lines(run: Request) -> list[str]:
    """The run, part by part, then waits, memory and the rows of operations that ran."""
    found = list(run.notes)
    for part in dict.fromkeys(event.part for event in run.trace):
        found += _part(part, [event for event in run.trace if event.part == part])
    found.append(f"the host waited {run.syncs} times for decisions")
    found.append(f"caches held {run.peak_bytes:,} bytes at most")
    aside = run.rows.get(("exact mode", "own forward"), 0)
    if aside:
        found.append(f"{aside} calls of modules fell back to their own forward")
    rows = ", ".join(f"{op} {row} {n}" for (op, row), n in sorted(run.rows.items()))
    return [*found, f"rows that ran: {rows or 'none'}", *_fallbacks(run)]


def _fallbacks(run: Request) -> list[str]:
    """Why the rows before one that ran refused, when it first ran."""
    why = getattr(run.rows, "why", {})  # a run that nobody records has a plain counter
    return [
        f"  {op} ran {row}: " + ("; ".join(f"{k}: {v}" for k, v in reasons.items()) or "forced")
        for (op, row), reasons in sorted(why.items())
    ]
