"""The ops: a file each, with the maths, the reference, the rows and the public function."""

from fastdiff.ops.aggregate_features import aggregate_features, aggregate_features_backward
from fastdiff.ops.attention import GroupBias, attention
from fastdiff.ops.conv3x3 import conv3x3
from fastdiff.ops.fused_step import Noise, fused_step, philox_normal
from fastdiff.ops.geglu import geglu
from fastdiff.ops.gelu_tanh import gelu_tanh
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.grouped_linear import grouped_linear, grouped_weight_grad
from fastdiff.ops.grouped_quant_linear import (
    ExpertWeight,
    dequantize_experts,
    grouped_quant_linear,
    quantize_experts,
)
from fastdiff.ops.layer_norm_modulate import (
    gate_residual,
    gate_residual_norm_modulate,
    gate_residual_norm_quantize,
    layer_norm_modulate,
)
from fastdiff.ops.linear import linear
from fastdiff.ops.lora import lora_add, lora_linear
from fastdiff.ops.moe import Routing, load_balance_loss, moe_combine, moe_route, z_loss
from fastdiff.ops.qk_norm_rope import axial_rope, qk_norm_rope, rope_table
from fastdiff.ops.quant_attention import quant_attention
from fastdiff.ops.quant_linear import quant_linear
from fastdiff.ops.quantize import (
    Quantized,
    QuantWeight,
    dequantize_weight,
    quantize,
    quantize_weight,
)
from fastdiff.ops.quantize_patches import quantize_patches
from fastdiff.ops.resample import resample
from fastdiff.ops.sample_sums import sample_sums
from fastdiff.ops.scale_shift import scale_shift, scale_shift_backward
from fastdiff.ops.select_tokens import select_tokens
from fastdiff.ops.sparse_adamw import sparse_adamw_
from fastdiff.ops.sparse_grad import (
    SparseIndex,
    sparse_conv2d_weight_grad,
    sparse_grad_conv2d,
    sparse_grad_linear,
    sparse_grad_tap,
    sparse_weight_grad,
)
from fastdiff.ops.tokens import gather_tokens, scatter_tokens, update_tokens_

__all__ = [
    "ExpertWeight",
    "GroupBias",
    "Noise",
    "QuantWeight",
    "Quantized",
    "Routing",
    "SparseIndex",
    "aggregate_features",
    "aggregate_features_backward",
    "attention",
    "axial_rope",
    "conv3x3",
    "dequantize_experts",
    "dequantize_weight",
    "fused_step",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gate_residual_norm_quantize",
    "gather_tokens",
    "geglu",
    "gelu_tanh",
    "group_norm_silu",
    "layer_norm_modulate",
    "grouped_linear",
    "grouped_quant_linear",
    "grouped_weight_grad",
    "linear",
    "load_balance_loss",
    "lora_add",
    "lora_linear",
    "moe_combine",
    "moe_route",
    "philox_normal",
    "qk_norm_rope",
    "quant_attention",
    "quant_linear",
    "quantize",
    "quantize_experts",
    "quantize_patches",
    "quantize_weight",
    "resample",
    "rope_table",
    "sample_sums",
    "scale_shift",
    "scale_shift_backward",
    "scatter_tokens",
    "select_tokens",
    "sparse_adamw_",
    "sparse_conv2d_weight_grad",
    "sparse_grad_conv2d",
    "sparse_grad_linear",
    "sparse_grad_tap",
    "sparse_weight_grad",
    "update_tokens_",
    "z_loss",
]
