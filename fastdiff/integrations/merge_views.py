"""Self-attention on merged tokens, in networks whose attention takes one stream of a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from fastdiff import ops
from fastdiff.engine.off import why_off
from fastdiff.engine.patch import Patch, forward_of
from fastdiff.integrations.rules import class_name
from fastdiff.models import DiT
from fastdiff.models.unet import UNet
from fastdiff.tokens.merge import Merge, Plan, plan

_KNOWN = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "UNet2DConditionModel")
_BLOCK = "diffusers.models.attention.BasicTransformerBlock"

# Of the network call in work: height and width of its picture; None where nothing is merged.
_size: ContextVar[tuple[int, int] | None] = ContextVar("fastdiff_merge", default=None)
_plan: ContextVar[Plan | None] = ContextVar("fastdiff_merge_plan", default=None)


def _grid(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many tokens of a picture, None where they are no grid of it."""
    rows = round((tokens * size[0] / size[1]) ** 0.5)
    good = rows > 0 and tokens % rows == 0 and rows * size[1] == tokens // rows * size[0]
    return (rows, tokens // rows) if good else None


def _planned(x: Tensor, policy: Merge) -> Plan | None:
    size = _size.get()
    grid = None if size is None else _grid(x.shape[1], size)
    return None if grid is None else plan(x, grid, policy)


def _drive(network: nn.Module, patch: Patch) -> None:
    """Around every call of the network: it says how large its picture is."""
    plain = forward_of(network)

    def forward(*args: Any, **kwargs: Any) -> Any:
        names = ("hidden_states", "sample")
        x = next((kwargs[n] for n in names if n in kwargs), args[0] if args else None)
        on = not why_off(network) and isinstance(x, Tensor) and x.dim() == 4
        token = _size.set((x.shape[2], x.shape[3]) if on and x is not None else None)
        try:
            return plain(*args, **kwargs)
        finally:
            _size.reset(token)

    patch.set(network, "forward", forward)


def _dit(network: DiT, policy: Merge, patch: Patch) -> int:
    """Our own DiT, whose attention is a method of the network."""
    attend, attention = network.attend, network.attention

    def merged(block: Any, h: Tensor) -> Tensor:
        found = _planned(h, policy)
        if found is None:
            return attend(block, h)
        token = _plan.set(found)
        try:
            return found.unmerge(attend(block, found.merge(h)))
        finally:
            _plan.reset(token)

    def weighted(block: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        found = _plan.get()
        if found is None or not policy.proportional:
            return attention(block, q, k, v)
        return ops.attention(q, k, v, bias=found.sizes.log()[:, None])

    patch.set(network, "attend", merged)
    patch.set(network, "attention", weighted)
    return len(network.blocks)


def _wrapped(plain: Callable[..., Any], policy: Merge) -> Callable[..., Any]:
    """A diffusers attention that is called with its input and keywords."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        context = args[0] if args else kwargs.get("encoder_hidden_states")
        mask = kwargs.get("attention_mask")
        usable = hidden_states.dim() == 3 and context is None and mask is None and len(args) < 2
        found = _planned(hidden_states, policy) if usable else None
        if found is None:
            return plain(hidden_states, *args, **kwargs)
        if policy.proportional:
            kwargs = {**kwargs, "attention_mask": found.sizes.log()[:, None].to(hidden_states)}
        return found.unmerge(plain(found.merge(hidden_states), *args, **kwargs))

    return forward


def _levels(network: nn.Module, count: int) -> Sequence[nn.Module]:
    """Blocks with self-attention; of a U-Net those of its finest resolutions that have any."""
    if not any("UNet" in c.__name__ for c in type(network).__mro__):
        return [m for m in network.modules() if class_name(m) == _BLOCK]
    net: Any = network
    found: list[nn.Module] = []
    for stages in (list(net.down_blocks), list(net.up_blocks)[::-1]):
        of = [[m for m in s.modules() if class_name(m) == _BLOCK] for s in stages]
        found += [m for part in [p for p in of if p][:count] for m in part]
    return found


def reuse(network: nn.Module, policy: Merge, patch: Patch) -> list[str]:
    """Run ``policy`` on ``network``; a sentence that says where.

    Raises:
        ValueError: its attention is not known here, or takes several streams.
    """
    if policy.neutral:
        return [f"{policy}: nothing is merged"]
    if isinstance(network, DiT):
        count = _dit(network, policy, patch)
    else:
        known = any(c.__name__ in _KNOWN for c in type(network).__mro__)
        blocks: Sequence[Any] = _levels(network, policy.levels) if known else ()
        if not blocks or isinstance(network, UNet):
            raise ValueError(
                f"accelerate: cache is {policy!r}, which does not run on "
                f"{type(network).__name__}: known are DiT, {', '.join(_KNOWN)}; attention of "
                "several streams, or with rotary positions, cannot be merged"
            )
        for block in blocks:
            patch.set(block.attn1, "forward", _wrapped(forward_of(block.attn1), policy))
        count = len(blocks)
    _drive(network, patch)
    return [f"{policy}: self-attention of {count} blocks runs on merged tokens"]
