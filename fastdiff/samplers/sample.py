"""The sampling loop: a plain loop over the rows of a table; all state is local to the call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.guidance import ClassifierFree
from fastdiff.ops.fused_step import Noise, fused_step, philox_normal
from fastdiff.samplers.ddim import DDIM
from fastdiff.samplers.ddpm import DDPM
from fastdiff.samplers.dpmpp import DPMpp2M
from fastdiff.samplers.heun import Euler, Heun
from fastdiff.samplers.lcm import LCM
from fastdiff.samplers.schedule import EDM, VP, Flow, Schedule
from fastdiff.samplers.table import PREDICTIONS, Sampler, Table

SAMPLERS: dict[str, Sampler] = {
    "ddim": DDIM(),
    "ddpm": DDPM(),
    "dpmpp_2m": DPMpp2M(),
    "dpmpp_2m_sde": DPMpp2M(sde=True),
    "euler": Euler(),
    "flow_euler": Euler(),
    "heun": Heun(),
    "lcm": LCM(),
}
# Philox streams of a run; a step's region noise is its stream + 1.
STEP_STREAM, REGION_STREAM, START_STREAM = 0, 1, 2


def _need(name: str, value: object, need: str) -> ValueError:
    return ValueError(f"sample: {name} is {value!r}, need {need}")


def _sampler(sampler: str | Sampler) -> Sampler:
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise _need("sampler", sampler, f"one of {', '.join(SAMPLERS)}, or a Sampler")
        return SAMPLERS[sampler]
    if not hasattr(sampler, "table"):
        raise _need("sampler", sampler, f"one of {', '.join(SAMPLERS)}, or a Sampler")
    return sampler


def _guidance(
    scale: float | Tensor, interval: tuple[float, float] | None, batch: int, device: torch.device
) -> ClassifierFree:
    if isinstance(scale, Tensor):
        if scale.shape not in ((), (batch,)) or not scale.is_floating_point():
            raise ValueError(
                f"sample: guidance is {scale.dtype} {list(scale.shape)}, "
                f"need floats [] or [{batch}]"
            )
        scale = scale.to(device)
    elif not isinstance(scale, int | float) or not math.isfinite(scale):
        raise _need("guidance", scale, "a finite number or a tensor [B]")
    if interval is not None:
        if len(interval) != 2 or not interval[0] <= interval[1]:
            raise _need(
                "guidance_interval", interval, "(low, high) in model time 0..1000, low <= high"
            )
        interval = (float(interval[0]), float(interval[1]))
    return ClassifierFree(scale, interval)


def _counters(seed: int | Tensor, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Seeds and slots [B]: one integer numbers samples by slot, a tensor gives each its own."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (batch,):
            raise ValueError(
                f"sample: seed is {seed.dtype} {list(seed.shape)}, need torch.int64 [{batch}]"
            )
        return seed.to(device), torch.zeros(batch, dtype=torch.int64, device=device)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise _need("seed", seed, "an integer in [0, 2**63) or an int64 tensor [B]")
    slots = torch.arange(batch, device=device)
    return torch.full((batch,), seed, dtype=torch.int64, device=device), slots


def _like_state(name: str, t: Tensor, x: Tensor) -> Tensor:
    if not isinstance(t, Tensor) or t.shape != x.shape:
        found = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"sample: {name} is {found}, need a tensor {list(x.shape)}")
    return t.to(x)


def _classes(model: Any, classes: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    null, layout = getattr(model, "num_classes", None), getattr(model, "box_size", 0) > 0
    if classes is None:
        shape = (batch, 1, 3) if layout else (batch,)
        return None if null is None else torch.full(shape, null, device=device)
    good = isinstance(classes, Tensor) and classes.dtype == torch.int64
    if good and layout:
        good = classes.dim() == 3 and classes.shape[::2] == (batch, 3)
    elif good:
        good = classes.shape == (batch,)
    if not good:
        found = f"{classes.dtype} {list(classes.shape)}" if isinstance(classes, Tensor) else classes
        need = f"[{batch}, K, 3] of class, top and left" if layout else f"[{batch}]"
        raise ValueError(f"sample: classes is {found}, need torch.int64 {need}")
    return classes.to(device)


def _table(
    model: Any,
    sampler: str | Sampler,
    steps: int,
    clip: float | None,
    prediction: str | None,
    schedule: Schedule | None,
) -> Table:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise _need("steps", steps, "an integer of at least 1")
    if clip is not None and not (isinstance(clip, int | float) and clip > 0):
        raise _need("clip", clip, "a number above 0, or None")
    prediction = prediction or getattr(model, "prediction", None) or "eps"
    if prediction not in PREDICTIONS:
        raise _need("prediction", prediction, f"one of {', '.join(PREDICTIONS)}")
    if schedule is None:
        defaults: dict[str, Schedule] = {"flow": Flow(), "edm": EDM()}
        schedule = getattr(model, "schedule", None) or defaults.get(prediction, VP())
    return _sampler(sampler).table(schedule, steps, prediction, clip)


def model_times(
    model: Any,
    *,
    sampler: str | Sampler = "ddim",
    steps: int = 50,
    clip: float | None = None,
    prediction: str | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """Model times of the evaluations that :func:`sample` will do, ``[N]`` float32 on the CPU.

    Raises:
        ValueError: as :func:`sample`.
    """
    return _table(model, sampler, steps, clip, prediction, schedule).t


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
    first = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    if isinstance(x, Tensor):
        if not x.is_floating_point() or x.dim() < 2:
            raise ValueError(f"sample: x is {x.dtype} {list(x.shape)}, need floats [B, C, ...]")
        device = x.device if device is None else torch.device(device)
        state = x.to(device=device, dtype=dtype or x.dtype)
    else:
        if len(x) < 2 or any(not isinstance(n, int) or n < 0 for n in x):
            raise _need("x", x, "a tensor or a shape [B, C, ...]")
        if device is None:
            device = torch.device("cpu") if first is None else first.device
        device = torch.device(device)
        state = torch.empty(tuple(x), dtype=dtype or torch.float32, device=device)
    batch = state.shape[0]
    seeds, slots = _counters(seed, batch, state.device)
    if not isinstance(x, Tensor):
        state = philox_normal(state.shape, seeds, slots, 0, START_STREAM, dtype=state.dtype)

    if not isinstance(guidance_rescale, int | float) or not 0 <= guidance_rescale <= 1:
        raise _need("guidance_rescale", guidance_rescale, "a number in [0, 1]")
    table = _table(model, sampler, steps, clip, prediction, schedule)

    y = _classes(model, classes, batch, state.device)
    guide = _guidance(guidance, guidance_interval, batch, state.device)
    guided = [guide.active(float(t)) for t in table.t]
    y_both = weights = None
    if any(guided):
        null = getattr(model, "num_classes", None)
        if classes is None or y is None or null is None:
            raise ValueError(
                f"sample: guidance is {guidance}, which needs classes [B] and model.num_classes, "
                "the index of the null class"
            )
        y_both = torch.cat((torch.full_like(y, null), y))
        weights = guide.weights(batch, state.device)
    if (mask is None) != (reference is None):
        raise ValueError("sample: mask and reference go together, and one of them is None")
    if mask is not None and reference is not None:
        reference = _like_state("reference", reference, state)
        lead = [(b, c, *state.shape[2:]) for b in (batch, 1) for c in (state.shape[1], 1)]
        if not isinstance(mask, Tensor) or tuple(mask.shape) not in lead:
            found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"sample: mask is {found}, need [B|1, C|1, ...] of {list(state.shape)}"
            )
        mask = mask.to(device=state.device, dtype=torch.float32)

    rows, times = table.rows.to(state.device), table.t.to(state.device)
    index = torch.arange(len(times), device=state.device)
    if table.first is not None:
        drawn = Noise(seeds, slots, len(rows), STEP_STREAM)
        state, _ = fused_step(state, state, table.first.to(state.device), noise=drawn)
    history: list[Tensor] = []
    for i, with_null in enumerate(guided):
        noisy = table.draws[i] or mask is not None
        model_in = state if first is None else state.to(first.dtype)
        branches = 2 if with_null else 1
        if with_null:
            out = model(torch.cat((model_in, model_in)), times[i].expand(2 * batch), y_both)
        else:
            out = model(model_in, times[i].expand(batch), y)
        m = out.view(branches, batch, *out.shape[1:])[:, :, : state.shape[1]]
        late = None if gaps is None or not table.reads[i] else gaps(state)
        noise = m[0]
        if with_null and (predicted is not None or late is not None):
            assert weights is not None
            noise = torch.einsum("gb...,bg->b...", m.float(), weights)
        if predicted is not None:
            predicted(noise)
        if late is not None and table.multistep is not None:
            history[0] = table.multistep.history(i, state, noise, history[0], late)
        state, kept = fused_step(
            state,
            m,
            rows,
            step=index[i],
            w=weights if with_null else None,
            rescale=guidance_rescale if with_null else 0.0,
            h1=history[0] if table.reads[i] > 0 else None,
            h2=history[1] if table.reads[i] > 1 else None,
            noise=Noise(seeds, slots, index[i], STEP_STREAM) if noisy else None,
            mask=mask,
            ref=reference,
            keep=table.keep[i],
        )
        if table.keep[i]:
            history = [kept, *history[:1]]
        if callback is not None:
            callback(i, float(table.t[i]), state)
    return state
