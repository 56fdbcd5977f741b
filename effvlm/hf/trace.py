"""Pictures of a reduction: which patches were kept, merged or dropped."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from effvlm.tokens import Plan, Tokens

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Trace:
    """The tokens of a call before reduction, and the plan from them to what the language model got."""

    before: Tokens
    plan: Plan

    def draw(self, image: Image, index: int = 0, crop: int | None = None) -> Image:
        """``image`` with the fate of its patches: bright is kept, one colour is one merged token, dark is dropped.

        Args:
            image: the picture as it was given to the processor.
            index: which image or video of the call.
            crop: which crop or frame; default: all tiles together where the picture was tiled on one grid, else crop 0.
        """
        from PIL import Image as Images
        from PIL import ImageDraw

        rows, share, merged = self._cells(index, crop)
        place = self.before.place[rows].cpu()
        high, wide = int(place[:, 1].max()) + 1, int(place[:, 2].max()) + 1
        scale = max(1, round(448 / min(image.size)))
        cover = image.convert("RGB").resize((image.width * scale, image.height * scale))
        pen = ImageDraw.Draw(cover)
        for (_, y, x), part, group in zip(place.tolist(), share.tolist(), merged.tolist(), strict=True):
            left, top = x * cover.width // wide, y * cover.height // high
            right, bottom = (x + 1) * cover.width // wide, (y + 1) * cover.height // high
            patch = cover.crop((left, top, right, bottom))
            if part == 0:
                cover.paste(patch.convert("L").point(lambda v: v * 0.25).convert("RGB"), (left, top))
            elif group >= 0:  # hues a golden ratio apart, so that neighbours differ
                color = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(group * 0.618034 % 1, 0.9, 1))
                cover.paste(Images.blend(patch, Images.new("RGB", patch.size, color), 0.4), (left, top))
            pen.rectangle((left, top, right - 1, bottom - 1), outline=(40, 40, 40))
        return cover

    def _cells(self, index: int, crop: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of the old tokens to draw; how much of each goes anywhere; its new token where that has several members, else
        −1."""
        if not 0 <= index < self.before.images:
            raise ValueError(f"trace: expected an image in 0 … {self.before.images - 1} of the last call, got {index}")
        place, image = self.before.place, self.before.image()
        mine = (image == index) & (place[:, 1] >= 0)
        tiled = mine & (place[:, 0] > 0)
        on_one_grid = bool(tiled.any()) and len(torch.unique(place[tiled][:, 1:], dim=0)) == int(tiled.sum())
        if crop is not None:
            mine &= place[:, 0] == crop
        else:
            mine &= place[:, 0] > 0 if on_one_grid else place[:, 0] == 0
        rows = mine.nonzero()[:, 0]
        if not len(rows):
            raise ValueError(f"trace: image {index} has no crop {crop}")
        N, device = self.plan.old, self.plan.start.device
        source, new = self.plan.source.long(), self.plan.rows()
        share = torch.zeros(N, device=device).index_add(0, source, self.plan.shares().abs())
        members = self.plan.start.diff()
        group = torch.full((N,), -1, dtype=torch.long, device=device)
        several = members[new] > 1
        group[source[several]] = new[several]
        return rows, share[rows], group[rows]
