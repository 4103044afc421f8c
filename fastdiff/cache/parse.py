"""Policies as text: ``deepcache:3``, ``deepcache:interval=3,branch=1``, ``encoder:0+5+10``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fastdiff.cache.accumulated import AccumulatedDistance
from fastdiff.cache.broadcast import Broadcast
from fastdiff.cache.deepcache import DeepCache
from fastdiff.cache.faster_diffusion import EncoderPropagation
from fastdiff.cache.first_block import FirstBlock
from fastdiff.cache.forecast import Forecast
from fastdiff.cache.guidance import GuidanceReuse
from fastdiff.cache.magnitude import MagnitudeRatio
from fastdiff.precision import Precision
from fastdiff.tokens.merge import Merge
from fastdiff.tokens.region import RegionAdaptive

POLICIES: dict[str, Any] = {
    "accumulated": AccumulatedDistance,
    "broadcast": Broadcast,
    "deepcache": DeepCache,
    "encoder": EncoderPropagation,
    "firstblock": FirstBlock,
    "guidance": GuidanceReuse,
    "magnitude": MagnitudeRatio,
    "merge": Merge,
    "precision": Precision,
    "taylor": Forecast,
    "tokens": RegionAdaptive,
}


def _value(text: str) -> Any:
    """An integer, a number, a truth value, integers joined by +, or else the text itself."""
    if text in ("true", "false"):
        return text == "true"
    if "+" in text and all(part.isdecimal() for part in text.split("+")):
        return [int(part) for part in text.split("+")]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse(text: str) -> Any:
    """The policy of ``name:value,name=value,...``; a value without a name is the first setting's.

    Raises:
        ValueError: no such policy or setting, or a value that does not fit.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"cache is {text!r}, need one of {', '.join(POLICIES)}, such as taylor:3")
    policy = POLICIES[name]
    names = [field.name for field in fields(policy)]
    settings: dict[str, Any] = {}
    for i, item in enumerate(rest.split(",") if rest else []):
        key, equals, value = item.partition("=")
        if not equals:
            key, value = names[0], item
        if key not in names or key in settings or (not equals and i):
            raise ValueError(
                f"cache is {text!r}: {item!r} does not fit, need name=value, with names of "
                f"{', '.join(names)}"
            )
        settings[key] = _value(value)
    return policy(**settings)
