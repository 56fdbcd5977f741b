"""ToMe: merge the most similar tokens (Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effvlm.ops.token_match import token_match
from effvlm.ops.token_merge import token_merge
from effvlm.tokens.base import Tokens, check_keep, kept


@dataclass(frozen=True)
class ToMe:
    """Bipartite soft matching, repeated until ``keep`` of the tokens are left.

    Each round merges at most half of the tokens into their most similar partner, as a mean weighted by size (§3 of the paper);
    the paper spreads the rounds over the layers of a ViT, here they follow one another on the finished features. The result is
    in the original order of the groups' anchors.

    Args:
        keep: share of the tokens to keep, in (0, 1]; ``round(keep · N)``, at least one. 1 changes nothing at all.
        metric: ``"cosine"`` or ``"dot"``.

    Raises:
        ValueError: ``keep`` outside (0, 1], or an unknown metric.
        TypeError: ``keep`` is no number.
    """

    keep: float = 0.5
    metric: str = "cosine"

    def __post_init__(self) -> None:
        check_keep("ToMe", self.keep)
        if self.metric not in ("cosine", "dot"):
            raise ValueError(f"ToMe: expected metric 'cosine' or 'dot', got {self.metric!r}")

    def __call__(self, tokens: Tokens) -> Tokens:
        target = kept(self.keep, tokens.x.shape[1])
        while tokens.x.shape[1] > target:
            tokens = self._round(tokens, target)
        return tokens

    def _round(self, tokens: Tokens, target: int) -> Tokens:
        N = tokens.x.shape[1]
        M = max(target, N - N // 2)
        group = token_match(tokens.x, N - M, metric=self.metric).group
        x, size = token_merge(tokens.x, group, M, weight=tokens.size)
        return Tokens(x, size, tokens.position.gather(1, _anchors(group, M)))


def _anchors(group: torch.Tensor, M: int) -> torch.Tensor:
    """(B, N) groups numbered by anchor → (B, M) int64 place of each anchor: the last member but for sources that joined it.

    A group's anchor is its only odd member, or its only member: the other members are sources, at even places.
    """
    B, N = group.shape
    place = torch.arange(N, device=group.device)
    rank = torch.where(place % 2 == 1, place + N, place).expand(B, N)  # odd places outrank all even ones
    best = rank.new_full((B, M), -1).scatter_reduce(1, group.long(), rank, "amax")
    return torch.where(best >= N, best - N, best)
