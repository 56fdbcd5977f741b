"""Sums of x xᵀ over the tokens of each expert: the Hessians that GPTQ wants."""

from __future__ import annotations

import math

import torch


class Gram:
    """Hessians of E experts that share their number of input channels C.

    An expert that sees far more tokens than the others learns nothing from them, so at most ``max_tokens_factor`` times the mean
    are looked at, the first ones (QMoE's rule, arXiv 2310.16795 §3.2).

    Args:
        experts: E.
        channels: C.
        counts: (E,) tokens that each expert will be given, by which the limit is known beforehand (see
            :func:`effvlm.experts.usage`); None sets none.
        max_tokens_factor: the limit, as a multiple of the mean of ``counts``.
        device: where the sums are kept.

    Attributes:
        sums: (E, C, C) float32.
        tokens: (E,) int64, how many are in the sums.
        limit: tokens per expert at most, or None.
    """

    def __init__(
        self,
        experts: int,
        channels: int,
        counts: torch.Tensor | None = None,
        max_tokens_factor: float = 4.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if counts is not None and tuple(counts.shape) != (experts,):
            raise ValueError(f"Gram: expected counts of shape {(experts,)}, got {tuple(counts.shape)}")
        self.sums = torch.zeros(experts, channels, channels, device=device)
        self.tokens = torch.zeros(experts, dtype=torch.int64)
        self.limit = None if counts is None else math.ceil(max_tokens_factor * float(counts.double().mean()))

    @torch.no_grad()
    def add(self, expert: int, rows: torch.Tensor) -> int:
        """Add inputs of one expert.

        Args:
            expert: which.
            rows: (N, C) floating point.

        Returns:
            How many of them were within the limit.

        Raises:
            ValueError: another number of channels, or NaN or Inf.
        """
        if rows.dim() != 2 or rows.shape[1] != self.sums.shape[2]:
            raise ValueError(f"Gram: expected rows of shape (N, {self.sums.shape[2]}), got {tuple(rows.shape)}")
        left = len(rows) if self.limit is None else max(0, self.limit - int(self.tokens[expert]))
        taken = rows[:left].to(self.sums.device, torch.float32)
        if not bool(torch.isfinite(taken).all()):
            raise ValueError(f"Gram: expected finite rows, got NaN or Inf among those of expert {expert}")
        self.sums[expert].addmm_(taken.T, taken)
        self.tokens[expert] += len(taken)
        return len(taken)
