"""The kernels' code for AVX-512, run on any processor with AVX2: ``pytest -m slow``.

Builds a copy of the sources with ``FASTDIFF_EMULATE=1`` (csrc/emulate) and runs on it the tests
that take every level. The controls plant faults that only code for AVX-512 has.
"""

import os
import subprocess

import pytest

import fastdiff
from fastdiff import testing_tree

HEADER = "simde/x86/avx512.h"


def has_header():
    command = [os.environ.get("CXX", "g++"), "-x", "c++", "-E", "-"]
    text = f"#if !__has_include(<{HEADER}>)\n#error\n#endif\n"
    return not subprocess.run(command, input=text, capture_output=True, text=True).returncode


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not fastdiff.cpu_levels(), reason="the extension is not built here"),
    pytest.mark.skipif(
        not (fastdiff.cpu_levels() and has_header()),
        reason=f"no <{HEADER}>: needs SIMDe, Debian's libsimde-dev",
    ),
]


def build(tree):
    testing_tree.build(tree, FASTDIFF_EMULATE="1")


def passes(tree, *words):
    done = testing_tree.python(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words)
    return not done.returncode, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("emulated") / "tree"
    testing_tree.copy(tree)
    build(tree)
    return tree


def test_every_level_is_there_and_named_emulated(tree):
    done = testing_tree.python(tree, "-m", "fastdiff.cli", "info")
    assert "avx2, avx512, avx512_bf16 (all but avx2 emulated in it" in done.stdout, done.stderr


# Triton's interpreter and torch's compiler run no kernel of ours that the other tests do not run.
@pytest.mark.parametrize("file", testing_tree.native_tests())
def test_native_ops(tree, file):
    good, text = passes(tree, file, "-k", "not triton and not compile")
    assert good, text


@pytest.mark.parametrize("file", ("tests/test_memory_guard.py", "tests/test_native.py"))
def test_memory_and_levels(tree, file):
    good, text = passes(tree, file)
    assert good, text


@pytest.mark.parametrize(
    "source, line, fault, file",
    (
        ("quant_linear_tiles.h", "return -128 * _mm512", "return -127 * _mm512", "quant_linear"),
        ("quantize_rows.h", "store_epi8", "store_epi8", "quantize"),
    ),
)
def test_control_planted_faults(tree, source, line, fault, file):
    path = tree / "csrc" / "cpu" / source
    text = path.read_text()
    assert line in text
    try:
        path.write_text(text.replace(line, fault))
        build(tree)
        good, _ = passes(tree, f"tests/ops/test_{file}.py", "-k", "not triton and not compile")
        assert not good
    finally:
        path.write_text(text)
        build(tree)
