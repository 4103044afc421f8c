"""The experts of noise levels, computed once: for networks that route by the level alone (MoDE:
Reuss et al. 2024, arXiv:2412.12953, section 4.3).

A level is known by the bits of its float32 value, which is what the network computes with: no mean,
no tolerance. Kept are the logits, gates and experts of every block, not the experts' weights: these
are read in place, so that a cached call computes what a routed one does, in the same order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.nn.layers import heard

if TYPE_CHECKING:
    from fastdiff.models.mode import Cost, MoDE

LENGTHS = 8  # numbers of tokens whose routings are kept


class _Choice(NamedTuple):
    """Of one block at one level."""

    logits: Tensor  # [1, E]
    weights: Tensor  # [1, K]
    experts: Tensor  # [1, K]
    slots: Tensor  # [K], of 0 to K - 1, in the order of their experts


def bits(sigma: float) -> int:
    """Of the float32 that ``sigma`` rounds to."""
    found: int = struct.unpack("<I", struct.pack("<f", sigma))[0]
    return found


def spread(choice: _Choice, tokens: int) -> ops.Routing:
    """What ``ops.moe_route`` gives for ``tokens`` of one choice, without its sort."""
    device, k = choice.experts.device, choice.slots.shape[0]
    token = torch.arange(tokens, device=device)
    place = torch.empty_like(choice.slots)
    place.scatter_(0, choice.slots, torch.arange(k, device=device))
    each = torch.arange(choice.logits.shape[1], device=device)
    counts = tokens * (choice.experts.view(-1, 1) == each).sum(0)
    return ops.Routing(
        weights=choice.weights.expand(tokens, -1).contiguous(),
        experts=choice.experts.expand(tokens, -1).contiguous(),
        order=(token * k + choice.slots[:, None]).flatten(),
        position=place * tokens + token[:, None],
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        counts=counts,
    )


class ExpertCache:
    """Experts and gates of every block of ``policy`` at ``sigmas``.

    It is for the weights that it was made with: written to in place or replaced, those that decide
    on the experts make it stale, and its next use says so; so does an adapter of their layers when
    it comes, goes or changes. Writes through ``.data`` are not seen.
    The experts' own weights may change.

    Raises:
        ValueError: ``sigmas`` is empty or has a value that is not above 0.
    """

    @torch.no_grad()
    def __init__(self, policy: MoDE, sigmas: Sequence[float]) -> None:
        self.sigmas = [float(s) for s in sigmas]
        if not self.sigmas or not all(0 < s < float("inf") for s in self.sigmas):
            raise ValueError(f"ExpertCache: sigmas is {sigmas!r}, need numbers above 0")
        self._policy = policy
        self._weights = policy.routing_weights()
        self._versions = self._version()
        self._choices: dict[int, list[_Choice]] = {}
        self._chosen: dict[int, list[tuple[int, ...]]] = {}
        self._spread: dict[int, dict[int, list[ops.Routing]]] = {}
        device = self._weights[0].device
        for s in self.sigmas:
            # One level a time, as a call at one level computes it: the same bits.
            c = policy.condition(torch.full((1,), s, dtype=torch.float32, device=device))
            made = []
            for logits in policy.logits(c):
                routing = ops.moe_route(
                    torch.zeros_like(logits), policy.k, sample_logits=logits, renormalise=True
                )
                slots = torch.sort(routing.experts[0], stable=True).indices
                made.append(_Choice(logits, routing.weights, routing.experts, slots))
            self._choices[bits(s)] = made
            every = torch.cat([choice.experts for choice in made]).tolist()
            self._chosen[bits(s)] = [tuple(sorted(experts)) for experts in every]

    def _find(self, sigma: float) -> int:
        key = bits(sigma)
        if key not in self._choices:
            raise ValueError(
                f"ExpertCache: sigma is {sigma!r}, none of the {len(self._choices)} levels from "
                f"{max(self.sigmas):g} to {min(self.sigmas):g}; need policy.cache(sigmas) with it"
            )
        return key

    def chosen(self, sigma: float) -> list[tuple[int, ...]]:
        """The experts of every block, ascending."""
        return self._chosen[self._find(sigma)]

    def gates(self, sigma: float) -> list[tuple[Tensor, Tensor]]:
        """Experts and gates ``[K]`` of every block, the highest first."""
        return [(c.experts[0], c.weights[0]) for c in self._choices[self._find(sigma)]]

    def _version(self) -> list[object]:
        """Of the weights that decide on the experts, and of adapters on their layers."""
        found: list[object] = [p._version for p in self._weights if not p.is_inference()]
        for layer in self._policy.routing_layers():
            if not heard(layer):
                continue
            for hook in layer._forward_hooks.values():
                adapter = getattr(hook, "adapter", None)
                found.append(id(hook) if adapter is None else adapter.version)
        return found

    def stale(self) -> bool:
        """Weights that decide on the experts are others than those it was made with."""
        now = self._policy.routing_weights()
        same = len(now) == len(self._weights) and all(
            a is b for a, b in zip(now, self._weights, strict=True)
        )
        return not same or self._versions != self._version()

    def lookup(self, policy: MoDE, sigma: float | Tensor) -> Callable[[int], Sequence[ops.Routing]]:
        """The routings of a call at ``sigma``, a number or a tensor ``[B]`` on the CPU, as a
        function of its number of tokens.

        Raises:
            ValueError: a level is unknown, the cache is stale or of another policy, or ``sigma``
                lies on a GPU, where reading it would wait.
        """
        if policy is not self._policy:
            raise ValueError("ExpertCache: policy is another than the cache was made for")
        if self.stale():
            raise ValueError(
                "ExpertCache: the policy's router or level embedding has changed since the cache "
                "was made, need policy.cache(sigmas) again"
            )
        if not isinstance(sigma, Tensor):
            key = self._find(sigma)
            return lambda tokens: self._uniform(key, tokens)
        if sigma.device.type != "cpu":
            raise ValueError(
                f"ExpertCache: sigma is on {sigma.device}, need a number or a tensor on the cpu"
            )
        keys = [self._find(s) for s in sigma.tolist()]
        return lambda tokens: self._mixed(keys, tokens)

    def _uniform(self, key: int, tokens: int) -> list[ops.Routing]:
        kept = self._spread.setdefault(tokens, {})
        if key not in kept:
            kept[key] = [spread(choice, tokens) for choice in self._choices[key]]
            while len(self._spread) > LENGTHS:
                del self._spread[next(iter(self._spread))]
        return kept[key]

    def _mixed(self, keys: Sequence[int], tokens: int) -> list[ops.Routing]:
        out = []
        for choices in zip(*(self._choices[key] for key in keys), strict=True):
            sample = torch.cat([choice.logits for choice in choices])
            none = sample.new_zeros(tokens, sample.shape[1])
            routing = ops.moe_route(
                none, choices[0].slots.shape[0], sample_logits=sample, renormalise=True
            )
            out.append(routing)
        return out

    def cost(self, batch: int = 1, states: int = 1) -> dict[str, Cost]:
        """Multiply-adds of a call at one level, "routed" and "cached"."""
        count = self._policy.cost
        return {
            "routed": count(batch, states),
            "cached": count(batch, states, cached=True),
        }
