"""U-Nets: fused norm and SiLU, convolutions with what surrounds them, channels-last inside.

Channels-last is oneDNN's and cuDNN's layout, and pixels are then tokens without a copy: the first
convolution's output is laid out so, what follows keeps it, and the last one's output goes back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.integrations.rules import Rule, readable, usable, weights_fit


def _same_size(module: Any, x: Tensor) -> bool:
    """A 3x3 convolution of stride 1 that keeps the size."""
    return (
        x.dim() == 4
        and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
        and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
    )


def _plain(module: Any, x: Tensor) -> bool:
    """It keeps the size, and its weights may be read."""
    return readable(module, nn.Conv2d, x) and _same_size(module, x)


def _convolve(
    module: Any,
    x: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """``module(up(x)) + bias + add``; x ``[B, C, H, W]``, bias ``[B, N]``."""
    if _plain(module, x) and all(t is None or t.dtype == x.dtype for t in (bias, add)):
        own = module.bias
        both = own if bias is None else bias if own is None else own + bias
        return ops.conv3x3(x, module.weight, both, add=add, upsample=upsample)
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    y: Tensor = module(x)
    if bias is not None:
        y = y + bias[:, :, None, None]
    return y if add is None else add + y


def resnet(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """``ResnetBlock2D`` with SiLU that keeps the size."""
    x, n1, n2 = input_tensor, self.norm1, self.norm2
    if (
        args
        or kwargs
        or not usable(self, x)
        or type(self.nonlinearity) is not nn.SiLU
        or self.upsample is not None
        or self.downsample is not None
        or self.time_embedding_norm not in ("default", "scale_shift")
        or not readable(n1, nn.GroupNorm, x)
        or not readable(n2, nn.GroupNorm, x)
    ):
        return type(self).forward(self, x, temb, *args, **kwargs)
    h = ops.group_norm_silu(x, n1.num_groups, n1.weight, n1.bias, eps=n1.eps)
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    scale = shift = bias = None
    if self.time_embedding_norm == "scale_shift":
        assert temb is not None
        scale, shift = temb.chunk(2, dim=1)
    else:
        bias = temb
    h = _convolve(self.conv1, h, bias)
    h = ops.group_norm_silu(
        h, n2.num_groups, n2.weight, n2.bias, shift=shift, scale=scale, eps=n2.eps
    )
    x = x if self.conv_shortcut is None else self.conv_shortcut(x)
    out = _convolve(self.conv2, self.dropout(h), add=x)
    return out if self.output_scale_factor == 1 else out / self.output_scale_factor


def upsample(
    self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """``Upsample2D`` to twice the size by nearest neighbours and a 3x3 convolution."""
    x = hidden_states
    if (
        args
        or kwargs
        or not usable(self, x)
        or (output_size is not None and tuple(output_size) != tuple(2 * n for n in x.shape[2:]))
        or not self.use_conv
        or self.use_conv_transpose
        or not self.interpolate
        or self.norm is not None
        or not _plain(self.conv if self.name == "conv" else self.Conv2d_0, x)
    ):
        return type(self).forward(self, x, output_size, *args, **kwargs)
    return _convolve(self.conv if self.name == "conv" else self.Conv2d_0, x, upsample=True)


def conv_in(self: Any, input: Tensor) -> Tensor:
    """A U-Net's first convolution: from here on channels-last."""
    if not usable(self, input):
        return nn.Conv2d.forward(self, input)
    # Not the input: of one channel both layouts are the same to torch.
    return _own(self, input).contiguous(memory_format=torch.channels_last)


def conv_out(self: Any, input: Tensor) -> Tensor:
    """A U-Net's last convolution: contiguous, as its callers know it."""
    if not usable(self, input):
        return nn.Conv2d.forward(self, input)
    return _own(self, input).contiguous()


def _own(self: Any, x: Tensor) -> Tensor:
    """The convolution itself: inside of its ``forward``, whoever wraps that."""
    if _same_size(self, x) and weights_fit(self, x):
        return ops.conv3x3(x, self.weight, self.bias)
    return nn.Conv2d.forward(self, x)


def pointwise(self: Any, input: Tensor) -> Tensor:
    """A 1x1 convolution: a linear layer over pixels, where they are tokens (channels-last)."""
    x = input
    if (
        not usable(self, x)
        or x.dim() != 4
        or not x.is_contiguous(memory_format=torch.channels_last)
        or not weights_fit(self, x)
    ):
        return nn.Conv2d.forward(self, x)
    return ops.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def parts(unet: nn.Module) -> dict[nn.Module, tuple[str, Rule]]:
    """Rules of single convolutions of a U-Net: its first and last, and those of 1x1."""
    found: dict[nn.Module, tuple[str, Rule]] = {}
    for module in unet.modules():
        if type(module) is nn.Conv2d and (
            (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0))
            and module.groups == 1
        ):
            found[module] = "linear", pointwise
    for name, rule in (("conv_in", conv_in), ("conv_out", conv_out)):
        if type(getattr(unet, name, None)) is nn.Conv2d:
            found[getattr(unet, name)] = "conv3x3 and channels-last memory", rule
    return found


RULES: dict[str, tuple[str, Rule]] = {
    "diffusers.models.resnet.ResnetBlock2D": ("group_norm_silu and conv3x3", resnet),
    "diffusers.models.upsampling.Upsample2D": ("conv3x3", upsample),
}
UNETS = {
    "diffusers.models.unets.unet_2d.UNet2DModel",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
}
