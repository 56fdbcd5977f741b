"""CDPruner: diverse tokens on condition of the prompt (Zhang et al., arXiv 2506.10967)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Keep, check_keep
from effvlm.tokens.picks import Diverse
from effvlm.tokens.scores import Negative, Scaled, Score, relevance
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class CDPruner:
    """Greedy MAP of a determinantal point process with kernel r_i · cos(x_i, x_j) · r_j.

    The paper's relevance r is the min-max of the *negated* cosine with CLIP's text embedding (``negate``). A VLM comes without
    CLIP's
    text tower, so the default is the cosine with the prompt's embeddings in the language model; any score can take its place.

    Args:
        keep: share of the tokens to keep, in (0, 1].
        relevance: a score, higher is more relevant; default :class:`effvlm.tokens.Text`.
        negate: use the opposite of it.
    """

    keep: float = 0.25
    relevance: Score | None = None
    negate: bool = False

    def __post_init__(self) -> None:
        check_keep("CDPruner", self.keep)

    def steps(self) -> tuple[Step, ...]:
        score = self.relevance or relevance()
        return (Step(Select(Diverse("dpp", Keep(self.keep), Scaled(Negative(score) if self.negate else score)))),)
