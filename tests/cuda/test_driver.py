"""Launches without nvcc: the C++ compiler's host code, NVRTC's kernels, the driver's functions.

The driver is a stand-in that notes every call, or is absent as it is on a machine without a GPU.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from fastdiff import _nvrtc, testing_cuda, testing_simt
from fastdiff.gpu_cases import cases, float8_cases

CUDA = testing_simt.CSRC / "cuda"
KERNELS = sorted(p for p in CUDA.glob("*.cu") if p.stem != "library")
NVRTC = _nvrtc.why_not()
needs_nvrtc = pytest.mark.skipif(NVRTC is not None, reason=str(NVRTC))

# Calls ops in the process under test; kernels come from a compiler that gives its own name.
SCRIPT = """
import json, sys
import torch
from fastdiff import _native, _nvrtc, ops

library, what = sys.argv[1:]
def compiled(source, arch):
    if what == "uncompilable":
        raise RuntimeError("no such\\nheader")
    return f"{source.stem}:{arch}".encode() + bytes(1)
_nvrtc.cached = compiled
_native._C.load_gpu_library(library, True)
_nvrtc.serve(library)
_native._C.set_emulating(True)
x, v = torch.randn(2, 8, 64), torch.randn(2, 64)
try:
    if what == "float8":
        tokens = ops.quantize(x, dtype=torch.float8_e4m3fn, impl="native")
        weight = ops.quantize_weight(torch.ones(8, 64), dtype=torch.float8_e4m3fn)
        ops.quant_linear(tokens, weight, impl="native")
    for _ in range(2):
        with torch.no_grad():
            ops.layer_norm_modulate(x, v, v, impl="native")
    if what == "all":
        q = torch.zeros(1, 2, 70, 128, dtype=torch.bfloat16)
        ops.attention(q, q, q, impl="native")
        ops.quant_attention(q, q, q, impl="native")
        ops.group_norm_silu(torch.zeros(1, 8, 4, 4), 2, impl="native")
        ops.gather_tokens(x, torch.zeros(2, 3, dtype=torch.int64), impl="native")
        ops.select_tokens(x[0], 3, impl="native")
        ops.philox_normal((2, 64), 0, impl="native")
        ops.moe_route(x[0], 2, impl="native")
        rows, weight = torch.zeros(5, 8).half(), torch.zeros(2, 16, 8).half()
        ops.grouped_linear(rows, weight, torch.tensor([0, 2, 5]), impl="native")
        ops.scale_shift(x, v[0], impl="native")
        ops.sample_sums(x, impl="native")
        ops.resample(v, v[:, 0].double(), impl="native")
        ops.aggregate_features(torch.zeros(2, 1, 8, 6), torch.zeros(2, 1, 1, 6), impl="native")
        y, down, up = torch.zeros(1, 5, 16).half(), weight[:1, :4], weight[:1, :, :4]
        ops.lora_add(y, rows[None], down, up, torch.ones(1), impl="native")
        index = ops.SparseIndex.of_mask(torch.ones(8, 8, dtype=torch.bool).tril())
        ops.sparse_weight_grad(rows, rows, index, impl="native")
        ops.quant_linear(x, ops.quantize_weight(torch.ones(8, 64)), impl="native")
        ops.quantize_patches(torch.zeros(1, 8, 4, 4), 3, padding=1, impl="native")
        experts = ops.quantize_experts(torch.ones(2, 8, 64))
        ops.grouped_quant_linear(x[0], experts, torch.tensor([0, 2, 8]), impl="native")
        four = [torch.zeros(4) for _ in range(5)]
        how = dict(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=1)
        ops.sparse_adamw_(*four, torch.arange(4), **how, impl="native")
    print(json.dumps({"x": x.data_ptr()}))
except RuntimeError as error:
    print(json.dumps({"error": str(error).splitlines()[0]}))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """(the launching library, the folder of the stand-in)."""
    folder = tmp_path_factory.mktemp("driver")
    sources = [*sorted(CUDA.glob("*.cu")), CUDA / "driver.cpp"]
    library = testing_simt.build(folder, ("-O0", "-DFASTDIFF_DRIVER"), sources)
    fake = folder / "fake"
    fake.mkdir()
    source = testing_simt.CSRC.parent / "tests" / "cuda" / "fake_driver.cpp"
    cxx = os.environ.get("CXX", "g++")
    out = str(fake / "libcuda.so.1")
    subprocess.run([cxx, "-shared", "-fPIC", str(source), "-o", out], check=True)
    return library, fake


def run(libraries, tmp_path, what="", driver=True, **environment):
    """What SCRIPT printed, and the calls of the driver as lists of words."""
    library, fake = libraries
    log = tmp_path / "log"
    env = {**os.environ, "FAKE_LOG": str(log), **environment}
    if driver:
        env["LD_LIBRARY_PATH"] = str(fake)
    command = [sys.executable, "-c", SCRIPT, str(library), what]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(done.stdout.splitlines()[-1]), [line.split() for line in lines]


def test_a_kernel_is_compiled_loaded_and_launched_by_its_name(libraries, tmp_path):
    said, calls = run(libraries, tmp_path)
    names = [c[0] for c in calls]
    assert [c[1] for c in calls if c[0] == "cuModuleLoadData"] == ["layer_norm_modulate:sm_90a"]
    assert names.count("cuModuleGetFunction") == 1 and names.count("cuLaunchKernel") == 2
    name, *sizes, stream, words = next(c for c in calls if c[0] == "cuLaunchKernel")[1:]
    assert name.startswith("_ZN8fastdiff15layer_norm_rowsIf")
    assert all(int(n) >= 1 for n in sizes[:6]) and stream == "0"
    assert said["x"].to_bytes(8, sys.byteorder).hex() in words  # the struct came whole


def test_every_file_is_its_own_module_and_large_shared_memory_is_asked_for(libraries, tmp_path):
    said, calls = run(libraries, tmp_path, "all")
    assert "x" in said
    loaded = [c[1] for c in calls if c[0] == "cuModuleLoadData"]
    assert sorted(loaded) == sorted(f"{p.stem}:sm_90a" for p in KERNELS)
    asked = {c[1]: int(c[3]) for c in calls if c[0] == "cuFuncSetAttribute"}
    for call in calls:
        if call[0] == "cuLaunchKernel":
            shared = int(call[8])
            assert shared <= 48 * 1024 or asked[call[1]] == shared
    assert asked


@pytest.mark.parametrize("where", ("cuInit", "cuModuleLoadData", "cuLaunchKernel"))
def test_an_error_of_the_driver_is_the_ops_error(libraries, tmp_path, where):
    said, _ = run(libraries, tmp_path, FAKE_FAIL=where)
    assert said["error"] == (
        "layer_norm_modulate: the launch failed: an illegal memory access was encountered (700)"
    )


def test_a_thread_that_has_not_used_cuda_gets_the_first_devices_context(libraries, tmp_path):
    _, calls = run(libraries, tmp_path, FAKE_NO_CONTEXT="1")
    names = [c[0] for c in calls]
    assert names.count("cuDevicePrimaryCtxRetain") == names.count("cuCtxSetCurrent") == 1
    assert names.index("cuCtxSetCurrent") < names.index("cuModuleLoadData")
    assert names.count("cuModuleLoadData") == 1 and names.count("cuLaunchKernel") == 2


@pytest.mark.parametrize("where", ("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"))
def test_a_context_that_cannot_be_had_is_the_ops_error(libraries, tmp_path, where):
    said, calls = run(libraries, tmp_path, FAKE_NO_CONTEXT="1", FAKE_FAIL=where)
    assert "an illegal memory access was encountered (700)" in said["error"]
    assert "cuLaunchKernel" not in [c[0] for c in calls]


@needs_nvrtc
def test_each_missing_wheel_of_headers_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(_nvrtc, "_includes", lambda: [str(tmp_path)])
    for header, wheel in _nvrtc._WHEELS.items():
        assert wheel in str(_nvrtc.why_not())
        (tmp_path / header).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / header).touch()
    assert _nvrtc.why_not() is None


@pytest.mark.parametrize("capability", ("80", "89", "100"))
def test_float8_products_need_a_gpu_that_has_them(libraries, tmp_path, capability):
    said, calls = run(libraries, tmp_path, "float8", FAKE_CAPABILITY=capability)
    launched = [c[1] for c in calls if c[0] == "cuLaunchKernel"]
    assert "quantize_rows" in launched[0]  # on every GPU
    if capability == "80":
        assert said["error"] == (
            "quant_linear: the launch failed: needs compute capability 8.9 or above, this GPU has "
            "8.0 (-1)"
        )
        assert len(launched) == 1
    else:
        assert "quant_linear_tiles" in launched[1] and "e4m3x2" in launched[1]


def test_what_is_missing_is_said(libraries, tmp_path):
    said, _ = run(libraries, tmp_path, "uncompilable")
    assert "the launch failed: no such header" in said["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_driver_says_so(libraries, tmp_path):
    said, _ = run(libraries, tmp_path, driver=False)
    assert "no CUDA driver is installed (libcuda.so.1)" in said["error"]


@needs_nvrtc
def test_compiled_kernels_are_kept_and_a_damaged_file_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    source = CUDA / "tokens.cu"
    first = _nvrtc.cached(source, "sm_90a")
    (path,) = tmp_path.iterdir()
    plain = _nvrtc.compile
    monkeypatch.setattr(_nvrtc, "compile", None)
    assert _nvrtc.cached(source, "sm_90a") == first
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(_nvrtc, "compile", plain)
    assert _nvrtc.cached(source, "sm_90a")[:4] == first[:4] == b"\x7fELF"
    assert len(path.read_bytes()) == 32 + len(first)
    assert list(tmp_path.iterdir()) == [path]


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_both_compilers_give_a_kernel_one_name(libraries, path, tmp_path):
    """The host's compiler and NVRTC: every kernel that can be launched is in the compiled code."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    library, _ = libraries
    cubin = tmp_path / "x.cubin"
    cubin.write_bytes(_nvrtc.compile(path, "sm_80"))
    compiled = {kernel.name for kernel in testing_cuda.read_cuda(cubin)}
    out = subprocess.run([nm, "-D", str(library)], capture_output=True, text=True, check=True)
    launched = re.findall(r"GPU_LAUNCH\(\((\w+)", path.read_text())
    starts = tuple(f"_ZN8fastdiff{len(name)}{name}{c}" for name in launched for c in "IE")
    host = {line.split()[-1] for line in out.stdout.splitlines()}
    assert compiled == {name for name in host if name.startswith(starts)}


@pytest.mark.slow
def test_launches_are_those_of_the_library_that_nvcc_builds(libraries, tmp_path):
    reason = testing_cuda.why_not()
    if reason:
        pytest.skip(reason)
    path = testing_cuda.library(("sm_80",))
    for case in (*cases(torch.bfloat16), *float8_cases(torch.bfloat16)):
        if not testing_cuda.has_kernel(case.op, torch.bfloat16):
            continue
        want = [
            [n["kernel"], *map(str, [*n["grid"], *n["block"], n["shared"]])]
            for n in testing_cuda.launches(case, path)
        ]
        assert want
        script = f"""
from fastdiff import _native, _nvrtc, testing_cuda
from fastdiff.gpu_cases import cases, float8_cases
import torch
_nvrtc.cached = lambda source, arch: source.stem.encode() + bytes(1)
of = (*cases(torch.bfloat16), *float8_cases(torch.bfloat16))
case = next(c for c in of if (c.op, c.name) == {(case.op, case.name)!r})
_native._C.load_gpu_library({str(libraries[0])!r}, True)
_nvrtc.serve({str(libraries[0])!r})
args, kwargs = case.make()
_native._C.set_emulating(True)
from fastdiff import ops
getattr(ops, case.op)(*args, **kwargs, impl="native")
"""
        log = tmp_path / f"{case.op}-{abs(hash(case.name))}"
        env = {**os.environ, "FAKE_LOG": str(log), "LD_LIBRARY_PATH": str(libraries[1])}
        subprocess.run([sys.executable, "-c", script], env=env, check=True)
        calls = [line.split() for line in log.read_text().splitlines()]
        assert [c[1:9] for c in calls if c[0] == "cuLaunchKernel"] == want, case
