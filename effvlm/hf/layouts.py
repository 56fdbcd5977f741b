"""Where the visual tokens of each family come from: crop or frame, row, column, and the vision tower's patches behind each
token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from effvlm.tokens.tokens import square_place


@dataclass(frozen=True)
class Layout:
    """The tokens of one image or video, in the order that the language model gets them.

    Attributes:
        place: (N, 3) int32, see :class:`effvlm.tokens.Tokens`.
        patches: (N, k) int64, the tower's patches behind each token, counted over the whole call (prefix tokens such as CLS left
            out), −1 for none.
        video: whether crops are frames.
    """

    place: torch.Tensor
    patches: torch.Tensor
    video: bool = False


Counts = list[int]
# (model, the encoder's inputs, tokens of each image, placeholders in a row of each image) → layouts
Find = Callable[[Any, dict[str, Any], Counts], list[Layout]]


def one_grid(model: Any, inputs: dict[str, Any], counts: Counts) -> list[Layout]:
    """Every image is one crop on a square grid, a token per patch (LLaVA, PaliGemma)."""
    found, first = [], 0
    for n in counts:
        found.append(Layout(square_place(n), torch.arange(first, first + n)[:, None]))
        first += n
    return found


def pooled_grid(model: Any, inputs: dict[str, Any], counts: Counts) -> list[Layout]:
    """Every image is one crop whose patches were pooled k × k (Gemma3)."""
    patches = model.config.vision_config.image_size // model.config.vision_config.patch_size
    found = []
    for i, n in enumerate(counts):
        side = round(n**0.5)
        k = patches // side
        inside = torch.arange(patches * patches).view(side, k, side, k).permute(0, 2, 1, 3).reshape(n, k * k)
        found.append(Layout(square_place(n), inside + i * patches * patches))
    return found


def _shuffled(shuffle: Callable[[torch.Tensor], torch.Tensor], side: int) -> torch.Tensor:
    """(N, k) which patches a pixel shuffle puts into each token, found by shuffling their numbers.

    Args:
        shuffle: (1, side², C) → (1, N, k·C).
        side: patches per side.
    """
    numbers = torch.arange(side * side, dtype=torch.float64)[None, :, None]
    mixed: torch.Tensor = shuffle(numbers.repeat(1, 1, 2))  # two channels: some implementations divide them
    return mixed[0, :, ::2].long()


def tiles(model: Any, inputs: dict[str, Any], counts: Counts) -> list[Layout]:
    """Tiles of equal grids, the overview last, patches shuffled into channels (InternVL)."""
    core, config = model.base_model, model.config
    size, patch = (c if isinstance(c, int) else c[0] for c in (config.vision_config.image_size, config.vision_config.patch_size))
    side = size // patch
    inside = _shuffled(
        lambda x: core.pixel_shuffle(x.view(1, side, side, -1), scale_factor=config.downsample_ratio).flatten(1, 2), side
    )
    return _tiled(inside, side * side, counts)


def shuffled_tiles(model: Any, inputs: dict[str, Any], counts: Counts) -> list[Layout]:
    """The same with Idefics3's connector (SmolVLM, Idefics3)."""
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    connector = model.base_model.connector
    inside = _shuffled(lambda x: connector.pixel_shuffle(x, connector.scale_factor), side)
    return _tiled(inside, side * side, counts)


def _tiled(inside: torch.Tensor, patches: int, counts: Counts) -> list[Layout]:
    found, first = [], 0
    for n in counts:
        number = n // len(inside)
        crop = (
            (torch.arange(number) + 1) % number if number > 1 else torch.zeros(1, dtype=torch.long)
        )  # the last one is the overview
        place = square_place(len(inside)).repeat(number, 1)
        place[:, 0] = crop.repeat_interleave(len(inside))
        offset = (torch.arange(number).repeat_interleave(len(inside)) + first) * patches
        found.append(Layout(place, inside.repeat(number, 1) + offset[:, None]))
        first += number
    return found


def any_resolution(model: Any, inputs: dict[str, Any], counts: Counts) -> list[Layout]:
    """A thumbnail and tiles, unpadded and with newlines (LLaVA-NeXT, LLaVA-OneVision): coordinates go through the model's own
    packing in place of features."""
    if inputs.get("pixel_values_videos") is not None:
        return _pooled_frames(model, inputs, counts)
    core, vision = model.base_model, model.config.vision_config
    side = vision.image_size // vision.patch_size
    sizes = torch.as_tensor(inputs["image_sizes"]).cpu()
    crops = _crops(model, inputs)
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2)
    found, first = [], 0
    for size, number in zip(sizes, crops, strict=True):
        wide = _tiles_across(model, size) if number > 1 else 1
        tile = torch.arange(number) - 1  # −1: the thumbnail
        corner = torch.stack([tile.clamp_min(0) // wide, tile.clamp_min(0) % wide], -1) * side
        # Per patch: 0 thumbnail or 1 tile, row and column on the grid of all tiles.
        marks = torch.cat([(tile >= 0).long().view(-1, 1, 1).expand(-1, side * side, 1), corner[:, None] + grid], -1).float()
        arguments: dict[str, Any] = {"image_newline": torch.full((3,), -1.0)}
        if model.config.model_type == "llava_next":
            arguments["vision_feature_select_strategy"] = "full"
        else:
            arguments["vision_aspect_ratio"] = inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        packed = core.pack_image_features([marks], size[None], **arguments)[0][0]
        newline, kind = packed[:, 0] < 0, packed[:, 0].round().long()
        row, column = packed[:, 1].round().long(), packed[:, 2].round().long()
        crop = torch.where(kind > 0, 1 + row // side * wide + column // side, 0)
        patch = (first + crop) * side * side + row % side * side + column % side
        place = torch.stack([crop, row, column], -1)
        place[newline] = torch.tensor([0, -1, -1])
        found.append(Layout(place.int(), patch.masked_fill(newline, -1)[:, None]))
        first += number
    return found


def _crops(model: Any, inputs: dict[str, Any]) -> list[int]:
    """Crops of each image, thumbnail included, as ``get_image_features`` counts them."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes = model.config, inputs["image_sizes"]
    several = inputs.get("batch_num_images")
    cut = [True] * len(sizes) if several is None else [int(n) == 1 for n in several for _ in range(int(n))]
    return [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if c else 1
        for size, c in zip(sizes, cut, strict=True)
    ]


def _tiles_across(model: Any, size: torch.Tensor) -> int:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    return int(get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, model.config.vision_config.image_size)[1])


def _pooled_frames(model: Any, inputs: dict[str, Any], counts: Counts) -> list[Layout]:
    """LLaVA-OneVision's videos: frames pooled 2 × 2, one newline at the end."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    frames, small = inputs["pixel_values_videos"].shape[1], (side + 1) // 2
    found = []
    for i, _ in enumerate(counts):
        place = square_place(small * small).repeat(frames, 1)
        place[:, 0] = torch.arange(frames).repeat_interleave(small * small)
        row, column = (place[:, d].long() * 2 for d in (1, 2))
        near = [(row + a).clamp_max(side - 1) * side + (column + b).clamp_max(side - 1) for a in (0, 1) for b in (0, 1)]
        patches = torch.stack(near, 1) + (place[:, :1].long() + i * frames) * side * side
        place = torch.cat([place, torch.tensor([[0, -1, -1]], dtype=torch.int32)])
        found.append(Layout(place, torch.cat([patches, torch.full((1, 4), -1)]), video=True))
    return found


def native(model: Any, inputs: dict[str, Any], counts: Counts) -> list[Layout]:
    """Grids of any size, 2 × 2 patches to a token (Qwen2.5-VL, Qwen3-VL)."""
    video = inputs.get("pixel_values_videos") is not None
    merge = model.base_model.visual.spatial_merge_size
    found, first = [], 0
    for t, h, w in inputs["video_grid_thw" if video else "image_grid_thw"].tolist():
        h, w = h // merge, w // merge
        n = t * h * w
        index = torch.arange(n)
        place = torch.stack([index // (h * w), index // w % h, index % w], 1).int()
        found.append(Layout(place, first + torch.arange(n * merge**2).view(n, -1), video))
        first += n * merge**2
    return found


def by_position(model: Any, inputs: dict[str, Any], counts: Counts) -> list[Layout]:
    """Grids of any size whose patches carry their places, pooled k × k (Gemma4)."""
    video = inputs.get("pixel_values_videos") is not None
    ids = inputs["video_position_ids" if video else "image_position_ids"]
    ids = ids.flatten(0, -3).cpu()
    k = model.config.vision_config.pooling_kernel_size
    frames = [1] * len(ids)
    if video:
        frames = [int(n) for n in inputs["num_frames_per_video"]]
    found, row = [], 0
    for number in frames:
        places, patches = [], []
        for frame in range(number):
            at = ids[row]
            real = (at >= 0).all(-1).nonzero()[:, 0]
            x, y = at[real, 0] // k, at[real, 1] // k
            wide = int(x.max()) + 1
            order = (y * wide + x).argsort(stable=True)
            patches.append((real + row * ids.shape[1])[order].view(-1, k * k))
            index = torch.arange(len(patches[-1]))
            places.append(torch.stack([torch.full_like(index, frame), index // wide, index % wide], 1).int())
            row += 1
        found.append(Layout(torch.cat(places), torch.cat(patches), video))
    return found
