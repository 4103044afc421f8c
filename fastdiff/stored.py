"""Networks whose layers are stored in few bits: saved, loaded, and without their float weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastdiff.accelerate import acceleration_of
from fastdiff.engine.quant_forward import QuantForward, Stored
from fastdiff.engine.quant_layers import Given
from fastdiff.ops.quantize import check_weight
from fastdiff.precision import Precision

_FORMAT = "fastdiff precision 1"
_NAMES = {"weight", "values", "scale", "smooth", "rotation", "up", "down"}


def _layers(who: str, target: Any) -> tuple[Precision, dict[str, QuantForward]]:
    acceleration = acceleration_of(target)
    if acceleration is None or acceleration.precision is None or not acceleration.layers:
        raise ValueError(
            f"{who}: target is {type(target).__name__} with no layer in another format, need "
            "accelerate(target, precision=...) before"
        )
    return acceleration.precision, acceleration.layers


def save(target: Any, path: str | Path) -> None:
    """Write the stored weights of an accelerated network or pipeline: safetensors, with the policy
    and the shapes of layers as JSON in its header.

    Raises:
        ValueError: no layer of ``target`` is in another format.
    """
    policy, layers = _layers("stored.save", target)
    tensors = {
        f"{name}:{part}": t.contiguous()
        for name, own in layers.items()
        for part, t in own.stored.tensors.items()
    }
    about = {name: [own.stored.format, *own.stored.shape] for name, own in layers.items()}
    meta = {"format": _FORMAT, "policy": json.dumps(asdict(policy)), "layers": json.dumps(about)}
    save_file(tensors, str(path), meta)


def load(path: str | Path, device: torch.device | str = "cpu") -> Given:
    """What :func:`save` wrote, for ``accelerate(target, precision=...)``.

    Raises:
        ValueError: the file is another one, or is not whole.
    """
    try:
        with safe_open(str(path), "pt", device=str(device)) as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"stored.load: {path} is no safetensors file: {error}") from None
    if meta.get("format") != _FORMAT:
        raise ValueError(
            f"stored.load: {path} has format {meta.get('format')!r}, need {_FORMAT!r}: a file of "
            "fastdiff.stored.save"
        )
    policy = Precision(**json.loads(meta["policy"]))
    layers: dict[str, Stored] = {}
    for name, (form, rows, columns) in json.loads(meta["layers"]).items():
        own = {
            key.rpartition(":")[2]: t
            for key, t in tensors.items()
            if key.rpartition(":")[0] == name
        }
        layers[name] = stored = Stored(form, own, (rows, columns))
        need = {"weight"} if form == "bfloat16" else {"values", "scale"}
        if not need <= own.keys() or not own.keys() <= _NAMES:
            raise ValueError(f"stored.load: {path}: layer {name} has {sorted(own)}, need {need}")
        if form == "bfloat16":
            shape = tuple(own["weight"].shape)
        else:
            check_weight(f"stored.load: {path}: layer {name}", stored.quant, own["values"].device)
            shape = stored.quant.shape
            if bool((stored.quant.scale < 0).any()) or not bool(
                stored.quant.scale.isfinite().all()
            ):
                raise ValueError(
                    f"stored.load: {path}: layer {name} has a scale that is below 0 or not finite"
                )
        if shape != (rows, columns):
            raise ValueError(
                f"stored.load: {path}: layer {name} is {list(shape)}, need {[rows, columns]}"
            )
    return Given(policy, layers)


def release(target: Any) -> int:
    """Free the float weights of the layers that are in another format; gives the bytes.

    From then on they only infer: training, gradients, autocast and ``restore`` are errors that say
    so. Load the network anew for those.

    Raises:
        ValueError: no layer is in another format, or its policy has steps in floats.
    """
    policy, layers = _layers("stored.release", target)
    if policy.first or policy.last:
        raise ValueError(
            f"stored.release: precision has first {policy.first} and last {policy.last}, steps in "
            "floats, which need the float weights"
        )
    return sum(own.release() for own in layers.values())
