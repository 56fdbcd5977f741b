"""DivPrune: the subset of tokens that are furthest apart (Alvar et al., arXiv 2503.02175). Built from the formula alone."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Keep, check_keep
from effvlm.tokens.picks import Diverse
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class DivPrune:
    """Greedy max-min of cosine distances: first the token furthest from its nearest, then always the one furthest from all
    chosen.

    Args:
        keep: share of the tokens to keep, in (0, 1]; the paper's default is 0.098.
    """

    keep: float = 0.098

    def __post_init__(self) -> None:
        check_keep("DivPrune", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Select(Diverse("max_min", Keep(self.keep)))),)
