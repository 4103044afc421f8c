"""The table of kernels: for every op and implementation where it has run and what it compiles to.

``fastdiff info --kernels`` prints it. Registers, spills and shared memory are read from machine
code that is compiled for it: minutes, and triton and nvcc are needed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from fastdiff import info, ops, testing_cuda
from fastdiff.gpu_cases import Case, cases, float8_cases

DTYPES = ("bfloat16", "float16", "float32")
TRITON_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
HEAD = (
    "| op | implementation | dtypes | executed | compiled for | registers | spills | shared, KiB |"
)
LEVELS = ("avx2", "avx512", "avx512_bf16")
INT8_LEVELS = ("avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16")
INT8 = ("grouped_quant_linear", "quant_attention", "quant_linear")  # as in setup.py
_LIBRARY = "torch's own matrix product"
_BOUND = "none: bound by memory, and Triton's reads and writes each element once as well"
# Ops without a CUDA kernel, and why.
NO_CUDA = {
    "conv3x3": "none: cuDNN, row torch",
    "geglu": _BOUND,
    "gelu_tanh": _BOUND,
    "linear": f"none: {_LIBRARY} (cuBLAS, row torch)",
    "qk_norm_rope": _BOUND,
}
NO_TRITON = {
    "conv3x3": "none: cuDNN, row torch",
    "linear": f"none: {_LIBRARY} (cuBLAS, row torch)",
}
Found = dict[tuple[str, str], list[dict[str, Any]]]  # (op, dtype): compiled kernels


def _rows(op: str) -> set[str]:
    return {row.name for row in sys.modules[getattr(ops, op).__module__].TABLES[op][0]}


def triton_code() -> Found:
    """Everything that ``fastdiff.testing_compile`` compiles, in a process where nothing interprets.

    Raises:
        RuntimeError: it fails; with its last words.
    """
    command = [sys.executable, "-m", "fastdiff.testing_compile", *TRITON_TARGETS]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"info --kernels: {done.stderr[-2000:]}")
    found: Found = defaultdict(list)
    for line in done.stdout.splitlines():
        report = json.loads(line)
        found[report["op"], report["dtype"]].append(report)
    return found


def cuda_code() -> Found:
    """The CUDA kernels that the calls of ``gpu_cases`` launch, for every target.

    Raises:
        RuntimeError: nvcc is missing or fails.
    """
    path = testing_cuda.library()
    code = {target: testing_cuda.code(path, target) for target in testing_cuda.TARGETS}
    found: Found = defaultdict(list)
    for dtype in DTYPES:
        every: list[tuple[Case, tuple[str, ...]]]
        every = [(case, testing_cuda.TARGETS) for case in cases(getattr(torch, dtype))]
        every += [(case, testing_cuda.FLOAT8) for case in float8_cases(getattr(torch, dtype))]
        for case, targets in every:
            if not testing_cuda.has_kernel(case.op, getattr(torch, dtype)):
                continue
            for launch in testing_cuda.launches(case, path):
                for target in targets:
                    kernel = code[target][launch["kernel"]]
                    found[case.op, dtype].append(
                        {
                            "target": target,
                            "registers": kernel.registers,
                            "spills": kernel.spills,
                            "shared": launch["shared"],
                        }
                    )
    return found


def _numbers(op: str, found: Found) -> list[str]:
    """Cells "registers", "spills" and "shared": least to most over kernels, calls and targets."""

    def span(field: str, scale: int = 1, form: str = "{:.0f}") -> str:
        cells = []
        for dtype in DTYPES:
            values = [r[field] / scale for r in found[op, dtype]]
            if not values:
                continue  # a dtype that the kernel does not take
            low, high = form.format(min(values)), form.format(max(values))
            cells.append(low if low == high else f"{low}-{high}")
        return cells[0] if len(set(cells)) == 1 else " / ".join(cells)

    return [span("registers"), span("spills"), span("shared", 1024, "{:.1f}")]


def _native_dtypes(op: str) -> str:
    row = "few_rows" if op == "linear" else "native"
    taken = (d for d in DTYPES if info.why(op, getattr(torch, d), "cpu")[row] is None)
    return ", ".join(taken)


def _cuda_dtypes(op: str) -> str:
    return ", ".join(d for d in DTYPES if testing_cuda.has_kernel(op, getattr(torch, d)))


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def rows(triton: Found | None, cuda: Found | None) -> list[str]:
    """Lines of the table; None: the three cells that machine code fills are left out."""
    lines = []
    dtypes = ", ".join(DTYPES)
    for op in info.op_names():
        have, nothing = _rows(op), ["-"] * 5
        of_cpu = ["not read for a CPU"] * 3
        levels = ", ".join(INT8_LEVELS if op in INT8 else LEVELS)
        taken = _native_dtypes(op)
        lines.append(_line(op, "native, CPU", taken, "CPU, at every level", levels, *of_cpu))
        kinds: Iterable[tuple[str, bool, Found | None, str, tuple[str, ...], dict[str, str]]] = (
            ("CUDA", testing_cuda.has_kernel(op), cuda,
             "CPU, in the model of CUDA (csrc/simt)", testing_cuda.TARGETS, NO_CUDA),
            ("Triton", "triton" in have, triton,
             "CPU, in Triton's interpreter", TRITON_TARGETS, NO_TRITON),
        )  # fmt: skip
        for name, exists, found, where, targets, reasons in kinds:
            if not exists:
                lines.append(_line(op, name, reasons[op], *nothing))
                continue
            numbers = [] if found is None else _numbers(op, found)
            taken = _cuda_dtypes(op) if name == "CUDA" else dtypes
            lines.append(_line(op, name, taken, where, ", ".join(targets), *numbers))
    return lines


def versions() -> str:
    """The compilers whose figures the table has."""
    import triton

    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\S+),", nvcc)
    return f"triton {triton.__version__}, nvcc {release[1] if release else 'unknown'}"


def markdown() -> str:
    """The whole table; raises RuntimeError where triton or nvcc is missing."""
    reason = testing_cuda.why_not()
    if reason:
        raise RuntimeError(f"info --kernels: {reason}")
    body = rows(triton_code(), cuda_code())
    return "\n".join([f"Compiled by {versions()}.", "", HEAD, "|---" * 8 + "|", *body])
