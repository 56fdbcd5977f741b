"""Stride: every so-manieth token, whatever it shows. The control that any method should beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effvlm.tokens.base import Tokens, check_keep, kept


@dataclass(frozen=True)
class Stride:
    """Keep ``round(keep · N)`` tokens at even distances and drop the others.

    Args:
        keep: share of the tokens to keep, in (0, 1]; at least one is kept. 1 changes nothing at all.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        check_keep("Stride", self.keep)

    def __call__(self, tokens: Tokens) -> Tokens:
        N = tokens.x.shape[1]
        M = kept(self.keep, N)
        if M == N:
            return tokens
        chosen = (torch.arange(M, device=tokens.x.device) * N + N // 2) // M  # centres of M equal parts
        return Tokens(tokens.x[:, chosen], tokens.size[:, chosen], tokens.position[:, chosen])
