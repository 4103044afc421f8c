"""U-Nets as stages: diffusers' ``UNet2DModel`` and ``UNet2DConditionModel``, and ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastdiff.engine.view import Join, Stage, UNetView
from fastdiff.models import UNet

# Block classes of diffusers whose layers are a residual block each, with an attention each or
# none, and take one skip each on the way up.
_NAMES = ("{}Block2D", "Attn{}Block2D", "CrossAttn{}Block2D", "SimpleCrossAttn{}Block2D")
_DOWN = {name.format("Down") for name in _NAMES} | {"ResnetDownsampleBlock2D"}
_UP = {name.format("Up") for name in _NAMES} | {"ResnetUpsampleBlock2D"}
_NETWORKS = ("UNet2DModel", "UNet2DConditionModel")

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class _Part:
    """A block with some of its layers: what ``own`` names is other, the rest is the block's."""

    def __init__(self, block: nn.Module, own: dict[str, Any]):
        self._block = block
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def _part(block: Any, resampler: str) -> Callable[[int, int, bool], Callable[..., Any]]:
    run = type(block).forward

    def part(first: int, last: int, resample: bool) -> Callable[..., Any]:
        own: dict[str, Any] = {"resnets": tuple(block.resnets)[first:last]}
        if getattr(block, "attentions", None):
            own["attentions"] = tuple(block.attentions)[first:last]
        if not resample:
            own[resampler] = None
        proxy = _Part(block, own)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(proxy, *args, **kwargs)

        return forward

    return part


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]


def _stage(block: Any, resampler: str, skips: str) -> Stage:
    """``skips`` is the name of the stage's argument that holds them."""
    names = _names(type(block).forward)
    hidden = names[0]

    def read(args: Args, kwargs: Kwargs) -> Join:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return Join(given[hidden], given[skips], given.get("upsample_size"))

    def write(args: Args, kwargs: Kwargs, join: Join) -> tuple[Args, Kwargs]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        # FreeU scales half of the channels in place.
        freeu = getattr(block, "s1", None) is not None
        given[hidden] = join.hidden.clone() if freeu else join.hidden
        given[skips] = join.skips
        if "upsample_size" in names:
            given["upsample_size"] = join.size
        return (), given

    return Stage(
        block,
        len(block.resnets),
        getattr(block, resampler, None) is not None,
        _part(block, resampler),
        read,
        write,
    )


def _why_not(network: Any) -> str | None:
    for blocks, known in ((network.down_blocks, _DOWN), (network.up_blocks, _UP)):
        for block in blocks:
            if type(block).__name__ not in known:
                return f"block {type(block).__name__} is none of {', '.join(sorted(known))}"
    return None


def _adapter_places(network: Any) -> list[tuple[int, Any]]:
    """Where a T2I adapter's residual of each stage of the way down goes: the number of the skip,
    and what stands for no residual."""
    places: list[tuple[int, Any]] = []
    count = 1
    for block in network.down_blocks:
        resamples = block.downsamplers is not None
        count += len(block.resnets) + resamples
        if getattr(block, "has_cross_attention", False):  # adds it to its last layer's result
            places.append((count - 1 - resamples, None))
        else:  # its result gets it added in place
            places.append((count - 1, 0.0))
    return places


def _diffusers(network: Any) -> UNetView:
    names = _names(type(network).forward)
    places = _adapter_places(network)

    def sample(args: Args, kwargs: Kwargs) -> Tensor:
        return args[0] if args else kwargs["sample"]

    def trim(args: Args, kwargs: Kwargs, skips: int, mid: bool) -> tuple[Args, Kwargs]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        down, middle = "down_block_additional_residuals", "mid_block_additional_residual"
        inner = "down_intrablock_additional_residuals"
        if given.get(inner) is None and given.get(middle) is None:
            inner = down  # diffusers' older name of a T2I adapter's residuals
        elif given.get(down) is not None:
            count = len(given[down])
            given[down] = list(given[down])[:skips] + [0.0] * (count - skips)
            if not mid:
                given[middle] = 0.0
        if given.get(inner) is not None:  # one a stage of the way down, then the middle's
            values = list(given[inner])
            for i, (skip, nothing) in enumerate(places[: len(values)]):
                values[i] = values[i] if skip < skips else nothing
            given[inner] = values
        return (), given

    def whole(args: Args, kwargs: Kwargs) -> bool:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return any(value is not None for name, value in given.items() if "additional_res" in name)

    return UNetView(
        network.conv_in,
        [_stage(b, "downsamplers", "hidden_states") for b in network.down_blocks],
        network.mid_block,
        [_stage(b, "upsamplers", "res_hidden_states_tuple") for b in network.up_blocks],
        sample,
        trim,
        whole=whole,
    )


def _at_times(args: Args, kwargs: Kwargs, times: Tensor) -> tuple[Args, Kwargs]:
    given = {**dict(zip(("x", "t", "y"), args, strict=False)), **kwargs}
    batch, count = given["x"].shape[0], len(times)
    rows = {k: v.repeat(count, *[1] * (v.dim() - 1)) for k, v in given.items() if v is not None}
    return (), {**rows, "t": times.to(given["t"]).repeat_interleave(batch)}


def _ours(network: Any) -> UNetView:
    return UNetView(
        network.conv_in,
        [_stage(b, "downsamplers", "h") for b in network.down_blocks],
        network.mid_block,
        [_stage(b, "upsamplers", "skips") for b in network.up_blocks],
        lambda args, kwargs: args[0] if args else kwargs["x"],
        lambda args, kwargs, skips, mid: (args, kwargs),
        _at_times,
    )


def view(network: nn.Module) -> UNetView | str:
    """``network`` as a U-Net, or a sentence that says why it is none."""
    if type(network) is UNet:
        return _ours(network)
    if type(network).__name__ not in _NETWORKS:
        return f"{type(network).__name__} is none of {', '.join(_NETWORKS)} and fastdiff's UNet"
    return _why_not(network) or _diffusers(network)
