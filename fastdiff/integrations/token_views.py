"""The tokens of diffusers' transformers and of ours, for sparse steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from fastdiff.engine.patch import Patch
from fastdiff.engine.reuse_tokens import TokenView, current_tokens, drive, keys_values, tokens
from fastdiff.engine.view import BlockView
from fastdiff.integrations import views
from fastdiff.integrations.attentions import RULES, attentions_of, why_all_tokens
from fastdiff.integrations.rules import class_name
from fastdiff.models import DiT
from fastdiff.tokens.region import RegionAdaptive


def _patches(patch: Sequence[int], noise: Tensor) -> Tensor:
    """``[B, C, H, W]`` or ``[B, C, F, H, W]`` -> ``[B, N, P, C]``: pixels by token."""
    count = len(patch)
    for i, p in enumerate(patch):  # every dimension becomes (tokens, pixels)
        noise = noise.unflatten(2 + 2 * i, (-1, p))
    grid, inside = ([first + 2 * i for i in range(count)] for first in (2, 3))
    x = noise.permute(0, *grid, *inside, 1)
    return x.flatten(1, count).flatten(2, 1 + count)


def _last_channels(channels: int, pixels: int, outputs: Tensor) -> Tensor:
    """``[B, N, P * V] -> [B, N, P, C]``: of V channels a pixel the first C, without variances."""
    return outputs.unflatten(2, (pixels, -1))[..., :channels]


def _packed(outputs: Tensor) -> Tensor:
    """Flux packs 2 x 2 pixels a token, a channel's together."""
    pixels = 1 if outputs.shape[2] % 4 else 4
    return outputs.unflatten(2, (-1, pixels)).transpose(2, 3)


def _picture(
    network: nn.Module, patch: Sequence[int], channels: int, last: nn.Module, blocks: BlockView
) -> TokenView:
    """A network that takes a picture and cuts it into patches."""
    pixels = 1
    for p in patch:
        pixels *= p

    def grid(count: int, args: Any, kwargs: Any) -> Sequence[int]:
        x = args[0] if args else kwargs["hidden_states"]
        return [n // p for n, p in zip(x.shape[2:], patch, strict=True)]

    return TokenView(
        blocks,
        last,
        lambda outputs: _last_channels(channels, pixels, outputs),
        lambda noise: _patches(patch, noise),
        grid,
        partial(why_all_tokens, attentions_of(network)),
    )


def _square(network: Any) -> TokenView:
    p, channels = network.config.patch_size, network.config.in_channels
    last = network.proj_out_2 if hasattr(network, "proj_out_2") else network.proj_out
    found = views.view(network)
    assert found is not None
    return _picture(network, (p, p), channels, last, found)


def _wan(network: Any) -> TokenView:
    found = views.view(network)
    assert found is not None
    config = network.config
    return _picture(network, config.patch_size, config.out_channels, network.proj_out, found)


def _flux(network: Any) -> TokenView:
    found = views.view(network)
    assert found is not None
    return TokenView(
        found,
        network.proj_out,
        _packed,
        _packed,
        lambda count, args, kwargs: None,
        partial(why_all_tokens, attentions_of(network)),
    )


VIEWS: dict[str, Callable[[Any], TokenView]] = {
    "DiTTransformer2DModel": _square,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _square,
    "SD3Transformer2DModel": _square,
    "WanTransformer3DModel": _wan,
}


def _dit(network: DiT, policy: RegionAdaptive, patch: Patch, first: int, always: bool) -> list[str]:
    """Our own DiT, whose norms are carried from block to block."""
    layers_of_all, unpatchify_all, p = network.layers, network.unpatchify, network.patch_size
    attend = network.attention

    def attention(block: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend(block, q, *keys_values(block, k, v))

    def layers(h: Tensor, normed: Tensor, mods: list[Tensor], start: int, stop: int) -> Any:
        call = current_tokens()
        if call is not None and start == first:
            h, normed = call.begin(h, normed)
        return layers_of_all(h, normed, mods, start, stop)

    def unpatchify(out: Tensor, height: int, width: int) -> Tensor:
        call = current_tokens()
        return unpatchify_all(out if call is None else call.output(out), height, width)

    for name, new in (("attention", attention), ("layers", layers), ("unpatchify", unpatchify)):
        patch.set(network, name, new)
    picture = _picture(network, (p, p), network.in_channels, network, BlockView([]))
    view = picture._replace(
        grid=lambda count, args, kwargs: [n // p for n in args[0].shape[2:]], why_not=lambda: ""
    )
    drive(network, policy, view, patch, always)
    return [f"{policy}: blocks {first}-{len(network.blocks) - 1} run on the tokens in focus"]


def _rules(network: nn.Module, patch: Patch) -> None:
    """Attention by our rules, which know of tokens; the exact mode has done so already."""
    for module in network.modules():
        found = RULES.get(class_name(module))
        own = module.__dict__.get("forward")
        if found is not None and getattr(own, "__func__", None) is not found[1]:
            if own is not None:
                raise ValueError(
                    "accelerate: cache has RegionAdaptive, but the forward of an attention "
                    f"({type(module).__name__}) is someone else's already"
                )
            patch.set(module, "forward", MethodType(found[1], module))


def reuse(
    network: nn.Module, policy: RegionAdaptive, patch: Patch, first: int, always: bool
) -> list[str]:
    """Run ``policy`` on ``network``; see :func:`fastdiff.engine.reuse_tokens.tokens`.

    Raises:
        ValueError: its class is not known here, or an attention of it has no rule.
    """
    if policy.neutral:
        return [f"{policy}: every step computes all tokens"]
    if isinstance(network, DiT):
        return _dit(network, policy, patch, first, always)
    name = next((c.__name__ for c in type(network).__mro__ if c.__name__ in VIEWS), None)
    if name is None:
        unet = any("UNet" in c.__name__ for c in type(network).__mro__)
        why = "its convolutions and group norms need the whole picture" if unet else (
            f"known are DiT, {', '.join(VIEWS)}"
        )  # fmt: skip
        raise ValueError(
            f"accelerate: cache is {policy!r}, which does not run on "
            f"{type(network).__name__}: {why}"
        )
    view = VIEWS[name](network)
    why = view.why_not()
    if why:
        raise ValueError(
            f"accelerate: cache is {policy!r}, which does not run on this "
            f"{type(network).__name__}: {why}"
        )
    _rules(network, patch)
    return tokens(network, view, policy, patch, first, always)
