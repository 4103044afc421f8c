"""Other people's networks: what they are made of, and their parts on our operations.

A file for each family; each has what of these it can:
    exact(network, patch) -> list[str]: replaces parts by ours, same output; a sentence for each
    view(network) -> BlockView | None: the network as a list of blocks, for cache policies
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdiff.cache import DeepCache, EncoderPropagation, FirstBlock, Forecast
from fastdiff.engine import reuse_unet
from fastdiff.engine.patch import Patch
from fastdiff.integrations import unet_views, views
from fastdiff.integrations.exact_mode import exact

__all__ = ["exact", "reuse"]


def reuse(network: nn.Module, policy: Any, patch: Patch) -> list[str]:
    """Let ``policy`` skip parts of ``network``; sentences that name them.

    Raises:
        ValueError: this policy cannot run on this class of network.
    """
    if isinstance(policy, DeepCache | EncoderPropagation):
        view = unet_views.view(network)
        if isinstance(view, str):
            raise ValueError(f"accelerate: cache is {policy!r}, which needs a U-Net: {view}")
        if isinstance(policy, DeepCache):
            return reuse_unet.deepcache(network, view, policy, patch)
        return reuse_unet.encoder_propagation(network, view, policy, patch)
    if isinstance(policy, FirstBlock | Forecast):
        parts = views.reuse(network, policy, patch)
        if parts is not None:
            return parts
    raise ValueError(
        f"accelerate: cache is {policy!r}, which does not run on {type(network).__name__}"
    )
