"""The native CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``pytest -m slow``.

Builds a copy of the sources with ``FASTDIFF_SANITIZE=address,undefined`` and runs the tests of the
ops on it. The control plants a read past the end of a row and must be caught. Masked vector loads
are not instrumented by compilers; test_memory_guard.py sees those.
"""

import os
import subprocess

import pytest

import fastdiff
from fastdiff import testing_tree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not fastdiff.cpu_levels(), reason="the extension is not built here"),
]


def library(name):
    """The path of a sanitizer's runtime library, as the compiler finds it."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build(tree):
    testing_tree.build(tree, FASTDIFF_SANITIZE="address,undefined")


def run(tree, *command):
    """Run Python on the instrumented copy; leaks are not looked for, as Python leaks by design."""
    return testing_tree.python(
        tree,
        *command,
        LD_PRELOAD=f"{library('libasan.so')} {library('libubsan.so')}",
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=1",
        UBSAN_OPTIONS="print_stacktrace=1",
        OMP_NUM_THREADS="2",
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("sanitized") / "tree"
    testing_tree.copy(tree)
    build(tree)
    return tree


@pytest.mark.parametrize("file", testing_tree.native_tests())
def test_native_ops_are_clean(tree, file):
    # Compiling and the interpreter run no kernel of ours that the other tests do not run.
    words = "not triton and not compile"
    done = run(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", words)
    text = done.stdout + done.stderr
    assert "ERROR: AddressSanitizer" not in text and "runtime error:" not in text, text[-6000:]
    assert done.returncode == 0, text[-3000:]


def test_bad_input_is_clean(tree):
    done = run(
        tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_bad_input.py"
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_control_planted_read_past_the_end(tree):
    """Without its mask the tail of a row of 5 reads 8 or 16 elements."""
    call = "import torch, fastdiff; print(fastdiff.ops.gelu_tanh(torch.ones(5), impl='native'))"
    assert run(tree, "-c", call).returncode == 0
    path = tree / "csrc" / "cpu" / "gelu_tanh_kernel.cpp"
    text = path.read_text()
    mutant = text.replace("Vec h = part.load(x + i);", "Vec h = Vec::load(x + i);")
    assert mutant != text
    try:
        path.write_text(mutant)
        build(tree)
        done = run(tree, "-c", call)
        assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr
    finally:
        path.write_text(text)
        build(tree)
