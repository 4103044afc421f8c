r"""DiffFit: biases, norms and scales of a network are trained, its matrices are not (Xie et al.
2023, arXiv:2304.06648, section 3.2).

    x <- x + gate gamma_attn * Attn(...),    x <- x + gate gamma_ff * FF(...),    gamma = 1 at first

gamma is a scale of every channel of a branch, so that of the branch's last projection y = W z + b:
merged, W <- diag(gamma) W and b <- gamma b. With W frozen, backward needs no input of any linear
layer but that of a norm, and y where there is a gamma:

    db = sum dy,    dgamma = sum dy y
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.adapters.base import Adapter, Hook, Targets, key_of, plain_name, select

# The last projection of attention and feed-forward in our DiT and timm, in diffusers' (and our)
# transformer blocks, and where both share one.
PROJECTIONS = (
    r"(^|\.)(attn\d*\.proj|mlp\.fc2|to_out\.0|to_add_out|ff(_context)?\.net\.2"
    r"|single_transformer_blocks\.\d+\.proj_out)$"
)
_EMBEDDERS = re.compile(r"(^|\.)(y_embedder|class_tokens|class_embedder|class_embedding)\.")


class DiffFit(Adapter):
    """Biases and norms in place, and a scale gamma of every channel of each branch.

    Its file holds all of it. With the two projections of each block, DiT-XL/2 trains 554,144
    values, 0.08 % of its own. The paper counts 0.83 M, 0.12 %; as many, 832,928, are trained with
    ``embedder`` of 101 classes and the null class, and gammas of 7 D a block, such as
    ``targets=["attn.qkv", "mlp.fc1"]`` gives.

    Args:
        network: any module.
        targets: linear layers and convolutions with a gamma, see
            :func:`fastdiff.adapters.select`; None: the last projections of attention and
            feed-forward by their usual names.
        embedder: the class embedder is trained too.

    Raises:
        ValueError: ``targets`` fits no layer, ``embedder`` is asked for and not there, or another
            adapter writes what this one trains.
    """

    method = "difffit"

    def __init__(
        self, network: nn.Module, *, targets: Targets = None, embedder: bool = False
    ) -> None:
        given = targets if targets is None or isinstance(targets, str) else list(targets)
        super().__init__(network, targets=given, embedder=bool(embedder))
        kinds = (nn.Linear, nn.Conv2d)
        found = select(self.method, network, PROJECTIONS if targets is None else targets, kinds)
        self.places: dict[str, Any] = dict(found)
        self.trains = _trained(network, bool(embedder))
        if embedder and not any(_EMBEDDERS.search(n) for n in self.trains):
            raise ValueError(
                f"{self.method}: embedder is {embedder!r}, and {type(network).__name__} has no "
                "class embedder"
            )
        self.gammas = nn.ParameterDict()
        for name, m in self.places.items():
            how = dict(dtype=torch.float32, device=m.weight.device)
            self.gammas[key_of(name)] = nn.Parameter(torch.ones(m.weight.shape[0], **how))
        self.attach()

    @property
    def count(self) -> int:
        """Values that are trained."""
        return sum(p.numel() for p in self.trainable())

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        for name, layer in self.places.items():
            yield layer, self._hook(key_of(name))

    def _hook(self, key: str) -> Hook:
        def scale(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            gamma = self.gammas[key]
            if y.dtype == torch.float64:
                gamma = gamma.double()
            elif gamma.dtype != torch.float32:
                gamma = gamma.to(y.dtype)
            if y.dim() == 1:
                return ops.scale_shift(y[None], gamma)[0]
            return ops.scale_shift(y, gamma, dim=1 if isinstance(layer, nn.Conv2d) else -1)

        return scale

    def parts(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        self.comes_first(self.places.values())
        for name, layer in self.places.items():
            gamma = self.gammas[key_of(name)].detach().clone()

            def times(t: Tensor, gamma: Tensor = gamma) -> Tensor:
                return t * gamma.to(t.dtype).view(-1, *[1] * (t.dim() - 1))

            yield f"{name}.weight", times
            if layer.bias is not None:
                yield f"{name}.bias", times


def _trained(network: nn.Module, embedder: bool) -> list[str]:
    """Names of the parameters that are trained where they are."""
    norms = {
        f"{name}.weight".lstrip(".")
        for name, m in network.named_modules()
        if "Norm" in type(m).__name__
    }
    return [
        plain_name(name)
        for name, _ in network.named_parameters()
        if not re.search(r"(^|\.)lora_", name)
        and (
            name.rpartition(".")[2].endswith("bias")
            or name in norms
            or (embedder and _EMBEDDERS.search(name))
        )
    ]
