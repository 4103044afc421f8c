"""fastdiff: kernels and an engine that make diffusion models sample and fine-tune fast."""

from fastdiff import ops
from fastdiff._memory import keep_memory
from fastdiff._native import cpu_level, cpu_levels, set_cpu_level
from fastdiff._version import __version__
from fastdiff.accelerate import accelerate, accelerated, programs, request, restore, summary
from fastdiff.dispatch import Impl, NoImpl, explain, record, use
from fastdiff.engine.token_state import region
from fastdiff.engine.view import Block, BlockView
from fastdiff.precision import Precision
from fastdiff.sampling import sample

__all__ = [
    "Block",
    "BlockView",
    "Impl",
    "NoImpl",
    "Precision",
    "__version__",
    "accelerate",
    "accelerated",
    "cpu_level",
    "cpu_levels",
    "explain",
    "keep_memory",
    "ops",
    "programs",
    "record",
    "region",
    "request",
    "restore",
    "sample",
    "set_cpu_level",
    "summary",
    "use",
]
