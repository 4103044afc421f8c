"""The Triton kernels as machine code, with no GPU: in a process where nothing interprets."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
# What a block may have on the least of the targets (sm_86, sm_89; sm_80 has 163 KiB, sm_90 227).
SHARED = 99 << 10
# Bytes of registers spilled per thread: a few cost nothing, a tile far too large has kilobytes.
SPILLED = 128


def compiled(*args):
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff.testing_compile", *args],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {report["kernel"] for report in reports}
    assert kernels >= {"attention_kernel", "geglu_kernel", "fused_step_kernel"}, kernels
    for report in reports:
        assert report["shared"] <= SHARED, report
        assert report["spilled"] <= SPILLED, report
    return reports


def test_every_kernel_compiles():
    assert compiled("sm_80", "--dtype", "bfloat16")


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_and_dtype():
    compiled("sm_80", "sm_89", "sm_90", "--dtype", "bfloat16", "float16", "float32")
