r"""ConPreDiff: training with prediction of every point's context (Yang et al. 2023,
arXiv:2401.02015, section 3.2).

From the feature at every point i a decoder predicts a set of q values, those of the neighbours of i
in the clean image, as a distribution: in no order.

    L = L_diffusion + w_t mean_i W_2^2(H_i, P_i) / C,
    W_2^2(H, P) = min over permutations s of (1/q) sum_j |H_j - P_s(j)|^2

The decoder is not part of sampling. The matching is exact up to q = 12, by dynamic programming over
subsets (Held & Karp 1962; q 2^(q-1) steps, all points at once); above that by entropic transport
(Cuturi 2013, arXiv:1306.0895), with a bound of what it misses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.adapters.tap import Tap, whole

EXACT = 12  # the largest set that assign() matches: 4096 subsets a point
_POINTS = 1 << 24  # numbers of one table of subsets
BORDERS = {"nearest": "replicate", "mirror": "reflect", "wrap": "circular", "zero": "constant"}


def offsets(strides: Sequence[int]) -> list[tuple[int, int]]:
    """(rows, columns) from a point to its neighbours, eight for each stride, in reading order."""
    ring = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    return [(s * i, s * j) for s in strides for i, j in ring]


def neighbours(x: Tensor, places: Sequence[tuple[int, int]], border: str = "nearest") -> Tensor:
    """The values around every point.

    Args:
        x: ``[B, C, H, W]``, any floating dtype.
        places: (rows, columns) from the point, q of them.
        border: outside of x lies the "nearest" pixel, its "mirror" image (without the edge itself;
            needs offsets below H and W), its repetition ("wrap"; needs offsets up to H and W), or
            "zero".

    Returns:
        ``[B, H*W, q, C]``.

    Raises:
        ValueError: an argument does not fit.
    """
    if x.dim() != 4:
        raise ValueError(f"neighbours: x has shape {list(x.shape)}, need [B, C, H, W]")
    if border not in BORDERS:
        raise ValueError(f"neighbours: border is {border!r}, need one of {', '.join(BORDERS)}")
    if not places:
        raise ValueError("neighbours: places is empty, need one or more")
    h, w = x.shape[2:]
    tall, wide = (max(abs(p[i]) for p in places) for i in (0, 1))
    extra = {"mirror": -1, "wrap": 0}.get(border)
    if extra is not None and (tall > h + extra or wide > w + extra):
        raise ValueError(
            f"neighbours: places reach ({tall}, {wide}) far, need at most ({h + extra}, "
            f"{w + extra}) with border {border!r}"
        )
    padded = F.pad(x, (wide, wide, tall, tall), mode=BORDERS[border])
    found = [
        padded[:, :, tall + i : tall + i + h, wide + j : wide + j + w].flatten(2) for i, j in places
    ]
    return torch.stack(found, dim=1).permute(0, 3, 1, 2)


@cache
def _subsets(q: int) -> list[tuple[list[int], list[list[int]], list[list[int]]]]:
    """For k = 1..q: the subsets of k columns, the columns of each, and each without that column."""
    levels = []
    for k in range(1, q + 1):
        chosen = [list(c) for c in itertools.combinations(range(q), k)]
        masks = [sum(1 << j for j in c) for c in chosen]
        rest = [[m ^ (1 << j) for j in c] for m, c in zip(masks, chosen, strict=True)]
        levels.append((masks, chosen, rest))
    return levels


@torch.no_grad()
def assign(cost: Tensor) -> Tensor:
    """The cheapest one-to-one matching, exactly, of many small problems.

    Args:
        cost: ``[..., q, q]`` of row and column, q 1 to 12; no NaN.

    Returns:
        int64 ``[..., q]``: the column of every row. Of equal matchings it is the same one each
        time.

    Raises:
        ValueError: the shape does not fit.
    """
    q = cost.shape[-1] if cost.dim() >= 2 else 0
    if not 1 <= q <= EXACT or cost.shape[-2] != q:
        raise ValueError(
            f"assign: cost has shape {list(cost.shape)}, need [..., q, q], q to {EXACT}"
        )
    flat = cost.reshape(-1, q, q)
    some = max(1, _POINTS >> q)
    found = [_assign(part) for part in flat.split(some)]
    out = torch.cat(found) if found else flat.new_empty(0, q, dtype=torch.int64)
    return out.view(cost.shape[:-1])


def _assign(cost: Tensor) -> Tensor:
    points, q, _ = cost.shape
    if q == 1:
        return cost.new_zeros(points, 1, dtype=torch.int64)
    if q <= 4:
        every = torch.tensor(list(itertools.permutations(range(q))), device=cost.device)
        total = cost[:, 0][:, every[:, 0]]
        for i in range(1, q):
            total = total + cost[:, i][:, every[:, i]]
        return every[total.argmin(1)]
    # best[m]: rows 0..k-1 on the k columns of m; last[m]: the column of row k-1 then.
    by_column = cost.permute(1, 2, 0).contiguous()  # [row, column, points]
    best = cost.new_zeros(1 << q, points)
    last = torch.zeros(1 << q, points, dtype=torch.int8, device=cost.device)
    for k, (masks, chosen, rest) in enumerate(_subsets(q)):
        at = torch.tensor(masks, device=cost.device)
        columns = torch.tensor(chosen, device=cost.device)
        least = best[torch.tensor(rest, device=cost.device)[:, 0]] + by_column[k][columns[:, 0]]
        which = columns[:, :1].to(torch.int8).expand(-1, points)
        for n in range(1, k + 1):
            one = best[torch.tensor([r[n] for r in rest], device=cost.device)]
            one = one + by_column[k][columns[:, n]]
            which = torch.where(one < least, columns[:, n : n + 1].to(torch.int8), which)
            least = torch.minimum(least, one)
        best[at], last[at] = least, which
    out = torch.empty(points, q, dtype=torch.int64, device=cost.device)
    left = torch.full((1, points), (1 << q) - 1, dtype=torch.int64, device=cost.device)
    for k in reversed(range(q)):
        column = last.gather(0, left).long()
        out[:, k] = column[0]
        left = left - (1 << column)
    return out


@torch.no_grad()
def sinkhorn(cost: Tensor, gap: float = 0.01, rounds: int = 1000) -> tuple[Tensor, Tensor]:
    """A transport plan between uniform sets, and how far from the cheapest it may be.

    Args:
        cost: ``[..., q, q]``, not negative, finite.
        gap: wanted, as a share of the mean cost; it ends sooner once all problems have it.
        rounds: at most.

    Returns:
        The plan ``[..., q, q]``, float32 or float64, whose rows and columns each sum to 1/q; and
        ``[...]``, a bound on its cost minus the least (by duality).

    Raises:
        ValueError: an argument does not fit.
    """
    if cost.dim() < 2 or cost.shape[-1] != cost.shape[-2] or not cost.shape[-1]:
        raise ValueError(f"sinkhorn: cost has shape {list(cost.shape)}, need [..., q, q]")
    if not gap > 0:
        raise ValueError(f"sinkhorn: gap is {gap}, need above 0")
    whole("sinkhorn", rounds=rounds)
    q = cost.shape[-1]
    c = cost.reshape(-1, q, q).to(torch.promote_types(cost.dtype, torch.float32))
    size = c.mean((1, 2)).clamp(min=torch.finfo(c.dtype).tiny)
    log_q, f, g = math.log(q), torch.zeros_like(c[:, :, 0]), torch.zeros_like(c[:, 0])
    plans, bounds = torch.full_like(c, 1 / q**2), torch.full_like(size, torch.inf)
    left = torch.arange(len(c), device=c.device)
    for n in range(1, rounds + 1):
        # The temperature falls to half of the gap, which mostly is enough, then lower.
        least = gap / 2 if n <= 200 or q == 1 else gap / (2 * log_q)
        eps = (max(least, 0.5 * 0.9**n) * size)[:, None]
        f = -eps * torch.logsumexp((g[:, None] - c) / eps[..., None] - log_q, 2)
        g = -eps * torch.logsumexp((f[:, :, None] - c) / eps[..., None] - log_q, 1)
        if n % 10 and n != rounds:
            continue
        plan = _feasible(((f[:, :, None] + g[:, None] - c) / eps[..., None] - 2 * log_q).exp())
        price = (c - f[:, :, None]).amin(1)  # the best g of f: their sum is a bound from below
        bound = ((plan * c).sum((1, 2)) - f.mean(1) - price.mean(1)).clamp(min=0)
        better = bound < bounds[left]
        plans[left] = torch.where(better[:, None, None], plan, plans[left])
        bounds[left] = torch.minimum(bound, bounds[left])
        go = bounds[left] > gap * size
        if not bool(go.any()):
            break
        left, c, size, f, g = left[go], c[go], size[go], f[go], g[go]
    return plans.view(cost.shape), bounds.view(cost.shape[:-2])


def _feasible(plan: Tensor) -> Tensor:
    """To sums of 1/q (Altschuler et al. 2017, arXiv:1705.09634, algorithm 2)."""
    q = plan.shape[-1]
    plan = plan * (1 / (q * plan.sum(2, keepdim=True))).clamp(max=1)
    plan = plan * (1 / (q * plan.sum(1, keepdim=True))).clamp(max=1)
    rows, columns = ((1 / q - plan.sum(i)).clamp(min=0) for i in (2, 1))
    left = rows.sum(1).clamp(min=torch.finfo(plan.dtype).tiny)
    return plan + rows[:, :, None] * columns[:, None] / left[:, None, None]


def set_distance(a: Tensor, b: Tensor) -> Tensor:
    """W_2^2 between sets of equal size, in any order of their members.

    Args:
        a, b: ``[..., q, D]``. Up to q = 12 the matching is exact, above it is within 1 % of the
            mean cost (:func:`sinkhorn`). Gradients go through matched pairs, with the matching
            held.

    Returns:
        ``[...]``, float32 or float64.

    Raises:
        ValueError: shapes differ or q is 0.
    """
    if a.shape != b.shape or a.dim() < 2 or not a.shape[-2]:
        raise ValueError(
            f"set_distance: b has shape {list(b.shape)}, need that of a, {list(a.shape)}, "
            "[..., q, D] with q above 0"
        )
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b, q = a.to(wide), b.to(wide), a.shape[-2]
    if q == 1:
        return (a - b).square().sum((-1, -2))
    with torch.no_grad():
        cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    if q <= EXACT:
        index = assign(cost)[..., None].expand(a.shape)
        return (a - b.gather(-2, index)).square().sum((-1, -2)) / q
    plan, _ = sinkhorn(cost)
    pairs = (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)
    return (plan * pairs).sum((-1, -2))


def context_loss(
    predicted: Tensor, real: Tensor, weight: Tensor | None = None, groups: int = 1
) -> Tensor:
    """Mean over samples and points of W_2^2 by channel: the mean square error where q is 1.

    Args:
        predicted: ``[B, N, q, C]``.
        real: as ``predicted``; no gradient goes there.
        weight: ``[B]``, w_t of every sample; None: 1.
        groups: the q values are so many sets of equal size, one after another.

    Raises:
        ValueError: a shape does not fit.
    """
    if predicted.shape != real.shape or predicted.dim() != 4 or not predicted.numel():
        raise ValueError(
            f"context_loss: real has shape {list(real.shape)}, need that of predicted, "
            f"{list(predicted.shape)}, [B, N, q, C]"
        )
    if predicted.shape[2] % groups:
        raise ValueError(
            f"context_loss: groups is {groups}, need a divisor of {predicted.shape[2]}"
        )
    if weight is not None and weight.shape != predicted.shape[:1]:
        raise ValueError(
            f"context_loss: weight has shape {list(weight.shape)}, need [{predicted.shape[0]}]"
        )
    a = predicted.unflatten(2, (groups, -1))
    b = real.detach().unflatten(2, (groups, -1))
    each = set_distance(a, b).mean((1, 2)) / predicted.shape[-1]
    return (each if weight is None else weight.to(each) * each).mean()


class ConPreDiff(Tap):
    """The context decoder of ConPreDiff, on the features of a module.

    The network is trained as ever, beside it::

        context = ConPreDiff(model, "up_blocks.3", features=320, channels=4)
        loss = diffusion_loss(model(x, t, y)) + context.loss(clean)

    Args:
        network: any network.
        block: the number of a block or a module's name, whose output is ``[B, F, H, W]``, or
            ``[B, N, F]`` tokens.
        features: F.
        channels: C of the clean images or latents, whose neighbourhoods are predicted.
        strides: of the neighbourhoods; each is a set of eight.
        hidden: width of the decoder.
        border: see :func:`neighbours`.

    Raises:
        ValueError: an argument does not fit.
    """

    method = "conprediff"
    head: Any

    def __init__(
        self,
        network: nn.Module,
        block: int | str,
        features: int,
        channels: int,
        strides: Sequence[int] = (1, 2),
        *,
        hidden: int = 256,
        border: str = "nearest",
    ) -> None:
        whole(self.method, features=features, channels=channels, hidden=hidden)
        strides = list(strides)
        for stride in strides:
            whole(self.method, strides=stride)
        if not strides or border not in BORDERS:
            raise ValueError(
                f"{self.method}: strides is {strides} and border {border!r}, need a stride or more "
                f"and one of {', '.join(BORDERS)}"
            )
        super().__init__(
            network, block, features=features, channels=channels, strides=strides, hidden=hidden,
            border=border,
        )  # fmt: skip
        self.places, self.groups, self.border = offsets(strides), len(strides), border
        self.channels, self.features = channels, features
        device = next(network.parameters()).device
        self.head = nn.Sequential(
            nn.Linear(features, hidden, device=device), nn.SiLU(),
            nn.Linear(hidden, len(self.places) * channels, device=device),
        )  # fmt: skip
        self.attach()

    def predict(self, h: Tensor) -> Tensor:
        """``[B, F, H, W]`` or ``[B, N, F]`` -> the sets ``[B, N, q, C]``."""
        tokens = h.flatten(2).transpose(1, 2) if h.dim() == 4 else h
        if tokens.dim() != 3 or tokens.shape[-1] != self.features:
            raise ValueError(
                f"{self.method}: the block gives {list(h.shape)}, need [B, F, H, W] or [B, N, F] "
                f"with F {self.features}"
            )
        out: Tensor = self.head(tokens.to(self.head[0].weight.dtype))
        return out.unflatten(-1, (len(self.places), self.channels))

    def loss(self, clean: Tensor, weight: Tensor | None = None) -> Tensor:
        """:func:`context_loss` of the network's last call.

        Args:
            clean: ``[B, C, H, W]``, of which every point has one of the block's.
            weight: ``[B]``, w_t of every sample; None: 1.

        Raises:
            ValueError: a shape does not fit, or there was no call before.
        """
        predicted = self.predict(self.take())
        real: Any = neighbours(clean, self.places, self.border)
        return context_loss(predicted, real, weight, self.groups)
