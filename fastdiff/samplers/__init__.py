"""Samplers: one small file per method, each a table of coefficients that ``fused_step`` runs."""

from fastdiff.samplers.ddim import DDIM
from fastdiff.samplers.sample import SAMPLERS, sample
from fastdiff.samplers.schedule import VP, Flow, alphas_cumprod, karras_sigmas, timesteps
from fastdiff.samplers.table import Sampler, Schedule, Table

__all__ = [
    "DDIM",
    "SAMPLERS",
    "VP",
    "Flow",
    "Sampler",
    "Schedule",
    "Table",
    "alphas_cumprod",
    "karras_sigmas",
    "sample",
    "timesteps",
]
