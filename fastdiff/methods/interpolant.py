r"""Sampling with stochastic interpolants (Albergo, Boffi & Vanden-Eijnden 2023, arXiv:2303.08797):
from one data law to the other and back, along an ODE or with any amount of noise. All have the law
of ``x_t`` at every time.

    forward:  dX = (b + epsilon s) dt + sqrt(2 epsilon) dW        from t = 0 to 1
    backward: dX = (b - epsilon s) dt + sqrt(2 epsilon) dW        from t = 1 to 0

A network gives two fields as its channels, as it was trained: ``(b, s)``, or ``(v, eta)`` with
``eta = E[z | x_t]``, of which

    s = -eta / gamma,    b = v + gamma' eta

At the ends gamma is 0 and eta means no score: with noise the steps keep away from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdiff.accelerate import accelerated, acceleration_of, network_of, request
from fastdiff.engine.request import current
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.samplers.interpolant import Drift, Interpolant
from fastdiff.samplers.schedule import TIME

FIELDS = ("b", "b,s", "v,eta")


class Fields(NamedTuple):
    """``b`` and ``s`` ``[B, C, ...]``; s is None where the network gives b alone."""

    b: Tensor
    s: Tensor | None


class Velocity(nn.Module):
    """A network as the drift of one of the equations.

    Args:
        network: ``network(x [B, C, ...], t [B] in 0..1000, y) -> [B, C or 2 C, ...]``.
        interpolant: that it was trained on.
        fields: what its channels are: "b", "b,s" or "v,eta".
        epsilon: of the noise.
        backward: the drift per unit of time gone back.

    Raises:
        ValueError: ``fields`` is no known one, or noise is asked of a network without a score.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        interpolant: Interpolant | None = None,
        fields: str = "b,s",
        epsilon: float = 0.0,
        backward: bool = False,
    ):
        super().__init__()
        if fields not in FIELDS:
            raise ValueError(f"interpolant: fields is {fields!r}, need one of {FIELDS}")
        if fields == "b" and epsilon:
            raise ValueError(f"interpolant: epsilon is {epsilon} and fields 'b', need a score too")
        self.network, self.interpolant = network, interpolant or Interpolant()
        self.kind, self.epsilon, self.backward = fields, epsilon, backward
        self.num_classes = getattr(network, "num_classes", None)

    def fields(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Fields:
        """Both fields at model times ``t`` ``[B]``."""
        out = self.network(x, t, y)
        first, second = out[:, : x.shape[1]], out[:, x.shape[1] : 2 * x.shape[1]]
        if self.kind == "b":
            return Fields(first, None)
        if second.shape != x.shape:
            raise ValueError(
                f"interpolant: network gives {list(out.shape)}, need {2 * x.shape[1]} channels, "
                f"those of {self.kind}"
            )
        if self.kind == "b,s":
            return Fields(first, second)
        path, shape = self.interpolant, (-1, *[1] * (x.dim() - 1))
        gamma, slope = (f(t / TIME).to(x.dtype).view(shape) for f in (path.noise, path.noise_slope))
        return Fields(first + slope * second, -second / gamma)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        b, s = self.fields(x, t, y)
        if self.backward:
            b = -b
        return b if not self.epsilon or s is None else b + self.epsilon * s


def interpolate(
    network: Callable[..., Tensor],
    x: Tensor,
    *,
    interpolant: Interpolant | None = None,
    fields: str = "b,s",
    backward: bool = False,
    epsilon: float = 0.0,
    steps: int = 50,
    heun: bool | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    callback: Callable[[int, Trajectory], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """States of one law from those of the other.

    Args:
        network, interpolant, fields: of :class:`Velocity`.
        x: ``[B, C, ...]`` of rho_0, or backward of rho_1.
        backward: from t = 1 to 0.
        epsilon: 0: the ODE.
        steps: of equal length.
        heun: second order, two calls a step; None: where epsilon is 0.
        start, stop: times at which the path begins and ends; away from 0 and 1 where the network
            gives eta.
        callback: ``callback(i, run)`` after every call; the run is not to be changed.
        cache, settings: of :func:`fastdiff.sample`: classes, guidance, seed, ...

    Returns:
        ``[B, C, ...]``.

    Raises:
        ValueError: an argument does not fit.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"interpolant: x is {type(x).__name__}, need a tensor of the first law")
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < math.inf:
        raise ValueError(f"interpolant: epsilon is {epsilon!r}, need a number of at least 0")
    path = interpolant or Interpolant()
    drift = Velocity(network, path, fields, epsilon, backward)
    heun = epsilon == 0 if heun is None else heun
    sampler = Drift(backward, epsilon, heun, start, stop)
    if fields == "v,eta" and isinstance(steps, int) and steps > 0:
        asked = sampler.times(steps) if heun else sampler.times(steps)[:-1]
        if bool((path.noise(asked) == 0).any()):
            raise ValueError(
                f"interpolant: start and stop are {start} and {stop}, where gamma is 0 and eta "
                "means no score; need steps within (0, 1)"
            )
    with ExitStack() as stack:
        if cache is not None:
            stack.enter_context(accelerated(network, cache=cache, exact=False))
        run = stack.enter_context(
            running(drift, x, sampler=sampler, steps=steps, prediction="eps", **settings)
        )
        acceleration = acceleration_of(network_of(network))
        if acceleration is not None and current() is None:  # of the network, not of its wrapper
            own = stack.enter_context(request(len(run), calls_per_step=1))
            own.times, own.samples = run.table.t, run.batch
            acceleration.last = own
        for i in range(len(run)):
            run.step(i, run.predict(i))
            if callback is not None:
                callback(i, run)
        return run.x


class Drawn(NamedTuple):
    """A training pair: ``x [B, C, ...]`` at times ``t``; ``velocity`` and ``noise``, whose means
    given x are b and eta; ``slope``, whose mean is v."""

    x: Tensor
    velocity: Tensor
    noise: Tensor
    slope: Tensor


def drawn(interpolant: Interpolant, x0: Tensor, x1: Tensor, t: Tensor, z: Tensor) -> Drawn:
    """The state of a path and what a network learns there.

    Args:
        x0, x1: ``[B, C, ...]`` of the two laws.
        t: ``[B]`` in [0, 1], one for each sample.
        z: ``[B, C, ...]`` standard normal.
    """
    shape = (-1, *[1] * (x0.dim() - 1))

    def wide(value: Tensor) -> Tensor:
        return value.to(x0.dtype).view(shape)

    a, b = (wide(v) for v in interpolant.ends(t))
    da, db = (wide(v) for v in interpolant.slopes(t))
    slope = da * x0 + db * x1
    velocity = slope + wide(interpolant.noise_slope(t)) * z
    return Drawn(a * x0 + b * x1 + wide(interpolant.noise(t)) * z, velocity, z, slope)


def losses(velocity: Velocity, x0: Tensor, x1: Tensor, t: Tensor, z: Tensor, y: Any = None) -> Any:
    """The paper's losses of b and of s (eq. 2.13 and 2.16), as means over elements.

        L_b = E[|b|^2 / 2 - (I' + gamma' z) b],    L_s = E[|s|^2 / 2 + z s / gamma]

    Both are lowest, and their gradients have mean 0, at the true fields. Times at which gamma is 0
    are not to be drawn.
    """
    at = drawn(velocity.interpolant, x0, x1, t, z)
    b, s = velocity.fields(at.x, TIME * t.to(at.x.dtype), y)
    loss_b = (0.5 * b.square() - at.velocity * b).mean()
    if s is None:
        return loss_b, None
    gamma = velocity.interpolant.noise(t).to(z.dtype).view(-1, *[1] * (z.dim() - 1))
    return loss_b, (0.5 * s.square() + z / gamma * s).mean()
