"""The engine: steps over static buffers, captured as CUDA graphs or run eagerly."""

from fastdiff.engine.capture_check import NotCapturable, Report, Violation, check, require
from fastdiff.engine.graphs import EagerRunner, GraphRunner, Pool, Runner, capture, runner

__all__ = [
    "EagerRunner",
    "GraphRunner",
    "NotCapturable",
    "Pool",
    "Report",
    "Runner",
    "Violation",
    "capture",
    "check",
    "require",
    "runner",
]
