"""Features of a network: outputs of its blocks during one call, which may end after the last one.

A tap is the name of a block, as ``network.get_submodule`` takes it ("blocks.3", "up_blocks.1").
Hooks are on the network for the length of one call only, however that call ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff.accelerate import network_of as inner
from fastdiff.methods.trajectory import Trajectory

Features = dict[str, Tensor]


class _Seen(Exception):
    """Every tap has been seen: the rest of the call is not needed."""


def network_of(model: Any) -> nn.Module:
    """The network whose blocks are tapped.

    Raises:
        ValueError: ``model`` is no ``nn.Module``.
    """
    network = inner(model)
    if not isinstance(network, nn.Module):
        raise ValueError(f"taps: model is {type(model).__name__}, need an nn.Module")
    return network


def blocks_of(network: nn.Module, taps: Sequence[str]) -> dict[str, nn.Module]:
    """The block of every tap.

    Raises:
        ValueError: no tap, one name twice, or a name of no block.
    """
    if isinstance(taps, str) or not taps or len(set(taps)) != len(taps):
        raise ValueError(f"taps: taps is {taps!r}, need a list of different names of blocks")
    known = dict(network.named_modules())
    for name in taps:
        if not name or name not in known:
            few = ", ".join(list(dict(network.named_children()))[:8])
            raise ValueError(f"taps: taps has {name!r}, need names of modules below {few}")
    return {name: known[name] for name in taps}


def outputs(
    modules: Sequence[nn.Module], call: Callable[[], object], *, stop: bool = True
) -> list[Tensor | None]:
    """What each of ``modules`` gives while ``call()`` runs, None where it is not called.

    Args:
        modules: of one that is called several times the first call counts; of a tuple that it
            gives the first entry.
        call: calls their network once.
        stop: end the call once all have been called; False: run it to its end. The same outputs.
    """
    found: dict[nn.Module, Tensor] = {}
    seen, wanted = _Seen(), set(modules)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.setdefault(module, output[0] if isinstance(output, tuple) else output)
        if stop and len(found) == len(wanted):
            raise seen

    handles = []
    try:
        for module in wanted:
            handles.append(module.register_forward_hook(keep))
        call()
    except _Seen as end:
        if end is not seen:  # that of a call around this one
            raise
    finally:
        for handle in handles:
            handle.remove()
    return [found.get(module) for module in modules]


def tapped(
    network: nn.Module, taps: Sequence[str], call: Callable[[], object], *, stop: bool = True
) -> Features:
    """Outputs of blocks of ``network`` while ``call()`` calls it, as :func:`outputs`, by name and
    in the order of ``taps``, within the autograd graph of the call.

    Raises:
        ValueError: taps are no blocks of the network, or one was not called: its output came from
            a cache, or the call is a captured graph.
    """
    found: Features = {}
    blocks = blocks_of(network, taps)
    for name, output in zip(taps, outputs(list(blocks.values()), call, stop=stop), strict=True):
        if output is None:
            raise ValueError(
                f"taps: block {name!r} was not called, need a call that computes it (no cache of "
                "blocks, no captured graph)"
            )
        found[name] = output
    return found


def features(
    run: Trajectory, i: int, taps: Sequence[str], x: Tensor | None = None, *, stop: bool = True
) -> Features:
    """Features of the run's model at level ``i``, with the condition alone and without caches.

    Args:
        x: ``[B, C, ...]``, None: the state.
        taps, stop: of :func:`tapped`.

    Raises:
        ValueError: as :func:`tapped`.
    """
    why = "features of its blocks are read"
    return tapped(
        network_of(run.model),
        taps,
        lambda: run.predict(i, x, guided=False, independent=why),
        stop=stop,
    )
