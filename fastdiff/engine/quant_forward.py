"""One linear layer, convolution or attention in the format of a
:class:`~fastdiff.precision.Precision`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.engine.patch import forward_of
from fastdiff.engine.request import current
from fastdiff.ops import Quantized, QuantWeight, dequantize_weight, quantize_weight
from fastdiff.precision import Precision

PROBE = 16  # tokens of a run's first call that are computed both ways, for the error
BITS = {"int8": 8, "int4": 4}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of 2, orthonormal; float32."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / size**0.5


def matrix(weight: Tensor) -> Tensor:
    """A weight as rows of what a token has: of a convolution ``[N, C, k, k]`` tap by tap, of
    experts one after the other."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight.flatten(0, -2)


class Stored:
    """A layer's weight as it is kept: tensors by name, made from a float weight."""

    def __init__(self, format: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]):
        self.format, self.tensors, self.shape = format, dict(tensors), shape

    @classmethod
    def of(cls, name: str, weight: Tensor, format: str, policy: Precision) -> Stored:
        """
        Raises:
            ValueError: ``group`` does not divide the input channels; the layer is named.
        """
        w = matrix(weight.detach())
        rows, columns = w.shape
        if format == "bfloat16":
            return cls(format, {"weight": w.to(torch.bfloat16).contiguous()}, (rows, columns))
        tensors: dict[str, Tensor] = {}
        wide = w.float()
        if policy.smooth is not None:
            most = dict(policy.maxima).get(name)
            if most is not None:
                if len(most) != columns:
                    raise ValueError(
                        f"Precision: maxima of {name} has {len(most)} values, need {columns}"
                    )
                x = torch.tensor(most, dtype=torch.float32, device=w.device).clamp(min=1e-5)
                own = wide.abs().amax(0).clamp(min=1e-5)
                tensors["smooth"] = (x**policy.smooth / own ** (1 - policy.smooth)).clamp(1e-4, 1e4)
                wide = wide * tensors["smooth"]
        if policy.rotate > 1 and columns % policy.rotate == 0:
            tensors["rotation"] = hadamard(policy.rotate).to(w.device)
            wide = (wide.view(rows, -1, policy.rotate) @ tensors["rotation"]).view(rows, columns)
        if policy.rank:
            rank = min(policy.rank, rows, columns)
            u, s, v = torch.linalg.svd(wide, full_matrices=False)
            root = s[:rank].sqrt()
            tensors["up"] = (u[:, :rank] * root).contiguous()
            tensors["down"] = (root[:, None] * v[:rank]).contiguous()
            wide = wide - tensors["up"] @ tensors["down"]
        try:
            q = quantize_weight(wide, bits=BITS[format], group=policy.group)
        except ValueError as error:
            raise ValueError(f"Precision: layer {name}: {error}") from None
        return cls(format, {**tensors, "values": q.values, "scale": q.scale}, (rows, columns))

    @property
    def quant(self) -> QuantWeight:
        return QuantWeight(self.tensors["values"], self.tensors["scale"], BITS[self.format])

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def plain(self) -> bool:
        """The integers are the whole weight, and their tokens at most divided by ``smooth``."""
        return self.format in BITS and not {"rotation", "down"} & self.tensors.keys()

    def apply(self, x: Tensor | Quantized, bias: Tensor | None, activation: str | None) -> Tensor:
        """``act(x W^T + bias)``; ``x`` may be int8 already where the weight is ``plain``."""
        if isinstance(x, Quantized):
            return ops.quant_linear(x, self.quant, bias, activation=activation)
        return self._of_floats(x, bias, activation)

    def _of_floats(self, x: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        if self.format == "bfloat16":
            return ops.linear(x, self.tensors["weight"].to(x.dtype), bias, activation=activation)
        rotation, down = self.tensors.get("rotation"), self.tensors.get("down")
        if rotation is not None:
            size = len(rotation)
            x = (x.unflatten(-1, (-1, size)) @ rotation.to(x.dtype)).flatten(-2)
        smooth = self.tensors.get("smooth")
        if down is None:
            if smooth is None:
                return ops.quant_linear(_tokens(x), self.quant, bias, activation=activation)
            return ops.quant_linear(x, self.quant, bias, activation=activation, smooth=smooth)
        y = ops.quant_linear(x, self.quant, bias, smooth=smooth)
        near = x if smooth is None else x / smooth.to(x.dtype)
        y = y + F.linear(F.linear(near, down.to(x.dtype)), self.tensors["up"].to(x.dtype))
        if activation is None:
            return y
        return F.silu(y) if activation == "silu" else F.gelu(y, approximate="tanh")

    def error(self, weight: Tensor) -> float:
        """Relative L2 of what is stored against the weight, on the host."""
        if self.format == "bfloat16":
            back = self.tensors["weight"].float()
        else:
            back = dequantize_weight(self.quant)
            if "down" in self.tensors:
                back = back + self.tensors["up"] @ self.tensors["down"]
            if "rotation" in self.tensors:
                size = len(self.tensors["rotation"])
                back = (back.view(len(back), -1, size) @ self.tensors["rotation"].T).flatten(1)
            if "smooth" in self.tensors:
                back = back / self.tensors["smooth"]
        w = matrix(weight.detach()).float()
        return float((back - w).norm() / w.norm().clamp(min=1e-30))


def _tokens(x: Tensor) -> Quantized:
    """``x`` as int8, kept on it: the projections of one input round it once."""
    if x.is_inference() or torch.compiler.is_compiling():  # nobody counts writes to it
        return ops.quantize(x)
    kept: Any = x.__dict__.get("_fastdiff_int8")
    if kept is None or kept[0] != x._version:
        kept = x._version, ops.quantize(x)
        x.__dict__["_fastdiff_int8"] = kept
    tokens: Quantized = kept[1]
    return tokens


def version(weight: Tensor) -> int:
    """Writes to a weight so far; one made in inference mode has no count, and is taken to stay."""
    return 0 if weight.is_inference() else weight._version


def more(seen: Tensor | None, got: Tensor, want: Tensor) -> Tensor:
    """Sums of squares ``[2]`` of error and output, with those of a call."""
    wrong = (got.float() - want.float()).square().sum()
    sums = torch.stack((wrong, want.float().square().sum()))
    return sums if seen is None else seen + sums


def _relative(seen: Tensor | None) -> float | None:
    if seen is None:
        return None
    wrong, all_ = seen.tolist()
    return (wrong / all_) ** 0.5 if all_ else 0.0


class QuantForward:
    """What a layer's ``forward`` is while it is quantised.

    Attributes:
        calls, seconds: since it was made; time of the host, which on a GPU is that of launches.
        seen: sums of squares ``[2]`` of error and output, over the first calls of runs.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        format: str,
        policy: Precision,
        stored: Stored | None = None,
    ):
        self.name, self.policy, self.format = name, policy, format
        self.module, self._plain = module, forward_of(module)
        self.stored = stored or self._store()
        self._version, self._device = version(module.weight), module.weight.device
        self.released = False
        self.calls, self.seconds = 0, 0.0
        self.seen: Tensor | None = None
        self._probed: Any = None

    def _store(self) -> Stored:
        return Stored.of(self.name, self.module.weight, self.format, self.policy)

    @property
    def steady(self) -> bool:
        """It has this format at every step."""
        return not self.policy.first and not self.policy.last

    def usable(self, x: Any) -> bool:
        """Whether the stored weight can compute this input: inference on a plain tensor."""
        weight = self.module.weight
        return (
            type(x) is Tensor
            and x.dtype in _DTYPES
            and x.device == (self._device if self.released else weight.device)
            and x.numel() > 0
            and not self.module.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
        )

    def __call__(self, input: Tensor) -> Tensor:
        if not self._now(input):
            y: Tensor = self._plain(input)
            return y
        return self._apply(input, None)

    @property
    def smooth(self) -> Tensor | None:
        """What channels of tokens are divided by before they are rounded."""
        return self.stored.tensors.get("smooth")

    def takes_tokens(self, x: Tensor) -> bool:
        """Whether a call on floats like ``x`` may have int8 tokens in their place; not the call
        of a run whose error is looked at."""
        run = current()
        looked_at = run is None or run.static or self.released or self._probed is run
        return looked_at and self.stored.plain and not self._stale() and self._now(x)

    def _stale(self) -> bool:
        """The weight was trained, merged or swapped since it was stored."""
        return not self.released and version(self.module.weight) != self._version

    def activated(self, x: Tensor | Quantized, activation: str | None) -> Tensor:
        """``act(forward(x))``, for callers that would read the weight of a layer in floats."""
        if isinstance(x, Quantized):
            return self._apply(x, activation)
        if self._now(x):
            return self._apply(x, activation)
        module: Any = self.module
        if module.weight.dtype == x.dtype:
            return ops.linear(x, module.weight, module.bias, activation=activation)
        y: Tensor = self._plain(x)
        if activation is None:
            return y
        return F.silu(y) if activation == "silu" else F.gelu(y, approximate="tanh")

    def _now(self, x: Any) -> bool:
        """Whether this call is in the layer's own format."""
        run = current()
        floats = run is not None and self.policy.full(run.step, run.steps)
        if not floats and self.usable(x):
            return True
        if self.released:
            raise RuntimeError(
                f"layer {self.name} has no float weights any more (stored.release), which this "
                "call needs: it trains, has gradients or autocast, or is on another device"
            )
        return False

    def _apply(self, x: Tensor | Quantized, activation: str | None, **how: Any) -> Tensor:
        run = current()
        start = time.perf_counter()
        self._refresh()
        y = self._result(x, activation, **how)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - start
        if (
            isinstance(x, Tensor)
            and run is not None
            and not run.static
            and not self.released
            and self._probed is not run
        ):
            self._probed = run
            part = self._part(x)
            got, want = self._result(part, None, **how), self.floats(part, **how)
            self.seen = more(self.seen, got, want)
        return y

    def _refresh(self) -> None:
        if self._stale():
            self.stored = self._store()
            self._version = version(self.module.weight)

    def _bias_like(self, x: Tensor | Quantized) -> Tensor | None:
        bias: Tensor | None = self.module.bias
        return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def _result(self, x: Any, activation: str | None, **how: Any) -> Tensor:
        """Of the stored weight."""
        return self.stored.apply(x, self._bias_like(x), activation)

    def floats(self, x: Tensor, **how: Any) -> Tensor:
        """Of the float weight; ``x`` in any of the dtypes."""
        return F.linear(x, self.module.weight.to(x.dtype), self._bias_like(x))

    def _part(self, x: Tensor) -> Tensor:
        """So much of ``x`` as is computed both ways, for the error."""
        return x.reshape(-1, x.shape[-1])[:PROBE]

    def both(self, x: Tensor, rounds: int = 3) -> tuple[float, float]:
        """Seconds of a call on ``x`` with the float weight, and with the stored one; medians."""
        arms: tuple[Any, Any] = (self.floats, lambda x: self._result(x, None))
        found: tuple[list[float], list[float]] = [], []
        for _ in range(1 + rounds):
            for arm, took in zip(arms, found, strict=True):
                start = time.perf_counter()
                arm(x)
                if x.device.type != "cpu":
                    torch.accelerator.synchronize(x.device)
                took.append(time.perf_counter() - start)
        return median(found[0][1:]), median(found[1][1:])

    def release(self) -> int:
        """Free the float weight; gives its bytes."""
        if self.released:
            return 0
        module: Any = self.module
        freed = int(module.weight.numel() * module.weight.element_size())
        module.weight = nn.Parameter(module.weight.detach().to("meta"), requires_grad=False)
        self.released = True
        return freed

    def error(self) -> float | None:
        """Relative L2 of the layer's output over the probed tokens; the host waits for it."""
        return _relative(self.seen)

    def words(self) -> str:
        rows, columns = self.stored.shape
        return f"{self.format} {columns} -> {rows}"


class QuantConvolution(QuantForward):
    """What a convolution's ``forward`` is while it is quantised: its patches are tokens."""

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Kernel size, stride and padding, in both directions."""
        module = self.module
        return module.kernel_size[0], module.stride[0], module.padding[0]

    def _store(self) -> Stored:
        policy = self.policy
        if self._shape[0] > 1:  # smoothing and rotation are of tokens that are floats
            policy = replace(policy, smooth=None, rank=0, rotate=0)
        return Stored.of(self.name, self.module.weight, self.format, policy)

    def usable(self, x: Any) -> bool:
        return super().usable(x) and x.dim() == 4

    def convolve(self, x: Tensor, upsample: bool = False) -> Tensor | None:
        """``forward`` of ``x``, or of ``x`` with every pixel doubled in both directions; None
        where this call is in floats."""
        if not self._now(x):
            return None
        return self._apply(x, None, upsample=upsample)

    def _result(self, x: Any, activation: str | None, **how: Any) -> Tensor:
        upsample: bool = how.get("upsample", False)
        bias, stored = self._bias_like(x), self.stored
        size, stride, padding = self._shape
        pointwise = (size, padding) == (1, 0)
        if not pointwise and self.format != "bfloat16":
            tokens = ops.quantize_patches(
                x, size, stride=stride, padding=padding, upsample=upsample
            )
            return ops.quant_linear(tokens, stored.quant, bias).permute(0, 3, 1, 2)
        if upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if pointwise:
            pixels = x[..., ::stride, ::stride].permute(0, 2, 3, 1)
            return stored.apply(pixels, bias, None).permute(0, 3, 1, 2)
        w = stored.tensors["weight"].to(x.dtype).unflatten(1, (size, size, -1))
        return self._product(x, w.permute(0, 3, 1, 2), bias)

    def floats(self, x: Tensor, **how: Any) -> Tensor:
        """``[B, C, H, W]`` of ``[B, C, H, W]``, as a network of ours has it."""
        if how.get("upsample"):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self._product(x, self.module.weight.to(x.dtype), self._bias_like(x))

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if self._shape == (3, 1, 1):
            return ops.conv3x3(x, w, bias)
        if self._shape == (1, 1, 0):
            return ops.linear(x.permute(0, 2, 3, 1), w.flatten(1), bias).permute(0, 3, 1, 2)
        return F.conv2d(x, w, bias, *self._shape[1:])

    def _part(self, x: Tensor) -> Tensor:
        side = max(8, self._shape[0])
        return x[:1, :, :side, :side]

    def words(self) -> str:
        n, c = self.module.weight.shape[:2]
        size = self._shape[0]
        return f"{self.format} {size}x{size} {c} -> {n}"


class QuantScores:
    """What an attention module has as ``scores``: int8 products where it can.

    Attributes:
        calls, seconds, seen: as those of :class:`QuantForward`.
    """

    def __init__(self, name: str, policy: Precision):
        self.name, self.policy = name, policy
        self.calls, self.seconds = 0, 0.0
        self.seen: Tensor | None = None
        self.shape: tuple[int, ...] = ()
        self._probed: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Any:
        run = current()
        if (
            bias is not None
            or q.dtype not in _DTYPES
            or torch.is_grad_enabled()
            or (run is not None and self.policy.full(run.step, run.steps))
        ):
            return ops.attention(q, k, v, bias=bias)
        start = time.perf_counter()
        out = ops.quant_attention(q, k, v)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - start
        self.shape = tuple(q.shape)
        if run is not None and not run.static and self._probed is not run:
            self._probed = run
            want: Any = ops.attention(q[:1, :, :PROBE], k[:1], v[:1])
            self.seen = more(self.seen, out[:1, :, :PROBE], want)
        return out

    def error(self) -> float | None:
        """Relative L2 of the output over the probed queries; the host waits for it."""
        return _relative(self.seen)

    def words(self) -> str:
        _, heads, _, dim = self.shape
        return f"int8 scores, {heads} heads of {dim}"
