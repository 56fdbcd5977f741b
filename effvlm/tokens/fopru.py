"""FoPru: focal pruning by the vision encoder's attention (Jiang et al., arXiv 2411.14164)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Keep, check_keep
from effvlm.tokens.groups import Row
from effvlm.tokens.picks import Top, Whole
from effvlm.tokens.scores import Signalled
from effvlm.tokens.signals import Attention
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class FoPru:
    """Keep what receives the most attention in the vision tower: token by token, or whole rows of the grid.

    Args:
        keep: share of the tokens (``"rank"``) or rows (``"row"``) to keep, in (0, 1].
        strategy: ``"rank"`` or ``"row"``.
        layer: whose attention; a late one (the abstract does not say which).
    """

    keep: float = 0.25
    strategy: str = "rank"
    layer: int | float = -2

    def __post_init__(self) -> None:
        check_keep("FoPru", self.keep)
        if self.strategy not in ("rank", "row"):
            raise ValueError(f"FoPru: expected strategy 'rank' or 'row', got {self.strategy!r}")

    def steps(self) -> tuple[Step, ...]:
        score = Signalled(Attention(self.layer, "all"))
        pick = Top(score, Keep(self.keep)) if self.strategy == "rank" else Whole(Row(), score, Keep(self.keep))
        return (Step(Select(pick)),)
