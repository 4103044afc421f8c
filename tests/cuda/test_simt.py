"""The model itself: planted faults are found, by it or by a sanitizer, and controls pass."""

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff import testing_simt

PROBES = Path(__file__).with_name("probes.cu")
CALL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.simt_mode(ctypes.c_uint64(0), True, False)
x, y = (ctypes.c_float * 4096)(), (ctypes.c_float * 4096)()
at = [(ctypes.addressof(a) + 15) // 16 * 16 for a in (x, y)]
sys.exit(getattr(library, "probe_" + sys.argv[2])(*map(ctypes.c_void_p, at)))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    path = testing_simt.build(tmp_path_factory.mktemp("plain"), sources=[PROBES])
    library = ctypes.CDLL(str(path))
    library.simt_error.restype = ctypes.c_char_p
    library.simt_counters.restype = testing_simt._Counters
    library.simt_mode.argtypes = [ctypes.c_uint64, ctypes.c_bool, ctypes.c_bool]
    return library


def run(library, name, mode=(0, False, False), x=None, y=None):
    """(error code, sentence, what the probe wrote)."""
    library.simt_mode(*mode)
    x = torch.zeros(1024) if x is None else x
    y = torch.arange(1024.0) if y is None else y
    code = getattr(library, f"probe_{name}")(*(ctypes.c_void_p(t.data_ptr()) for t in (x, y)))
    return code, library.simt_error().decode(), x


@pytest.mark.parametrize("mode", testing_simt.MODES)
def test_controls(probes, mode):
    code, words, x = run(probes, "barrier", mode)
    assert code == 0 and not words and x[:64].tolist() == [*range(1, 64), 0]
    assert run(probes, "blocks_add", mode)[2][0] == 4
    assert run(probes, "copied", mode)[2][:16].tolist() == list(range(1, 64, 4))
    assert run(probes, "warp_ordered", mode)[2][:32].tolist() == [1.0] * 32


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("divergent", "__syncthreads"),
        ("left", "__syncthreads"),
        ("lanes_apart", "different collectives"),
        ("wrong_mask", "mask leaves it out"),
        ("outside_mask", "outside its mask"),
        ("past_shared", "past its end"),
        ("uncommitted", "never committed"),
        ("misaligned", "not 16-byte aligned"),
        ("too_many_threads", "outside what a GPU takes"),
        ("too_much_shared", "outside what a GPU takes"),
    ],
)
def test_faults_that_the_model_reports(probes, name, words):
    code, said, _ = run(probes, name)
    assert code != 0 and words in said, said


def test_shared_memory_starts_as_nan(probes):
    assert run(probes, "unset_shared")[2][:64].isnan().all()


def test_a_copy_lands_no_sooner_than_its_wait(probes):
    assert run(probes, "copied_without_wait", (0, False, False))[2][:16].isnan().all()
    assert run(probes, "copied_without_wait", (0, False, True))[2][1] == 5  # may land at once


def test_matrices_and_bank_conflicts(probes):
    want = 16.0 * torch.arange(16.0)[:, None].expand(16, 8)
    for name, conflicts in (("matrix", 0), ("matrix_with_conflicts", 28)):
        probes.simt_counters()
        assert torch.equal(run(probes, name)[2][:128].view(16, 8), want)
        seen = probes.simt_counters()
        assert (seen.ldmatrix, seen.mma, seen.bank_conflicts) == (1, 1, conflicts)


def test_matrices_of_int8(probes):
    i, k, j = torch.arange(16)[:, None], torch.arange(32), torch.arange(8)
    a = (i + k) * (1 - k % 2 * 2)
    b = torch.zeros(32, 8, dtype=torch.int64)
    for thread in range(4):
        for n in range(8):
            b[4 * thread + n % 4 + n // 4 * 16] = j - 3 + n
    start = torch.zeros(16, 8, dtype=torch.int64)
    start[:8, ::2], start[8:, 1::2] = 1000000, -5
    assert torch.equal(run(probes, "matrix_int8")[2][:128].view(16, 8).long(), start + a @ b)


def float8_product(probes, a, b, start):
    """[16, 32] by [32, 8] of float8_e4m3fn, added to [16, 8]."""
    x = torch.zeros(1024)
    x[:128] = start.flatten()
    y = torch.cat((a.flatten(), b.t().flatten())).view(torch.uint8)
    code, words, x = run(probes, "matrix_float8", x=x, y=y.contiguous())
    assert code == 0, words
    return x[:128].view(16, 8)


def test_matrices_of_float8(probes):
    """Sums that 13 bits of fraction hold are exact; what is below them is cut off."""
    a = (torch.randint(-8, 9, (16, 32)) / 4).to(torch.float8_e4m3fn)
    b = torch.randint(-8, 9, (32, 8)).to(torch.float8_e4m3fn)
    start = torch.randint(-64, 65, (16, 8)).float()
    want = start.double() + a.double() @ b.double()
    assert torch.equal(float8_product(probes, a, b, start).double(), want)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    zeros = torch.zeros(16, 32).to(torch.float8_e4m3fn)
    b = torch.zeros(32, 8).to(torch.float8_e4m3fn)
    b[3] = torch.ones(8).to(torch.float8_e4m3fn)
    for part in every.split(16):
        a = zeros.clone()
        a[:, 3] = part
        got = float8_product(probes, a, b, torch.zeros(16, 8))
        want = part.float()[:, None].expand(16, 8)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    a = zeros.clone()
    a[:, 3] = (2.0 ** -torch.arange(16)).to(torch.float8_e4m3fn)  # down to 2^-9, then 0
    start, kept = torch.full((16, 8), 8192.0), 16 * 2.0 ** -torch.arange(16)
    kept[5:] = 0.0  # below 1
    for sign in (1, -1):
        got = float8_product(probes, a, (16 * sign * b.float()).to(b.dtype), start)
        assert torch.equal(got, start + sign * kept[:, None])


def test_float8_is_rounded_to_the_nearest(probes):
    """By the instruction and by integers: torch's bits, of all values and of what lies halfway."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    known = every[every.isfinite()].unique()
    halves = (known[1:] + known[:-1]) / 2
    edges = torch.tensor([448.0, 464.0, 480.0, 1e9, 3e38, math.inf, 2.0**-10, 2.0**-11, 1e-45])
    near = torch.cat((known, halves, edges, -edges, torch.tensor([math.nan, -0.0])))
    x = torch.cat((near, near.nextafter(torch.tensor(math.inf)),
                   near.nextafter(torch.tensor(-math.inf)), torch.randn(4096) * 100,
                   torch.randn(2048) * 2.0 ** torch.randint(-14, 10, (2048,))))  # fmt: skip
    x = torch.nn.functional.pad(x, (0, -len(x) % 512))
    for part in x.split(512):
        y = torch.zeros(1024)
        y[:512] = part
        want = part.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        want = torch.where(part.isnan(), 0x7F, want).float()
        code, words, got = run(probes, "float8", y=y)
        assert code == 0, words
        assert torch.equal(got[:512], want) and torch.equal(got[512:], want)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return {
        name: testing_simt.build(tmp_path_factory.mktemp(name), flags, [PROBES])
        for name, flags in testing_simt.SANITIZERS.items()
    }


@pytest.mark.parametrize(
    ("sanitizer", "name", "finds"),
    [
        ("address", "barrier", None),
        ("address", "matrix", None),
        ("address", "matrix_int8", None),
        ("address", "matrix_float8", None),
        ("address", "float8", None),
        ("address", "past_shared", "AddressSanitizer"),
        ("thread", "barrier", None),
        ("thread", "warp_ordered", None),
        ("thread", "copied", None),
        ("thread", "matrix", None),
        ("thread", "matrix_int8", None),
        ("thread", "matrix_float8", None),
        ("thread", "blocks_add", None),
        ("thread", "no_barrier", "data race"),
        ("thread", "warp_unordered", "data race"),
        ("thread", "blocks_race", "data race"),
    ],
)
def test_what_sanitizers_find(sanitized, sanitizer, name, finds):
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(sanitized[sanitizer]), name],
        env=testing_simt.sanitizer_environment(sanitizer),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if finds is None:
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert done.returncode != 0 and finds in done.stderr, done.stderr[-3000:]
