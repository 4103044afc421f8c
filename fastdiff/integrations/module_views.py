"""Attention and feed-forward modules of the blocks of diffusers' networks and ours, by kind.

A block of another class is left as it is: its attributes of the same names may be called otherwise.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from fastdiff.cache.broadcast import KINDS, Broadcast
from fastdiff.engine.patch import Patch
from fastdiff.engine.reuse_modules import Part, drive, modules, wrapped
from fastdiff.integrations.rules import class_name
from fastdiff.models import DiT

_SELF, _CROSS, _FEED, _TIME = KINDS
_EITHER = "attention"  # the module itself knows whether it looks at a prompt
_DIFFUSERS = "diffusers.models."
_TRANSFORMERS = _DIFFUSERS + "transformers."
_BASIC = {"attn1": _EITHER, "attn2": _EITHER, "ff": _FEED}
_ONE = {"attn1": _SELF, "attn2": _CROSS, "ff": _FEED}  # one stream, and a prompt
_TWO = {"attn": _SELF, "ff": _FEED, "ff_context": _FEED}  # picture and prompt attend jointly
_TWO_1 = {"attn1": _SELF, "ff": _FEED, "ff_context": _FEED}
_JOINED = {"attn": _SELF, "proj_mlp": _FEED}  # the MLP's second half is one with the attention's

_WAN = {"attn1": _SELF, "attn2": _CROSS, "ffn": _FEED}

# What blocks are made of, by attribute. A block may lack one, or have None there.
BLOCKS: dict[str, dict[str, str]] = {
    "fastdiff.models.unet._TransformerBlock": _ONE,
    _DIFFUSERS + "attention.BasicTransformerBlock": _BASIC,
    _DIFFUSERS + "attention.TemporalBasicTransformerBlock": {**_BASIC, "ff_in": _FEED},
    _DIFFUSERS + "attention.JointTransformerBlock": {**_TWO, "attn2": _SELF},
    _TRANSFORMERS + "auraflow_transformer_2d.AuraFlowJointTransformerBlock": _TWO,
    _TRANSFORMERS + "auraflow_transformer_2d.AuraFlowSingleTransformerBlock": _TWO,
    _TRANSFORMERS + "cogvideox_transformer_3d.CogVideoXBlock": _TWO_1,
    _TRANSFORMERS + "hunyuan_transformer_2d.HunyuanDiTBlock": _ONE,
    _TRANSFORMERS + "sana_transformer.SanaTransformerBlock": _ONE,
    _TRANSFORMERS + "transformer_allegro.AllegroTransformerBlock": _ONE,
    _TRANSFORMERS + "transformer_chroma.ChromaTransformerBlock": _TWO,
    _TRANSFORMERS + "transformer_chroma.ChromaSingleTransformerBlock": _JOINED,
    _TRANSFORMERS + "transformer_cogview4.CogView4TransformerBlock": _TWO_1,
    _TRANSFORMERS + "transformer_flux.FluxTransformerBlock": _TWO,
    _TRANSFORMERS + "transformer_flux.FluxSingleTransformerBlock": _JOINED,
    _TRANSFORMERS + "transformer_flux2.Flux2TransformerBlock": _TWO,
    _TRANSFORMERS + "transformer_flux2.Flux2SingleTransformerBlock": {"attn": _SELF},  # and MLP
    _TRANSFORMERS + "transformer_hunyuan_video.HunyuanVideoTransformerBlock": _TWO,
    _TRANSFORMERS + "transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock": _JOINED,
    _TRANSFORMERS + "transformer_ltx.LTXVideoTransformerBlock": _ONE,
    _TRANSFORMERS + "transformer_lumina2.Lumina2TransformerBlock": {
        "attn": _SELF, "feed_forward": _FEED,
    },
    _TRANSFORMERS + "transformer_mochi.MochiTransformerBlock": _TWO_1,
    _TRANSFORMERS + "transformer_qwenimage.QwenImageTransformerBlock": {
        "attn": _SELF, "img_mlp": _FEED, "txt_mlp": _FEED,
    },
    _TRANSFORMERS + "transformer_wan.WanTransformerBlock": _WAN,
    _TRANSFORMERS + "transformer_wan_vace.WanVACETransformerBlock": _WAN,
    _TRANSFORMERS + "transformer_z_image.ZImageTransformerBlock": {
        "attention": _SELF, "feed_forward": _FEED,
    },
}  # fmt: skip
# Stages of a UNet2DModel, whose attention stands between residual blocks and adds its input.
_UNET = _DIFFUSERS + "unets.unet_2d_blocks."
STAGES = {_UNET + name for name in ("AttnDownBlock2D", "AttnUpBlock2D", "UNetMidBlock2D")}


_TEMPORAL = ("temporal_transformer_blocks.", "motion_modules.")  # in the names of such blocks


def _kind(module: Any, kind: str, path: str) -> str:
    if kind == _EITHER:
        kind = _CROSS if module.is_cross_attention else _SELF
    return _TIME if kind == _SELF and any(name in path for name in _TEMPORAL) else kind


def view(network: nn.Module) -> list[Part]:
    """Every module of a known block that a policy may skip, in the network's order."""
    parts = []
    block: Any
    for path, block in network.named_modules():
        for name, kind in BLOCKS.get(class_name(block), {}).items():
            module = getattr(block, name, None)
            if module is not None:
                parts.append(Part(module, _kind(module, kind, path)))
        if class_name(block) in STAGES:
            for module in block.attentions:
                if module is not None:
                    residual = module.rescale_output_factor if module.residual_connection else None
                    parts.append(Part(module, _kind(module, _EITHER, path), residual))
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

        if policy.skips(kind):
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
    skipped = [kind for kind in KINDS if policy.skips(kind)]
    if not parts or (skipped and not any(counts[kind] for kind in skipped)):
        found = ", ".join(f"{n} of {kind}" for kind, n in counts.items() if n) or "none"
        raise ValueError(
            f"accelerate: cache is {policy!r}, but the modules of {type(network).__name__} that "
            f"are known here are {found}; need some of {' or '.join(skipped or KINDS)}"
        )
    return [
        f"{policy}: {counts[kind]} modules of {kind.replace('_', '-')} are computed or reused"
        for kind in skipped
        if counts[kind] or kind != _TIME
    ] or [f"{policy}: everything is computed"]
