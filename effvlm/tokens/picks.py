"""Picks: which tokens stay. Each returns (N,) int64: 0 not picked, else the number of the pick in its union (1 alone).

Protected tokens are picked by every pick, and count in no budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from effvlm.ops.token_diverse import token_diverse
from effvlm.tokens.budgets import Budget, Keep
from effvlm.tokens.groups import Group, Image, Segments
from effvlm.tokens.scores import Score, Signalled
from effvlm.tokens.signals import Signal
from effvlm.tokens.tokens import Tokens


class Pick(Protocol):
    """Anything that picks tokens, among those that are not ``taken`` (N,) bool."""

    @property
    def needs(self) -> tuple[Signal, ...]: ...
    def __call__(self, tokens: Tokens, taken: torch.Tensor) -> torch.Tensor: ...


def limits(tokens: Tokens, parts: Segments, budget: Budget, taken: torch.Tensor) -> torch.Tensor:
    """(S,) float32, the budget of every group, protected tokens on top of it where tokens are counted."""
    free = parts.sums(~tokens.protected)
    if isinstance(budget, Keep) and budget.original:
        if parts.count != tokens.images:
            raise ValueError("Keep: expected groups of whole images with original=True")
        free = torch.tensor(tokens.original, dtype=torch.float32, device=free.device)
    limit = budget.limit(free, parts.sums(taken & ~tokens.protected))
    return limit + parts.sums(tokens.protected & ~taken) if budget.rule == "top" else limit


@dataclass(frozen=True)
class Top:
    """The tokens of each group with the highest score, as many as the budget allows."""

    score: Score = field(default_factory=Signalled)
    budget: Budget = field(default_factory=lambda: Keep(0.25))
    group: Group = field(default_factory=Image)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.score.needs

    def __call__(self, tokens: Tokens, taken: torch.Tensor) -> torch.Tensor:
        parts = Segments.of(tokens, self.group)
        score = self.score(tokens).float().masked_fill(tokens.protected, torch.inf).masked_fill(taken, -torch.inf)
        return parts.select(score, limits(tokens, parts, self.budget, taken), self.budget.rule).long()


@dataclass(frozen=True)
class Every:
    """Tokens at even distances among those that are left of each group."""

    budget: Budget = field(default_factory=lambda: Keep(0.25))
    group: Group = field(default_factory=Image)
    needs = ()

    def __call__(self, tokens: Tokens, taken: torch.Tensor) -> torch.Tensor:
        parts = Segments.of(tokens, self.group)
        left = ~tokens.protected & ~taken
        n = parts.sums(left)
        m = self.budget.limit(parts.sums(~tokens.protected), parts.sums(taken & ~tokens.protected)).minimum(n).long()
        n = n.long()
        rank = torch.zeros_like(parts.label)
        in_order = left[parts.order].long().cumsum(0)
        before = torch.cat([in_order.new_zeros(1), in_order])[parts.start[:-1].long()]
        rank[parts.order] = in_order - 1 - before[parts.label[parts.order]]  # among the left ones of its group
        n, m = n[parts.label], m[parts.label]
        # The centres of m equal parts of 0 … n − 1 are (k·n + n//2) // m: this rank is one when some k gives it.
        k = (rank * m - n // 2 + n - 1).div(n.clamp_min(1), rounding_mode="floor").clamp_min(0)
        centre = (k * n + n // 2).div(m.clamp_min(1), rounding_mode="floor")
        return ((centre == rank) & (k < m) & left | (tokens.protected & ~taken)).long()


@dataclass(frozen=True)
class Whole:
    """Whole units (rows, crops, frames), those with the highest mean of scores, as many of each group as the budget says."""

    unit: Group
    score: Score = field(default_factory=Signalled)
    budget: Budget = field(default_factory=lambda: Keep(0.25))
    group: Group = field(default_factory=Image)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.score.needs

    def __call__(self, tokens: Tokens, taken: torch.Tensor) -> torch.Tensor:
        free = (~tokens.protected & ~taken).nonzero()[:, 0]
        units = Segments.of(tokens, self.unit)
        groups = Segments.of(tokens, self.group)
        sums = torch.zeros(units.count, device=free.device).index_add(0, units.label[free], self.score(tokens).float()[free])
        used = torch.bincount(units.label[free], minlength=units.count)
        sums = sums / used.clamp_min(1)
        group_of = torch.zeros(units.count, dtype=torch.long, device=free.device).scatter_(0, units.label, groups.label)
        order = group_of.argsort(stable=True)
        n = torch.zeros(groups.count, device=free.device).index_add(0, group_of, (used > 0).float())
        start = torch.zeros(groups.count + 1, dtype=torch.int32, device=free.device)
        start[1:] = torch.bincount(group_of, minlength=groups.count).cumsum(0)
        score = sums.masked_fill(used == 0, -torch.inf)[order]
        chosen = Segments(group_of[order], torch.arange(len(order), device=free.device), start).select(
            score, self.budget.limit(n, torch.zeros_like(n)), self.budget.rule
        )
        picked = torch.zeros(units.count, dtype=torch.bool, device=free.device).scatter_(0, order, chosen)
        return (picked[units.label] & ~taken | (tokens.protected & ~taken)).long()


@dataclass(frozen=True)
class Around:
    """The four neighbours, in their crop's grid, of what has been taken before (HiPrune's buffers)."""

    needs = ()

    def __call__(self, tokens: Tokens, taken: torch.Tensor) -> torch.Tensor:
        place = tokens.place.long()
        width = int(place[:, 1:].max()) + 3 if len(tokens) else 1
        crop = tokens.image() * (int(place[:, 0].max()) + 1 if len(tokens) else 1) + place[:, 0]
        key = (crop * width + place[:, 1] + 1) * width + place[:, 2] + 1
        real = taken & ~tokens.protected & (place[:, 1] >= 0)
        near = torch.cat([key[real] + step for step in (1, -1, width, -width)])
        return (torch.isin(key, near) & ~taken & ~tokens.protected & (place[:, 1] >= 0)).long()


@dataclass(frozen=True)
class Diverse:
    """Tokens of each group that are unlike each other: greedy max-min distance, or a determinantal point process."""

    method: str = "max_min"
    budget: Budget = field(default_factory=lambda: Keep(0.25))
    relevance: Score | None = None
    group: Group = field(default_factory=Image)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.relevance.needs if self.relevance else ()

    def __call__(self, tokens: Tokens, taken: torch.Tensor) -> torch.Tensor:
        parts = Segments.of(tokens, self.group)
        free = ~tokens.protected & ~taken
        k = limits(tokens, parts, self.budget, taken) - parts.sums(tokens.protected & ~taken)
        weight = self.relevance(tokens).float() if self.relevance else None
        rows = [parts.order[a:b] for a, b in zip(parts.start.tolist(), parts.start[1:].tolist(), strict=False)]
        rows = [r[free[r]] for r in rows]
        picked = (tokens.protected & ~taken).long()
        for (n, count), members in _alike([(len(r), int(c)) for r, c in zip(rows, k.tolist(), strict=True)]).items():
            if n and count:
                index = torch.stack([rows[i] for i in members])
                value = None if weight is None else weight[index].clamp_min(0)
                best = token_diverse(tokens.x[index], min(count, n), method=self.method, relevance=value)
                picked[index.gather(1, best.long()).flatten()] = 1
        return picked


def _alike(shapes: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Which groups have the same number of tokens and picks, and so make one batch."""
    found: dict[tuple[int, int], list[int]] = {}
    for i, shape in enumerate(shapes):
        found.setdefault(shape, []).append(i)
    return found


@dataclass(frozen=True)
class Union:
    """One pick after the other, each among what the earlier ones left."""

    picks: tuple[Pick, ...]

    @property
    def needs(self) -> tuple[Signal, ...]:
        return tuple(dict.fromkeys(s for p in self.picks for s in p.needs))

    def __call__(self, tokens: Tokens, taken: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(len(tokens), dtype=torch.long, device=tokens.x.device)
        for number, pick in enumerate(self.picks, start=1):
            result += number * pick(tokens, taken | (result > 0)).clamp_max(1)
        return result
