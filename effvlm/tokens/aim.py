"""AIM's merging stage (Zhong et al., "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", 2412.03248)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import check_keep
from effvlm.tokens.groups import Crop
from effvlm.tokens.merges import Bipartite
from effvlm.tokens.step import Step


@dataclass(frozen=True)
class AIM:
    """Bipartite merging of projected tokens within each frame, halved until ``keep``; plain means, no sizes, as the paper has it.

    The pruning inside the language model (PageRank over its attention) is not part of this.

    Args:
        keep: share of the tokens to keep, in (0, 1]; the paper: 0.25 for video, 0.125 for images.
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        check_keep("AIM", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Bipartite(self.keep, weighted=False, group=Crop())),)
