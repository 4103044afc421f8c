"""What a training loss on hidden features shares: a head beside the network, and a tap."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdiff.adapters.base import Adapter, Hook

_LISTS = ("blocks", "transformer_blocks", "layers")  # where networks keep their blocks


def block_of(who: str, network: nn.Module, block: int | str) -> nn.Module:
    """A block by number (of ``blocks`` or ``transformer_blocks``) or any module by name.

    Raises:
        ValueError: there is none; says what there is.
    """
    if isinstance(block, str):
        found = dict(network.named_modules()).get(block)
        if not block or found is None:
            some = ", ".join(n for n, _ in network.named_children())
            raise ValueError(f"{who}: block is {block!r}, need a module's name, in {some}")
        return found
    for name in _LISTS:
        blocks = getattr(network, name, None)
        if isinstance(blocks, nn.ModuleList):
            if (
                isinstance(block, bool)
                or not isinstance(block, int)
                or not 0 <= block < len(blocks)
            ):
                raise ValueError(
                    f"{who}: block is {block!r}, need a number 0 to {len(blocks) - 1} or a name"
                )
            return blocks[block]
    raise ValueError(
        f"{who}: {type(network).__name__} has no list of blocks, need block as a module's name"
    )


def main(out: Any) -> Tensor:
    """The hidden state in what a module gives: a tensor, or the first of several."""
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


class Tap(Adapter):
    """A head on hidden features that trains with the network and is absent when sampling.

    The output of ``block`` is kept where gradients are asked for and the adapter is in training
    mode; :meth:`take` gives it once. The network itself is left as it is.
    """

    freezes: ClassVar[bool] = False

    def __init__(self, network: nn.Module, block: int | str, **settings: Any) -> None:
        super().__init__(network, block=block, **settings)
        self.block = [block_of(self.method, network, block)]  # in a list: no submodule
        self._kept: Tensor | None = None

    def hooks(self) -> Any:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if self.training and torch.is_grad_enabled():
                self._kept = main(out)

        hook: Hook = keep
        yield self.block[0], hook

    def take(self) -> Tensor:
        """The block's output of the last call, given once.

        Raises:
            ValueError: there was no call with gradients since, or the adapter is not training.
        """
        if self._kept is None:
            raise ValueError(
                f"{self.method}: nothing was kept, need a call of the network with gradients "
                "enabled and the adapter attached and in training mode before"
            )
        kept, self._kept = self._kept, None
        return kept

    def detach(self) -> nn.Module:
        network = super().detach()
        self._kept = None
        return network


def whole(who: str, low: int = 1, high: int = 1 << 16, **values: Any) -> None:
    """Raises a ValueError where a setting is no whole number from low to high."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{who}: {name} is {value!r}, need a whole number {low} to {high}")
