"""The ops: one file each, with the maths, the reference, the table of rows and the public function."""

from fastdiff.ops.attention import GroupBias, attention
from fastdiff.ops.gelu_tanh import gelu_tanh

__all__ = ["GroupBias", "attention", "gelu_tanh"]
