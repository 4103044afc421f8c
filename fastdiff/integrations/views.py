"""The transformers of diffusers, and ours, as lists of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastdiff import ops
from fastdiff.cache import AccumulatedDistance, FirstBlock
from fastdiff.engine.patch import Patch
from fastdiff.engine.reuse_blocks import Policy, blocks, current_stack, drive, ends_of, part_of
from fastdiff.engine.view import Block, BlockView, Streams
from fastdiff.models import DiT
from fastdiff.models.dit import EPS


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _two(module: nn.Module, first: str) -> Block:
    """A block of text and image, both by keyword; ``first`` says which it returns first."""

    def order(streams: Streams) -> Any:
        return streams[::-1] if first == "text" else streams

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        return kwargs["hidden_states"], kwargs["encoder_hidden_states"]

    return Block(module, read, order, order)


def _adds(*names: str) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
    return lambda args, kwargs: any(kwargs.get(name) is not None for name in names)


def _normed(block: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], Tensor]:
    """The modulated input of a block whose first norm takes the embedding ``temb``."""

    def signal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        normed: Tensor = block.norm1(kwargs["hidden_states"], emb=kwargs["temb"])[0]
        return normed

    return signal


def _flux(network: Any) -> BlockView:
    listed = [*network.transformer_blocks, *network.single_transformer_blocks]
    adds = _adds("controlnet_block_samples", "controlnet_single_block_samples")
    return BlockView([_two(m, "text") for m in listed], adds, signal=_normed(listed[0]))


def _sd3(network: Any) -> BlockView:
    *listed, last = (_two(m, "text") for m in network.transformer_blocks)
    # The last block ends the text.
    last = last._replace(pack=lambda streams: (None, streams[0]), unpack=lambda out: (out[1],))

    def off(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return "skip_layers leaves out blocks" if kwargs.get("skip_layers") else ""

    first = network.transformer_blocks[0]
    adds = _adds("block_controlnet_hidden_states")
    return BlockView([*listed, last], adds, off, _normed(first))


def _cogvideox(network: Any) -> BlockView:
    listed = network.transformer_blocks

    def signal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, text, temb = (kwargs[k] for k in ("hidden_states", "encoder_hidden_states", "temb"))
        normed: Tensor = listed[0].norm1(x, text, temb)[0]
        return normed

    return BlockView([_two(m, "image") for m in listed], signal=signal)


def _dit(network: Any) -> BlockView:
    first = network.transformer_blocks[0]

    def signal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = _hidden(args, kwargs)
        t, y = kwargs["timestep"], kwargs["class_labels"]
        normed: Tensor = first.norm1(x, t, y, hidden_dtype=x.dtype)[0]
        return normed

    return BlockView.of(network.transformer_blocks)._replace(signal=signal)


def _pixart(network: Any) -> BlockView:
    first = network.transformer_blocks[0]

    def signal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = _hidden(args, kwargs)
        time = kwargs["timestep"].reshape(len(x), 6, -1)
        shift, scale = (first.scale_shift_table[None] + time)[:, :2].split(1, dim=1)
        normed: Tensor = first.norm1(x) * (1 + scale) + shift
        return normed

    return BlockView.of(network.transformer_blocks)._replace(signal=signal)


def _wan(network: Any) -> BlockView:
    first = network.blocks[0]

    def signal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, _, time, _ = args
        table = first.scale_shift_table + time.float()  # [B, 6, D], or [B, N, 6, D] a token
        shift, scale = table.unbind(-2)[:2]
        if time.dim() == 3:
            shift, scale = shift[:, None], scale[:, None]
        normed: Tensor = first.norm1(x.float()) * (1 + scale) + shift
        return normed

    return BlockView.of(network.blocks)._replace(signal=signal)


VIEWS: dict[str, Callable[[Any], BlockView]] = {
    "CogVideoXTransformer3DModel": _cogvideox,
    "DiTTransformer2DModel": _dit,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
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
    plain, (head, tail), count = network.layers, ends_of(policy), len(network.blocks)
    if count < head + tail + 1:
        raise ValueError(
            f"accelerate: cache is {policy!r}, which needs {head + tail + 1} blocks or more, and "
            f"this DiT has {count}"
        )
    last = count - tail

    def layers(h: Tensor, normed: Tensor, mods: list[Tensor], start: int, stop: int) -> Any:
        stack = current_stack()
        if stack is None:
            return plain(h, normed, mods, start, stop)
        before, signal = h, normed
        if head:
            h, normed = plain(h, normed, mods, 0, head)
        measured = isinstance(policy, FirstBlock | AccumulatedDistance) and not policy.neutral
        if isinstance(policy, FirstBlock) and measured:
            signal = h - before
        stack.enter((h,), signal if measured else None)
        if isinstance(stack.rows, str):
            some, normed = plain(h, normed, mods, head, last)
            (h,) = stack.leave((some,))
            if h is not some:  # tokens that did not run joined those that did
                normed = ops.layer_norm_modulate(h, mods[6 * last], mods[6 * last + 1], eps=EPS)
        else:
            streams: tuple[Tensor, ...] = ()
            if stack.rows is not None:
                rows = stack.rows
                streams = (plain(h[rows], normed[rows], [m[rows] for m in mods], head, last)[0],)
            (h,) = stack.leave(streams)
            normed = ops.layer_norm_modulate(h, mods[6 * last], mods[6 * last + 1], eps=EPS)
        return plain(h, normed, mods, last, stop) if tail else (h, normed)

    patch.set(network, "layers", layers)
    part = part_of(head, last, count)
    drive(network, policy, part, patch, BlockView([]))
    return [f"{policy}: {part.name} are computed or reused"]


def given(network: nn.Module, found: BlockView, policy: Policy, patch: Patch) -> list[str]:
    """Run ``policy`` on the blocks that a user names.

    Raises:
        ValueError: a block is not part of ``network``.
    """
    parts = set(network.modules())
    for i, block in enumerate(found.blocks):
        if block.module not in parts:
            raise ValueError(
                f"accelerate: view has as block {i} a {type(block.module).__name__} that is not "
                f"part of the {type(network).__name__}"
            )
    return blocks(network, found, policy, patch)


def reuse(network: nn.Module, policy: Policy, patch: Patch) -> list[str] | None:
    """Run ``policy`` on ``network``; None where its class is not known here."""
    if isinstance(network, DiT):
        return dit(network, policy, patch)
    found = view(network)
    return None if found is None else blocks(network, found, policy, patch)
