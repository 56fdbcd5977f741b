"""LFTR: learning-free token reduction (Su et al., arXiv 2501.17391)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Keep, check_keep
from effvlm.tokens.groups import Crop, Image
from effvlm.tokens.picks import Top
from effvlm.tokens.scores import Likeness, Negative, Novelty
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class LFTR:
    """Reduction along time, then in space, by similarity alone.

    Inferred: the abstract speaks of temporal and spatial redundancy by differences and similarities, and gives no criterion. Here
    tokens least like the one at their place a frame before stay (√keep of them, where there are frames), and of each frame
    those least like its most prominent tokens.

    Args:
        keep: share of the tokens to keep, in (0, 1]; the paper reports up to 1/16 for video.
        pivots: prominent tokens per frame, by norm.
    """

    keep: float = 0.25
    pivots: int = 8

    def __post_init__(self) -> None:
        check_keep("LFTR", self.keep)

    def steps(self) -> tuple[Step, ...]:
        in_time = Step(Select(Top(Novelty(), Keep(self.keep**0.5), Image())))
        in_space = Step(Select(Top(Negative(Likeness(self.pivots, Crop())), Keep(self.keep, original=True), Image())))
        return (in_time, in_space)
