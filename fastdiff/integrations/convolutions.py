"""U-Nets: residual blocks with fused norm and SiLU, everything channels-last inside.

Channels-last is oneDNN's and cuDNN's layout, and pixels are then tokens without a copy: the first
convolution's input is laid out so, what follows keeps it, and the last one's output goes back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.integrations.rules import Rule, readable, usable


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
    h = self.conv1(ops.group_norm_silu(x, n1.num_groups, n1.weight, n1.bias, eps=n1.eps))
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    scale = shift = None
    if self.time_embedding_norm == "scale_shift":
        assert temb is not None
        scale, shift = temb.chunk(2, dim=1)
    elif temb is not None:
        h = h + temb[:, :, None, None]
    h = ops.group_norm_silu(
        h, n2.num_groups, n2.weight, n2.bias, shift=shift, scale=scale, eps=n2.eps
    )
    h = self.conv2(self.dropout(h))
    out = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h
    return out if self.output_scale_factor == 1 else out / self.output_scale_factor


def conv_in(self: Any, input: Tensor) -> Tensor:
    """A U-Net's first convolution: from here on channels-last."""
    if usable(self, input):
        input = input.contiguous(memory_format=torch.channels_last)
    return nn.Conv2d.forward(self, input)


def conv_out(self: Any, input: Tensor) -> Tensor:
    """A U-Net's last convolution: contiguous, as its callers know it."""
    out = nn.Conv2d.forward(self, input)
    return out.contiguous() if usable(self, input) else out


RULES: dict[str, tuple[str, Rule]] = {
    "diffusers.models.resnet.ResnetBlock2D": ("group_norm_silu", resnet),
}
ENDS: dict[str, Rule] = {"conv_in": conv_in, "conv_out": conv_out}
UNETS = {
    "diffusers.models.unets.unet_2d.UNet2DModel",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
}
