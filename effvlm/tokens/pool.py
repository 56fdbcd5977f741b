"""Pool: means of grid cells. The control for every merging method, and, for models trained so, Matryoshka tokens (M3)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import check_keep
from effvlm.tokens.merges import Grid
from effvlm.tokens.step import Step


@dataclass(frozen=True)
class Pool:
    """Average pooling: each crop's grid is cut into about ``keep`` as many cells.

    With ``keep`` 1/4, 1/16, 1/64 on a square grid these are the nested token sets of M3 (arXiv 2405.17430: 576, 144, 36, 9, 1),
    whose accuracy needs a model trained on them; on other models this is a control.

    Args:
        keep: share of the tokens to keep, in (0, 1]; each side of the grid gets round(side · √keep) cells.
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        check_keep("Pool", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Grid(self.keep)),)
