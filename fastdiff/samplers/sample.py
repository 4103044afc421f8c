"""The sampling loop: a plain loop over the rows of a table; all state is local to the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdiff.samplers.run import Run
from fastdiff.samplers.schedule import Schedule
from fastdiff.samplers.table import Sampler


def _like_state(name: str, t: Tensor, x: Tensor) -> Tensor:
    if not isinstance(t, Tensor) or t.shape != x.shape:
        found = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"sample: {name} is {found}, need a tensor {list(x.shape)}")
    return t.to(x)


def _mask(mask: Tensor, x: Tensor) -> Tensor:
    lead = [(b, c, *x.shape[2:]) for b in (x.shape[0], 1) for c in (x.shape[1], 1)]
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in lead:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"sample: mask is {found}, need [B|1, C|1, ...] of {list(x.shape)}")
    return mask.to(device=x.device, dtype=torch.float32)


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    *,
    sampler: str | Sampler = "ddim",
    steps: int = 50,
    classes: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    seed: int | Tensor = 0,
    clip: float | None = None,
    mask: Tensor | None = None,
    reference: Tensor | None = None,
    callback: Callable[[int, float, Tensor], None] | None = None,
    predicted: Callable[[Tensor], None] | None = None,
    gaps: Callable[[Tensor], Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    prediction: str | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """Sample from a diffusion or flow model.

    Args:
        model: ``model(x [B, C, ...], t [B] float32, y [B] int64 or None) -> [B, C or 2C, ...]``;
            of 2C channels (learned variance) the first C are used. ``t`` is in 0..1000 for every
            kind of model: the training timestep, or 1000 times the time of a flow (1000 is noise).
            ``model.num_classes`` is the index of the null class.
        x: the state at the first level (noise), or its shape: then noise is drawn from ``seed``.
        sampler: a name of ``SAMPLERS``, or a sampler object.
        steps: noise levels to visit, at least 1; "heun" calls the model twice at all but the first.
        classes: int64 ``[B]``; None: the null class, or no class where the model has none. Of a
            model with ``box_size`` a layout ``[B, K, 3]``: class, top and left of every box.
        guidance: classifier-free guidance scale g, or one a sample ``[B]``; 1 runs no
            unconditional branch. The model is called once with 2B rows, unconditional first.
        guidance_rescale: phi of arXiv:2305.08891; 0 is off.
        guidance_interval: ``(low, high)`` in model time; outside it the model runs B rows,
            unguided.
        seed: one integer (sample b draws from slot b), or int64 ``[B]``: a sample then gives the
            same result in any batch, as far as the model itself does.
        clip: x0 predictions are clipped to ``[-clip, clip]``; None: not at all.
        mask: ``[B|1, C|1, ...]``: 1 is generated, 0 is taken from ``reference`` at its noise level.
        reference: ``[B, C, ...]``, clean; with ``mask``.
        callback: ``callback(i, t, x)`` after model call i at model time t, with the new state.
        predicted: told the model's prediction ``[B, C, ...]`` before every step, with both branches
            of guidance in one (before ``guidance_rescale``).
        gaps: ``gaps(x)`` after a model call: int64 ``[B, 1, ...]`` that broadcasts to x, how many
            calls ago the prediction of each element was made before this one; None: 1 for all.
            Multistep samplers continue it from there.
        dtype: of the state; None: that of ``x``, or float32. The model gets its own dtype.
        device: of the state; None: that of ``x``, or of the model.
        prediction: "eps", "v", "x0", "flow" (velocity ``eps - x0``) or "edm" (Karras's F, with its
            own model time ln(sigma) / 4); None: ``model.prediction``, else "eps".
        schedule: noise schedule; None: ``model.schedule``, else ``Flow()`` for "flow", ``EDM()``
            for "edm" and ``VP()`` for the rest.

    Returns:
        ``[B, C, ...]``: the sample, in the dtype of the state.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and the need.
    """
    if (mask is None) != (reference is None):
        raise ValueError("sample: mask and reference go together, and one of them is None")
    run = Run(
        model, x, sampler=sampler, steps=steps, classes=classes, guidance=guidance,
        guidance_rescale=guidance_rescale, guidance_interval=guidance_interval, seed=seed,
        clip=clip, dtype=dtype, device=device, prediction=prediction, schedule=schedule,
    )  # fmt: skip
    if mask is not None and reference is not None:
        reference = _like_state("reference", reference, run.x)
        mask = _mask(mask, run.x)
    run.start()
    table = run.table
    for i in range(len(run)):
        m = run.predict(i)
        late = None if gaps is None or not table.reads[i] else gaps(run.x)
        if predicted is not None or late is not None:
            noise = run.combined(m)
            if predicted is not None:
                predicted(noise)
            if late is not None and table.multistep is not None:
                run.history[0] = table.multistep.history(i, run.x, noise, run.history[0], late)
        run.step(i, m, mask=mask, ref=reference)
        if callback is not None:
            callback(i, table.times[i], run.x)
    return run.x
