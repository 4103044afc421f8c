r"""Guidance of a latent diffusion model by energies of the decoded image, with the background of a
target (as LDFaceNet does for face swapping, Mehta et al. 2024, arXiv:2408.02078).

    g    = sum_j lam_j(t) grad_{z_t} E_j(D(z0_hat(z_t)))      D: the decoder of the first stage
    eps  = eps + sigma_t g                                  classifier guidance of exp(-E)
    z_s  = M step(z_t) + (1 - M) (alpha_s z_target + sigma_s z)

Outside the mask the result is the target, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastdiff.methods.guide import Energy, Guide, schedule_of, total
from fastdiff.methods.trajectory import Trajectory, running

Scale = float | Sequence[float] | Callable[[int], float]


def background(run: Trajectory, target: Tensor | None, mask: Tensor | None) -> list[Tensor | None]:
    """``[mask, target]`` as the run's step takes them.

    Raises:
        ValueError: one is missing, or does not fit the state.
    """
    if (target is None) != (mask is None):
        raise ValueError("latent_guidance: mask and target go together, and one of them is None")
    if target is None or mask is None:
        return [None, None]
    if target.shape != run.x.shape:
        raise ValueError(
            f"latent_guidance: target is {list(target.shape)}, need {list(run.x.shape)}"
        )
    lead = [(b, c, *run.x.shape[2:]) for b in (run.batch, 1) for c in (run.x.shape[1], 1)]
    if tuple(mask.shape) not in lead:
        raise ValueError(
            f"latent_guidance: mask is {list(mask.shape)}, need [B|1, C|1, ...] of "
            f"{list(run.x.shape)}"
        )
    return [mask.to(run.x), target.to(run.x)]


def latent_guidance(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    energies: Sequence[tuple[Energy, Scale]],
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    target: Tensor | None = None,
    through: str = "model",
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample latents whose images have low energies.

    Args:
        model, x: as for :func:`fastdiff.sample`; the state is a latent ``[B, C, h, w]``.
        energies: pairs of ``energy(image [B, ...]) -> [B]`` and its scale lam: a number, one for
            each call, or a function of the call's number. Calls where all scales are 0 take no
            gradient.
        decode: differentiable decoder ``[B, C, h, w] -> [B, ...]`` (with the latent's own scaling);
            None: energies are of the latent itself.
        mask: ``[B|1, C|1, h, w]`` in [0, 1]: 1 is generated, 0 is the target's; with ``target``.
        target: ``[B, C, h, w]``, the clean latent of the background.
        through: "model": the gradient by ``z_t``; "x0": by the predicted clean latent, through the
            decoder alone.
        callback: ``callback(i, run)`` after every step; the run is not to be changed.
        cache, settings: of :func:`fastdiff.sample`.

    Returns:
        Latents ``[B, C, h, w]``.

    Raises:
        ValueError: an argument does not fit.
    """
    if through not in ("model", "x0"):
        raise ValueError(f"latent_guidance: through is {through!r}, need 'model' or 'x0'")
    if any(len(term) != 2 or not callable(term[0]) for term in energies):
        raise ValueError(f"latent_guidance: energies is {energies!r}, need pairs (energy, scale)")
    with running(model, x, cache=cache, **settings) as run:
        scales = [schedule_of(scale, len(run)) for _, scale in energies]
        own, behind = background(run, target, mask)
        run.start()
        for i in range(len(run)):
            terms = [(e, s[i]) for (e, _), s in zip(energies, scales, strict=True) if s[i] != 0]
            if terms:
                guide = Guide(decoded(total(*terms), decode), through)
                found = guide.gradient(run, i)
                assert found.m is not None
                m = run.shifted(i, found.m, eps=float(run.sigma[i]) * found.g)
            else:
                m = run.predict(i)
            run.step(i, m, mask=own, ref=behind)
            if callback is not None:
                callback(i, run)
        return run.x


def decoded(energy: Energy, decode: Callable[[Tensor], Tensor] | None) -> Energy:
    """``energy(decode(z))``."""
    return energy if decode is None else lambda z: energy(decode(z))
