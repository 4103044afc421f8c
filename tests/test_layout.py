"""The floor plan: who may import whom, which files mirror which, what the README promises."""

import ast
import re
import sys
from pathlib import Path

import pytest

import fastdiff
from fastdiff import info, ops

ROOT = Path(__file__).parents[1]
# A module imports from its own floor and from below. `fastdiff` itself, which re-exports all
# floors, counts as the highest.
FLOORS = (
    ("_version", "_memory", "_nvrtc", "kernels"),
    ("_native", "dispatch"),
    ("ops",),
    ("nn", "models"),
    (
        "samplers",
        "guidance",
        "cache",
        "tokens",
        "experts",
        "adapters",
        "data",
        "precision",
        "quality",
        "train",
    ),
    ("engine",),
    ("integrations",),
    (
        "accelerate",
        "calibrate",
        "finetune",
        "cli",
        "cli_finetune",
        "cli_methods",
        "cli_sample",
        "cli_tune",
        "gpu_cases",
        "gpu_code",
        "gpu_limits",
        "info",
        "info_kernels",
        "methods",
        "sampling",
        "stored",
        "testing",
        "testing_compile",
        "testing_cuda",
        "testing_gaussian",
        "testing_simt",
        "testing_tree",
        "testing_triton",
        "report",
        "run_summary",
        "target",
        "tune",
        "fastdiff",
    ),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
# Host synchronisation outside references, by file and function, with the reason for it.
HOST_SYNC: dict[tuple[str, str], str] = {}
SYNC = {"item", "tolist", "synchronize", "numpy", "cpu"}


def sources(*folders):
    found = [p for f in folders for p in sorted((ROOT / f).rglob("*.py"))]
    return [p for p in found if "kernels" not in p.relative_to(ROOT).parts[1:]]  # an editable link


def imported(path):
    """Dotted names that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "fastdiff":
                yield from (f"fastdiff.{alias.name}" for alias in node.names)
            else:
                yield node.module


def floor_of(dotted):
    parts = dotted.split(".")
    return FLOOR.get(parts[1] if len(parts) > 1 else "fastdiff", FLOOR["fastdiff"])


@pytest.mark.parametrize("path", sources("fastdiff"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT / "fastdiff").with_suffix("").parts
    if parts == ("__init__",):
        return
    assert parts[0] in FLOOR, f"{path.name}: {parts[0]} has no floor in FLOORS"
    for name in imported(path):
        if name.split(".")[0] == "fastdiff" and name != "fastdiff._C":
            assert floor_of(name) <= FLOOR[parts[0]], (
                f"{'.'.join(parts)} imports {name}, from above"
            )


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in sources("kernels"):
        for name in imported(path):
            ok = name.split(".")[0] in allowed or name.startswith("fastdiff.kernels")
            assert ok, f"{path.name} imports {name}"


def test_kernel_files_have_no_torch_header():
    headers = [*ROOT.glob("csrc/cpu/*.h"), *ROOT.glob("csrc/cpu/*_kernel.cpp")]
    for path in headers:
        assert not re.search(r'#include [<"](torch|ATen|c10)/', path.read_text()), path.name


def op_modules():
    return sorted(p.stem for p in (ROOT / "fastdiff" / "ops").glob("*.py") if p.stem[0] != "_")


@pytest.mark.parametrize("stem", op_modules())
def test_mirror_files(stem):
    tables = getattr(sys.modules[f"fastdiff.ops.{stem}"], "TABLES", None)
    assert tables, f"fastdiff/ops/{stem}.py has no TABLES"
    rows = {row.name for table, _ in tables.values() for row in table}
    need = [f"tests/ops/test_{stem}.py", f"bench/{stem}.py"]
    if "native" in rows:
        need += [f"csrc/cpu/{stem}{end}" for end in (".h", ".cpp", "_kernel.cpp")]
    if "triton" in rows:
        need.append(f"kernels/{stem}.py")
    missing = [name for name in need if not (ROOT / name).exists()]
    assert not missing, f"{stem}: no {', '.join(missing)}"
    for op, (table, _) in tables.items():
        assert table[-1].name == "ref", f"{op}: the last row is {table[-1].name}, need ref"
        assert op in ops.__all__, f"{op} is not exported by fastdiff.ops"


@pytest.mark.parametrize("path", sources("kernels")[1:], ids=lambda p: p.stem)
def test_every_triton_configuration_is_run(path):
    """By the op's test: each launcher takes `config`, and nothing is tuned out of tests' sight."""
    text = path.read_text()
    assert "autotune" not in text and re.search(r"^CONFIGS = \[", text, re.M), path.name
    test = (ROOT / "tests" / "ops" / f"test_{path.stem}.py").read_text()
    assert "testing.run_configs(" in test and "CONFIGS" in test, f"{path.name}: not in its test"


def test_no_orphan_files():
    stems = set(op_modules())
    for path in [*ROOT.glob("kernels/[!_]*.py"), *ROOT.glob("tests/ops/test_*.py")]:
        assert path.stem.removeprefix("test_") in stems, f"{path.name} belongs to no op"
    for path in ROOT.glob("csrc/cpu/*_kernel.cpp"):
        # layer_norm_modulate_backward_kernel.cpp belongs to layer_norm_modulate
        assert any(path.stem.startswith(s) for s in stems), f"{path.name} belongs to no op"


def test_every_schema_has_an_entry_and_a_fake():
    page = (ROOT / "csrc" / "ops.cpp").read_text()
    host = "".join(p.read_text() for p in ROOT.glob("csrc/cpu/*.cpp"))
    python = "".join(p.read_text() for p in sources("fastdiff/ops"))
    for name in re.findall(r'm\.def\(\s*"(\w+)\(', page):
        assert re.search(rf'm\.impl\(\s*"{name}"', host), f"{name}: declared, not implemented"
        assert f"fastdiff::{name}" in python, f"{name}: no fake kernel"


def test_every_op_has_a_typical_call():
    assert set(info.op_names()) == set(info.CALLS)
    for op in info.op_names():
        assert info.why(op, info.torch.float32, "cpu")["ref"] is None


@pytest.mark.parametrize("path", sources("fastdiff/ops", "kernels"), ids=lambda p: p.name)
def test_no_host_sync(path):
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        named = (str(path.relative_to(ROOT)), function.name)
        if function.name.endswith("_ref") or named in HOST_SYNC:
            continue
        for node in ast.walk(function):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if called and node.func.attr in SYNC:
                pytest.fail(
                    f"{named}: .{node.func.attr}() in line {node.lineno} may wait for a device"
                )


def test_readme_lines():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) >= 2
    for block, last in zip(blocks[:2], ("fastdiff sample", "pytest"), strict=False):
        assert len(block.splitlines()) == 1, block
        for part in ("-m venv .venv", "torch==2.13.0", "--no-build-isolation", last):
            assert part in block


def test_readme_names_every_row():
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- ops: fastdiff info --markdown -->")[1].split("<!-- end of ops -->")[0]
    seen, op = set(), ""
    for line in table.strip().splitlines()[2:]:
        cells = [cell.strip() for cell in line.split("|")[1:3]]
        op = cells[0] or op
        seen.add((op, cells[1]))
    have = set()
    for name in info.op_names():
        tables = sys.modules[getattr(ops, name).__module__].TABLES
        have |= {(name, row.name) for row in tables[name][0]}
    assert seen == have, "paste the output of `fastdiff info --markdown` into README.md"


def test_length_limits():
    """Twice the soft limits: 300 lines for Python, 400 for C++, 60 for a function."""
    for path in sources("fastdiff", "kernels", "bench", "tests"):
        text = path.read_text()
        assert len(text.splitlines()) <= 600, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.body:
                first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                assert node.end_lineno - first.lineno < 120, f"{path.name}: {node.name}"
    for path in [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h")]:
        assert len(path.read_text().splitlines()) <= 800, path.name


def test_no_line_is_too_long():
    for path in [*sources("fastdiff", "kernels", "bench", "tests"), *ROOT.glob("csrc/**/*.*")]:
        long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
        assert not long, f"{path.relative_to(ROOT)}: above 100 columns in lines {long}"


def test_import_needs_no_extension(monkeypatch):
    assert fastdiff.ops is ops  # and a missing _C is only a sentence
    monkeypatch.setattr(fastdiff._native, "_C", None)
    monkeypatch.setattr(fastdiff._native, "load_error", "fastdiff._C does not load: planted")
    why = fastdiff.explain(ops.gelu_tanh, info.torch.ones(3))
    assert why["native"] == "fastdiff._C does not load: planted" and why["ref"] is None
