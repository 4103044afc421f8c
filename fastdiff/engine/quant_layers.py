"""The layers and attentions of a network in the formats of a
:class:`~fastdiff.precision.Precision`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from fastdiff.engine.patch import Patch
from fastdiff.engine.quant_experts import QuantExperts, Weight, expert_weights, patch_experts
from fastdiff.engine.quant_forward import (
    QuantConvolution,
    QuantForward,
    QuantScores,
    Stored,
    matrix,
)
from fastdiff.nn import MoE
from fastdiff.precision import Precision


def layers_of(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The plain linear layers of a network, by name."""
    for name, module in network.named_modules():
        if type(module) is nn.Linear:
            yield name, module


def convolutions_of(network: nn.Module, policy: Precision) -> Iterator[tuple[str, nn.Conv2d]]:
    """The convolutions of a network that ``policy`` takes for layers, by name."""
    for name, module in network.named_modules():
        if policy.convolutions == "none" or type(module) is not nn.Conv2d:
            continue
        size, stride, padding = module.kernel_size, module.stride, module.padding
        square = all(
            isinstance(pair, tuple) and pair[0] == pair[1] for pair in (size, stride, padding)
        )
        rest = module.groups, module.dilation, module.padding_mode
        if square and rest == (1, (1, 1), "zeros"):
            if policy.convolutions == "all" or (size, padding) == ((1, 1), (0, 0)):
                yield name, module


class Given(NamedTuple):
    """A policy, and weights that were stored under it before, by the names of layers."""

    policy: Precision
    layers: dict[str, Stored]


def quantize_layers(
    network: nn.Module,
    formats: Precision | Given,
    patch: Patch,
    attentions: Mapping[str, nn.Module],
) -> tuple[list[str], dict[str, QuantForward]]:
    """Let a policy decide on every linear layer of ``network``, those of experts and convolutions
    among them; ``layers`` may also name one of its ``attentions``.

    Returns:
        Sentences, and the layers that changed, by name.

    Raises:
        ValueError: a pattern of ``layers`` matches nothing, a weight is not finite, or what is
            given is of another network.
    """
    given = formats.layers if isinstance(formats, Given) else None
    policy = formats.policy if isinstance(formats, Given) else formats
    found: dict[str, Any] = {**dict(layers_of(network)), **dict(expert_weights(network))}
    found |= dict(convolutions_of(network, policy))
    for pattern, _ in policy.layers:
        if not any(fnmatchcase(name, pattern) for name in (*found, *attentions)):
            raise ValueError(f"Precision: no layer is called {pattern!r}")
    changed: dict[str, QuantForward] = {}
    experts: dict[int, tuple[Any, dict[str, QuantForward]]] = {}
    count: Counter[str] = Counter()
    before = after = 0
    for name, module in found.items():
        form = policy.of(name, module.weight.numel())
        count[form] += 1
        if form == "float":
            continue
        stored = None
        if given is not None:
            stored, shape = given.get(name), tuple(matrix(module.weight).shape)
            if stored is None or (stored.format, stored.shape) != (form, shape):
                has = "none" if stored is None else f"{stored.format} {list(stored.shape)}"
                raise ValueError(
                    f"Precision: layer {name} is {form} {list(shape)} and what is given has {has}"
                )
        stacked = isinstance(module, Weight) and isinstance(module.owner, MoE)
        kind = QuantConvolution if isinstance(module, nn.Conv2d) else QuantForward
        own = (QuantExperts if stacked else kind)(name, module, form, policy, stored)
        if isinstance(module, Weight):
            experts.setdefault(id(module.owner), (module.owner, {}))[1][module.which] = own
        else:
            patch.set(module, "forward", own)
        changed[name] = own
        before += module.weight.numel() * module.weight.element_size()
        after += own.stored.bytes
    for owner, some in experts.values():
        patch_experts(owner, some, patch)
    kinds = ", ".join(f"{n} in {form}" for form, n in sorted(count.items()) if form != "float")
    if not changed:
        return (["precision: no layer changes"] if policy.neutral else []), {}
    words = f"precision: {kinds} of {len(found)} layers; weights {before / 2**20:.1f} MiB, "
    words += f"stored in {after / 2**20:.1f} MiB"
    return [words], changed


def quantize_scores(
    attentions: Mapping[str, nn.Module], policy: Precision, patch: Patch
) -> tuple[list[str], dict[str, QuantScores]]:
    """Let a policy decide on every attention that asks :func:`fastdiff.nn.layers.attention`.

    Returns:
        Sentences, and the attentions that changed, by name.
    """
    changed = {}
    for name, module in attentions.items():
        if policy.scores(name) != "float":
            changed[name] = QuantScores(name, policy)
            patch.set(module, "scores", changed[name])
    if policy.attention == "float":
        return [], changed
    return [f"precision: int8 scores in {len(changed)} of {len(attentions)} attentions"], changed


def layer_lines(layers: Iterable[QuantForward | QuantScores]) -> list[str]:
    """What each layer's format costs and takes, the largest errors first; the host waits."""
    ran = [one for one in layers if one.calls]
    if not ran:
        return []
    errors = {one.name: one.error() for one in ran}
    ran.sort(key=lambda one: -(errors[one.name] or 0.0))
    lines = []
    for one in ran:
        error = errors[one.name]
        words = "error not measured" if error is None else f"error {error:.2e}"
        took = 1e3 * one.seconds / one.calls
        lines.append(f"  {one.name}: {one.words()}, {words}, {took:.3g} ms a call")
    return lines
