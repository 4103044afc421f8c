"""What each GPU kernel could reach, from its machine code: computed, not measured on a GPU.

python bench/roofline.py [--dtype bfloat16] [--only TEXT]

For each call of ``fastdiff/gpu_cases.py``: bytes that it must move (every input read once, every
output written once), operations of its matrix products, the least time that either takes on the
GPU, and of each kernel registers, shared memory and occupancy. Triton kernels are compiled by
triton, CUDA kernels by nvcc where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastdiff import gpu_cases, testing_cuda
from fastdiff.gpu_limits import occupancy


class Gpu(NamedTuple):
    """Rates that the maker states; matrix products dense, summed in float32."""

    name: str
    target: str
    bandwidth: float  # byte/s
    matrix: float  # FLOP/s of bfloat16 and float16
    tf32: float  # FLOP/s


GPUS = (
    Gpu("H100 SXM", "sm_90", 3.35e12, 989e12, 494.5e12),
    Gpu("RTX 4090", "sm_89", 1.008e12, 165e12, 82.6e12),
)
MARK = "computed, not measured on a GPU"


def matrix_flops(case: gpu_cases.Case) -> float:
    """Multiplications and additions of the call's matrix products; 0 for ops without one."""
    if case.op == "grouped_linear":
        (x, weight, *_), kwargs = case.make()
        return 2.0 * kwargs.get("index", x).shape[0] * weight[0].numel()
    if case.op == "grouped_weight_grad":
        (grad, x, _), _ = case.make()
        return 2.0 * grad.numel() * x.shape[1]
    if case.op == "lora_add":
        (y, x, down, *_), _ = case.make()
        return 2.0 * down.shape[1] * (y.numel() + x.numel())
    if case.op == "sparse_weight_grad":  # the dense product's, which its kernels form
        (grad, x, _), _ = case.make()
        return 2.0 * grad.numel() * x.shape[1]
    if case.op == "sparse_conv2d_weight_grad":
        (grad, _, index), _ = case.make()
        return 2.0 * grad.numel() * index.sizes[1]
    if case.op not in ("attention", "quant_attention"):
        return 0.0
    (q, k, _), _ = case.make()
    batch, heads, rows, dim = q.shape
    return 4.0 * batch * heads * rows * k.shape[2] * dim


def least_time(gpu: Gpu, moved: float, flops: float, dtype: str) -> tuple[float, str]:
    """Seconds that memory or tensor cores need at the stated rates, and which of them it is.

    A float32 product is three of tf32.
    """
    matrix = 3 * flops / gpu.tf32 if dtype == "float32" else flops / gpu.matrix
    return max((moved / gpu.bandwidth, "memory"), (matrix, "tensor cores"))


def _triton(dtype: str, only: str) -> Iterator[dict[str, Any]]:
    targets = [gpu.target for gpu in GPUS]
    command = [sys.executable, "-m", "fastdiff.testing_compile", *targets, "--dtype", dtype]
    done = subprocess.run(
        [*command, "--only", only],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"roofline: {done.stderr[-2000:]}")
    for line in done.stdout.splitlines():
        report = json.loads(line)
        yield report | {"by": "Triton", "threads": 32 * report["warps"]}


def _cuda(dtype: str, only: str) -> Iterator[dict[str, Any]]:
    path = testing_cuda.library()
    code = {gpu.target: testing_cuda.code(path, gpu.target) for gpu in GPUS}
    for case in gpu_cases.cases(getattr(torch, dtype)):
        if only not in case.op or not testing_cuda.has_kernel(case.op, getattr(torch, dtype)):
            continue
        for launch in testing_cuda.launches(case, path):
            x, y, z = launch["block"]
            for target, kernels in code.items():
                kernel = kernels[launch["kernel"]]
                yield launch | {
                    "by": "CUDA",
                    "target": target,
                    "threads": x * y * z,
                    "registers": kernel.registers,
                    "kernel": testing_cuda.readable(launch["kernel"]),
                }


def table(reports: list[dict[str, Any]], dtype: str) -> str:
    """The reports as markdown, one line per call, kernel and GPU; repeated kernels once."""
    lines = [
        f"{dtype}; {MARK}",
        "",
        "| op | call | kernel | GPU | MB | GFLOP | bound, us | registers | shared, KiB "
        "| occupancy |",
        "|" + "---|" * 10,
    ]
    flops = {(c.op, c.name): matrix_flops(c) for c in gpu_cases.cases(getattr(torch, dtype))}
    for report in reports:
        (gpu,) = (gpu for gpu in GPUS if gpu.target == report["target"])
        work = flops[report["op"], report["case"]]
        seconds, bound = least_time(gpu, report["bytes"], work, dtype)
        fill = occupancy(gpu.target, report["threads"], report["registers"], report["shared"])
        cells = (
            report["op"],
            report["case"],
            f"{report['by']} {report['kernel']}",
            gpu.name,
            f"{report['bytes'] / 1e6:.2f}",
            f"{work / 1e9:.3g}" if work else "no matrix product",
            f"{seconds * 1e6:.2f} ({bound})",
            str(report["registers"]),
            f"{report['shared'] / 1024:.1f}",
            f"{100 * fill.share:.0f} % ({fill.blocks} blocks; {fill.limit})",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(dict.fromkeys(lines))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--only", default="", metavar="TEXT", help="ops whose name contains TEXT")
    args = parser.parse_args()
    reports = list(_triton(args.dtype, args.only))
    reason = testing_cuda.why_not()
    if reason is None:
        reports += _cuda(args.dtype, args.only)
    order = {case.op: i for i, case in enumerate(gpu_cases.cases(torch.float32))}
    reports.sort(key=lambda r: (order[r["op"]], r["case"], r["target"]))
    print(table(reports, args.dtype))
    if reason is not None:
        print(f"\nNo CUDA kernels: {reason}")


if __name__ == "__main__":
    main()
