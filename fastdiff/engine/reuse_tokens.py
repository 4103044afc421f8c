"""Some tokens of a picture at work: blocks run on the rows of tokens in focus.

At a sparse step the streams of the blocks hold the chosen tokens alone, ``[B, A, C]``. Their
queries attend to the keys and values of all tokens: those of the others are kept from the step at
which they were last computed, and those of the chosen are refreshed in place. The network's last
layer puts the chosen tokens' outputs among the kept ones. What is chosen comes from the noise that
the step before used, for every sample on its own and for all branches of its guidance alike; the
host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.engine.off import why_off
from fastdiff.engine.patch import Patch, forward_of
from fastdiff.engine.request import Event, Request, current
from fastdiff.engine.token_state import PART, Choice, Kept, open_region
from fastdiff.engine.view import BlockView
from fastdiff.tokens.region import RegionAdaptive, score


class TokenView(NamedTuple):
    """How the engine sees the tokens of a network.

    Attributes:
        blocks: with the picture's tokens as their first stream ``[B, N, C]``.
        last: the layer that gives every token's output, ``[B, N, V]``.
        pixels: ``pixels(outputs [B, N, V]) -> [B, N, P, C]``: pixels and channels of a token.
        tokens: ``tokens(noise [B, C, ...]) -> [B, N, P, C]``: the same of a picture.
        grid: ``grid(N, args, kwargs)``: tokens along each dimension; None: those of the mask.
        why_not: ``why_not()``: why its attention cannot run on some tokens, "" where it can.
    """

    blocks: BlockView
    last: nn.Module
    pixels: Callable[[Tensor], Tensor]
    tokens: Callable[[Tensor], Tensor]
    grid: Callable[[int, Any, Any], Sequence[int] | None]
    why_not: Callable[[], str]


class TokenCall:
    """One call of a network within a run.

    Args:
        choose: ``choose(rows)`` gives ``[B, A]``, the tokens that the call computes, or None for
            all; asked where its blocks begin. None: the call is dense.
        keeps: keys and values of a dense call are kept.

    Attributes:
        index: what was chosen.
        rows: samples of the batch that a block cache lets through, None for all.
        awake: blocks have begun; a block cache may leave out all of them.
    """

    def __init__(
        self,
        request: Request,
        kept: Kept,
        choice: Choice,
        choose: Callable[[Tensor | None], Tensor | None] | None,
        keeps: bool,
    ) -> None:
        self._request, self._kept, self._choice = request, kept, choice
        self._choose, self._keeps = choose, keeps
        self._among: dict[tuple[int, int], Tensor] = {}
        self.index: Tensor | None = None
        self.rows: Tensor | None = None
        self.awake = False
        self.total = 0 if kept.output is None else kept.output.shape[1]

    def begin(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """The chosen tokens of the streams ``[B, N, C]`` at the first block that is left to the
        tokens; of the samples that a block cache lets through."""
        self.awake = True
        if self._choose is None:
            self._choice.run(None, self.rows)
        else:
            self.index = self._choose(self.rows)
        if self.index is None:
            return (x, *more)
        index = self.index if self.rows is None else self.index[self.rows]
        return tuple(ops.gather_tokens(t, index) for t in (x, *more))

    def among(self, length: int, before: int, after: int) -> Tensor | None:
        """``[B, length]``: the places of a stream's rows, which has other tokens before and after
        the picture's, among those of the whole stream; None: it has all of them."""
        if self.index is None or length == before + self.total + after:
            return None
        key = before, after
        if key not in self._among:
            index, b = self.index, self.index.shape[0]
            first = torch.arange(before, device=index.device).expand(b, -1)
            start = before + self.total
            last = torch.arange(start, start + after, device=index.device).expand(b, -1)
            parts = [p for p in (first, index + before, last) if p.shape[1]]
            self._among[key] = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return self._among[key]

    def keys_values(
        self, owner: Hashable, k: Tensor, v: Tensor, before: int, after: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, from those ``[B, H, T, D]`` of this call's rows."""
        places, rows = self.among(k.shape[2], before, after), self.rows
        if places is None:
            if self._keeps:
                self._keep(owner, k, v)
            return k, v
        kept = self._kept.keys[owner]
        if rows is None:
            for old, new in zip(kept, (k, v), strict=True):
                ops.update_tokens_(old, places, new)
            return kept
        for old, new in zip(kept, (k, v), strict=True):
            some = old[rows]
            old.index_copy_(0, rows, ops.update_tokens_(some, places[rows], new))
        return kept[0][rows], kept[1][rows]

    def _keep(self, owner: Hashable, k: Tensor, v: Tensor) -> None:
        kept = self._kept.keys.get(owner)
        if kept is None:
            shape = self._kept.batch, *k.shape[1:]
            kept = k.new_zeros(shape), v.new_zeros(shape)
            self._kept.keys[owner] = kept
            held = sum(t.numel() * t.element_size() for p in self._kept.keys.values() for t in p)
            self._request.claim((self._request.slot, PART), held)
            self._kept.version += 1
        for old, new in zip(kept, (k, v), strict=True):
            if self.rows is None:
                old.copy_(new)
            else:
                old.index_copy_(0, self.rows, new)
        self._kept.full = True

    def output(self, out: Tensor) -> Tensor:
        """Outputs of all tokens ``[B, N, V]``, from those of this call's rows."""
        kept, fresh = self._kept.output, self._choice.fresh
        if kept is None or (self.index is None and kept.shape != out.shape):
            size = out.numel() * out.element_size()
            self._request.claim((self._request.slot, PART, "output"), size)
            self._kept.output = out
            return out
        if out.shape[1] != self.total:
            assert self.index is not None
            return ops.update_tokens_(kept, self.index, out).clone()
        if fresh is None:
            kept.copy_(out)
            return out
        # A block cache has continued all tokens from what they had: those that ran lately count.
        fresh = fresh.repeat(out.shape[0] // fresh.shape[0], 1)
        kept.copy_(torch.where(fresh[:, :, None], out, kept))
        return kept.clone()


_call: ContextVar[TokenCall | None] = ContextVar("fastdiff_tokens", default=None)


def current_tokens() -> TokenCall | None:
    """The call of a network that is in work here, None where nothing is kept of its tokens."""
    return _call.get()


def keys_values(
    owner: Hashable, k: Tensor, v: Tensor, before: int = 0, after: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, T, D]`` that an attention's queries look at.

    Args:
        owner: names the attention.
        k, v: of the rows of this call, with norms and rotary positions applied.
        before, after: tokens of another stream (text) on either side of the picture's.
    """
    call = _call.get()
    if call is None:
        return k, v
    return call.keys_values(owner, k, v, before, after)


def positions(length: int, before: int = 0, after: int = 0) -> Tensor | None:
    """``[B, length]``: the place of every row of a stream in the whole of it; None: 0, 1, ..."""
    call = _call.get()
    if call is None:
        return None
    places = call.among(length, before, after)
    return places if places is None or call.rows is None else places[call.rows]


def _noise(request: Request, kept: Kept, view: TokenView, batch: int) -> Tensor:
    """``[S, N, P, C]``: the noise that the last step used; S is B where samples are not known."""
    seen = request.prediction
    if seen is not None:
        if request.samples is not None:
            seen = seen[: request.samples]  # some pipelines hand on both halves, which are equal
        if seen.dim() == 3:
            return view.pixels(seen)  # as tokens
        return view.tokens(seen)
    assert kept.output is not None
    found = view.pixels(kept.output)
    samples = request.samples
    if samples is None or batch % samples:
        return found
    return found.unflatten(0, (batch // samples, samples)).float().mean(0)


def _choose(
    request: Request,
    choice: Choice,
    policy: RegionAdaptive,
    view: TokenView,
    kept: Kept,
    args: Any,
    kwargs: Any,
    rows: Tensor | None,
) -> Tensor | None:
    """``[B, A]`` for this step, None: all. The first call of a step chooses for all of them."""
    slot: Any = request.slot
    if choice.chosen_at != request.step:
        noise = _noise(request, kept, view, kept.batch)
        tokens = noise.shape[1]
        size = noise.shape[0], tokens, noise.device
        if choice.size != size and not (request.static and choice.size):
            choice.size, choice.region = size, None
        choice.grid = view.grid(tokens, args, kwargs)
        if not request.static:  # a program's region was taken over before
            request.syncs += choice.force(open_region())
        low, high = policy.left_out(request.step, request.steps, tokens)
        count = max(tokens - low - high, choice.least)
        if choice.drops is not None and choice.drops.shape != noise.shape[:2]:
            choice.drops = choice.fresh = choice.since = None
        # index and two counts of 8 bytes, drops and change of 4, fresh of 1, forced ones of 1
        held = noise.shape[0] * tokens * 34
        if choice.noise is not None:
            held += choice.noise.numel() * choice.noise.element_size()
        request.claim((slot[0], PART), held)
        choice.chosen_at, choice.index, ran = request.step, None, None
        if count < tokens:
            rank = (
                choice.expected()
                if policy.metric == "change" and choice.change is not None
                else score(noise, "std" if policy.metric == "change" else policy.metric)
            )
            choice.index, drops = ops.select_tokens(
                rank, count, choice.drops, starvation=policy.starvation,
                high=high / max(1, low + high), most=policy.most, forced=choice.forced,
                compatible=policy.compatible,
            )  # fmt: skip
            choice.dropped(drops, rows)
            ran = torch.zeros_like(drops, dtype=torch.bool).scatter_(1, choice.index, True)
        choice.run(ran, rows)
    index = choice.index
    if index is None or index.shape[0] == kept.batch:
        return index
    if kept.batch % index.shape[0]:
        raise ValueError(
            f"accelerate: a call has {kept.batch} rows of {index.shape[0]} samples; need as many "
            "rows for every sample, the rows of a branch together"
        )
    return index.repeat(kept.batch // index.shape[0], 1)


def _batch(args: Any, kwargs: Any) -> tuple[int, Hashable]:
    """Rows of a call of the network, and what two calls must have in common."""
    x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return x.shape[0], (x.shape, x.dtype, x.device)


def drive(
    network: nn.Module, policy: RegionAdaptive, view: TokenView, patch: Patch, always: bool
) -> None:
    """Around every call of the network: sparse steps within a run, and nowhere else.

    Args:
        always: keys and values are kept at every dense step, as another cache may leave out the
            last one before a sparse step.
    """
    plain = forward_of(network)

    def forward(*args: Any, **kwargs: Any) -> Any:
        request = current()
        if request is None or request.slot is None:
            return plain(*args, **kwargs)
        batch, fits = _batch(args, kwargs)
        key, step = (request.slot, PART), request.step

        def note(computed: bool, how: str) -> None:
            request.trace.append(Event(step, request.slot, PART, (computed,) * batch, how))

        off = why_off(network) or view.blocks.off(args, kwargs) or view.why_not()
        if not off and view.blocks.whole(args, kwargs):
            off = "residuals of all tokens are added between blocks (ControlNet)"
        if off:
            request.state.pop(key, None)
            note(True, f"off: {off}")
            return plain(*args, **kwargs)
        kept: Kept | None = request.state.get(key)
        if kept is None or (kept.fits != fits and not request.static):
            kept = request.state[key] = Kept(fits, batch)
        choice = Choice.of(request, network)
        dense = policy.full(step, request.steps) or choice.owed
        sparse = not dense and kept.output is not None and kept.full
        if (
            policy.metric == "change"
            and choice.step < step
            and (request.prediction is not None or kept.output is not None)
        ):
            choice.observe(_noise(request, kept, view, batch))
        choose = partial(_choose, request, choice, policy, view, kept, args, kwargs)
        keeps = not sparse and (always or not policy.full(step + 1, request.steps))
        call = TokenCall(request, kept, choice, choose if sparse else None, keeps)
        token = _call.set(call)
        try:
            out = plain(*args, **kwargs)
        except BaseException:
            request.state.pop(key, None)  # some layers are at this step, others at the last
            raise
        finally:
            _call.reset(token)
        choice.tick(step)
        choice.owed = dense and not call.awake
        if call.index is not None:
            note(False, f"{call.index.shape[1]} of {call.total} tokens")
        elif call.awake:
            if choice.drops is not None and not policy.compatible:
                choice.drops.zero_()
            note(True, "full")
        return out

    patch.set(network, "forward", forward)


def _with_hidden(args: Any, kwargs: Any, x: Tensor) -> tuple[Any, Any]:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": x}
    return (x, *args[1:]), kwargs


def tokens(
    network: nn.Module,
    view: TokenView,
    policy: RegionAdaptive,
    patch: Patch,
    first: int,
    always: bool,
) -> list[str]:
    """Run ``policy`` on a network of blocks; a sentence that says so.

    Args:
        first: the block at which a sparse step takes its tokens out; those before see all.
        always: as for :func:`drive`.
    """
    block = view.blocks.blocks[first]
    plain, last = forward_of(block.module), view.last
    hooks: Any = last._forward_hooks

    def entry(*args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is not None:
            hooks.move_to_end(handle.id)  # after an adapter's, which see some tokens
            x = block.read(args, kwargs)[0]
            (some,) = call.begin(x)
            if some is not x:
                args, kwargs = _with_hidden(args, kwargs, some)
        return plain(*args, **kwargs)

    def outputs(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        call = _call.get()
        return out if call is None else call.output(out)

    patch.set(block.module, "forward", entry)
    handle = last.register_forward_hook(outputs)
    patch.on_undo(handle.remove)
    drive(network, policy, view, patch, always)
    count = len(view.blocks.blocks)
    return [f"{policy}: blocks {first}-{count - 1} run on the tokens in focus"]
