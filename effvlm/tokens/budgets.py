"""Budgets: how many tokens of a group a pick may take. ``taken`` counts what an earlier pick of the same union has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch


class Budget(Protocol):
    """``rule`` of :func:`effvlm.ops.token_select`, and its limit for groups of ``free`` tokens of which ``taken`` are gone."""

    rule: ClassVar[str]

    def limit(self, free: torch.Tensor, taken: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Keep:
    """``round(share · n)`` of a group's n tokens, at least ``least`` where there are any.

    With ``original``, n is the number of tokens that the image had at first, however many there still are.
    """

    share: float
    least: int = 1
    original: bool = False
    rule: ClassVar[str] = "top"

    def limit(self, free: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        return kept_of(self.share, free).clamp_min(self.least).minimum(free)


@dataclass(frozen=True)
class FillTo:
    """As many as are missing to ``round(share · n)``, at least one, after earlier picks."""

    share: float
    rule: ClassVar[str] = "top"

    def limit(self, free: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        return (kept_of(self.share, free).clamp_min(1).minimum(free) - taken).clamp_min(0)


@dataclass(frozen=True)
class Count:
    """``n`` tokens of each group."""

    n: int
    rule: ClassVar[str] = "top"

    def limit(self, free: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        return torch.full_like(free, self.n).minimum(free)


@dataclass(frozen=True)
class Besides:
    """The first and ``round(share · (n − 1))`` of the others."""

    share: float
    rule: ClassVar[str] = "top"

    def limit(self, free: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        return (1 + kept_of(self.share, (free - 1).clamp_min(0))).minimum(free)


@dataclass(frozen=True)
class Above:
    """All whose score is at least ``threshold``."""

    threshold: float
    rule: ClassVar[str] = "above"

    def limit(self, free: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        return torch.full_like(free, self.threshold)


@dataclass(frozen=True)
class Outliers:
    """All whose score exceeds Q3 + ``factor`` · (Q3 − Q1) of their group (PruMerge)."""

    factor: float = 1.5
    rule: ClassVar[str] = "iqr"

    def limit(self, free: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        return torch.full_like(free, self.factor)


@dataclass(frozen=True)
class TopP:
    """The highest scores until they make up the share ``p`` of their group's sum; scores must not be negative."""

    p: float
    rule: ClassVar[str] = "top_p"

    def limit(self, free: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        return torch.full_like(free, self.p)


def kept_of(share: float, n: torch.Tensor) -> torch.Tensor:
    """``share`` · n rounded half up, of (S,) float32 numbers of tokens."""
    return (share * n.double() + 0.5).floor().float()


def kept(share: float, n: int) -> int:
    """How many of n tokens a method keeps: ``share`` · n rounded half up, at least 1 (0 of 0)."""
    return min(n, max(1, int(share * n + 0.5)))


def check_keep(method: str, keep: float) -> None:
    """Raise unless ``keep`` is a number in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"{method}: expected keep to be a number in (0, 1], got {type(keep).__name__}")
    if not 0 < keep <= 1:
        raise ValueError(f"{method}: expected keep in (0, 1], the share of visual tokens to keep, got {keep}")
