r"""A linear layer and the activation after it, through the fastest matrix product at hand.

y = act(x W^T + bias),   act in {identity, GELU (tanh form), SiLU}
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastdiff.dispatch import Impl, always, pick
from fastdiff.ops._check import check_like, check_shape, check_tensor, wide

ACTIVATIONS = (None, "gelu_tanh", "silu")


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return F.silu(y) if activation == "silu" else y


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The specification: float32 inside (float64 for float64 input), one rounding at the end."""
    y = F.linear(wide(x), wide(weight), None if bias is None else wide(bias))
    return _activate(y, activation).to(x.dtype)


def _torch_row(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return _activate(F.linear(x, weight, bias), activation)


IMPLS = (
    Impl("torch", _torch_row, always),
    Impl("ref", linear_ref, always),
)


def row_args(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None, str | None]:
    """Check the public arguments and give those of a row."""
    check_tensor("linear", "x", x)
    check_tensor("linear", "weight", weight, dim=2)
    check_like("linear", "weight", weight, x)
    check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]))
    if bias is not None:
        check_like("linear", "bias", bias, x)
        check_shape("linear", "bias", bias, weight.shape[:1])
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}, need None, 'gelu_tanh' or 'silu'")
    return x, weight, bias, activation


TABLES = {"linear": (IMPLS, row_args)}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """``act(x @ weight.T + bias)``.

    Args:
        x: ``[..., K]``; float16, bfloat16, float32 or float64.
        weight: ``[N, K]``, dtype and device of ``x``.
        bias: ``[N]``, dtype and device of ``x``; None for 0.
        activation: None, "gelu_tanh" or "silu".
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``[..., N]``, dtype and device of ``x``; never a view of it.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or ``activation`` is no name of
            these; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(x, weight, bias, activation=activation)
    return pick("linear", IMPLS, impl, *args)(*args)
