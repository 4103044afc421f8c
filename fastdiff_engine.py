"""Entry of the ``fastdiff`` command: sees that ``import fastdiff`` is this package, then runs it.

PyPI's ``fastdiff`` (a text differ that snapshottest needs) owns the same import name. Where both
are installed the later one overwrites files of the other, and an editable install of this one
loses. That cannot be told from inside ``fastdiff``, whose ``__init__.py`` may be the other's, hence
this module.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

REMEDY = (
    "it shadows the diffusion engine of the same import name: "
    "pip uninstall -y fastdiff fastdiff-engine, then install this package again"
)


def clash() -> str | None:
    """None where ``import fastdiff`` gives this package alone, else a sentence."""
    spec = importlib.util.find_spec("fastdiff")
    if spec is None or spec.origin is None:
        return "no package fastdiff is importable; install this package again"
    folder = Path(spec.origin).parent
    other = [name for name in ("compare.py", "fastdiff.wasm") if (folder / name).exists()]
    if other or not (folder / "dispatch.py").exists():
        found = f"files of PyPI's unrelated text differ 'fastdiff' lie in {folder}"
        return f"{found}; {REMEDY}"
    return None


def main() -> int:
    """Run the command line; exit code 2 with one line where another ``fastdiff`` is in the way."""
    reason = clash()
    if reason is not None:
        print(f"fastdiff: {reason}", file=sys.stderr)
        return 2
    from fastdiff.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
