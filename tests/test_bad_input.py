"""Bad input: one error that names op, argument, value and need; no crash and no wrong result.

Every tensor argument of every op is spoilt in every way of ``SPOIL``; ``CASES`` adds what is
particular to an op. The C++ entries, which see no check of Python's, get the same in a process of
their own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nan, ones

import fastdiff
from fastdiff import info, ops
from fastdiff.ops import GroupBias, Noise, SparseIndex

INF = float("inf")


def index(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def good(op):
    """Keyword arguments of a call that works, with every optional tensor given."""
    x, q = torch.randn(2, 3, 8), torch.randn(2, 2, 5, 8)
    rows = len(info.COLUMNS)
    return {
        "aggregate_features": dict(x=ones(3, 2, 4, 5), logits=ones(3, 2, 1, 5)),
        "aggregate_features_backward": dict(
            grad=ones(2, 4, 5), x=ones(3, 2, 4, 5), logits=ones(3, 2, 1, 5)
        ),
        "attention": dict(
            q=q, k=q, v=q, bias=torch.zeros(2, 2, 5, 5), key_lengths=index(2) + 3,
            q_index=index(2, 4),
        ),
        "conv3x3": dict(x=q, weight=ones(3, 2, 3, 3), bias=ones(2, 3), add=ones(2, 3, 5, 8)),
        "fused_step": dict(
            x=q, m=torch.stack((q, q)), w=ones(2, 2), coef=torch.zeros(2, rows), step=index(2),
            h1=q, h2=q, mask=ones(2, 1, 5, 8), ref=q, stored=q,
            select=torch.ones(2, dtype=torch.bool),
        ),
        "gate_residual": dict(x=x, y=x, gate=torch.randn(2, 8)),
        "gate_residual_norm_modulate": dict(
            x=x, y=x, gate=torch.randn(2, 8), shift=torch.randn(2, 8), scale=torch.randn(2, 8),
            weight=ones(8), bias=ones(8),
        ),
        "gate_residual_norm_quantize": dict(
            x=x, y=x, gate=torch.randn(2, 8), shift=torch.randn(2, 8), scale=torch.randn(2, 8),
            weight=ones(8), bias=ones(8), smooth=ones(8),
        ),
        "gather_tokens": dict(x=x, index=index(2, 2)),
        "geglu": dict(x=x, bias=ones(8)),
        "gelu_tanh": dict(x=x, bias=ones(8)),
        "group_norm_silu": dict(
            x=q, num_groups=1, weight=ones(2), bias=ones(2), shift=ones(2, 2), scale=ones(2, 2)
        ),
        "grouped_linear": dict(
            x=x[0], weight=ones(2, 4, 8), offsets=index(3), bias=ones(2, 4), index=index(5)
        ),
        "grouped_quant_linear": dict(
            x=x[0], weight=ops.quantize_experts(ones(2, 4, 8), group=4), offsets=index(3),
            bias=ones(2, 4), index=index(5), smooth=ones(8),
        ),
        "grouped_weight_grad": dict(grad=ones(5, 4), x=x[0], offsets=index(3), index=index(5)),
        "layer_norm_modulate": dict(
            x=x, shift=torch.randn(2, 8), scale=torch.randn(2, 8), weight=ones(8), bias=ones(8)
        ),
        "linear": dict(x=x, weight=ones(4, 8), bias=ones(4)),
        "lora_add": dict(
            y=ones(2, 3, 4), x=x, down=ones(3, 5, 8), up=ones(3, 4, 5), scale=ones(3),
            index=index(2),
        ),
        "moe_combine": dict(y=x[0], weights=ones(2, 2), position=index(2, 2)),
        "moe_route": dict(logits=ones(6, 4), k=2, sample_logits=ones(3, 4)),
        "philox_normal": dict(shape=(2, 7), seed=index(2), slot=index(2), step=index(2)),
        "qk_norm_rope": dict(
            q=q, k=q, q_weight=ones(8), k_weight=ones(8), cos=ones(5, 4), sin=ones(5, 4),
            position=index(2, 5),
        ),
        "quant_attention": dict(q=q, k=q, v=q),
        "quant_linear": dict(
            x=x, weight=ops.quantize_weight(ones(4, 8), group=4), bias=ones(4), smooth=ones(8)
        ),
        "quantize": dict(x=x, smooth=ones(8)),
        "quantize_patches": dict(x=q, size=3),
        "resample": dict(logw=ones(2, 6), u=ones(2).double() / 2),
        "sample_sums": dict(x=x, y=x, kind="product"),
        "scale_shift": dict(x=x, scale=ones(3, 8), shift=ones(3, 8), index=index(2)),
        "scale_shift_backward": dict(grad=x, x=x, scale=ones(3, 8), index=index(2)),
        "scatter_tokens": dict(x=x, index=index(2, 2), y=ones(2, 2, 8), gate=ones(2, 8)),
        "select_tokens": dict(
            score=ones(2, 6), count=2, drops=torch.zeros(2, 6, dtype=torch.int32),
            forced=torch.zeros(2, 6, dtype=torch.bool),
        ),
        "sparse_adamw_": dict(
            values=torch.ones(4), grad=ones(4), exp_avg=torch.ones(4), exp_avg_sq=torch.ones(4),
            weight=torch.ones(2, 3), index=torch.arange(4) + 2, step=torch.ones(1), lr=0.1,
            beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1,
        ),
        "sparse_conv2d_weight_grad": dict(
            grad=ones(2, 3, 5, 8), x=q, index=SparseIndex.of_mask(ones(3, 2, 3, 3) > 0), padding=1
        ),
        "sparse_weight_grad": dict(
            grad=ones(5, 4), x=ones(5, 8), index=SparseIndex.of_mask(ones(4, 8) > 0)
        ),
        "update_tokens_": dict(cache=x.clone(), index=index(2, 2), y=ones(2, 2, 8)),
    }[op]  # fmt: skip


SPOIL = {
    "a string": lambda t: "tensor",
    "a number": lambda t: 1.5,
    "a list": lambda t: t.tolist(),
    "int32": lambda t: t.to(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "another device": lambda t: t.to("meta"),
    "one dimension more": lambda t: t.reshape(1, 1, 1, 1, *t.shape),
    "no dimension": lambda t: t.flatten()[0].clone(),
    "sparse": lambda t: t.to_sparse(),
    "last dimension + 1": lambda t: torch.cat((t, t[..., :1]), -1),
    "first dimension + 1": lambda t: torch.cat((t, t[:1]), 0),
}
# What an op may take that others refuse.
FINE = {
    ("geglu", "x", "one dimension more"): "any number of leading dimensions",
    ("gelu_tanh", "x", "one dimension more"): "any number of leading dimensions",
    ("linear", "x", "one dimension more"): "any number of leading dimensions",
    ("geglu", "x", "first dimension + 1"): "a larger batch, which no other argument has",
    ("gelu_tanh", "x", "first dimension + 1"): "a larger batch, which no other argument has",
    ("linear", "x", "first dimension + 1"): "a larger batch, which no other argument has",
    ("quant_linear", "x", "one dimension more"): "any number of leading dimensions",
    ("quant_linear", "x", "first dimension + 1"): "a larger batch, which no other argument has",
    ("quantize", "x", "one dimension more"): "any number of leading dimensions",
    ("quantize", "x", "first dimension + 1"): "a larger batch, which no other argument has",
    ("quantize_patches", "x", "another device"): "there is no other tensor",
    ("quantize_patches", "x", "first dimension + 1"): "a larger batch, which no other argument has",
    ("quantize_patches", "x", "last dimension + 1"): "a wider picture, which no other has",
    ("group_norm_silu", "x", "last dimension + 1"): "a wider picture, which no other argument has",
    ("gather_tokens", "x", "last dimension + 1"): "a wider row, which no other argument has",
    ("gather_tokens", "index", "last dimension + 1"): "any number of rows may be chosen",
    ("attention", "q_index", "last dimension + 1"): "any number of rows may be chosen",
    ("qk_norm_rope", "cos", "first dimension + 1"): "sin is what differs then, and is named",
    ("grouped_linear", "x", "first dimension + 1"): "more tokens, which the index picks from",
    ("grouped_quant_linear", "x", "first dimension + 1"): "more tokens, which the index picks from",
    ("grouped_linear", "index", "first dimension + 1"): "any number of rows may be picked",
    ("grouped_quant_linear", "index", "first dimension + 1"): "any number of rows may be picked",
    ("grouped_linear", "index", "last dimension + 1"): "any number of rows may be picked",
    ("grouped_quant_linear", "index", "last dimension + 1"): "any number of rows may be picked",
    ("grouped_weight_grad", "grad", "last dimension + 1"): "a wider row, which no other has",
    ("grouped_weight_grad", "x", "first dimension + 1"): "more tokens, which the index picks from",
    ("grouped_weight_grad", "x", "last dimension + 1"): "a wider row, which no other has",
    ("grouped_weight_grad", "offsets", "first dimension + 1"): "any number of groups",
    ("grouped_weight_grad", "offsets", "last dimension + 1"): "any number of groups",
    ("quant_attention", "v", "last dimension + 1"): "a wider row, which no other argument has",
    ("scale_shift_backward", "scale", "first dimension + 1"): "any number of rows",
    ("resample", "logw", "last dimension + 1"): "a larger group, which no other argument has",
    ("moe_combine", "y", "first dimension + 1"): "more rows, which the positions pick from",
    ("moe_combine", "y", "last dimension + 1"): "a wider row, which no other argument has",
    ("linear", "weight", "first dimension + 1"): "bias is what differs then, and is named",
    ("fused_step", "step", "no dimension"): "one row for all samples",
    ("select_tokens", "drops", "int32"): "they are that",
    ("sparse_adamw_", "index", "int32"): "either kind of integers",
    ("sparse_adamw_", "weight", "one dimension more"): "any shape",
    ("sparse_adamw_", "weight", "last dimension + 1"): "a larger weight, whose entries are taken",
    ("sparse_adamw_", "weight", "first dimension + 1"): "a larger weight, whose entries are taken",
    ("fused_step", "coef", "first dimension + 1"): "step picks rows of any number of them",
    ("philox_normal", "seed", "no dimension"): "one seed for all samples",
    ("philox_normal", "slot", "no dimension"): "one slot for all samples",
    ("philox_normal", "step", "no dimension"): "one step for all samples",
}


@pytest.mark.parametrize("how", SPOIL)
@pytest.mark.parametrize("op", info.op_names())
def test_spoilt_tensor(op, how):
    call = good(op)
    getattr(ops, op)(**call)
    for name, value in call.items():
        if not isinstance(value, torch.Tensor) or (op, name, how) in FINE:
            continue
        with pytest.raises(ValueError) as caught:
            getattr(ops, op)(**{**call, name: SPOIL[how](value)})
            pytest.fail(f"{op} takes {name} as {how}")
        text = str(caught.value)
        assert text.startswith(f"{op}: ") and "need" in text, f"{name} as {how}: {text}"
        assert "\n" not in text


X, Q = torch.randn(2, 3, 8), torch.randn(2, 2, 5, 8)
GROUPS = GroupBias(index(2, 5), index(2, 5), torch.zeros(1, 1, 2, 2))
LORA, INT8 = good("lora_add"), good("quant_linear")["weight"]
CASES = [
    ("attention", dict(q=Q, k=Q, v=Q, scale=nan), "scale is nan, need a finite number"),
    ("attention", dict(q=Q, k=Q, v=Q, scale="big"), "scale is 'big', need a finite number"),
    ("attention", dict(q=Q, k=Q[:1], v=Q), r"k has shape \[1, 2, 5, 8\], need \[2, 2, 5, 8\]"),
    ("attention", dict(q=Q, k=Q[..., :4], v=Q), r"k has shape \[2, 2, 5, 4\], need"),
    ("attention", dict(q=Q, k=Q, v=Q[:, :, :4]), r"v has shape \[2, 2, 4, 8\], need"),
    ("attention", dict(q=Q[..., :0], k=Q[..., :0], v=Q[..., :0]), "need a head dimension above 0"),
    ("attention", dict(q=Q, k=Q, v=Q.half()), "v is torch.float16, need torch.float32"),
    ("attention", dict(q=Q, k=Q, v=Q, bias=ones(3, 1, 5)), r"bias has shape \[3, 1, 5\], need"),
    ("attention", dict(q=Q, k=Q, v=Q, key_lengths=index(2) + 6), "key_lengths .* 6.* need"),
    ("attention", dict(q=Q, k=Q, v=Q, key_lengths=index(2) - 1), "key_lengths .* -1.* need"),
    ("attention", dict(q=Q, k=Q, v=Q, q_index=index(2, 1) + 5), "q_index .* 5.* need"),
    ("attention", dict(q=Q, k=Q, v=Q, q_index=index(2, 1) - 1), "q_index .* -1.* need"),
    ("attention", dict(q=Q, k=Q, v=Q, bias=GROUPS._replace(query_group=index(2, 5) + 2)),
     "query_group .* 2.* need"),
    ("attention", dict(q=Q, k=Q, v=Q, bias=GROUPS._replace(key_group=index(2, 5) - 1)),
     "key_group .* -1.* need"),
    ("attention", dict(q=Q, k=Q, v=Q, bias=GROUPS._replace(table=ones(2, 2))),
     r"table has shape \[2, 2\], need 4 dimensions"),
    ("attention", dict(q=Q, k=Q, v=Q, bias=GROUPS._replace(table=ones(1, 3, 2, 2))),
     r"table has shape \[1, 3, 2, 2\]"),
    ("group_norm_silu", dict(x=Q, num_groups=3), "num_groups is 3, need a divisor of C = 2"),
    ("group_norm_silu", dict(x=Q, num_groups=0), "num_groups is 0, need"),
    ("group_norm_silu", dict(x=Q, num_groups=1.0), "num_groups is 1.0, need"),
    ("group_norm_silu", dict(x=Q, num_groups=1, eps=0), "eps is 0, need a finite number above 0"),
    ("group_norm_silu", dict(x=Q, num_groups=1, eps=nan), "eps is nan"),
    ("layer_norm_modulate", dict(x=X, eps=-1.0), "eps is -1.0, need a finite number above 0"),
    ("layer_norm_modulate", dict(x=X, eps=INF), "eps is inf"),
    ("layer_norm_modulate", dict(x=X, shift=ones(2, 4, 8)), r"shift has shape \[2, 4, 8\], need"),
    ("layer_norm_modulate", dict(x=X[0]), r"x has shape \[3, 8\], need 3 dimensions"),
    ("gate_residual", dict(x=X, y=X[:1], gate=ones(2, 8)), r"y has shape \[1, 3, 8\], need"),
    ("gate_residual", dict(x=X, y=X, gate=ones(8)), r"gate has shape \[8\], need"),
    ("gather_tokens", dict(x=X, index=index(2, 1) + 3), "index has value 3, need 0 to 2"),
    ("gather_tokens", dict(x=X, index=index(2, 1) - 1), "index has value -1, need 0 to 2"),
    ("gather_tokens", dict(x=X, index=index(1, 2)), r"index has shape \[1, 2\], need \[2, any"),
    ("gather_tokens", dict(x=X[0], index=index(2, 1)), r"x has shape \[3, 8\], need 3 dimensions"),
    ("scatter_tokens", dict(x=X, index=index(2, 1) + 3, y=X[:, :1]), "index has value 3, need 0"),
    ("scatter_tokens", dict(x=X, index=index(2, 1) - 1, y=X[:, :1]), "index has value -1, need"),
    ("scatter_tokens", dict(x=X, index=index(2, 1), y=X), r"y has shape \[2, 3, 8\], need \[2, 1"),
    ("scatter_tokens", dict(x=X, index=index(2, 3), y=X, gate=ones(8)), r"gate has shape \[8\]"),
    ("scatter_tokens", dict(x=X, index=index(2, 3), y=X.half()), "y is torch.float16, need"),
    ("quant_attention", dict(q=Q, k=Q, v=Q, scale=INF), "scale is inf, need a finite number"),
    ("quant_attention", dict(q=Q, k=Q, v=Q, smooth=1), "smooth is 1, need True or False"),
    ("quant_attention", dict(q=Q, k=Q[..., :4], v=Q), r"k has shape \[2, 2, 5, 4\], need"),
    ("quant_attention", dict(q=Q, k=Q, v=Q[:, :, :4]), r"v has shape \[2, 2, 4, 8\], need"),
    ("quant_attention", dict(q=Q[..., :0], k=Q[..., :0], v=Q), "need a head dimension of 1 to"),
    ("scale_shift", dict(x=X, scale=ones(8), dim=0), "dim is 0, need -1 or 1"),
    ("scale_shift", dict(x=X, scale=ones(8), dim=1), r"scale has shape \[8\], need \[3\]"),
    ("scale_shift", dict(x=X[0, 0], scale=ones(8)), r"x has shape \[8\], need at least 2"),
    ("scale_shift", dict(x=X, scale=ones(2, 8)), r"scale has shape \[2, 8\], need \[8\]"),
    ("scale_shift", dict(x=X, scale=ones(8), index=index(2)), r"scale has shape \[8\], need \[any"),
    ("scale_shift", dict(x=X, scale=ones(2, 8), index=index(2) + 2), "index has value 2, need 0"),
    ("scale_shift", dict(x=X, scale=ones(2, 8), index=index(2) - 1), "index has value -1, need 0"),
    ("scale_shift", dict(x=X, scale=ones(8).half()), "scale is torch.float16, need torch.float32"),
    ("scale_shift", dict(x=X, scale=ones(8), shift=ones(8).half()), "shift is torch.float16, need"),
    ("scale_shift_backward", dict(grad=X[:1], x=X, scale=ones(8)), r"grad has shape \[1, 3, 8\]"),
    ("scale_shift_backward", dict(grad=X, x=X, scale=ones(2, 8), index=index(2) + 5),
     "index has value 5, need 0 to 1"),
    ("aggregate_features", dict(x=X[:0], logits=X[:0]), "need at least one model"),
    ("aggregate_features", dict(x=X, logits=X[:1]), r"logits has shape \[1, 3, 8\], need \[2,"),
    ("aggregate_features", dict(x=X, logits=X.half()), "logits is torch.float16, need"),
    ("aggregate_features_backward", dict(grad=X[0, :1], x=X, logits=X),
     r"grad has shape \[1, 8\], need \[3, 8\]"),
    ("geglu", dict(x=X[..., :7]), r"x has shape \[2, 3, 7\], need an even last dimension"),
    ("geglu", dict(x=X, approximate="erf"), "approximate is 'erf', need 'none' or 'tanh'"),
    ("lora_add", dict(LORA, index=None), r"down has shape .* with 1 adapter and a rank"),
    ("lora_add", dict(LORA, x=X[:, :2]), r"x has shape \[2, 2, 8\], need \[2, 3, 8\]"),
    ("lora_add", dict(LORA, down=ones(3, 257, 8)), r"need \[adapters, rank, 8\] .* at most 256"),
    ("lora_add", dict(LORA, scale=ones(3).double()), "scale is torch.float64, need torch.float32"),
    ("lora_add", dict(LORA, index=index(2) + 4), "index has value 4, need 0 to 3"),
    ("linear", dict(x=X, weight=ones(4, 7)), r"weight has shape \[4, 7\], need \[4, 8\]"),
    ("linear", dict(x=X, weight=ones(4, 8), activation="relu"), "activation is 'relu', need"),
    ("quantize", dict(x=X, smooth=ones(7)), r"smooth has shape \[7\], need \[8\]"),
    ("quantize", dict(x=X, activation="relu"), "activation is 'relu', need"),
    ("quant_linear", dict(x=X, weight=ones(4, 8)), "weight is Tensor, need a QuantWeight"),
    ("quant_linear", dict(x=X, weight=INT8._replace(scale=ones(4, 3))),
     r"weight.scale is \[4, 3\], need \[4, G\]"),
    ("quant_linear", dict(x=X, weight=INT8._replace(scale=ones(4, 0))),
     r"weight.scale is \[4, 0\], need \[4, G\]"),
    ("quant_linear", dict(x=X, weight=INT8._replace(bits=4)), "need torch.uint8"),
    ("quant_linear", dict(x=X[..., :7], weight=INT8), r"weight is \[4, 8\], need \[N, 7\]"),
    ("quant_linear", dict(x=ops.quantize(X)._replace(scale=ones(3)), weight=INT8),
     r"x.scale has shape \[3\], need \[2, 3\]"),
    ("quant_linear", dict(x=ops.quantize(X), weight=INT8, smooth=ones(8)), "quantised already"),
    ("qk_norm_rope", dict(q=Q, k=Q, cos=ones(5, 4)), "need both"),
    ("qk_norm_rope", dict(q=Q, k=Q, cos=ones(5, 5), sin=ones(5, 5)),
     r"cos has shape \[5, 5\], need"),
    ("qk_norm_rope", dict(q=Q, k=Q, cos=ones(4, 4), sin=ones(4, 4)),
     r"cos has shape \[4, 4\], need"),
    ("qk_norm_rope", dict(q=Q, k=Q, position=index(2, 5)), "need cos and sin"),
    ("qk_norm_rope", dict(q=Q, k=Q, cos=ones(5, 4), sin=ones(5, 4), position=index(2, 5) + 5),
     "position .* 5.* need"),
    ("qk_norm_rope", dict(q=Q, k=Q, cos=ones(5, 4), sin=ones(5, 4), position=index(2, 5) - 1),
     "position .* -1.* need"),
    ("qk_norm_rope", dict(q=Q, k=Q, eps=-1), "eps is -1, need"),
    ("fused_step", dict(x=Q, m=Q, coef=torch.zeros(7)), r"coef has shape \[7\], need"),
    ("fused_step", dict(x=Q, m=torch.stack((Q, Q)), coef=torch.zeros(1, 16)), "need"),
    ("fused_step", dict(good("fused_step"), step=index(2) + 2), "step .* 2.* need"),
    ("fused_step", dict(good("fused_step"), step=index(2) - 1), "step .* -1.* need"),
    ("fused_step", dict(good("fused_step"), rescale=2.0), "rescale is 2.0, need"),
    ("fused_step", dict(good("fused_step"), ref=None), "mask and ref go together"),
    ("fused_step", dict(good("fused_step"), noise=Noise(-1)), "seed is -1, need"),
    ("philox_normal", dict(shape=(2, -1), seed=0), r"shape is \(2, -1\), need"),
    ("philox_normal", dict(shape=(), seed=0), r"shape is \(\), need"),
    ("philox_normal", dict(shape=(2, 3), seed=2**63), "seed is 9223372036854775808, need"),
    ("philox_normal", dict(shape=(2, 3), seed=0, stream=-1), "stream is -1, need"),
]  # fmt: skip


@pytest.mark.parametrize("op, call, message", CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_particular(op, call, message):
    """On every row that takes such a call: an index is checked where it is used."""
    for row in (None, "ref"):
        with pytest.raises((ValueError, RuntimeError, IndexError), match=message) as caught:
            getattr(ops, op)(**call, impl=row)
        assert str(caught.value).startswith(f"{op}: "), f"{row}: {caught.value}"


@pytest.mark.parametrize("op", info.op_names())
def test_no_such_row(op):
    with pytest.raises(fastdiff.NoImpl, match=f"^{op}: no row named magic; this op has .*ref"):
        getattr(ops, op)(**good(op), impl="magic")


ENTRIES = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import fastdiff
assert fastdiff.cpu_levels()
torch.manual_seed(0)
x, q, one, long = torch.randn(2, 3, 8), torch.randn(2, 2, 5, 8), torch.ones, torch.int64
CALLS = dict(
    aggregate_features=dict(x=one(3, 2, 4, 5), logits=one(3, 2, 1, 5)),
    aggregate_features_backward=dict(grad=one(2, 4, 5), x=one(3, 2, 4, 5),
                                     logits=one(3, 2, 1, 5)),
    lora_add=dict(y=one(2, 3, 4), x=x, down=one(3, 5, 8), up=one(3, 4, 5), scale=one(3),
                  index=torch.zeros(2, dtype=long)),
    attention=dict(q=q, k=q, v=q, scale=1.0, bias=torch.zeros(2, 2, 5, 5),
                   key_lengths=torch.full((2,), 3), q_index=torch.zeros(2, 4, dtype=long)),
    layer_norm_modulate=dict(x=x, shift=x[:, 0], scale=x[:, 0], weight=one(8), bias=one(8)),
    gate_residual=dict(x=x, y=x, gate=x[:, 0]),
    gate_residual_norm_modulate=dict(x=x, y=x, gate=x[:, 0], shift=x[:, 0], scale=x[:, 0],
                                     weight=one(8), bias=one(8)),
    gate_residual_norm_quantize=dict(x=x, y=x, gate=x[:, 0], shift=x[:, 0], scale=x[:, 0],
                                     weight=one(8), bias=one(8), smooth=one(8)),
    conv3x3=dict(x=q, weight=one(3, 2, 3, 3), bias=one(2, 3), add=one(2, 3, 5, 8)),
    group_norm_silu=dict(x=q, num_groups=1, weight=one(2), bias=one(2), shift=one(2, 2),
                         scale=one(2, 2)),
    fused_step=dict(x=q, m=torch.stack((q, q)), w=one(2, 2), coef=torch.zeros(2, 14),
                    step=torch.zeros(2, dtype=long), h1=q, h2=q, rescale=one(2),
                    seed=torch.ones(2, dtype=long), slot=torch.ones(2, dtype=long),
                    noise_step=torch.ones(2, dtype=long), mask=one(2, 1, 5, 8), ref=q,
                    select=torch.ones(2, dtype=torch.bool), stored=q),
    philox_normal=dict(seed=torch.ones(2, dtype=long), slot=torch.ones(2, dtype=long),
                       step=torch.ones(2, dtype=long)),
    gather_tokens=dict(x=x, index=torch.zeros(2, 2, dtype=long)),
    quant_attention=dict(q=q, k=q, v=q, scale=1.0),
    quant_linear=dict(q=one(2, 3, 8, dtype=torch.int8), s=one(2, 3),
                      values=one(4, 8, dtype=torch.int8), scale=one(4, 2), bias=one(4)),
    grouped_quant_linear=dict(q=one(6, 8, dtype=torch.int8), s=one(6),
                              values=one(2, 4, 8, dtype=torch.int8), scale=one(2, 4, 2),
                              offsets=torch.tensor([0, 2, 5]), bias=one(2, 4),
                              index=torch.zeros(5, dtype=long)),
    quantize=dict(x=x, smooth=one(8), dtype=torch.int8),
    quantize_patches=dict(x=q),
    resample=dict(logw=one(2, 6), u=one(2).double()),
    sample_sums=dict(x=x, y=x),
    scale_shift=dict(x=x, scale=one(3, 8), shift=one(3, 8), index=torch.zeros(2, dtype=long)),
    scale_shift_backward=dict(grad=x, x=x, scale=one(3, 8), index=torch.zeros(2, dtype=long)),
    scatter_tokens=dict(x=x, index=torch.zeros(2, 2, dtype=long), y=x[:, :2], gate=x[:, 0]),
    select_tokens=dict(score=one(2, 6), drops=torch.zeros(2, 6, dtype=torch.int32),
                       forced=torch.zeros(2, 6, dtype=torch.bool), factors=one(2, 9)),
    sparse_adamw_=dict(values=torch.ones(4), grad=one(4), exp_avg=torch.ones(4),
                       exp_avg_sq=torch.ones(4), weight=torch.ones(2, 3),
                       index=torch.arange(4) + 2, step=torch.ones(1)),
    update_tokens_=dict(cache=x.clone(), index=torch.zeros(2, 2, dtype=long), y=one(2, 2, 8)),
    geglu=dict(x=x, bias=one(8)),
    gelu_tanh=dict(x=x, bias=one(8)),
    qk_norm_rope=dict(q=q, k=q, q_weight=one(8), k_weight=one(8), cos=one(5, 4), sin=one(5, 4),
                      position=torch.zeros(2, 5, dtype=long)),
)
SPOIL = dict(
    int32=lambda t: t.to(torch.int32),
    double=lambda t: t.double(),
    other_float=lambda t: t.to(torch.bfloat16 if t.is_floating_point() else torch.float32),
    more_dims=lambda t: t.reshape(1, 1, 1, 1, *t.shape),
    scalar=lambda t: t.flatten()[0].clone(),
    last_more=lambda t: torch.cat((t, t[..., :1]), -1),
    last_less=lambda t: t[..., :-1],
    first_more=lambda t: torch.cat((t, t[:1]), 0),
    empty=lambda t: t[:0],
    empty_last=lambda t: t[..., :0],
    high=lambda t: t + 1000 if t.dtype == long else None,
    negative=lambda t: t - 1000 if t.dtype == long else None,
    meta=lambda t: t.to("meta"),
)
FLAGS = dict(eps=1e-6, rms=False, upsample=False, silu=True, tanh=False, interleaved=True, stream=0,
             dtype=torch.float32, dim=-1, keep=True, numel=7, count=2, low=1, most=3, reset=True,
             lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, step_size=0.1, root=1.0,
             difference=True, least=4.0, smooth=True, size=3, stride=1, padding=1)
for op, given in CALLS.items():
    entry = getattr(torch.ops.fastdiff, op).default
    base = {a.name: given.get(a.name, FLAGS.get(a.name)) for a in entry._schema.arguments}
    entry(**base)  # a good call works
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            continue
        for how, spoil in SPOIL.items():
            spoilt = spoil(value)
            if spoilt is None:
                continue
            print(json.dumps([op, name, how, "start", ""]), flush=True)
            try:
                out = entry(**{**base, name: spoilt})
                for t in out if isinstance(out, tuple) else (out,):
                    t.sum() if t is not None and t.device.type == "cpu" else None
                result = "took it", ""
            except Exception as error:
                result = type(error).__name__, str(error).split("\\n")[0]
            print(json.dumps([op, name, how, *result]), flush=True)
print(json.dumps(["group_norm_silu", "num_groups", "3", "start", ""]), flush=True)
for groups in (3, 0, -1, 2**40):
    try:
        torch.ops.fastdiff.group_norm_silu(q, groups, None, None, None, None, 1e-5, True)
        print(json.dumps(["group_norm_silu", "num_groups", groups, "took it", ""]), flush=True)
    except Exception as error:
        line = type(error).__name__, str(error).split("\\n")[0]
        print(json.dumps(["group_norm_silu", "num_groups", groups, *line]), flush=True)
"""
# Spoilt arguments that make a valid call all the same: another batch or row count that no other
# argument has, one counter for all samples, any 64-bit word as a counter.
VALID = {
    "aggregate_features": {"x": "other_float"},
    "attention": {"q_index": "last_more last_less empty_last"},
    "fused_step": {
        "m": "other_float",
        "coef": "first_more",
        "step": "last_less",
        "seed": "last_less high negative",
        "slot": "last_less high negative",
        "noise_step": "last_less high negative",
    },
    "gather_tokens": {
        "x": "other_float last_more last_less empty_last",
        "index": "last_more last_less empty_last",
    },
    "geglu": {"x": "more_dims first_more empty"},
    "gelu_tanh": {"x": "more_dims first_more empty"},
    "group_norm_silu": {"x": "last_more last_less empty_last"},
    "quant_attention": {"v": "last_more last_less empty_last"},
    "quant_linear": {"scale": "last_less"},
    "grouped_quant_linear": {"scale": "last_less", "index": "last_more first_more"},
    "quantize": {"x": "other_float more_dims first_more empty"},
    "quantize_patches": {"x": "other_float last_more last_less first_more empty empty_last"},
    "resample": {"logw": "double last_more last_less", "u": "double"},
    "scale_shift": {"x": "other_float"},
    "scale_shift_backward": {"scale": "first_more"},
    "sparse_adamw_": {"weight": "other_float more_dims last_more first_more", "index": "int32"},
    "select_tokens": {"drops": "int32", "factors": "last_more last_less"},
    "philox_normal": {
        "seed": "high negative",
        "slot": "last_less high negative",
        "step": "last_less high negative",
    },
}


def valid(op, name, how):
    return how in VALID.get(op, {}).get(name, "").split()


@pytest.mark.skipif(not fastdiff.cpu_levels(), reason="the extension is not built for this machine")
def test_native_entries_raise_and_never_crash(tmp_path):
    script = tmp_path / "entries.py"
    script.write_text(ENTRIES)
    place = Path(fastdiff.__file__).parents[1]
    command = [sys.executable, str(script), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"died after {lines[-1:]}: {done.stderr[-2000:]}"
    took = [line[:3] for line in lines if line[3] == "took it" and line[2] != "meta"]
    assert len(lines) > 500
    wrong = [(op, name, how) for op, name, how in took if not valid(op, name, how)]
    assert not wrong, f"accepted: {wrong}"
    for op, name, how, kind, message in lines:
        if kind not in ("start", "took it") and how != "meta":
            assert kind in ("RuntimeError", "ValueError", "IndexError"), (
                op,
                name,
                how,
                kind,
                message,
            )
            assert message.startswith(f"{op}: "), (op, name, how, message)
