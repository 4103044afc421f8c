"""Blocks of networks, composed from ops."""

from fastdiff.nn.moe import MoE, Routed, SwiGLU, Weights, balance_loss, routes

__all__ = ["MoE", "Routed", "SwiGLU", "Weights", "balance_loss", "routes"]
