"""A step over static buffers: captured as a CUDA graph, or run eagerly with the same interface.

A step is a callable on a dict or tuple of tensors that gives tensors. A :class:`Runner` owns the
buffers that the step reads and writes; ``update`` copies new values into them, ``replay`` runs the
step, and the outputs stand at the same addresses after every replay. Rules for a step:

- state that it writes lives in the buffers (in-place: ``x.copy_(...)``), never in a module, a list
  or a global, as a graph sees addresses and not Python names;
- shapes do not depend on values, and nothing is read by the host;
- noise comes from counters in a buffer (``ops.philox_normal``), not from a global generator.

:func:`fastdiff.engine.check` proves these with no GPU. Also proved with no GPU: buffers, checks,
restoring and pipelines, on :class:`EagerRunner`. Not proved without one: the capture itself (the
test marked ``gpu``: stream use, ``cudaMalloc`` within a kernel's library, lazily made handles).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdiff.engine._buffers import Buffers, Inputs, flatten

Step = Callable[..., Any]


class Pool:
    """Memory that several runners share for what their steps allocate.

    Runners of one pool replay in any order but never at the same time. A replay may overwrite the
    outputs of the other runners of the pool: read an output, or copy it into a buffer, before
    another runner of its pool replays. :class:`EagerRunner` fills those outputs with NaN.
    """

    def __init__(self) -> None:
        self.handle: Any = None  # of the CUDA allocator; made at the first capture
        self._runners: weakref.WeakSet[Runner] = weakref.WeakSet()

    def join(self, runner: Runner) -> None:
        self._runners.add(runner)

    def others(self, runner: Runner) -> list[Runner]:
        """The runners that a replay of ``runner`` leaves without valid outputs."""
        return [other for other in self._runners if other is not runner]


class Runner:
    """What both kinds share: buffers, ``update``, call.

    Attributes:
        inputs: the buffers, in the structure given.
        outputs: tensors at fixed addresses, in the structure that the step gives; undefined before
            the first replay. An output that is (a view of) a buffer is that memory.
    """

    _who: str
    _buffers: Buffers
    _step: Step  # held: a graph needs the tensors that the step closes over
    outputs: Any

    @property
    def inputs(self) -> Any:
        return self._buffers.tree

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Copy values into the buffers, in the signature of the step; what is left out stays.

        Raises:
            ValueError: an unknown input, or another structure, shape, dtype or device than that
                of the buffer; nothing is written then.
        """
        self._buffers.update("update", args, kwargs)

    def replay(self) -> Any:
        """Run the step on the buffers; gives ``outputs``, valid until the next replay."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``update``, then ``replay``."""
        self.update(*args, **kwargs)
        return self.replay()


def _check_outputs(who: str, out: Any) -> tuple[list[Tensor | None], pytree.TreeSpec]:
    names, leaves, spec = flatten("output", out)
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None and not isinstance(leaf, Tensor):
            raise ValueError(
                f"{who}: {name} is {type(leaf).__name__} {leaf!r}, need a "
                "torch.Tensor: a capture freezes any other value"
            )
    return leaves, spec


def _poison(t: Tensor) -> None:
    """NaN, or the largest value: what must not be read."""
    if t.is_floating_point() or t.is_complex():
        t.fill_(float("nan"))
    else:
        t.fill_(True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)


class EagerRunner(Runner):
    """The stand-in without a GPU: runs the step eagerly, with a graph's rules for memory.

    Outputs are copied to fixed addresses, they are NaN before the first replay and after a replay
    of another runner of their pool, and a step that puts another tensor in a buffer's place, or
    whose outputs change shape, is an error. Thus code that keeps or mixes up outputs fails on the
    CPU as it would with graphs.

    Args:
        step: called as ``step(**inputs)`` or ``step(*inputs)``, without gradients. It runs once
            here, to learn its outputs; the buffers then have their given values again.
        inputs: dict or tuple of tensors (or trees of them), on one device; copied unless ``share``.
        pool: shared with other runners; None for a pool of its own.
        share: ``inputs`` are the buffers themselves.

    Raises:
        ValueError: an input or output is no tensor.
        RuntimeError: the step moved a buffer, or gives other outputs than in its first run.
    """

    def __init__(
        self, step: Step, inputs: Inputs, *, pool: Pool | None = None, share: bool = False
    ):
        self._who, self._step = "EagerRunner", step
        self._buffers = Buffers(self._who, inputs, share=share)
        self._pool = pool or Pool()
        before = self._buffers.values()
        leaves, self._spec = self._run()
        self._buffers.set(before)
        self._in_buffer = [self._is_in_buffer(leaf) for leaf in leaves]
        self._own = [
            leaf if leaf is None or inside else torch.empty_like(leaf)
            for leaf, inside in zip(leaves, self._in_buffer, strict=True)
        ]
        self.outputs = pytree.tree_unflatten(self._own, self._spec)
        self.poison()
        self._pool.join(self)

    def _run(self) -> tuple[list[Tensor | None], pytree.TreeSpec]:
        with torch.no_grad():
            return _check_outputs(self._who, self._buffers.call(self._who, self._step))

    def _is_in_buffer(self, leaf: Tensor | None) -> bool:
        mine = {t.untyped_storage().data_ptr() for t in self._buffers.tensors if t.numel()}
        return leaf is not None and leaf.untyped_storage().data_ptr() in mine

    def poison(self) -> None:
        """Make the outputs that are not in a buffer unreadable."""
        for own, inside in zip(self._own, self._in_buffer, strict=True):
            if own is not None and not inside:
                _poison(own)

    def replay(self) -> Any:
        for other in self._pool.others(self):
            if isinstance(other, EagerRunner):
                other.poison()
        leaves, spec = self._run()
        if spec != self._spec:
            raise RuntimeError("replay: the outputs have another structure than in the first run")
        for i, (leaf, own, inside) in enumerate(
            zip(leaves, self._own, self._in_buffer, strict=True)
        ):
            if leaf is None or own is None:
                if leaf is not own:
                    raise RuntimeError(f"replay: output {i} is None in some runs and not in others")
                continue
            found = (list(leaf.shape), leaf.dtype, self._is_in_buffer(leaf))
            need = (list(own.shape), own.dtype, inside)
            if found != need or (inside and leaf.data_ptr() != own.data_ptr()):
                raise RuntimeError(
                    f"replay: output {i} has (shape, dtype, lies in a buffer) {found} at "
                    f"{leaf.data_ptr():#x}, need {need} at {own.data_ptr():#x} as in the first run"
                )
            if not inside:
                own.copy_(leaf)
        return self.outputs


class GraphRunner(Runner):
    """A captured CUDA graph; made by :func:`capture`. Replays on the current stream."""

    def __init__(
        self, name: str, step: Step, buffers: Buffers, pool: Pool, graph: Any, outputs: Any
    ):
        self._who, self._name, self._step, self._buffers = "capture", name, step, buffers
        self._pool, self._graph, self.outputs = pool, graph, outputs

    def replay(self) -> Any:
        with torch.cuda.nvtx.range(self._name):
            self._graph.replay()
        return self.outputs


def capture(
    step: Step,
    inputs: Inputs,
    *,
    warmup: int = 3,
    pool: Pool | None = None,
    share: bool = False,
    name: str | None = None,
) -> GraphRunner:
    """Capture ``step`` as a CUDA graph.

    The step runs ``warmup`` times on a side stream, so that lazily made handles, workspaces and
    compiled kernels exist, then once under capture; the buffers then have their given values
    again, and nothing has run. Capture before other threads use the device: it is an error of the
    capture if one of them allocates meanwhile.

    Args:
        step: called as ``step(**inputs)`` or ``step(*inputs)``, without gradients.
        inputs: dict or tuple of CUDA tensors (or trees of them), on one device; copied unless
            ``share``.
        warmup: runs before the capture, at least 1.
        pool: memory to share with other runners; None for its own.
        share: ``inputs`` are the buffers themselves: how several programs work on one state.
        name: of the nvtx range ``step/<name>``; None: the step's.

    Returns:
        A :class:`GraphRunner`; ``replay`` runs the graph.

    Raises:
        ValueError: an input or output is no tensor, or ``warmup`` is below 1.
        RuntimeError: there is no GPU, an input is not on one, or CUDA refuses to capture the step.
    """
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:
        raise ValueError(f"capture: warmup is {warmup!r}, need an integer of at least 1")
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"capture: torch {torch.__version__} sees no CUDA device, need an NVIDIA GPU and a "
            "torch built for CUDA; EagerRunner(step, inputs) runs the same step without one"
        )
    buffers = Buffers("capture", inputs, share=share)
    if buffers.device.type != "cuda":
        raise RuntimeError(
            f"capture: inputs are on {buffers.device}, need a CUDA device; "
            "EagerRunner(step, inputs) runs the same step there"
        )
    pool = pool or Pool()
    before = buffers.values()
    with torch.cuda.device(buffers.device), torch.no_grad():
        if pool.handle is None:
            pool.handle = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmup):
                _check_outputs("capture", buffers.call("capture", step))
            buffers.set(before)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool.handle):
                outputs = buffers.call("capture", step)
        except RuntimeError as error:
            raise RuntimeError(
                f"capture: CUDA refused the step: {error}; engine.check(step, inputs) on cpu "
                "tensors names the operation and its line"
            ) from error
    label = name or getattr(step, "__name__", type(step).__name__)
    runner = GraphRunner(f"step/{label}", step, buffers, pool, graph, outputs)
    pool.join(runner)
    return runner


def runner(step: Step, inputs: Inputs, *, pool: Pool | None = None, share: bool = False) -> Runner:
    """:func:`capture` for inputs on a GPU, :class:`EagerRunner` for all others."""
    if any(isinstance(t, Tensor) and t.is_cuda for t in pytree.tree_leaves(inputs)):
        return capture(step, inputs, pool=pool, share=share)
    return EagerRunner(step, inputs, pool=pool, share=share)
