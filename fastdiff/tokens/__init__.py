"""Token policies: which tokens of a picture a step computes. Pure; the engine holds their state."""

from fastdiff.tokens.region import RegionAdaptive

__all__ = ["RegionAdaptive"]
