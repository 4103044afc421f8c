r"""Diffusion with forward models (Tewari et al. 2023, arXiv:2306.11719, section 3): diffusion of
observations whose denoiser first finds the signal behind them.

    S_t = network(x_t, t, features(context)),   x0_hat = render(S_t),   x_s = step(x_t, x0_hat)

so that every x0_hat lies in the range of the forward model, and a sample comes with its signal (a
scene, a motion field). The context's features do not depend on time: they are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastdiff.methods.trajectory import running


class Observed(NamedTuple):
    """Observations ``x [B, C, ...]``, and the signal of each as the last call found it: ``x`` is
    ``render(signal)`` where the sampler ends in its x0. Signals are tensors ``[B, ...]``, or
    tuples, lists or dicts of such."""

    x: Tensor
    signal: Any


def forward_model(
    network: Callable[..., Any],
    x: Tensor | Sequence[int],
    render: Callable[[Any, Any], Tensor],
    *,
    context: Any = None,
    encode: Callable[[Any], Any] | None = None,
    target: Any = None,
    null: Any = None,
    scale: float = 1.0,
    callback: Callable[[int, Any], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Observed:
    """Sample observations together with the signals behind them.

    Args:
        network: ``network(x [N, C, ...], t [N], y, features) -> S``; N is B, or 2 B with guidance
            by class.
        x, cache, settings: as for :func:`fastdiff.sample`; the prediction is x0.
        render: ``render(S, target) -> [N, C, ...]``: the forward model. It runs anew in every call,
            whatever caches do within the network.
        context: what is known, ``[B, ...]`` tensors in any nesting of tuples, lists and dicts.
        encode: ``encode(context) -> features``, ``[B, ...]``; called once. None: the context
            itself.
        target: what ``render`` is told (cameras, times): as context.
        null: features that say nothing, for guidance by context.
        scale: of guidance by context: ``null + scale (features - null)`` of the renders; 1: none.
        callback: ``callback(i, S)`` before step i.

    Returns:
        :class:`Observed`; with guidance the signal is the conditional branch's.

    Raises:
        ValueError: an argument does not fit, or ``render`` gives another shape than ``x``'s.
    """
    if settings.setdefault("prediction", "x0") != "x0":
        raise ValueError(f"forward_model: prediction is {settings['prediction']!r}, need 'x0'")
    if scale != 1 and null is None:
        raise ValueError(f"forward_model: scale is {scale!r} and null is None, need null features")
    with running(network, x, cache=cache, **settings) as run:
        features = context if encode is None or context is None else encode(context)
        batch = run.batch
        signal: Any = None

        def observed(x: Tensor, t: Tensor, y: Tensor | None, told: Any) -> tuple[Tensor, Any]:
            copies = x.shape[0] // batch

            def rows(value: Any) -> Any:
                again = isinstance(value, Tensor) and copies > 1
                return torch.cat((value,) * copies) if again else value

            found = network(x, t, y, tree_map(rows, told))
            x0 = render(found, tree_map(rows, target))
            if x0.shape != x.shape:
                raise ValueError(
                    f"forward_model: render gives {list(x0.shape)}, need {list(x.shape)}"
                )
            return x0, tree_map(lambda s: s[-batch:] if isinstance(s, Tensor) else s, found)

        def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            nonlocal signal
            x0, signal = observed(x, t, y, features)
            if scale != 1:
                bare, _ = observed(x, t, y, null)
                x0 = torch.lerp(bare, x0, scale)
            return x0

        run.model = model
        run.start()
        for i in range(len(run)):
            m = run.predict(i)
            if callback is not None:
                callback(i, signal)
            run.step(i, m)
        return Observed(run.x, signal)
