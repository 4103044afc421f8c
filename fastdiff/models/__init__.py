"""Whole networks composed from :mod:`fastdiff.ops`, their plain-torch twins, and checkpoints."""

from fastdiff.models.baseline import PlainDiT, PlainDiTMoE, PlainUNet, plain
from fastdiff.models.checkpoint import load, names, save
from fastdiff.models.dit import DiT
from fastdiff.models.dit_moe import DiTMoE
from fastdiff.models.expert_cache import ExpertCache
from fastdiff.models.expert_store import ExpertStore
from fastdiff.models.mode import MoDE
from fastdiff.models.unet import UNet

__all__ = [
    "DiT",
    "DiTMoE",
    "ExpertCache",
    "ExpertStore",
    "MoDE",
    "PlainDiT",
    "PlainDiTMoE",
    "PlainUNet",
    "UNet",
    "load",
    "names",
    "plain",
    "save",
]
