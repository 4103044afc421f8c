"""Sampling programs: guidance, inversion, editing, steering, inverse problems and what trains them,
each as short as its algorithm. A program opens a :class:`Trajectory` and moves it."""

from fastdiff.methods.animate_lcm import animate_lcm
from fastdiff.methods.cep import ConditionNoise
from fastdiff.methods.classify import Probe, classify, linear_probe
from fastdiff.methods.compiled import Compiled, compiled
from fastdiff.methods.cow import cow
from fastdiff.methods.cycle_diffusion import cycle_diffusion, decode, encode
from fastdiff.methods.density import interpolant_log_density, log_density
from fastdiff.methods.diffeditor import diffeditor
from fastdiff.methods.direct_inversion import direct_inversion
from fastdiff.methods.find import InitialNoise, find
from fastdiff.methods.first_stage import FirstStage, tiled
from fastdiff.methods.fk import fk_steering
from fastdiff.methods.forward_model import forward_model
from fastdiff.methods.guide import Guide
from fastdiff.methods.interpolant import Velocity, interpolate
from fastdiff.methods.inversion import ddim_inversion
from fastdiff.methods.lacon import lacon
from fastdiff.methods.latent_guidance import latent_guidance
from fastdiff.methods.linear_reward import linear_reward_guidance
from fastdiff.methods.lotus import lotus
from fastdiff.methods.masked import MaskedRun, masked_fk, masked_sample
from fastdiff.methods.mmd import mmd, mmd_loss, rollout
from fastdiff.methods.multitask import MultiHead, multitask
from fastdiff.methods.noise_da import noise_da_loss
from fastdiff.methods.operators import BoxDown, Mask, Matrix, Operator
from fastdiff.methods.particles import Degenerate
from fastdiff.methods.policy_guided import policy_guided
from fastdiff.methods.ppap import AdapterExperts, ppap
from fastdiff.methods.projection import projected
from fastdiff.methods.pso import pso_loss, step_log_probs
from fastdiff.methods.red_diff import red_diff
from fastdiff.methods.repaint import repaint
from fastdiff.methods.sda import sda
from fastdiff.methods.sds import score_distillation
from fastdiff.methods.steered import steered
from fastdiff.methods.store import Plan, Store
from fastdiff.methods.superdiff import superdiff
from fastdiff.methods.svdd import svdd
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.methods.tsdiff import refine, tsdiff
from fastdiff.methods.windows import long_video, multi_diffusion

__all__ = [
    "AdapterExperts",
    "BoxDown",
    "Compiled",
    "ConditionNoise",
    "Degenerate",
    "FirstStage",
    "Guide",
    "InitialNoise",
    "Mask",
    "MaskedRun",
    "Matrix",
    "MultiHead",
    "Operator",
    "Plan",
    "Probe",
    "Store",
    "Trajectory",
    "Velocity",
    "animate_lcm",
    "classify",
    "compiled",
    "cow",
    "cycle_diffusion",
    "ddim_inversion",
    "decode",
    "diffeditor",
    "direct_inversion",
    "encode",
    "find",
    "fk_steering",
    "forward_model",
    "interpolant_log_density",
    "interpolate",
    "lacon",
    "latent_guidance",
    "linear_probe",
    "linear_reward_guidance",
    "log_density",
    "long_video",
    "lotus",
    "masked_fk",
    "masked_sample",
    "mmd",
    "mmd_loss",
    "multi_diffusion",
    "multitask",
    "noise_da_loss",
    "policy_guided",
    "ppap",
    "projected",
    "pso_loss",
    "red_diff",
    "refine",
    "repaint",
    "rollout",
    "running",
    "score_distillation",
    "sda",
    "steered",
    "step_log_probs",
    "superdiff",
    "svdd",
    "tiled",
    "tsdiff",
]
