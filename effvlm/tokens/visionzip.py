"""VisionZip: dominant and contextual tokens (Yang et al., arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import FillTo, Keep, check_keep
from effvlm.tokens.combines import Nearest
from effvlm.tokens.picks import Every, Top, Union
from effvlm.tokens.scores import Signalled
from effvlm.tokens.signals import Attention, Keys
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class VisionZip:
    """Tokens with the most CLS attention stay as they are; of the rest, evenly spaced ones take in the others by similarity of
    keys.

    Args:
        keep: share of the tokens to keep, in (0, 1].
        dominant: share of those that are dominant (the paper: 54 of 64).
        layer: whose attention and keys.
        release: combine as the released code does, target plus mean of the others, instead of the mean of all.
    """

    keep: float = 0.25
    dominant: float = 54 / 64
    layer: int | float = -2
    release: bool = False

    def __post_init__(self) -> None:
        check_keep("VisionZip", self.keep)
        check_keep("VisionZip.dominant", self.dominant)

    def steps(self) -> tuple[Step, ...]:
        by_attention = Top(Signalled(Attention(self.layer)), Keep(self.keep * self.dominant))
        how = "target_plus_mean" if self.release else "mean"
        return (Step(Select(Union((by_attention, Every(FillTo(self.keep)))), Nearest(Keys(self.layer), how, into=2))),)
