r"""REPA: hidden tokens of a diffusion transformer that agree with those of an encoder of images
(Yu et al. 2024, arXiv:2410.06940, section 3.2).

    L = L_diffusion + lambda L_align,    L_align = -mean_n cos(head(h)_n, z_n)

h are the tokens after one block (the paper's best: 8 of 28), head an MLP of three layers and SiLU,
z the encoder's tokens of the clean image, lambda 0.5. The head is not part of sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.adapters.tap import Tap, whole

_TINY = 1e-12  # least length of a token, as the direction of 0 is none


def alignment_loss(z: Tensor, target: Tensor) -> Tensor:
    """Minus the mean cosine over tokens: -1 where all point as the target does.

    Args:
        z: ``[..., E]``; float16, bfloat16, float32 or float64.
        target: as ``z``; no gradient goes there.

    Returns:
        A scalar, float32 (float64 for float64); tokens of length 0 count as cosine 0.

    Raises:
        ValueError: shapes differ, or there is no token.
    """
    if z.shape != target.shape or z.dim() < 1 or not z.numel():
        raise ValueError(
            f"alignment_loss: target has shape {list(target.shape)}, need that of z, "
            f"{list(z.shape)}, and a token at least"
        )
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    unit = F.normalize(target.detach().to(wide), dim=-1, eps=_TINY)
    return -(F.normalize(z.to(wide), dim=-1, eps=_TINY) * unit).sum(-1).mean()


class Repa(Tap):
    """The projector of REPA, on the tokens after a block.

    The network is trained as ever, beside it::

        repa = Repa(model, block=8, encoder_dim=768)
        loss = diffusion_loss(model(x, t, y)) + 0.5 * repa.loss(encoder_tokens)

    Args:
        network: any network with a block whose output is ``[B, N, D]`` tokens.
        block: the number of the block, or a module's name.
        encoder_dim: E of the encoder's tokens.
        hidden: width of the head.
        dim: D; None: as the block says.

    Raises:
        ValueError: an argument does not fit, or the block does not say its width.
    """

    method = "repa"
    head: Any

    def __init__(
        self,
        network: nn.Module,
        block: int | str,
        encoder_dim: int,
        hidden: int = 2048,
        *,
        dim: int | None = None,
    ) -> None:
        whole(self.method, encoder_dim=encoder_dim, hidden=hidden)
        super().__init__(network, block, encoder_dim=encoder_dim, hidden=hidden, dim=dim)
        width = _width(self.block[0]) if dim is None else dim
        if width is None:
            raise ValueError(
                f"{self.method}: dim is None and {type(self.block[0]).__name__} does not say its "
                "width, need dim"
            )
        whole(self.method, dim=width)
        device = next(network.parameters()).device
        self.head = nn.Sequential(
            nn.Linear(width, hidden, device=device), nn.SiLU(),
            nn.Linear(hidden, hidden, device=device), nn.SiLU(),
            nn.Linear(hidden, encoder_dim, device=device),
        )  # fmt: skip
        self.attach()

    def project(self, h: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` -> ``[B, N, E]``, in the dtype of the head."""
        out: Tensor = self.head(h.to(self.head[0].weight.dtype))
        return out

    def loss(self, target: Tensor) -> Tensor:
        """:func:`alignment_loss` of the network's last call with the encoder's tokens.

        Args:
            target: ``[B, N, E]``, the encoder's tokens, as many as the block's and in their order.

        Raises:
            ValueError: the shape differs, or there was no call before (see :meth:`Tap.take`).
        """
        return alignment_loss(self.project(self.take()), target)


def _width(block: Any) -> int | None:
    """D of a block's tokens: of diffusers' blocks, of ours, or of its first norm."""
    for find in (
        lambda: block.dim,
        lambda: block.attn.qkv.in_features,
        lambda: block.attn1.to_q.in_features,
        lambda: block.norm1.normalized_shape[-1],
    ):
        try:
            found = find()
        except (AttributeError, TypeError):
            continue
        if isinstance(found, int):
            return found
    return None
