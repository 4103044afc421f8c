"""The library that nvcc builds, without a driver; and NVRTC's code beside nvcc's."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastdiff import _native, _nvrtc

KERNELS = sorted(p for p in _nvrtc.CSRC.glob("cuda/*.cu") if p.stem != "library")

# Where NVRTC needs fewer registers than nvcc, by up to a fifth: its front end addresses shared
# memory with 64 bits, nvcc's with 32, no option of NVRTC changes that, and ptxas schedules anew.
FEWER = {
    ("aggregate_features", "sm_120a"),
    ("fused_step", "sm_120a"),
    ("group_norm_silu", "sm_80"),
    ("group_norm_silu", "sm_90a"),
    ("moe", "sm_120a"),
}


def test_kernels_have_one_name_for_both_compilers():
    """`int64_t` is `long` to nvcc and `long long` to NVRTC: no template argument of a kernel."""
    for path in KERNELS:
        text = path.read_text()
        launched = re.findall(r"GPU_LAUNCH\(\(?([^()]+)", text)
        made = re.findall(r"template __global__ void (\w+<[^(]*>)\(", text)
        assert launched and not [n for n in launched + made if re.search("int64_t|long", n)], path


@pytest.mark.skipif(not _native.GPU_LIBRARY.exists(), reason="built without nvcc")
class TestLibrary:
    def test_every_kernel_file_has_its_entry(self):
        for path in KERNELS:
            for op in re.findall(r'extern "C" int fastdiff_gpu_(\w+)\(', path.read_text()):
                assert _native._C.why_not_gpu(op) == ""

    def test_an_op_without_a_kernel_says_so(self):
        assert _native._C.why_not_gpu("gelu_tanh").endswith("has no gelu_tanh")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_launch_without_a_driver_reports_it(self):
        library = ctypes.CDLL(str(_native.GPU_LIBRARY))
        library.fastdiff_gpu_error_string.restype = ctypes.c_char_p
        arguments = (ctypes.c_int64 * 64)()  # all absent, one sample of one token
        arguments[:] = [0] * 64
        code = library.fastdiff_gpu_layer_norm_modulate(ctypes.byref(arguments), None)
        assert code != 0
        assert b"CUDA" in library.fastdiff_gpu_error_string(code)


def registers(cubin, tmp_path):
    """Registers and stack of every kernel, by its mangled name."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = tmp_path / "x.cubin"
    path.write_bytes(cubin)
    text = subprocess.run(
        [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(reg) for name, reg in re.findall(r"Function (\S+):\s+REG:(\d+)", text)}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ("sm_80", "sm_90a", "sm_120a"))
@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_nvrtc_gives_what_nvcc_gives(path, arch, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    try:
        ours = registers(_nvrtc.compile(path, arch), tmp_path)
    except RuntimeError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise
    flags = ["-std=c++17", "-O3", f"-I{_nvrtc.CSRC}", f"-I{_nvrtc.CSRC / 'cuda'}", f"-arch={arch}"]
    out = tmp_path / "nvcc.cubin"
    subprocess.run([nvcc, *flags, "-cubin", str(path), "-o", str(out)], check=True)
    theirs = registers(out.read_bytes(), tmp_path)
    assert theirs and set(theirs) <= set(ours)
    for name, count in theirs.items():
        bound = max(2, 0.1 * count)
        if (path.stem, arch) in FEWER:
            assert ours[name] <= count + bound, name
        else:
            assert abs(ours[name] - count) <= bound, name
