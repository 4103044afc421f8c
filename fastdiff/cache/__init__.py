"""Cache policies: when to compute and when to reuse. Pure; the engine holds their state."""

from fastdiff.cache.accumulated import AccumulatedDistance
from fastdiff.cache.broadcast import Broadcast
from fastdiff.cache.deepcache import DeepCache
from fastdiff.cache.faster_diffusion import EncoderPropagation
from fastdiff.cache.first_block import FirstBlock
from fastdiff.cache.forecast import Forecast
from fastdiff.cache.guidance import GuidanceReuse
from fastdiff.cache.magnitude import MagnitudeRatio

__all__ = [
    "AccumulatedDistance",
    "Broadcast",
    "DeepCache",
    "EncoderPropagation",
    "FirstBlock",
    "Forecast",
    "GuidanceReuse",
    "MagnitudeRatio",
]
