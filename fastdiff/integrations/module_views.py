"""Attention and feed-forward modules of the blocks of diffusers' networks and ours, by kind."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from fastdiff.cache.broadcast import KINDS, Broadcast
from fastdiff.engine.patch import Patch
from fastdiff.engine.reuse_modules import Part, drive, modules, wrapped
from fastdiff.integrations.rules import class_name
from fastdiff.models import DiT

_SELF, _CROSS, _FEED = KINDS
_EITHER = "attention"  # the module itself knows whether it looks at a prompt
_DIFFUSERS = "diffusers.models."
_BASIC = {"attn1": _EITHER, "attn2": _EITHER, "ff": _FEED}
_FLUX = _DIFFUSERS + "transformers.transformer_flux.Flux"

# What blocks are made of, by attribute. A block may lack one, or have None there.
BLOCKS: dict[str, dict[str, str]] = {
    _DIFFUSERS + "attention.BasicTransformerBlock": _BASIC,
    _DIFFUSERS + "attention.JointTransformerBlock": {
        "attn": _SELF, "attn2": _SELF, "ff": _FEED, "ff_context": _FEED,
    },
    _FLUX + "TransformerBlock": {"attn": _SELF, "ff": _FEED, "ff_context": _FEED},
    _FLUX + "SingleTransformerBlock": {"attn": _SELF, "proj_mlp": _FEED},
    _DIFFUSERS + "transformers.transformer_wan.WanTransformerBlock": {
        "attn1": _SELF, "attn2": _CROSS, "ffn": _FEED,
    },
    _DIFFUSERS + "transformers.cogvideox_transformer_3d.CogVideoXBlock": {
        "attn1": _SELF, "ff": _FEED,
    },
    "fastdiff.models.unet._TransformerBlock": {"attn1": _SELF, "attn2": _CROSS, "ff": _FEED},
}  # fmt: skip
# Stages of a UNet2DModel, whose attention stands between residual blocks and adds its input.
_UNET = _DIFFUSERS + "unets.unet_2d_blocks."
STAGES = {_UNET + name for name in ("AttnDownBlock2D", "AttnUpBlock2D", "UNetMidBlock2D")}


def _kind(module: Any, kind: str) -> str:
    if kind != _EITHER:
        return kind
    return _CROSS if module.is_cross_attention else _SELF


def view(network: nn.Module) -> list[Part]:
    """Every module of a known block that a policy may skip, in the network's order."""
    parts = []
    block: Any
    for block in network.modules():
        for name, kind in BLOCKS.get(class_name(block), {}).items():
            module = getattr(block, name, None)
            if module is not None:
                parts.append(Part(module, _kind(module, kind)))
        if class_name(block) in STAGES:
            for module in block.attentions:
                if module is not None:
                    residual = module.rescale_output_factor if module.residual_connection else None
                    parts.append(Part(module, _kind(module, _EITHER), residual))
    return parts


def _dit(network: DiT, policy: Broadcast, patch: Patch) -> list[Part]:
    """Our own DiT, whose halves of blocks are methods of the network."""
    parts = []
    for name, kind in (("attend", _SELF), ("mlp", _FEED)):
        plain: Any = getattr(network, name)
        runs = {}
        for i, block in enumerate(network.blocks):
            part = Part(block, kind)
            parts.append(part)
            runs[block] = wrapped(part, (kind, i), partial(plain, block))

        def half(block: nn.Module, h: Tensor, runs: Any = runs) -> Tensor:
            out: Tensor = runs[block](h)
            return out

        if policy.every(kind) > 1:
            patch.set(network, name, half)
    drive(network, policy, patch)
    return parts


def reuse(network: nn.Module, policy: Broadcast, patch: Patch) -> list[str]:
    """Run ``policy`` on ``network``; a sentence for each kind of module.

    Raises:
        ValueError: it has no module of a kind that the policy would skip.
    """
    if isinstance(network, DiT):
        parts = _dit(network, policy, patch)
    else:
        parts = view(network)
        modules(network, parts, policy, patch)
    counts = {kind: sum(part.kind == kind for part in parts) for kind in KINDS}
    skipped = [kind for kind in KINDS if policy.every(kind) > 1]
    if not parts or (skipped and not any(counts[kind] for kind in skipped)):
        found = ", ".join(f"{n} of {kind}" for kind, n in counts.items() if n) or "none"
        raise ValueError(
            f"accelerate: cache is {policy!r}, but the modules of {type(network).__name__} that "
            f"are known here are {found}"
        )
    return [
        f"{policy}: {counts[kind]} modules of {kind.replace('_', '-')}, computed every "
        f"{policy.every(kind)} steps"
        for kind in skipped
    ] or [f"{policy}: everything is computed"]
