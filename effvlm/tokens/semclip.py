"""SemClip: only the crops that fit the question (arXiv 2503.11794)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Besides, check_keep
from effvlm.tokens.groups import Crop
from effvlm.tokens.picks import Whole
from effvlm.tokens.scores import Overview, Score, relevance
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class SemClip:
    """Whole crops are kept or dropped by their relevance to the prompt; the overview stays. On images without crops: nothing.

    The paper's trained scorer is not part of this: ``scorer`` is any score; default the tokens' cosine with the prompt.
    All crops still go through the vision tower, since models pack their features together.

    Args:
        keep: share of the crops besides the overview to keep, in (0, 1].
        scorer: a score, higher is more relevant.
    """

    keep: float = 0.25
    scorer: Score | None = None

    def __post_init__(self) -> None:
        check_keep("SemClip", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Select(Whole(Crop(), Overview(self.scorer or relevance()), Besides(self.keep)))),)
