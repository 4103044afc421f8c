"""Runs the CUDA kernels on the CPU: csrc/cuda/*.cu as plain C++ on csrc/simt, CUDA's own model.

Inside :func:`emulated` the native rows of ops on CPU tensors call the same C++ entries that CUDA
tensors reach, and those launch the kernels in the model: every thread of a block is a fiber,
barriers, shuffles, ballots, ldmatrix, mma and cp.async do what the hardware does, shared memory
starts as NaN. What a GPU may do in any order is chosen by ``order``, ``greedy`` and ``eager``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from fastdiff import _native

CSRC = Path(__file__).resolve().parents[1] / "csrc"
# (order, greedy, eager): in order, reversed and random; warps in turn or one as far as it can go;
# copies landing late or at once.
MODES = tuple((order, greedy, eager) for order in (0, 1, 2, 3) for greedy, eager in
              ((False, False), (True, True), (False, True), (True, False)))  # fmt: skip
# Flags of build(), and what Python must be started with for such a library to load.
SANITIZERS = {
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-fsanitize=thread"),
}
_RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
COUNTERS = ("threads", "switches", "barriers", "collectives", "copies", "ldmatrix", "mma",
            "bank_conflicts")  # fmt: skip


class _Counters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in COUNTERS]


def build(folder: Path, flags: Sequence[str] = ("-O2",), sources: Sequence[Path] = ()) -> Path:
    """Compile kernels (all of csrc/cuda by default) for the model; ``flags``: sanitizers and such.

    The runtime beneath is never instrumented: what it moves for a kernel is no access of the
    kernel. Raises RuntimeError with the compiler's words.
    """
    cxx = os.environ.get("CXX") or shutil.which("g++") or "c++"
    base = [cxx, "-std=c++20", "-g1", "-fPIC", "-Wno-unknown-pragmas"]
    base += [f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
    runtime, out = folder / "runtime.o", folder / "simt.so"
    kernels = [str(p) for p in sources or sorted(CSRC.glob("cuda/*.cu"))]
    for command in (
        [*base, "-O2", "-c", str(CSRC / "simt" / "runtime.cpp"), "-o", str(runtime)],
        [
            *base,
            *flags,
            "-shared",
            "-x",
            "c++",
            *kernels,
            "-x",
            "none",
            str(runtime),
            "-o",
            str(out),
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-4000:]}")
    return out


def sanitizer_environment(name: str) -> dict[str, str]:
    """The environment in which Python loads a library that was built with ``SANITIZERS[name]``."""
    cxx = os.environ.get("CXX", "g++")
    found = [
        subprocess.run(
            [cxx, f"-print-file-name={file}"], capture_output=True, text=True, check=True
        )
        for file in _RUNTIMES[name]
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, by design
        "TSAN_OPTIONS": "exitcode=66",
        "OMP_NUM_THREADS": "1",
    }


def _digest() -> str:
    paths = [*CSRC.glob("cuda/*"), *CSRC.glob("simt/*"), *CSRC.glob("cpu/*.h")]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(paths))).hexdigest()[:16]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The model with all kernels, loaded into the extension; built once for these sources.

    ``FASTDIFF_SIMT`` names a library that :func:`build` made, to be taken instead.
    """
    if _native._C is None:
        raise RuntimeError(f"testing_simt: {_native.load_error}")
    given = os.environ.get("FASTDIFF_SIMT")
    if given:
        return load(Path(given))
    folder = Path(tempfile.gettempdir()) / f"fastdiff-simt-{os.getuid()}-{_digest()}"
    path = folder / "simt.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as work:
            built = build(Path(work))
            folder.mkdir(exist_ok=True)
            os.replace(built, path)  # whole or not at all, for several processes
    return load(path)


def load(path: Path) -> ctypes.CDLL:
    """Load a library that :func:`build` made into the extension."""
    _native._C.load_gpu_library(str(path), True)
    simt = ctypes.CDLL(str(path))
    simt.simt_mode.argtypes = [ctypes.c_uint64, ctypes.c_bool, ctypes.c_bool]
    simt.simt_counters.restype = _Counters
    return simt


def counters() -> dict[str, int]:
    """What the model has counted since the last call (bank conflicts: those of ldmatrix)."""
    seen = library().simt_counters()
    return {name: getattr(seen, name) for name in COUNTERS}


@contextmanager
def emulated(order: int = 0, greedy: bool = False, eager: bool = False) -> Iterator[None]:
    """Inside the block the native rows of CPU tensors are CUDA kernels in the model.

    Args:
        order: threads of a block go 0 in order, 1 reversed, above in a random order of that seed.
        greedy: a warp runs as far as it can before the next does; else all warps take turns.
        eager: an asynchronous copy lands when issued; else not before the wait that asks for it.
    """
    library().simt_mode(order, greedy, eager)
    _native._C.set_emulating(True)
    try:
        yield
    finally:
        _native._C.set_emulating(False)
