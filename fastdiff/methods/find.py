r"""Fine-tuning the first noise of a frozen model (Chen et al. 2024, FIND, arXiv:2407.19453): a
normal law of the noise for every prompt is moved towards a reward by policy gradients, as a
decision process of one step.

    x_T ~ N(mu, sigma^2),  x_0 = sampler(x_T),  A = r(x_0) - baseline
    rho = exp(log N(x_T; mu, sigma^2) - log N(x_T; mu_old, sigma_old^2))
    L = -mean min(rho A, clip(rho, 1 - c, 1 + c) A)

The sampler is never differentiated. The baseline is the mean reward of the prompt's other samples,
which needs no network and leaves the gradient unbiased; the publication trains a predictor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.methods.fk import Reward, rewards_of
from fastdiff.ops.fused_step import philox_normal
from fastdiff.samplers.run import START_STREAM
from fastdiff.sampling import sample


class InitialNoise(nn.Module):
    """``N(mu, sigma^2)`` of the first state of each of P prompts; 0 and 1 to begin with.

    Args:
        prompts: P.
        shape: ``[C, ...]`` of a state.
        device, dtype: of the parameters ``mu`` and ``log_sigma`` ``[P, C, ...]``.

    Raises:
        ValueError: ``prompts`` or ``shape`` does not fit.
    """

    def __init__(
        self,
        prompts: int,
        shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if isinstance(prompts, bool) or not isinstance(prompts, int) or prompts < 1:
            raise ValueError(f"find: prompts is {prompts!r}, need an integer of at least 1")
        if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
            raise ValueError(f"find: shape is {shape!r}, need sizes [C, ...] of at least 1")
        whole = (prompts, *shape)
        self.mu = nn.Parameter(torch.zeros(whole, device=device, dtype=dtype))
        self.log_sigma = nn.Parameter(torch.zeros(whole, device=device, dtype=dtype))

    @torch.no_grad()
    def draw(self, prompt: Tensor, seed: int | Tensor = 0) -> Tensor:
        """``mu + sigma z`` ``[B, C, ...]``, z what a run with this seed starts from.

        Args:
            prompt: int64 ``[B]``.
            seed: as for :func:`fastdiff.sample`.
        """
        shape, device = (len(prompt), *self.mu.shape[1:]), self.mu.device
        z = philox_normal(shape, seed, None, 0, START_STREAM, device=device, dtype=self.mu.dtype)
        return self.mu[prompt] + self.log_sigma[prompt].exp() * z

    def log_prob(self, x: Tensor, prompt: Tensor) -> Tensor:
        """``log N(x; mu, sigma^2)`` ``[B]`` float64, summed over dimensions; differentiable."""
        mu, log_sigma = self.mu[prompt].double(), self.log_sigma[prompt].double()
        z = (x.detach().double() - mu) * torch.exp(-log_sigma)
        return (-0.5 * z.square() - log_sigma - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """Rewards less the mean of the other ``samples`` of their prompt; NaN and infinite ones say
    nothing: their advantage is 0, and they are in no mean.

    Args:
        rewards: ``[P samples]``, the samples of a prompt next to each other.
    """
    r = rewards.double().view(-1, samples)
    good = torch.isfinite(r)
    known = torch.where(good, r, 0.0)
    others = good.sum(1, keepdim=True) - 1
    mean = (known.sum(1, keepdim=True) - known) / others.clamp(min=1)
    return torch.where(good & (others > 0), known - mean, 0.0).flatten()


def clipped_loss(logp: Tensor, old: Tensor, advantage: Tensor, clip: float = 0.2) -> Tensor:
    """``-mean min(rho A, clip(rho, 1 - clip, 1 + clip) A)``, rho = exp(logp - old)."""
    ratio = torch.exp(logp - old.detach())
    a = advantage.detach()
    return -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a).mean()


def find(
    model: Callable[..., Tensor],
    noise: InitialNoise,
    reward: Reward,
    *,
    prompt: Tensor | None = None,
    classes: Tensor | None = None,
    samples: int = 16,
    rounds: int = 20,
    epochs: int = 4,
    clip: float = 0.2,
    lr: float = 0.05,
    micro_batch: int | None = None,
    seed: int = 0,
    callback: Callable[[int, Tensor], None] | None = None,
    cache: Any = None,
    **settings: Any,
) -> InitialNoise:
    """Move ``noise`` towards samples of high reward; gives it back.

    Args:
        model: frozen; as for :func:`fastdiff.sample`.
        noise: law of the first state; trained in place.
        reward: ``reward(x0 [N, C, ...]) -> [N]``; where it is NaN or infinite a sample says
            nothing.
        prompt: int64 ``[Q]``: prompts to train; None: all.
        classes: int64 ``[P]``: what the model is told of each prompt of ``noise``; None: nothing.
        samples: of every prompt in a round, at least 2.
        rounds: sets of samples; round k draws with seed ``seed + k``.
        epochs: updates of each set.
        clip, lr: of the ratio; of Adam.
        micro_batch: rows that ``reward`` takes at a time; None: all.
        callback: ``callback(k, rewards [Q samples])`` after every round.
        cache, settings: of :func:`fastdiff.sample`. Each set is a run of its own, which starts
            without what caches have kept before.

    Raises:
        ValueError: an argument does not fit.
    """
    for name, value, low in (("samples", samples, 2), ("rounds", rounds, 0), ("epochs", epochs, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"find: {name} is {value!r}, need an integer of at least {low}")
    for name, number, high in (("clip", clip, 1.0), ("lr", lr, math.inf)):
        if not isinstance(number, int | float) or not 0 < number < high:
            raise ValueError(f"find: {name} is {number!r}, need a number above 0 and below {high}")
    count, device = len(noise.mu), noise.mu.device
    which = torch.arange(count) if prompt is None else prompt
    if (
        which.dtype != torch.int64
        or which.dim() != 1
        or not bool(((which >= 0) & (which < count)).all())
    ):
        raise ValueError(f"find: prompt is {which}, need int64 [Q] from 0 to {count - 1}")
    if classes is not None and classes.shape[:1] != (count,):
        raise ValueError(f"find: classes is {list(classes.shape)}, need [{count}]")
    rows = which.to(device).repeat_interleave(samples)
    told = None if classes is None else classes.to(device)[rows]
    optimizer = torch.optim.Adam(noise.parameters(), lr=lr)
    for k in range(rounds):
        x = noise.draw(rows, seed + k)
        with torch.no_grad():
            old = noise.log_prob(x, rows)
            found = sample(model, x, classes=told, seed=seed + k, cache=cache, **settings)
            rewards = rewards_of(reward, found, micro_batch)
        advantage = advantages(rewards, samples)
        for _ in range(epochs):
            optimizer.zero_grad()
            loss = clipped_loss(noise.log_prob(x, rows), old, advantage, clip)
            torch.autograd.backward(loss)
            optimizer.step()
        if callback is not None:
            callback(k, rewards)
    return noise
