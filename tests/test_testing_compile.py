"""The Triton kernels as machine code, with no GPU: in a process where nothing interprets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.gpu_cases import cases
from fastdiff.gpu_limits import BLOCK_SHARED

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
# The tensor-core instruction that a product of 16-bit numbers must become.
TENSOR = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}
# Their products of float32 are of float32, which NVIDIA's tensor cores do not have.
GROUPED = {
    "grouped_linear_kernel",
    "grouped_weight_grad_kernel",
    "lora_add_kernel",
    "sparse_weight_grad_kernel",
    "sparse_conv2d_weight_grad_kernel",
}


def compiled(*args):
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff.testing_compile", *args],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(report):
    """No spill, no stack, shared memory that the target has, tensor cores for every product: the
    newest of the target, but for int8 tiles of small groups, which have fewer rows than these."""
    assert report["spills"] == 0 and report["stack"] == 0, report
    assert report["shared"] <= BLOCK_SHARED[report["target"]], report
    assert 0 < report["registers"] <= (512 if report["target"].startswith("gfx") else 255), report
    if report["dot"] and report["dtype"] != "float32":
        small = report["kernel"] == "grouped_quant_linear_kernel" and " 64 rows" in report["case"]
        nvidia = report["target"].startswith("sm_")
        need = "mma.sync" if small and nvidia else TENSOR[report["target"]]
        assert report["tensor"] == need, report
    elif report["dot"] and (report["kernel"] not in GROUPED or report["target"] == "gfx942"):
        assert report["tensor"], report  # as three products of tf32, or AMD's of float32
    else:
        assert not report["tensor"], report


def every_kernel():
    """Names of the kernels in kernels/*.py."""
    return {
        name
        for path in ROOT.glob("kernels/*.py")
        for name in re.findall(r"^def _(\w+_kernel)\(", path.read_text(), re.M)
    }


def test_every_kernel_compiles():
    reports = compiled("sm_80", "--dtype", "bfloat16")
    for report in reports:
        check(report)
    assert {report["kernel"] for report in reports} == every_kernel()
    assert {report["kernel"] for report in reports if report["dot"]} == {
        "attention_kernel",
        "quant_attention_kernel",
        "quant_linear_kernel",
        "grouped_quant_linear_kernel",
        *GROUPED,
    }


def test_attention_uses_the_tensor_cores_of_every_target():
    targets = ("sm_90", "sm_100", "sm_120", "gfx942")
    reports = compiled(*targets, "--dtype", "bfloat16", "--only", "attention")
    for report in reports:
        check(report)
    assert {report["target"] for report in reports} == set(targets)


def test_quantised_products_use_the_tensor_cores_of_every_target():
    targets = ("sm_90", "sm_100", "sm_120", "gfx942")
    reports = compiled(*targets, "--dtype", "bfloat16", "--only", "quant")
    reports += compiled(*targets[:3], "--dtype", "float32", "--only", "quant", "--float8")
    for report in reports:
        check(report | ({"dtype": "float8"} if report["dot"] else {}))
    kernels = {name for name in every_kernel() if "quant" in name}
    kernels |= {"int8_rows_kernel", "key_mean_kernel", "layer_norm_modulate_kernel"}
    kernels |= {"patches_kernel"}
    assert {(report["kernel"], report["target"]) for report in reports} == {
        (kernel, target) for kernel in kernels for target in targets
    }


def test_float8_does_not_compile_before_its_tensor_cores():
    command = [sys.executable, "-m", "fastdiff.testing_compile", "sm_80", "--only", "quantize"]
    done = subprocess.run(
        [*command, "--dtype", "bfloat16", "--float8"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "fp8e4nv not supported in this architecture" in done.stderr


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_and_dtype():
    reports = compiled()
    for report in reports:
        check(report)
    seen = {(r["kernel"], r["target"], r["dtype"]) for r in reports}
    kinds = [(t, d) for t in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
             for d in ("bfloat16", "float16", "float32")]  # fmt: skip
    assert seen == {(k, *kind) for k in every_kernel() for kind in kinds}
    everything = {(d, case.op, case.name) for d in ("bfloat16", "float16", "float32")
                  for case in cases(getattr(torch, d))}  # fmt: skip
    refused = everything - {(r["dtype"], r["op"], r["case"]) for r in reports}
    assert refused == {("float32", "attention", "SD 1.5 2x8x64x160, bias per key")}
