"""Blocks of networks, composed from ops."""

from fastdiff.nn.moe import MoE

__all__ = ["MoE"]
