r"""Systematic selection of particles on the device (Kitagawa 1996), where a group lost too many.

With log weights l_k of the K particles of a group, NaN counting as none and +inf above all others,

    w = softmax(l)  (1 / K each where no particle has a weight),    ESS = 1 / sum_k w_k^2
    did = ESS < ess_below K
    parent_j = the first k with w_0 + ... + w_k > (u + j) / K,      l'_j = log mean_k exp(l_k)

where ``did``; elsewhere ``parent_j = j`` and ``l' = l``. A particle of weight w has floor(K w) or
ceil(K w) children, one without weight none. The mean weight stays, and with it the estimate of the
normalising constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff._native import native, why_not_native
from fastdiff.dispatch import Impl, always, pick, refuse_grad
from fastdiff.kernels import triton_row, why_not_triton
from fastdiff.ops._check import check_shape, check_strided

DTYPES = (torch.float32, torch.float64)
MAX_GPU_PARTICLES = 1024  # of a group, in the shared memory or the registers of one block
BELOW_ONE = 1 - 2.0**-53
SLACK = 1 - 1e-12  # equal weights have an ESS of K but for roundings


def normalised(logw: Tensor) -> Tensor:
    """``[G, K]`` float64 weights of sum 1; NaN counts as no weight. A group without any weight has
    equal weights, so that nothing breaks on the device."""
    logw = logw.double().nan_to_num(
        nan=-math.inf, posinf=torch.finfo(torch.float64).max, neginf=-math.inf
    )
    dead = (logw == -math.inf).all(1, keepdim=True)
    return torch.softmax(logw.masked_fill(dead, 0.0), 1)


def systematic(w: Tensor, u: Tensor) -> Tensor:
    """``[G, K]`` parents for normalised weights ``w [G, K]`` and ``u [G]`` in (0, 1)."""
    k = w.shape[1]
    edges = w.cumsum(1)
    edges = edges / edges[:, -1:]
    points = (u[:, None] + torch.arange(k, device=w.device)) / k
    points = points.clamp(max=BELOW_ONE)  # where u + j rounds to K, the last that has a weight
    return torch.searchsorted(edges, points, right=True).clamp(max=k - 1)


def selected(logw: Tensor, parents: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`resample` gives for the parents ``[G, K]`` of every group, were it resampled."""
    groups, k = logw.shape
    did = 1 / normalised(logw).square().sum(1) < least
    stay = torch.arange(k, device=logw.device).expand(groups, k)
    parents = torch.where(did[:, None], parents, stay)
    known = logw.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    mean = torch.logsumexp(known, 1, keepdim=True) - math.log(k)
    return parents, torch.where(did[:, None], mean.to(logw.dtype), logw), did


def resample_ref(logw: Tensor, u: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: float64 inside. ``least``: the effective sample size to stay."""
    return selected(logw, systematic(normalised(logw), u), least)


def _native_why_not(logw: Tensor, u: Tensor, least: float) -> str | None:
    if logw.device.type == "cuda" and logw.shape[1] > MAX_GPU_PARTICLES:
        return _too_many(logw)
    return refuse_grad(logw) or why_not_native(logw, u, dtypes=DTYPES, gpu="resample")


def _triton_why_not(logw: Tensor, u: Tensor, least: float) -> str | None:
    if logw.shape[1] > MAX_GPU_PARTICLES:
        return _too_many(logw)
    return refuse_grad(logw) or why_not_triton(logw, u, dtypes=DTYPES)


def _too_many(logw: Tensor) -> str:
    return (
        f"logw has {logw.shape[1]} particles in a group; the kernel holds them in one block, at "
        f"most {MAX_GPU_PARTICLES}"
    )


IMPLS = (
    Impl("native", native("resample"), _native_why_not),
    Impl("triton", triton_row("resample"), _triton_why_not),
    Impl("ref", resample_ref, always),
)


def row_args(logw: Tensor, u: Tensor, ess_below: float = 1.0) -> tuple[Tensor, Tensor, float]:
    """Check the public arguments and give those of a row."""
    op = "resample"
    for name, t, dtypes in (("logw", logw, DTYPES), ("u", u, DTYPES[1:])):
        if not isinstance(t, Tensor):
            raise ValueError(f"{op}: {name} is {type(t).__name__}, need a torch.Tensor")
        if t.dtype not in dtypes:
            need = " or ".join(map(str, dtypes))
            raise ValueError(f"{op}: {name} is {t.dtype}, need {need}")
        check_strided(op, name, t)
    if logw.dim() != 2 or logw.shape[1] < 1:
        raise ValueError(
            f"{op}: logw has shape {list(logw.shape)}, need [groups, particles], at least one "
            "particle"
        )
    if u.device != logw.device:
        raise ValueError(f"{op}: u is on {u.device}, need {logw.device}, the device of logw")
    check_shape(op, "u", u, logw.shape[:1])
    number = isinstance(ess_below, int | float) and not isinstance(ess_below, bool)
    if not number or not 0 < ess_below <= 1:
        raise ValueError(f"{op}: ess_below is {ess_below!r}, need a number in (0, 1]")
    return logw.contiguous(), u.contiguous(), ess_below * logw.shape[1] * SLACK


TABLES = {"resample": (IMPLS, row_args)}


def resample(
    logw: Tensor, u: Tensor, ess_below: float = 1.0, *, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the survivors of every group whose effective sample size is below ``ess_below K``.

    Args:
        logw: float32 or float64 ``[G, K]``, K at least 1; NaN is a weight of 0.
        u: float64 ``[G]``, uniform in (0, 1).
        ess_below: in (0, 1]; 1: whenever the weights differ.
        impl: row of ``IMPLS`` to force; None takes the first that accepts.

    Returns:
        ``parents``, int64 ``[G, K]``: the place in its group of what each particle becomes,
        ascending where the group was resampled and its own elsewhere; the log weights after, like
        ``logw``; ``did``, bool ``[G]``: which groups were resampled. Rows add weights in orders of
        their own: where a point is within their roundings of an edge, they may differ by one place.
        Only the reference has gradients, of the weights after.

    Raises:
        ValueError: an argument does not fit; the message names it.
        NoImpl: the forced row refuses; the message says why.
    """
    args = row_args(logw, u, ess_below)
    return pick("resample", IMPLS, impl, *args)(*args)


if hasattr(torch.ops.fastdiff, "resample"):

    @torch.library.register_fake("fastdiff::resample")
    def _(logw: Tensor, u: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
        parents = logw.new_empty(logw.shape, dtype=torch.int64)
        did = logw.new_empty(logw.shape[:1], dtype=torch.bool)
        return parents, torch.empty_like(logw, memory_format=torch.contiguous_format), did
