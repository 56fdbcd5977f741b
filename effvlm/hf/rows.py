"""Dropping columns of a padded batch: each row loses its own, and rows are padded again to one length."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """Which entries of (B, L) rows stay.

    Attributes:
        source: (B, L') int64, where each entry of the new rows comes from.
        real: (B, L') bool, False where the new rows are padding.
    """

    source: torch.Tensor
    real: torch.Tensor

    @classmethod
    def keeping(cls, ids: torch.Tensor, mask: torch.Tensor, placeholder: int, images: list[torch.Tensor]) -> Rows:
        """Keep everything but the placeholders of visual tokens that are gone.

        Args:
            ids: (B, L) int64 with one ``placeholder`` per visual token, images in order of rows.
            mask: (B, L) attention mask; rows are padded on the side where it has zeros (left, when nowhere).
            images: per image (N,) bool, which of its visual tokens stay.

        Raises:
            ValueError: the number of placeholders is not that of the images' tokens.
        """
        is_visual = ids == placeholder
        tokens = sum(map(len, images))
        if int(is_visual.sum()) != tokens:
            raise ValueError(f"reduce: expected one image placeholder per visual token, got {int(is_visual.sum())} for {tokens}")
        keep = torch.ones_like(is_visual)
        keep[is_visual] = torch.cat(images).to(ids.device)
        length = int(keep.sum(1).max())
        left = not bool((mask[:, -1] == 0).any())
        # A stable sort moves what stays to the padded side's far end, in order.
        order = keep.long().sort(dim=1, stable=True, descending=not left).indices
        source = order[:, ids.shape[1] - length :] if left else order[:, :length]
        return cls(source, keep.gather(1, source))

    def take(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        """(B, L) → (B, L'), with ``fill`` where the new rows are padding."""
        return values.gather(1, self.source).masked_fill(~self.real, fill)
