"""Watches one run of a step: every call of torch's Python interface and every operation.

As if on a GPU, tensors say that they are there (``x.device``, ``x.is_cuda``) while the CPU computes
them; what a step creates is marked as on the GPU or on the host, as the step asks for.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.engine._tape import Entry, Tape, Where

Step = Callable[..., Any]
INSTEAD = {
    "sync": "keep the value in a tensor (torch.where, index_select, a mask) or decide before the "
    "capture",
    "shape": "use a fixed shape: torch.where, masked_fill, a mask, topk, or output_size",
    "read": "leave it on the device and read it after the replay",
    "copy": "make the tensor before the capture and pass it as an input, or create it on the "
    "device with torch.full or torch.arange",
    "host": "create it with device=x.device, or pass it as an input",
    "random": "draw with ops.philox_normal from counters in a buffer",
    "state": "make that tensor an input of the step",
    "kept": "pass it as an input: what lives across steps lives in the buffers",
    "frozen": "put what changes into an input tensor",
    "address": "write into the buffer with copy_()",
    "output": "return tensors",
    "error": "see the error",
    "replay": "see what the step does beside torch operations",
}
_DIRECTORY = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
# Python calls that read device memory and that the dispatcher does not see on CPU tensors.
_READS = {"tolist", "numpy", "__array__", "__dlpack__", "__repr__", "__format__"}
_FROM_PYTHON = {"torch.tensor", "torch.as_tensor", "torch.asarray", "torch.Tensor.new_tensor"}
_TRANSFERS = _FROM_PYTHON | {
    "torch.Tensor.to",
    "torch.Tensor.cpu",
    "torch.Tensor.cuda",
}
# Operations whose CUDA form reads a value inside, which no tag says.
_WAITS = ("aten::_linalg_check_errors", "aten::histc")
_MOVES = ("aten::resize_", "aten::resize_as_", "aten::set_")
_LIFT = ("aten::lift_fresh", "aten::lift_fresh_copy", "aten::lift")


class Violation(NamedTuple):
    """One reason against a capture."""

    kind: str  # a key of INSTEAD
    op: str
    file: str
    line: int
    sentence: str


class Log:
    """Violations, one for each kind and line, and the lines that they happen at."""

    def __init__(self, step: Step, top: CodeType):
        """``top``: the function that calls the step; its own lines are none of the step's."""
        self.found: dict[tuple[str, str, int], Violation] = {}
        self._step, self._top = step, top

    def where(self) -> Where:
        """The innermost line outside torch and this package's checks, and the step's own line."""
        lines: list[tuple[str, int]] = []
        frame = inspect.currentframe()
        while frame is not None and frame.f_code is not self._top:
            name = frame.f_code.co_filename
            if not name.startswith((_TORCH, _DIRECTORY, "<frozen")) and name != contextlib.__file__:
                lines.append((name, frame.f_lineno))
            frame = frame.f_back
        return self._where(lines)

    def raised_at(self, error: BaseException) -> Where:
        """The same of an exception."""
        lines: list[tuple[str, int]] = []
        trace = error.__traceback__
        while trace is not None:
            name = trace.tb_frame.f_code.co_filename
            if not name.startswith((_TORCH, _DIRECTORY)):
                lines.insert(0, (name, trace.tb_lineno))
            trace = trace.tb_next
        return self._where(lines)

    def _where(self, lines: list[tuple[str, int]]) -> Where:
        if not lines:
            return self.definition()
        (file, line), outer = lines[0], lines[-1]
        return Where(file, line, None if outer == (file, line) else f"{outer[0]}:{outer[1]}")

    def definition(self) -> Where:
        """Where the step is defined: for what belongs to no line."""
        step: Any = inspect.unwrap(getattr(self._step, "func", self._step))
        if not hasattr(step, "__code__"):
            step = getattr(step, "forward", None) or type(step).__call__
        code = getattr(step, "__code__", None)
        return Where(code.co_filename, code.co_firstlineno) if code else Where(repr(step), 0)

    def add(self, kind: str, op: str, what: str, where: Where | None = None) -> None:
        at = self.where() if where is None else where
        sentence = f"{op} at {at} {what}; {INSTEAD[kind]}"
        key = (kind, at.file, at.line)
        self.found.setdefault(key, Violation(kind, op, at.file, at.line, sentence))

    def has(self, *kinds: str) -> bool:
        return any(kind in kinds for kind, *_ in self.found)


class Hosts:
    """Which tensors of a run are on the host; every other one counts as on the device."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def add(self, t: Tensor) -> None:
        self._held[id(t)] = t

    def __contains__(self, t: Tensor) -> bool:
        return id(t) in self._held


def _tensors(*trees: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, list | tuple):
            found += _tensors(*tree)
        elif isinstance(tree, dict):
            found += _tensors(*tree.values())
    return found


class Calls(TorchFunctionMode):
    """Watches torch's Python interface; with ``device`` tensors say that they are there."""

    def __init__(self, log: Log, hosts: Hosts, device: torch.device | None):
        self.log, self.hosts, self.device = log, hosts, device
        self.name = ""  # of the call under way

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = resolve_name(func) or str(func)
        tensors = _tensors(args, kwargs)
        here = [t for t in tensors if t not in self.hosts]
        if name.endswith("__get__") and self.device is not None and here:
            told = self._told(name)
            if told is not None:
                return told
        if name == "torch.Tensor.data.__set__":
            self.log.add("address", name, "puts other memory in the place of a tensor's")
        if name.split(".")[-1] in _READS and here and self.device is not None:
            self.log.add("sync", name, "reads device memory on the host")
        before, self.name = self.name, name
        try:
            if self.device is None:
                out = func(*args, **kwargs)
                if not tensors and "device" not in kwargs:
                    self._mark(out, [])
                return out
            return self._as_device(func, name, args, kwargs, tensors, here)
        finally:
            self.name = before

    def _told(self, name: str) -> Any:
        """What a property of a tensor on the device says."""
        return {
            "torch.Tensor.device.__get__": self.device,
            "torch.Tensor.is_cuda.__get__": True,
            "torch.Tensor.is_cpu.__get__": False,
        }.get(name)

    def _as_device(
        self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any],
        tensors: list[Tensor], here: list[Tensor],
    ) -> Any:  # fmt: skip
        """Run on the CPU what asks for the device, and mark on which side its results are."""
        if name == "torch.Tensor.get_device" and here:
            return self.device.index if self.device is not None else -1
        args, kwargs, asked = self._asked(name, args, kwargs)
        transfer = name in _TRANSFERS
        moved = tensors[:1] if transfer else tensors  # x.to(other) moves x
        if name == "torch.Tensor.new_tensor":
            moved = _tensors(args[1:])
        source = "host" if all(t in self.hosts for t in moved) else "device"
        target = asked or ("device" if here else "host")
        if transfer and (tensors or name in _FROM_PYTHON) and source != target:
            kind = "read" if target == "host" else "copy"
            self.log.add(kind, name, f"copies from the {source} to the {target}")
        elif name == "torch.Tensor.copy_" and len(here) == 1:
            kind = "read" if args[0] in self.hosts else "copy"
            self.log.add(kind, name, "copies between the host and the device")
        elif not transfer and here:
            for t in tensors:
                if t in self.hosts and t.dim() > 0:
                    self.log.add(
                        "host", name, f"takes a tensor {list(t.shape)} on the host with device ones"
                    )
        out = args[0] if name == "torch.Tensor.cuda" else func(*args, **kwargs)
        if transfer and source != target and isinstance(out, Tensor) and out is args[0]:
            out = out.clone()  # a transfer always makes a new tensor
        if target == "host":
            self._mark(out, tensors)
        return out

    def _mark(self, out: Any, tensors: list[Tensor]) -> None:
        for t in _tensors(out):
            if not any(t is given for given in tensors):
                self.hosts.add(t)

    def _asked(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any], str | None]:
        """Arguments with the CPU in the place of the device, and which side was asked for."""
        asked = {"torch.Tensor.cpu": "host", "torch.Tensor.cuda": "device"}.get(name)
        given = list(args)

        def side(value: Any) -> str | None:
            with contextlib.suppress(RuntimeError, TypeError):
                kind = torch.device(value).type
                return {"cpu": "host", "cuda": "device"}.get(kind)
            return None

        if kwargs.get("device") is not None:
            asked = side(kwargs["device"])
            if asked is not None:
                kwargs["device"] = "cpu"
        if name == "torch.Tensor.to":
            for i, value in enumerate(given[1:], 1):
                if isinstance(value, Tensor):
                    asked = "host" if value in self.hosts else "device"
                elif isinstance(value, str | torch.device) or type(value) is int:
                    asked = side(value)
                    given[i] = "cpu" if asked is not None else value
        if name == "torch.Tensor.new_tensor" and asked is None:
            asked = "host" if given[0] in self.hosts else "device"
        return given, kwargs, asked


class Ops(TorchDispatchMode):
    """Watches the dispatcher and writes the tape."""

    def __init__(self, log: Log, hosts: Hosts, calls: Calls, tape: Tape):
        super().__init__()
        self.log, self.hosts, self.calls, self.tape = log, hosts, calls, tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        flat, spec = pytree.tree_flatten((tuple(args), kwargs))
        tensors = [t for t in flat if isinstance(t, Tensor)]
        where = self.log.where()
        name = func._schema.name
        op = f"{func}" + (f" ({self.calls.name})" if self.calls.name not in ("", str(func)) else "")
        constant = self.tape.constant(tensors[0]) if name in _LIFT else b""
        leaves = tuple(self.tape.view(t) if isinstance(t, Tensor) else t for t in flat)
        if not (tensors and all(t in self.hosts for t in tensors)):
            if self.calls.device is not None:
                self._values(func, name, op, args, kwargs, where)
            if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
                self.log.add("random", op, "draws from a generator outside the buffers", where)
        if constant and tensors[0].dim() and self.calls.name not in _FROM_PYTHON:
            self.log.add("copy", op, "copies Python values to the device", where)
        for view in leaves:
            kept = getattr(view, "storage", ("",))[0] == "kept"
            if kept:
                self.log.add(
                    "kept", op, "takes a tensor that an earlier run made and Python kept", where
                )
        written = self._written(func, args, kwargs)
        for t in written:
            if self.tape.view(t).storage[0] in ("outside", "kept"):
                self.log.add("state", op, "writes to a tensor that is not in the buffers", where)
        places = [(t.data_ptr(), t.untyped_storage().nbytes()) for t in written]
        out = func(*args, **kwargs)
        now = [(t.data_ptr(), t.untyped_storage().nbytes()) for t in written]
        if places != now or name in _MOVES:
            self.log.add("address", op, "moves or resizes a tensor", where)
        self.tape.record(Entry(func, spec, leaves, (), where, constant), out)
        return out

    def _values(
        self, func: Any, name: str, op: str, args: Sequence[Any], kwargs: dict[str, Any],
        where: Where,
    ) -> None:  # fmt: skip
        """Report what must wait for values of a tensor on the device."""
        masks = any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:2]))
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            if masks:
                self.log.add("shape", op, "indexes with a mask: a hidden nonzero", where)
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is not None:
            return
        elif torch.Tag.dynamic_output_shape in func.tags or name == "aten::bincount":
            self.log.add("shape", op, "gives a shape that depends on values", where)
        elif torch.Tag.data_dependent_output in func.tags or name in _WAITS:
            self.log.add("sync", op, "reads a device value on the host, which waits", where)

    @staticmethod
    def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        found = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                found += _tensors(value)
        return found


def _draws(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that may draw random numbers does: attention without dropout not."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "dropout", "p"):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            if "dropout" in func._schema.name or "attention" in func._schema.name:
                return bool(value)
    return True
