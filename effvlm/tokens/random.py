"""Random: tokens drawn at random. A control that any method should beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Keep, check_keep
from effvlm.tokens.picks import Top
from effvlm.tokens.scores import Chance
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class Random:
    """Keep ``round(keep · N)`` tokens of each image, drawn without replacement.

    Args:
        keep: share of the tokens to keep, in (0, 1]; at least one is kept.
        seed: same seed, same draw, for an image's number in the batch and its number of tokens.
    """

    keep: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep("Random", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Select(Top(Chance(self.seed), Keep(self.keep)))),)
