"""A run whose samples may change places and whose levels may be visited in any order, with caches.

A sampling program is a short function that opens a trajectory and moves it. The level of a call,
not the number of calls, is the step that caches and other policies see; whatever replaces the state
(noise, a paste, a jump) says so, and what was kept of the state before is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdiff.accelerate import accelerated, acceleration_of, network_of, request
from fastdiff.engine.request import Request, current
from fastdiff.samplers.run import Run
from fastdiff.tokens import RegionAdaptive


class Trajectory(Run):
    """A :class:`fastdiff.samplers.Run` within a request.

    Attributes:
        request: of the run; None where the model is not accelerated.
        carried: whatever else belongs to the samples, ``[B, ...]`` each: log-weights, rewards.
        visits: levels of the model calls so far.
        watched: a policy follows the run's predictions.
    """

    def __init__(self, model: Callable[..., Tensor], x: Tensor | Sequence[int], **settings: Any):
        super().__init__(model, x, **settings)
        self.request: Request | None = None
        self.carried: dict[str, Tensor] = {}
        self.visits: list[int] = []
        self.watched = False

    def predict(
        self,
        i: int,
        x: Tensor | None = None,
        *,
        guided: bool | None = None,
        y: Tensor | None = None,
        independent: str = "",
        again: bool = False,
    ) -> Tensor:
        """As :meth:`fastdiff.samplers.Run.predict`.

        Args:
            independent: why this call has nothing to do with those around it: caches are off in it.
            again: it is one more call of the same visit (another model, another condition).
        """
        self.visits.append(i)
        own = self.request
        if own is None:
            return super().predict(i, x, guided=guided, y=y)
        if not again:
            own.at(i)
        with own.without(independent) if independent else nullcontext():
            m = super().predict(i, x, guided=guided, y=y)
        if self.watched:
            own.prediction = self.combined(m)
        return m

    def predict_rows(self, levels: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        """As :meth:`fastdiff.samplers.Run.predict_rows`; caches are off: rows have levels of their
        own."""
        if self.request is None:
            return super().predict_rows(levels, x, y)
        with self.request.without("rows of several levels share a call"):
            return super().predict_rows(levels, x, y)

    def permute(self, index: Tensor) -> None:
        """Sample ``b`` becomes what sample ``index[b]`` was, with all that is kept of it; whose
        noise is whose stays.

        Args:
            index: int64 ``[B]`` on the device.
        """
        batch = self.batch
        self.x = self.x[index]
        self.history = [h[index] for h in self.history]
        self.carried = {name: value[index] for name, value in self.carried.items()}
        if self.y is not None:
            self.y, self._both = self.y[index], None
        if self.weights is not None:
            self.weights = self.weights[index]
        if self.variance is not None:
            self.variance = self.variance[index]
        if self.request is not None:
            self.request.permute(index, batch)

    def fork(self, k: int) -> None:
        """Every sample ``k`` times, next to each other, each copy with noise of its own: copy j of
        sample b draws from slot ``k slot[b] + j``. What caches keep is dropped."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"fork: k is {k!r}, need an integer of at least 1")
        if k == 1:
            return

        def copies(t: Tensor) -> Tensor:
            return t.repeat_interleave(k, 0)

        self.x, self.history = copies(self.x), [copies(h) for h in self.history]
        self.carried = {name: copies(value) for name, value in self.carried.items()}
        number = torch.arange(k, device=self.slots.device).repeat(self.slots.shape[0])
        self.seeds, self.slots = copies(self.seeds), copies(self.slots) * k + number
        if self.y is not None:
            self.y, self._both = copies(self.y), None
        if self.weights is not None:
            self.weights = copies(self.weights)
        self.dirty()
        if self.request is not None:
            self.request.samples = self.batch

    def back(self, i: int, m: Tensor) -> Tensor:
        """As :meth:`fastdiff.samplers.Run.back`. Caches go on: neighbouring levels are alike in
        either direction."""
        return super().back(i, m)

    def paste(self, mask: Tensor, ref: Tensor, history: str = "reset") -> Tensor:
        """The state where ``mask`` is 1, ``ref`` where it is 0 (bit for bit), and in between.

        Args:
            mask: ``[B|1, C|1, ...]`` in [0, 1].
            ref: ``[B, C, ...]`` at the state's level.
            history: of multistep samplers: "reset", or "keep" what was before the paste.
        """
        if history not in ("reset", "keep"):
            raise ValueError(f"paste: history is {history!r}, need 'reset' or 'keep'")
        soft = torch.lerp(ref, self.x, mask.to(self.x.dtype))
        self.x = torch.where(mask == 1, self.x, torch.where(mask == 0, ref, soft))
        if history == "reset":
            self.history = []
        self.dirty()
        return self.x

    def dirty(self) -> None:
        """The state was replaced: what caches keep of the one before does not count."""
        if self.request is not None:
            self.request.mark_dirty()

    def renoise(self, i: int, j: int) -> Tensor:
        x = super().renoise(i, j)
        if i != j:
            self.dirty()
        return x

    def replace(self, x: Tensor) -> Tensor:
        """Go on from another state ``[B, C, ...]``; multistep samplers and caches begin anew."""
        self.x, self.history = x, []
        self.dirty()
        return x


@contextmanager
def running(
    model: Callable[..., Tensor], x: Tensor | Sequence[int], *, cache: Any = None, **settings: Any
) -> Iterator[Trajectory]:
    """A trajectory, within a request where ``model`` is accelerated or ``cache`` is given.

    Args:
        model, x, cache: as for :func:`fastdiff.sample`.
        settings: of :class:`fastdiff.samplers.Run`.

    Raises:
        ValueError: an argument does not fit, or ``cache`` does not run on this model.
    """
    run = Trajectory(model, x, **settings)
    network = network_of(model)
    with torch.no_grad(), ExitStack() as stack:
        if cache is not None:
            stack.enter_context(accelerated(model, cache=cache, exact=False))
        acceleration = acceleration_of(network)
        if acceleration is not None:
            run.request = current() or stack.enter_context(request(len(run), calls_per_step=None))
            run.request.times = run.table.t
            run.request.samples = run.batch
            acceleration.last = run.request
            run.watched = any(isinstance(p, RegionAdaptive) for p in acceleration.policies)
        yield run
