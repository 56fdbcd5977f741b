"""LLaVA-PruMerge and PruMerge+ (Shang et al., arXiv 2403.15388)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Budget, FillTo, Keep, Outliers, check_keep
from effvlm.tokens.combines import Absorb
from effvlm.tokens.picks import Every, Pick, Top, Union
from effvlm.tokens.scores import Signalled
from effvlm.tokens.signals import Attention, Keys
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class PruMerge:
    """Tokens whose CLS attention is an outlier stay, and take in their nearest others by key, weighted by attention.

    Args:
        keep: share of the tokens to keep; None: as many as are outliers, above Q3 + 1.5·IQR (adaptive, the paper's way).
        plus: PruMerge+: evenly spaced tokens besides, up to ``keep`` (None: up to a quarter).
        neighbours: how many each takes in.
        layer: whose attention and keys.
    """

    keep: float | None = None
    plus: bool = False
    neighbours: int = 32
    layer: int | float = -1

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep("PruMerge", self.keep)

    def steps(self) -> tuple[Step, ...]:
        share = 0.25 if self.keep is None else self.keep
        budget: Budget = Outliers() if self.keep is None or self.plus else Keep(share)
        pick: Pick = Top(Signalled(Attention(self.layer)), budget)
        if self.plus:
            pick = Union((pick, Every(FillTo(share))))
        return (Step(Select(pick, Absorb(Attention(self.layer), Keys(self.layer, "all"), self.neighbours))),)
