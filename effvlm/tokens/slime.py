"""SliME's text-guided selection (Zhang et al., "Beyond LLaVA-HD", arXiv 2406.08487)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Keep, TopP, check_keep
from effvlm.tokens.picks import Top
from effvlm.tokens.scores import Scaled, Score, relevance
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class SliME:
    """Softmax over the tokens' relevance to the prompt; the most likely ones that make up ``top_p`` stay, at most ``keep`` of
    all.

    The paper's trained mixture of adapters and resamplers is not part of this.

    Args:
        keep: share of the tokens to keep at most, in (0, 1].
        top_p: share of the probability.
        tau: temperature of the softmax.
        relevance: a score; default the mean cosine with the prompt's embeddings.
    """

    keep: float = 0.25
    top_p: float = 0.9
    tau: float = 0.05
    relevance: Score | None = None

    def __post_init__(self) -> None:
        check_keep("SliME", self.keep)
        check_keep("SliME.top_p", self.top_p)

    def steps(self) -> tuple[Step, ...]:
        score = Scaled(self.relevance or relevance(), "softmax", tau=self.tau)
        likely = Step(Select(Top(score, TopP(self.top_p))))
        return (likely, Step(Select(Top(score, Keep(self.keep, original=True)))))
