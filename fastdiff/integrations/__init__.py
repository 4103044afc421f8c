"""Other people's networks: what they are made of, and their parts on our operations.

A file for each family; each has what of these it can:
    exact(network, patch) -> list[str]: replaces parts by ours, same output; a sentence for each
    view(network) -> BlockView | None: the network as a list of blocks, for cache policies
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from fastdiff.cache import (
    AccumulatedDistance,
    Broadcast,
    DeepCache,
    EncoderPropagation,
    FirstBlock,
    Forecast,
    GuidanceReuse,
    MagnitudeRatio,
)
from fastdiff.engine import reuse_encoder, reuse_guidance, reuse_routing, reuse_unet
from fastdiff.engine.patch import Patch
from fastdiff.engine.reuse_blocks import ends_of
from fastdiff.engine.view import BlockView
from fastdiff.experts import RoutingReuse
from fastdiff.integrations import merge_views, module_views, token_views, unet_views, views
from fastdiff.integrations.attentions import asking
from fastdiff.integrations.conditioned import Conditioned
from fastdiff.integrations.exact_mode import exact
from fastdiff.tokens import Merge, RegionAdaptive

__all__ = ["Conditioned", "asking", "exact", "reuse"]


_DEEP = (
    AccumulatedDistance,
    DeepCache,
    EncoderPropagation,
    FirstBlock,
    Forecast,
    MagnitudeRatio,
)
_SCHEDULED = (DeepCache, EncoderPropagation, Forecast, MagnitudeRatio)
# What policies skip, the innermost first; one network takes one of each.
_KINDS: tuple[tuple[type, ...], ...] = (
    (RoutingReuse,),
    (Merge,),
    (RegionAdaptive,),
    (Broadcast,),
    _DEEP,
    (GuidanceReuse,),
)


def _kind(policy: Any) -> int:
    for i, classes in enumerate(_KINDS):
        if isinstance(policy, classes):
            return i
    raise ValueError(
        f"accelerate: cache is {policy!r}, need policies of fastdiff.cache, fastdiff.tokens or "
        "fastdiff.experts"
    )


def reuse(
    network: nn.Module, policies: Sequence[Any], patch: Patch, view: BlockView | None = None
) -> list[str]:
    """Let ``policies`` skip parts of ``network``, or of its blocks as ``view`` has them; sentences
    that name them.

    Raises:
        ValueError: a policy cannot run on this class of network, or two of them skip the same.
    """
    ordered = sorted(policies, key=_kind)
    for one, two in pairwise(ordered):
        if _kind(one) == _kind(two):
            raise ValueError(
                f"accelerate: cache has {one!r} and {two!r}, which skip the same parts; need one"
            )
    parts = []
    if ordered and isinstance(ordered[0], RoutingReuse):
        parts = _routing(network, ordered.pop(0), ordered, patch)
    if ordered and isinstance(ordered[0], Merge):
        parts += _merge(network, ordered.pop(0), ordered, patch, view)
    if ordered and isinstance(ordered[0], RegionAdaptive):
        parts += _tokens(network, ordered[0], ordered[1:], patch, view)
    inner = [p for p in ordered if not isinstance(p, GuidanceReuse | RegionAdaptive)]
    if inner and isinstance(inner[0], Broadcast) and not inner[0].neutral:
        _with_modules(inner[1:])
    parts += [part for policy in inner for part in _reuse(network, policy, patch, view)]
    inner = [policy for policy in ordered if not isinstance(policy, GuidanceReuse)]
    for policy in ordered[len(inner) :]:
        _with_guidance(policy, inner)
        parted = any(not p.neutral for p in inner)
        parts += reuse_guidance.guidance(network, policy, patch, parted)
    return parts


def _routing(
    network: nn.Module, policy: RoutingReuse, others: Sequence[Any], patch: Patch
) -> list[str]:
    """Kept routes, below the other policies."""
    for other in others:
        some = isinstance(other, AccumulatedDistance | FirstBlock | RegionAdaptive)
        if some and not policy.neutral and not other.neutral:
            raise ValueError(
                f"accelerate: cache has {policy!r} and {other!r}, whose steps route other tokens; "
                "need one of them"
            )
    return [] if policy.neutral else reuse_routing.routing(network, policy, patch)


def _merge(
    network: nn.Module,
    policy: Merge,
    others: Sequence[Any],
    patch: Patch,
    view: BlockView | None,
) -> list[str]:
    """Merged tokens, below the other policies."""
    for other in others:
        if isinstance(other, RegionAdaptive) and not policy.neutral and not other.neutral:
            raise ValueError(
                f"accelerate: cache has {policy!r} and {other!r}, whose kept keys are of single "
                "tokens; need one of them"
            )
    if view is not None and not policy.neutral:
        raise ValueError(
            f"accelerate: cache is {policy!r}, which needs to know the network's attention, and "
            "view does not tell; need another policy, or no view"
        )
    return merge_views.reuse(network, policy, patch)


def _tokens(
    network: nn.Module,
    policy: RegionAdaptive,
    others: Sequence[Any],
    patch: Patch,
    view: BlockView | None,
) -> list[str]:
    """Tokens in focus, below the other policies."""
    first, always = 0, False
    for other in others:
        if policy.neutral or other.neutral:
            continue
        if isinstance(other, Broadcast):
            always = True
        if isinstance(other, _DEEP) and not isinstance(other, EncoderPropagation):
            first, always = ends_of(other)[0], True
    if view is not None and not policy.neutral:
        raise ValueError(
            f"accelerate: cache is {policy!r}, which needs to know the network's attention, and "
            "view does not tell; need another policy, or no view"
        )
    return token_views.reuse(network, policy, patch, first, always)


def _with_guidance(policy: GuidanceReuse, inner: Sequence[Any]) -> None:
    """Refuse what plans several steps of one batch ahead, next to a branch that misses steps."""
    for other in inner:
        if isinstance(other, EncoderPropagation) and not policy.neutral:
            raise ValueError(
                f"accelerate: cache has {other!r}, whose steps between key steps need the key "
                "step's features of both branches, next to GuidanceReuse; need DeepCache there"
            )


def _with_modules(policies: Sequence[Any]) -> None:
    """Refuse what hands batches of changing samples to modules that keep their outputs."""
    for policy in policies:
        why = "takes single samples out of the batch"
        if isinstance(policy, _SCHEDULED) or policy.neutral:
            why = ""
        if isinstance(policy, EncoderPropagation) and policy.parallel > 1:
            why = "decodes several steps in one batch"
        if why:
            raise ValueError(
                f"accelerate: cache has {policy!r}, which {why}, next to Broadcast; need a policy "
                "with a schedule there, such as Forecast"
            )


def _reuse(network: nn.Module, policy: Any, patch: Patch, given: BlockView | None) -> list[str]:
    if given is not None:
        if isinstance(policy, Broadcast | EncoderPropagation):
            raise ValueError(
                f"accelerate: cache is {policy!r}, which does not run on a list of blocks, and "
                "view is one; need another policy, or no view"
            )
        return views.given(network, given, policy, patch)
    if isinstance(policy, Broadcast):
        return module_views.reuse(network, policy, patch)
    if not isinstance(policy, EncoderPropagation):
        parts = views.reuse(network, policy, patch)
        if parts is not None:
            return parts
    view = unet_views.view(network)
    if isinstance(view, str):
        raise ValueError(
            f"accelerate: cache is {policy!r}, which does not run on {type(network).__name__}: "
            f"{view}"
        )
    if isinstance(policy, EncoderPropagation):
        return reuse_encoder.encoder_propagation(network, view, policy, patch)
    return reuse_unet.depths(network, view, policy, patch)
