"""bench/roofline.py: its counts and bounds, from figures worked out by hand."""

from pathlib import Path

import pytest
import torch

from fastdiff import gpu_cases
from fastdiff.testing import load_file

PATH = Path(__file__).parents[1] / "bench" / "roofline.py"


@pytest.fixture(scope="module")
def roofline():
    return load_file(PATH)


def case(op, start, dtype=torch.bfloat16):
    (found,) = (c for c in gpu_cases.cases(dtype) if c.op == op and c.name.startswith(start))
    return found


def test_operations(roofline):
    assert roofline.matrix_flops(case("attention", "Flux")) == 4 * 24 * 4608 * 4608 * 128
    assert roofline.matrix_flops(case("gate_residual", "DiT")) == 0
    assert roofline.matrix_flops(case("grouped_linear", "DiT-MoE-B/2 1024 rows")) == (
        2 * 1024 * 6144 * 768
    )
    assert roofline.matrix_flops(case("grouped_weight_grad", "DiT-MoE-B/2")) == (
        2 * 1024 * 768 * 3072
    )
    assert roofline.matrix_flops(case("lora_add", "SD 1.5")) == 2 * 8 * 4096 * 4 * (320 + 320)
    assert roofline.matrix_flops(case("sparse_weight_grad", "DiT-XL/2")) == 2 * 512 * 1152**2
    assert roofline.matrix_flops(case("sparse_conv2d_weight_grad", "SD 1.5 2x320")) == (
        2 * 2 * 4096 * 320 * 320 * 9
    )


def test_bytes():
    x = torch.empty(3, 5, dtype=torch.bfloat16)
    y = torch.empty(7)
    assert gpu_cases.moved(x, (y, None), 3) == 30 + 28
    assert gpu_cases.moved(x, x, x.view(15)) == 30  # once
    index = torch.zeros(1, 2, dtype=torch.int64)
    assert gpu_cases.traffic("gather_tokens", (y, index), torch.zeros(1, 2, 3)) == 16 + 2 * 24


def test_bounds(roofline):
    h100, rtx = roofline.GPUS
    assert roofline.least_time(h100, 3.35e9, 0.0, "bfloat16") == (pytest.approx(1e-3), "memory")
    assert roofline.least_time(h100, 1.0, 989e9, "bfloat16") == (
        pytest.approx(1e-3),
        "tensor cores",
    )
    assert roofline.least_time(rtx, 1.008e9, 0.0, "float32")[0] == pytest.approx(1e-3)
    assert roofline.least_time(rtx, 1.0, 82.6e9, "float32")[0] == pytest.approx(3e-3)


def test_table(roofline):
    report = {
        "op": "gate_residual",
        "case": "DiT-XL/2 2x1024x1152",
        "by": "Triton",
        "kernel": "layer_norm_modulate_kernel",
        "target": "sm_90",
        "threads": 128,
        "registers": 40,
        "shared": 0,
        "bytes": 14160384,
    }
    text = roofline.table([report, report], "bfloat16")
    assert text.startswith("bfloat16; computed, not measured on a GPU")
    assert text.splitlines()[4:] == [
        "| gate_residual | DiT-XL/2 2x1024x1152 | Triton layer_norm_modulate_kernel | H100 SXM "
        "| 14.16 | no matrix product | 4.23 (memory) | 40 | 0.0 | 75 % (12 blocks; registers) |"
    ]


def test_is_no_bench_of_an_op():
    path = PATH.with_name("run.py").read_text()
    assert "def cases(" in path and "def cases(" not in PATH.read_text()
