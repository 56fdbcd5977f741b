"""DyCoke's temporal merging (Tao et al., "Dynamic Compression of Tokens for Fast Video LLMs", arXiv 2411.15024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effvlm.tokens.budgets import check_keep, kept_of
from effvlm.tokens.groups import Crop, Segments
from effvlm.tokens.scores import Novelty
from effvlm.tokens.step import Select, Step
from effvlm.tokens.tokens import Tokens


@dataclass(frozen=True)
class InFours:
    """Frames in groups of four: 0 whole; 1 and 3 keep ``share`` of their tokens, those least like the frame before; 2 likewise
    against frame 0."""

    share: float = 0.3
    needs = ()

    def __call__(self, tokens: Tokens, taken: torch.Tensor) -> torch.Tensor:
        turn = torch.where(tokens.in_video(), tokens.place[:, 0] % 4, 0)
        score = torch.where(turn == 2, Novelty(back=2)(tokens), Novelty()(tokens)).masked_fill(tokens.protected, torch.inf)
        frames = Segments.of(tokens, Crop())
        free = frames.sums(~tokens.protected)
        whole = turn[frames.order[frames.start[:-1].long()]] == 0
        limit = torch.where(whole, free, kept_of(self.share, free).clamp_min(1)) + frames.sums(tokens.protected)
        return frames.select(score.masked_fill(taken, -torch.inf), limit, "top").long()


@dataclass(frozen=True)
class DyCoke:
    """The first of every four frames stays whole, of the others what is new. On still images this does nothing.

    The dynamic cache of its second stage is not part of this.

    Args:
        keep: share of the tokens that the pruned frames keep, in (0, 1]; the paper: 0.3.
    """

    keep: float = 0.3

    def __post_init__(self) -> None:
        check_keep("DyCoke", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Select(InFours(self.keep))),)
