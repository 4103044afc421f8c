"""Token policies: which tokens of a picture a step computes. Pure; the engine holds their state."""

from fastdiff.tokens.attention_scale import entropy_scale, parabola, reference_bias, region_bias
from fastdiff.tokens.merge import Merge
from fastdiff.tokens.region import RegionAdaptive

__all__ = ["Merge", "RegionAdaptive", "entropy_scale", "parabola", "reference_bias", "region_bias"]
