"""Weight gradients at some positions (SaRA), of linear layers of DiT-XL/2 and SD's U-Net and of its
3x3 convolution, against the dense gradient with a mask and against torch's sampled product."""

from __future__ import annotations

import warnings

import torch
from _case import Case
from torch import Tensor
from torch.nn import functional as F

from fastdiff.ops import SparseIndex, sparse_conv2d_weight_grad, sparse_weight_grad


def _linear(
    tokens: int, out: int, width: int, density: float, dtype: torch.dtype, block: int = 1
) -> Case:
    grad, x = torch.randn(tokens, out).to(dtype), torch.randn(tokens, width).to(dtype)
    blocks = torch.rand(out // block, width // block) < density
    index = SparseIndex.of_blocks(blocks, (block, block))
    mask = torch.zeros(out, width, dtype=dtype)
    mask.view(-1)[index.linear.flatten()] = 1

    def masked() -> Tensor:
        return grad.t() @ x * mask

    baselines = {"masked": masked, "dense alone": lambda: grad.t() @ x}
    if block == 1 and dtype == torch.float32:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's CSR is in beta
            given = torch.zeros(index.count, dtype=dtype)
            pattern = torch.sparse_csr_tensor(index.crow, index.col, given, (out, width))
        baselines["sampled_addmm"] = lambda: torch.sparse.sampled_addmm(
            pattern, grad.t(), x, beta=0.0
        ).values()
    main = density == 0.05 and block == 1 and dtype == torch.float32
    what = f" in blocks of {block}x{block}" if block > 1 else ""
    return Case(
        f"[{tokens}, {out}] [{tokens}, {width}] {100 * density:.0f} %{what} {str(dtype)[6:]}",
        lambda: sparse_weight_grad(grad, x, index),
        baselines,
        flops=2.0 * tokens * index.count,
        target=3.0 if main else None,
        vs="masked",
        also={"sampled_addmm": 2.5} if main else {},
        comparable=False,  # the dense one in another form
    )


def _conv(batch: int, channels: int, side: int, density: float, last: bool) -> Case:
    shape = (channels, channels, 3, 3)
    grad, x = (torch.randn(batch, channels, side, side) for _ in range(2))
    if last:
        grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    index = SparseIndex.of_mask(torch.rand(shape) < density)
    weight = torch.randn(shape, requires_grad=True)
    mask = torch.zeros(shape)
    mask.view(-1)[index.linear] = 1
    y = F.conv2d(x, weight, padding=1)

    def dense() -> Tensor:
        return torch.autograd.grad(y, weight, grad, retain_graph=True)[0]

    return Case(
        f"3x3 {list(x.shape)} {100 * density:.0f} %{' channels-last' if last else ''} float32",
        lambda: sparse_conv2d_weight_grad(grad, x, index, padding=1),
        {"masked": lambda: dense() * mask, "dense alone": dense},
        flops=2.0 * batch * side**2 * index.count,
        vs="masked",
        comparable=False,
    )


def cases() -> list[Case]:
    found = []
    for sizes in ((512, 1152, 1152), (2048, 640, 640)):
        found += [_linear(*sizes, part, torch.float32) for part in (0.05, 0.01, 0.1, 0.2)]
        found.append(_linear(*sizes, 0.05, torch.float32, 16))
        found.append(_linear(*sizes, 0.05, torch.bfloat16))
    return [*found, _conv(2, 320, 64, 0.05, False), _conv(2, 320, 64, 0.05, True)]
