r"""What the linear layers of a network compute in, and what their weights are stored in. The two
weights of an ``nn.MoE`` (``blocks.0.moe.up``, ``.down``) and of an ``nn.SwiGLU`` are layers as
well; routing stays in floats. Convolutions of one pixel are linear layers over pixels; those of
more are layers where ``convolutions`` says so, their patches (``ops.quantize_patches``) the tokens.

    int8      int8 products of tokens and weights, a scale a token and an output channel or group
    int4      weights of 4 bits, widened to int8 for the same products
    bfloat16  weights stored in 16 bits, products in float32

and what the scores of its attentions are products of: int8 with a scale a token, or floats
(``fastdiff.ops.quant_attention``).

For outliers:

    smooth    SmoothQuant (Xiao et al. 2023, arXiv:2211.10438, eq. 4): channel k of the tokens is
              divided by ``max |x_k|^a / max |w_k|^(1 - a)`` and column k of the weight multiplied
    rank      SVDQuant's idea (Li et al. 2024, arXiv:2411.05007): the largest singular directions of
              the weight stay in floats, the integers have what is left
    rotate    a Hadamard rotation of blocks of channels (QuaRot, Ashkboos et al. 2024,
              arXiv:2404.00456), of tokens and weight alike
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

FORMATS = ("int8", "int4", "bfloat16", "float")
CONVOLUTIONS = ("none", "pointwise", "all")
# Few rows, or what all tokens hang on: they cost little and show in every pixel.
# Over a prompt's tokens (attn2 of diffusers) there are few scores.
KEEP = (
    "*embed*", "*final_layer*", "*norm_out*", "proj_out*", "time_text*", "*.attn2", "conv_in",
    "conv_out",
)  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """A policy: which format each linear layer has, and at which steps.

    Args:
        format: "int8", "int4", "bfloat16", or "float" (nothing changes but what ``layers`` says).
        layers: pairs (pattern, format): the first pattern that a layer's name matches decides,
            before ``keep`` and ``format``; shell patterns, ``*.attn.*``.
        keep: patterns of layers that stay in floats.
        least: layers with fewer weights stay in floats.
        first, last: so many steps of a run at its beginning and end are in floats.
        group: input channels that share a weight's scale; None: all of a row.
        smooth: SmoothQuant's exponent a in [0, 1], with ``maxima``; None: none.
        maxima: pairs (name, largest magnitude of each input channel), of
            :func:`fastdiff.calibrate.activation_maxima`.
        rank: of the correction in floats; 0: none.
        rotate: channels of a rotated block, a power of 2; 0: none. Layers whose inputs it does not
            divide are not rotated.
        convolutions: which of them are layers: "pointwise", "all" or "none". Those of more than one
            pixel have no ``smooth``, ``rank`` or ``rotate``. Whether integers pay for them depends
            on the processor: float32 has Winograd's form (:func:`fastdiff.calibrate.slower`).
        attention: "int8" or "float": scores of the attentions that have no mask; patterns of
            ``layers`` (with "float") and ``keep`` match their names too.

    Raises:
        ValueError: an argument does not fit.
    """

    format: str = "int8"
    layers: Sequence[tuple[str, str]] = ()
    keep: Sequence[str] = KEEP
    least: int = 4096
    first: int = 0
    last: int = 0
    group: int | None = None
    smooth: float | None = None
    maxima: Sequence[tuple[str, Sequence[float]]] = ()
    rank: int = 0
    rotate: int = 0
    convolutions: str = "pointwise"
    attention: str = "float"

    def __post_init__(self) -> None:
        for name in ("layers", "maxima"):
            pairs = tuple(tuple(pair) for pair in getattr(self, name))
            if any(len(pair) != 2 or not isinstance(pair[0], str) for pair in pairs):
                raise ValueError(
                    f"Precision: {name} is {pairs!r}, need pairs of a name and a value"
                )
            object.__setattr__(self, name, pairs)
        object.__setattr__(self, "keep", tuple(self.keep))
        for value in (self.format, *(form for _, form in self.layers)):
            if value not in FORMATS:
                raise ValueError(
                    f"Precision: format is {value!r}, need one of {', '.join(FORMATS)}"
                )
        if self.attention not in ("float", "int8"):
            raise ValueError(f"Precision: attention is {self.attention!r}, need 'float' or 'int8'")
        if self.convolutions not in CONVOLUTIONS:
            raise ValueError(
                f"Precision: convolutions is {self.convolutions!r}, need one of "
                f"{', '.join(CONVOLUTIONS)}"
            )
        for name in ("least", "first", "last", "rank", "rotate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"Precision: {name} is {value!r}, need an integer of at least 0")
        if self.rotate & (self.rotate - 1):
            raise ValueError(f"Precision: rotate is {self.rotate}, need a power of 2, or 0")
        if self.group is not None and (
            isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1
        ):
            raise ValueError(
                f"Precision: group is {self.group!r}, need an integer above 0, or None"
            )
        if self.smooth is None:
            return
        if not isinstance(self.smooth, int | float) or not 0 <= self.smooth <= 1:
            raise ValueError(f"Precision: smooth is {self.smooth!r}, need a number in [0, 1]")
        if not self.maxima:
            raise ValueError(
                "Precision: smooth needs maxima, those of fastdiff.calibrate.activation_maxima"
            )
        if self.rotate:
            raise ValueError("Precision: smooth and rotate are both given, need one of them")

    @property
    def neutral(self) -> bool:
        """Nothing changes."""
        forms = {self.format, self.attention, *(form for _, form in self.layers)}
        return forms == {"float"}

    def of(self, name: str, weights: int) -> str:
        """The format of a layer with so many weights."""
        for pattern, form in self.layers:
            if fnmatchcase(name, pattern):
                return form
        if weights < self.least or any(fnmatchcase(name, pattern) for pattern in self.keep):
            return "float"
        return self.format

    def scores(self, name: str) -> str:
        """What the scores of an attention are products of."""
        for pattern, form in self.layers:
            if fnmatchcase(name, pattern):
                return form if form == "float" else self.attention
        return "float" if any(fnmatchcase(name, p) for p in self.keep) else self.attention

    def full(self, step: int, steps: int | None) -> bool:
        """Whether a step is in floats. Where the number of steps is not known there are no last."""
        return step < self.first or (steps is not None and step >= steps - self.last)
