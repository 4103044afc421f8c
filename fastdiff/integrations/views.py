"""The transformers of diffusers, and ours, as lists of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastdiff import ops
from fastdiff.engine.patch import Patch
from fastdiff.engine.reuse_blocks import Policy, blocks, current_stack, drive, head_of
from fastdiff.engine.view import Block, BlockView, Streams
from fastdiff.models import DiT
from fastdiff.models.dit import EPS


def _one(module: nn.Module) -> Block:
    """A block of one stream, ``block(hidden_states, ...) -> hidden_states``."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        return (args[0] if args else kwargs["hidden_states"],)

    return Block(module, read, lambda streams: streams[0], lambda out: (out,))


def _two(module: nn.Module, first: str) -> Block:
    """A block of text and image, both by keyword; ``first`` says which it returns first."""

    def order(streams: Streams) -> Any:
        return streams[::-1] if first == "text" else streams

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        return kwargs["hidden_states"], kwargs["encoder_hidden_states"]

    return Block(module, read, order, order)


def _adds(*names: str) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
    return lambda args, kwargs: any(kwargs.get(name) is not None for name in names)


def _flux(network: Any) -> BlockView:
    listed = [*network.transformer_blocks, *network.single_transformer_blocks]
    adds = _adds("controlnet_block_samples", "controlnet_single_block_samples")
    return BlockView([_two(m, "text") for m in listed], adds)


def _sd3(network: Any) -> BlockView:
    *listed, last = (_two(m, "text") for m in network.transformer_blocks)
    # The last block ends the text.
    last = last._replace(pack=lambda streams: (None, streams[0]), unpack=lambda out: (out[1],))

    def off(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return "skip_layers leaves out blocks" if kwargs.get("skip_layers") else ""

    return BlockView([*listed, last], _adds("block_controlnet_hidden_states"), off)


def _single(network: Any) -> BlockView:
    return BlockView([_one(m) for m in network.transformer_blocks])


def _wan(network: Any) -> BlockView:
    return BlockView([_one(m) for m in network.blocks])


VIEWS: dict[str, Callable[[Any], BlockView]] = {
    "DiTTransformer2DModel": _single,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _single,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
}


def view(network: nn.Module) -> BlockView | None:
    """The network as a list of blocks, None for a class that is not known here."""
    for cls in type(network).__mro__:
        if cls.__name__ in VIEWS:
            return VIEWS[cls.__name__](network)
    return None


def dit(network: DiT, policy: Policy, patch: Patch) -> list[str]:
    """Run ``policy`` on our own DiT, whose norms are carried from block to block."""
    plain, head, count = network.layers, head_of(policy), len(network.blocks)

    def layers(h: Tensor, normed: Tensor, mods: list[Tensor], start: int, stop: int) -> Any:
        stack = current_stack()
        if stack is None:
            return plain(h, normed, mods, start, stop)
        before = h
        if head:
            h, normed = plain(h, normed, mods, start, start + head)
        stack.enter((before,), (h,))
        if isinstance(stack.rows, str):
            h, normed = plain(h, normed, mods, start + head, stop)
            stack.leave((h,))
            return h, normed
        some: tuple[Tensor, ...] = ()
        if stack.rows is not None:
            rows = stack.rows
            part = [m[rows] for m in mods]
            some = (plain(h[rows], normed[rows], part, start + head, stop)[0],)
        (h,) = stack.leave(some)
        return h, ops.layer_norm_modulate(h, mods[-2], mods[-1], eps=EPS)

    patch.set(network, "layers", layers)
    part = f"blocks {head}-{count - 1}"
    drive(network, policy, part, patch, BlockView([]))
    return [f"{policy}: {part} are computed or reused"]


def reuse(network: nn.Module, policy: Policy, patch: Patch) -> list[str] | None:
    """Run ``policy`` on ``network``; None where its class is not known here."""
    if isinstance(network, DiT):
        return dit(network, policy, patch)
    found = view(network)
    return None if found is None else blocks(network, found, policy, patch)
