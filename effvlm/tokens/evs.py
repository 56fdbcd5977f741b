"""EVS: efficient video sampling, drop what did not change since the last frame (arXiv 2510.14624)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Keep, check_keep
from effvlm.tokens.picks import Top
from effvlm.tokens.scores import Novelty
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class EVS:
    """Tokens least like the one at their place a frame before stay, over the whole video; the first frame always does.

    On still images this does nothing.

    Args:
        keep: share of a video's tokens to keep, in (0, 1], at least a frame.
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        check_keep("EVS", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Select(Top(Novelty(), Keep(self.keep)))),)
