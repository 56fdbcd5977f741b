"""PixelPrune: drop patches that equal their neighbour, by pixels."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Above
from effvlm.tokens.picks import Top
from effvlm.tokens.scores import Signalled
from effvlm.tokens.signals import Pixels
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class PixelPrune:
    """Tokens whose pixels differ by less than ``threshold`` from those of the left (in the first column: upper) neighbour are
    dropped.

    How many that is the picture decides: all of a blank page but one. The decision is made on pixels; towers take whole grids, so
    the saving begins at the language model.

    Args:
        threshold: smallest largest difference that counts, in units of the normalised pixels.
    """

    threshold: float = 1e-6

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"PixelPrune: expected threshold >= 0, got {self.threshold}")

    def steps(self) -> tuple[Step, ...]:
        return (Step(Select(Top(Signalled(Pixels()), Above(self.threshold)))),)
