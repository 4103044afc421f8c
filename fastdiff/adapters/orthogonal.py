r"""Orthogonal adaptation: concepts that are trained apart and merged without training
(Po et al. 2023, arXiv:2312.02432, section 4).

    W_merged = W + sum_i w_i A_i B_i^T

B_i, the down factors, are frozen columns of one orthogonal basis per shape of layer, drawn from a
seed; concepts have disjoint columns, so that A_j B_j^T x = 0 for x in the span of B_i and each
concept's output stays what it was. Gaussian columns are the paper's cheaper choice; their crosstalk
is about sqrt(rank / K), not 0: :func:`crosstalk` measures it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.adapters.base import Adapter, Hook, Targets, first, key_of, name_of, read
from fastdiff.adapters.lora import LoRA

BASES = ("orthogonal", "gaussian")


def columns(out: int, inner: int, stop: int, seed: int, basis: str = "orthogonal") -> Tensor:
    """The first ``stop`` columns of a basis of layers ``[out, inner]``: float64 ``[inner, stop]``.

    The same on every machine but for rounding (1e-15), and to the bit on one. A column does not
    depend on how many come after it, but for the same rounding.

    Args:
        out, inner: N and K of the layer; a convolution's K counts its window.
        stop: at most ``inner`` where the basis is orthogonal.
        seed: any whole number.
        basis: "orthogonal", of the Haar measure (QR of a Gaussian matrix with the signs of R's
            diagonal: Mezzadri 2007, arXiv:math-ph/0609050); or "gaussian", of length 1 on average.
    """
    name = f"{seed}/{out}/{inner}".encode()
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(name).digest()[:4], "big")
    )
    draws = [
        torch.randn(inner, generator=generator, dtype=torch.float64, device="cpu")
        for _ in range(stop)
    ]
    drawn = torch.stack(draws, dim=1) if draws else torch.zeros(inner, 0, dtype=torch.float64)
    if basis == "gaussian":
        return drawn * inner**-0.5
    q, r = torch.linalg.qr(drawn)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


class OrthogonalLoRA(LoRA):
    """A LoRA of one concept, whose down factors are frozen and orthogonal to other concepts'.

    Only the up factors are trained; their gradient needs ``B^T x`` and not ``x``, so that no input
    of a layer is kept for it.

    Args:
        network: any module.
        rank: of each layer.
        concept: 0, 1, ...; it has columns ``rank * concept`` to ``rank * (concept + 1)`` of each
            layer's basis, so concepts that are to be merged need one rank.
        seed: of the bases; the same for all concepts that are to be merged.
        basis: "orthogonal" or "gaussian", see :func:`columns`.
        targets, alpha, convolutions, dropout: as :class:`LoRA` has them.

    Raises:
        ValueError: an argument does not fit, or a layer has no columns left for the concept.
    """

    method = "orthogonal"

    def __init__(
        self,
        network: nn.Module,
        rank: int = 20,
        concept: int = 0,
        seed: int = 0,
        basis: str = "orthogonal",
        *,
        targets: Targets = None,
        alpha: float | None = None,
        convolutions: bool = False,
        dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        who = self.method
        if isinstance(concept, bool) or not isinstance(concept, int) or concept < 0:
            raise ValueError(f"{who}: concept is {concept!r}, need a whole number from 0")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"{who}: seed is {seed!r}, need a whole number")
        if basis not in BASES:
            raise ValueError(f"{who}: basis is {basis!r}, need {' or '.join(BASES)}")
        if settings.pop("slots", 1) != 1:
            raise ValueError(f"{who}: slots is not 1, need one concept an adapter")
        self._basis = (concept, seed, basis)
        super().__init__(
            network, rank, targets=targets, alpha=alpha, convolutions=convolutions,
            dropout=dropout, concept=concept, seed=seed, basis=basis, **settings,
        )  # fmt: skip

    def find(
        self, network: nn.Module, targets: Targets, kinds: tuple[type[nn.Module], ...]
    ) -> dict[str, nn.Module]:
        places: dict[str, Any] = super().find(network, targets, kinds)
        concept, _, basis = self._basis
        for name, layer in places.items():
            inner, need = layer.weight[0].numel(), self.settings["rank"] * (concept + 1)
            if basis == "orthogonal" and need > inner:
                raise ValueError(
                    f"{self.method}: layer {name} has {inner} inputs, need rank * (concept + 1) = "
                    f"{need} at most that"
                )
        return places

    def prepare(self) -> None:
        concept, seed, basis = self._basis
        start, stop = self.rank * concept, self.rank * (concept + 1)
        known: dict[tuple[int, int], Tensor] = {}
        for name in self.places:
            pair: Any = self.pairs[key_of(name)]
            shape = pair.up.shape[1], pair.down.shape[2]
            if shape not in known:
                known[shape] = columns(*shape, stop, seed, basis)[:, start:].T.contiguous()
            with torch.no_grad():
                pair.down[0].copy_(known[shape])
            pair.down.requires_grad_(False)

    def _add(self, layer: Any, y: Tensor, x: Tensor, pair: Any) -> Tensor:
        trains = torch.is_grad_enabled() and pair.up.requires_grad
        if not trains or not isinstance(layer, nn.Linear):
            return super()._add(layer, y, x, pair)
        # The product with the frozen factor alone is kept for the gradient of the other.
        low = F.linear(x, pair.down[0].to(y.dtype)) * self.scale.to(y.dtype)
        return y + F.linear(low, pair.up[0].to(y.dtype))


class Concepts(Adapter):
    """Concepts merged by :func:`merge_concepts`: per layer one stacked pair of factors.

    Args:
        network: any module.
        ranks: the sum of ranks of every layer.
    """

    method = "concepts"

    def __init__(self, network: nn.Module, ranks: dict[str, int]) -> None:
        super().__init__(network, ranks=dict(ranks))
        layers = dict(network.named_modules())
        for name in ranks:
            if not isinstance(layers.get(name), nn.Linear | nn.Conv2d):
                raise ValueError(f"{self.method}: {name} is no linear layer or convolution")
        self.places: dict[str, Any] = {name: layers[name] for name in ranks}
        for name, layer in self.places.items():
            out, inner = layer.weight.shape[0], layer.weight[0].numel()
            how = dict(device=layer.weight.device, dtype=torch.float32)
            self.register_buffer(f"up/{key_of(name)}", torch.zeros(out, ranks[name], **how))
            self.register_buffer(f"down/{key_of(name)}", torch.zeros(ranks[name], inner, **how))
        self.attach()

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``(up [N, R], down [R, K])`` of a layer; weights and scales are in the former."""
        return self.get_buffer(f"up/{key_of(name)}"), self.get_buffer(f"down/{key_of(name)}")

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        for name, layer in self.places.items():
            yield layer, self._hook(name)

    def _hook(self, name: str) -> Hook:
        def add(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            up, down = (t.to(y.dtype) for t in self.factors(name))
            x = first(args, kwargs).to(y.dtype)
            if isinstance(layer, nn.Linear):
                return y + F.linear(F.linear(x, down), up)
            low = F.conv2d(
                x, down.unflatten(1, layer.weight.shape[1:]), None, layer.stride, layer.padding,
                layer.dilation, layer.groups,
            )  # fmt: skip
            return y + F.conv2d(low, up[..., None, None])

        return add

    def parts(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        for name in self.places:

            def add(weight: Tensor, name: str = name) -> Tensor:
                up, down = self.factors(name)
                return weight + (up @ down).to(weight.dtype).view(weight.shape)

            yield f"{name}.weight", add


def merge_concepts(
    network: nn.Module,
    concepts: Sequence[OrthogonalLoRA | str | Path],
    weights: Sequence[float] | None = None,
) -> Concepts:
    """Many concepts in the weights at once: one product per layer.

    Args:
        network: that they were trained on; its base must be the same.
        concepts: detached adapters, or files; in any order, which changes no bit.
        weights: of each, on top of its own scale; None: 1.

    Returns:
        What was merged, as one adapter of the network: ``detach()`` gives the base back to the
        bit, ``unmerge()`` keeps it beside the base, ``save()`` writes all concepts.

    Raises:
        ValueError: an argument does not fit, or concepts of orthogonal bases share columns or
            have different seeds; the network is as it was then.
    """
    who = "merge_concepts"
    if not concepts:
        raise ValueError(f"{who}: concepts is empty, need one or more")
    if weights is not None and len(weights) != len(concepts):
        raise ValueError(f"{who}: weights has {len(weights)} entries, need {len(concepts)}")
    found = [_read(who, c, i) for i, c in enumerate(concepts)]
    _apart(who, [facts for facts, _ in found])
    each = [1.0] * len(found) if weights is None else [float(w) for w in weights]
    keys = [json.dumps(facts, sort_keys=True) for facts, _ in found]
    order = sorted(range(len(found)), key=lambda i: (found[i][0]["concept"], keys[i], each[i]))
    stacks: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for i in order:
        for name, (up, down) in found[i][1].items():
            stacks.setdefault(name, []).append((each[i] * up, down))
    made = Concepts(network, {n: sum(d.shape[0] for _, d in s) for n, s in stacks.items()})
    try:
        with torch.no_grad():
            for name, stack in stacks.items():
                up, down = made.factors(name)
                for one, other in stack:
                    if one.shape[0] != up.shape[0] or other.shape[1] != down.shape[1]:
                        raise ValueError(
                            f"{who}: layer {name} has factors {list(one.shape)} and "
                            f"{list(other.shape)}, need {up.shape[0]} rows and {down.shape[1]} "
                            "columns"
                        )
                up.copy_(torch.cat([u.to(up.device) for u, _ in stack], dim=1))
                down.copy_(torch.cat([d.to(down.device) for _, d in stack], dim=0))
        made.merge()
    except ValueError:
        made.detach()
        raise
    return made


Facts = dict[str, Any]


def _read(who: str, one: Any, i: int) -> tuple[Facts, dict[str, tuple[Tensor, Tensor]]]:
    """Settings, and of every layer ``(scale * up [N, r], down [r, K])``."""
    if isinstance(one, OrthogonalLoRA):
        if one.on:
            raise ValueError(f"{who}: concept {i} is attached, need detach() before")
        facts, state = one.settings, one.tensors()
    elif isinstance(one, str | Path):
        head, state = read(one)
        if head["method"] != OrthogonalLoRA.method:
            raise ValueError(f"{one}: its method is {head['method']}, need {OrthogonalLoRA.method}")
        facts = json.loads(head["settings"])
    else:
        raise ValueError(
            f"{who}: concept {i} is a {type(one).__name__}, need an OrthogonalLoRA or a file"
        )
    scale, pairs = state["adapter.scale"].float(), {}
    for n in state:
        if n.endswith(".down"):
            layer = name_of(n.removeprefix("adapter.pairs.").removesuffix(".down"))
            up = state[n.removesuffix("down") + "up"][0].detach().float()
            pairs[layer] = (scale.to(up.device) * up, state[n][0].float())
    return facts, pairs


def _apart(who: str, facts: Sequence[Facts]) -> None:
    """Raises where orthogonality that was asked for is not there."""
    orthogonal = [f for f in facts if f["basis"] == "orthogonal"]
    if len(orthogonal) not in (0, len(facts)):
        raise ValueError(f"{who}: concepts have orthogonal and gaussian bases, need one kind")
    seeds = {f["seed"] for f in orthogonal}
    if len(seeds) > 1:
        raise ValueError(f"{who}: concepts have seeds {sorted(seeds)}, need one")
    taken = sorted((f["rank"] * f["concept"], f["rank"] * (f["concept"] + 1)) for f in orthogonal)
    for (_, stop), (start, _) in zip(taken, taken[1:], strict=False):
        if start < stop:
            raise ValueError(
                f"{who}: two concepts have column {start} of the bases, need one rank and "
                "different numbers of concepts"
            )


def crosstalk(concepts: Sequence[OrthogonalLoRA]) -> dict[str, Tensor]:
    """What of a concept's inputs other concepts see, by layer.

    Args:
        concepts: two or more, attached or not.

    Returns:
        ``[A, A]`` float64 per layer that all of them have: entry (i, j) is ``|B_j^T B_i| / |B_i^T
        B_i|`` (Frobenius): 1 on the diagonal; elsewhere 0 for disjoint orthogonal columns, about
        ``sqrt(rank / K)`` for Gaussian ones.

    Raises:
        ValueError: there are fewer than two, or no layer is in all of them.
    """
    shared: list[str] = []
    if len(concepts) > 1:
        shared = [n for n in concepts[0].places if all(n in c.places for c in concepts)]
    if not shared:
        raise ValueError(
            f"crosstalk: concepts are {len(concepts)} with no layer in common, need two or more"
        )
    out = {}
    for name in shared:
        pairs: list[Any] = [c.pairs[key_of(name)] for c in concepts]
        downs = [p.down[0].double() for p in pairs]
        own = torch.stack([(d @ d.T).norm() for d in downs])
        every = torch.stack([torch.stack([(a @ b.T).norm() for b in downs]) for a in downs])
        out[name] = every / own[:, None]
    return out
