"""AcFormer's visual anchors (Liu et al., "Visual Anchors Are Strong Information Aggregators", arXiv 2405.17815)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from effvlm.tokens.budgets import check_keep, kept
from effvlm.tokens.combines import Nearest
from effvlm.tokens.signals import Attention, Signal
from effvlm.tokens.step import Select, Step
from effvlm.tokens.tokens import Tokens


@dataclass(frozen=True)
class ByHead:
    """Heads in turn pick the token with the most CLS attention that nobody has picked yet, until ``share`` is reached."""

    share: float = 0.25
    attention: Attention = field(default_factory=lambda: Attention(-2, "cls", "none"))

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (self.attention,)

    def __call__(self, tokens: Tokens, taken: torch.Tensor) -> torch.Tensor:
        score = tokens.signal(self.attention).float()
        picked = (tokens.protected & ~taken).long()
        for a, b in zip(tokens.start, tokens.start[1:], strict=False):
            rows = torch.arange(a, b, device=score.device)
            rows = rows[~tokens.protected[a:b] & ~taken[a:b]]
            wanted = kept(self.share, len(rows))
            ranking = score[rows].argsort(dim=0, descending=True, stable=True).T.tolist()  # per head
            heads, chosen, at = len(ranking), set[int](), [0] * len(ranking)
            while len(chosen) < wanted:
                head = len(chosen) % heads
                while ranking[head][at[head]] in chosen:
                    at[head] += 1
                chosen.add(ranking[head][at[head]])
            picked[rows[sorted(chosen)]] = 1
        return picked


@dataclass(frozen=True)
class AcFormer:
    """Anchors that the heads of the vision tower agree to look at; the other tokens join the most similar anchor.

    In the paper anchors are the queries of a trained resampler; without one, each takes the mean of what is most similar to it.

    Args:
        keep: share of the tokens to keep, in (0, 1].
        layer: whose CLS attention.
    """

    keep: float = 0.25
    layer: int | float = -2

    def __post_init__(self) -> None:
        check_keep("AcFormer", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Select(ByHead(self.keep, Attention(self.layer, "cls", "none")), Nearest())),)
