"""Checkpoints: float16 safetensors with a JSON card beside them. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastdiff.models.baseline import PlainDiT, PlainDiTMoE, PlainUNet
from fastdiff.models.dit import DiT
from fastdiff.models.dit_moe import DiTMoE
from fastdiff.models.unet import UNet

FOLDER = Path(__file__).parent.parent / "checkpoints"
# A subclass stands before its base: a network is saved as the first that it is.
NETWORKS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "dit-moe": (DiTMoE, PlainDiTMoE),
    "dit": (DiT, PlainDiT),
    "unet": (UNet, PlainUNet),
}


def names() -> list[str]:
    """The checkpoints that ship with the package."""
    found = (p.stem for p in FOLDER.glob("*.json") if "model" in json.loads(p.read_text()))
    return sorted(found)


def read_tensors(path: Path, module: nn.Module, dtype: torch.dtype) -> None:
    """Fill ``module`` from a safetensors file whose tensors must be exactly those of ``module``.

    Raises:
        ValueError: the file is not readable, or a tensor is missing, unknown or of another shape;
            names file and tensor.
    """
    need = module.state_dict()
    state = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            have = set(file.keys())
            for name in sorted(have | set(need)):
                if name not in need:
                    raise ValueError(f"{path}: tensor {name} is not part of this network")
                if name not in have:
                    raise ValueError(f"{path}: tensor {name} is missing")
                shape = list(file.get_slice(name).get_shape())
                if shape != list(need[name].shape):
                    raise ValueError(
                        f"{path}: tensor {name} has shape {shape}, need {list(need[name].shape)}"
                    )
                state[name] = file.get_tensor(name).to(dtype)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path}: tensor {broken[0]} has values that are not finite")
    module.load_state_dict(state, assign=True)


def save(model: nn.Module, path: str | Path, **facts: Any) -> dict:
    """Write ``path`` (float16) and its card, each in one atomic step.

    Args:
        model: a network of :data:`NETWORKS`, fast or plain.
        path: ends in ``.safetensors``; the card is the same name with ``.json``.
        facts: further entries of the card.

    Returns:
        The card.
    """
    kind = next(k for k, classes in NETWORKS.items() if isinstance(model, classes))
    return write_pair(model, Path(path), {"model": kind, "config": model.config, **facts})


def write_pair(module: nn.Module, path: Path, card: dict[str, Any]) -> dict:
    """Weights as float16 and the card beside them, each by one rename."""
    state = {k: v.detach().half().contiguous() for k, v in module.state_dict().items()}
    card = {**card, "parameters": sum(v.numel() for v in state.values()), "dtype": "float16"}
    weights, text = path.with_suffix(".tmp"), path.with_suffix(".json.tmp")
    save_file(state, str(weights))
    text.write_text(json.dumps(card, indent=1) + "\n")
    os.replace(weights, path)
    os.replace(text, path.with_suffix(".json"))
    return card


def load(
    name: str | Path, *, dtype: torch.dtype = torch.float32, plain: bool = False
) -> tuple[nn.Module, dict]:
    """A trained network and its card.

    Args:
        name: a shipped checkpoint ("dit-digits", "dit-scenes", "unet-digits") or a path
            ``*.safetensors``.
        dtype: what to compute in; files hold float16.
        plain: the plain-torch network in place of the one built on :mod:`fastdiff.ops`.

    Returns:
        The network, in eval mode on the CPU, and its card.

    Raises:
        ValueError: no such checkpoint, or its file or card is damaged; names file and tensor.
    """
    path = Path(name)
    if path.suffix != ".safetensors":
        path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"load: {name} is no file, need a .safetensors path or one of {names()}")
    card_path = path.with_suffix(".json")
    try:
        card = json.loads(card_path.read_text())
        fast_class, plain_class = NETWORKS[card["model"]]
        with torch.device("meta"):
            model = (plain_class if plain else fast_class)(**card["config"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{card_path}: not a readable card: {error!r}") from error
    read_tensors(path, model, dtype)
    return model.eval(), card
