"""Adapters: a few per cent of a network's weights, trained, saved, swapped and merged.

Each is made with the network and is attached then; ``adapter.trainable()`` goes to an optimiser,
``adapter.save(path)`` writes what was trained, ``adapter.detach()`` takes all of it back.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from fastdiff.adapters.afa import SABW, Ensemble
from fastdiff.adapters.attention_tuning import GatedTokens, Residuals, TrainAttention
from fastdiff.adapters.base import (
    Adapter,
    attached,
    compare,
    layout,
    read,
    samples,
    select,
    version,
)
from fastdiff.adapters.conprediff import ConPreDiff, context_loss
from fastdiff.adapters.difffit import DiffFit
from fastdiff.adapters.diffscaler import Diffscaler
from fastdiff.adapters.hipa import HiPA, high_frequency_loss, one_step
from fastdiff.adapters.lora import LoRA
from fastdiff.adapters.motion import MotionLoRA, motion_director
from fastdiff.adapters.orthogonal import Concepts, OrthogonalLoRA, crosstalk, merge_concepts
from fastdiff.adapters.repa import Repa, alignment_loss
from fastdiff.adapters.sara import SaRA, SparseAdamW
from fastdiff.adapters.scedit import CSCTuner, SCTuner

_CLASSES: tuple[type[Adapter], ...] = (
    LoRA,
    OrthogonalLoRA,
    Concepts,
    HiPA,
    MotionLoRA,
    TrainAttention,
    GatedTokens,
    Residuals,
    Repa,
    ConPreDiff,
    SaRA,
    DiffFit,
    Diffscaler,
    SCTuner,
    CSCTuner,
)
METHODS: dict[str, type[Adapter]] = {cls.method: cls for cls in _CLASSES}


def load(network: nn.Module, path: str | Path) -> Adapter:
    """The adapter of a file, attached to ``network``.

    Raises:
        ValueError: the file is not readable, is no adapter of ours (for those of PEFT there is
            ``LoRA.from_peft``), or does not fit the network, which is as it was then.
    """
    facts, tensors = read(path)
    if facts["method"] not in METHODS:
        raise ValueError(
            f"{path}: its method is {facts['method']!r}, need one of {', '.join(METHODS)}"
        )
    try:
        settings = json.loads(facts["settings"])
        adapter = METHODS[facts["method"]].of_file(network, settings, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: it does not fit this network: {error}") from error
    try:
        compare(path, tensors, adapter.tensors())
    except ValueError:
        adapter.detach()
        raise
    adapter.fill(tensors)
    return adapter


__all__ = [
    "METHODS",
    "SABW",
    "Adapter",
    "CSCTuner",
    "ConPreDiff",
    "Concepts",
    "DiffFit",
    "Diffscaler",
    "Ensemble",
    "GatedTokens",
    "HiPA",
    "LoRA",
    "MotionLoRA",
    "OrthogonalLoRA",
    "Repa",
    "Residuals",
    "SCTuner",
    "SaRA",
    "SparseAdamW",
    "TrainAttention",
    "alignment_loss",
    "attached",
    "context_loss",
    "crosstalk",
    "high_frequency_loss",
    "layout",
    "load",
    "merge_concepts",
    "motion_director",
    "one_step",
    "samples",
    "read",
    "select",
    "version",
]
