"""Compiles the Triton kernels for GPUs that this machine lacks and reads what their code needs.

``python -m fastdiff.testing_compile sm_80 gfx942`` launches every kernel at the shapes of real
models (``fastdiff/gpu_cases.py``) up to the point where it would run, and prints one JSON line per
compiled kernel. It needs a process of its own: under ``TRITON_INTERPRET=1`` there is nothing to
compile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastdiff import kernels, ops
from fastdiff.gpu_cases import Case, cases, float8_cases, traffic
from fastdiff.gpu_code import read_amdgcn, read_cubin

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("bfloat16", "float16", "float32")


class _NoDevice:
    """A driver of the target, with no device behind it."""

    def __init__(self, target: str) -> None:
        if target.startswith("gfx"):
            self.target = GPUTarget("hip", target, 64)
        else:
            self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int | str:
        return self.target.arch  # caches of compiled kernels are per device

    def get_current_stream(self, device: int | str) -> int:
        return 0


@contextmanager
def compiled(target: str) -> Iterator[list[dict[str, Any]]]:
    """Inside the block launches compile for ``target`` and do not run; the list has the results."""
    reports: list[dict[str, Any]] = []
    stock, active = JITFunction.run, driver._active

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = stock(self, *args, grid=grid, warmup=True, **kwargs)
        asm = kernel.asm
        code = read_cubin(asm["cubin"]) if "cubin" in asm else read_amdgcn(asm["amdgcn"])
        reports.append(
            {
                "kernel": self.__name__.strip("_"),
                "target": target,
                "blocks": list(grid),
                "warps": kernel.metadata.num_warps,
                "registers": code.registers,
                "stack": code.stack,
                "spills": code.spills,
                "shared": kernel.metadata.shared,
                "dot": "tt.dot" in asm["ttir"],
                "tensor": code.tensor,
            }
        )
        return kernel

    driver.set_active(_NoDevice(target))
    JITFunction.run = run
    try:
        yield reports
    finally:
        JITFunction.run = stock
        driver._active = active


def refusal(case: Case) -> str | None:
    """Why the Triton row does not take this call away from the CPU, or None."""
    module = sys.modules[getattr(ops, case.op).__module__]
    rows, row_args = module.TABLES[case.op]
    (row,) = (row for row in rows if row.name == "triton")
    with torch.device("meta"):
        args, kwargs = case.make()
        return row.why_not(*row_args(*args, **kwargs))


def launch(case: Case, target: str, every: bool = False) -> Iterator[dict[str, Any]]:
    """Compile one call; ``every``: with all configurations in place of the one that it picks.

    Nothing where the row refuses.
    """
    if refusal(case) is not None:
        return
    module = sys.modules[getattr(ops, case.op).__module__]
    stem = module.__name__.rpartition(".")[2]
    triton_module = importlib.import_module(f"fastdiff.kernels.{stem}")
    args, kwargs = case.make()
    row_args = module.TABLES[case.op][1](*args, **kwargs)
    for config in triton_module.CONFIGS if every else (None,):
        choice = {} if config is None else {"config": config}
        with compiled(target) as found:
            out = getattr(triton_module, case.op)(*row_args, **choice)
        extra = {"config": str(config)} if every else {}
        for report in found:
            yield (
                {"op": case.op, "case": case.name}
                | report
                | extra
                | {"bytes": traffic(case.op, row_args, out)}
            )


def reports(
    targets: list[str],
    dtypes: list[str],
    only: str = "",
    every: bool = False,
    float8: bool = False,
) -> Iterator[dict[str, Any]]:
    """All cases whose op's name contains ``only``, for every dtype and target; ``float8``: those
    with products of float8_e4m3fn instead."""
    for dtype in dtypes:
        for case in (float8_cases if float8 else cases)(getattr(torch, dtype)):
            for target in targets if only in case.op else ():
                for report in launch(case, target, every):
                    yield report | {"dtype": dtype}


def main() -> None:
    """One JSON line per compiled kernel."""
    if kernels.INTERPRET:
        raise SystemExit("testing_compile: TRITON_INTERPRET=1 is set, and then nothing compiles")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*", default=list(TARGETS), help="sm_80, gfx942, ...")
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES))
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--every", action="store_true", help="every configuration")
    parser.add_argument("--float8", action="store_true", help="the calls with float8_e4m3fn")
    args = parser.parse_args()
    for report in reports(args.target, args.dtype, args.only, args.every, args.float8):
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
