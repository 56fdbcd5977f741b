"""What a method may ask of the model besides the features: keys of :attr:`effvlm.tokens.Tokens.signals`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """How much attention each token receives in a layer of the vision tower: (N,) float32, or (N, H) with ``heads="none"``.

    Attributes:
        layer: index of the layer, negative from the end, or a float in (0, 1): that share of the depth.
        rows: ``"cls"``, from the CLS token (in towers without one: from all tokens, their mean, as VisionZip does it);
            ``"all"``, the mean over all tokens.
        heads: ``"mean"``, ``"sum"``, ``"max"`` or ``"none"``.
    """

    layer: int | float = -2
    rows: str = "cls"
    heads: str = "mean"


@dataclass(frozen=True)
class Keys:
    """Attention keys of a layer of the vision tower: (N, D) mean over heads, or (N, H·D) with ``heads="all"``."""

    layer: int | float = -2
    heads: str = "mean"


@dataclass(frozen=True)
class Text:
    """Mean cosine of each visual token with the prompt's text embeddings: (N,) float32."""


@dataclass(frozen=True)
class Pixels:
    """Largest difference between the pixels of a token and of its left (in the first column: upper) neighbour: (N,) float32;
    Inf where there is no neighbour."""


Signal = Attention | Keys | Text | Pixels
