"""Time ops against plain torch: ``python bench/run.py [op ...]``, or ``fastdiff bench [op ...]``.

Runs the tests of an op first and prints no figure of one whose tests are red. The arms of a case
are interleaved and their order alternates, so that a slow second of the machine falls on all of
them. Tensors stay where they are between calls and freed memory stays with the process: these are
warm-cache figures, without the page faults of a first allocation. The limits (matrix
rate, copy bandwidth at the same byte count) are measured in the same run.
"""

from __future__ import annotations

import csv
import datetime
import gc
import importlib.util
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
# Python puts a script's folder on sys.path, where attention.py and its like could shadow others.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.cli import Parser  # noqa: E402
from fastdiff.info import processor  # noqa: E402

ROOT = HERE.parent
MARKS = ("<!-- figures: fastdiff bench --readme -->", "<!-- end of figures -->")
# Two correct outputs differ by a few roundings; above this share of the largest value one is wrong.
AGREE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}


def load(path: Path) -> ModuleType:
    """A file of this folder as a module of its own, without the folder on ``sys.path``."""
    name = "_case" if path.stem == "_case" else f"fastdiff_bench_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load(HERE / "_case.py")
from _case import Case  # noqa: E402


def names() -> list[str]:
    """The bench modules: those with cases to time."""
    files = (p for p in HERE.glob("*.py") if p.stem != "run" and p.stem[0] != "_")
    return sorted(p.stem for p in files if "\ndef cases(" in p.read_text())


# ---- tests first ---------------------------------------------------------------------------------


def tests_of(op: str) -> list[Path]:
    return sorted((ROOT / "tests").rglob(f"test_{op}.py"))


def tests_green(op: str) -> str | None:
    """None where the tests of ``op`` pass (or none are there, as in an installed package)."""
    files = tests_of(op)
    if not files:
        return None
    code = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    return (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]


def outputs(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Iterable):
        return [t for v in value for t in outputs(v)]
    return []


def disagreement(case: Case) -> str | None:
    """None where ``fast`` gives what the baseline ``vs`` gives, else a sentence."""
    if not case.comparable or case.vs not in case.baselines:
        return None
    got, want = outputs(case.fast()), outputs(case.baselines[case.vs]())
    if len(got) != len(want):
        return f"fastdiff gives {len(got)} tensors, {case.vs} {len(want)}"
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if g.shape != w.shape:
            return f"output {i} has shape {list(g.shape)}, that of {case.vs} {list(w.shape)}"
        if not g.numel() or not g.is_floating_point():
            continue
        size = w.double().abs().max().item()
        error = (g.double() - w.double()).abs().max().item()
        bound = max(AGREE[g.dtype], AGREE[w.dtype]) * max(size, 1e-30)
        if not error <= bound:
            return (
                f"output {i} is {error:.3g} away from {case.vs}, whose largest value is {size:.3g}"
            )
    return None


# ---- timing --------------------------------------------------------------------------------------


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _batch(fn: Callable[[], Any], calls: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    _wait()
    return (time.perf_counter() - start) / calls


def measure(
    arms: dict[str, Callable[[], Any]], rounds: int, round_ms: float
) -> dict[str, tuple[float, float]]:
    """Median and interquartile range in seconds of one call, of every arm.

    A round repeats an arm until ``round_ms`` have passed; every second round goes through the arms
    backwards.
    """
    calls = {}
    for name, fn in arms.items():
        fn()
        once = min(_batch(fn, 1) for _ in range(3))
        calls[name] = max(1, int(round_ms / 1e3 / max(once, 1e-9)) + 1)
    times: dict[str, list[float]] = {name: [] for name in arms}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in list(arms) if i % 2 == 0 else reversed(list(arms)):
                times[name].append(_batch(arms[name], calls[name]))
    finally:
        gc.enable()
    result = {}
    for name, seen in times.items():
        q = torch.tensor(seen, dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        )
        result[name] = (q[1].item(), (q[2] - q[0]).item())
    return result


class Limits:
    """Rates of this machine, measured once a run: FLOP/s of matrix products, byte/s of copies."""

    def __init__(self, rounds: int, round_ms: float, device: torch.device) -> None:
        self.rounds, self.round_ms, self.device = rounds, round_ms, device
        self._matrix: dict[torch.dtype, float] = {}
        self._copy: dict[int, float] = {}

    def _best(self, arms: dict[str, Callable[[], Any]]) -> float:
        return min(median for median, _ in measure(arms, self.rounds, self.round_ms).values())

    def matrix(self, dtype: torch.dtype) -> float:
        """The best that torch's libraries do on a 1024-cubed product (float16: as bfloat16)."""
        if dtype != torch.float32:
            dtype = torch.bfloat16
        if dtype not in self._matrix:
            n = 1024 if self.device.type == "cpu" else 8192
            a = torch.randn(n, n, device=self.device).to(dtype)
            b = torch.randn(n, n, device=self.device).to(dtype)
            arms: dict[str, Callable[[], Any]] = {"mm": lambda: torch.mm(a, b)}
            if self.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
                one = torch.ops.mkldnn._linear_pointwise
                try:
                    one(a, b, None, "none", [], "")
                    arms["onednn"] = lambda: one(a, b, None, "none", [], "")
                except RuntimeError:  # no bfloat16 products on processors with AVX2 alone
                    pass
            self._matrix[dtype] = 2.0 * n**3 / self._best(arms)
        return self._matrix[dtype]

    def copy(self, moved: float) -> float:
        """Byte/s of a copy that reads and writes ``moved`` bytes in all."""
        count = max(1, int(moved) // 8)
        if count not in self._copy:
            source = torch.zeros(count, device=self.device)
            target = torch.empty_like(source)
            self._copy[count] = 8.0 * count / self._best({"copy": lambda: target.copy_(source)})
        return self._copy[count]

    def seconds(self, case: Case, dtype: torch.dtype) -> tuple[float, str]:
        """The least time a call could take, and what sets it; 0 where the case states no work."""
        matrix = case.flops / self.matrix(dtype) if case.flops else 0.0
        copy = case.bytes / self.copy(case.bytes) if case.bytes else 0.0
        return max((matrix, "matrix"), (copy, "copy"))


# ---- one case ------------------------------------------------------------------------------------


def run_case(op: str, case: Case, limits: Limits, compiled: bool) -> list[dict[str, Any]]:
    """Rows of the CSV: one for every arm."""
    arms = {"fastdiff": case.fast, **case.baselines}
    if compiled and case.vs in case.baselines:
        torch._dynamo.reset()
        arms["compile"] = torch.compile(case.baselines[case.vs])
    with fastdiff.record() as ran:
        first = outputs(case.fast())
    dtype = first[0].dtype if first else torch.float32
    times = measure(arms, limits.rounds, limits.round_ms)
    least, bound = limits.seconds(case, dtype)
    fast = times["fastdiff"][0]
    rows = []
    for arm, (median, iqr) in times.items():
        target = case.target if arm == case.vs else case.also.get(arm)
        reached = None if target is None or arm == "fastdiff" else median / fast >= target
        rows.append(
            {
                "op": op,
                "case": case.name,
                "arm": arm,
                "row": " ".join(sorted({r for _, r in ran})) if arm == "fastdiff" else "",
                "median_ms": median * 1e3,
                "iqr_ms": iqr * 1e3,
                "gflops": case.flops / median / 1e9 if case.flops else None,
                "gbs": case.bytes / median / 1e9 if case.bytes else None,
                "limit": bound if least else "",
                "limit_ms": least * 1e3 if least else None,
                "share_of_limit": least / median if least else None,
                "ratio": median / fast,
                "target": target,
                "reached": reached,
            }
        )
    return rows


def _rate(row: dict[str, Any]) -> str:
    if row["limit"] == "matrix":
        return f"{row['gflops']:.0f} GFLOP/s"
    return f"{row['gbs']:.1f} GB/s" if row["gbs"] else ""


def show(rows: list[dict[str, Any]]) -> None:
    print(f"  {rows[0]['case']}")
    for row in rows:
        share = row["share_of_limit"]
        words = [
            f"    {row['arm']:<12}",
            f"{row['median_ms']:10.4f} ms (IQR {row['iqr_ms']:.4f})",
            f"{_rate(row):>14}",
            f"{100 * share:5.0f} % of {row['limit']} limit" if share else "",
        ]
        if row["arm"] != "fastdiff":
            words.append(f"{row['ratio']:6.2f} x")
        else:
            words.append(f"[{row['row']}]" if row["row"] else "")
        if row["reached"] is not None:
            words.append(f"target {row['target']:.3g}: {'reached' if row['reached'] else 'MISSED'}")
        print(" ".join(words).rstrip(), flush=True)


# ---- where and how -------------------------------------------------------------------------------


def commit() -> str:
    """The commit of the source tree, "+" where it has changes; without git the version."""
    git = ["git", "-C", str(ROOT)]
    if not (ROOT / ".git").exists():
        return "v" + fastdiff.__version__
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "v" + fastdiff.__version__
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def facts(device: torch.device) -> dict[str, Any]:
    name = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "processor": name,
        "threads": torch.get_num_threads(),
        "level": fastdiff.cpu_level(),
        "fastdiff": fastdiff.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def markdown(rows: list[dict[str, Any]], about: dict[str, Any], command: str) -> str:
    """The cases as a table for README.md."""
    lines = [
        f"{about['processor']}, {about['threads']} threads, {about['level']}; torch "
        f"{about['torch']}; commit {about['commit']}; `{command}`",
        "",
        "| op | case | fastdiff, ms | share of limit | against torch | other baselines | target |",
        "|---|---|---|---|---|---|---|",
    ]
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"]), []).append(row)
    for (op, case), arms in cases.items():
        fast, rest = arms[0], arms[1:]
        main = [r for r in rest if r["arm"] == "eager"]
        other = ", ".join(f"{r['arm']} {r['ratio']:.2f} x" for r in rest if r["arm"] != "eager")
        targets = [r for r in rest if r["target"] is not None]
        share = fast["share_of_limit"]
        lines.append(
            f"| {op} | {case} | {fast['median_ms']:.3f} (IQR {fast['iqr_ms']:.3f}) | "
            + (f"{100 * share:.0f} % ({fast['limit']})" if share else "")
            + (f" | {main[0]['ratio']:.2f} x | " if main else " | | ")
            + f"{other} | "
            + ", ".join(
                f"{r['arm']} {r['target']:.3g}: {'yes' if r['reached'] else 'no'}" for r in targets
            )
            + " |"
        )
    return "\n".join(lines)


def write_readme(table: str) -> None:
    """Put the table between its marks in README.md of the source tree."""
    path = ROOT / "README.md"
    text = path.read_text()
    head, rest = text.split(MARKS[0], 1)
    tail = rest.split(MARKS[1], 1)[1]
    path.write_text(f"{head}{MARKS[0]}\n{table}\n{MARKS[1]}{tail}")


def parser() -> Parser:
    p = Parser(prog="fastdiff bench", description=(__doc__ or "").split("\n")[0])
    p.add_argument("op", nargs="*", help=f"of: {', '.join(names())} (none: all of them)")
    p.add_argument(
        "--quick", action="store_true", help="5 rounds of 5 ms: for a look, not a figure"
    )
    p.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    p.add_argument(
        "--level", choices=fastdiff.cpu_levels(), help="instruction set of native kernels"
    )
    p.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--round-ms", type=float, default=20.0)
    p.add_argument(
        "--compile", action="store_true", help="an arm more: the baseline, torch.compile'd"
    )
    p.add_argument("--csv", type=Path, help="append the figures to this file")
    p.add_argument("--markdown", action="store_true", help="print the table of README.md as well")
    p.add_argument("--readme", action="store_true", help="put that table into README.md")
    p.add_argument(
        "--no-tests", action="store_true", help="for quick loops: the ops' tests not run"
    )
    return p


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.exists() or path.stat().st_size == 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        if new:
            out.writeheader()
        out.writerows(rows)


def main(argv: list[str] | None = None) -> int:
    fastdiff.keep_memory()
    p = parser()
    args = p.parse_args(argv)
    unknown = [op for op in args.op if op not in names()]
    if unknown:
        p.error(f"op is {unknown[0]!r}, need one of {', '.join(names())}")
    if args.threads is not None and args.threads < 1:
        p.error(f"--threads is {args.threads}, need at least 1")
    if args.readme and not all(
        mark in (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else False
        for mark in MARKS
    ):
        p.error(f"--readme: {ROOT / 'README.md'} lacks the marks {MARKS[0]} and {MARKS[1]}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.level:
        fastdiff.set_cpu_level(args.level)
    rounds, round_ms = (5, 5.0) if args.quick else (args.rounds, args.round_ms)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        p.error(
            f"--device is {args.device}, need a CUDA device: torch {torch.__version__} sees none"
        )
    limits, about = Limits(rounds, round_ms, device), facts(device)
    print("  ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    done: list[dict[str, Any]] = []
    failed = []
    for op in args.op or names():
        print(op, flush=True)
        if not args.no_tests:
            red = tests_green(op)
            if red is not None:
                print(f"  no figures: the tests of {op} are red: {red}", flush=True)
                failed.append(op)
                continue
            if not tests_of(op):
                print("  (no tests beside this folder: outputs are compared with the baseline)")
        torch.manual_seed(0)
        with device:
            cases = list(load(HERE / f"{op}.py").cases())
        for case in cases:
            if args.only not in case.name:
                continue
            wrong = disagreement(case)
            if wrong is not None:
                print(f"  {case.name}\n    no figures: {wrong}", flush=True)
                failed.append(f"{op} {case.name}")
                continue
            rows = run_case(op, case, limits, args.compile)
            show(rows)
            done += rows
    if args.csv and done:
        write_csv(args.csv, [{**about, **row} for row in done])
    words = sys.argv[1:] if argv is None else argv
    table = markdown(done, about, " ".join(["fastdiff bench", *words]))
    if args.markdown:
        print("\n" + table)
    if args.readme and done:
        write_readme(table)
    missed = [f"{r['op']} {r['case']}" for r in done if r["reached"] is False]
    if missed:
        print(f"below target: {len(missed)} of {sum(r['reached'] is not None for r in done)} cases")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
