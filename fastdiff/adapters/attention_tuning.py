r"""TryOn-Adapter: a garment's identity in a frozen network (Xing et al. 2024, arXiv:2404.00878,
section 3), by three means.

:class:`TrainAttention` trains attention's projections in place. :class:`GatedTokens` puts a gated
attention to the garment's patches p into transformer blocks, as GLIGEN does (Li et al. 2023,
arXiv:2301.07093, eq. 4):

    x <- x + s tanh(a_1) SA(LN_1 [x, L p])[:N]
    x <- x + s tanh(a_2) FF(LN_2 x)                     a_1 = a_2 = 0 at first

and :class:`Residuals` adds feature maps of other networks (of segments, of highlights).

LN_1 is by token, so that keys and values of the patches depend on the picture alone: they are
computed once, and queries of the patches, which nothing reads, never.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.adapters.base import Adapter, Before, Hook, Targets, first, kept, key_of, select
from fastdiff.adapters.tap import main, whole

# Projections of attention as diffusers, our DiT and most others name them.
PROJECTIONS = (
    r"(^|\.)(attn\d*|attention|attentions\.\d+|self_attn|cross_attn)"
    r"\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|qkv|q|k|v|proj)$"
)
_BLOCKS = ("BasicTransformerBlock", "_TransformerBlock", "_Block")


class TrainAttention(Adapter):
    """Attention's projections, trained where they are; all else is frozen.

    Args:
        network: any module.
        targets: linear layers, see :func:`fastdiff.adapters.select`; None: projections by their
            usual names. ``r"attn2\\.to_[kv]$"`` are keys and values of text alone.

    Raises:
        ValueError: ``targets`` fits no layer, or another adapter writes one of them.
    """

    method = "attention"

    def __init__(self, network: nn.Module, *, targets: Targets = None) -> None:
        given = targets if targets is None or isinstance(targets, str) else list(targets)
        super().__init__(network, targets=given)
        found = select(self.method, network, PROJECTIONS if targets is None else targets)
        mine = {id(p) for m in found.values() for p in m.parameters(recurse=False)}
        # By the names of the network, which lists a parameter with several names once.
        self.trains = [n for n, p in network.named_parameters() if id(p) in mine]
        self.attach()


class Fuser(nn.Module):
    """One block's gated attention: ``dim`` D, ``width`` of the patches, ``heads`` H."""

    def __init__(self, dim: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear = nn.Linear(width, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)
        self.gate, self.out = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)
        self.alpha_attn = nn.Parameter(torch.zeros(()))
        self.alpha_dense = nn.Parameter(torch.zeros(()))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def of_patches(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, P, E]`` of patches ``[B, P, width]``."""
        n = _norm(self.norm1, _linear(self.linear, patches))
        return self.split(_linear(self.to_k, n)), self.split(_linear(self.to_v, n))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, scale: Tensor, merge: bool) -> Tensor:
        """What is added to ``x [B, N, D]``, in its dtype."""
        n = _norm(self.norm1, x)
        q, mine, value = (self.split(_linear(to, n)) for to in (self.to_q, self.to_k, self.to_v))
        if merge:
            out = merge_attention(
                _attention(q, mine, value), _attention(q, k.to(q.dtype), v.to(q.dtype))
            )
        else:
            out = ops.attention(
                q, torch.cat([mine, k.to(q.dtype)], dim=2), torch.cat([value, v.to(q.dtype)], dim=2)
            )  # type: ignore[assignment]
        scale = scale.to(x.dtype)
        out = _linear(self.to_out, out.transpose(1, 2).flatten(2))
        first_part = scale * self.alpha_attn.tanh().to(x.dtype) * out
        h, gate = _linear(self.gate, _norm(self.norm2, x + first_part)).chunk(2, dim=-1)
        dense = _linear(self.out, h * F.gelu(gate))
        return first_part + scale * self.alpha_dense.tanh().to(x.dtype) * dense


def _linear(layer: Any, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def _norm(layer: Any, x: Tensor) -> Tensor:
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = ops.attention(q, k, v, return_lse=True)
    return out, lse


def merge_attention(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over all keys from attention over disjoint sets of them.

    Args:
        parts: ``(out [B, H, S, E], lse [B, H, S])`` of each, of the same queries.

    Returns:
        ``[B, H, S, E]``, the dtype of the first; rows that see no key give 0.
    """
    lse = torch.stack([p[1] for p in parts])
    top = lse.amax(0).clamp(min=torch.finfo(lse.dtype).min)  # not -inf: a row may see nothing
    weight = (lse - top).exp()
    total = weight.sum(0)
    share = weight / torch.where(total > 0, total, 1.0)
    merged = sum(s[..., None] * p[0].to(s.dtype) for s, p in zip(share, parts, strict=True))
    assert isinstance(merged, Tensor)
    return merged.to(parts[0][0].dtype)


class GatedTokens(Adapter):
    """Gated attention to patch tokens in transformer blocks.

    Between self- and cross-attention where a block has both (and no gate of its own between them),
    after the block elsewhere.

    Args:
        network: any module with transformer blocks on ``[B, N, D]`` tokens.
        width: of the patch tokens.
        heads: H of the added attention.
        head_dim: E of a head; None: D / H.
        targets: blocks, see :func:`fastdiff.adapters.select`; None: diffusers'
            ``BasicTransformerBlock`` and those of our networks.
        merge: attention to the patches is one of its own, merged by log-sum-exp; False: keys and
            values are concatenated, for one call of attention.

    Attributes:
        scale: float32 ``[1]``, s; in place changes need no new capture.

    Raises:
        ValueError: an argument does not fit, or no block is found.
    """

    method = "gated_tokens"
    scale: Tensor
    patches: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        width: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        targets: Targets = None,
        merge: bool = False,
    ) -> None:
        whole(self.method, width=width, heads=heads)
        if head_dim is not None:
            whole(self.method, head_dim=head_dim)
        given = targets if targets is None or isinstance(targets, str) else list(targets)
        super().__init__(
            network, width=width, heads=heads, head_dim=head_dim, targets=given, merge=merge
        )
        self.width, self.merges = width, bool(merge)
        self.blocks: dict[str, Any] = _blocks(self.method, network, targets)
        self.fusers = nn.ModuleDict()
        for name, block in self.blocks.items():
            dim = _width(block)
            if dim is None:
                raise ValueError(f"{self.method}: block {name} does not say its width")
            if head_dim is None and dim % heads:
                raise ValueError(
                    f"{self.method}: heads is {heads}, need a divisor of {dim}, the width of block "
                    f"{name}, or head_dim"
                )
            with torch.device(next(network.parameters()).device):
                self.fusers[key_of(name)] = Fuser(
                    dim, width, heads, heads * (head_dim or dim // heads)
                )
        device = next(network.parameters()).device
        self.register_buffer("scale", torch.ones(1, device=device))
        self.register_buffer("patches", None, persistent=False)
        self._known: dict[str, tuple[Any, Tensor, Tensor]] = {}
        self._seen = 0
        self._inputs: dict[str, Tensor] = {}
        self.attach()

    def see(self, patches: Tensor | None) -> None:
        """The patch tokens of the pictures to come; keys and values are computed once from them.

        Patches of the shape of those before are copied to where they were, and their keys and
        values too: captured programs go on. A batch of several times as many rows repeats them
        (branches of guidance: all conditional, all unconditional).

        Args:
            patches: ``[B, P, width]``; None: blocks are as without the adapter.

        Raises:
            ValueError: the shape does not fit.
        """
        if patches is None:
            self.patches, self._known = None, {}
            self._turns += 1
            return
        if patches.dim() != 3 or patches.shape[2] != self.width or not patches.shape[0]:
            raise ValueError(
                f"{self.method}: patches has shape {list(patches.shape)}, need [B, P, {self.width}]"
            )
        self._seen += 1
        self._turns += 1
        asks = patches.requires_grad and torch.is_grad_enabled()
        old = self.patches
        if asks or old is None or old.shape != patches.shape or old.dtype != patches.dtype:
            self.patches, self._known = patches if asks else kept(patches), {}
        else:
            with torch.no_grad():
                old.copy_(patches)
        if not torch.is_grad_enabled() or self._known:
            self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Keys and values of all blocks, now: a captured program calls nothing of ours."""
        for name in self.blocks:
            self._keys_values(name)

    @property
    def layout(self) -> tuple[Any, ...]:
        where = ((k.data_ptr(), v.data_ptr()) for _, k, v in self._known.values())
        return *super().layout, self.patches is None, self.merges, *where

    def _keys_values(self, name: str) -> tuple[Tensor, Tensor]:
        """Of one block; from before where nothing has changed since."""
        fuser: Any = self.fusers[key_of(name)]
        assert self.patches is not None
        if torch.is_grad_enabled() and (
            self.patches.requires_grad or any(p.requires_grad for p in fuser.parameters())
        ):
            k, v = fuser.of_patches(self.patches)
            return k, v
        of = (self.patches, *fuser.parameters())
        count = self._seen, sum(t._version for t in of if not t.is_inference())
        known = self._known.get(name)
        if known is not None and known[0] == count:
            return known[1:]
        with torch.inference_mode(False), torch.no_grad():
            k, v = fuser.of_patches(self.patches)
            if known is not None:
                known[1].copy_(k), known[2].copy_(v)
                k, v = known[1:]
        self._known[name] = count, k, v
        return k, v

    def fill(self, tensors: dict[str, Tensor]) -> None:
        super().fill(tensors)
        if self._known:
            self._refresh()

    def before(self) -> Iterator[tuple[nn.Module, Before]]:
        for name, block in self.blocks.items():
            if _between(block):
                yield block, self._entering(name)

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        for name, block in self.blocks.items():
            if _between(block):
                yield block.attn1, self._inside(name)
            else:
                yield block, self._after(name)

    def _entering(self, name: str) -> Before:
        def keep(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[name] = first(args, kwargs)

        return keep

    def _inside(self, name: str) -> Hook:
        def add(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
            x = self._inputs.pop(name)
            return out if self.patches is None else out + self._added(name, x + out)

        return add

    def _after(self, name: str) -> Hook:
        def add(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            if self.patches is None:
                return out
            return _plus(out, self._added(name, main(out)))

        return add

    def _added(self, name: str, x: Tensor) -> Tensor:
        k, v = self._keys_values(name)
        if x.shape[0] % k.shape[0]:
            raise ValueError(
                f"{self.method}: a batch has {x.shape[0]} rows, need a multiple of the "
                f"{k.shape[0]} of patches"
            )
        times = (x.shape[0] // k.shape[0], 1, 1, 1)
        fuser = self.fusers[key_of(name)]
        out: Tensor = fuser(x, k.repeat(times), v.repeat(times), self.scale, self.merges)
        return out


def _plus(out: Any, more: Tensor) -> Any:
    """What a module gives with ``more`` added to its hidden state."""
    if isinstance(out, Tensor):
        return out + more
    if isinstance(out, tuple):
        return (out[0] + more, *out[1:])
    raise ValueError(f"a block gives a {type(out).__name__}, need a tensor or a tuple of them")


def _blocks(who: str, network: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    if targets is not None:
        return select(who, network, targets, (nn.Module,))
    found = {
        n: m
        for n, m in network.named_modules()
        if any(c.__name__ in _BLOCKS for c in type(m).__mro__)
    }
    if not found:
        raise ValueError(
            f"{who}: targets is None and {type(network).__name__} has no transformer block that is "
            "known, need targets"
        )
    return found


def _width(block: Any) -> int | None:
    for path in ("attn1.to_q.in_features", "attn.qkv.in_features", "dim"):
        value = block
        for part in path.split("."):
            value = getattr(value, part, None)
        if isinstance(value, int):
            return value
    return None


def _between(block: Any) -> bool:
    """Tokens are ``x + attn1(norm(x))`` before cross-attention: no gate, no further norm."""
    plain = getattr(block, "norm_type", "layer_norm") == "layer_norm"
    return (
        plain
        and getattr(block, "attn1", None) is not None
        and (getattr(block, "attn2", None) is not None)
    )


class Residuals(Adapter):
    """Feature maps that are added to what chosen modules give.

    They depend on a picture's conditions alone, so another network computes them once for all
    steps. On diffusers' U-Nets the places of TryOn-Adapter and T2I-Adapter, the last layer of each
    level before it is made smaller, are ``["down_blocks.0.attentions.1", ...,
    "down_blocks.3.resnets.1"]``: skips have the sum too.

    Args:
        network: any module.
        blocks: names of modules, in the order of the residuals.

    Attributes:
        scale: float32 ``[1]``; in place changes need no new capture.

    Raises:
        ValueError: ``blocks`` is empty or has a name that is no module's, or one twice.
    """

    method = "residuals"
    scale: Tensor

    def __init__(self, network: nn.Module, blocks: Sequence[str]) -> None:
        blocks = [blocks] if isinstance(blocks, str) else list(blocks)
        super().__init__(network, blocks=blocks)
        layers = dict(network.named_modules())
        unknown = [n for n in blocks if not n or n not in layers]
        if not blocks or unknown or len(set(blocks)) != len(blocks):
            raise ValueError(
                f"{self.method}: blocks is {blocks}, need names of modules, each once"
                + (f"; {unknown[0]!r} is none" if unknown else "")
            )
        self.blocks = {name: layers[name] for name in blocks}
        self.residuals: list[Tensor] | None = None
        device = next(network.parameters()).device
        self.register_buffer("scale", torch.ones(1, device=device))
        self.attach()

    def see(self, residuals: Sequence[Tensor] | None) -> None:
        """The residuals of the calls to come; those of the shapes before are copied to where they
        were, so that captured programs go on.

        Args:
            residuals: one of each block, of the shape of what that gives or of a part of its batch
                that is repeated; gradients go to them. None: nothing is added.

        Raises:
            ValueError: there are more or fewer than blocks.
        """
        if residuals is None:
            self.residuals = None
            self._turns += 1
            return
        if len(residuals) != len(self.blocks):
            raise ValueError(
                f"{self.method}: residuals has {len(residuals)} entries, need {len(self.blocks)}, "
                "one of each block"
            )
        self._turns += 1
        old, new = self.residuals, list(residuals)
        asks = torch.is_grad_enabled() and any(r.requires_grad for r in new)
        alike = old is not None and all(
            a.shape == b.shape and a.dtype == b.dtype and not a.requires_grad
            for a, b in zip(old, new, strict=True)
        )
        if asks or not alike:
            self.residuals = [r if asks else kept(r) for r in new]
        else:
            assert old is not None
            with torch.no_grad():
                for a, b in zip(old, new, strict=True):
                    a.copy_(b)

    @property
    def layout(self) -> tuple[Any, ...]:
        where = (r.data_ptr() for r in self.residuals or ())
        return *super().layout, self.residuals is None, *where

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        for i, block in enumerate(self.blocks.values()):
            yield block, self._hook(i)

    def _hook(self, i: int) -> Hook:
        def add(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            if self.residuals is None:
                return out
            h, residual = main(out), self.residuals[i]
            times = h.shape[0] // max(len(residual), 1)
            if residual.shape[1:] != h.shape[1:] or times * len(residual) != len(h):
                raise ValueError(
                    f"{self.method}: residual {i} has shape {list(residual.shape)}, need "
                    f"{list(h.shape)}, or a part of the batch"
                )
            more = (self.scale * residual).to(h.dtype)
            return _plus(out, more.repeat(times, *[1] * (h.dim() - 1)))

        return add
