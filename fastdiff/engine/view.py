"""How the engine sees a network of blocks: what it can skip, without knowing whose class it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

Streams = tuple[Tensor, ...]  # what flows from block to block: (hidden,) or (hidden, encoder)


class Block(NamedTuple):
    """One block of a network.

    Attributes:
        module: called by the network; its ``forward`` is what a policy replaces.
        read: ``read(args, kwargs)`` gives the streams that a call hands to the block.
        write: ``write(args, kwargs, streams)`` gives ``(args, kwargs)`` with other streams.
        pack: ``pack(streams)`` gives what the block returns.
        unpack: ``unpack(output)`` gives the streams of what the block returned.
    """

    module: nn.Module
    read: Callable[[tuple[Any, ...], dict[str, Any]], Streams]
    write: Callable[
        [tuple[Any, ...], dict[str, Any], Streams], tuple[tuple[Any, ...], dict[str, Any]]
    ]
    pack: Callable[[Streams], Any]
    unpack: Callable[[Any], Streams]


class BlockView(NamedTuple):
    """A network as a list of residual blocks, all with the same streams ``[B, N, C]``."""

    blocks: Sequence[Block]
