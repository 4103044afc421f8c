r"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) on the trained entries of a
weight, kept apart from it as packed float32 vectors (SaRA: Hu et al. 2024, arXiv:2409.06633).

With theta the values, g their gradient, t the step from 1, eta the learning rate, lambda the decay:

    theta <- (1 - eta lambda) theta
    m     <- m + (1 - beta_1) (g - m)
    v     <- beta_2 v + (1 - beta_2) g^2
    theta <- theta - eta / (1 - beta_1^t) m / (sqrt(v) / sqrt(1 - beta_2^t) + eps)
    weight.view(-1)[index] <- theta, rounded once to the weight's dtype

in this order of roundings, which is that of ``torch.optim.AdamW`` on a CPU: what depends on t, eta,
lambda and beta alone is computed in double and rounded once to float32, and the sums of m and v are
fused with one product each, as torch has them with AVX2 or AVX-512. torch's square root on a CPU is
MKL's, whose last bit may differ from the rounded one's: the native row calls it, and GPUs round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import (
    check_finite,
    check_like,
    check_range,
    check_shape,
    check_strided,
    check_tensor,
)

_OP = "sparse_adamw_"
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


def _check_positions(index: Tensor, size: int) -> None:
    """The index ascends inside of ``size`` elements; looked at where ``check_range`` looks."""
    check_range(_OP, "index", index, 0, size)
    traced = torch.compiler.is_compiling() or isinstance(index, FakeTensor)
    if traced or index.device.type != "cpu":
        return
    back = index[1:] <= index[:-1]
    if back.any():
        at = int(back.int().argmax())
        raise ValueError(
            f"{_OP}: index has value {int(index[at + 1])} after {int(index[at])}, need ascending "
            "values"
        )


def sparse_adamw_ref(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    index: Tensor,
    step: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step_size: float,
    root: float,
) -> None:
    """The specification: the operations of ``torch.optim.AdamW``, each rounded to float32.

    Without ``step``: ``step_size`` is eta / (1 - beta_1^t), ``root`` is sqrt(1 - beta_2^t).
    """
    _check_positions(index, weight.numel())
    if step is not None and step.device.type == "cpu" and not isinstance(step, FakeTensor):
        step_size, root = of_step(step.item(), lr, beta1, beta2)
        step = None
    if weight_decay != 0:
        values.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if step is None:
        values.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / root).add_(eps), value=-step_size)
    else:  # on a device that nothing waits for
        t = step.double()
        size, under = lr / (1 - beta1**t), (1 - beta2**t).sqrt()
        denominator = (exp_avg_sq.sqrt() / under.float()).add_(eps)
        values.add_((-size).float() * exp_avg / denominator)
    weight.view(-1).index_copy_(0, index.long(), values.to(weight.dtype))


def of_step(step: float, lr: float, beta1: float, beta2: float) -> tuple[float, float]:
    """eta / (1 - beta_1^t) and sqrt(1 - beta_2^t), in Python's doubles as torch has them."""
    root: float = (1 - beta2**step) ** 0.5
    return lr / (1 - beta1**step), root


def _native_why_not(values: Tensor, *rest: Any) -> str | None:
    return why_not_native(values, rest[3], gpu="sparse_adamw")


def _triton_why_not(values: Tensor, *rest: Any) -> str | None:
    return why_not_triton(values, rest[3])


IMPLS = (
    Impl("native", native("sparse_adamw_"), _native_why_not),
    Impl("triton", triton_row("sparse_adamw", "sparse_adamw_"), _triton_why_not),
    Impl("ref", sparse_adamw_ref, always),
)


def _check_vector(name: str, t: Tensor, values: Tensor) -> None:
    check_like(_OP, name, t, values, "values")
    check_shape(_OP, name, t, values.shape)


def _check_place(name: str, t: Tensor, values: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{_OP}: {name} is {type(t).__name__}, need a torch.Tensor")
    check_strided(_OP, name, t)
    if t.device != values.device:
        raise ValueError(
            f"{_OP}: {name} is on {t.device}, need {values.device}, the device of values"
        )


def _check_dense(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{_OP}: {name} has strides {list(t.stride())}, need a contiguous tensor")


def _check_numbers(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check_finite(_OP, name, value)
        if value < 0:
            raise ValueError(f"{_OP}: {name} is {value!r}, need 0 or more")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        check_finite(_OP, name, value)
        if not 0 <= value < 1:
            raise ValueError(f"{_OP}: {name} is {value!r}, need 0 to below 1")


def _check_step(step: Any, values: Tensor) -> None:
    if isinstance(step, Tensor):
        check_like(_OP, "step", step, values, "values")
        check_shape(_OP, "step", step, (1,))
    elif not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise ValueError(
            f"{_OP}: step is {step!r}, need an integer of at least 1, or a torch.float32 tensor [1]"
        )


def row_args(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
) -> tuple[Any, ...]:
    """Check the public arguments and give those of a row."""
    check_tensor(_OP, "values", values, dim=1)
    if values.dtype != torch.float32:
        raise ValueError(f"{_OP}: values is {values.dtype}, need torch.float32")
    for name, t in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_vector(name, t, values)
    _check_place("weight", weight, values)
    if weight.dtype not in _WEIGHTS:
        raise ValueError(f"{_OP}: weight is {weight.dtype}, need float32, bfloat16 or float16")
    _check_place("index", index, values)
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{_OP}: index is {index.dtype}, need torch.int32 or torch.int64")
    check_shape(_OP, "index", index, values.shape)
    for name, t in (("values", values), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_dense(name, t)
    _check_dense("weight", weight)
    _check_numbers(lr, beta1, beta2, eps, weight_decay)
    _check_step(step, values)
    step_size, root = (0.0, 0.0)
    if not isinstance(step, Tensor):
        step_size, root = of_step(step, lr, beta1, beta2)
        step = None  # type: ignore[assignment]
    numbers = (lr, beta1, beta2, eps, weight_decay, step_size, root)
    given = (values, grad, exp_avg, exp_avg_sq, weight, index, step)
    return (*given, *(float(number) for number in numbers))


TABLES = {"sparse_adamw_": (IMPLS, row_args)}


def sparse_adamw_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    impl: str | None = None,
) -> Tensor:
    """One step of AdamW in place on packed values, which are then written into their weight.

    With an index of all entries, values, moments and a float32 weight have the bits that
    ``torch.optim.AdamW`` (float32, on a CPU, neither fused nor foreach) gives a dense parameter.

    Args:
        values: ``[n]`` float32, contiguous: the trained entries. Written.
        grad: ``[n]`` float32: their gradient.
        exp_avg, exp_avg_sq: ``[n]`` float32, contiguous: the moments, zeros before the first step.
            Written.
        weight: contiguous, of any shape; float32, bfloat16 or float16. Its entries at ``index``
            are written; no other changes, nor decays.
        index: ``[n]`` int32 or int64: positions in ``weight.view(-1)``, ascending and distinct.
        lr, eps, weight_decay: 0 or more.
        beta1, beta2: 0 to below 1.
        step: the number of this step, from 1; or, so that a captured step can count, a float32
            tensor ``[1]`` on the device of ``values`` that has it. It is not written.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    All tensors are on one device, and those that are written share no memory with another. No
    gradient flows through the step.

    Returns:
        ``values``.

    Raises:
        ValueError: a shape, dtype, layout or device differs from the above, a number is out of its
            range, or, on the CPU, an index is out of range or does not ascend; nothing is written
            then. On a GPU nothing waits for that: the CUDA and Triton rows write no weight where
            an index is out of range.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(
        values,
        grad,
        exp_avg,
        exp_avg_sq,
        weight,
        index,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
    )
    with torch.no_grad():
        pick(_OP, IMPLS, impl, *args)(*args)
    if not torch.compiler.is_compiling():  # a graph that kept one of them for its backward sees it
        torch.autograd.graph.increment_version((values, exp_avg, exp_avg_sq, weight))
    return values


if hasattr(torch.ops.fastdiff, "sparse_adamw_"):

    @torch.library.register_fake("fastdiff::sparse_adamw_")
    def _(values: Tensor, *_: Any) -> None:
        return None
