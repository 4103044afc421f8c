"""How many planted bugs of the CUDA kernels the model's tests find, and under which build.

Each kernel as it is must pass its tests in all three builds: plain, address + undefined, thread.
Each mutant should fail in one of them. Misses are named; nine of ten must be found.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import testing_simt
from fastdiff.testing import load_file

HERE, CUDA = Path(__file__).parent, testing_simt.CSRC / "cuda"
OPS = sorted(p.stem.removeprefix("mutants_") for p in HERE.glob("mutants_*.py"))
HEADERS = ("gpu.h", "tiles.h", "group_tiles.h", "quant_tiles.h", "softmax.h")
BUILDS = {"plain": ("-O1",), **testing_simt.SANITIZERS}
ORDER = ("plain", "thread", "address")  # cheapest first
pytestmark = pytest.mark.slow


def mutants(op):
    return load_file(HERE / f"mutants_{op}.py").MUTANTS


def passes(op, source, build, folder, headers=None):
    """Whether the op's tests pass on kernels of ``source`` in a build; the last words if not.
    ``headers``: by name, what takes the place of those of csrc/cuda."""
    folder.mkdir()
    path = folder / f"{op}.cu"
    path.write_text(source)
    for name, text in (headers or {}).items():  # one beside the file that includes it comes first
        (folder / name).write_text(text)
    library = testing_simt.build(folder, BUILDS[build], [path, CUDA / "library.cu"])
    env = dict(os.environ) if build == "plain" else testing_simt.sanitizer_environment(build)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / f"test_{op}.py")],
        env={**env, "FASTDIFF_SIMT": str(library)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    return done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("op", OPS)
def test_control(op, build, tmp_path):
    good, words = passes(op, (CUDA / f"{op}.cu").read_text(), build, tmp_path / "control")
    assert good, words


def test_nine_of_ten_mutants_are_found(tmp_path, capsys):
    found, missed = [], []
    for op in OPS:
        own, *shared = ((CUDA / name).read_text() for name in (f"{op}.cu", *HEADERS))
        for i, (name, old, new) in enumerate(mutants(op)):
            there = own.count(old) or sum(text.count(old) for text in shared)
            assert there == 1, f"{op}: {name}: the text stands there {there} times"
            mutant, headers = own.replace(old, new), None
            if mutant == own:
                headers = {n: t.replace(old, new) for n, t in zip(HEADERS, shared, strict=True)}
            for build in ORDER:
                if not passes(op, mutant, build, tmp_path / f"{op}-{i}-{build}", headers)[0]:
                    found.append(f"{op}: {name} ({build})")
                    break
            else:
                missed.append(f"{op}: {name}")
    with capsys.disabled():
        print(f"\n{len(found)} of {len(found) + len(missed)} found; missed: {missed or 'none'}")
        print("\n".join(found))
    assert len(found) >= 25 and len(found) >= 0.9 * (len(found) + len(missed)), missed
