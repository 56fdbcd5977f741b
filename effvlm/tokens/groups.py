"""Groups: the parts of a batch within which tokens compete. Each is a frozen dataclass that gives every token a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from effvlm.ops.token_match import token_match
from effvlm.ops.token_select import token_select
from effvlm.tokens.tokens import Tokens


class Group(Protocol):
    """Anything that says, for each token, which part it belongs to: tokens with equal keys belong together."""

    def key(self, tokens: Tokens) -> torch.Tensor: ...


@dataclass(frozen=True)
class Image:
    """All tokens of an image or video."""

    def key(self, tokens: Tokens) -> torch.Tensor:
        return tokens.image()


@dataclass(frozen=True)
class Crop:
    """A crop of an image, or a frame of a video."""

    def key(self, tokens: Tokens) -> torch.Tensor:
        return _nested(tokens.image(), tokens.place[:, 0])


@dataclass(frozen=True)
class Row:
    """A row of the grid of a crop or frame."""

    def key(self, tokens: Tokens) -> torch.Tensor:
        return _nested(Crop().key(tokens), tokens.place[:, 1])


@dataclass(frozen=True)
class Window:
    """A window of ``height`` × ``width`` tokens of the grid of a crop or frame."""

    height: int
    width: int

    def key(self, tokens: Tokens) -> torch.Tensor:
        row, column = (tokens.place[:, 1 + d].div(s, rounding_mode="floor") for d, s in enumerate((self.height, self.width)))
        return _nested(_nested(Crop().key(tokens), row), column)


@dataclass(frozen=True)
class Place:
    """The same place in all frames of a video."""

    def key(self, tokens: Tokens) -> torch.Tensor:
        return _nested(_nested(tokens.image(), tokens.place[:, 1]), tokens.place[:, 2])


def _nested(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Keys that are equal where both are; in the order of ``outer``, then of ``inner``."""
    inner = inner.long() + 1  # −1: no place
    width = int(inner.max()) + 1 if len(inner) else 1
    return outer * width + inner


@dataclass(frozen=True)
class Segments:
    """Groups with their tokens behind one another.

    Attributes:
        label: (N,) int64, the number of each token's group, 0 … S − 1.
        order: (N,) int64, the tokens by group and place.
        start: (S + 1,) int32, where each group begins in ``order``.
    """

    label: torch.Tensor
    order: torch.Tensor
    start: torch.Tensor

    @classmethod
    def of(cls, tokens: Tokens, group: Group) -> Segments:
        """The groups of all tokens."""
        _, label, counts = torch.unique(group.key(tokens), return_inverse=True, return_counts=True)
        start = torch.zeros(len(counts) + 1, dtype=torch.int32, device=label.device)
        start[1:] = counts.cumsum(0)
        return cls(label, label.argsort(stable=True), start)

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(self.start) - 1

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) → (S,) float32 sums over each group."""
        return torch.zeros(self.count, device=values.device).index_add(0, self.label, values.float())

    def means(self, features: torch.Tensor) -> torch.Tensor:
        """(N, C) → (S, C) float32 means over each group."""
        total = torch.zeros((self.count, features.shape[1]), device=features.device).index_add(0, self.label, features.float())
        return total / self.start.diff()[:, None]

    def select(self, score: torch.Tensor, limit: torch.Tensor, rule: str) -> torch.Tensor:
        """(N,) bool: which tokens ``rule`` keeps in each group, see :func:`effvlm.ops.token_select`."""
        kept = token_select(score.float()[self.order], limit.float(), rule=rule, start=self.start).kept
        return torch.zeros_like(kept).scatter_(0, self.order, kept)

    def match(self, features: torch.Tensor, role: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Largest cosine of each source with a destination of its group, and which destination that is (ties: the lowest).

        Args:
            features: (N, C) float32, float16 or bfloat16; they are compared where they are.
            role: (N,) uint8, as for :func:`effvlm.ops.token_match`: 1 a source, 2 a destination, 0 neither.

        Returns:
            (N,) float32 and (N,) int64; −inf and −1 of what is no source, and where a group has no destination.
        """
        N = len(features)
        score = torch.full((N,), -torch.inf, device=features.device)
        partner = torch.full((N,), -1, dtype=torch.long, device=features.device)
        first, last = self.order[self.start[:-1].long()].tolist(), self.order[self.start[1:].long() - 1].tolist()
        for g, (a, z) in enumerate(zip(first, last, strict=True)):
            span = slice(a, z + 1)  # a group and perhaps tokens of others
            match = token_match(features[None, span], 0, role=torch.where(self.label[span] == g, role[span], 0))
            found = match.partner[0] >= 0
            score[span] = torch.where(found, match.score[0], score[span])
            partner[span] = torch.where(found, match.partner[0] + a, partner[span])
        return score, partner
