"""What a token-reduction method is: a frozen dataclass that turns :class:`Tokens` into fewer :class:`Tokens`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Tokens:
    """Visual tokens of B images with N tokens each.

    Attributes:
        x: (B, N, C) floating point, the features.
        size: (B, N) float32, how many original tokens each one stands for.
        position: (B, N) int64, index of each token's anchor among the original tokens, ascending along N.
    """

    x: torch.Tensor
    size: torch.Tensor
    position: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Tokens:
        """The (B, N, C) features of whole images: every token of size 1, at its own place.

        Raises:
            ValueError: ``x`` has not three dimensions, or a NaN or Inf among its values.
        """
        if x.dim() != 3:
            raise ValueError(f"Tokens: expected features of shape (B, N, C), got {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("Tokens: expected finite features, got NaN or Inf; does the model run well without reduction?")
        B, N, _ = x.shape
        return cls(x, x.new_ones((B, N), dtype=torch.float32), torch.arange(N, device=x.device).expand(B, N))


class Method(Protocol):
    """Anything that maps tokens to fewer tokens, the same number for every image of the batch."""

    def __call__(self, tokens: Tokens) -> Tokens: ...


def kept(keep: float, N: int) -> int:
    """How many of N tokens a method keeps: ``keep`` · N rounded half up, at least 1 (0 of 0)."""
    return min(N, max(1, int(keep * N + 0.5)))


def check_keep(method: str, keep: float) -> None:
    """Raise unless ``keep`` is a number in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"{method}: expected keep to be a number in (0, 1], got {type(keep).__name__}")
    if not 0 < keep <= 1:
        raise ValueError(f"{method}: expected keep in (0, 1], the share of visual tokens to keep, got {keep}")
