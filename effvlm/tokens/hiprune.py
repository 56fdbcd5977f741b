"""HiPrune: tokens by the hierarchy of attention in the vision encoder (arXiv 2508.00553)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import FillTo, Keep, check_keep
from effvlm.tokens.picks import Around, Pick, Top, Union
from effvlm.tokens.scores import Signalled, relevance
from effvlm.tokens.signals import Attention
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class HiPrune:
    """Anchors by attention in a middle layer, their four neighbours, and registers by attention in a late layer for the rest.

    Args:
        keep: share of the tokens to keep, in (0, 1].
        alpha: share of those for anchors and neighbours: a fifth of it are anchors.
        object_layer: the middle layer; 0.375 of the depth is layer 9 of CLIP-L's 24.
        register_layer: the late layer.
        plus: HiPrune++: half of the registers' share goes to the tokens most like the prompt (the split is inferred).
    """

    keep: float = 0.25
    alpha: float = 0.1
    object_layer: int | float = 0.375
    register_layer: int | float = -2
    plus: bool = False

    def __post_init__(self) -> None:
        check_keep("HiPrune", self.keep)
        check_keep("HiPrune.alpha", self.alpha)

    def steps(self) -> tuple[Step, ...]:
        middle, late = Signalled(Attention(self.object_layer, "all")), Signalled(Attention(self.register_layer, "all"))
        picks: list[Pick] = [Top(middle, Keep(self.keep * self.alpha / 5)), Around()]
        if self.plus:
            picks.append(Top(relevance(), FillTo(self.keep * (1 + self.alpha) / 2)))
        return (Step(Select(Union((*picks, Top(late, FillTo(self.keep)))))),)
