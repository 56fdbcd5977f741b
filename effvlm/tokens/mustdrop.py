"""MustDrop's vision stage: uniform windows become one token (Liu et al., arXiv 2411.10803)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import Keep, check_keep
from effvlm.tokens.merges import Uniform
from effvlm.tokens.picks import Top
from effvlm.tokens.scores import Signalled
from effvlm.tokens.signals import Attention
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class MustDrop:
    """3×3 windows of alike tokens are merged, size-weighted; of what is left, the most CLS attention stays.

    The paper merges windows after the tower's first layer; here the finished features are compared, so that every family and
    ragged batches work. Its later stages drop by the language model's attention; here the budget is met by the attention
    that defines the paper's key set.

    Args:
        keep: share of the tokens to keep at most, in (0, 1].
        threshold: mean pairwise cosine above which a window is merged.
        window: side of the windows.
        layer: whose CLS attention.
    """

    keep: float = 0.25
    threshold: float = 0.8
    window: int = 3
    layer: int | float = -2

    def __post_init__(self) -> None:
        check_keep("MustDrop", self.keep)

    def steps(self) -> tuple[Step, ...]:
        merge = Step(Uniform(self.window, self.threshold))
        return (merge, Step(Select(Top(Signalled(Attention(self.layer)), Keep(self.keep, original=True)))))
