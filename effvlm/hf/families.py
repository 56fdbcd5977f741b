"""Where the families of models keep their visual tokens. One entry per ``config.model_type``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Features = list[torch.Tensor]


@dataclass(frozen=True)
class Family:
    """How to encode images and find their placeholders.

    Attributes:
        encoder_arguments: keyword arguments of the model's forward that belong to the vision encoder.
        encode: (model, encoder arguments) → the model's encoder output, whose ``pooler_output`` is one (N, C) tensor per image.
        placeholder: (model) → id of the token that stands for one visual token in ``input_ids``.
    """

    encoder_arguments: tuple[str, ...]
    encode: Callable[[Any, dict[str, Any]], Any]
    placeholder: Callable[[Any], int]


def _llava_encode(model: Any, arguments: dict[str, Any]) -> Any:
    return model.get_image_features(**arguments, return_dict=True)


LLAVA = Family(
    encoder_arguments=("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes"),
    encode=_llava_encode,
    placeholder=lambda model: int(model.config.image_token_id),
)

FAMILIES: dict[str, Family] = {"llava": LLAVA}


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
    if model_type not in FAMILIES:
        raise ValueError(f"reduce: expected a model of type {', '.join(sorted(FAMILIES))}, got {model_type!r}, not supported yet")
    return FAMILIES[model_type]
