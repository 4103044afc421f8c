r"""Lotus (He et al. 2024, arXiv:2409.18124): dense prediction (depth, normals) in one step.

    z = encode(image)
    D:  annotation = decode(network(z, t, task))
    G:  annotation = decode(network([z, noise], t, task))        noise enters by its channels alone

at the noisy end, with the network predicting the clean annotation itself. There is no other step,
so nothing may be reused: caches are off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.methods.trajectory import running
from fastdiff.samplers.ddim import DDIM

FORMS = ("D", "G")


def lotus(
    network: Callable[..., Tensor],
    image: Tensor,
    *,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    form: str = "D",
    task: Tensor | None = None,
    noise_first: bool = False,
    seed: int | Tensor = 0,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """The annotation of an image.

    Args:
        network: ``network(z [B, C, h, w], t [B], task) -> [B, C, h, w]``; form "G" gives it
            ``[B, 2 C, h, w]``. ``t`` is the noisiest level of the schedule (999).
        image: ``[B, C, H, W]``.
        encode: image to latent ``[B, C, h, w]``; take the mean of a posterior and not a draw, or
            form "D" is not a function of the image.
        decode: latent to annotation.
        form: "D", deterministic, or "G", with noise.
        task: of the task switcher, ``[B, ...]`` or one for all ``[1, ...]``; None where the network
            takes none.
        noise_first: form "G" joins ``[noise, z]`` and not ``[z, noise]``.
        seed: of the noise: as for :func:`fastdiff.sample`.
        cache: is accepted and has no effect.
        settings: of :func:`fastdiff.sample`: schedule, dtype, device.

    Returns:
        ``decode``'s.

    Raises:
        ValueError: an argument does not fit.
    """
    if form not in FORMS:
        raise ValueError(f"lotus: form is {form!r}, need 'D' or 'G'")
    fixed = [name for name in ("steps", "sampler", "prediction", "guidance") if name in settings]
    if fixed:
        raise ValueError(f"lotus: {fixed[0]} is given, need none: there is one step, to x0")
    with torch.no_grad():
        z = encode(image)
    settings |= {"sampler": DDIM(), "steps": 1, "prediction": "x0", "seed": seed}
    with running(network, z, cache=cache, **settings) as run:
        if task is not None:
            if task.shape[0] not in (1, run.batch):
                raise ValueError(
                    f"lotus: task is {list(task.shape)}, need [{run.batch}, ...] or [1, ...]"
                )
            run.y = task.to(run.x.device).expand(run.batch, *task.shape[1:])
        inputs = run.x
        if form == "G":
            noise = run.drawn()
            inputs = torch.cat((noise, inputs) if noise_first else (inputs, noise), 1)
        m = run.predict(0, inputs, independent="Lotus has one step")
        if m.shape[1:] != run.x.shape:
            raise ValueError(
                f"lotus: network gives {list(m.shape[1:])}, need {list(run.x.shape)}, the latent's"
            )
        return decode(run.step(0, m))
