r"""DiT: a diffusion transformer with adaLN-Zero (Peebles & Xie 2023, arXiv:2212.09748, section 3).

With c = MLP(t) + class embedding and (shift, scale, gate)_{1,2} = W_n silu(c) per block n,

    x <- x + gate_1 * attention(LN(x) (1 + scale_1) + shift_1)
    x <- x + gate_2 * MLP(LN(x) (1 + scale_2) + shift_2)

Each gated residual is one kernel with the normalisation after it, across blocks too: the gate of
block n's MLP runs with the first norm of block n+1. Parameter names are those of the published
checkpoints (``blocks.0.attn.qkv.weight``, ...).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models._embed import check_inputs, sincos_2d, timestep_embedding, weight_dtype
from fastdiff.nn import layers

EPS = 1e-6  # of every LayerNorm
FREQUENCIES = 256  # width of the sinusoidal time embedding

PRESETS = {
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}


class _Attention(layers.Attention):
    def __init__(self, dim: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)


class _Block(nn.Module):
    adaLN_modulation: Any

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        self.attn = _Attention(dim)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h: Tensor) -> Tensor:
        """Called with the tokens after the block, ``[B, N, D]``: for hooks, which may change them.
        The block itself is computed by the network, across blocks."""
        return h


class DiT(nn.Module):
    """Class-conditional diffusion transformer.

    Args:
        input_size: height and width of the stored position table; other sizes work at call time,
            from a table on the host, so not in a captured step.
        patch_size: 2, 4 or 8 (any divisor of the input).
        in_channels: C of the input.
        hidden_size: width D, a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: classes; class ``num_classes`` is the null class of guidance.
        learn_sigma: the network also predicts C channels of variance: 2C out.
        prediction: what the first C channels are: "flow" (noise - data) or "eps" (noise).
        box_size: pixels, a multiple of the patch. Above 0 the condition is a layout ``[B, K, 3]``:
            class, top and left of K boxes of this size. Every token whose centre lies in a box
            gets the embedding of its class at its own place in the box; the modulations depend on
            the time alone.
    """

    x_embedder: Any
    t_embedder: Any
    y_embedder: Any
    blocks: Any
    final_layer: Any

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        prediction: str = "eps",
        box_size: int = 0,
    ):
        super().__init__()
        if box_size % patch_size:
            raise ValueError(
                f"DiT: box_size is {box_size}, need a multiple of patch_size {patch_size}"
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"DiT: hidden_size is {hidden_size}, "
                f"need a multiple of 4 and of num_heads {num_heads}"
            )
        if input_size % patch_size:
            raise ValueError(
                f"DiT: input_size is {input_size}, need a multiple of patch_size {patch_size}"
            )
        if prediction not in ("flow", "eps"):
            raise ValueError(f"DiT: prediction is {prediction!r}, need 'flow' or 'eps'")
        self.config: dict[str, Any] = dict(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            prediction=prediction,
        )
        if box_size:
            self.config["box_size"] = box_size
        self.box_size = box_size
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.num_heads = in_channels, num_heads
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes, self.prediction = num_classes, prediction
        d = hidden_size
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(in_channels, d, patch_size, patch_size)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(FREQUENCIES, d), nn.SiLU(), nn.Linear(d, d))
        self.y_embedder = nn.Module()
        # A row for every class, or for every class at every place in a box, and one for none.
        places = (box_size // patch_size) ** 2 if box_size else 1
        self.y_embedder.embedding_table = nn.Embedding(num_classes * places + 1, d)
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, d), requires_grad=False)
        self.blocks = nn.ModuleList(_Block(d, mlp_ratio) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(d, patch_size**2 * self.out_channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self.reset_parameters()

    @classmethod
    def preset(cls, name: str, **config: Any) -> DiT:
        """``DiT.preset("DiT-XL/2")``: sizes S, B, L, XL of the paper's table 1, patch 2, 4 or 8."""
        size, _, patch = name.removeprefix("DiT-").partition("/")
        if size not in PRESETS or patch not in ("2", "4", "8"):
            raise ValueError(f"DiT: preset is {name!r}, need DiT-S, B, L or XL and /2, /4 or /8")
        return cls(**{**PRESETS[size], "patch_size": int(patch), **config})

    def reset_parameters(self) -> None:
        """adaLN-Zero: every block starts as the identity, the output as 0 (section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.pos_embed.shape[-1], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        # Added to the tokens, beside positions of size 1, a box must stand out.
        std = 0.2 if self.box_size else 0.02
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=std)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        grid = self.input_size // self.patch_size
        with torch.no_grad():
            self.pos_embed.copy_(sincos_2d(grid, grid, self.pos_embed.shape[-1]))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position table of a grid of patches, ``[1, rows*columns, D]``."""
        if rows == columns == self.input_size // self.patch_size:
            return self.pos_embed
        return sincos_2d(rows, columns, self.pos_embed.shape[-1]).to(self.pos_embed)

    def embed(self, x: Tensor) -> Tensor:
        """Patches with positions: ``[B, C, H, W]`` -> ``[B, N, D]``."""
        p = self.patch_size
        b, c, h, w = x.shape
        # The patch convolution has stride p, so it is one product over [C*p*p] values a patch.
        patches = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(b, (h // p) * (w // p), c * p * p)
        proj = self.x_embedder.proj
        if layers.quiet(proj, nn.Conv2d):
            tokens = ops.linear(patches, proj.weight.flatten(1), proj.bias)
        else:
            tokens = proj(x).flatten(2).transpose(1, 2)
        return tokens + self.positions(h // p, w // p)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """silu of the condition vector, ``[B, D]``: what every modulation starts from."""
        first, _, second = self.t_embedder.mlp
        frequencies = timestep_embedding(t, FREQUENCIES).to(weight_dtype(self))
        h = layers.linear(second, F.silu(layers.linear(first, frequencies)))
        return F.silu(h if self.box_size else h + self.y_embedder.embedding_table(y))

    def layout(self, y: Tensor, rows: int, columns: int) -> Tensor:
        """Embeddings of the boxes ``y [B, K, 3]`` at a grid of tokens, ``[B, rows*columns, D]``.
        Where boxes overlap the last one counts."""
        p, cells = self.patch_size, self.box_size // self.patch_size
        kind, top, left = y[..., None, None].unbind(2)  # [B, K, 1, 1]
        # The cell of a box in which a token's centre, at (i + 1/2) p, lies.
        row = (torch.arange(rows, device=y.device)[:, None] * p + p // 2 - top).div(
            p, rounding_mode="floor"
        )
        column = (torch.arange(columns, device=y.device) * p + p // 2 - left).div(
            p, rounding_mode="floor"
        )
        inside = (kind < self.num_classes) & (row >= 0) & (row < cells)
        inside = inside & (column >= 0) & (column < cells)  # [B, K, rows, columns]
        entry = (kind * cells + row) * cells + column
        found = torch.full_like(entry[:, 0], self.num_classes * cells * cells)  # none
        for k in range(y.shape[1]):
            found = torch.where(inside[:, k], entry[:, k], found)
        return self.y_embedder.embedding_table(found.flatten(1))

    def unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """``[B, N, p*p*C]`` -> ``[B, C, H, W]``."""
        p = self.patch_size
        grid = tokens.unflatten(2, (p, p, self.out_channels)).unflatten(
            1, (height // p, width // p)
        )
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(grid), self.out_channels, height, width)

    def attend(self, block: _Block, h: Tensor) -> Tensor:
        """Self-attention of one block: ``[B, N, D]`` -> ``[B, N, D]``."""
        b, n, d = h.shape
        out = self.attention(block, *self.heads(block, h)).transpose(1, 2).reshape(b, n, d)
        return layers.linear(block.attn.proj, out)

    def heads(self, block: _Block, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of one block: ``[B, N, D]`` -> ``[B, H, N, D/H]`` each."""
        b, n, d = h.shape
        qkv = layers.linear(block.attn.qkv, h)
        q, k, v = qkv.view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attention(self, block: _Block, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """Softmax attention of one block: ``[B, H, N, D/H]`` each, and as much out."""
        return layers.attention(block.attn, q, k, v)

    def mlp(self, block: _Block, h: Tensor) -> Tensor:
        """Feed-forward of one block: ``[B, N, D]`` -> ``[B, N, D]``."""
        return layers.linear(block.mlp.fc2, layers.linear(block.mlp.fc1, h, "gelu_tanh"))

    def layers(
        self, h: Tensor, normed: Tensor, mods: list[Tensor], start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Blocks ``start`` to ``stop``: tokens ``h [B, N, D]`` and their next norm, modulated."""
        for i in range(2 * start, 2 * stop):
            half = self.mlp if i % 2 else self.attend
            gate, shift, scale = mods[3 * i + 2 : 3 * i + 5]
            update = half(self.blocks[i // 2], normed)
            reader = self._reader(i + 1) if i + 1 < 2 * stop else None
            h, normed = layers.gate_norm_modulate(reader, h, update, gate, shift, scale, EPS)
            if i % 2 and (after := self.blocks[i // 2](h)) is not h:
                h, normed = after, ops.layer_norm_modulate(after, shift, scale, eps=EPS)
        return h, normed

    def _reader(self, i: int) -> Any:
        """The layer that alone reads the norm before half block ``i``; None where a subclass or
        a policy has a half of its own."""
        mine = ("mlp",) if i % 2 else ("attend", "heads")
        if any(n in self.__dict__ or getattr(type(self), n) is not getattr(DiT, n) for n in mine):
            return None
        block = self.blocks[i // 2]
        return block.mlp.fc1 if i % 2 else block.attn.qkv

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict from noisy ``x``.

        Args:
            x: ``[B, C, H, W]``; H and W multiples of the patch.
            t: ``[B]``, times in 0..1000.
            y: ``[B]`` int64, classes; ``num_classes`` for none. With ``box_size`` a layout ``[B, K,
                3]`` int64: class, top and left (pixels) of each box; ``num_classes`` for no box.

        Returns:
            ``[B, C, H, W]``, or ``[B, 2C, H, W]`` with ``learn_sigma``; the dtype of ``x``.

        Raises:
            ValueError: a shape, dtype or class (checked on the CPU) does not fit.
        """
        check_inputs(
            "DiT",
            x,
            t,
            y,
            channels=self.in_channels,
            multiple=self.patch_size,
            classes=self.num_classes,
            layout=self.box_size > 0,
        )
        height, width = x.shape[2:]
        c = self.condition(t, y)
        h = self.embed(x.to(c.dtype))
        if self.box_size:
            h = h + self.layout(y, height // self.patch_size, width // self.patch_size)
        mods: list[Tensor] = []
        for block in self.blocks:
            mods += layers.linear(block.adaLN_modulation[1], c).chunk(6, dim=-1)
        mods += layers.linear(self.final_layer.adaLN_modulation[1], c).chunk(2, dim=-1)
        # mods: shift, scale of norm 0, then (gate i, shift i+1, scale i+1) for every half block i
        normed = ops.layer_norm_modulate(h, mods[0], mods[1], eps=EPS)
        h, normed = self.layers(h, normed, mods, 0, len(self.blocks))
        out = layers.linear(self.final_layer.linear, normed)
        return self.unpatchify(out, height, width).to(x.dtype)
