"""Visual tokens of a batch, packed: images of any number of tokens behind one another, with everything that belongs to a row."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True)
class Tokens:
    """The visual tokens of all images of a call, N rows in all. Everything here moves by the same plan, so nothing gets out of
    step.

    Attributes:
        x: (N, C) floating point, the features.
        start: images + 1 row numbers; image i has rows ``start[i]`` … ``start[i + 1]``.
        size: (N,) float32, how many original tokens each one stands for.
        position: (N,) int64, index of each token's anchor among all original rows, ascending.
        place: (N, 3) int32: crop or frame, row, column of the anchor; row and column −1 where a token has no place (a newline).
        protected: (N,) bool, tokens that every method keeps and none counts, such as newlines.
        original: how many original tokens each image has, protected ones not counted.
        video: for each image, whether it is a video, its crops frames.
        side: further (N, …) features that move along: the DeepStack levels.
        signals: what the vision tower told about the tokens, by what was asked: (N,) scores or (N, …) features.
    """

    x: torch.Tensor
    start: tuple[int, ...]
    size: torch.Tensor
    position: torch.Tensor
    place: torch.Tensor
    protected: torch.Tensor
    original: tuple[int, ...]
    video: tuple[bool, ...]
    side: tuple[torch.Tensor, ...] = ()
    signals: Mapping[Any, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        images: torch.Tensor | Sequence[torch.Tensor],
        *,
        place: torch.Tensor | None = None,
        protected: torch.Tensor | None = None,
        side: Sequence[torch.Tensor] = (),
        signals: Mapping[Any, torch.Tensor] | None = None,
        video: Sequence[bool] = (),
    ) -> Tokens:
        """Whole images: every token of size 1, at its own place.

        Args:
            images: one (N_i, C) tensor per image, or (B, N, C).
            place: (ΣN, 3) int32; default: one crop each, a square grid where N_i is a square, else one row.
            protected: (ΣN,) bool; default none.
            side: (ΣN, …) tensors that move along.
            signals: what a reduction's ``needs`` ask for.
            video: for each image, whether it is a video; default none is.

        Raises:
            ValueError: features that have not two dimensions each, or a NaN or Inf among them; rows that do not match.
        """
        rows = list(images)
        if not rows or any(f.dim() != 2 for f in rows):
            shapes = ", ".join(str(tuple(f.shape)) for f in rows) or "no image"
            raise ValueError(f"Tokens: expected features of shape (N, C) for each image, got {shapes}")
        x = torch.cat(rows) if len(rows) > 1 else rows[0]
        if not bool(torch.isfinite(x.sum(dtype=torch.float32))):
            raise ValueError("Tokens: expected finite features, got NaN or Inf; does the model run well without reduction?")
        start = [0, *accumulate(map(len, rows))]
        N, device = len(x), x.device
        place = torch.cat([square_place(len(f)) for f in rows]) if place is None else place
        protected = torch.zeros(N, dtype=torch.bool) if protected is None else protected
        for name, t in (("place", place), ("protected", protected), *(("side", t) for t in side)):
            if len(t) != N:
                raise ValueError(f"Tokens: expected {name} of {N} rows, got {len(t)}")
        protected = protected.to(device)
        free = (~protected).long().cumsum(0).tolist() if bool(protected.any()) else None
        total = [0 if not b else b if free is None else free[b - 1] for b in start]
        return cls(
            x,
            tuple(start),
            torch.ones(N, dtype=torch.float32, device=device),
            torch.arange(N, device=device),
            place.to(device),
            protected,
            tuple(b - a for a, b in itertools.pairwise(total)),
            tuple(video) or (False,) * len(rows),
            tuple(side),
            dict(signals or {}),
        )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.start) - 1

    def counts(self) -> list[int]:
        """Tokens of each image."""
        return [b - a for a, b in zip(self.start, self.start[1:], strict=False)]

    def image(self) -> torch.Tensor:
        """(N,) int64, the number of each token's image."""
        counts = torch.tensor(self.counts(), device=self.x.device)
        return torch.repeat_interleave(torch.arange(self.images, device=self.x.device), counts, output_size=len(self))

    def in_video(self) -> torch.Tensor:
        """(N,) bool, whether a token belongs to a video."""
        return torch.tensor(self.video, device=self.x.device)[self.image()]

    def signal(self, key: Any) -> torch.Tensor:
        """What the tower told for ``key``.

        Raises:
            ValueError: nobody provided it; ``effvlm.reduce`` does where the family can.
        """
        if key not in self.signals:
            raise ValueError(f"Tokens: expected the signal {key}, which was not provided; effvlm.reduce provides it where it can")
        return self.signals[key]


def square_place(n: int) -> torch.Tensor:
    """(n, 3) int32 places of one crop: a square grid where ``n`` is a square, else one row."""
    side = round(n**0.5)
    width = side if side * side == n else max(n, 1)
    index = torch.arange(n, dtype=torch.int32)
    return torch.stack([torch.zeros_like(index), index // width, index % width], dim=1)
