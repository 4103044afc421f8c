import os
import subprocess
import sys

import pytest
import torch

import fastdiff
from fastdiff import _native, testing
from fastdiff.ops import gelu_tanh

built = pytest.mark.skipif(not fastdiff.cpu_levels(), reason="needs the compiled extension")


def python(code, **env):
    """``code`` in a fresh interpreter."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_without_the_extension_every_op_runs_on_its_reference():
    code = """
import sys, torch
sys.modules["fastdiff._C"] = None  # import raises ImportError
import fastdiff
from fastdiff import ops
x, q = torch.randn(2, 6, 8), torch.randn(2, 2, 6, 8)
v = torch.randn(2, 8)
calls = {
    "attention": (q, q, q), "gelu_tanh": (x,), "geglu": (x,), "linear": (x, v),
    "qk_norm_rope": (q, q), "layer_norm_modulate": (x, v, v), "gate_residual": (x, x, v),
    "gate_residual_norm_modulate": (x, x, v, v, v), "group_norm_silu": (x, 2),
}
for name, args in calls.items():
    op = getattr(ops, name)
    op(*args)
    why = fastdiff.explain(op, *args)
    assert why.get("native", "does not load").count("does not load"), why
    assert why["ref"] is None, why
print(fastdiff.cpu_level(), fastdiff.cpu_levels())
for call in (lambda: fastdiff.set_cpu_level("avx2"), lambda: ops.gelu_tanh(x, impl="native")):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    out = python(code).communicate()[0].splitlines()
    assert out[0] == "none []"
    assert "set_cpu_level: fastdiff._C does not load" in out[1]
    assert "gelu_tanh: row native refuses: fastdiff._C does not load" in out[2]


SHOW = "import fastdiff; print(fastdiff.cpu_level(), fastdiff.cpu_levels())"


@built
def test_level_from_the_environment():
    levels = fastdiff.cpu_levels()
    wants = {
        levels[0]: f"{levels[0]} {levels}",
        "avx512_bf16": f"{levels[-1]} {levels}",  # lowers the level, never raises it
        "sse9": "FASTDIFF_CPU=sse9: need avx2, avx2_vnni, avx512",
    }
    runs = {value: python(SHOW, FASTDIFF_CPU=value) for value in wants}
    for value, want in wants.items():
        assert want in runs[value].communicate()[0]


@built
def test_set_cpu_level():
    before = fastdiff.cpu_level()
    for level in fastdiff.cpu_levels():
        with testing.cpu_level(level):
            assert fastdiff.cpu_level() == level
            gelu_tanh(torch.ones(20), impl="native")
    assert fastdiff.cpu_level() == before
    with pytest.raises(ValueError, match="'sse9' is not a level of this processor"):
        fastdiff.set_cpu_level("sse9")
    assert fastdiff.cpu_level() == before


@built
def test_native_rows_say_why_not():
    cases = [
        (torch.ones(2, device="meta"), "a tensor is on meta"),
        (torch.ones(2, dtype=torch.float64), "dtype torch.float64 is not one of"),
    ]
    for x, message in cases:
        assert message in _native.why_not_native(x)
    assert _native.why_not_native(torch.ones(2), None) is None


@built
@pytest.mark.parametrize("op", ("gelu_tanh", "geglu", "qk_norm_rope"))
def test_native_rows_are_registered_for_the_cpu(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff::{op}", "CPU")


def test_keep_memory_ends_page_faults():
    """A block of 64 MiB that is freed and allocated again costs no new pages."""
    code = """
import platform, resource, torch, fastdiff
if platform.libc_ver()[0] != "glibc":
    raise SystemExit(77)
assert fastdiff.keep_memory()
for i in range(20):
    if i == 10:  # where to put it is settled by then
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000  # 16,384 pages a block


def test_an_extension_of_other_sources_counts_as_none(monkeypatch):
    for name in ("_C", "load_error"):
        monkeypatch.setattr(_native, name, getattr(_native, name))
    with pytest.raises(RuntimeError, match="older than the package, as it has no no_such_op"):
        _native.native("no_such_op")()
    why = fastdiff.explain(fastdiff.ops.gelu_tanh, torch.ones(3))
    assert "older than the package" in why["native"] and why["ref"] is None
