"""Whole networks composed from :mod:`fastdiff.ops`, their plain-torch twins, and checkpoints."""

from fastdiff.models.baseline import PlainDiT, PlainUNet, plain
from fastdiff.models.checkpoint import load, names, save
from fastdiff.models.dit import DiT
from fastdiff.models.unet import UNet

__all__ = ["DiT", "PlainDiT", "PlainUNet", "UNet", "load", "names", "plain", "save"]
