"""Every kind of violation is found, by operation and line; clean steps and our own pass."""

import ctypes
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff.engine import NotCapturable, check, require
from fastdiff.models import UNet

ROTATION = torch.eye(4).roll(1, 0)
WEIGHT = torch.linspace(-1, 1, 16).view(4, 4)


def inputs():
    return {"x": torch.linspace(-2, 3, 12).view(3, 4), "i": torch.ones(1, dtype=torch.int64)}


class Counter:
    """Python state of every sort that a step may keep."""

    def __init__(self):
        self.calls, self.tensors = 0, []

    def scale(self, x, i):
        self.calls += 1
        return x * self.calls

    def branch(self, x, i):
        self.calls += 1
        return x + 1 if self.calls < 4 else x - 1

    def longer(self, x, i):
        self.calls += 1
        for _ in range(self.calls):
            x = x + 1
        return x

    def other(self, x, i):
        self.calls += 1
        return (x + 1, x * 2)[:: -1 if self.calls % 2 else 1]

    def value(self, x, i):
        self.calls += 1
        return x + torch.tensor(float(self.calls))

    def history(self, x, i):
        self.tensors = [x * 2, *self.tensors[:1]]
        return x + self.tensors[-1]


def replaced(x, i):
    x.data = x * 2
    return x


def resized(x, i):
    x.resize_(1, 4)
    return x + 1


def in_a_list(state):
    state[0] = state[0] + 1
    return state[0]


# (kind, what the sentence says, step); a lambda is one line, which the violation must name.
VIOLATIONS = [
    ("sync", "torch.Tensor.item", lambda x, i: x * x.sum().item()),
    ("sync", "torch.Tensor.__float__", lambda x, i: x * float(x.sum())),
    ("sync", "torch.Tensor.__int__", lambda x, i: x * int(i)),
    ("sync", "torch.Tensor.__bool__", lambda x, i: x if x.sum() > 0 else -x),
    ("sync", "torch.Tensor.__bool__", lambda x, i: x if (x > 0).any() else -x),
    ("sync", "torch.equal", lambda x, i: x * torch.equal(x, x)),
    ("sync", "aten._linalg_check_errors", lambda x, i: x @ torch.linalg.inv(ROTATION)),
    ("sync", "aten.histc", lambda x, i: x.histc(4)),
    ("sync", "torch.Tensor.tolist", lambda x, i: x * len(x.tolist())),
    ("sync", "torch.Tensor.numpy", lambda x, i: x * x.numpy().shape[0]),
    ("sync", "torch.Tensor.__array__", lambda x, i: x * np.asarray(x).shape[0]),
    ("sync", "torch.Tensor.__repr__", lambda x, i: x * len(repr(x))),
    ("shape", "aten.nonzero.default", lambda x, i: (x, x.nonzero())[0]),
    ("shape", "aten.nonzero.default", lambda x, i: x + torch.where(x > 0)[0].sum()),
    ("shape", "aten.index.Tensor", lambda x, i: x[x > 0].sum()),
    ("shape", "aten.index_put_.default", lambda x, i: x.clone().index_put_((x > 0,), WEIGHT[0, 0])),
    ("shape", "aten.masked_select.default", lambda x, i: x.masked_select(x > 0).sum()),
    ("shape", "aten._unique2.default", lambda x, i: x.unique().sum()),
    ("shape", "aten.bincount.default", lambda x, i: x + torch.bincount(i).sum()),
    ("shape", "aten.repeat_interleave.Tensor", lambda x, i: x[:1].repeat_interleave(i, 0)),
    ("read", "torch.Tensor.cpu", lambda x, i: (x, x.cpu())[0]),
    ("read", "torch.Tensor.to", lambda x, i: (x, x.to("cpu", non_blocking=True))[0]),
    (
        "read",
        "torch.Tensor.copy_",
        lambda x, i: (x, torch.empty(3, 4).copy_(x, non_blocking=True))[0],
    ),
    ("copy", "torch.tensor", lambda x, i: x + torch.tensor([1.0, 2, 3, 4], device=x.device)),
    ("copy", "torch.tensor", lambda x, i: x + torch.tensor(2.0, device="cuda")),
    ("copy", "torch.as_tensor", lambda x, i: x + torch.as_tensor([1.0, 2, 3, 4], device=x.device)),
    ("copy", "torch.Tensor.new_tensor", lambda x, i: x + x.new_tensor([1, 2, 3, 4])),
    ("copy", "torch.Tensor.to", lambda x, i: x + torch.arange(4).to(x.device)),
    ("copy", "torch.Tensor.to", lambda x, i: x + torch.arange(4).to(x)),
    ("copy", "torch.Tensor.cuda", lambda x, i: x + torch.arange(4).cuda()),
    ("copy", "torch.Tensor.copy_", lambda x, i: x.copy_(torch.zeros(3, 4))),
    ("copy", "torch.Tensor.__getitem__", lambda x, i: x[[0, 2]]),
    ("host", "takes a tensor [4] on the host", lambda x, i: x + torch.arange(4)),
    ("host", "torch.Tensor.index_select", lambda x, i: x.index_select(0, torch.arange(2))),
    ("random", "torch.randn_like", lambda x, i: x + torch.randn_like(x)),
    ("random", "torch.bernoulli", lambda x, i: x + torch.bernoulli(x.sigmoid())),
    ("random", "aten.multinomial", lambda x, i: x.softmax(1).multinomial(1)),
    ("random", "dropout", lambda x, i: F.dropout(x, 0.5)),
    ("random", "torch.randperm", lambda x, i: x + torch.randperm(4, device=x.device)),
    ("random", "random at", lambda x, i: x * random.random()),
    ("random", "numpy.random at", lambda x, i: x * np.random.rand()),
    ("state", "writes to a tensor that is not", lambda x, i: x + WEIGHT.mul_(1.0)[0]),
    ("frozen", "differs between runs", lambda x, i: x * (time.perf_counter() % 1.0)),
    ("frozen", "(input [3, 4], 2) in the first one", Counter().scale),
    ("frozen", "aten.sub.Tensor(input [3, 4], 1) in run", Counter().branch),
    ("frozen", "nothing in the first one", Counter().longer),
    ("frozen", "gives other outputs in run 2", Counter().other),
    ("frozen", "aten.lift_fresh.default", Counter().value),
    ("kept", "an earlier run made and Python kept", Counter().history),
    ("address", "torch.Tensor.data.__set__", replaced),
    ("address", "moves or resizes a tensor", resized),
    ("address", "put another tensor in the place of inputs[0][0]", in_a_list),
    ("output", "is float 2.0, which a capture freezes", lambda x, i: (x, 2.0)),
    ("output", "output[0] at", lambda x, i: (torch.zeros(2), x)),
    pytest.param(
        "error",
        "raises",
        lambda x, i: (torch.cuda.synchronize(), x)[1],
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="does not raise on a GPU"),
    ),
    ("error", "raises RuntimeError: The size of tensor a", lambda x, i: x + WEIGHT[:, :3]),
]


@pytest.mark.parametrize("kind, says, step", VIOLATIONS)
def test_violation_is_found(kind, says, step):
    mine = ([torch.ones(2, 2)],) if step is in_a_list else inputs()
    report = check(step, mine)
    assert not report.ok
    found = [v for v in report.violations if v.kind == kind]
    assert found, str(report)
    assert says in found[0].sentence
    assert found[0].file == __file__ and f"{Path(__file__)}:{found[0].line}" in found[0].sentence
    code = step.__code__
    first = code.co_firstlineno
    last = max(line for *_, line in code.co_lines() if line is not None)
    assert first <= found[0].line <= last
    assert len(found[0].sentence.splitlines()) == 1 and "; " in found[0].sentence


def on_the_device(x, i):
    with torch.device(x.device):
        return x + torch.arange(4) * torch.ones(4)


CLEAN = {
    "host scalars": lambda x, i: x * torch.tensor(2.0) + torch.tensor(3).item(),
    "made on the device": lambda x, i: x + torch.arange(4, device=x.device) + torch.full_like(x, 2),
    "where, topk": lambda x, i: torch.where(x > 0, x, 0.0).masked_fill(x > 2, 1).topk(2)[0],
    "a fixed repeat": lambda x, i: x[:1].repeat_interleave(i, 0, output_size=1),
    "index by tensor": lambda x, i: x[i] + x.index_select(0, i) + x[:, None, 1:].sum(-1),
    "state in the buffers": lambda x, i: (x.mul_(0.5).add_(WEIGHT[0]), i.add_(1)),
    "a view as output": lambda x, i: (x[1:], x.T, None),
    "attention": lambda x, i: F.scaled_dot_product_attention(*[x[None] @ WEIGHT] * 3),
    "no dropout": lambda x, i: F.dropout(x, 0.5, training=False),
    "host work aside": lambda x, i: x * len([n for n in torch.arange(3).tolist() if n > 1]),
    "a mask set to a number": lambda x, i: x.masked_fill(x.isnan(), 0.0),
    "complex": lambda x, i: torch.view_as_real(torch.view_as_complex(x.view(3, 2, 2)).conj() * 1j),
    "a constant written to": lambda x, i: x * torch.tensor(1.0).add_(1),
    "a device context": on_the_device,
    "says cuda": lambda x, i: x if x.is_cuda and x.device.type == "cuda" else x,
    "scatter": lambda x, i: torch.zeros_like(x).scatter_add_(0, i.expand(1, 4), x[:1]),
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_clean_step_passes(name):
    mine = inputs()
    before = {k: v.clone() for k, v in mine.items()}
    report = require(CLEAN[name], mine)
    assert report.ok and report.steps == 3
    assert all(torch.equal(mine[k], before[k]) for k in mine)  # the caller's inputs are copied


def test_a_step_that_hides_its_work_differs_from_its_replay():
    """Memory written past the dispatcher, which a replay of the recorded run leaves alone."""

    def step(x):
        y = x * 2
        ctypes.memset(y.data_ptr(), 0, 4)
        return y + 1

    report = check(step, (torch.ones(3, 4),))
    assert [v.kind for v in report.violations] == ["replay"]
    assert "other bits in run 1 than a replay" in str(report)


def test_require_raises_every_sentence():
    def step(x):
        y = x + torch.randn(3, 4, device=x.device)
        return y * y.max().item()

    with pytest.raises(NotCapturable) as caught:
        require(step, (torch.ones(3, 4),))
    assert {v.kind for v in caught.value.report.violations} >= {"random", "sync"}
    assert str(caught.value).count("\n") == len(caught.value.report.violations) - 1


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(steps=1), "steps is 1, need an integer of at least 2"),
        (dict(inputs=[1]), "inputs is list, need a dict or a tuple"),
        (dict(inputs=()), "inputs has no tensor"),
        (dict(inputs=(3,)), r"inputs\[0\] is int 3, need a torch.Tensor"),
        (dict(inputs=(torch.ones(2, device="meta"),)), "inputs are on meta, need the cpu"),
        (dict(more=[(torch.ones(3),)]), r"inputs\[0\] has shape \[3\], need \[2\]"),
    ],
)
def test_bad_input(given, message):
    args = dict(inputs=(torch.ones(2),)) | given
    with pytest.raises(ValueError, match=message):
        check(lambda x: x + 1, args.pop("inputs"), **args)


def test_more_inputs_reach_the_step():
    """A step that only differs on given inputs: a counter hidden behind a table look-up."""
    seen = []

    def step(x):
        seen.append(x.shape)
        return x * 2

    other = [(torch.full((2,), float(i)),) for i in range(2)]
    assert check(step, (torch.ones(2),), more=other).ok
    assert len(seen) == 8


@pytest.mark.parametrize("rows", [("ref",), ("native", "torch")], ids=["ref", "native"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_sde", "lcm"])
def test_our_sampler_step_passes(sampling, sampler, rows):
    _, step, given = sampling(sampler)
    with fastdiff.use(*rows), fastdiff.record() as ran:
        report = require(step, given)
    assert report.ok and report.ops > 50
    taken = {row for (op, row) in ran if op == "fused_step"}
    assert taken == ({"ref"} if rows == ("ref",) else {"ref", "native"})


def test_our_unet_passes():
    model = UNet(
        in_channels=2, out_channels=2, block_out_channels=(16, 32), layers_per_block=1,
        groups=8, heads=2, transformer_depth=(1, 0), cross_attention_dim=12,
        num_classes=5, class_tokens=3,
    ).eval()  # fmt: skip
    given = (torch.randn(2, 2, 8, 8), torch.rand(2) * 999, torch.tensor([1, 2]))
    assert require(lambda x, t, y: model(x, t, y), given).ops > 50


def test_positions_of_another_size_are_a_copy(sampling):
    """A DiT keeps the table of its own size alone; any other comes from a cache on the host."""
    _, step, given = sampling("ddim", size=12)
    report = check(step, given)
    assert {v.kind for v in report.violations} >= {"copy"}
    assert all(v.file.endswith("dit.py") for v in report.violations)
