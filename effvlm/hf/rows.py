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
    def keeping(cls, keep: torch.Tensor, mask: torch.Tensor) -> Rows:
        """Keep the entries of ``keep`` (B, L) bool, padded on the side where ``mask`` has zeros (left, when nowhere)."""
        length = int(keep.sum(1).max()) if len(keep) else 0
        left = not bool((mask[:, -1] == 0).any())
        # A stable sort moves what stays to the padded side's far end, in order.
        order = keep.long().sort(dim=1, stable=True, descending=not left).indices
        source = order[:, keep.shape[1] - length :] if left else order[:, :length]
        return cls(source, keep.gather(1, source))

    def take(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        """(…, B, L) → (…, B, L'), with ``fill`` where the new rows are padding."""
        source = self.source.expand(*values.shape[:-2], *self.source.shape)
        return values.gather(-1, source).masked_fill(~self.real, fill)
