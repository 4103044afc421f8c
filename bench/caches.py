"""Caches against the peers' own at the same settings and steps: whole runs, equal outputs.

DeepCache at interval 3, branch 0 beside the authors' package, on the networks of ``accelerate.py``
and on the shipped U-Net; FirstBlock beside diffusers' FirstBlockCache at the same threshold, batch
1, with the same decisions (SD 3 is missing: FirstBlockCache dies in its last block, which ends the
text). Float32; exact mode is on, as a user gets it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _case import Case
from torch import Tensor, nn

import fastdiff
from fastdiff.cache import DeepCache, FirstBlock
from fastdiff.testing import draw_weights, load_file

HERE = Path(__file__).resolve().parent
networks = load_file(HERE / "accelerate.py")
digits = load_file(HERE / "_digits.py")
STEPS = 12
# At which about half of the calls of the loop below hit.
THRESHOLDS = {"dit": 0.4, "pixart": 0.075, "flux": 0.35}


@contextmanager
def package(unet: Any, times: Tensor, interval: int, branch: int) -> Iterator[None]:
    """The authors' package on ``unet``, which is called with ``times[i]`` as its timestep."""
    from DeepCache.extension.deepcache import DeepCacheSDHelper

    scheduler = SimpleNamespace(timesteps=list(times))
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def times_of(kwargs: dict[str, Any]) -> Tensor:
    """``[STEPS]``, from the timestep of the arguments towards 0."""
    return kwargs["timestep"] * (1 - torch.arange(STEPS) / STEPS)


@torch.no_grad()
def loop(model: Callable[..., Any], kwargs: dict[str, Any], first: str) -> Tensor:
    """Euler steps of a flow: the state follows what the model says of it."""
    times, kwargs = times_of(kwargs), dict(kwargs)
    x, _ = kwargs.pop(first), kwargs.pop("timestep")
    for time in times.split(1):
        if first == "sample":  # the package reads the second positional argument
            out = model(x, time[0], **kwargs, return_dict=False)[0]
        else:
            out = model(**{first: x}, timestep=time, **kwargs, return_dict=False)[0]
        x = x - out[:, : x.shape[1]] / STEPS
    return x


def _ours(model: nn.Module, kwargs: dict[str, Any], first: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with fastdiff.request(STEPS):
            return loop(model, kwargs, first)

    return run


def _first_block_cache(
    model: nn.Module, threshold: float, kwargs: dict[str, Any], first: str
) -> Callable[[], Tensor]:
    from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))

    def run() -> Tensor:
        HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)
        _set_cache_context(model, CacheContext("run"))
        try:
            return loop(model, kwargs, first)
        finally:
            _set_cache_context(model, None)

    return run


def _made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, kwargs = getattr(networks, name)()
    return draw_weights(model, 0.02).requires_grad_(False), kwargs


def deep() -> Iterator[Case]:
    """DeepCache on the SD-like U-Net and on the shipped one."""
    plain, kwargs = _made("unet")
    ours = fastdiff.accelerate(copy.deepcopy(plain), cache=DeepCache(3, 0))

    def theirs() -> Tensor:
        with package(plain, times_of(kwargs), 3, 0):
            return loop(plain, kwargs, "sample")

    arms = {"package": theirs, "eager": lambda: loop(plain, kwargs, "sample")}
    yield Case("unet deepcache:3", _ours(ours, kwargs, "sample"), arms, target=1.1, vs="package")

    d = digits.Digits("unet-digits", batch=4)
    cached = fastdiff.accelerate(copy.deepcopy(d.model), cache=DeepCache(3, 0))

    def packaged() -> Tensor:
        with package(d.plain.net, d.times(STEPS), 3, 0):
            return d.draw(d.plain, STEPS)

    arms = {"package": packaged, "eager": lambda: d.draw(d.plain, STEPS)}
    name = "unet-digits deepcache:3, 4 pictures"
    yield Case(name, lambda: d.draw(cached, STEPS), arms, target=1.1, vs="package")


def first_block() -> Iterator[Case]:
    """FirstBlock on the transformers."""
    for name, threshold in THRESHOLDS.items():
        plain, kwargs = _made(name)
        hooked = _first_block_cache(copy.deepcopy(plain), threshold, kwargs, "hidden_states")
        ours = fastdiff.accelerate(copy.deepcopy(plain), cache=FirstBlock(threshold))
        run = _ours(ours, kwargs, "hidden_states")
        run()
        arms = {
            "FirstBlockCache": hooked,
            "eager": lambda p=plain, k=kwargs: loop(p, k, "hidden_states"),
        }
        yield Case(f"{name} firstblock:{threshold}", run, arms, target=1.1, vs="FirstBlockCache")


def cases() -> list[Case]:
    """One row a network and cache; all of a run of 12 steps."""
    return [*deep(), *first_block()]
