"""Native kernels read nothing outside their tensors: each ends or starts at an unreadable page.

A masked lane touches no memory, so this sees what sanitizers do not (they skip masked vector
loads), and at full speed. In a process of its own, since a stray read kills it; the control plants
one.
"""

import subprocess
import sys

import pytest

import fastdiff

SCRIPT = """
import ctypes, itertools, mmap, sys
import torch
import fastdiff
from fastdiff import ops

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PAGE = mmap.PAGESIZE
kept = []

def guard(t, at_end):
    # The values of t between two unreadable pages, touching one of them.
    if t is None or t.numel() == 0:
        return t
    if not t.is_contiguous():  # channels last
        channels = 2 if t.dim() == 5 else 1
        return guard(t.movedim(channels, -1), at_end).movedim(-1, channels)
    size = t.numel() * t.element_size()
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = PAGE + (room - size if at_end else 0)
    new = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
    new.copy_(t)
    for page in (start, start + PAGE + room):
        assert libc.mprotect(page, PAGE, 0) == 0
    return new

def calls(dtype):
    def r(*shape):
        return torch.randn(shape).to(dtype)
    def i(high, *shape):
        return torch.randint(high, shape)
    for b, n, d in ((1, 1, 1), (2, 3, 7), (1, 5, 17), (2, 2, 33), (1, 3, 65), (1, 2, 1152)):
        x, y, m = r(b, n, d), r(b, n, d), [r(b, d) for _ in range(3)]
        yield "gelu_tanh", (x, r(d)), {}
        yield "geglu", (r(b, n, 2 * d), r(2 * d)), {}
        yield "layer_norm_modulate", (x, m[0], m[1]), dict(weight=r(d), bias=r(d))
        yield "gate_residual", (x, y, m[2]), {}
        yield "gather_tokens", (x, i(n, b, n)), {}
        yield "scatter_tokens", (x, i(n, b, 2), r(b, 2, d)), {}
        yield "update_tokens_", (x, i(n, b, 2), r(b, 2, d)), {}
        yield "update_tokens_", (r(b, 2, n, d), i(n, b, 3), r(b, 2, 3, d)), {}
        yield "select_tokens", (r(b, d).float(), 1 + d // 3, i(4, b, d).int()), dict(high=0.5)
        packed = [torch.rand(d) for _ in range(4)]
        numbers = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
        places = (torch.arange(d), torch.arange(d).int() * n)
        yield "sparse_adamw_", (*packed, r(d), places[0]), dict(numbers, step=1)
        yield "sparse_adamw_", (*packed, r(n, d), places[1]), dict(numbers, step=torch.ones(1))
        yield "scatter_tokens", (x, i(n, b, n), y, m[2]), {}
        yield "scatter_tokens", (x, i(n, b, n), y, r(b, n, d)), {}
        yield "quantize", (x,), dict(smooth=torch.rand(d) + 0.1, activation="silu")
        yield "quantize", (x,), {}
        yield "quantize", (r(b, n, 2 * d),), dict(activation="geglu")
        for rows, group in ((n, None), (9 * n, 1)):
            data = torch.randn(rows, d).to(dtype)
            w = ops.quantize_weight(torch.randn(n + 4, d), group=64 if d > 70 else group)
            yield "quant_linear", (ops.quantize(data), w, r(n + 4)), {}
        yield "scale_shift", (x, r(d), r(d)), {}
        yield "sample_sums", (x,), {}
        yield "sample_sums", (x, y), dict(kind="product")
        yield "sample_sums", (x, y[:1]), dict(kind="difference")
        yield "resample", (torch.randn(b, d), torch.rand(b).double()), {}
        yield "resample", (torch.randn(b, d).double(), torch.rand(b).double()), {}
        yield "scale_shift", (x, r(3, d)), dict(index=i(3, b))
        yield "gate_residual_norm_modulate", (x, y, m[2], m[0], m[1]), dict(weight=r(d), bias=r(d))
        yield "gate_residual_norm_quantize", (x, y, m[2]), dict(smooth=torch.rand(d) + 0.1)
    for b, c, h, w, g in ((1, 2, 1, 1, 1), (2, 6, 3, 5, 3), (1, 32, 7, 7, 4), (2, 20, 5, 3, 10)):
        extra = dict(shift=r(b, c), scale=r(b, c))
        yield "group_norm_silu", (r(b, c, h, w), g, r(c), r(c)), extra
        yield "group_norm_silu", (r(b, h, w, c).movedim(-1, 1), g, r(c), r(c)), extra
        for x in (r(3, b, c, h, w), r(3, b, h, w, c).movedim(-1, 2)):
            yield "aggregate_features", (x, torch.randn(3, b, 1, h, w)), {}
            yield "aggregate_features", (x, torch.randn_like(x)), {}
        for x in (r(b, c, h, w), r(b, h, w, c).movedim(-1, 1)):
            yield "scale_shift", (x, torch.randn(c), torch.randn(c)), dict(dim=1)
            yield "scale_shift", (x, r(2, c), r(2, c)), dict(dim=1, index=i(2, b))
    for b, c, h, w, n in ((1, 1, 5, 5, 1), (2, 7, 5, 9, 17), (1, 65, 16, 4, 130)):
        x = r(b, c, h, w), r(b, h, w, c).movedim(-1, 1)
        for up in (False, True):
            for y in x:
                yield "quantize_patches", (y, 3), dict(padding=1, stride=1 + up, upsample=up)
            add = r(b, h << up, w << up, n).movedim(-1, 1)
            for y, bias in zip(x, (r(n), r(b, n))):
                yield "conv3x3", (y, r(n, c, 3, 3), bias), dict(add=add, upsample=up)
    for b, h, s, t, d in ((1, 1, 1, 1, 1), (2, 2, 5, 7, 8), (1, 2, 9, 17, 40), (1, 1, 33, 65, 72)):
        q, k, v = r(b, h, s, d), r(b, h, t, d), r(b, h, t, d)
        yield "attention", (q, k, v), {}
        yield "attention", (q, k, v), dict(bias=r(b, h, s, t))
        yield "attention", (q, k, v), dict(bias=r(b, 1, t), key_lengths=i(t + 1, b))
        yield "quant_attention", (q, k, v), {}
        yield "quant_attention", (q, k, r(b, h, t, 1 + d)), dict(smooth=False)
        yield "attention", (q, k, v), dict(q_index=i(s, b, 3))
        table = torch.randn(1, 1, 2, 3)
        groups = ops.GroupBias(i(2, b, s), i(3, 1, t), table)
        yield "attention", (q, k, v), dict(bias=groups)
        if d % 2 == 0:
            angle = torch.randn(s, d // 2)
            table = dict(cos=angle.cos(), sin=angle.sin(), position=i(s, b, s))
            for interleaved in (False, True):
                extra = dict(table, interleaved=interleaved)
                yield "qk_norm_rope", (q, q.clone(), r(d), r(d)), extra

    shapes = (1, 1, 2, 1), (7, 17, 6, 2), (30, 33, 70, 3), (9, 65, 34, 2), (20, 96, 40, 4)
    for t, k, n, e in shapes:
        routing = ops.moe_route(torch.randn(t, e), min(2, e))
        yield "moe_route", (r(t, e), min(2, e)), dict(sample_logits=r(1, e), capacity=2)
        slots = len(routing.order)
        yield "moe_combine", (r(slots, k), routing.weights, routing.position), {}
        x, w, index = r(t, k), r(e, n, k), routing.tokens
        more = dict(bias=r(e, n), index=index)
        turned = r(e, k, n).transpose(1, 2)
        for act in (None, "swiglu"):
            for weight in (w, turned):
                yield "grouped_linear", (x, weight, routing.offsets), dict(more, activation=act)
        for act, group in ((None, 1), ("swiglu", None), ("gelu", None)):
            weight = ops.quantize_experts(torch.randn(e, n, k), group=group)
            args = ops.quantize(x), weight, routing.offsets
            yield "grouped_quant_linear", args, dict(more, activation=act)
        yield "grouped_weight_grad", (r(slots, n), x, routing.offsets), dict(index=index)
        for rank, ids in ((e, i(3, t)), (17, None)):
            count = 1 if ids is None else 2
            factors = r(count, rank, k), r(count, n, rank), torch.rand(count), ids
            yield "lora_add", (r(t, 3, n), r(t, 3, k), *factors), {}
        for block in ((1, 1), (2, 1)):
            some = ops.SparseIndex.of_blocks(torch.rand(n // block[0], k) < 0.3, block)
            yield "sparse_weight_grad", (r(t, n), r(t, k), some), {}
    for b, c, h, w, n, s in ((1, 1, 3, 3, 1, 1), (2, 7, 5, 9, 17, 2), (1, 33, 16, 4, 40, 1)):
        some = ops.SparseIndex.of_mask(torch.rand(n, c, 3, 3) < 0.1)
        down, across = (h - 1) // s + 1, (w - 1) // s + 1
        first = r(b, n, down, across), r(b, c, h, w)
        last = r(b, down, across, n).movedim(-1, 1), r(b, h, w, c).movedim(-1, 1)
        for grad, x in (first, last):
            yield "sparse_conv2d_weight_grad", (grad, x, some), dict(stride=s, padding=1)

def fence(value, at_end):
    if isinstance(value, torch.Tensor):
        return guard(value, at_end)
    if isinstance(value, ops.GroupBias):
        return ops.GroupBias(*(guard(t, at_end) for t in value))
    if isinstance(value, ops.SparseIndex):
        crow, col = guard(value.crow, at_end), guard(value.col, at_end)
        return ops.SparseIndex(crow, col, value.shape, value.block)
    if isinstance(value, (ops.Quantized, ops.QuantWeight, ops.ExpertWeight)):
        return type(value)(*(fence(v, at_end) for v in value))
    return value

def backward(op, args, extra, at_end):
    # The native backward, where there is one, between unreadable pages as well.
    if op.__name__.endswith("_"):
        return  # in place
    leaves = []
    def leaf(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]
    args, extra = [leaf(a) for a in args], {k: leaf(v) for k, v in extra.items()}
    if fastdiff.explain(op, *args, **extra)["native"] is None:
        out = op(*args, **extra, impl="native")
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        if not out:
            return  # its outputs are indices
        torch.autograd.grad(out, leaves, [guard(torch.randn_like(o), at_end) for o in out])

if sys.argv[1] == "control":
    page = guard(torch.ones(5), True)
    print("planted", flush=True)
    ctypes.c_float.from_address(page.data_ptr() + 20).value
levels = fastdiff.cpu_levels()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    for (op, args, extra), at_end in itertools.product(calls(dtype), (True, False)):
        args = [fence(a, at_end) for a in args]
        extra = {k: fence(v, at_end) for k, v in extra.items()}
        if fastdiff.explain(getattr(ops, op), *args, **extra).get("native", "absent") is not None:
            continue
        for level in levels:
            shapes = [list(a.shape) for a in args if hasattr(a, "shape")]
            print(op, dtype, level, shapes, flush=True)
            fastdiff.set_cpu_level(level)
            getattr(ops, op)(*args, **extra, impl="native")
            backward(getattr(ops, op), args, extra, at_end)
print("done", flush=True)
"""


def run(what):
    command = [sys.executable, "-c", SCRIPT, what]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not fastdiff.cpu_levels(), reason="the extension is not built for this machine")
def test_no_read_outside_of_inputs():
    done = run("all")
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"died with {done.returncode} in {last}: {done.stderr[-2000:]}"
    assert last == ["done"]


def test_control_planted_read():
    done = run("control")
    assert done.stdout.strip() == "planted" and done.returncode < 0
