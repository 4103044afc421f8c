"""The exact mode: parts of a network, found by their class, on our operations."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from fastdiff.engine.patch import Patch
from fastdiff.integrations import attentions, blocks, convolutions, experts, layers
from fastdiff.integrations.rules import class_name

RULES = {
    **layers.RULES,
    **attentions.RULES,
    **blocks.RULES,
    **convolutions.RULES,
    **experts.RULES,
}
VERSION = "0.42"  # of diffusers, whose forwards the rules stand in for


def _why_left(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "has a forward of its own already"
    name = class_name(module)
    if name.startswith("diffusers."):
        found = getattr(sys.modules["diffusers"], "__version__", "")
        if found.split(".")[:2] != VERSION.split("."):
            return f"is of diffusers {found}; its rule was written for {VERSION}"
    return experts.why_not(module) if name in experts.RULES else None


def exact(network: nn.Module, patch: Patch) -> list[str]:
    """Run parts of ``network`` on our operations in inference.

    Every rule replaces the ``forward`` of single modules, found by exact class, and falls back to
    the class's own where a call is not what it was written for: training, gradients, autocast,
    masks or keywords that it does not know.

    Returns:
        A sentence for each class and operation, and for what was left and why.
    """
    changed: Counter[tuple[str, str]] = Counter()
    left: Counter[tuple[str, str]] = Counter()
    single: dict[nn.Module, tuple[str, Any]] = {}
    for module in network.modules():
        if class_name(module) in convolutions.UNETS:
            single |= convolutions.parts(module)
    for module in network.modules():
        kind = type(module).__name__
        op, rule = RULES.get(class_name(module), ("", None))
        op, rule = single.get(module, (op, rule))
        why = _why_left(module)
        if rule is None:
            if hasattr(module, "processor") and hasattr(module, "to_q"):
                left[kind, "has no rule"] += 1
        elif why is not None:
            left[kind, why] += 1
        else:
            patch.set(module, "forward", MethodType(rule, module))
            if class_name(module) in experts.RULES:
                patch.on_undo(partial(experts.unstack, module))
                experts.stack(module)
            other = attentions.why_left(module) if class_name(module) in attentions.RULES else None
            if other is None:
                changed[kind, op] += 1
            else:  # its rule looks at the processor in every call
                left[kind, other] += 1
    parts = [f"{n} {kind} on {op}" for (kind, op), n in changed.items()]
    return parts + [f"left: {n} {kind}, which {why}" for (kind, why), n in left.items()]
