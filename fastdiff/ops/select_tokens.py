r"""Which tokens a step computes: a fixed number a sample, by score and by how long each has waited
(region-adaptive sampling: Liu et al. 2025, arXiv:2502.10389, section 3; the two-sided rule is
ours).

With s_n the score of token n, d_n how often in a row it was left out, k the starvation factor and
p_n its protection,

    p_n = 2^31 - 1 where it is forced, else 2^31 - 2 where s_n is NaN, else d_n where d_n >= most,
          else 0

a step that computes A of N tokens leaves out N - A: first the low = floor((1 - high) (N - A)) that
come first in the order of (p_n, s_n exp(k d_n), n), then of the rest those that come first in the
order of (p_n, -s_n exp(-k d_n), n). On both sides waiting brings a token nearer to being computed.
No token is left out more than ``most + ceil(N / A)`` times in a row: at most A tokens become due in
a step once those of the start are served, and the longest wait is served first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_finite, check_strided, check_tensor

FORCED, NAN = 2**31 - 1, 2**31 - 2
STEPS = 128  # entries of the table of exp(+-k d); longer waits count as the last
MAX_TRITON_TOKENS = 16384  # of a sample, in the registers of one program


def _order(protection: Tensor, value: Tensor, descending: bool = False) -> Tensor:
    """``[B, N]``: indices in the order of (protection, value, index)."""
    first = torch.sort(value, dim=1, stable=True, descending=descending).indices
    then = torch.sort(protection.gather(1, first), dim=1, stable=True).indices
    return first.gather(1, then)


def select_tokens_ref(
    score: Tensor,
    drops: Tensor,
    forced: Tensor | None,
    factors: Tensor,
    count: int,
    low: int,
    most: int,
    reset: bool,
) -> tuple[Tensor, Tensor]:
    """The specification: one product in float32, then integers."""
    batch, tokens = score.shape
    nan = score.isnan()
    value = score.masked_fill(nan, 0.0)
    waited = drops.clamp(0, STEPS - 1).long()
    protection = torch.zeros_like(drops)
    if most >= 0:
        protection = torch.where(drops >= most, drops, protection)
    protection = protection.masked_fill(nan, NAN)
    if forced is not None:
        protection = protection.masked_fill(forced, FORCED)
    out = torch.zeros_like(nan)
    order = _order(protection, value * factors[0][waited])
    out.scatter_(1, order[:, :low], True)
    rest = protection.long().masked_fill(out, FORCED + 1)
    order = _order(rest, value * factors[1][waited], descending=True)
    out.scatter_(1, order[:, : tokens - count - low], True)
    index = torch.sort(out.byte(), dim=1, stable=True).indices[:, :count]
    if reset:
        return index, (drops + 1).masked_fill(~out, 0)
    return index, drops + out.int()


def _native_why_not(
    score: Tensor, drops: Tensor, forced: Tensor | None, factors: Tensor, *_: object
) -> str | None:
    return why_not_native(score, gpu="select_tokens")


def _triton_why_not(
    score: Tensor, drops: Tensor, forced: Tensor | None, factors: Tensor, *_: object
) -> str | None:
    if score.shape[1] > MAX_TRITON_TOKENS:
        return (
            f"score has {score.shape[1]} tokens; the kernel holds a sample in registers, at most "
            f"{MAX_TRITON_TOKENS}"
        )
    return why_not_triton(score)


IMPLS = (
    Impl("native", native("select_tokens"), _native_why_not),
    Impl("triton", triton_row("select_tokens"), _triton_why_not),
    Impl("ref", select_tokens_ref, always),
)


def row_args(
    score: Tensor,
    count: int,
    drops: Tensor | None = None,
    *,
    starvation: float = 0.1,
    high: float = 0.0,
    most: int | None = None,
    forced: Tensor | None = None,
    compatible: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int, int, int, bool]:
    """Check the public arguments and give those of a row."""
    op = "select_tokens"
    check_tensor(op, "score", score, dim=2)
    batch, tokens = score.shape
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= max(tokens, 1):
        raise ValueError(f"{op}: count is {count!r}, need an integer from 1 to {tokens}")
    if drops is None:
        drops = torch.zeros(batch, tokens, dtype=torch.int32, device=score.device)
    for name, t, dtype in (("drops", drops, torch.int32), ("forced", forced, torch.bool)):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.dtype != dtype:
            found = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{op}: {name} is {found}, need a tensor of {dtype}")
        check_strided(op, name, t)
        if t.shape != score.shape and not (name == "forced" and t.shape == (1, tokens)):
            raise ValueError(f"{op}: {name} has shape {list(t.shape)}, need {list(score.shape)}")
        if t.device != score.device:
            raise ValueError(
                f"{op}: {name} is on {t.device}, need {score.device}, the device of score"
            )
    check_finite(op, "starvation", starvation)
    if starvation < 0:
        raise ValueError(f"{op}: starvation is {starvation!r}, need a number of at least 0")
    if isinstance(high, bool) or not isinstance(high, int | float) or not 0 <= high <= 1:
        raise ValueError(f"{op}: high is {high!r}, need a number from 0 to 1")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ValueError(f"{op}: most is {most!r}, need an integer of at least 1, or None")
    if compatible and (most is not None or forced is not None):
        name, value = ("most", most) if most is not None else ("forced", "given")
        raise ValueError(f"{op}: compatible is set and {name} is {value}, need one of them")
    skip = tokens - count
    power = torch.arange(STEPS, dtype=torch.float32, device=score.device) * starvation
    rise = power.clamp(max=80.0).exp()  # finite, as is its inverse
    factors = torch.stack([rise, rise if compatible else 1 / rise])
    low = int((1 - high) * skip + 1e-9)
    forced = None if forced is None else forced.expand(batch, -1).contiguous()
    kept = -1 if most is None else most
    return score.float().contiguous(), drops.contiguous(), forced, factors, count, low, kept, (
        not compatible
    )  # fmt: skip


TABLES = {"select_tokens": (IMPLS, row_args)}


def select_tokens(
    score: Tensor,
    count: int,
    drops: Tensor | None = None,
    *,
    starvation: float = 0.1,
    high: float = 0.0,
    most: int | None = None,
    forced: Tensor | None = None,
    compatible: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``count`` tokens of every sample, on the device: the host waits for nothing.

    Args:
        score: ``[B, N]``, any float dtype, compared in float32; at least 0 for the factors to mean
            what they do (negative values are ordered as they come).
        count: A, 1 to N.
        drops: int32 ``[B, N]``, how often in a row each token was left out; None: never.
        starvation: k of the factor exp(k d), at least 0.
        high: share of the left-out tokens that is taken from the highest scores, 0 to 1.
        most: left out so often, a token is due; None: there is no such limit.
        forced: bool ``[B|1, N]``, tokens that come before all others.
        compatible: the published code's rule: both ends of one order, by s exp(+k d), and
            ``drops`` that counts all steps left out and never goes back to 0.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        The chosen tokens, int64 ``[B, A]``, ascending; and the new ``drops``.

    Raises:
        ValueError: an argument does not fit; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(
        score, count, drops, starvation=starvation, high=high, most=most, forced=forced,
        compatible=compatible,
    )  # fmt: skip
    return pick("select_tokens", IMPLS, impl, *args)(*args)


if hasattr(torch.ops.fastdiff, "select_tokens"):

    @torch.library.register_fake("fastdiff::select_tokens")
    def _(
        score: Tensor,
        drops: Tensor,
        forced: Tensor | None,
        factors: Tensor,
        count: int,
        low: int,
        most: int,
        reset: bool,
    ) -> tuple[Tensor, Tensor]:
        index = score.new_empty(score.shape[0], count, dtype=torch.int64)
        return index, torch.empty_like(drops)
