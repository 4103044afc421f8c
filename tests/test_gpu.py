"""What a GPU has to show: every row of every op, and sampling, on ``cuda`` (``pytest -m gpu``).

The same functions run on the CPU in every test run, so that the first run on a GPU tests kernels
and not this file.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import info, models, ops
from fastdiff.testing import assert_close

ROOT = Path(__file__).parents[1]
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
INTEGERS = {
    "gather_tokens",
    "scatter_tokens",
    "update_tokens_",
}  # int64 arguments are rows, each at most once


def arguments(op, of):
    """The typical call of an op with values, on the CPU; and the same call in float64."""
    wide = {}

    def new(*shape, dtype=None):
        if dtype == torch.int64:
            if op in INTEGERS:
                return torch.stack([torch.randperm(256)[: shape[1]] for _ in range(shape[0])])
            if op.startswith("grouped_"):  # offsets of groups of 64 rows
                return 64 * torch.arange(shape[0])
            return torch.arange(torch.Size(shape).numel()).view(shape)
        # A CSR of 16 entries a row: its starts, of which there is one more, or its columns.
        if dtype == torch.int32:
            (n,) = shape
            return (
                16 * torch.arange(n) if n % 2 else (24 * torch.arange(16)).repeat(n // 16)
            ).int()
        if dtype == torch.int8:
            return torch.randint(-127, 128, shape, dtype=dtype)
        if dtype is not None:  # a table of coefficients, which stays float32
            t = torch.rand(shape, dtype=dtype)
            if op == "moe_combine":
                wide[id(t)] = t.double()
            return t
        t = torch.randn(shape).to(of)
        if op != "sparse_adamw_":  # whose weight takes what float32 gives
            # Integers are rounded from float32: in float64 some would be their neighbours.
            wide[id(t)] = t.float() if op in ("quantize", "quantize_patches") else t.double()
        return t

    def widened(a):
        if isinstance(a, ops.Quantized):
            return a._replace(dtype=torch.float64)
        return wide.get(id(a), a)

    args = info.CALLS[op](new)
    return args, tuple(map(widened, args))


def each(values, do):
    """``do`` of every tensor, those within tuples of their own too."""
    for v in values:
        if isinstance(v, ops.Quantized | ops.QuantWeight | ops.ExpertWeight):
            yield type(v)(*each(v, do))
        else:
            yield do(v) if hasattr(v, "to") else v


def moved(values, to):
    return tuple(each(values, lambda v: v.to(to)))


def called(op, args):
    """The outputs of a call on copies of its tensors: some are written to."""
    own = each(args, lambda a: a.clone() if isinstance(a, torch.Tensor) else a)
    return tensors(getattr(ops, op)(*own, **info.KEYWORDS.get(op, {})))


def tensors(out):
    return [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.bfloat16)]
    + [pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in info.DTYPES],
)
@pytest.mark.parametrize("op", info.op_names())
def test_every_row_that_takes_a_call_is_right(op, device, dtype):
    args, wide = arguments(op, dtype)
    there = moved(args, device)
    with fastdiff.use("ref"):
        wanted = called(op, wide)
    why = fastdiff.explain(getattr(ops, op), *there, **info.KEYWORDS.get(op, {}))
    rows = [name for name, no in why.items() if no is None]
    assert rows and rows[-1] == "ref"
    with fastdiff.use("ref"):
        eager = called(op, there)
    for row in rows:
        with fastdiff.use(row):
            out = called(op, there)
        assert len(out) == len(wanted)
        for got, want, plain in zip(out, wanted, eager, strict=True):
            assert got.device.type == device
            if not got.is_floating_point():
                assert torch.equal(got.cpu(), want)
                continue
            assert_close(got.cpu(), want, plain.cpu(), factor=3.0, what=f"{op}, row {row}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ("dit-digits", "unet-digits"))
def test_sampling_gives_what_the_reference_gives_on_the_cpu(name, device):
    model, _ = models.load(name)
    given = dict(steps=4, classes=torch.arange(2), guidance=2.0, seed=3)
    with fastdiff.use("ref"):
        want = fastdiff.sample(model, (2, 1, 32, 32), **given)
    got = fastdiff.sample(model.to(device), (2, 1, 32, 32), **given)
    assert got.device.type == device
    torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_benches_run_on_a_gpu():
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--device", "cuda", "--quick"]
    done = subprocess.run([*command, "--no-tests"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: a figure is below its target
    assert "no figures" not in done.stdout
