"""The position ids that a model would use by itself, before anything is reduced."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from effvlm.hf.families import family_of

_OF_POSITIONS = (
    "input_ids",
    "attention_mask",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "mm_token_type_ids",
)


def positions_for_generate(model: Any, inputs: dict[str, Any], first: int) -> torch.Tensor:
    """(B, L) or (k, B, L): those of ``model.generate``, by the model's own method.

    ``first`` is the first column that a cache does not hold yet; what stands before it only counts.

    Raises:
        ValueError: new images in a later turn of a model with three-dimensional positions, which need those of all images.
    """
    known = {k: inputs[k] for k in _OF_POSITIONS if inputs.get(k) is not None}
    ids = known["input_ids"]
    if first:
        if known.get("image_grid_thw") is not None or known.get("video_grid_thw") is not None:
            raise ValueError(
                "reduce: expected new images of this model together with the old ones and without a cache, got a cache"
            )
        known["past_key_values"] = inputs["past_key_values"]
        known.pop("mm_token_type_ids", None)  # those of the old images
    positions: torch.Tensor = model._prepare_position_ids_for_generation(ids, known)
    return positions.expand(*positions.shape[:-2], *ids.shape)


def positions_for_forward(model: Any, inputs: dict[str, Any], first: int) -> torch.Tensor:
    """(B, L) or (3, B, L): those of ``model(**inputs)``."""
    ids = inputs["input_ids"]
    if hasattr(model.base_model, "compute_3d_position_ids"):
        find = model.base_model.compute_3d_position_ids
        known = {k: inputs.get(k) for k in _OF_POSITIONS if k in inspect.signature(find).parameters}
        positions: torch.Tensor = find(inputs_embeds=None, past_key_values=None, **known)
        return positions
    start = family_of(model).first_position
    return (torch.arange(ids.shape[1], device=ids.device) + start).expand(ids.shape)
