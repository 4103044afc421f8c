"""How the engine sees a network of blocks: what it can skip, without knowing whose class it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

Streams = tuple[Tensor, ...]  # what flows from block to block: (hidden,) or (hidden, encoder)


class Block(NamedTuple):
    """One block of a network.

    Attributes:
        module: called by the network; its ``forward`` is what a policy replaces.
        read: ``read(args, kwargs)`` gives the streams that a call hands to the block.
        pack: ``pack(streams)`` gives what the block returns.
        unpack: ``unpack(output)`` gives the streams of what the block returned.
    """

    module: nn.Module
    read: Callable[[tuple[Any, ...], dict[str, Any]], Streams]
    pack: Callable[[Streams], Any]
    unpack: Callable[[Any], Streams]

    @classmethod
    def of(cls, module: nn.Module, name: str = "hidden_states") -> Block:
        """A block of one stream, ``block(x, ...) -> x`` or ``block(name=x, ...) -> x``."""

        def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
            return (args[0] if args else kwargs[name],)

        return cls(module, read, lambda streams: streams[0], lambda out: (out,))


class BlockView(NamedTuple):
    """A network as a list of residual blocks, all with the same streams ``[B, N, C]``.

    Attributes:
        blocks: in the order of their calls.
        whole: ``whole(args, kwargs)`` of a call of the network: it adds to the streams between
            blocks (ControlNet), so that all samples must pass them together.
        off: ``off(args, kwargs)`` of such a call: why caches are off for it, "" where they are on.
        signal: ``signal(args, kwargs)`` of a call of the first block: its modulated input
            ``[B, N, C]``, by which a rule may decide; None: the first stream.
    """

    blocks: Sequence[Block]
    whole: Callable[[tuple[Any, ...], dict[str, Any]], bool] = lambda args, kwargs: False
    off: Callable[[tuple[Any, ...], dict[str, Any]], str] = lambda args, kwargs: ""
    signal: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None

    @classmethod
    def of(cls, modules: Iterable[nn.Module], name: str = "hidden_states") -> BlockView:
        """Blocks of one stream each: :meth:`Block.of`."""
        return cls([Block.of(module, name) for module in modules])


class Join(NamedTuple):
    """What a call hands to a stage of the way up.

    Attributes:
        hidden: ``[B, C, h, w]``, from below.
        skips: from the way down, the outermost first; the stage's first layer takes the last.
        size: ``(h, w)`` that the stage grows to, None where it doubles.
    """

    hidden: Tensor
    skips: tuple[Tensor, ...]
    size: Any = None


class Stage(NamedTuple):
    """One resolution of a U-Net, on its way down or up.

    Attributes:
        module: called by the network; its ``forward`` is what a policy replaces. On the way down
            it returns ``(hidden, skips)``, on the way up ``hidden``.
        layers: residual blocks.
        resamples: it changes the size after them; on the way down that result is a skip too.
        part: ``part(first, last, resample)`` gives a forward that runs layers
            ``first..last - 1``, then changes the size or not. A part of the way down returns the
            skips of its own layers alone.
        read: ``read(args, kwargs)``: what a call hands to a stage of the way up.
        write: ``write(args, kwargs, join)`` gives ``(args, kwargs)`` with another; ``join`` stays
            unwritten whatever the stage does.
    """

    module: nn.Module
    layers: int
    resamples: bool
    part: Callable[[int, int, bool], Callable[..., Any]]
    read: Callable[[tuple[Any, ...], dict[str, Any]], Join]
    write: Callable[[tuple[Any, ...], dict[str, Any], Join], tuple[tuple[Any, ...], dict[str, Any]]]


class UNetView(NamedTuple):
    """A network that goes down a list of stages, through a middle, and up again over skips.

    Attributes:
        conv_in: the input convolution, which gives the first skip.
        down: stages in calling order, the outermost first.
        mid: the middle, None where there is none.
        up: stages in calling order, the outermost last.
        sample: ``sample(args, kwargs)``: the noisy input ``[B, C, H, W]`` of a call.
        trim: ``trim(args, kwargs, skips, mid)`` gives ``(args, kwargs)`` of a call in which only
            the first ``skips`` skips, and the middle's result where ``mid``, are still there: what
            a caller adds to the others is left out.
        at_times: ``at_times(args, kwargs, times [G])`` gives ``(args, kwargs)`` of one call with
            G * B rows, the rows of a time together; None where that is not known.
        whole: ``whole(args, kwargs)`` of a call: residuals are added from outside (ControlNet),
            so that all samples must pass together.
    """

    conv_in: nn.Module
    down: Sequence[Stage]
    mid: nn.Module | None
    up: Sequence[Stage]
    sample: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]
    trim: Callable[
        [tuple[Any, ...], dict[str, Any], int, bool], tuple[tuple[Any, ...], dict[str, Any]]
    ]
    at_times: (
        Callable[[tuple[Any, ...], dict[str, Any], Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
        | None
    ) = None
    whole: Callable[[tuple[Any, ...], dict[str, Any]], bool] = lambda args, kwargs: False
