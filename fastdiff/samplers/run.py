r"""A run of a sampler: its state, its table, and the moves of which every loop is made.

At a level the state is ``x = alpha x0 + sigma eps``. A run has one level for every model call of
its sampler and the clean end; call ``i`` predicts at level ``i``, and its step leads to level
``i + 1``. Loops may visit a level as often as they like: noise is numbered by visits, not levels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdiff.guidance import ClassifierFree
from fastdiff.ops._check import check_range
from fastdiff.ops.fused_step import COLUMNS, Noise, fused_step, philox_normal
from fastdiff.samplers.ddim import DDIM
from fastdiff.samplers.ddpm import DDPM
from fastdiff.samplers.dpmpp import DPMpp2M
from fastdiff.samplers.heun import Euler, Heun
from fastdiff.samplers.lcm import LCM
from fastdiff.samplers.schedule import EDM, VP, Flow, Schedule
from fastdiff.samplers.table import PREDICTIONS, Ready, Sampler, Table, to_eps, to_x0

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
STEP_STREAM, REGION_STREAM, START_STREAM, RENOISE_STREAM = 0, 1, 2, 3


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
    if null is not None and not layout:
        check_range("sample", "classes", classes, 0, null + 1)
    return classes.to(device)


def prediction_of(model: Any, prediction: str | None) -> str:
    prediction = prediction or getattr(model, "prediction", None) or "eps"
    if prediction not in PREDICTIONS:
        raise _need("prediction", prediction, f"one of {', '.join(PREDICTIONS)}")
    return prediction


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
    prediction = prediction_of(model, prediction)
    if schedule is None:
        schedule = getattr(model, "schedule", None) or _DEFAULTS.get(prediction, _DEFAULTS["eps"])
    return _made(_sampler(sampler), schedule, steps, prediction, clip)


_DEFAULTS: dict[str, Schedule] = {"eps": VP(), "flow": Flow(), "edm": EDM()}


@lru_cache(maxsize=64)
def _kept(sampler: Any, schedule: Any, steps: int, prediction: str, clip: float | None) -> Table:
    with torch.inference_mode(False), torch.device("cpu"):  # tables are the host's
        made: Table = sampler.table(schedule, steps, prediction, clip)
        return made


def _made(sampler: Any, schedule: Any, steps: int, prediction: str, clip: float | None) -> Table:
    """The table, the same object for the same arguments: a loop that is captured finds it there."""
    try:
        hash((sampler, schedule))
    except TypeError:
        with torch.device("cpu"):
            own: Table = sampler.table(schedule, steps, prediction, clip)
        return own
    return _kept(sampler, schedule, steps, prediction, clip)


@lru_cache(maxsize=64)
def _on(table: Table, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, times and the numbers of the calls on a device."""
    with torch.inference_mode(False):
        return table.rows.to(device), table.t.to(device), torch.arange(len(table.t), device=device)


def ready(
    model: Any,
    *,
    sampler: str | Sampler = "ddim",
    steps: int = 50,
    clip: float | None = None,
    prediction: str | None = None,
    schedule: Schedule | None = None,
    device: torch.device | str = "cpu",
) -> Ready:
    """A sampler with its table on ``device``, to be given as ``sampler`` to loops that are captured
    whole: they then copy nothing from the host.

    Raises:
        ValueError: as :func:`sample`.
    """
    made = _table(model, sampler, steps, clip, prediction, schedule)
    placed = _on(made, torch.device(device))
    return Ready(made, prediction_of(model, prediction), clip, *placed)


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


class Run:
    """One run of a sampler on a batch: ``settings`` as in :func:`fastdiff.samplers.sample`.

    Attributes:
        x: the state ``[B, C, ...]``.
        table: of the sampler; ``len(run)`` is the number of its calls, levels are 0 to that.
        alpha, sigma: float64 ``[n + 1]`` on the CPU, of every level; the last is the clean end.
        guidance: scale, as it was given.
        y: what the model is told besides the time, ``[B, ...]`` or None.
        seeds, slots: int64 ``[B]``: whose noise is whose. They belong to the place in the batch
            and stay there where samples change places.
        history: entries of a multistep sampler, the newest first.
        draws: how often each stream of noise was drawn from.
        variance: ``[B, C, ...]``, what the last call said of the variance (of the condition, where
            guided), where the sampler takes a learned one.
    """

    def __init__(
        self,
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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prediction: str | None = None,
        schedule: Schedule | None = None,
    ):
        self.model = model
        first = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        self._model_dtype = None if first is None else first.dtype
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
        self.seeds, self.slots = _counters(seed, batch, state.device)
        self.x = state

        if not isinstance(guidance_rescale, int | float) or not 0 <= guidance_rescale <= 1:
            raise _need("guidance_rescale", guidance_rescale, "a number in [0, 1]")
        self.rescale = guidance_rescale
        self.prediction = prediction_of(model, prediction)
        self.table = _table(model, sampler, steps, clip, prediction, schedule)
        self.clip = clip
        self._spread = float(getattr(schedule or getattr(model, "schedule", None), "start", 1.0))
        if not isinstance(x, Tensor):
            self.x = self.drawn()
        self.alpha = torch.tensor((*self.table.alpha, 1.0), dtype=torch.float64, device="cpu")
        self.sigma = torch.tensor((*self.table.sigma, 0.0), dtype=torch.float64, device="cpu")

        self.y = _classes(model, classes, batch, state.device)
        guide = _guidance(guidance, guidance_interval, batch, state.device)
        self.guidance = guidance
        self.guided = [guide.active(t) for t in self.table.times]
        self.null: int | None = getattr(model, "num_classes", None)
        self.weights: Tensor | None = None  # [B, 2] of (unconditional, conditional)
        if any(self.guided):
            if classes is None or self.y is None or self.null is None:
                raise ValueError(
                    f"sample: guidance is {guidance}, which needs classes [B] and "
                    "model.num_classes, the index of the null class"
                )
            self.weights = guide.weights(batch, state.device)
        if isinstance(sampler, Ready):
            self.rows, self.times, self.numbers = sampler.rows, sampler.t, sampler.numbers
            if self.rows.device != state.device:
                raise ValueError(
                    f"sample: sampler is ready on {self.rows.device}, need {state.device}"
                )
        else:
            self.rows, self.times, self.numbers = _on(self.table, state.device)
        self.variance: Tensor | None = None
        self._both: Tensor | None = None
        self._anew: Tensor | None = None
        self.history: list[Tensor] = []
        self.draws: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.times)

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    def drawn(self) -> Tensor:
        """First noise, that of the run's seeds and slots, as wide as the schedule begins."""
        x = self.x
        z = philox_normal(x.shape, self.seeds, self.slots, 0, START_STREAM, dtype=x.dtype)
        return z if self._spread == 1 else z * self._spread

    def start(self) -> None:
        """What comes before the first call (churn at the first level)."""
        if self.table.first is not None:
            drawn = Noise(self.seeds, self.slots, len(self.rows), STEP_STREAM)
            self.x, _ = fused_step(self.x, self.x, self.table.first.to(self.x.device), noise=drawn)

    def predict(
        self,
        i: int,
        x: Tensor | None = None,
        *,
        guided: bool | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """The model at level ``i``: ``[K, B, C, ...]``, K = 2 (unconditional, conditional) where
        the step is guided, else 1.

        Args:
            x: ``[B, C, ...]``, None: the state.
            guided: None: as the run's settings say of this level; False: the condition alone.
            guidance: scale, as it was given.
        y: what the model is told, a row for each of ``x``; None: the run's.
        """
        x = self.x if x is None else x
        own = y is None
        y = self.y if own else y
        batch = x.shape[0]
        inputs = x if self._model_dtype is None else x.to(self._model_dtype)
        t = self.times[i]
        if self.guided[i] if guided is None else guided:
            both = self._both if own else None
            if both is None:
                assert y is not None and self.null is not None
                both = torch.cat((torch.full_like(y, self.null), y))
            if own:
                self._both = both
            out = self.model(torch.cat((inputs, inputs)), t.expand(2 * batch), both)
            self._learn(out[batch:], x)
            return out.view(2, batch, *out.shape[1:])[:, :, : x.shape[1]]
        out = self.model(inputs, t.expand(batch), y)
        self._learn(out, x)
        return out[None, :, : x.shape[1]]

    def _learn(self, out: Tensor, x: Tensor) -> None:
        channels = x.shape[1]
        if not self.table.learned:
            return
        if out.shape[1] != 2 * channels:
            raise ValueError(
                f"sample: sampler has a learned variance and the model gives {out.shape[1]} "
                f"channels, need {2 * channels}: predictions and variances"
            )
        self.variance = out[:, channels:]

    def _spread_noise(self, i: int, noise: Noise) -> Tensor:
        """``exp(log-variance / 2) z``: the variance in [-1, 1] is between the logarithms of the
        smallest and the largest (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15)."""
        assert self.variance is not None
        small, large = self.table.learned[i]
        part = (self.variance.float() + 1) / 2
        half = 0.5 * (part * large + (1 - part) * small)
        return (half.exp() * philox_normal(self.x.shape, *noise)).to(self.x.dtype)

    def known_variance(self, who: str) -> None:
        """For methods that ask for the step's variance ahead.

        Raises:
            ValueError: it is learned.
        """
        if self.table.learned:
            raise ValueError(f"{who}: sampler has a learned variance, need 'small' or 'large'")

    def _without_history(self) -> Tensor:
        """Rows of a multistep sampler that begins anew at any of them: its first-order step, in
        which the entry of the call before is that of this one."""
        if self._anew is None:
            if self.table.multistep is None:
                raise ValueError(
                    "step: this call needs the one before it (Heun's second), and the state has "
                    "been replaced between them; need a jump to the first call of a step"
                )
            c = dict(zip(COLUMNS, self.table.rows.double().unbind(1), strict=True))
            for name in ("x", "0", "m"):
                c[f"c_{name}"] = c[f"c_{name}"] + (c["c_h1"] + c["c_h2"]) * c[f"k_{name}"]
            c["c_h1"], c["c_h2"] = torch.zeros_like(c["c_h1"]), torch.zeros_like(c["c_h2"])
            rows = torch.stack([c[name] for name in COLUMNS], 1).float()
            self._anew = rows.to(self.x.device, non_blocking=True)
        return self._anew

    def predict_rows(self, levels: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The model at a level of its own for every row, without guidance: ``[N, C, ...]``.

        Args:
            levels: int64 ``[N]``, below ``len(self)``, on the device.
            x: ``[N, C, ...]``.
            y: ``[N, ...]``; None where the model takes none.
        """
        inputs = x if self._model_dtype is None else x.to(self._model_dtype)
        return self.model(inputs, self.times[levels], y)[:, : x.shape[1]]

    def combined(self, m: Tensor) -> Tensor:
        """One prediction ``[B, C, ...]`` of the branches ``[K, B, C, ...]`` (before rescale)."""
        if m.shape[0] == 1:
            return m[0]
        assert self.weights is not None
        return torch.einsum("gb...,bg->b...", m.float(), self.weights)

    def x0(self, i: int, m: Tensor, x: Tensor | None = None) -> Tensor:
        """The clean state that a prediction ``[B, C, ...]`` at level ``i`` means, clipped as the
        run says."""
        x = self.x if x is None else x
        a_x, a_m = to_x0(self.prediction, *self._level(i))
        x0 = float(a_x) * x + float(a_m) * m.to(x.dtype)
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def eps(self, i: int, m: Tensor, x: Tensor | None = None) -> Tensor:
        """The noise that a prediction ``[B, C, ...]`` at level ``i`` means."""
        x = self.x if x is None else x
        e_x, e_m = to_eps(self.prediction, *self._level(i))
        return float(e_x) * x + float(e_m) * m.to(x.dtype)

    def shifted(self, i: int, m: Tensor, *, eps: Tensor) -> Tensor:
        """The prediction ``m`` with ``eps`` added to the noise that it means; where the state is
        pure noise (alpha = 0), which no prediction changes, it stays as it is."""
        e_m = float(to_eps(self.prediction, *self._level(i))[1])
        return m if e_m == 0 else m + (eps / e_m).to(m.dtype)

    def step(
        self,
        i: int,
        m: Tensor,
        *,
        x: Tensor | None = None,
        rows: Tensor | None = None,
        noise: bool = True,
        mask: Tensor | None = None,
        ref: Tensor | None = None,
        select: Tensor | None = None,
        stored: Tensor | None = None,
    ) -> Tensor:
        """From level ``i`` to ``i + 1`` with the prediction ``m``, ``[B, C, ...]`` or with its
        branches ``[K, B, C, ...]``; the new state, which :attr:`x` is then too.

        Args:
            x: where to start, None: the state.
            rows: another table than the sampler's, ``[n, R]``.
            noise: draw what the row asks for; False: the mean.
            mask, ref, select, stored: of :func:`fastdiff.ops.fused_step`.
        """
        x, table = self.x if x is None else x, self.table
        reads = table.reads[i]
        if reads > len(self.history):
            rows, reads = self._without_history(), 0
        both = m.dim() > x.dim() and m.shape[0] > 1
        noisy = noise and (table.draws[i] or mask is not None)
        drawn = self.noise(STEP_STREAM) if noisy else None
        h1 = self.history[0] if reads > 0 else None
        h2 = self.history[1] if reads > 1 else None
        if drawn is not None and table.learned and table.draws[i]:
            h2 = self._spread_noise(i, drawn)
        self.x, kept = fused_step(
            x,
            m,
            self.rows if rows is None else rows,
            step=self.numbers[i],
            w=self.weights if both else None,
            rescale=self.rescale if both else 0.0,
            h1=h1,
            h2=h2,
            noise=drawn,
            mask=mask,
            ref=ref,
            select=select,
            stored=stored,
            keep=table.keep[i],
        )
        self.draws[STEP_STREAM] += not noisy  # a visit counts, whether it draws or not
        if table.keep[i]:
            self.history = [kept, *self.history[:1]]
        return self.x

    def mean_rows(self, levels: Tensor, x: Tensor, m: Tensor) -> Tensor:
        """The step without its noise from a level of its own for every row: ``[N, C, ...]``, for
        samplers without history."""
        if any(self.table.reads):
            raise ValueError("mean_rows: the sampler keeps a history, need one of single steps")
        return fused_step(x, m, self.rows, step=levels)[0]

    def back(self, i: int, m: Tensor) -> Tensor:
        """From level ``i + 1`` to the noisier ``i`` along the probability-flow path (DDIM
        inversion): ``alpha x0 + sigma eps`` at level i, with what ``m`` means at level i + 1.

        By convention the model was asked with the time of level i.
        """
        (alpha, sigma), here = self._level(i), self._level(i + 1)
        a_x, a_m = to_x0(self.prediction, *here)
        if self.prediction in ("x0", "edm") and here[1] == 0:
            raise ValueError(
                f"back: prediction is {self.prediction!r}, which means no noise at the clean end; "
                "need 'eps', 'v' or 'flow'"
            )
        e_x, e_m = to_eps(self.prediction, *here)
        both = m.dim() > self.x.dim() and m.shape[0] > 1
        row = {"c_x": alpha * a_x + sigma * e_x, "c_m": alpha * a_m + sigma * e_m}
        self.x, _ = fused_step(
            self.x,
            m,
            self._row(row),
            w=self.weights if both else None,
            rescale=self.rescale if both else 0.0,
        )
        self.history = []
        return self.x

    def _row(self, columns: dict[str, Any]) -> Tensor:
        """A row of these columns, written on the device: no copy from the host."""
        row = torch.zeros(len(COLUMNS), device=self.x.device)
        for name, value in ({"clip": math.inf} | columns).items():
            row[COLUMNS.index(name)].fill_(float(value))
        return row

    def noised(self, x0: Tensor, i: int, stream: int = REGION_STREAM) -> Tensor:
        """``alpha x0 + sigma z``: clean states at level ``i``."""
        alpha, sigma = self._level(i)
        return self._affine(x0, float(alpha), float(sigma), stream)

    def renoise(self, i: int, j: int) -> Tensor:
        """The state from level ``i`` back to the noisier level ``j``; histories begin anew."""
        if i != j:
            self.x = self._affine(self.x, *self.jump(i, j), RENOISE_STREAM)
            self.history = []
        return self.x

    def jump(self, i: int, j: int) -> tuple[float, float]:
        """``(c, s)`` of ``x_j = c x_i + s z`` from level ``i`` to a noisier ``j``."""
        (a, s), (a_j, s_j) = self._level(i), self._level(j)
        scale = a_j / a
        spread = s_j**2 - (scale * s) ** 2
        if spread < -1e-9:
            raise ValueError(f"renoise: level {j} is cleaner than level {i}, need a noisier one")
        return float(scale), float(spread.clamp(min=0).sqrt())

    def _affine(self, x: Tensor, scale: float, spread: float, stream: int) -> Tensor:
        coef = self._row({"c_x": scale, "sigma": spread})
        noise = self.noise(stream) if spread else None
        return fused_step(x, x, coef, noise=noise)[0]

    def _level(self, i: int) -> tuple[Tensor, Tensor]:
        return self.alpha[i], self.sigma[i]

    def noise(self, stream: int) -> Noise:
        """The next draw of a stream: in the plain loop that of step i is number i."""
        number = self.draws[stream]
        self.draws[stream] += 1
        if number < len(self):
            return Noise(self.seeds, self.slots, self.numbers[number], stream)
        return Noise(self.seeds, self.slots, number + 1, stream)  # len(self) is the first state's
