r"""AnimateLCM (Wang et al. 2024, arXiv:2402.00769): videos from a consistency model in a few steps,
with a guidance weight for every frame.

    m_f  = (1 - w_f) m_f(unconditional) + w_f m_f(conditional)
    f    = c_skip(t) x + c_out(t) x0_hat,   x_s = alpha_s f + sigma_s z        (LCM's step)

Steps are large and noise is fresh in each: in runs of few steps caches are off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.engine.off import FEW
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.ops._check import wide


def frame_weights(weights: Tensor, x: Tensor) -> Tensor:
    """``[B, 1, F, 1, 1]`` float32 of ``weights [F]`` or ``[B, F]`` for ``x [B, C, F, H, W]``.

    Raises:
        ValueError: they have another shape or are no floats.
    """
    shapes = ((x.shape[2],), (x.shape[0], x.shape[2]))
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise ValueError("animate_lcm: weights is no tensor of floats, need [F] or [B, F]")
    if weights.shape not in shapes:
        raise ValueError(
            f"animate_lcm: weights is {list(weights.shape)}, need {list(shapes[0])} or "
            f"{list(shapes[1])}, one for each frame"
        )
    return weights.to(x.device, torch.float32).expand(shapes[1])[:, None, :, None, None]


def animate_lcm(
    model: Callable[..., Tensor],
    x: Tensor | Sequence[int],
    *,
    weights: Tensor | None = None,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """Sample a video.

    Args:
        model, x, cache, settings: as for :func:`fastdiff.sample`; states are ``[B, C, F, H, W]``,
            the sampler is "lcm", steps are 4.
        weights: guidance of every frame, ``[F]`` or ``[B, F]`` (a ramp from 1 to 3, say): the model
            then needs classes. None: the settings' ``guidance``, the same for all frames.
        callback: ``callback(i, run)`` after every step; the run is not to be changed.

    Returns:
        ``[B, C, F, H, W]``.

    Raises:
        ValueError: an argument does not fit.
    """
    settings = {"sampler": "lcm", "steps": 4} | settings
    if weights is not None and "guidance" in settings:
        raise ValueError("animate_lcm: guidance and weights are given, need one of them")
    with running(model, x, cache=cache, **settings) as run:
        if run.x.dim() != 5:
            raise ValueError(f"animate_lcm: x is {list(run.x.shape)}, need [B, C, F, H, W]")
        w = None if weights is None else frame_weights(weights, run.x)
        if w is not None and (settings.get("classes") is None or run.null is None):
            raise ValueError(
                "animate_lcm: weights is given, which needs classes [B] and model.num_classes, the "
                "index of the null class"
            )
        if w is not None and run.rescale:
            raise ValueError(
                f"animate_lcm: guidance_rescale is {run.rescale}, which weights of frames do not "
                "have; need 0"
            )
        off = "a run of few, large steps" if len(run) <= FEW else ""
        run.start()
        for i in range(len(run)):
            if w is None:
                m = run.predict(i, independent=off)
            else:
                bare, told = wide(run.predict(i, guided=True, independent=off))
                m = (1 - w) * bare + w * told
            run.step(i, m)
            if callback is not None:
                callback(i, run)
        return run.x
