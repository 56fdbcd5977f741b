"""DART: drop what duplicates a few pivots (Wen et al., "Stop Looking for Important Tokens ...", arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Keep, check_keep
from effvlm.tokens.picks import Top
from effvlm.tokens.scores import Likeness, Negative
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class DART:
    """Pivots are the tokens with the largest norm; those that are least like any pivot stay, with the pivots.

    The paper takes norms of keys in the language model's second layer; here they are those of the projected features.

    Args:
        keep: share of the tokens to keep, in (0, 1].
        pivots: how many pivots each image has.
    """

    keep: float = 0.25
    pivots: int = 8

    def __post_init__(self) -> None:
        check_keep("DART", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Select(Top(Negative(Likeness(self.pivots)), Keep(self.keep)))),)
