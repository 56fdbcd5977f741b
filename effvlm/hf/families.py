"""Where the families of models keep their visual tokens. One entry per ``config.model_type``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from effvlm.hf import layouts


@dataclass(frozen=True)
class Family:
    """What reducing visual tokens has to know of a family of models; the rest it finds in the model.

    Attributes:
        layout: which patches are behind each token.
        tower: attribute of the vision tower in ``model.base_model``.
        merges: whether tokens may be merged inside the tower: a patch makes a token.
        first_position: position id of the first token.
        runs: whether an image's tokens are the placeholders in a row, rather than an entry of the encoder's output (tiles).
    """

    layout: layouts.Find
    tower: str = "vision_tower"
    merges: bool = False
    first_position: int = 0
    runs: bool = False


FAMILIES: dict[str, Family] = {
    "llava": Family(layouts.one_grid, merges=True),
    "llava_next": Family(layouts.any_resolution, merges=True),
    "llava_onevision": Family(layouts.any_resolution, merges=True),
    "qwen2_5_vl": Family(layouts.native, "visual"),
    "qwen3_vl": Family(layouts.native, "visual"),
    "qwen3_vl_moe": Family(layouts.native, "visual"),
    "internvl": Family(layouts.tiles, runs=True),
    "smolvlm": Family(layouts.shuffled_tiles, "vision_model"),
    "idefics3": Family(layouts.shuffled_tiles, "vision_model"),
    "gemma3": Family(layouts.pooled_grid),
    "gemma4": Family(layouts.by_position),
    "paligemma": Family(layouts.one_grid, merges=True, first_position=1),
}


def family_of(model: Any) -> Family:
    """The family of a model.

    Raises:
        TypeError: not a Hugging Face model with ``generate``.
        ValueError: a model type that is not supported.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, torch.nn.Module) or model_type is None or not hasattr(model, "generate"):
        raise TypeError(
            f"reduce: expected a Hugging Face image-text-to-text model (AutoModelForImageTextToText), got {type(model).__name__}"
        )
    if model_type == "mllama":
        raise ValueError(
            "reduce: Mllama keeps images out of the sequence, in cross-attention states that transformers computes inside "
            "forward and offers no public way to shorten; got 'mllama', which is not supported"
        )
    if model_type not in FAMILIES:
        raise ValueError(f"reduce: expected a model of type {', '.join(sorted(FAMILIES))}, got {model_type!r}, not supported yet")
    return FAMILIES[model_type]
