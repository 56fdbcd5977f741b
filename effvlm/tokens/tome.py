"""ToMe: merge the most similar tokens (Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import check_keep
from effvlm.tokens.merges import Bipartite
from effvlm.tokens.step import Step


@dataclass(frozen=True)
class ToMe:
    """Bipartite soft matching, means weighted by size.

    In the vision tower (``at="vision"``, as in the paper) one round per layer between attention and MLP, by the keys, with
    proportional attention; the tower gets faster as well. After the projector (the default, works for every family) rounds
    follow one another on the finished features until ``keep`` is reached.

    Args:
        keep: share of the tokens to keep, in (0, 1]; ``round(keep · N)``, at least one. 1 changes nothing at all.
        metric: ``"cosine"`` or ``"dot"``.
        at: ``"projector"`` or ``"vision"``.
        r: with ``at="vision"``: pairs per layer, one number or one per layer, instead of what leads to ``keep``.
        proportional: with ``at="vision"``: attention counts a token of size s s times.

    Raises:
        ValueError: ``keep`` outside (0, 1], or an unknown metric or place.
        TypeError: ``keep`` is no number.
    """

    keep: float = 0.5
    metric: str = "cosine"
    at: str = "projector"
    r: int | tuple[int, ...] | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        check_keep("ToMe", self.keep)
        if self.metric not in ("cosine", "dot"):
            raise ValueError(f"ToMe: expected metric 'cosine' or 'dot', got {self.metric!r}")
        if self.at not in ("projector", "vision"):
            raise ValueError(f"ToMe: expected at to be 'projector' or 'vision', got {self.at!r}")
        if self.r is not None and self.at != "vision":
            raise ValueError("ToMe: expected r together with at='vision', where there are layers")

    def steps(self) -> tuple[Step, ...]:
        return (Step(Bipartite(self.keep, self.metric, r=self.r, proportional=self.proportional), self.at),)
