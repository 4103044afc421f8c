r"""DiffEditor (Mou et al. 2024, arXiv:2402.02583): editing by energies of features, a regional SDE
and time travel.

The image is inverted, and its states ``x*_t`` are kept. Then, from the noisiest,

    g   = sum_j M_j k_j grad_{x_t} E_j(F(x_t), F(x*_t))          F: features of decoder blocks
    v   = eta M sigma_{s|t}                                      the regional SDE, else v = 0
    x_s = alpha_s x0_hat(eps + g) + sqrt(sigma_s^2 - v^2) eps + v z

x0 is that of the guided prediction, the direction that of the unguided one. Where time is travelled
each step is followed by its inversion (with the condition alone) and done again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.methods.guide import schedule_of
from fastdiff.methods.taps import Features, blocks_of, features, network_of
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops.fused_step import philox_normal
from fastdiff.samplers.ddim import jump_variance

SDE_STREAM = 9
Compare = Callable[[Features, Features], Tensor]


class Term(NamedTuple):
    """``energy(current, reference) -> [B]`` of features, its scale (a number, one for each call, or
    a function of the call's number) and where it acts: ``[B|1, C|1, ...]``, None: everywhere."""

    energy: Compare
    scale: float | Sequence[float] | Callable[[int], float] = 1.0
    mask: Tensor | None = None


def unlike(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """``1 / (1 + 4 S)`` with the similarity ``S = (1 + cos) / 2`` of features ``[B, C, ...]`` along
    C, averaged over ``where [B|1, 1, ...]``: ``[B]``, 1/5 (alike) to 1 (DragonDiffusion,
    arXiv:2307.02421)."""
    cos = torch.cosine_similarity(a.float(), b.float(), dim=1)[:, None]
    if where is None:
        share = cos.flatten(1).mean(1)
    else:
        weight = where.to(cos).expand_as(cos).flatten(1)
        share = (weight * cos.flatten(1)).sum(1) / weight.sum(1).clamp(min=1e-12)
    return 1 / (1 + 2 * (1 + share))


class Timeline(NamedTuple):
    """Calls of which steps are guided, stochastic within the mask, and travelled."""

    guided: frozenset[int]
    stochastic: frozenset[int]
    travelled: frozenset[int]

    @classmethod
    def of(cls, n: int) -> Timeline:
        """The paper's for 50 steps (guided below 30, only even ones from 10 on; stochastic between
        10 and 20; travelled at even ones between 20 and 30), stretched to ``n``."""

        def place(i: int) -> float:
            return 50 * i / n

        return cls(
            frozenset(i for i in range(n) if place(i) < 30 and (i % 2 == 0 or place(i) < 10)),
            frozenset(i for i in range(n) if 10 < place(i) < 20),
            frozenset(i for i in range(n) if 20 < place(i) < 30 and i % 2 == 0),
        )


def inverted(run: Trajectory) -> list[Tensor]:
    """States ``[B, C, ...]`` of levels 0 to n of the run's clean state, by DDIM inversion with the
    condition alone; the run then stands at level 0."""
    states = [run.x]
    for i in reversed(range(len(run))):
        states.append(run.back(i, run.predict(i, guided=False)))
    return states[::-1]


def gradient(
    run: Trajectory, i: int, terms: Sequence[Term], ref: Tensor, taps: Sequence[str]
) -> Tensor:
    """``sum_j M_j k_j grad_x E_j`` at the run's state and level ``i``, ``[B, C, ...]``; the
    reference ``ref [B, C, ...]`` is of the same level."""
    total = torch.zeros_like(run.x)
    scales = [schedule_of(term.scale, len(run))[i] for term in terms]
    if not any(scales):
        return total
    theirs = features(run, i, taps, ref)
    with torch.enable_grad():
        x = run.x.detach().requires_grad_()
        own = features(run, i, taps, x)
        for term, scale in zip(terms, scales, strict=True):
            value = term.energy(own, theirs)
            if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
                what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"energy gives {what}, need a tensor [{len(x)}]")
            if scale != 0:
                (g,) = torch.autograd.grad(scale * value.sum(), x, retain_graph=True)
                total = total + (g if term.mask is None else term.mask * g)
    return total


def regional_noise(run: Trajectory, i: int, m: Tensor, x: Tensor, mask: Tensor, eta: float) -> None:
    """Adds to the run's state, which a deterministic step made of ``x`` and ``m``, the noise of
    deviation ``v = eta mask sigma_{s|t}``, and takes as much from the direction. Where the mask is
    0 the state stays as it is."""
    sigma = float(run.sigma[i + 1])
    jump = float(jump_variance(run.alpha[i : i + 2], run.sigma[i : i + 2])[0].sqrt())
    v = eta * sigma / float(run.sigma[i]) * jump * mask
    less = torch.where(v == 0, 0.0, (sigma**2 - v**2).clamp(min=0).sqrt() - sigma)
    drawn = philox_normal(run.x.shape, *run.noise(SDE_STREAM), dtype=run.x.dtype)
    changed = run.x + less * run.eps(i, run.combined(m), x) + v * drawn
    run.x = torch.where(v == 0, run.x, changed)


def two_predictions(run: Trajectory, i: int, m: Tensor, x: Tensor, g: Tensor) -> None:
    """Puts the clean state of the guided prediction, ``eps + g`` at ``x``, in the place of the
    unguided one's in the state that a step made of ``x`` and ``m``."""
    plain = run.combined(m)
    away = run.x0(i, run.shifted(i, plain, eps=g), x) - run.x0(i, plain, x)
    run.x = run.x + float(run.alpha[i + 1]) * away


def diffeditor(
    model: Callable[..., Tensor],
    x: Tensor,
    terms: Sequence[Term],
    *,
    taps: Sequence[str],
    mask: Tensor | None = None,
    eta: float = 0.4,
    repeat: int = 3,
    timeline: Timeline | None = None,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Edit images.

    Args:
        model: a network (``nn.Module``) as for :func:`fastdiff.sample`, differentiable.
        x: ``[B, C, ...]``, clean: the image, or its latent.
        terms: energies; the paper's are one of the edited region and one of the rest. None of them:
            reconstruction, that of a plain sampler from the inverted noise.
        taps: blocks whose features the energies compare, e.g. "up_blocks.1".
        mask: ``[B|1, C|1, ...]`` in [0, 1] of the regional SDE; None: no SDE.
        eta: of the SDE where ``mask`` is 1; 0: none.
        repeat: how often travelled steps are done; 1: once.
        timeline: which steps are guided, stochastic and travelled; None: the paper's.
        callback: ``callback(i, run)`` after the last visit of level i; not to change the run.
        cache, settings: of :func:`fastdiff.sample`. The sampler is to be deterministic and without
            history ("ddim"), ``clip`` None and ``guidance_rescale`` 0.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit, or a tapped block is not called.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"diffeditor: x is {x!r}, need a tensor [B, C, ...], the clean image")
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
        raise ValueError(f"diffeditor: repeat is {repeat!r}, need an integer of at least 1")
    if not isinstance(eta, int | float) or not 0 <= eta <= 1 or math.isnan(eta):
        raise ValueError(f"diffeditor: eta is {eta!r}, need a number in [0, 1]")
    if terms:
        blocks_of(network_of(model), taps)
    with running(model, x, cache=cache, **settings) as run:
        _fits(run, settings)
        for name, where in [
            ("mask", mask),
            *((f"mask of term {j}", t.mask) for j, t in enumerate(terms)),
        ]:
            _spans(name, where, run.x)
        own = None if mask is None or eta == 0 else mask.to(run.x)
        terms = [t if t.mask is None else t._replace(mask=t.mask.to(run.x)) for t in terms]
        plan = Timeline.of(len(run)) if timeline is None else timeline
        states = inverted(run)
        for i in range(len(run)):
            visits = repeat if i in plan.travelled else 1
            for visit in range(visits):
                if visit:
                    run.back(i, run.predict(i, guided=False))
                here, m = run.x, run.predict(i)
                g = gradient(run, i, terms, states[i], taps) if i in plan.guided else None
                run.step(i, m)
                if own is not None and i in plan.stochastic:
                    regional_noise(run, i, m, here, own, eta)
                if g is not None and terms:
                    two_predictions(run, i, m, here, g)
            if callback is not None:
                callback(i, run)
        return run.x


def _fits(run: Trajectory, settings: dict[str, Any]) -> None:
    if any(run.table.reads) or any(run.table.draws) or run.table.first is not None:
        raise ValueError(
            f"diffeditor: sampler is {settings.get('sampler')!r}, need a deterministic one of "
            "single steps, as 'ddim'"
        )
    if run.clip is not None or run.rescale:
        raise ValueError(
            f"diffeditor: clip is {run.clip} and guidance_rescale {run.rescale}, need None and 0"
        )


def _spans(name: str, mask: Tensor | None, x: Tensor) -> None:
    lead = [(b, c, *x.shape[2:]) for b in (x.shape[0], 1) for c in (x.shape[1], 1)]
    if mask is not None and tuple(mask.shape) not in lead:
        raise ValueError(
            f"diffeditor: {name} is {list(mask.shape)}, need [B|1, C|1, ...] of {list(x.shape)}"
        )
