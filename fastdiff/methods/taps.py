"""Features of a network: outputs of its blocks during one call, which may end after the last one.

A tap is the name of a block, as ``network.get_submodule`` takes it ("blocks.3", "up_blocks.1").
Hooks are on the network for the length of one call only, however that call ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff.engine.programs import Programs
from fastdiff.methods.trajectory import Trajectory

Features = dict[str, Tensor]


class _Seen(Exception):
    """Every tap has been seen: the rest of the call is not needed."""


def network_of(model: Any) -> nn.Module:
    """The network whose blocks are tapped.

    Raises:
        ValueError: ``model`` is no ``nn.Module``.
    """
    network = model.network if isinstance(model, Programs) else model
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


def tapped(
    network: nn.Module, taps: Sequence[str], call: Callable[[], object], *, stop: bool = True
) -> Features:
    """Outputs of blocks of ``network`` while ``call()`` calls it.

    Args:
        taps: names; of a block that is called several times the first call counts.
        call: calls the network once.
        stop: end the call once all taps are seen; False: run it to its end. The same features.

    Returns:
        The output of every tap in the order of ``taps`` (of a tuple its first entry), within the
        autograd graph of the call.

    Raises:
        ValueError: taps are no blocks of the network, or one was not called: its output came from
            a cache, or the call is a captured graph.
    """
    found: Features = {}
    seen = _Seen()

    def keeping(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.setdefault(name, output[0] if isinstance(output, tuple) else output)
            if stop and len(found) == len(taps):
                raise seen

        return keep

    handles = []
    try:
        for name, block in blocks_of(network, taps).items():
            handles.append(block.register_forward_hook(keeping(name)))
        call()
    except _Seen as end:
        if end is not seen:  # that of a call around this one
            raise
    finally:
        for handle in handles:
            handle.remove()
    for name in taps:
        if name not in found:
            raise ValueError(
                f"taps: block {name!r} was not called, need a call that computes it (no cache of "
                "blocks, no captured graph)"
            )
    return {name: found[name] for name in taps}


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
