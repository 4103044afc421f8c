"""A copy of the sources whose extension is built in another way, and Python on it, for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SKIP = shutil.ignore_patterns(
    "__pycache__", ".git", ".venv", ".path", "build", "*.so", "*.egg-info", "_build_info*", "out"
)


def copy(tree: Path) -> None:
    """The sources to ``tree``; they are importable from ``tree/site`` alone."""
    shutil.copytree(ROOT, tree, ignore=_SKIP, symlinks=True)
    link = tree / "fastdiff" / "kernels"
    if not link.exists():
        link.symlink_to("../kernels")
    (tree / "site").mkdir()
    (tree / "site" / "fastdiff").symlink_to("../fastdiff")


def build(tree: Path, **env: str) -> None:
    """The copy's extension, without CUDA kernels; what is newer than its sources stays."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    env = {**os.environ, "FASTDIFF_CUDA": "0", **env}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def python(tree: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What Python says on the copy."""
    env = {**os.environ, "PYTHONPATH": str(tree / "site"), **env}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def native_tests() -> list[str]:
    """Test files of ops that have C++ kernels."""
    stems = sorted(p.name.removesuffix("_kernel.cpp") for p in ROOT.glob("csrc/cpu/*_kernel.cpp"))
    return [f"tests/ops/test_{stem}.py" for stem in stems if not stem.endswith("_backward")]
