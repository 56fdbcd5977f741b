"""Stride: every so-manieth token, whatever it shows. A control that any method should beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Keep, check_keep
from effvlm.tokens.picks import Every
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class Stride:
    """Keep ``round(keep · N)`` tokens at even distances and drop the others.

    Args:
        keep: share of the tokens to keep, in (0, 1]; at least one is kept. 1 changes nothing at all.
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        check_keep("Stride", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Select(Every(Keep(self.keep)))),)
