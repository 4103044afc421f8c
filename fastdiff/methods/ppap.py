r"""Guidance by experts, one classifier for each range of noise levels (PPAP: Go et al. 2023,
arXiv:2212.05973).

    n(t):  t in [edge_n, edge_(n+1))                 N ranges of equal size
    g   =  d log p_n(y | x_t) / d x_t                p_n: the classifier of the range of t
    DDPM:  mean <- mean + s Sigma g                  Sigma: variance of the step
    DDIM:  eps  <- eps - s sigma_t g

The experts are modules of their own, or one classifier with a low-rank adapter for each range:
then rows of a batch may have levels of their own, and the choice stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.adapters.chosen import Chosen
from fastdiff.experts.by_noise import noise_bins, uniform_edges
from fastdiff.methods.guide import schedule_of
from fastdiff.methods.trajectory import running
from fastdiff.ops.fused_step import COLUMNS

Classifier = Callable[[Tensor, Tensor], Tensor]
ON = ("mean", "eps")


class AdapterExperts(nn.Module):
    """One classifier whose adapters are the experts: ``forward(x, t) -> logits [B, K]``.

    Args:
        classifier: ``classifier(x [B, C, ...], t [B]) -> [B, K]``, with the adapter attached.
        adapter: one with slots (:class:`fastdiff.adapters.LoRA`), slot n for range n. Whom it
            serves is set by every call; its choice is afterwards that of the last call.
        edges: ascending, one more than slots; None: equal ranges of 0 to 1000.

    Raises:
        ValueError: the edges do not fit.
    """

    def __init__(
        self, classifier: nn.Module, adapter: Chosen, edges: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.classifier, self.adapter = classifier, adapter
        found = _edges(edges, adapter.slots)
        where = next(classifier.parameters()).device
        self.register_buffer("edges", torch.tensor(found, device=where), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.adapter.choose(noise_bins(t.contiguous(), self.get_buffer("edges")) + 1)
        logits: Tensor = self.classifier(x, t)
        return logits


def _edges(edges: Sequence[float] | None, count: int) -> list[float]:
    found = uniform_edges(count) if edges is None else [float(e) for e in edges]
    if len(found) != count + 1 or any(b <= a for a, b in zip(found, found[1:], strict=False)):
        raise ValueError(f"ppap: edges is {edges!r}, need {count + 1} ascending numbers")
    return found


def log_likelihood(classifier: Classifier, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """``log p(y | x_t)``, ``[B]``.

    Args:
        classifier: gives logits ``[B, K]``.
        x: ``[B, C, ...]``.
        t: ``[B]``, model times.
        y: int64 ``[B]``, classes.

    Raises:
        ValueError: the classifier gives something else.
    """
    logits = classifier(x, t)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"ppap: a classifier gives {what}, need logits [{x.shape[0]}, K]")
    return logits.log_softmax(1).gather(1, y[:, None])[:, 0]


def likelihood_gradient(classifier: Classifier, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """``d log p(y | x_t) / d x_t``, ``[B, C, ...]``; arguments of :func:`log_likelihood`."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(log_likelihood(classifier, x, t, y).sum(), x)
    return g


def ppap(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    experts: Sequence[Classifier] | Classifier,
    y: Tensor,
    *,
    scale: float | Sequence[float] | Callable[[int], float] = 1.0,
    edges: Sequence[float] | None = None,
    on: str | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample of the classes ``y`` with the guidance of experts for noise levels.

    Args:
        model, x, cache, settings: as for :func:`fastdiff.sample`.
        experts: N classifiers ``(x [B, C, ...], t [B]) -> logits [B, K]``, the first for the lowest
            levels; or one that chooses by ``t`` itself, :class:`AdapterExperts`.
        y: int64 ``[B]``, the classes to guide to.
        scale: s, for all calls or one for each; 0 is plain sampling.
        edges: N + 1 ascending model times of the ranges ``[edge_n, edge_(n+1))``, of a sequence of
            experts; None: equal ranges of 0 to 1000.
        on: "mean" or "eps"; None: "mean" where the sampler draws noise, else "eps".

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit.
    """
    if on not in (None, *ON):
        raise ValueError(f"ppap: on is {on!r}, need one of {', '.join(ON)}, or None")
    several = isinstance(experts, Sequence)
    if isinstance(experts, Sequence):
        if not experts:
            raise ValueError("ppap: experts is empty, need at least one classifier")
        found = torch.tensor(_edges(edges, len(experts)))
    elif edges is not None:
        raise ValueError(f"ppap: edges is {edges!r} with one classifier, need a list of experts")
    with running(model, x, cache=cache, **settings) as run:
        if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != (run.batch,):
            what = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else repr(y)
            raise ValueError(f"ppap: y is {what}, need torch.int64 [{run.batch}]")
        y = y.to(run.x.device)
        n, draws = len(run), any(run.table.draws)
        scales = schedule_of(scale, n)
        if on == "mean" and not draws:
            raise ValueError("ppap: on is 'mean' and the sampler draws no noise, need 'eps'")
        on = on or ("mean" if draws else "eps")
        run.known_variance("ppap")
        variance = [row[COLUMNS.index("sigma")] ** 2 for row in run.table.host]
        # All rows of a run have one level, which the host knows: one expert is called.
        who = noise_bins(torch.tensor(run.table.times), found).tolist() if several else [0] * n
        run.start()
        for i in range(n):
            amount = scales[i] * float(variance[i] if on == "mean" else run.sigma[i])
            g = None
            if amount:
                classifier: Any = experts[who[i]] if isinstance(experts, Sequence) else experts
                g = likelihood_gradient(classifier, run.x, run.times[i].expand(run.batch), y)
            m = run.predict(i)
            if g is None:
                run.step(i, m)
            elif on == "eps":
                run.step(i, run.shifted(i, m, eps=-amount * g))
            else:
                run.x = run.step(i, m) + amount * g
        return run.x
