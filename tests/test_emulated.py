"""The kernels' code for VNNI and AVX-512, run on any processor with AVX2: ``pytest -m slow``.

Builds a copy of the sources with ``FASTDIFF_EMULATE=1`` (csrc/emulate) and runs on it the tests
that take every level. The control plants faults that only code of those levels can have.
"""

import os
import re
import subprocess

import pytest

import fastdiff
from fastdiff import testing_tree

HEADER = "simde/x86/avx512.h"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not fastdiff.cpu_levels(), reason="the extension is not built here"),
]


def has_header():
    command = [os.environ.get("CXX", "g++"), "-x", "c++", "-E", "-"]
    text = f"#include <{HEADER}>"
    return not subprocess.run(command, input=text, capture_output=True, text=True).returncode


def build(tree):
    testing_tree.build(tree, FASTDIFF_EMULATE="1")


def run(tree, *words):
    done = testing_tree.python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    if not has_header():
        pytest.skip(f"no <{HEADER}>, which Debian's libsimde-dev has")
    tree = tmp_path_factory.mktemp("emulated") / "tree"
    testing_tree.copy(tree)
    build(tree)
    return tree


def test_every_level_is_there_and_named_emulated(tree):
    show = "from fastdiff.cli import main; main(['info'])"
    done = testing_tree.python(tree, "-c", show)
    assert (
        "avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16 (all but avx2 emulated in it"
        in done.stdout
    ), done.stderr


# Triton's interpreter and torch's compiler run no kernel of ours that the other tests do not run.
@pytest.mark.parametrize("file", testing_tree.native_tests())
def test_native_ops(tree, file):
    code, said = run(tree, file, "-x", "-k", "not triton and not compile")
    assert code == 0, said[-6000:]


@pytest.mark.parametrize("file", ("tests/test_memory_guard.py", "tests/test_native.py"))
def test_memory_and_levels(tree, file):
    code, said = run(tree, file, "-x")
    assert code == 0, said[-6000:]


def test_control_planted_faults(tree):
    """One for each kind of product, in code of its levels alone."""
    path = tree / "csrc" / "cpu" / "quant_attention_kernel.cpp"
    text = path.read_text()
    mutant = text.replace("_mm512_movepi8_mask(k)", "_mm512_movepi8_mask(q)")
    mutant = mutant.replace("_mm512_dpbusd_epi32(sum, q, k)", "_mm512_dpbusd_epi32(sum, k, q)")
    mutant = mutant.replace(
        "_mm256_dpbusd_avx_epi32(sum, q, k)", "_mm256_dpbusd_avx_epi32(sum, k, q)"
    )
    try:
        path.write_text(mutant)
        build(tree)
        _, said = run(tree, "tests/ops/test_quant_attention.py", "-k", "test_levels")
    finally:
        path.write_text(text)
        build(tree)
    found = set(re.findall(r"^FAILED \S*-(\w+)\]", said, re.MULTILINE))
    assert found == {"avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"}, said[-6000:]
