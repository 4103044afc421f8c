r"""Diffscaler: one network, and for each task a scale, a shift and a low-rank branch of every layer
(Nair et al. 2024, arXiv:2404.09976, section 3).

    y = (1 + a) * (W x) + b_0 + b + s * W_up relu(W_down x)

W and b_0 are the layer's own; a = b = 0 and W_up = 0 at first. From what the layer gives,
W x + b_0, the first terms are a scale 1 + a and a shift b - a b_0. A convolution's W_down is one of
the same kernel and stride, its W_up a 1 x 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.adapters.base import Hook, Targets, first, key_of, select
from fastdiff.adapters.chosen import Chosen
from fastdiff.adapters.tap import whole


class Affiner(nn.Module):
    """One layer's, of all tasks: ``scale``, ``shift``, ``gain [A, N]``, ``down [A, rank, K]`` and
    ``up [A, N, rank]``."""

    def __init__(self, layer: Any, tasks: int, rank: int) -> None:
        super().__init__()
        out, inner = layer.weight.shape[0], layer.weight[0].numel()
        how = dict(device=layer.weight.device, dtype=torch.float32)
        self.scale = nn.Parameter(torch.zeros(tasks, out, **how))
        self.shift = nn.Parameter(torch.zeros(tasks, out, **how))
        if rank:
            self.gain = nn.Parameter(torch.ones(tasks, out, **how))
            self.down = nn.Parameter(torch.empty(tasks, rank, inner, **how))
            self.up = nn.Parameter(torch.zeros(tasks, out, rank, **how))
            nn.init.uniform_(self.down, -(inner**-0.5), inner**-0.5)


class Diffscaler(Chosen):
    """Affiners of linear layers and convolutions, one for each task; a batch may mix tasks.

    Args:
        network: any module.
        rank: of the branches, 0 to 256; 0: a scale and a shift alone, which can be merged.
        tasks: how many; :meth:`choose` says which sample has which, 0 for none.
        targets: see :func:`fastdiff.adapters.select`; None: every layer.
        convolutions: convolutions count as layers; those with a branch need groups 1 and padding
            with zeros.

    Raises:
        ValueError: an argument does not fit, or ``targets`` fits no layer.
    """

    method = "diffscaler"

    def __init__(
        self,
        network: nn.Module,
        rank: int = 4,
        *,
        tasks: int = 1,
        targets: Targets = None,
        convolutions: bool = True,
    ) -> None:
        whole(self.method, 0, 256, rank=rank)
        whole(self.method, tasks=tasks)
        given = targets if targets is None or isinstance(targets, str) else list(targets)
        super().__init__(
            network, rank=rank, tasks=tasks, targets=given, convolutions=bool(convolutions)
        )
        kinds = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
        self.places: dict[str, Any] = select(self.method, network, targets, kinds)
        for name, m in self.places.items():
            if rank and isinstance(m, nn.Conv2d) and (m.groups != 1 or m.padding_mode != "zeros"):
                raise ValueError(
                    f"{self.method}: layer {name} has groups {m.groups} and padding "
                    f"{m.padding_mode}, need 1 and zeros"
                )
        self.rank, self.slots, self.task = rank, tasks, 0
        self.affiners = nn.ModuleDict(
            {key_of(name): Affiner(m, tasks, rank) for name, m in self.places.items()}
        )
        self.register_buffer("ids", None, persistent=False)
        self.attach()

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        for name, layer in self.places.items():
            yield layer, self._hook(self.affiners[key_of(name)])

    def _hook(self, own: Any) -> Hook:
        def change(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = first(args, kwargs)
            if isinstance(layer, nn.Linear) and x.dim() == 1:
                return self._change(layer, own, x[None], y[None])[0]
            return self._change(layer, own, x, y)

        return change

    def _change(self, layer: Any, own: Any, x: Tensor, y: Tensor) -> Tensor:
        conv = isinstance(layer, nn.Conv2d)
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        scale, shift, ids = own.scale.to(wide), own.shift.to(wide), self._ids(x.shape[0])
        if layer.bias is not None:
            shift = shift - scale * layer.bias.to(wide)
        scale = 1 + scale
        if ids is None:
            scale, shift = scale[0], shift[0]
        else:  # row 0 is the base
            scale = torch.cat([torch.ones_like(scale[:1]), scale])
            shift = torch.cat([torch.zeros_like(shift[:1]), shift])
        out = ops.scale_shift(y, scale, shift, dim=1 if conv else -1, index=ids)
        if not self.rank:
            return out
        x = x.to(y.dtype)
        return out + (self._of_image if conv else self._of_rows)(layer, own, x, ids)

    def _of_rows(self, layer: Any, own: Any, x: Tensor, ids: Tensor | None) -> Tensor:
        """The branch of a linear layer, ``x [B, ..., K]``."""
        down, up = own.down.to(x.dtype), own.up.to(x.dtype)
        if ids is None:
            low = F.relu(F.linear(x, down[0]))
            return own.gain[0].to(x.dtype) * F.linear(low, up[0])
        at = (ids - 1).clamp(min=0)
        gain = torch.where(ids[:, None] > 0, own.gain[at], 0.0).to(x.dtype)[:, None]
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        low = F.relu(rows @ down[at].mT)
        return (gain * (low @ up[at].mT)).view(*x.shape[:-1], -1)

    def _of_image(self, layer: Any, own: Any, x: Tensor, ids: Tensor | None) -> Tensor:
        """The branch of a convolution, ``x [B, C, H, W]``."""
        down, up = own.down.to(x.dtype), own.up.to(x.dtype)
        how = (layer.stride, layer.padding, layer.dilation)
        low = F.conv2d(x, down.flatten(0, 1).unflatten(1, (-1, *layer.kernel_size)), None, *how)
        b, height, width = x.shape[0], *low.shape[2:]
        low = F.relu(low).reshape(b, self.slots, self.rank, height * width)
        if ids is None:
            gain, low, up = own.gain[0].to(x.dtype)[:, None], low[:, 0], up[0]
        else:
            at = (ids - 1).clamp(min=0)
            gain = torch.where(ids[:, None] > 0, own.gain[at], 0.0).to(x.dtype)[:, :, None]
            low, up = low[torch.arange(b, device=x.device), at], up[at]
        return (gain * (up @ low)).view(b, -1, height, width)

    def merge(self, task: int = 0) -> None:
        """As :meth:`Adapter.merge`, one task, counted from 0; only where ``rank`` is 0."""
        whole(self.method, 0, self.slots - 1, task=task)
        if not self.merged:  # else the next line refuses
            self.task = task
        super().merge()

    def parts(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        if self.rank:
            raise ValueError(
                f"{self.method}: rank is {self.rank}, whose relu is no change of weights, need "
                "rank 0 to merge"
            )
        self.comes_first(self.places.values())
        for name, layer in self.places.items():
            own: Any = self.affiners[key_of(name)]
            scale = 1 + own.scale[self.task].detach()
            shift = own.shift[self.task].detach().clone()
            if layer.bias is None and shift.any():
                raise ValueError(
                    f"{self.method}: layer {name} has no bias, which its shift would be merged into"
                )

            def times(weight: Tensor, scale: Tensor = scale) -> Tensor:
                return weight * scale.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))

            def plus(bias: Tensor, shift: Tensor = shift) -> Tensor:
                return bias + shift.to(bias.dtype)

            yield f"{name}.weight", times
            if layer.bias is not None:
                yield f"{name}.bias", plus
