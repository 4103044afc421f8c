r"""MoDE: a diffusion policy whose experts are chosen by the noise level (Reuss et al. 2024,
arXiv:2412.12953, section 4), with the preconditioning of EDM (Karras et al. 2022,
arXiv:2206.00364, table 1).

Tokens are [sigma, goal, state.., action..]. With c = L_2 L_1 (log sigma / 4), n_1 and n_2 the RMS
norms of a block, and p = max(softmax(R c), 1e-9),

    x <- x + attention(n_1(x) + c)              causal, queries and keys RMS-normalised by head
    x <- n_2(x) + sum_j g_j E_(i_j)(n_2(x))     around the normalised x; g the k largest p, sum 1
    D(a; s) = c_skip a + c_out F(c_in a; s)

The router R sees c alone, so that all tokens of a sample go to the same experts, known before a run
begins: :meth:`MoDE.cache`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models._embed import weight_dtype
from fastdiff.models.expert_cache import ExpertCache
from fastdiff.models.expert_store import ExpertStore
from fastdiff.nn import MoE, Weights, layers
from fastdiff.ops._check import check_tensor

EPS = 1e-6  # of every norm
LEAST = 1e-9  # of a probability


class Cost(NamedTuple):
    """Multiply-adds of one call."""

    attention: int  # projections, scores and sums
    experts: int
    routers: int
    rest: int  # embeddings, the condition and the last layer

    @property
    def total(self) -> int:
        return sum(self)


def _wide(layer: Any, x: Tensor) -> Tensor:
    """A linear layer in the dtype of ``x``, its weights converted; listeners get their own."""
    if layers.quiet(layer, nn.Linear):
        return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
    y: Tensor = layer(x.to(layer.weight.dtype))
    return y.to(x.dtype)


class _Router(nn.Module):
    def __init__(self, width: int, experts: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, experts)

    def forward(self, c: Tensor) -> Tensor:
        """``[B, C]`` -> logits ``[B, E]``, whose softmax is p over its sum; in float32."""
        wide = torch.promote_types(c.dtype, torch.float32)
        first, second = self.fc1, self.fc2
        with torch.autocast(c.device.type, enabled=False):
            logits = _wide(second, F.gelu(_wide(first, c.to(wide))))
        return logits.softmax(1).clamp(min=LEAST).log()


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, experts: int, k: int):
        super().__init__()
        self.norm1 = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Parameter(torch.ones(width // heads))
        self.k_norm = nn.Parameter(torch.ones(width // heads))
        self.proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.Parameter(torch.ones(width))
        self.router = _Router(width, experts)
        self.moe = MoE(
            width, 4 * width, experts, k,
            activation="swishglu", renormalise=True, bias="up", router=False,
        )  # fmt: skip


class MoDE(nn.Module):
    """A policy: from states and a goal to a chunk of actions.

    Args:
        state_dim, goal_dim, action_dim: values of a state token, of a goal, of an action.
        width: C; depth: blocks; num_heads: of an attention.
        experts: E of a block; k: of a noise level.
        chunk: actions of a call; goals: goal tokens.
        causal: tokens look back only. (The authors' code declares it and leaves it off.)
        sigma_data, sigma_min, sigma_max: of EDM.

    Raises:
        ValueError: ``width`` does not fit ``num_heads``, or another argument does not fit.
    """

    blocks: Any

    def __init__(
        self,
        state_dim: int,
        goal_dim: int,
        action_dim: int,
        *,
        width: int = 1024,
        depth: int = 12,
        num_heads: int = 8,
        experts: int = 4,
        k: int = 2,
        chunk: int = 10,
        goals: int = 1,
        causal: bool = True,
        sigma_data: float = 0.5,
        sigma_min: float = 0.001,
        sigma_max: float = 80.0,
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"MoDE: width is {width}, need a multiple of num_heads {num_heads}")
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"MoDE: sigma_min is {sigma_min}, need above 0, below {sigma_max}")
        self.config: dict[str, Any] = dict(
            state_dim=state_dim, goal_dim=goal_dim, action_dim=action_dim, width=width,
            depth=depth, num_heads=num_heads, experts=experts, k=k, chunk=chunk, goals=goals,
            causal=causal, sigma_data=sigma_data, sigma_min=sigma_min, sigma_max=sigma_max,
        )  # fmt: skip
        self.num_heads, self.experts, self.k = num_heads, experts, k
        self.chunk, self.goals, self.causal = chunk, goals, causal
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.sigma_emb = nn.Linear(1, width)
        self.sigma_linear = nn.Linear(width, width, bias=False)
        self.state_emb = nn.Linear(state_dim, width, bias=False)
        self.goal_emb = nn.Linear(goal_dim, width, bias=False)
        self.action_emb = nn.Linear(action_dim, width, bias=False)
        # Of the goals, then of the actions; states stand where the first action does.
        self.pos_emb = nn.Parameter(torch.zeros(1, goals + chunk, width))
        self.blocks = nn.ModuleList(_Block(width, num_heads, experts, k) for _ in range(depth))
        self.norm = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, action_dim)
        nn.init.normal_(self.pos_emb, std=0.02)

    def condition(self, sigma: Tensor) -> Tensor:
        """c ``[B, C]`` of levels ``[B]``."""
        t = (sigma.log() / 4).to(weight_dtype(self))[:, None]
        return layers.linear(self.sigma_linear, layers.linear(self.sigma_emb, t))

    def routing_weights(self) -> tuple[Tensor, ...]:
        """Parameters that decide on the experts of a level."""
        return tuple(p for layer in self.routing_layers() for p in layer.parameters())

    def routing_layers(self) -> tuple[nn.Module, ...]:
        """Layers that decide on the experts of a level."""
        routers = [layer for b in self.blocks for layer in (b.router.fc1, b.router.fc2)]
        return self.sigma_emb, self.sigma_linear, *routers

    def logits(self, c: Tensor) -> list[Tensor]:
        """Of every block, ``[B, E]``."""
        return [block.router(c) for block in self.blocks]

    def _check(self, x: Tensor, sigma: Any, state: Tensor, goal: Tensor | None) -> None:
        check_tensor("MoDE", "x", x, dim=3)
        batch, c = x.shape[0], self.config
        if x.shape[1:] != (self.chunk, c["action_dim"]):
            raise ValueError(
                f"MoDE: x has shape {list(x.shape)}, need [B, {self.chunk}, {c['action_dim']}]"
            )
        if isinstance(sigma, Tensor):
            if sigma.shape != (batch,):
                raise ValueError(
                    f"MoDE: sigma has shape {list(sigma.shape)}, need [{batch}], a level for each "
                    "sample, or a float for all"
                )
        elif not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
            raise ValueError(f"MoDE: sigma is {sigma!r}, need a number above 0 or a tensor")
        check_tensor("MoDE", "state", state, dim=3)
        if state.shape[0] != batch or state.shape[2] != c["state_dim"]:
            raise ValueError(
                f"MoDE: state has shape {list(state.shape)}, need [{batch}, S, {c['state_dim']}]"
            )
        need = (batch, self.goals, c["goal_dim"])
        if goal is not None and goal.shape != need:
            raise ValueError(f"MoDE: goal has shape {list(goal.shape)}, need {list(need)}")

    def _attend(self, block: Any, h: Tensor, mask: Tensor | None) -> Tensor:
        b, n, d = h.shape
        qkv = layers.linear(block.qkv, h)
        q, k, v = qkv.view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = ops.qk_norm_rope(q, k, block.q_norm, block.k_norm, eps=EPS)
        out = ops.attention(q, k, v, bias=mask)
        assert isinstance(out, Tensor)
        return layers.linear(block.proj, out.transpose(1, 2).reshape(b, n, d))

    def _tokens(self, x: Tensor, c: Tensor, state: Tensor, goal: Tensor | None) -> Tensor:
        dtype, at = c.dtype, self.goals
        parts = [c.expand(x.shape[0], -1)[:, None]]
        place = self.pos_emb[:, :at]
        if goal is None:  # the embedding has no bias: what goals of 0 give
            parts.append(place.expand(x.shape[0], -1, -1))
        else:
            parts.append(layers.linear(self.goal_emb, goal.to(dtype)) + place)
        parts.append(layers.linear(self.state_emb, state.to(dtype)) + self.pos_emb[:, at : at + 1])
        parts.append(layers.linear(self.action_emb, x.to(dtype)) + self.pos_emb[:, at:])
        return torch.cat(parts, 1)

    def network(
        self,
        x: Tensor,
        levels: Tensor,
        state: Tensor,
        goal: Tensor | None,
        routings: Callable[[int], Sequence[ops.Routing]] | None,
        fetch: Callable[[], Weights] | None,
    ) -> Tensor:
        """F: ``x [B, A, action_dim]`` at ``levels [B or 1]``. ``routings`` gives those of every
        block for a number of tokens, ``fetch`` the chosen experts' weights, block after block."""
        c = self.condition(levels)
        h = self._tokens(x, c, state, goal)
        b, n, d = h.shape
        mask = None
        if self.causal:
            mask = h.new_full((1, 1, n, n), -torch.inf).triu(1)
        found = None if routings is None else routings(b * n)
        for i, block in enumerate(self.blocks):
            normed = F.rms_norm(h, (d,), block.norm1, EPS)
            h = h + self._attend(block, normed + c[:, None], mask)
            normed = F.rms_norm(h, (d,), block.norm2, EPS)
            tokens = normed.reshape(b * n, d)
            if found is None:
                logits = block.router(c)
                routing = block.moe.route(
                    tokens, logits.new_zeros(b * n, self.experts), sample_logits=logits
                )
            else:
                routing = found[i]
            weights = None
            if fetch is not None:
                weights = fetch()
                ends = torch.arange(self.k + 1, device=h.device) * (b * n)
                routing = routing._replace(offsets=ends)
            h = normed + block.moe.experts_of(tokens, routing, weights).view(b, n, d)
        h = F.rms_norm(h[:, n - self.chunk :], (d,), self.norm, EPS)
        return layers.linear(self.out, h)

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor,
        state: Tensor,
        goal: Tensor | None = None,
        *,
        cache: ExpertCache | None = None,
        fetch: Callable[[], Weights] | None = None,
    ) -> Tensor:
        """D: the actions that the noisy ``x`` comes from.

        Args:
            x: ``[B, A, action_dim]``.
            sigma: the noise level of all samples, or ``[B]`` of each.
            state: ``[B, S, state_dim]``.
            goal: ``[B, goals, goal_dim]``; None for zeros, no goal.
            cache: of :meth:`cache`; levels are then numbers, or a tensor on the CPU.
            fetch: weights of the chosen experts, as a run of an ``ExpertStore`` gives them.

        Returns:
            As ``x``, float32 or wider.

        Raises:
            ValueError: an argument does not fit, or ``cache`` is stale or lacks a level.
        """
        self._check(x, sigma, state, goal)
        if fetch is not None and (cache is None or isinstance(sigma, Tensor)):
            raise ValueError("MoDE: fetch is given, need a cache and one level for all samples")
        routings = None if cache is None else cache.lookup(self, sigma)
        levels = (
            sigma.to(x.device, torch.float32)
            if isinstance(sigma, Tensor)
            else torch.full((1,), sigma, dtype=torch.float32, device=x.device)
        )
        wide, data = torch.promote_types(x.dtype, torch.float32), self.sigma_data
        s = levels.to(wide)[:, None, None]
        total = s.square() + data**2
        x = x.to(wide)
        found = self.network(x * total.rsqrt(), levels, state, goal, routings, fetch)
        return data**2 / total * x + s * data * total.rsqrt() * found.to(wide)

    def levels(self, steps: int) -> list[float]:
        """The noise levels of a run: exponential, ``sigma_max`` to ``sigma_min``, float32."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"MoDE: steps is {steps!r}, need an integer of at least 1")
        with torch.device("cpu"):
            ends = math.log(self.sigma_max), math.log(self.sigma_min)
            levels = torch.linspace(*ends, steps, dtype=torch.float64).exp().float()
        found: list[float] = levels.tolist()
        return found

    def cache(self, sigmas: Sequence[float] | None = None) -> ExpertCache:
        """The experts of levels (None: of a run of 10 steps), computed once."""
        return ExpertCache(self, self.levels(10) if sigmas is None else sigmas)

    @torch.no_grad()
    def act(
        self,
        state: Tensor,
        goal: Tensor | None = None,
        *,
        steps: int = 10,
        seed: int = 0,
        noise: Tensor | None = None,
        cache: ExpertCache | None = None,
        store: ExpertStore | None = None,
    ) -> Tensor:
        """A chunk of actions by DDIM: ``x <- (s' / s) x + (1 - s' / s) D(x; s)``, s' = 0 at last.

        Args:
            state: ``[B, S, state_dim]``; goal: as in a call.
            steps: calls of the network.
            seed: of the noise, which is the same on every device; or
            noise: of standard deviation 1, ``[B, A, action_dim]``.
            cache: of :meth:`cache` for ``levels(steps)``.
            store: experts on disk; the run reads ahead what ``cache`` says it will need.

        Returns:
            ``[B, A, action_dim]``, float32.

        Raises:
            ValueError: an argument does not fit.
        """
        check_tensor("MoDE", "state", state, dim=3)
        if noise is None:
            g = torch.Generator().manual_seed(seed)
            shape = (state.shape[0], self.chunk, self.config["action_dim"])
            noise = torch.randn(shape, generator=g).to(state.device)
        levels = self.levels(steps)
        scope: AbstractContextManager[Any] = nullcontext()
        if store is not None:
            if cache is None:
                raise ValueError("MoDE: store is given without cache, which says what it reads")
            plan = [key for s in levels for key in enumerate(cache.chosen(s))]
            scope = store.run(plan, state.device)
        x = levels[0] * noise.float()
        with scope as fetch:
            for s, after in pairwise([*levels, 0.0]):
                found = self(x, s, state, goal, cache=cache, fetch=fetch)
                x = torch.lerp(found, x, after / s)
        return x

    def cost(
        self, batch: int = 1, states: int = 1, *, levels: int = 1, cached: bool = False
    ) -> Cost:
        """Multiply-adds of a call with ``levels`` different rows of sigma (1: a number)."""
        c, d, depth = self.config, self.config["width"], len(self.blocks)
        n = 1 + self.goals + states + self.chunk
        tokens = batch * n
        values = self.goals * c["goal_dim"] + states * c["state_dim"]
        values += 2 * self.chunk * c["action_dim"]  # in and out
        return Cost(
            attention=depth * tokens * (4 * d * d + 2 * n * d),
            experts=depth * tokens * self.k * 3 * d * 4 * d,
            routers=0 if cached else depth * levels * 2 * d * (d + self.experts),
            rest=batch * values * d + levels * (d + d * d),
        )
