"""Cache policies: when to compute and when to reuse. Pure; the engine holds their state."""

from fastdiff.cache.deepcache import DeepCache

__all__ = ["DeepCache"]
