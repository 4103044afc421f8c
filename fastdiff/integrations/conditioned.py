"""Other people's networks with the signature of ours, ``model(x, t, y)``: for the samplers and the
sampling programs, which know a state, a time and the number of a condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastdiff.samplers.schedule import VP, Flow, Schedule
from fastdiff.samplers.table import PREDICTIONS

_NAMES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


def _of_scheduler(scheduler: Any) -> tuple[str, Schedule]:
    """What a scheduler of diffusers says of the network: its prediction and noise levels."""
    config = getattr(scheduler, "config", None)
    if config is None:
        raise ValueError(
            f"Conditioned: scheduler is {type(scheduler).__name__}, need one of diffusers"
        )
    bar = getattr(scheduler, "alphas_cumprod", None)
    if bar is None:
        if config.get("num_train_timesteps") is None or "shift" not in config:
            raise ValueError(
                f"Conditioned: scheduler is {type(scheduler).__name__}, which has neither "
                "alphas_cumprod nor the shift of a flow; need prediction and schedule instead"
            )
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                "Conditioned: scheduler shifts by the size of the picture (use_dynamic_shifting); "
                "need prediction='flow' and schedule=Flow(shift) of that size instead"
            )
        return "flow", Flow(float(config["shift"]))
    kind = config.get("prediction_type", "epsilon")
    if kind not in _NAMES:
        raise ValueError(
            f"Conditioned: scheduler has prediction_type {kind!r}, need {list(_NAMES)}"
        )
    return _NAMES[kind], VP(bar.double())


class Conditioned(nn.Module):
    """A network of diffusers as ``model(x, t, y)``, where ``y [B]`` numbers conditions.

    Args:
        network: called as ``network(x, timestep=t, **condition, return_dict=False)[0]``: the U-Nets
            and transformers of diffusers.
        conditions: tensors ``[P + 1, ...]`` by the names of the network's arguments, a row for each
            condition, the last for none (guidance's). ``"added_cond_kwargs.text_embeds"`` is an
            entry of a dict. Empty: the network takes none.
        scheduler: of the pipeline, for ``prediction`` and ``schedule``.
        prediction, schedule: as for :func:`fastdiff.sample`, instead of ``scheduler``.
        time_scale: what the network is told of the time, over 0..1000 (Flux: 0.001).
        constant: arguments that are the same in every call (``guidance``, ``img_ids``).

    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        network: nn.Module,
        conditions: Mapping[str, Tensor],
        *,
        scheduler: Any = None,
        prediction: str | None = None,
        schedule: Schedule | None = None,
        time_scale: float = 1.0,
        **constant: Any,
    ):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ValueError(f"Conditioned: network is {type(network).__name__}, need an nn.Module")
        if (scheduler is None) == (prediction is None):
            raise ValueError("Conditioned: need exactly one of scheduler and prediction")
        if prediction is None:
            prediction, schedule = _of_scheduler(scheduler)
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"Conditioned: prediction is {prediction!r}, need one of {', '.join(PREDICTIONS)}"
            )
        rows = {
            name: len(t) if isinstance(t, Tensor) and t.dim() else 0
            for name, t in conditions.items()
        }
        if rows and (min(rows.values()) < 1 or len(set(rows.values())) > 1):
            raise ValueError(
                f"Conditioned: conditions have {rows} rows, need as many of each, the last for none"
            )
        self.network, self.prediction = network, prediction
        if schedule is not None:
            self.schedule = schedule
        self.num_classes = next(iter(rows.values())) - 1 if rows else None
        self.time_scale, self.constant = time_scale, constant
        self._names = list(conditions)
        for i, name in enumerate(self._names):
            self.register_buffer(f"condition_{i}", conditions[name].detach(), persistent=False)

    def over(self, network: nn.Module) -> Conditioned:
        """The same conditions for another network."""
        named = {name: getattr(self, f"condition_{i}") for i, name in enumerate(self._names)}
        return Conditioned(
            network, named, prediction=self.prediction, schedule=getattr(self, "schedule", None),
            time_scale=self.time_scale, **self.constant,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """``[B, C, ...]``."""
        told: dict[str, Any] = dict(self.constant)
        for i, name in enumerate(self._names):
            if y is None:
                raise ValueError("Conditioned: y is None, need the numbers of conditions [B]")
            value = getattr(self, f"condition_{i}").index_select(0, y)
            outer, _, inner = name.partition(".")
            if inner:
                told[outer] = {**told.get(outer, {}), inner: value}
            else:
                told[outer] = value
        time = t if self.time_scale == 1 else t * self.time_scale
        out: Any = self.network(x, timestep=time, **told, return_dict=False)
        result: Tensor = out[0]
        return result
