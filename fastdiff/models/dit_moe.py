r"""DiT-MoE: DiT whose feed-forwards are experts (Fei et al. 2024, arXiv:2407.11633, section 3).

    x <- x + gate_2 * (sum_j g_j E_(i_j)(n) + S(n)),   n = LN(x) (1 + scale_2) + shift_2

with the k experts i_j of highest gate g = softmax(W_g n), which are not renormalised; E and the
shared S are down(silu(gate x) * up x) without biases, of hidden width 4 D and ``shared`` times D.
Their weights lie in stacks, and :func:`from_published` and :func:`to_published` go between these
and the parameter names of the published checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.dit import PRESETS, DiT
from fastdiff.nn import MoE, SwiGLU, layers

SIZES = {**PRESETS, "G": dict(hidden_size=1408, depth=40, num_heads=16)}
MAX_EXPERTS = 64
NORM_EPS = 1e-5  # of the heads' LayerNorms


class _Attention(layers.Attention):
    def __init__(self, dim: int, heads: int, qk_norm: bool):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        if qk_norm:
            self.q_norm = nn.LayerNorm(dim // heads, eps=NORM_EPS)
            self.k_norm = nn.LayerNorm(dim // heads, eps=NORM_EPS)
        self.proj = nn.Linear(dim, dim)


class _Block(nn.Module):
    def __init__(
        self, dim: int, heads: int, hidden: int, experts: int, k: int, shared: int, qk_norm: bool
    ):
        super().__init__()
        self.attn = _Attention(dim, heads, qk_norm)
        self.moe = MoE(dim, hidden, experts, k, shared=SwiGLU(dim, shared * dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h: Tensor) -> Tensor:
        """Called with the tokens after the block, as that of :class:`DiT`."""
        return h


class DiTMoE(DiT):
    """Class-conditional diffusion transformer of experts; called and sampled as :class:`DiT` is.

    ``with nn.routes() as found:`` around a call gives what each layer chose, and
    ``nn.balance_loss(found)`` the loss that keeps experts in even use.

    Args:
        experts: E of a block, 8 to 64 in the paper; 1 to 64 here.
        k: experts of a token.
        shared: the hidden width of the MLP that all tokens go through, over D.
        qk_norm: LayerNorms over the heads of queries and keys.
        unit_time: the network was trained on times in 0..1, as the published ones of rectified
            flow were; calls take 0..1000 all the same.
        config: of :class:`DiT`; layouts (``box_size``) too.

    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        *,
        experts: int = 8,
        k: int = 2,
        shared: int = 2,
        qk_norm: bool = False,
        unit_time: bool = False,
        depth: int = 28,
        **config: Any,
    ):
        super().__init__(depth=0, **config)
        for name, value in (("experts", experts), ("k", k), ("shared", shared)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"DiTMoE: {name} is {value!r}, need an integer of at least 1")
        if experts > MAX_EXPERTS:
            raise ValueError(f"DiTMoE: experts is {experts}, need at most {MAX_EXPERTS}")
        if k > experts:
            raise ValueError(f"DiTMoE: k is {k}, need at most {experts}, the experts")
        self.config |= dict(experts=experts, k=k, shared=shared, qk_norm=qk_norm, depth=depth)
        self.config["unit_time"] = unit_time
        self.qk_norm, self.unit_time = qk_norm, unit_time
        d, heads = self.config["hidden_size"], self.num_heads
        hidden = int(d * self.config["mlp_ratio"])
        self.blocks = nn.ModuleList(
            _Block(d, heads, hidden, experts, k, shared, qk_norm) for _ in range(depth)
        )
        self.reset_parameters()

    @classmethod
    def preset(cls, name: str, **config: Any) -> DiTMoE:
        """``DiTMoE.preset("XL/2-8E2A")``: sizes S, B, L, XL and G of the paper's table 1, patch 2,
        4 or 8, any number of experts and active ones."""
        found = re.fullmatch(r"(?:DiT-MoE-)?(\w+)/([248])-(\d+)E(\d+)A", name)
        if found is None or found[1] not in SIZES:
            raise ValueError(
                f"DiTMoE: preset is {name!r}, need S, B, L, XL or G, /2, /4 or /8, and experts "
                "such as -8E2A"
            )
        sizes = dict(patch_size=int(found[2]), experts=int(found[3]), k=int(found[4]))
        return cls(**{**SIZES[found[1]], **sizes, **config})

    def reset_parameters(self) -> None:
        """As :class:`DiT`; experts by Xavier's rule, routers as ``nn.Linear``."""
        super().reset_parameters()
        for block in self.blocks:
            moe = block.moe
            moe.reset_parameters()
            for up, down in ((moe.up, moe.down), (moe.shared.up, moe.shared.down)):
                bound = (6 / sum(down.shape[-2:])) ** 0.5
                nn.init.uniform_(up, -bound, bound)
                nn.init.uniform_(down, -bound, bound)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return super().condition(t / 1000 if self.unit_time else t, y)

    def norm_heads(self, block: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """LayerNorms of q and k ``[B, H, N, D/H]`` where the network has them."""
        if not self.qk_norm:
            return q, k
        a = block.attn
        return a.q_norm(q), a.k_norm(k)

    def heads(self, block: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(block, h)
        return *self.norm_heads(block, q, k), v

    def mlp(self, block: Any, h: Tensor) -> Tensor:
        out: Tensor = block.moe(h)
        return out


_STACKED = re.compile(r"(blocks\.\d+\.moe)\.(up|down|router|shared\.up|shared\.down)")
_EXPERT = re.compile(r"(blocks\.\d+\.moe)\.experts\.(\d+)\.gate_proj\.weight")


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of :class:`DiTMoE` under the names of the published checkpoints.

    Returns:
        ``blocks.N.moe.experts.M.{gate_proj,up_proj,down_proj}.weight``, the same three of
        ``blocks.N.moe.shared_experts`` and ``blocks.N.moe.gate.weight``, views of the stacks; all
        others as they are.
    """
    out: dict[str, Tensor] = {}

    def mlp(name: str, which: str, weight: Tensor) -> None:
        if which == "down":
            out[f"{name}.down_proj.weight"] = weight
        else:
            out[f"{name}.gate_proj.weight"], out[f"{name}.up_proj.weight"] = weight.chunk(2)

    for name, value in state.items():
        found = _STACKED.fullmatch(name)
        if found is None:
            out[name] = value
            continue
        moe, which = found.groups()
        if which == "router":
            out[f"{moe}.gate.weight"] = value
        elif which.startswith("shared."):
            mlp(f"{moe}.shared_experts", which.removeprefix("shared."), value)
        else:
            for e, weight in enumerate(value):
                mlp(f"{moe}.experts.{e}", which, weight)
    return out


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict as :class:`DiTMoE` loads it: stacks of the experts, gates first.

    Raises:
        ValueError: a weight of an expert is missing; names it.
    """
    count: dict[str, int] = {}
    for name in state:
        found = _EXPERT.fullmatch(name)
        if found is not None:
            count[found[1]] = max(count.get(found[1], 0), int(found[2]) + 1)

    def take(name: str) -> Tensor:
        if name not in state:
            raise ValueError(f"from_published: {name} is missing")
        return state[name]

    def up(name: str) -> Tensor:
        return torch.cat([take(f"{name}.{w}.weight") for w in ("gate_proj", "up_proj")])

    out = {k: v for k, v in state.items() if ".moe." not in k}
    for moe, experts in count.items():
        every = [f"{moe}.experts.{e}" for e in range(experts)]
        out[f"{moe}.up"] = torch.stack([up(name) for name in every])
        out[f"{moe}.down"] = torch.stack([take(f"{name}.down_proj.weight") for name in every])
        out[f"{moe}.router"] = take(f"{moe}.gate.weight")
        out[f"{moe}.shared.up"] = up(f"{moe}.shared_experts")
        out[f"{moe}.shared.down"] = take(f"{moe}.shared_experts.down_proj.weight")
    return out
