"""Experts by noise level, over several processes, and which routes a run keeps. Pure policies and
thin layers over ``fastdiff.nn.MoE`` and ``ops.grouped_linear``."""

from fastdiff.experts.by_noise import NoiseAdapters, NoiseExperts, noise_bins, uniform_edges
from fastdiff.experts.parallel import ExpertParallel
from fastdiff.experts.routing import RoutingReuse

__all__ = [
    "ExpertParallel",
    "NoiseAdapters",
    "NoiseExperts",
    "RoutingReuse",
    "noise_bins",
    "uniform_edges",
]
