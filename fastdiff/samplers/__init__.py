"""Samplers: one small file per method, each a table of coefficients that ``fused_step`` runs."""

from fastdiff.samplers.ddim import DDIM
from fastdiff.samplers.ddpm import DDPM
from fastdiff.samplers.dpmpp import DPMpp2M
from fastdiff.samplers.heun import Euler, Heun
from fastdiff.samplers.lcm import LCM
from fastdiff.samplers.run import SAMPLERS, Run, ready
from fastdiff.samplers.sample import sample
from fastdiff.samplers.schedule import (
    EDM,
    VP,
    Flow,
    Given,
    Levels,
    Schedule,
    alphas_cumprod,
    karras_sigmas,
    timesteps,
    zero_terminal_snr,
)
from fastdiff.samplers.table import Ready, Sampler, Table
from fastdiff.samplers.ve import VE, VPSDE

__all__ = [
    "DDIM",
    "DDPM",
    "EDM",
    "LCM",
    "SAMPLERS",
    "VE",
    "VP",
    "VPSDE",
    "DPMpp2M",
    "Euler",
    "Flow",
    "Given",
    "Heun",
    "Levels",
    "Ready",
    "Run",
    "Sampler",
    "Schedule",
    "Table",
    "alphas_cumprod",
    "karras_sigmas",
    "ready",
    "sample",
    "timesteps",
    "zero_terminal_snr",
]
