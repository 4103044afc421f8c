r"""Diffusion model of time series with diagonal state spaces (TSDiff: Kollovieh et al. 2023,
arXiv:2307.11494; S4D: Gu et al. 2022, arXiv:2206.11893).

Every channel h is a linear system of N complex states, held over steps of length dt,

    s[n] = exp(dt A) s[n - 1] + B u[n],   y[n] = 2 Re(C s[n]),   B = (exp(dt A) - 1) / A
    k[l] = 2 Re sum_N C B exp(dt A l)                       its answer to an impulse
    y[n] = sum_(m <= n) k_0[n - m] u[m] + sum_(m > n) k_1[m - n - 1] u[m] + D u[n]

computed by FFTs of length 2 L, in which nothing wraps around. A starts as ``-1/2 + i pi n``
(S4D-Lin). The spectrum of the kernels depends on weights and L alone: it is kept over the calls of
a run, until a weight is written (but for writes through ``.data``, which torch does not count) or
gradients of weights are asked for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.models._embed import timestep_embedding


class S4D(nn.Module):
    """Long convolution of every channel by diagonal state spaces.

    Args:
        channels: H.
        states: N of every channel and direction, as pairs of conjugates: 2 N real ones.
        both_ways: a second kernel for what comes later; False: causal.
        low, high: range in which the steps dt start, spaced evenly in their logarithms.

    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        channels: int,
        states: int = 32,
        *,
        both_ways: bool = True,
        low: float = 1e-3,
        high: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("states", states)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"S4D: {name} is {value!r}, need an integer of at least 1")
        if not 0 < low <= high:
            raise ValueError(f"S4D: low and high are {low!r} and {high!r}, need 0 < low <= high")
        self.channels, self.both_ways = channels, both_ways
        ways = 2 if both_ways else 1
        steps = torch.exp(torch.rand(channels) * math.log(high / low) + math.log(low))
        self.log_dt = nn.Parameter(steps.log())
        self.log_decay = nn.Parameter(torch.full((channels, states), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states).repeat(channels, 1).float())
        self.c = nn.Parameter(torch.randn(ways, channels, states, 2) * 0.5**0.5)
        self.d = nn.Parameter(torch.randn(channels))
        self._kept: tuple[Any, Tensor, list[Tensor]] | None = None

    def system(self) -> tuple[Tensor, Tensor]:
        """``exp(dt A) [H, N]`` and ``C B [W, H, N]``, complex; W = 2 for both ways, else 1."""
        a, da = self._rates()
        return da.exp(), torch.view_as_complex(self.c.contiguous()) * (da.exp() - 1) / a

    def _rates(self) -> tuple[Tensor, Tensor]:
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        return a, self.log_dt.exp()[:, None] * a

    def kernels(self, length: int) -> Tensor:
        """``k [W, H, length]``: answers to an impulse."""
        (_, da), (_, cb) = self._rates(), self.system()
        powers = torch.exp(da[..., None] * torch.arange(length, device=da.device))
        k: Tensor = 2 * torch.einsum("whn,hnl->whl", cb, powers).real
        return k

    def spectrum(self, length: int) -> Tensor:
        """``[H, length + 1]`` complex: the transform of both kernels in one of length 2 L, that of
        what comes later reversed at its end."""
        asked = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if asked or any(p.is_inference() for p in self.parameters()):  # those have no version
            return self._spectrum(length)
        # The tensors are kept too, so that no other one takes the address of one that is gone.
        own: list[Tensor] = list(self.parameters())
        key = (length, *((id(p), p.data_ptr(), p._version, p.dtype, p.device) for p in own))
        kept = self._kept
        if kept is None or kept[0] != key:
            # Kept outside of inference mode: a later call may be differentiated.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = (key, self._spectrum(length), own)
        return kept[1]

    def _spectrum(self, length: int) -> Tensor:
        k = self.kernels(length)
        both = F.pad(k[0], (0, length))
        if self.both_ways:
            both = both + F.pad(k[1].flip(-1), (length, 0))
        found: Tensor = torch.fft.rfft(both)
        return found

    def forward(self, u: Tensor) -> Tensor:
        """``[B, H, L]`` -> ``[B, H, L]``, of the dtype of ``u``.

        Raises:
            ValueError: ``u`` is something else.
        """
        if u.dim() != 3 or u.shape[1] != self.channels or not u.shape[2]:
            raise ValueError(f"S4D: u is {list(u.shape)}, need [B, {self.channels}, L]")
        length = u.shape[2]
        wide = u.to(self.d.dtype)
        y = torch.fft.irfft(
            torch.fft.rfft(wide, n=2 * length) * self.spectrum(length), n=2 * length
        )
        out: Tensor = y[..., :length] + self.d[:, None] * wide
        return out.to(u.dtype)


class _Block(nn.Module):
    def __init__(self, channels: int, time: int, states: int, dropout: float) -> None:
        super().__init__()
        self.time = nn.Linear(time, channels)
        self.norm = nn.LayerNorm(channels)
        self.s4 = S4D(channels, states)
        self.mix = nn.Linear(channels, channels)
        self.drop = nn.Dropout(dropout)
        self.on, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, h: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        u = h + self.time(time)[:, None]
        y = self.s4(self.norm(u).transpose(1, 2)).transpose(1, 2)
        u = u + self.drop(self.mix(F.gelu(y)))
        gated = torch.tanh(u) * torch.sigmoid(u)
        return h + self.on(gated), self.out(gated)


class TSDiff(nn.Module):
    """Noise of series ``[B, C, L]``, unconditional.

    Args:
        in_channels: C, e.g. values and their lags.
        hidden: H.
        depth: residual blocks.
        states: of every channel's system.
        dropout: in training.
        prediction: what the network predicts, "eps" or another of ``fastdiff.samplers``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden: int = 64,
        depth: int = 3,
        states: int = 64,
        dropout: float = 0.0,
        prediction: str = "eps",
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(
            in_channels=in_channels, hidden=hidden, depth=depth, states=states, dropout=dropout,
            prediction=prediction,
        )  # fmt: skip
        self.in_channels, self.prediction = in_channels, prediction
        self.wave = 2 * hidden
        self.first = nn.Linear(in_channels, hidden)
        self.time = nn.Sequential(
            nn.Linear(self.wave, self.wave), nn.SiLU(), nn.Linear(self.wave, self.wave), nn.SiLU()
        )
        self.blocks = nn.ModuleList(
            _Block(hidden, self.wave, states, dropout) for _ in range(depth)
        )
        self.last = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, in_channels)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from noisy ``x``.

        Args:
            x: ``[B, C, L]``, any L of at least 1.
            t: ``[B]``, times in 0..1000.
            y: None.

        Returns:
            ``[B, C, L]``, the dtype of ``x``.

        Raises:
            ValueError: an argument does not fit.
        """
        if x.dim() != 3 or x.shape[1] != self.in_channels or not x.shape[2]:
            raise ValueError(f"TSDiff: x is {list(x.shape)}, need [B, {self.in_channels}, L]")
        if y is not None:
            raise ValueError("TSDiff: y is given, need None: this network takes no condition")
        dtype = self.first.weight.dtype
        time = self.time(timestep_embedding(t, self.wave).to(dtype))
        h = F.relu(self.first(x.transpose(1, 2).to(dtype)))
        total = torch.zeros_like(h)
        for block in self.blocks:
            h, skip = block(h, time)
            total = total + skip
        out: Tensor = self.last(total).transpose(1, 2)
        return out.contiguous().to(x.dtype)
