r"""Classification with the features of a denoiser (Mukhopadhyay et al. 2023, arXiv:2307.08702).

    x_t = alpha_t x + sigma_t eps,   f = pool(block_b(x_t, t)),   logits = W (f - mean) / std + b

The network stops after block b: what comes later is not computed. Only the linear probe is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.engine.request import current
from fastdiff.methods.taps import outputs
from fastdiff.ops.fused_step import Noise, philox_normal
from fastdiff.samplers import VP, Flow, Schedule
from fastdiff.samplers.run import START_STREAM

LISTS = ("blocks", "transformer_blocks", "layers")  # where transformers keep their blocks
Block = int | str


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks in the order in which they run: of a transformer its list of blocks, of a U-Net
    every residual block with the attention after it.

    Raises:
        ValueError: the network has none that are known.
    """
    for name in LISTS:
        found = getattr(network, name, None)
        if isinstance(found, nn.ModuleList):
            return list(found)
    down, mid, up = (getattr(network, f"{part}_blocks", None) for part in ("down", "mid", "up"))
    mid = getattr(network, "mid_block", mid)
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList):
        raise ValueError(
            f"features: {type(network).__name__} has no list of blocks, need block as a name"
        )

    def layers(stage: Any) -> Iterator[nn.Module]:
        attentions = list(getattr(stage, "attentions", ()))
        for i, resnet in enumerate(stage.resnets):
            yield attentions[i] if i < len(attentions) else resnet

    stages = [*down, *([] if mid is None else [mid]), *up]
    return [layer for stage in stages for layer in layers(stage)]


def _find(network: nn.Module, block: Block) -> nn.Module:
    if isinstance(block, str):
        named = dict(network.named_modules())
        if not block or block not in named:
            raise ValueError(f"features: block is {block!r}, need a number or a module's name")
        one: nn.Module = named[block]
        return one
    blocks = blocks_of(network)
    if isinstance(block, bool) or not isinstance(block, int) or not 1 <= block <= len(blocks):
        raise ValueError(f"features: block is {block!r}, need 1 to {len(blocks)}, or a name")
    return blocks[block - 1]


@contextmanager
def _as_it_was(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode in the block, and after it as before."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def tapped(
    network: nn.Module, blocks: Sequence[Block], *args: Any, stop: bool = True, **kwargs: Any
) -> list[Tensor]:
    """What ``blocks`` give in ``network(*args, **kwargs)``, in the order of ``blocks``.

    Args:
        network: a module; hooks and modes are afterwards what they were, also where it raises.
        blocks: numbers from 1, in the order in which blocks run, or names of modules.
        stop: end the call when all of them have run (block b: exactly b blocks run); False: go on.

    Raises:
        ValueError: there is no such block, or it did not run.
    """
    if not blocks:
        raise ValueError("features: blocks is empty, need at least one block")
    modules = [_find(network, block) for block in blocks]
    request = current()
    quiet = nullcontext() if request is None else request.without("features of one call")
    with _as_it_was(network), quiet:
        outs = outputs(modules, lambda: network(*args, **kwargs), stop=stop)
    found = []
    for block, out in zip(blocks, outs, strict=True):
        if out is None:
            raise ValueError(f"features: block {block!r} did not run, need one that is called")
        found.append(out)
    return found


def _level(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma ``[B]`` at model times ``t [B]``, on the CPU."""
    if isinstance(schedule, VP):
        steps = schedule.train_steps
        alpha, sigma, _ = schedule.at_timesteps((t * steps / 1000).clamp(max=steps - 1))
        return alpha[:-1], sigma[:-1]
    if isinstance(schedule, Flow):
        return 1 - t / 1000, t / 1000
    raise ValueError(f"features: schedule is {schedule!r}, need VP or Flow")


def _pooled(h: Tensor, pool: int | None) -> Tensor:
    if pool is None:
        return h
    if h.dim() == 3:  # tokens [B, N, D]
        if pool != 1:
            raise ValueError(f"features: pool is {pool!r} of tokens, need 1 or None")
        return h.mean(1)
    return F.adaptive_avg_pool2d(h, pool).flatten(1)


def features(
    model: nn.Module,
    x: Tensor,
    *,
    block: Block,
    t: float | Tensor = 90.0,
    y: Tensor | None = None,
    noise: bool = True,
    seed: int | Tensor = 0,
    pool: int | None = 1,
    schedule: Schedule | None = None,
) -> Tensor:
    """Features of clean images.

    Args:
        model: the denoiser, ``model(x_t, t, y)``.
        x: ``[B, C, H, W]``, clean.
        block: 1 to the number of blocks (:func:`blocks_of`), or a module's name.
        t: model time 0..1000, one for all or ``[B]``.
        y: int64 ``[B]``; None: the null class, or no class where the model has none.
        noise: False: the model sees ``x`` as it is.
        seed: of the noise; one for all (then sample b has slot b) or int64 ``[B]``.
        pool: k: means over a grid of k x k, flat; 1: over all pixels or tokens; None: no pooling.
        schedule: None: ``model.schedule``, else by ``model.prediction``.

    Returns:
        ``[B, F]``, or what the block gives where ``pool`` is None. Without gradients.

    Raises:
        ValueError: an argument does not fit.
    """
    if not isinstance(x, Tensor) or x.dim() < 3 or not x.is_floating_point():
        what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else repr(x)
        raise ValueError(f"features: x is {what}, need floats [B, C, ...]")
    if pool is not None and (isinstance(pool, bool) or not isinstance(pool, int) or pool < 1):
        raise ValueError(f"features: pool is {pool!r}, need an integer of at least 1, or None")
    batch = x.shape[0]
    times = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    if times.shape not in ((), (batch,)) or not bool(((times >= 0) & (times <= 1000)).all()):
        raise ValueError(f"features: t is {t!r}, need 0 to 1000, one or [{batch}]")
    times = times.expand(batch)
    if schedule is None:
        flow = getattr(model, "prediction", None) == "flow"
        schedule = getattr(model, "schedule", None) or (Flow() if flow else VP())
    null = getattr(model, "num_classes", None)
    if y is None and null:
        y = torch.full((batch,), null, device=x.device)
    with torch.no_grad():
        if noise:
            eps = philox_normal(
                x.shape, *Noise(seed, None, 0, START_STREAM), device=x.device, dtype=x.dtype
            )
            alpha, sigma = (v.to(x).view(-1, *[1] * (x.dim() - 1)) for v in _level(schedule, times))
            x = alpha * x + sigma * eps
        (h,) = tapped(model, [block], x, times.float().to(x.device), y)
        return _pooled(h, pool)


class Probe(NamedTuple):
    """A linear classifier: ``weight [K, F]``, ``bias [K]``; features are first centred and scaled
    by ``mean`` and ``std [F]``."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, f: Tensor) -> Tensor:
        """``[B, F]`` -> ``[B, K]``."""
        return F.linear((f.to(self.weight) - self.mean) / self.std, self.weight, self.bias)


def linear_probe(
    f: Tensor, labels: Tensor, classes: int, *, decay: float = 1e-3, steps: int = 100
) -> Probe:
    """Logistic regression on features that stay as they are.

    Args:
        f: ``[N, F]``.
        labels: int64 ``[N]``, 0 to ``classes - 1``.
        classes: K.
        decay: times half the squared norm of the weights, which the mean loss is added to.
        steps: at most, of L-BFGS.

    Raises:
        ValueError: an argument does not fit.
    """
    if f.dim() != 2 or labels.dtype != torch.int64 or labels.shape != f.shape[:1]:
        raise ValueError(
            f"linear_probe: f is {list(f.shape)} and labels {labels.dtype} {list(labels.shape)}, "
            "need [N, F] and torch.int64 [N]"
        )
    if not len(f) or not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"linear_probe: labels are not 0 to {classes - 1}, or there are none")
    f = f.detach().double()
    if not bool(f.isfinite().all()):
        raise ValueError("linear_probe: f has values that are not finite")
    mean, std = f.mean(0), f.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    z = (f - mean) / std
    with torch.enable_grad():
        weight = torch.zeros(classes, f.shape[1], dtype=z.dtype, device=z.device).requires_grad_()
        bias = torch.zeros(classes, dtype=z.dtype, device=z.device).requires_grad_()
        optimizer: Any = torch.optim.LBFGS(
            [weight, bias], max_iter=steps, line_search_fn="strong_wolfe",
            tolerance_grad=1e-9, tolerance_change=1e-12,
        )  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(z, weight, bias), labels)
            loss = loss + 0.5 * decay * weight.square().sum()
            torch.autograd.backward(loss)
            return loss

        optimizer.step(closure)
    return Probe(weight.detach().float(), bias.detach().float(), mean.float(), std.float())


def classify(model: nn.Module, x: Tensor, probe: Probe, **settings: Any) -> Tensor:
    """Logits ``[B, K]`` of clean images; ``settings`` of :func:`features`, those of training."""
    return probe.logits(features(model, x, **settings))
