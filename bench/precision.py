"""Networks of diffusers with linear layers in int8 and with weights stored in bfloat16, against
themselves in float32, and against torchao's dynamic int8 compiled, where torchao is installed.

The networks of ``bench/accelerate.py``. A row's name has the relative L2 error of one forward
against the plain network in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _case import Case

import fastdiff
from fastdiff.precision import Precision
from fastdiff.testing import draw_weights, load_file

peers = load_file(Path(__file__).resolve().parent / "accelerate.py")


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def _torchao(plain: torch.nn.Module) -> torch.nn.Module | None:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    peer = copy.deepcopy(plain)
    quantize_(peer, Int8DynamicActivationInt8WeightConfig())
    compiled: Any = torch.compile(peer)
    return compiled


def _double(kwargs: dict[str, Any]) -> dict[str, Any]:
    floats = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    return kwargs | {k: v.double() for k, v in floats.items() if v.is_floating_point()}


def _row(
    name: str,
    policy: Precision,
    plain: torch.nn.Module,
    kwargs: dict[str, Any],
    exact: torch.Tensor,
    arms: dict[str, Callable[[], Any]],
    **targets: Any,
) -> Case:
    ours = fastdiff.accelerate(copy.deepcopy(plain), precision=policy)
    fast = peers.call(ours, kwargs)
    words = f"{name} {policy.format}, error {_error(fast(), exact):.1e}"
    return Case(words, fast, arms, comparable=False, **targets)


def cases() -> list[Case]:
    """Two rows a network."""
    result = []
    for make in (peers.dit, peers.pixart, peers.sd3, peers.flux):
        torch.manual_seed(0)
        plain, kwargs = make()
        draw_weights(plain, 0.02).requires_grad_(False)
        exact = peers.call(copy.deepcopy(plain).double(), _double(kwargs))()
        floats = fastdiff.accelerate(copy.deepcopy(plain))
        arms = {"eager": peers.call(plain, kwargs), "fastdiff float32": peers.call(floats, kwargs)}
        also, peer = {}, _torchao(plain)
        if peer is not None:
            run = peers.call(peer, kwargs)
            name = f"torchao int8 compiled, error {_error(run(), exact):.1e}"
            arms[name], also[name] = run, 1.2
        name = make.__name__
        result.append(_row(name, Precision(), plain, kwargs, exact, arms, target=2.3, also=also))
        result.append(_row(name, Precision("bfloat16"), plain, kwargs, exact, arms, target=1.0))
    return result
