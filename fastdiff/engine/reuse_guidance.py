"""Reuse of a guidance branch at work: reuse steps run the conditional half of a batch alone.

A batch of 2B rows is guidance where both halves hold the same latents, at two steps one after
another: independent samples may start from one noise, but then differ from the second step on; and
where they do not, because their conditions are the same, the difference is zero and its reuse
exact. The host waits for that comparison once a run, and again where
the batch changes its size (guidance in an interval). A batch that does not pass it is left alone.
Where the run says what a batch holds (:attr:`Request.samples`), or the policy does, nothing waits.

Two calls a step, the conditional one first and both with the same tensor of latents (Wan), are
guidance without a comparison: reuse steps leave out the second.

Next to other caches the halves always are calls of B rows of their own, with slots of their own, so
that what is kept of the conditional half goes on through every step, and no batch changes size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.adapters import samples
from fastdiff.cache.guidance import GuidanceReuse, weigh
from fastdiff.engine.history import History
from fastdiff.engine.off import why_off
from fastdiff.engine.patch import Patch, forward_of
from fastdiff.engine.request import Event, Request, current
from fastdiff.engine.rows import slice_of

PART = "unconditional branch"
_COND_FIRST = ("DiTTransformer2DModel",)
_INPUTS = ("hidden_states", "sample", "x")


@dataclass
class _Kept:
    """``delta``: uncond - cond ``[B, ...]`` of the last full step; ``sure``: it is guidance."""

    fits: tuple[Any, ...]
    step: int
    delta: History
    sure: bool = False
    off: str = ""


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next((kwargs[n] for n in _INPUTS if n in kwargs), None)


def _never(network: nn.Module, x: Any, others: Any) -> str:
    """Why a call cannot be two halves, as far as shapes and modules tell; "" where it may."""
    if not isinstance(x, Tensor):
        return "the input is no tensor"
    if x.shape[0] < 2 or x.shape[0] % 2:
        return f"no guidance seen: a batch of {x.shape[0]} has no two halves"
    processors = getattr(network, "attn_processors", {}).values()
    if any("PAG" in type(p).__name__ for p in processors):
        return "perturbed attention guidance has branches of its own"
    for t in pytree.tree_leaves(others):
        rows = t.shape[0] if isinstance(t, Tensor) and t.dim() > 1 else 0
        if rows > x.shape[0] and rows % x.shape[0] == 0 and not _is_position(t, others):
            return f"an argument has {rows} rows, several for each of the {x.shape[0]} samples"
    return ""


def _is_position(t: Tensor, kwargs: Any) -> bool:
    """A table of tokens, whose rows are no samples'."""
    names = [k for k in kwargs if k in ("img_ids", "txt_ids") or "rotary" in k]
    return any(t is leaf for name in names for leaf in pytree.tree_leaves(kwargs[name]))


def _check(request: Request, policy: GuidanceReuse, kept: _Kept, x: Tensor) -> None:
    """Find out, at a full step, whether the halves of ``x`` are guidance."""
    if request.samples is not None:
        kept.sure = x.shape[0] == 2 * request.samples
        if not kept.sure:
            kept.off = f"no guidance seen: {x.shape[0]} rows of {request.samples} samples"
        return
    if not policy.compare:
        kept.sure = True
    if kept.sure or kept.off or kept.step == request.step:
        return
    request.syncs += 1
    first, second = x.flatten(1).chunk(2)
    same = (first == second).all().view(1)
    double = (first[1:] == first[:1]).all(1).any().view(1)
    halves, more = torch.cat([same, double]).tolist()  # one wait
    kept.sure = halves and not more
    if not halves:
        kept.off = "no guidance seen: the halves of the batch are different latents"
    elif more:
        kept.off = "more than two branches seen: rows of one half are the same latents"


class _First(NamedTuple):
    """The first call of a step: its latents (held, so that no other takes their place), the version
    that they had, and its output."""

    step: int
    x: Tensor
    version: int
    out: Any


def _second_call(request: Request, x: Any) -> _First | None:
    """The call of the conditional branch, where the call in work is the unconditional branch of
    the same step."""
    slot: Any = request.slot
    model, number = slot
    first = request.state.get((model, "guidance first"))
    if number != 1 or first is None or first.step != request.step or x is not first.x:
        return None
    return first if x._version == first.version else None


class _Halves:
    """The halves of one call."""

    def __init__(self, cond_first: bool, batch: int, plain: Callable[..., Any]) -> None:
        self._cond_first, self._batch, self._plain = cond_first, batch, plain

    def run(
        self, request: Request, args: tuple[Any, ...], kwargs: dict[str, Any], cond: bool
    ) -> tuple[Tensor, Any]:
        """Output ``[B, ...]`` of one half, and the structure that it came in."""
        half = self._batch // 2
        rows = slice(half) if cond == self._cond_first else slice(half, None)
        args, kwargs = slice_of(args, kwargs, rows, self._batch)
        outer = request.slot
        request.slot = (outer, "conditional" if cond else "unconditional")
        try:
            with samples(rows, self._batch):
                leaves, spec = pytree.tree_flatten(self._plain(*args, **kwargs))
        finally:
            request.slot = outer
        return leaves[0], spec

    def joined(self, cond: Tensor, uncond: Tensor, spec: Any) -> Any:
        pair = (cond, uncond) if self._cond_first else (uncond, cond)
        return pytree.tree_unflatten([torch.cat(pair)], spec)

    def branches(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional half of an output ``[2B, ...]``."""
        first, second = out.chunk(2)
        return (first, second) if self._cond_first else (second, first)

    def computed(self, full: bool) -> tuple[bool, ...]:
        half = self._batch // 2
        pair = ((True,) * half, (full,) * half)
        return pair[0] + pair[1] if self._cond_first else pair[1] + pair[0]


def _whole(out: Any, batch: int) -> Tensor | None:
    """The one tensor ``[2B, ...]`` of an output, None where there is another number of them."""
    leaves = pytree.tree_leaves(out)
    fits = len(leaves) == 1 and isinstance(leaves[0], Tensor) and leaves[0].shape[:1] == (batch,)
    return leaves[0] if fits else None


def guidance(
    network: nn.Module, policy: GuidanceReuse, patch: Patch, parted: bool = False
) -> list[str]:
    """Run ``policy`` on a network that is called once a step, with both branches in a batch.

    Args:
        network: gives one tensor ``[2B, ...]``, in a tuple or a class of outputs or alone.
        policy: which steps are full.
        patch: takes the change.
        parted: other caches work inside: full steps are two calls of B rows as well.

    Returns:
        A sentence that says what is reused.
    """
    if policy.neutral:
        return [f"{policy}: every step is full"]
    plain = forward_of(network)
    cond_first = policy.order == "cond first"
    if policy.order == "auto":
        cond_first = any(cls.__name__ in _COND_FIRST for cls in type(network).__mro__)

    def second(request: Request, first: _First, run: Callable[[], Any]) -> Any:
        """The call of the unconditional branch."""
        key, batch = (request.slot, "guidance second"), first.x.shape[0]
        kept = request.state.get(key)
        leaves, spec = pytree.tree_flatten(first.out)
        cond = leaves[0]
        how, full = "full", policy.full(request.step, request.steps)
        if policy.order == "uncond first":
            how = "off: the conditional branch is called second, and reuse needs its output first"
            request.state[key] = None
        elif kept is not None and kept.shape == cond.shape and not full:
            weights = policy.weights(request.step, request.steps)
            split = cond.dim() >= 4 or weights == (1, 1)
            how = "reuse" if split else "reuse, no grid to split"
            request.trace.append(Event(request.step, request.slot, PART, (False,) * batch, how))
            return pytree.tree_unflatten([cond + weigh(kept, weights, policy.cutoff)], spec)
        request.trace.append(Event(request.step, request.slot, PART, (True,) * batch, how))
        out = run()
        if how == "full":
            delta = pytree.tree_leaves(out)[0] - cond
            request.claim(key, delta.numel() * delta.element_size())
            request.state[key] = delta
        return out

    def forward(*args: Any, **kwargs: Any) -> Any:
        request = current()
        if request is None or request.slot is None:
            return plain(*args, **kwargs)
        x, off = _input(args, kwargs), why_off(network)
        first = None if off else _second_call(request, x)
        if first is not None:
            return second(request, first, lambda: plain(*args, **kwargs))
        out = one_call(request, args, kwargs)
        slot: Any = request.slot
        model, number = slot
        known = isinstance(x, Tensor) and not x.is_inference()  # those have no version
        # Kept for a second call of the step; where none came so far, none is expected.
        pair = request.step == 0 or ((model, 1), "guidance second") in request.state
        pair = pair and not request.static  # a graph's addresses say nothing
        request.state.pop((model, "guidance first"), None)
        if pair and number == 0 and not off and known and len(pytree.tree_leaves(out)) == 1:
            leaves, spec = pytree.tree_flatten(out)
            size = sum(t.numel() * t.element_size() for t in (x, leaves[0]))
            request.claim((model, "guidance first"), size)
            copy = pytree.tree_unflatten([leaves[0].clone()], spec)  # the caller may write to it
            request.state[model, "guidance first"] = _First(request.step, x, x._version, copy)
        return out

    def one_call(request: Request, args: Any, kwargs: Any) -> Any:
        x, key = _input(args, kwargs), (request.slot, "guidance")
        batch = x.shape[0] if isinstance(x, Tensor) else 1

        def note(computed: tuple[bool, ...], how: str) -> None:
            request.trace.append(Event(request.step, request.slot, PART, computed, how))

        why = why_off(network) or _never(network, x, kwargs)
        if why:
            request.state.pop(key, None)
            note((True,) * batch, f"off: {why}")
            return plain(*args, **kwargs)
        fits = (x.shape, x.dtype)
        kept = request.state.get(key)
        if kept is None or kept.fits != fits:
            kept = _Kept(fits, request.step, History(1))
        _check(request, policy, kept, x)
        if kept.off:
            request.state[key] = kept
            note((True,) * batch, f"off: {kept.off}")
            return plain(*args, **kwargs)
        halves = _Halves(cond_first, batch, plain)
        full = policy.full(request.step, request.steps)
        if kept.sure and kept.delta.order and not full:
            weights = policy.weights(request.step, request.steps)
            cond, spec = halves.run(request, args, kwargs, cond=True)
            uncond = cond + weigh(kept.delta.values[0][0], weights, policy.cutoff)
            split = cond.dim() >= 4 or weights == (1, 1)
            note(halves.computed(False), "reuse" if split else "reuse, no grid to split")
            return halves.joined(cond, uncond, spec)
        if parted and kept.sure:
            cond, spec = halves.run(request, args, kwargs, cond=True)
            uncond, _ = halves.run(request, args, kwargs, cond=False)
            out = halves.joined(cond, uncond, spec)
        else:
            out = plain(*args, **kwargs)
            whole = _whole(out, batch)
            if whole is None:
                kept.off = "the output is not one tensor with a row for every sample"
                request.state[key] = kept
                note((True,) * batch, f"off: {kept.off}")
                return out
            cond, uncond = halves.branches(whole)
        request.claim(key, cond.numel() * cond.element_size())
        kept.delta.put(request.step, (uncond,), minus=(cond,))
        request.state[key] = kept
        note(halves.computed(True), "full")
        return out

    patch.set(network, "forward", forward)
    return [f"{policy}: reuse steps leave out the unconditional half of a guided batch"]
