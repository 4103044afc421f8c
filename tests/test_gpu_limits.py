"""Occupancy against cases of NVIDIA's occupancy calculator, and against its header."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fastdiff.gpu_limits import LIMITS, occupancy

KIB = 1024


@pytest.mark.parametrize(
    "args, blocks, share, limit",
    [
        (("sm_80", 256, 32, 0), 8, 1.0, "warps"),
        (("sm_80", 256, 64, 0), 4, 0.5, "registers"),
        (("sm_80", 256, 255, 0), 1, 0.125, "registers"),
        (("sm_80", 128, 255, 0), 2, 0.125, "registers"),
        (("sm_80", 32, 32, 0), 32, 0.5, "blocks"),
        (("sm_80", 256, 32, 48 * KIB), 3, 0.375, "shared memory"),
        (("sm_80", 256, 32, 163 * KIB), 1, 0.125, "shared memory"),
        (("sm_86", 128, 40, 0), 12, 1.0, "warps"),
        (("sm_86", 64, 32, 0), 16, 32 / 48, "blocks"),
        (("sm_89", 64, 32, 0), 24, 1.0, "warps"),
        (("sm_89", 1024, 32, 0), 1, 32 / 48, "warps"),
        (("sm_90", 256, 32, 48 * KIB), 4, 0.5, "shared memory"),
        (("sm_90", 384, 168, 227 * KIB), 1, 12 / 64, "registers"),
        (("sm_120", 256, 64, 99 * KIB), 1, 8 / 48, "shared memory"),
        (("sm_120", 256, 32, 100 * KIB), 0, 0.0, "shared memory"),
        (("sm_100", 1024, 65, 0), 0, 0.0, "registers"),
    ],
)
def test_known_cases(args, blocks, share, limit):
    got = occupancy(*args)
    assert (got.blocks, got.limit) == (blocks, limit)
    assert got.share == pytest.approx(share)
    assert got.warps == blocks * -(-args[1] // 32)


@pytest.mark.parametrize(
    "args, message",
    [
        (("sm_70", 32, 32, 0), "target is 'sm_70', need one of sm_80"),
        (("sm_80", 0, 32, 0), "threads is 0, need 1 to 1024"),
        (("sm_80", 32, 256, 0), "registers is 256, need 1 to 255"),
        (("sm_80", 32, 32, -1), "shared is -1, need at least 0"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=f"occupancy: {message}"):
        occupancy(*args)


PROGRAM = r"""
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int arch, blocks, warps, shared, most, threads, registers, used;
  while (std::scanf("%d %d %d %d %d %d %d %d", &arch, &warps, &blocks, &shared, &most, &threads,
                    &registers, &used) == 8) {
    cudaOccDeviceProp p;
    p.computeMajor = arch / 10, p.computeMinor = arch % 10;
    p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = 32 * warps;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.warpSize = 32;
    p.sharedMemPerBlock = 49152, p.sharedMemPerMultiprocessor = shared;
    p.sharedMemPerBlockOptin = most, p.reservedSharedMemPerBlock = 1024, p.numSms = 1;
    cudaOccFuncAttributes f;
    f.maxThreadsPerBlock = 1024, f.numRegs = registers, f.sharedSizeBytes = 0;
    f.partitionedGCConfig = PARTITIONED_GC_OFF, f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    f.maxDynamicSharedSizeBytes = most, f.numBlockBarriers = 1;
    cudaOccDeviceState s;
    s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult r;
    int error = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, threads, used);
    std::printf("%d %d\n", error, r.activeBlocksPerMultiprocessor);
  }
}
"""


def test_equals_nvidias_header(tmp_path):
    triton = pytest.importorskip("triton")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if not (include / "cuda_occupancy.h").exists() or not shutil.which("g++"):
        pytest.skip("needs g++ and the cuda_occupancy.h of triton's wheel")
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(PROGRAM)
    subprocess.run(["g++", f"-I{include}", str(source), "-o", str(program)], check=True)
    cases, lines = [], []
    for name, sm in LIMITS.items():
        arch = int(name.removeprefix("sm_"))
        for threads in (1, 32, 33, 64, 96, 128, 160, 256, 384, 512, 768, 1024):
            for registers in (1, 24, 32, 33, 40, 63, 64, 72, 96, 128, 168, 200, 255):
                for shared in (0, 1, 128, 1000, 8192, 24577, 49152, 65536, 100000, 101376):
                    cases.append((name, threads, registers, shared))
                    fields = (arch, *sm, threads, registers, shared)
                    lines.append(" ".join(map(str, fields)))
    text = subprocess.run(
        [str(program)], input="\n".join(lines), capture_output=True, text=True, check=True
    ).stdout
    for case, line in zip(cases, text.splitlines(), strict=True):
        assert line == f"0 {occupancy(*case).blocks}", case
