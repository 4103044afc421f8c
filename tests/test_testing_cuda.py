"""The CUDA kernels as nvcc compiles them, and their launches, with no GPU."""

import ctypes
import subprocess

import pytest
import torch

from fastdiff import gpu_cases, gpu_code, testing_cuda
from fastdiff.gpu_limits import BLOCK_SHARED


def case(op, start):
    cases = gpu_cases.cases(torch.bfloat16)
    return next(c for c in cases if c.op == op and c.name.startswith(start))


def test_entries_are_those_of_the_sources():
    if not testing_cuda.CSRC.exists():
        pytest.skip("no sources beside the package")
    assert "layer_norm_modulate" in testing_cuda.entries()
    assert testing_cuda.has_kernel("gate_residual") and not testing_cuda.has_kernel("linear")
    assert testing_cuda.has_kernel("attention", torch.float16)
    assert not testing_cuda.has_kernel("attention", torch.float32)


def test_an_op_without_a_kernel_has_no_launch(tmp_path):
    with pytest.raises(ValueError, match="testing_cuda: linear has no CUDA kernel"):
        next(testing_cuda.launches(gpu_cases.Case("linear", "", lambda: ((), {})), tmp_path))


@pytest.mark.slow
def test_launches_and_machine_code():
    """layer_norm_rows: four rows of a block, a warp each; no kernel spills on sm_80."""
    if testing_cuda.why_not():
        pytest.skip(testing_cuda.why_not())
    pytest.importorskip("triton")  # cuobjdump
    path = testing_cuda.library(("sm_80",))
    code = testing_cuda.code(path, "sm_80")
    for kernel in code.values():
        assert kernel.spills == 0 and kernel.stack == 0, kernel
        assert 0 < kernel.registers <= 255, kernel
    (launch,) = testing_cuda.launches(case("gate_residual", "DiT"), path)
    assert launch["grid"] == [2 * 1024 // 4, 1, 1] and launch["block"] == [128, 1, 1]
    assert launch["shared"] == 0
    assert testing_cuda.readable(launch["kernel"]).startswith("layer_norm_rows")
    for dtype in (torch.float32, torch.bfloat16):
        for other in (*gpu_cases.cases(dtype), *gpu_cases.float8_cases(dtype)):
            if testing_cuda.has_kernel(other.op, dtype):
                for launch in testing_cuda.launches(other, path):
                    assert launch["kernel"] in code
                    assert launch["shared"] <= BLOCK_SHARED["sm_86"]
    compiled_for = ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "fastdiff_compiled_for")
    compiled_for.value = 80
    (*_, product) = gpu_cases.float8_cases(torch.bfloat16)
    try:
        with pytest.raises(RuntimeError, match=r"quant_linear: the launch failed: .* \(801\)"):
            list(testing_cuda.launches(product, path))
    finally:
        compiled_for.value = 120


@pytest.mark.slow
@pytest.mark.parametrize("target", testing_cuda.FLOAT8)
@pytest.mark.parametrize("stem", ("quantize", "quant_linear"))
def test_float8_as_machine_code(stem, target, tmp_path):
    """No spill; products on tensor cores."""
    if testing_cuda.why_not():
        pytest.skip(testing_cuda.why_not())
    pytest.importorskip("triton")  # cuobjdump
    csrc, out = testing_cuda.CSRC, tmp_path / "x.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-I{csrc}", f"-I{csrc / 'cuda'}", "-cubin"]
    command += [f"-arch={testing_cuda.ARCH.get(target, target)}", "-o", str(out)]
    subprocess.run([*command, str(csrc / "cuda" / f"{stem}.cu")], check=True)
    kernels = gpu_code.read_cuda(out)
    for kernel in kernels:
        assert kernel.spills == 0 and kernel.stack == 0, kernel
        assert kernel.tensor == ("mma.sync" if stem == "quant_linear" else ""), kernel
    assert sum("e4m3x2" in kernel.name for kernel in kernels) == 3 * (stem == "quant_linear")
