r"""SaRA: the smallest weights of a network are trained, as sparse matrices (Hu et al. 2024,
arXiv:2409.06633).

    M = {w : |w| < theta},    L = L_task + lambda ||W * M||_*

The forward pass uses the whole weight; the backward pass gives gradients at M alone and never forms
those of the rest (:func:`fastdiff.ops.sparse_grad_tap`), and the optimiser keeps two moments of M
alone. Half-way, what has grown past theta leaves M and stays as it is (section 3.3).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.adapters.base import (
    Adapter,
    Hook,
    Targets,
    first,
    key_of,
    select,
    site,
)
from fastdiff.ops import SparseIndex

KINDS = (nn.Linear, nn.Conv2d)
RANKED = 64  # the nuclear norm is of matrices with more rows and columns than that


def threshold_of(weights: Sequence[Tensor], ratio: float) -> float:
    """The least theta for which the share ``ratio`` of all entries is below it in size, as exactly
    as ties allow; inf for 1, 0 for 0. No copy of the weights is made."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"sara: ratio is {ratio!r}, need 0 to 1")
    want = round(ratio * sum(w.numel() for w in weights))
    if want >= sum(w.numel() for w in weights):
        return math.inf
    # Of floats that are not negative, bits and values are in the same order.
    low, high = 0, 0x7F800000
    while low < high:
        middle = (low + high + 1) // 2
        theta = _float(middle)
        if sum(int((w.detach().abs() < theta).sum()) for w in weights) <= want:
            low = middle
        else:
            high = middle - 1
    return _float(low)


def _float(bits: int) -> float:
    found: float = struct.unpack("f", struct.pack("I", bits))[0]
    return found


def polar(matrix: Tensor, steps: int | None = None) -> Tensor:
    """``U V^T`` of the singular value decomposition: the gradient of the nuclear norm.

    Args:
        matrix: ``[M, N]``, float32 or float64.
        steps: None: by the decomposition, singular values up to 1e-6 of the largest count as 0;
            else so many of Newton and Schulz's, X <- 1.5 X - 0.5 X X^T X: what has a singular value
            of at least ``1.5^-steps`` times the Frobenius norm is right to 1e-3 or better, the rest
            too small.
    """
    if steps is None:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return (u * (s > 1e-6 * s[:1])) @ v
    x = matrix / matrix.norm().clamp(min=1e-30)
    for _ in range(steps):
        x = 1.5 * x - 0.5 * (x @ x.T @ x if x.shape[0] <= x.shape[1] else x @ (x.T @ x))
    return x


class Entries(nn.Module):
    """The trained entries of one weight.

    Attributes:
        index: where they are now.
        values: of shape ``index.values_shape``; float32 (float64 for a float64 weight).
        whole: where the trained entries of the file are: ``index``, and what has left it.
    """

    def __init__(self, weight: Tensor, index: SparseIndex) -> None:
        super().__init__()
        self.index = self.whole = index
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.values = nn.Parameter(index.take(weight.detach()).to(dtype))
        self.kept: Tensor | None = None  # values at `whole`, once some have left
        self.base = index.take(weight.detach())  # and what was there before, in the weight's dtype
        self._found: tuple[Tensor, Tensor | None] | None = None

    @property
    def positions(self) -> tuple[Tensor, Tensor | None]:
        """int32 (int64 in a weight of 2^31 entries) ``[nnz]``: where the values are in the flat
        weight, ascending; and which value each is, None where they are in that order (blocks are
        not)."""
        if self._found is None:
            small = math.prod(self.index.shape) < 2**31
            at, order = self.index.linear.flatten().sort()
            single = self.index.block[0] == 1
            self._found = at.to(torch.int32 if small else torch.int64), None if single else order
        return self._found

    def now(self) -> Tensor:
        """The values at ``whole``."""
        if self.kept is None:
            return self.values.detach()
        at = torch.searchsorted(self.whole.linear, self.index.linear)
        return self.kept.index_copy(0, at, self.values.detach())

    def become(self, values: Tensor) -> None:
        """Take values at ``whole``, in place."""
        if self.kept is None:
            self.values.copy_(values)
            return
        self.kept.copy_(values)
        at = torch.searchsorted(self.whole.linear, self.index.linear)
        self.values.copy_(self.kept[at])

    def keep(self, mask: Tensor) -> None:
        """Only the entries where ``mask``, bool ``[nnz]``, is true are trained on."""
        self.kept = self.now().clone()
        self.index = SparseIndex.of_positions(self.index.linear[mask], self.index.shape)
        self.values = nn.Parameter(self.values.detach()[mask].clone())
        self._found = None


class SaRA(Adapter):
    """The entries of linear layers and convolutions below a size, trained in the network.

    Args:
        network: any module.
        threshold: theta; or
        ratio: the share of all entries of ``targets`` that are trained, 0 to 1.
        targets: see :func:`fastdiff.adapters.select`; None: every linear layer and convolution
            (of one group, padded with zeros).
        index: positions of your own in the place of the smallest, by layer:
            ``{name: SparseIndex}``, of entries, blocks or rows. Such a file holds positions too.
        checksum: of the positions, which a file gives: on another base network they differ.

    Attributes:
        places: the layers, by name.

    Raises:
        ValueError: not one of ``threshold``, ``ratio`` and ``index`` is given, one does not fit,
            or the base network is not that of ``checksum``; the network is as it was then.
    """

    method = "sara"

    def __init__(
        self,
        network: nn.Module,
        *,
        threshold: float | None = None,
        ratio: float | None = None,
        targets: Targets = None,
        index: dict[str, SparseIndex] | None = None,
        checksum: int | None = None,
    ) -> None:
        given = [n for n in (threshold, ratio, index) if n is not None]
        if len(given) != 1:
            raise ValueError(
                f"sara: threshold is {threshold!r}, ratio {ratio!r} and index "
                f"{'given' if index else None!r}, need one of them"
            )
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"sara: threshold is {threshold!r}, need 0 or more")
        names = targets if targets is None or isinstance(targets, str) else list(targets)
        super().__init__(network, targets=names)
        self.places: dict[str, Any] = self._layers(network, targets, index)
        if index is None:
            weights = [m.weight for m in self.places.values()]
            theta = threshold_of(weights, ratio) if ratio is not None else float(threshold or 0)
            self.threshold: float | None = theta
            # JSON has no infinity.
            self.settings["threshold"] = theta if math.isfinite(theta) else 3.5e38
            index = {
                n: SparseIndex.of_mask(m.weight.detach().abs() < theta)
                for n, m in self.places.items()
            }
        else:
            self.threshold = None
        found = _checksum(index)
        if checksum is not None and checksum != found:
            raise ValueError(
                f"sara: positions have checksum {found}, the file's {checksum}; need the base "
                "network that it was trained on, in the same dtype"
            )
        if self.threshold is not None:
            self.settings["checksum"] = found
        self.entries = nn.ModuleDict(
            {key_of(n): Entries(m.weight, index[n]) for n, m in self.places.items()}
        )
        self.attach()

    @staticmethod
    def _layers(
        network: nn.Module, targets: Targets, index: dict[str, SparseIndex] | None
    ) -> dict[str, Any]:
        every: dict[str, Any] = dict(select("sara", network, targets, KINDS))
        good = {
            n: m
            for n, m in every.items()
            if isinstance(m, nn.Linear) or (m.groups == 1 and m.padding_mode == "zeros")
        }
        if index is None:
            return good
        for name, where in index.items():
            if name not in good:
                raise ValueError(f"sara: index has layer {name}, which is none of the network's")
            if not isinstance(where, SparseIndex) or where.shape != good[name].weight.shape:
                raise ValueError(
                    f"sara: index of {name} is for "
                    f"{getattr(where, 'shape', where)!r}, need a SparseIndex of "
                    f"{tuple(good[name].weight.shape)}"
                )
        return {n: good[n] for n in index}

    def of(self, name: str) -> Entries:
        """What is trained of the layer ``name``."""
        found = self.entries[key_of(name)]
        assert isinstance(found, Entries)
        return found

    @property
    def count(self) -> int:
        """Entries that are trained."""
        return sum(self.of(n).index.count for n in self.places)

    # ---- training ----

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        for name, layer in self.places.items():
            if self.of(name).index.count:
                yield layer, self._hook(self.of(name))

    def _hook(self, entries: Entries) -> Hook:
        def tap(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            how: dict[str, Any] = {}
            if isinstance(layer, nn.Conv2d):
                how = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
            if not torch.is_grad_enabled():
                return y
            return ops.sparse_grad_tap(y, first(args, kwargs), entries.values, entries.index, **how)

        return tap

    def nuclear(
        self, generator: torch.Generator | None = None, steps: int | None = 12
    ) -> tuple[str, Tensor] | None:
        """The gradient of the nuclear norm of one layer's sparse matrix, drawn at random among
        those with more than 64 rows and columns: its name, and ``(U V^T) * M`` in the shape of its
        values. None where there is none. ``steps``: see :func:`polar`."""
        names = [
            n
            for n in self.places
            if min(self.of(n).index.sizes) > RANKED
            and len(self.of(n).index.shape) == 2
            and self.of(n).index.count
        ]
        if not names:
            return None
        name = names[int(torch.randint(len(names), (1,), generator=generator))]
        entries = self.of(name)
        matrix = entries.values.new_zeros(entries.index.shape)
        entries.index.put_(matrix, entries.values.detach())
        return name, entries.index.take(polar(matrix, steps))

    @torch.no_grad()
    def reselect(self) -> int:
        """What has grown to theta or past it is not trained on, and stays. Gives how many are left.

        Raises:
            ValueError: positions were given, so there is no theta.
        """
        if self.threshold is None:
            raise ValueError("sara: positions were given, need a threshold to select by")
        for name in self.places:
            entries = self.of(name)
            entries.keep(entries.values.abs() < self.threshold)
        if self.on:
            self._hear()
        self._turns += 1
        return self.count

    # ---- in the network ----

    def parts(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """None: what is trained is in the weights. Merged, gradients are not asked for."""
        yield from ()

    def attach(self) -> Adapter:
        site(self.network).claim(self, [f"{n}.weight" for n in self.places])
        return super().attach()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, layer in self.places.items():
            entries = self.of(name)
            entries.whole.put_(layer.weight, entries.base if self.on else entries.now())

    @torch.no_grad()
    def write(self) -> None:
        """The values into the network's weights, after they have been changed from outside."""
        for name, layer in self.places.items():
            self.of(name).index.put_(layer.weight, self.of(name).values)

    # ---- files: values alone, as the base network tells where they are ----

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for n in self.places:
            entries = self.of(n)
            if self.threshold is None:
                at, order = entries.positions
                values = entries.now().flatten()
                found[f"position.{n}"] = at
                found[f"values.{n}"] = values if order is None else values[order]
            elif entries.whole.count:
                found[f"values.{n}"] = entries.now()
        return found

    def fill(self, tensors: dict[str, Tensor]) -> None:
        if self.threshold is None:
            for n in self.places:
                if not torch.equal(tensors[f"position.{n}"].cpu(), self.of(n).positions[0].cpu()):
                    raise ValueError(f"sara: positions of {n} are others than the file's")
        with torch.no_grad():
            for n, layer in self.places.items():
                entries = self.of(n)
                if not entries.whole.count:
                    continue
                values = tensors[f"values.{n}"].to(entries.values)
                order = entries.positions[1] if self.threshold is None else None
                if order is not None:
                    values = torch.empty_like(values).index_copy_(0, order, values)
                entries.become(values.view(entries.whole.values_shape))
                if self.on:
                    entries.whole.put_(layer.weight, entries.now())

    @classmethod
    def of_file(
        cls, network: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> SaRA:
        """As a file says: positions come from the base network, or are in it."""
        if "threshold" in settings:
            return cls(network, **settings)
        layers = dict(network.named_modules())
        index = {}
        for key, at in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "position":
                layer: Any = layers.get(name)
                if layer is None or not isinstance(layer, KINDS):
                    raise ValueError(f"layer {name} is no linear layer or convolution")
                index[name] = SparseIndex.of_positions(at.long(), layer.weight.shape)
        return cls(network, index=index, targets=settings["targets"])


def _checksum(index: dict[str, SparseIndex]) -> int:
    found = 0
    for name in sorted(index):
        for part in (index[name].crow, index[name].col):
            found = zlib.crc32(part.cpu().numpy().tobytes(), zlib.crc32(name.encode(), found))
    return found


class SparseAdamW(torch.optim.Optimizer):
    """AdamW on the packed entries of a :class:`SaRA`, which writes them into the network's weights.

    With every entry trained it does to the bit what ``torch.optim.AdamW`` does to the weights.

    Args:
        sara: attached.
        lr: None: the paper's, ``1e-3 exp(-350 theta)`` (1e-3 with positions of your own).
        betas, eps, weight_decay: of AdamW; only trained entries decay.
        reselect_at: the number of the step, from 1, at which what has grown leaves (section 3.3):
            that step updates nothing, and the moments begin anew. None: never.
        rank_weight: lambda of the nuclear norm; 0: none.
        rank_every: steps from one matrix to the next.
        seed: of the choice of matrices.
    """

    def __init__(
        self,
        sara: SaRA,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        reselect_at: int | None = None,
        rank_weight: float = 0.0,
        rank_every: int = 1,
        seed: int = 0,
    ) -> None:
        theta = sara.threshold
        if lr is None:
            lr = 1e-3 * math.exp(-350 * theta) if theta is not None and theta < 1 else 1e-3
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"SparseAdamW: {name} is {value!r}, need 0 or more")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"SparseAdamW: betas is {betas!r}, need two of 0 to below 1")
        if rank_every < 1:
            raise ValueError(f"SparseAdamW: rank_every is {rank_every!r}, need 1 or more")
        self.sara, self.reselect_at = sara, reselect_at
        self.rank_weight, self.rank_every = rank_weight, rank_every
        self.steps = 0
        self._generator = torch.Generator().manual_seed(seed)
        values = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        super().__init__(self._values(), values)

    def _values(self) -> list[nn.Parameter]:
        found = [self.sara.of(n).values for n in self.sara.places]
        return [v for v in found if v.numel()] or found[:1]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all entries that have a gradient, and their values into the weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        if self.steps == self.reselect_at:
            self.sara.reselect()
            self.state.clear()
            self.param_groups[0]["params"] = self._values()
            return loss
        if self.rank_weight and self.steps % self.rank_every == 0:
            found = self.sara.nuclear(self._generator)
            if found is not None:
                values = self.sara.of(found[0]).values
                if values.grad is not None:
                    values.grad.add_(found[1].view_as(values.grad), alpha=self.rank_weight)
        group = self.param_groups[0]
        for name, layer in self.sara.places.items():
            entries = self.sara.of(name)
            values = entries.values
            if values.grad is None or not values.numel():
                continue
            state = self.state[values]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(values)
                state["exp_avg_sq"] = torch.zeros_like(values)
            state["step"] += 1
            beta1, beta2 = group["betas"]
            at, order = entries.positions
            flat, grad = values.detach().view(-1), values.grad.reshape(-1)
            packed = flat if order is None else flat[order]
            ops.sparse_adamw_(
                packed,
                grad if order is None else grad[order],
                state["exp_avg"].view(-1),  # in the order of positions
                state["exp_avg_sq"].view(-1),
                layer.weight,
                at,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=state["step"],
            )
            if order is not None:
                flat.index_copy_(0, order, packed)
        return loss
