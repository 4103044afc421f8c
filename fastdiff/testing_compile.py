"""Compiles the Triton kernels for GPUs that this machine lacks and reads what their code needs.

``python -m fastdiff.testing_compile sm_80 sm_90`` launches every kernel at the shapes of real
models up to the point where it would run, and prints one JSON line per compiled kernel. It needs a
process of its own: under ``TRITON_INTERPRET=1`` there is nothing to compile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastdiff import kernels, ops
from fastdiff.ops import axial_rope
from fastdiff.ops.fused_step import COLUMNS

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoDevice:
    """A driver of the target, with no device behind it."""

    def __init__(self, target: str) -> None:
        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # caches of compiled kernels are per device

    def get_current_stream(self, device: int) -> int:
        return 0


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory (where registers spill to), of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


@contextmanager
def compiled(target: str) -> Iterator[list[dict[str, Any]]]:
    """Inside the block launches compile for ``target`` and do not run; the list has the results."""
    reports: list[dict[str, Any]] = []
    stock, active = JITFunction.run, driver._active

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = stock(self, *args, grid=grid, warmup=True, **kwargs)
        report = {
            "kernel": self.__name__.strip("_"),
            "target": target,
            "shared": kernel.metadata.shared,
        }
        reports.append(report | _resources(kernel.asm["cubin"]))

    driver.set_active(_NoDevice(target))
    JITFunction.run = run
    try:
        yield reports
    finally:
        JITFunction.run = stock
        driver._active = active


def cases(dtype: torch.dtype) -> dict[str, list[tuple[str, Callable[[], tuple[Any, ...]]]]]:
    """Per kernel module: (launcher, its arguments), at shapes of DiT, Flux and Stable Diffusion."""

    def t(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def args(op: str, *a: Any, **k: Any) -> Callable[[], tuple[Any, ...]]:
        module = sys.modules[getattr(ops, op).__module__]
        return lambda: module.TABLES[op][1](*a, **k)

    x, vector, table = t(2, 256, 1152), t(1152), t(2, 1152)
    rows = (x, x, table, table, table)
    q72, q128 = t(2, 16, 256, 72), t(1, 24, 256, 128)
    cos, sin = axial_rope(16, 16, 128)
    position = torch.zeros(1, 256, dtype=torch.int64)
    groups = ops.GroupBias(position, position, torch.zeros(1, 1, 2, 2))
    half = {"cos": cos[:, :36], "sin": sin[:, :36], "interleaved": False}
    image, latent = t(2, 320, 32, 32), t(2, 4, 64, 64)
    columns = torch.zeros(1, len(COLUMNS))
    return {
        "attention": [
            ("attention", args("attention", *[t(2, 16, 256, 64)] * 3)),
            ("attention", args("attention", *[q72] * 3, bias=groups)),
            ("attention", args("attention", *[q72] * 3, bias=t(2, 1, 256))),
        ],
        "fused_step": [
            ("fused_step", args("fused_step", latent, latent, columns, h1=latent, keep=True)),
            (
                "fused_step",
                args(
                    "fused_step",
                    latent,
                    torch.stack((latent, latent)),
                    columns,
                    w=torch.ones(2, 2),
                    rescale=0.7,
                    noise=ops.Noise(0, 0),
                ),
            ),
        ],
        "gelu_tanh": [
            ("gelu_tanh", args("gelu_tanh", x, vector)),
            ("gelu_tanh", args("gelu_tanh", x)),
        ],
        "geglu": [
            ("geglu", args("geglu", x, vector)),
            ("geglu", args("geglu", x, approximate="tanh")),
        ],
        "group_norm_silu": [
            ("group_norm_silu", args("group_norm_silu", image, 32, t(320), t(320))),
            (
                "group_norm_silu",
                args("group_norm_silu", image.to(memory_format=torch.channels_last), 32),
            ),
        ],
        "layer_norm_modulate": [
            ("layer_norm_modulate", args("layer_norm_modulate", x, table, table)),
            ("layer_norm_modulate", args("layer_norm_modulate", x, weight=vector, rms=True)),
            ("gate_residual", args("gate_residual", *rows[:3])),
            ("gate_residual_norm_modulate", args("gate_residual_norm_modulate", *rows)),
        ],
        "qk_norm_rope": [
            ("qk_norm_rope", args("qk_norm_rope", q128, q128, t(128), cos=cos, sin=sin)),
            ("qk_norm_rope", args("qk_norm_rope", q72, q72, **half, position=position)),
        ],
    }


def reports(
    targets: list[str], dtypes: list[torch.dtype], only: str = "", every: bool = False
) -> Iterator[dict[str, Any]]:
    """Compile; ``every``: all configurations of a launcher instead of the one that it picks."""
    for dtype in dtypes:
        for module_name, launches in cases(dtype).items():
            if only not in module_name:
                continue
            module = importlib.import_module(f"fastdiff.kernels.{module_name}")
            for launcher, make in launches:
                for target in targets:
                    for config in module.CONFIGS if every else (None,):
                        choice = {} if config is None else {"config": config}
                        with compiled(target) as found:
                            getattr(module, launcher)(*make(), **choice)
                        for report in found:
                            yield report | {"dtype": str(dtype)[6:], "config": str(config)}


def main() -> None:
    """One JSON line per compiled kernel."""
    if kernels.INTERPRET:
        raise SystemExit("testing_compile: TRITON_INTERPRET=1 is set, and then nothing compiles")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*", default=["sm_80", "sm_90"], help="sm_80, sm_90, ...")
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--only", default="", help="kernel modules whose name contains this")
    parser.add_argument("--every", action="store_true", help="every configuration")
    args = parser.parse_args()
    dtypes = [getattr(torch, name) for name in args.dtype]
    for report in reports(args.target, dtypes, args.only, args.every):
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
