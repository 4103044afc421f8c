r"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv:2106.09685, section 4.1), several at a time.

    y = W x + b + s_a up_a (down_a x)       s_a = alpha / rank, a: the adapter of the sample

down_a is ``[rank, K]``, up_a ``[N, rank]`` and starts at 0. A convolution's down is one of the same
kernel and stride onto ``rank`` channels, its up a 1 x 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.adapters.base import Hook, Targets, first, key_of, name_of, read, select
from fastdiff.adapters.chosen import Chosen

# Names of other people's files: what stands before a layer's name, and after it.
_BEFORE = re.compile(r"^(base_model\.model\.|unet\.|transformer\.|diffusion_model\.)+")
_AFTER = re.compile(r"\.(?:lora_A|lora\.down|lora_down)(?:\.default)?\.weight$")
_PEFT = "adapter_model.safetensors"
_UPS = {"lora_A": "lora_B", "lora.down": "lora.up", "lora_down": "lora_up"}


class Pair(nn.Module):
    """The two factors of one layer: ``down [A, rank, K]`` and ``up [A, N, rank]``."""

    def __init__(self, layer: Any, slots: int, rank: int) -> None:
        super().__init__()
        out, inner = layer.weight.shape[0], layer.weight[0].numel()
        how = dict(device=layer.weight.device, dtype=torch.float32)
        self.down = nn.Parameter(torch.empty(slots, rank, inner, **how))
        self.up = nn.Parameter(torch.zeros(slots, out, rank, **how))
        if rank:
            nn.init.uniform_(self.down, -(inner**-0.5), inner**-0.5)

    def delta(self, slot: int) -> Tensor:
        """``[N, K]`` in float32: ``up down`` of one adapter, without its scale."""
        return self.up[slot].detach().float() @ self.down[slot].detach().float()


class LoRA(Chosen):
    """Low-rank adapters of linear layers and convolutions.

    Args:
        network: any module.
        rank: of each, 0 to 256; 0 changes nothing.
        targets: see :func:`fastdiff.adapters.select`; None: every linear layer.
        alpha: each adapter starts with the scale ``alpha / rank``; None: 1.
        slots: how many adapters, for batches in which samples have one each.
        convolutions: ``targets`` may be convolutions too (groups 1).
        dropout: of what is added, in training.

    Attributes:
        scale: float32 ``[slots]``, of each; in place changes need no new capture.
        places: the layers, by name.

    Raises:
        ValueError: an argument does not fit, or ``targets`` fits no layer.
    """

    method = "lora"
    scale: Tensor

    def __init__(
        self,
        network: nn.Module,
        rank: int = 16,
        *,
        targets: Targets = None,
        alpha: float | None = None,
        slots: int = 1,
        convolutions: bool = False,
        dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        who = self.method
        for name, value, low, high in (("rank", rank, 0, 256), ("slots", slots, 1, 1 << 16)):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{who}: {name} is {value!r}, need a whole number {low} to {high}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{who}: dropout is {dropout}, need 0 to below 1")
        given = targets if targets is None or isinstance(targets, str) else list(targets)
        super().__init__(
            network,
            **{**dict(rank=rank, targets=given, alpha=alpha, slots=slots), **settings},
            convolutions=convolutions,
            dropout=dropout,
        )
        kinds = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
        self.places: dict[str, Any] = self.find(network, targets, kinds)
        for name, m in self.places.items():
            if isinstance(m, nn.Conv2d) and (m.groups != 1 or m.padding_mode != "zeros"):
                raise ValueError(
                    f"{who}: layer {name} has groups {m.groups} and padding {m.padding_mode}, "
                    "need 1 and zeros"
                )
        self.rank, self.slots, self.dropout = rank, slots, dropout
        self.pairs = nn.ModuleDict(
            {key_of(name): Pair(m, slots, rank) for name, m in self.places.items()}
        )
        weight: Any = next(iter(self.places.values())).weight
        start = 1.0 if alpha is None else alpha / max(rank, 1)
        self.register_buffer("scale", torch.full((slots,), start, device=weight.device))
        self.register_buffer("ids", None, persistent=False)
        self.slot = 0
        self.prepare()
        self.attach()

    # ---- what a kind of LoRA says ----

    def find(
        self, network: nn.Module, targets: Targets, kinds: tuple[type[nn.Module], ...]
    ) -> dict[str, nn.Module]:
        """Its layers, by name."""
        return select(self.method, network, targets, kinds)

    def prepare(self) -> None:
        """Once its factors are there, before it is attached."""

    # ---- what the layers do ----

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        for name, layer in self.places.items() if self.rank else ():
            yield layer, self._hook(self.pairs[key_of(name)])

    def _hook(self, pair: Any) -> Hook:
        def add(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            if not self.rank:
                return y
            x = first(args, kwargs)
            if x.dtype != y.dtype:  # autocast
                x = x.to(y.dtype)
            if self.dropout and self.training:
                none = torch.zeros_like(y)
                return y + F.dropout(self._add(layer, none, x, pair), self.dropout)
            return self._add(layer, y, x, pair)

        return add

    def _add(self, layer: Any, y: Tensor, x: Tensor, pair: Any) -> Tensor:
        down, up = pair.down.to(y.dtype), pair.up.to(y.dtype)
        ids = self._ids(x.shape[0])
        if isinstance(layer, nn.Linear):
            flat = x.dim() == 1
            out = ops.lora_add(
                y[None] if flat else y, x[None] if flat else x, down, up, self.scale, ids
            )
            return out[0] if flat else out
        kernel = layer.weight.shape[2:]
        how = (layer.stride, layer.padding, layer.dilation)
        low = F.conv2d(x, down.flatten(0, 1).unflatten(1, (-1, *kernel)), None, *how)
        b, height, width = y.shape[0], *y.shape[2:]
        low = low.view(b, self.slots, self.rank, height * width)
        if ids is None:
            scale, mine = self.scale.to(y.dtype), up[0]
            low = low[:, 0]
        else:
            at = (ids - 1).clamp(min=0)
            scale = torch.where(ids > 0, self.scale[at], 0.0).to(y.dtype)[:, None, None]
            low, mine = low[torch.arange(b, device=y.device), at], up[at]
        return y + (scale * (mine @ low)).view(b, -1, height, width)

    # ---- in the weights ----

    def merge(self, slot: int = 0) -> None:
        """As :meth:`Adapter.merge`, the adapter of one slot with its scale of now."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"{self.method}: slot is {slot!r}, need 0 to {self.slots - 1}")
        if not self.merged:  # else the next line refuses
            self.slot = slot
        super().merge()

    def parts(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        scale = float(self.scale[self.slot])  # once, as the weights are written
        for name in self.places:
            pair: Any = self.pairs[key_of(name)]

            def add(weight: Tensor, pair: Any = pair) -> Tensor:
                return weight + (scale * pair.delta(self.slot).to(weight.dtype)).view(weight.shape)

            if self.rank:
                yield f"{name}.weight", add

    # ---- files, ours and those of PEFT and diffusers ----

    def put(
        self, slot: int, source: str | Path | dict[str, Tensor], alpha: float | None = None
    ) -> None:
        """Copy an adapter into a slot, in place: captured programs go on.

        Args:
            slot: 0 to ``slots - 1``.
            source: a file of ours with one slot, or of PEFT or diffusers (or its tensors), whose
                rank is at most ours; layers that it has not get 0.
            alpha: of the latter: its scale is ``alpha / rank``; None: what the file's metadata say,
                or the ``adapter_config.json`` beside PEFT's ``adapter_model.safetensors``; else
                the scale is 1.

        Raises:
            ValueError: the file is not readable, has layers that this adapter has not, or other
                shapes; nothing has changed then.
        """
        if not 0 <= slot < self.slots:
            raise ValueError(f"{self.method}: slot is {slot!r}, need 0 to {self.slots - 1}")
        if self.merged:
            raise ValueError(f"{self.method}: it is merged, need unmerge() before put")
        found, scale = _factors(source, alpha)
        for name, (down, up) in found.items():
            if name not in self.places:
                raise ValueError(f"{_of(source)}: layer {name} is none of this adapter's")
            pair: Any = self.pairs[key_of(name)]
            inner, out = pair.down.shape[2], pair.up.shape[1]
            fits = down.shape[1:].numel() == inner and up.shape[0] == out
            if not fits or down.shape[0] != up.shape[1] or down.shape[0] > self.rank:
                raise ValueError(
                    f"{_of(source)}: layer {name} has {list(down.shape)} and {list(up.shape)}, "
                    f"need [rank, {inner}] and [{out}, rank] with rank at most {self.rank}"
                )
        with torch.no_grad():
            for name in self.places:
                pair = self.pairs[key_of(name)]
                down_, up_ = pair.down[slot], pair.up[slot]
                if name in found:
                    down, up = found[name]
                    r = down.shape[0]
                    down_[:r].copy_(down.reshape(r, -1))
                    up_[:, :r].copy_(up.reshape(-1, r))
                    up_[:, r:].zero_()
                else:
                    up_.zero_()
            self.scale[slot] = scale
        self._turns += 1

    @classmethod
    def from_peft(
        cls,
        network: nn.Module,
        source: str | Path | dict[str, Tensor],
        *,
        alpha: float | None = None,
        slots: int = 1,
    ) -> LoRA:
        """The adapter of a file of PEFT or diffusers (``….lora_A.weight``, ``….lora.down.weight``).

        Args:
            network: any module.
            source: the file, or its tensors.
            alpha: as in :meth:`put`.
            slots: of the adapter that is made; the first gets the file.

        Raises:
            ValueError: it is not readable, or a layer is not part of ``network`` or has another
                shape; the network is as it was then.
        """
        found, _ = _factors(source, alpha)
        layers = select(cls.method, network, None, (nn.Linear, nn.Conv2d))
        layers = {n: m for n, m in layers.items() if n in found}
        for name in found:
            if name not in layers:
                raise ValueError(f"{_of(source)}: layer {name} is no linear layer or convolution")
        rank = max(down.shape[0] for down, _ in found.values())
        pattern = "^(" + "|".join(re.escape(n) for n in found) + ")$"
        conv = any(isinstance(m, nn.Conv2d) for m in layers.values())
        made = cls(network, rank, targets=pattern, slots=slots, convolutions=conv)
        try:
            made.put(0, source, alpha)
        except ValueError:
            made.detach()
            raise
        return made

    def to_peft(self, path: str | Path, slot: int = 0) -> None:
        """Write one slot as PEFT names it; its scale is in the up factors."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"{self.method}: slot is {slot!r}, need 0 to {self.slots - 1}")
        state = {}
        for name, layer in self.places.items():
            pair: Any = self.pairs[key_of(name)]
            down, up = pair.down[slot].detach(), (self.scale[slot] * pair.up[slot]).detach()
            if isinstance(layer, nn.Conv2d):
                down, up = down.unflatten(1, layer.weight.shape[1:]), up[..., None, None]
            state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down, up
        save_file({n: t.cpu().contiguous() for n, t in state.items()}, str(path))


def _of(source: Any) -> str:
    return "source" if isinstance(source, dict) else str(source)


def _alpha_of(path: str | Path) -> float | None:
    """What PEFT (settings beside weights of its name) or diffusers (metadata) say of a file.

    Raises:
        ValueError: its settings are not readable, layers differ in them, or it is scaled in
            another way.
    """
    beside = Path(path).with_name("adapter_config.json")
    with safe_open(str(path), framework="pt") as file:
        inside = (file.metadata() or {}).get("lora_adapter_metadata")
    if inside is None and (Path(path).name != _PEFT or not beside.exists()):
        return None
    try:
        text = beside.read_text() if inside is None else inside
        facts = {k.rpartition(".")[2]: v for k, v in json.loads(text).items()}
    except (AttributeError, OSError, ValueError) as error:
        raise ValueError(f"{path}: its settings are not readable: {error}") from error
    for name in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora"):
        if facts.get(name):
            raise ValueError(
                f"{path}: its settings have {name} {facts[name]!r}, need one scale alpha / rank of "
                "all layers"
            )
    found = facts.get("lora_alpha")
    return None if found is None else float(found)


def _factors(
    source: str | Path | dict[str, Tensor], alpha: float | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """``{layer: (down [rank, ...], up [N, rank])}``, and the scale of all."""
    if isinstance(source, dict):
        state = source
    else:
        try:
            facts, state = read(source)
        except ValueError as error:
            if "no adapter of fastdiff" not in str(error):
                raise
            state = load_file(str(source))
            alpha = _alpha_of(source) if alpha is None else alpha
        else:
            if facts["method"] != LoRA.method:
                raise ValueError(f"{source}: its method is {facts['method']}, need {LoRA.method}")
            names = [n for n in state if n.endswith(".down")]
            if any(state[n].shape[0] != 1 for n in names):
                raise ValueError(f"{source}: it has several slots, need a file of one")
            own = {}
            for n in names:
                layer = name_of(n.removeprefix("adapter.pairs.").removesuffix(".down"))
                own[layer] = (state[n][0], state[n.removesuffix("down") + "up"][0])
            return own, float(state["adapter.scale"][0])
    found = {}
    used = set()
    for n, down in state.items():
        match = _AFTER.search(n)
        if match is None:
            continue
        mark = next(m for m in _UPS if m in match[0])
        other = n[: match.start()] + match[0].replace(mark, _UPS[mark])
        if other not in state:
            raise ValueError(f"{_of(source)}: tensor {other} is missing")
        used |= {n, other}
        up = state[other]
        found[_BEFORE.sub("", n[: match.start()])] = (down, up.reshape(up.shape[0], -1))
    rest = sorted(state.keys() - used)
    if not found or rest:
        raise ValueError(
            f"{_of(source)}: tensor {rest[0] if rest else 'of an adapter'} is not understood, need "
            "pairs of lora_A and lora_B"
        )
    ranks = {down.shape[0] for down, _ in found.values()}
    if alpha is not None and len(ranks) > 1:
        raise ValueError(f"{_of(source)}: ranks are {sorted(ranks)}, need one where alpha is given")
    if not all(bool(t.isfinite().all()) for pair in found.values() for t in pair):
        raise ValueError(f"{_of(source)}: a value is not finite")
    return found, 1.0 if alpha is None else alpha / next(iter(ranks))
