"""What runs here: for every op which rows take typical arguments, and why the others do not."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff import _native, ops
from fastdiff.ops.fused_step import COLUMNS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
New = Callable[..., Tensor]  # new(*shape, dtype=...), on the device asked for


def _index(new: New, *shape: int) -> ops.SparseIndex:
    """16 entries in each row of a weight."""
    crow, col = new(shape[0] + 1, dtype=torch.int32), new(16 * shape[0], dtype=torch.int32)
    return ops.SparseIndex(crow, col, shape)


# One typical call of every op: widths of DiT-S/2 and SD's U-Net. test_layout.py: every op has one.
CALLS: dict[str, Callable[[New], tuple[Any, ...]]] = {
    "aggregate_features": lambda new: (new(3, 2, 320, 32, 32), new(3, 2, 1, 32, 32)),
    "aggregate_features_backward": lambda new: (
        new(2, 320, 32, 32),
        new(3, 2, 320, 32, 32),
        new(3, 2, 1, 32, 32),
    ),
    "attention": lambda new: (new(2, 6, 256, 64), new(2, 6, 256, 64), new(2, 6, 256, 64)),
    "conv3x3": lambda new: (new(2, 64, 32, 32), new(64, 64, 3, 3), new(64)),
    "fused_step": lambda new: (
        new(2, 4, 64, 64),
        new(1, 2, 4, 64, 64),
        new(1, len(COLUMNS), dtype=torch.float32),
    ),
    "gate_residual": lambda new: (new(2, 256, 384), new(2, 256, 384), new(2, 384)),
    "gate_residual_norm_modulate": lambda new: (
        new(2, 256, 384),
        new(2, 256, 384),
        new(2, 384),
        new(2, 384),
        new(2, 384),
    ),
    "gate_residual_norm_quantize": lambda new: (
        new(2, 256, 384),
        new(2, 256, 384),
        new(2, 384),
        new(2, 384),
        new(2, 384),
    ),
    "gather_tokens": lambda new: (new(2, 256, 384), new(2, 64, dtype=torch.int64)),
    "geglu": lambda new: (new(2, 256, 2560), new(2560)),
    "gelu_tanh": lambda new: (new(2, 256, 1536), new(1536)),
    "group_norm_silu": lambda new: (new(2, 320, 32, 32), 32, new(320), new(320)),
    "grouped_linear": lambda new: (
        new(512, 384),
        new(8, 1536, 384),
        new(9, dtype=torch.int64),
    ),
    "grouped_quant_linear": lambda new: (
        ops.Quantized(new(512, 384, dtype=torch.int8), new(512, dtype=torch.float32), new(0).dtype),
        ops.ExpertWeight(
            new(8, 1536, 384, dtype=torch.int8), new(8, 1536, 1, dtype=torch.float32), 8
        ),
        new(9, dtype=torch.int64),
    ),
    "grouped_weight_grad": lambda new: (
        new(512, 1536),
        new(512, 384),
        new(9, dtype=torch.int64),
    ),
    "layer_norm_modulate": lambda new: (new(2, 256, 384), new(2, 384), new(2, 384)),
    "linear": lambda new: (new(8, 384), new(1152, 384), new(1152)),
    "lora_add": lambda new: (
        new(2, 256, 1152),
        new(2, 256, 384),
        new(4, 16, 384),
        new(4, 1152, 16),
        new(4, dtype=torch.float32),
        new(2, dtype=torch.int64),
    ),
    "moe_combine": lambda new: (
        new(512, 384),
        new(256, 2, dtype=torch.float32),
        new(256, 2, dtype=torch.int64),
    ),
    "moe_route": lambda new: (new(256, 8), 2),
    "philox_normal": lambda new: ((2, 4, 64, 64), *(new(2, dtype=torch.int64) for _ in range(3))),
    "qk_norm_rope": lambda new: (new(2, 6, 256, 64), new(2, 6, 256, 64), new(64), new(64)),
    "quant_attention": lambda new: (new(2, 6, 256, 64), new(2, 6, 256, 64), new(2, 6, 256, 64)),
    "quant_linear": lambda new: (
        ops.Quantized(
            new(2, 256, 384, dtype=torch.int8), new(2, 256, dtype=torch.float32), new(0).dtype
        ),
        ops.QuantWeight(new(1536, 384, dtype=torch.int8), new(1536, 1, dtype=torch.float32), 8),
        new(1536),
    ),
    "quantize": lambda new: (new(2, 256, 384),),
    "quantize_patches": lambda new: (new(2, 320, 16, 16), 3),
    "resample": lambda new: (new(4, 64, dtype=torch.float32), new(4, dtype=torch.float64)),
    "sample_sums": lambda new: (new(2, 4, 64, 64),),
    "scale_shift": lambda new: (new(2, 256, 384), new(384), new(384)),
    "scale_shift_backward": lambda new: (new(2, 256, 384), new(2, 256, 384), new(384)),
    "scatter_tokens": lambda new: (
        new(2, 256, 384),
        new(2, 64, dtype=torch.int64),
        new(2, 64, 384),
        new(2, 384),
    ),
    "select_tokens": lambda new: (new(2, 256), 64),
    "sparse_adamw_": lambda new: (
        *(new(7373, dtype=torch.float32) for _ in range(4)),
        new(384, 384),
        new(7373, dtype=torch.int32),
    ),
    "sparse_conv2d_weight_grad": lambda new: (
        new(2, 64, 14, 14),
        new(2, 64, 16, 16),
        _index(new, 64, 64, 3, 3),
    ),
    "sparse_weight_grad": lambda new: (new(512, 384), new(512, 384), _index(new, 384, 384)),
    "update_tokens_": lambda new: (
        new(2, 6, 256, 64),
        new(2, 64, dtype=torch.int64),
        new(2, 6, 64, 64),
    ),
}
# Of ops that have keyword arguments without a default.
KEYWORDS: dict[str, dict[str, Any]] = {
    "sparse_adamw_": dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=1)
}


def processor() -> str:
    """The processor's name, where the system gives one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def op_names() -> list[str]:
    """The public ops: functions whose module has a table of rows for them."""
    found = []
    for name in sorted(ops.__all__):
        module = sys.modules.get(getattr(getattr(ops, name), "__module__", ""))
        if name in getattr(module, "TABLES", {}):
            found.append(name)
    return found


def why(op: str, dtype: torch.dtype, device: str) -> dict[str, str | None]:
    """``fastdiff.explain`` of the typical call of ``op``; an absent device is only pretended.

    Rows read metadata alone, so tensors without data answer for a GPU that is not here.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        args = CALLS[op](lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device=device))
        return fastdiff.explain(getattr(ops, op), *args, **KEYWORDS.get(op, {}))


def collect() -> dict[str, Any]:
    """Everything ``fastdiff info`` prints, for ``--json``."""
    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "fastdiff": fastdiff.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cpu_level": fastdiff.cpu_level(),
        "cpu_levels": fastdiff.cpu_levels(),
        "emulated": _native.emulated(),
        "native": _native.load_error or "loaded",
        "build": _native.build_info(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda_kernels": _native.gpu_kernels(),
        "ops": {},
    }
    places = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    if cuda:
        places += [("cuda", torch.float16), ("cuda", torch.bfloat16)]
    for op in op_names():
        report["ops"][op] = {
            f"{device} {str(dtype)[6:]}": why(op, dtype, device) for device, dtype in places
        }
    return report


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    build = report["build"]
    levels = ", ".join(report["cpu_levels"]) or "none"
    if report["emulated"]:
        levels += " (all but avx2 emulated in it, for tests: slow)"
    lines = [
        f"fastdiff {report['fastdiff']}, torch {report['torch']}, python {report['python']}",
        f"processor: {report['processor']}; level {report['cpu_level']} of {levels}; "
        f"{report['threads']} threads",
        f"native library: {report['native']}; build: {build['extension']}, "
        f"{build.get('cuda', 'CUDA off')}",
        f"gpu: {report['gpu'] or 'none that torch sees'}; CUDA kernels: {report['cuda_kernels']}",
    ]
    for op, places in report["ops"].items():
        lines.append(op)
        for place, rows in places.items():
            runs = next((name for name, reason in rows.items() if reason is None), "nothing")
            lines.append(f"  {place}: {runs} runs")
            lines += [f"    not {name}: {reason}" for name, reason in rows.items() if reason]
    return "\n".join(lines)


def markdown() -> str:
    """The README's table: op, row, and the dtypes that it takes on a CPU and on a GPU."""
    lines = ["| op | row | CPU | GPU |", "|---|---|---|---|"]
    for op in op_names():
        for i, row in enumerate(why(op, torch.float32, "cpu")):
            cells = []
            for device in ("cpu", "cuda"):
                takes = [str(d)[6:] for d in DTYPES if why(op, d, device)[row] is None]
                cells.append(", ".join(takes))
            lines.append(f"| {op if i == 0 else ''} | {row} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)
