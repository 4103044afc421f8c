r"""Adaptive Feature Aggregation (Wang et al. 2024, arXiv:2405.17082, section 3): several networks
of one architecture as one, block by block.

    h_k = block_n^k(h, ...),    A = softmax_k SABW_n(h_1 ... h_K; t, context),    h = sum_k A_k h_k

After every block the outputs of the K networks, skips too, are combined by spatial maps, and the
combination goes on to the next block of all of them; their predictions are combined alike. The
networks are frozen; what makes the maps is trained.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.adapters.base import Adapter, attached, site
from fastdiff.models import DiT, UNet
from fastdiff.models._embed import timestep_embedding
from fastdiff.models.dit import EPS

FREQUENCIES = 256  # of the sinusoidal time embedding
BLOCKS = ("down_blocks", "mid_block", "up_blocks", "blocks", "transformer_blocks")
# What networks call the time and the tokens that they attend to.
TIMES, CONTEXTS = ("t", "timestep"), ("context", "encoder_hidden_states")
Join = Callable[[list[Tensor]], Tensor]


class SABW(nn.Module):
    """Spatial attention, block-wise: of every place in the networks the maps that combine them.

    At each position the normalised features of all networks go through a small perceptron, which
    the time and the mean of the context shift; in pictures its hidden layer looks at 3 x 3
    positions. It starts with equal maps. Rows of a batch do not see each other.

    Args:
        models: K, the networks.
        channels: C of every place, in their order (:func:`places`).
        hidden: width of the perceptrons.
        context_dim: width of the context tokens, 0 for none.
    """

    def __init__(
        self, models: int, channels: Sequence[int], hidden: int = 64, context_dim: int = 0
    ) -> None:
        super().__init__()
        for name, value in (("models", models), ("hidden", hidden)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SABW: {name} is {value!r}, need a whole number above 0")
        self.models, self.channels, self.hidden = models, tuple(channels), hidden
        self.time = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        self.context = nn.Linear(context_dim, hidden) if context_dim else None
        self.enter = nn.ModuleList(nn.Linear(models * c, hidden) for c in channels)
        self.look = nn.ModuleList(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) for _ in channels
        )
        self.leave = nn.ModuleList(nn.Linear(hidden, models) for _ in channels)
        for layer in self.leave:
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def condition(self, t: Tensor, context: Tensor | None) -> Tensor:
        """``t [B]`` and ``context [B, L, Dc]`` as one vector ``[B, hidden]``."""
        first: Any = self.time[0]
        dtype = first.weight.dtype
        out: Tensor = self.time(timestep_embedding(t, FREQUENCIES).to(dtype))
        if self.context is not None and context is not None:
            out = out + self.context(context.to(dtype).mean(1))
        return out

    def forward(self, place: int, features: Tensor, condition: Tensor) -> Tensor:
        """Logits ``[K, B, 1, ...]``, in the dtype of the parameters, of features ``[K, B, C,
        ...]`` of a place."""
        if not 0 <= place < len(self.channels) or features.shape[2] != self.channels[place]:
            raise ValueError(
                f"SABW: place {place} has features {list(features.shape)}, need "
                f"[{self.models}, B, C, ...] with C of {list(self.channels)}"
            )
        x = features.to(condition.dtype).movedim(2, -1)  # [K, B, ..., C]
        x = F.layer_norm(x, x.shape[-1:]).movedim(0, -2).flatten(-2)
        h = self.enter[place](x)
        h = F.silu(h + condition.view(condition.shape[0], *[1] * (h.dim() - 2), -1))
        if h.dim() == 4:
            h = h + self.look[place](h.movedim(-1, 1)).movedim(1, -1)
        return self.leave[place](h).movedim(-1, 0).unsqueeze(2)


def places(network: nn.Module) -> list[int]:
    """Channels of every place where networks like this one are combined: the outputs of its
    blocks, each followed by the skips that are other tensors, and the prediction.

    Raises:
        ValueError: it is neither a U-Net of residual blocks nor a transformer with one width.
    """
    net: Any = network
    config = getattr(net, "config", {})
    out = config.get("out_channels") or net.out_channels
    if hasattr(net, "down_blocks"):
        found = []
        for block in net.down_blocks:
            skips = [r.conv2.out_channels for r in block.resnets]
            if block.downsamplers is not None:
                skips.append(_channels_of(block.downsamplers[0]))
            found += [skips[-1], *skips[:-1]]
        if net.mid_block is not None:
            found.append(net.mid_block.resnets[-1].conv2.out_channels)
        return [*found, *(b.resnets[-1].conv2.out_channels for b in net.up_blocks), out]
    width = config.get("hidden_size") or getattr(net, "inner_dim", None)
    blocks = getattr(net, "blocks", None) or getattr(net, "transformer_blocks", None)
    if width is None or blocks is None:
        raise ValueError(
            f"afa: {type(net).__name__} has neither down_blocks nor blocks of one known width, "
            "need an aggregator made for it"
        )
    return [*[int(width)] * len(blocks), out]


def _channels_of(downsampler: Any) -> int:
    conv = getattr(downsampler, "conv", None)
    return int(conv.out_channels if isinstance(conv, nn.Conv2d) else downsampler.channels)


# ---- our networks, which read their layers' weights ----------------------------------------------


def _unet(models: Sequence[Any], join: Join, given: dict[str, Any]) -> Tensor:
    x, t, y, context = (given.get(name) for name in ("x", "t", "y", "context"))
    assert isinstance(x, Tensor)
    for m in models:
        m.check(x, t, y, context)
    contexts = [m.tokens(y, context) for m in models]
    times = [m.condition(t) for m in models]
    stems = [
        m.conv_in(x.to(time.dtype)).contiguous(memory_format=torch.channels_last)
        for m, time in zip(models, times, strict=True)
    ]
    hidden, skips = stems, [(h,) for h in stems]
    for i in range(len(models[0].down_blocks)):
        outs = [
            m.down_blocks[i](h, *c)
            for m, h, *c in zip(models, hidden, times, contexts, strict=True)
        ]
        last = join([h for h, _ in outs])
        more = [join([own[j] for _, own in outs]) for j in range(len(outs[0][1]) - 1)]
        hidden = [last] * len(models)
        skips = [(*own, *more, last) for own in skips]
    outs = [m.mid_block(h, *c) for m, h, *c in zip(models, hidden, times, contexts, strict=True)]
    hidden = [join(outs)] * len(models)
    for i in range(len(models[0].up_blocks)):
        count = len(models[0].up_blocks[i].resnets)
        outs = [
            m.up_blocks[i](h, own[-count:], *c)
            for m, h, own, *c in zip(models, hidden, skips, times, contexts, strict=True)
        ]
        hidden = [join(outs)] * len(models)
        skips = [own[:-count] for own in skips]
    ends = []
    for m, h in zip(models, hidden, strict=True):
        n = m.conv_norm_out
        h = ops.group_norm_silu(h, n.num_groups, n.weight, n.bias, eps=n.eps)
        ends.append(ops.conv3x3(h, m.conv_out.weight, m.conv_out.bias).contiguous())
    return join(ends).to(x.dtype)


def _dit(models: Sequence[Any], join: Join, given: dict[str, Any]) -> Tensor:
    x, t, y = given["x"], given["t"], given["y"]
    height, width = x.shape[2:]
    stems, mods = [], []
    for m in models:
        c = m.condition(t, y)
        h = m.embed(x.to(c.dtype))
        if m.box_size:
            h = h + m.layout(y, height // m.patch_size, width // m.patch_size)
        stems.append(h)
        layers = [b.adaLN_modulation[1] for b in m.blocks]
        mods.append([ops.linear(c, a.weight, a.bias).chunk(6, dim=-1) for a in layers])
        last = m.final_layer.adaLN_modulation[1]
        mods[-1].append(ops.linear(c, last.weight, last.bias).chunk(2, dim=-1))
    hidden = stems
    for i in range(len(models[0].blocks)):
        outs = []
        for m, h, own in zip(models, hidden, mods, strict=True):
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = own[i]
            normed = ops.layer_norm_modulate(h, shift_1, scale_1, eps=EPS)
            h, normed = ops.gate_residual_norm_modulate(
                h, m.attend(m.blocks[i], normed), gate_1, shift_2, scale_2, eps=EPS
            )
            outs.append(ops.gate_residual(h, m.mlp(m.blocks[i], normed), gate_2))
        hidden = [join(outs)] * len(models)
    ends = []
    for m, h, own in zip(models, hidden, mods, strict=True):
        out = m.final_layer.linear
        normed = ops.layer_norm_modulate(h, *own[-1], eps=EPS)
        ends.append(m.unpatchify(ops.linear(normed, out.weight, out.bias), height, width))
    return join(ends).to(x.dtype)


# ---- other people's, which call their layers -----------------------------------------------------


def _leaves(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, m in network.named_modules():
        if next(m.parameters(recurse=False), None) is not None:
            yield name, m


class _Skeleton:
    """A network in which every layer with weights is the K networks' layers, side by side.

    It runs on batches of K times the rows, network after network. It is a copy that shares the
    first network's tensors: the networks themselves, and what listens to their layers, stay.
    """

    def __init__(self, models: Sequence[nn.Module], blocks: Sequence[str]) -> None:
        lead, self.count = models[0], len(models)
        kept = [*lead.parameters(), *lead.buffers(), *attached(lead)]
        kept.append(lead.__dict__.get("_fastdiff_adapters"))
        self.network = copy.deepcopy(lead, {id(t): t for t in kept if t is not None})
        self.network.__dict__.pop("_fastdiff_adapters", None)
        for m in self.network.modules():  # those of the networks' own layers are heard
            m._forward_hooks, m._forward_pre_hooks = OrderedDict(), OrderedDict()
        layers = [dict(_leaves(m)) for m in models]
        for name, leaf in list(_leaves(self.network)):
            if isinstance(leaf, nn.modules.batchnorm._BatchNorm) or list(leaf.children()):
                raise ValueError(
                    f"afa: {name or 'the network'} is {type(leaf).__name__}, need weights in "
                    "layers of their own that treat rows of a batch alike"
                )
            leaf.__dict__["forward"] = self._side_by_side([own[name] for own in layers])
        self.join: Join | None = None
        for name in blocks:
            self.network.get_submodule(name).register_forward_hook(self._combine)

    def _side_by_side(self, layers: list[nn.Module]) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.shape[0] % self.count:
                raise ValueError(
                    f"afa: {type(layers[0]).__name__} gets {list(x.shape)}, need rows of "
                    f"{self.count} networks"
                )
            parts = x.chunk(self.count)
            return torch.cat([m(p, *args, **kwargs) for m, p in zip(layers, parts, strict=True)])

        return forward

    def _combine(self, block: nn.Module, args: Any, out: Any) -> Any:
        seen: dict[int, Tensor] = {}

        def each(value: Any) -> Any:
            if isinstance(value, Tensor):
                if id(value) not in seen:
                    seen[id(value)] = self.one(value).repeat(self.count, *[1] * (value.dim() - 1))
                return seen[id(value)]
            return type(value)(map(each, value)) if isinstance(value, (tuple, list)) else value

        return each(out)

    def one(self, value: Tensor) -> Tensor:
        assert self.join is not None
        return self.join(list(value.chunk(self.count)))

    def rows(self, value: Any, batch: int) -> Any:
        """Arguments for all networks: a tensor of ``batch`` rows as often as there are networks."""
        if isinstance(value, Tensor):
            mine = value.dim() > 0 and value.shape[0] == batch
            return value.repeat(self.count, *[1] * (value.dim() - 1)) if mine else value
        if isinstance(value, dict):
            return {k: self.rows(v, batch) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self.rows(v, batch) for v in value)
        return value

    def __call__(self, join: Join, batch: int, given: dict[str, Any]) -> Any:
        self.join = join
        try:
            out = self.network(**self.rows(given, batch))
            if isinstance(out, Tensor):
                return self.one(out)
            if isinstance(out, tuple):
                return (self.one(out[0]), *out[1:])
            return type(out)(sample=self.one(out.sample))
        finally:
            self.join = None


def _block_names(network: nn.Module) -> list[str]:
    found = []
    for name in BLOCKS:
        held = getattr(network, name, None)
        if isinstance(held, nn.ModuleList):
            found += [f"{name}.{i}" for i in range(len(held))]
        elif isinstance(held, nn.Module):
            found.append(name)
    return found


class Ensemble(Adapter):
    """K networks of one architecture as one, combined after every block.

    It is called as each of them is. With one network it is that network. Its parameters are those
    of the aggregator; the networks ask for no gradients until :meth:`detach`. A row of a batch
    comes out as it does alone, so branches of guidance may share one.

    Args:
        models: the networks: :class:`fastdiff.models.UNet` or ``DiT`` (or their twins in plain
            torch, which then compute as these do), or those of diffusers and others whose blocks
            and layers are called as modules (``UNet2DConditionModel``, ``UNet2DModel``,
            ``DiTTransformer2DModel``). They are referred to, not copied. Their adapters act: in
            ours those that are merged, in others those of single layers too.
        aggregator: ``aggregator(place, features [K, B, C, ...], condition) -> logits [K, B, 1|C,
            ...]``, a module, with ``aggregator.condition(t [B], context [B, L, Dc] or None)``; None
            makes a :class:`SABW`.
        hidden: of that.
        blocks: names of the modules after which the networks are combined; None: all in
            ``down_blocks``, ``mid_block``, ``up_blocks``, ``blocks`` and ``transformer_blocks``.
            Not for our networks, which are combined after every block.

    Raises:
        ValueError: there is no network, or they differ in class or in the shape of a parameter, or
            ``blocks`` names none of theirs.
    """

    method = "afa"

    def __init__(
        self,
        models: Sequence[nn.Module],
        aggregator: nn.Module | None = None,
        *,
        hidden: int = 64,
        blocks: Sequence[str] | None = None,
    ) -> None:
        networks = list(models)
        if not networks or not all(isinstance(m, nn.Module) for m in networks):
            raise ValueError(f"afa: models is {models!r}, need at least one nn.Module")
        _check_alike(networks)
        super().__init__(networks[0], models=len(networks), hidden=hidden)
        self._models = networks  # in a list: no submodules
        lead: Any = networks[0]
        self._names = list(inspect.signature(type(lead).forward).parameters)[1:]
        self._run: Callable[..., Any] | None = None
        self._skeleton: _Skeleton | None = None
        if isinstance(lead, (UNet, DiT)):
            if blocks is not None:
                raise ValueError(f"afa: blocks is {blocks!r}, need None for our networks")
            self._run = _unet if isinstance(lead, UNet) else _dit
        elif len(networks) > 1:
            known = dict(lead.named_modules())
            chosen = _block_names(lead) if blocks is None else list(blocks)
            if not chosen:
                raise ValueError(
                    f"afa: {type(lead).__name__} has none of {', '.join(BLOCKS)}, need blocks"
                )
            for name in chosen:
                if name not in known:
                    raise ValueError(
                        f"afa: blocks has {name!r}, need names of the network's modules"
                    )
            self._skeleton = _Skeleton(networks, chosen)
        if aggregator is None and len(networks) > 1:
            context = getattr(lead, "config", {}).get("cross_attention_dim")
            width = context if isinstance(context, int) and _has(self._names, CONTEXTS) else 0
            aggregator = SABW(len(networks), places(lead), hidden, width)
            aggregator.to(next(lead.parameters()).device)
        self.aggregator = aggregator
        self.attach()

    @property
    def models(self) -> list[nn.Module]:
        return list(self._models)

    def attach(self) -> Ensemble:
        super().attach()
        for m in self._models[1:]:
            if self not in site(m).adapters:
                site(m).adapters.append(self)
                site(m).freeze()
        return self

    def detach(self) -> nn.Module:
        out = super().detach()
        for m in self._models[1:]:
            place = site(m)
            if self in place.adapters:
                place.adapters.remove(self)
                place.freeze()
            if not place.adapters:
                m.__dict__.pop("_fastdiff_adapters", None)
        return out

    def _check_adapters(self) -> None:
        for k, m in enumerate(self._models):
            for other in attached(m):
                if other is self or other.merged:
                    continue
                heard = [module for module, _ in (*other.hooks(), *other.before())]
                if heard and self._run is not None:
                    raise ValueError(
                        f"afa: models[{k}] has adapter {other.method} at run time, need it merged"
                    )
                if not all(map(_leaf, heard)):
                    raise ValueError(
                        f"afa: models[{k}] has adapter {other.method}, which listens to more than "
                        "single layers, need it merged or detached"
                    )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What one network takes; what it gives.

        Raises:
            ValueError: no argument is the time (``t`` or ``timestep``), or an adapter of a network
                would not act.
        """
        if len(self._models) == 1:
            return self._models[0](*args, **kwargs)
        self._check_adapters()
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        x = given[self._names[0]]
        t, context = (_first(given, names) for names in (TIMES, CONTEXTS))
        if t is None:
            raise ValueError(f"afa: need an argument {' or '.join(TIMES)}")
        times = torch.as_tensor(t, device=x.device).expand(x.shape[0])
        aggregator: Any = self.aggregator
        condition = aggregator.condition(times, context if isinstance(context, Tensor) else None)
        count = 0

        def join(features: list[Tensor]) -> Tensor:
            nonlocal count
            place, count = count, count + 1
            stacked, tokens = _stack(features)
            out: Tensor = ops.aggregate_features(stacked, aggregator(place, stacked, condition))
            return out.movedim(1, -1) if tokens else out

        if self._run is not None:
            return self._run(self._models, join, given)
        assert self._skeleton is not None
        return self._skeleton(join, x.shape[0], given)


def _leaf(module: nn.Module) -> bool:
    own = next(module.parameters(recurse=False), None)
    return own is not None and next(module.children(), None) is None


def _stack(features: list[Tensor]) -> tuple[Tensor, bool]:
    """``[K, B, C, ...]`` in the features' order of memory; whether those are ``[B, N, C]``."""
    if features[0].dim() == 3:
        return torch.stack(features).movedim(-1, 2), True
    first = features[0]
    if not first.is_contiguous() and first.movedim(1, -1).is_contiguous():
        return torch.stack([f.movedim(1, -1) for f in features]).movedim(-1, 2), False
    return torch.stack(features), False


def _first(given: dict[str, Any], names: Sequence[str]) -> Any:
    return next((given[n] for n in names if given.get(n) is not None), None)


def _has(names: Sequence[str], wanted: Sequence[str]) -> bool:
    return any(n in names for n in wanted)


def _check_alike(models: Sequence[nn.Module]) -> None:
    if len({id(m) for m in models}) < len(models):
        raise ValueError("afa: models names one network twice, need a copy of it")
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in models]
    for k, (m, found) in enumerate(zip(models, shapes, strict=True)):
        if type(m) is not type(models[0]):
            raise ValueError(
                f"afa: models[{k}] is {type(m).__name__}, need {type(models[0]).__name__}"
            )
        for name in found.keys() | shapes[0].keys():
            if found.get(name) != shapes[0].get(name):
                raise ValueError(
                    f"afa: models[{k}] has {name} of shape {found.get(name)}, need "
                    f"{shapes[0].get(name)}"
                )
