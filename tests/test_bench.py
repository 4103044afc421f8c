"""The benchmarks take the device asked for: everything that they make and compute is on it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import fastdiff

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("fastdiff_bench_run", BENCH / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("op", sorted(p.stem for p in BENCH.glob("*.py") if p.stem[0] != "_"))
def test_every_arm_stays_on_the_device(run, op):
    """On ``meta`` any tensor that a case makes elsewhere is an error, and nothing is computed."""
    if op not in run.names():
        pytest.skip("no cases to time")
    if op in ("adapters", "caches", "methods", "mode", "moe", "precision", "sparse_grad"):
        pytest.skip("whole runs, loops that decide by values, or torch's sparse CSR")
    with torch.device("meta"):
        cases = list(run.load(BENCH / f"{op}.py").cases())
    for case in cases:
        for name, arm in {"fast": case.fast, **case.baselines}.items():
            if name == "compile":
                continue
            with fastdiff.use("ref"):
                out = run.outputs(arm())
            assert {t.device.type for t in out} == {"meta"}, f"{case.name}, {name}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_device_is_one_sentence(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["gelu_tanh", "--device", "cuda"])
    assert stop.value.code == 2
    assert "--device is cuda, need a CUDA device" in capsys.readouterr().err
