r"""Steered Diffusion (Nair et al. 2023, arXiv:2310.00224): sampling with energies of the predicted
clean state, each level visited several times.

    for each level t, N times:
        E   = sum_j w_j E_j(x0_hat(x_t))
        x_s = step(x_t) - k_t grad E
        x_t = (alpha_t / alpha_s) x_s + s z        but after the last visit

``E_j`` is usually a loss ``L(h(x0), y)`` of a model ``h`` of the inverse direction (a segmenter, a
recogniser) or of a known degradation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastdiff.methods.guide import Energy, Guide, schedule_of, total
from fastdiff.methods.trajectory import Trajectory, running

Energies = Energy | Sequence[tuple[Energy, float]]


def combined_energy(energies: Energies, name: str) -> Energy:
    """One energy of a single one or of pairs ``(energy, weight)``; ``name`` is for errors."""
    if callable(energies):
        return energies
    terms = list(energies)
    if not terms or any(len(term) != 2 or not callable(term[0]) for term in terms):
        raise ValueError(f"{name}: energies is {energies!r}, need an energy or (energy, weight)s")
    return total(*terms)


def steered(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    energies: Energies,
    *,
    loops: int = 1,
    scale: float | Sequence[float] | Callable[[int], float] = 1.0,
    through: str = "model",
    norm: str | None = None,
    scope: str = "sample",
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample towards low energies.

    Args:
        model, x: as for :func:`fastdiff.sample`.
        energies: ``energy(x0 [B, C, ...]) -> [B]``, or a list of ``(energy, weight)``.
        loops: N, visits of each level; 1 is guidance without renoising.
        scale: k, of the gradient: a number, one for each call, or a function of the call's number.
            0: no gradient is taken; with ``loops`` 1 that is plain sampling.
        through: "model": the gradient by ``x_t``; "x0": by the predicted clean state.
        norm: None, or "l2": gradients of length 1.
        scope: of the norm, "sample" or "batch".
        callback: ``callback(i, run)`` after the last visit of level i; not to change the run.
        cache, settings: of :func:`fastdiff.sample`; None of the sampler: "ddpm". With more than
            one loop the sampler may keep no history.

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit.
    """
    if isinstance(loops, bool) or not isinstance(loops, int) or loops < 1:
        raise ValueError(f"steered: loops is {loops!r}, need an integer of at least 1")
    if through not in ("model", "x0"):
        raise ValueError(f"steered: through is {through!r}, need 'model' or 'x0'")
    guide = Guide(combined_energy(energies, "steered"), through, norm, scope)
    settings.setdefault("sampler", "ddpm")
    with running(model, x, cache=cache, **settings) as run:
        scales = schedule_of(scale, len(run))
        if loops > 1 and any(run.table.reads):
            raise ValueError(
                f"steered: sampler is {settings['sampler']!r} and loops is {loops}, need a sampler "
                "of single steps, or loops 1"
            )
        run.start()
        for i in range(len(run)):
            for visit in range(loops):
                if visit:
                    run.renoise(i + 1, i)
                if scales[i] == 0:
                    run.step(i, run.predict(i))
                    continue
                found = guide.gradient(run, i)
                assert found.m is not None
                run.x = run.step(i, found.m) - scales[i] * found.g
            if callback is not None:
                callback(i, run)
        return run.x
