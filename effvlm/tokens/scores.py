"""Scores: what a token is worth, (N,) float32, higher is kept. Frozen dataclasses; ``needs`` are the signals they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from effvlm.ops.token_similarity import token_similarity
from effvlm.tokens.groups import Group, Image, Segments
from effvlm.tokens.signals import Attention, Signal, Text
from effvlm.tokens.tokens import Tokens


class Score(Protocol):
    """Anything that values tokens."""

    @property
    def needs(self) -> tuple[Signal, ...]: ...
    def __call__(self, tokens: Tokens) -> torch.Tensor: ...


@dataclass(frozen=True)
class Signalled:
    """A signal as it is."""

    signal: Signal = field(default_factory=Attention)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (self.signal,)

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        return tokens.signal(self.signal)


@dataclass(frozen=True)
class Chance:
    """Random numbers from ``seed``: the same for the same image number and number of tokens."""

    seed: int = 0
    needs = ()

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        parts = []
        for i, n in enumerate(tokens.counts()):
            parts.append(torch.rand(n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + i)))
        return torch.cat(parts).to(tokens.x.device)


@dataclass(frozen=True)
class Novelty:
    """1 − cosine with the token at the same place ``back`` frames before; Inf, which is always kept, where there is none."""

    back: int = 1
    needs = ()

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        before = previous(tokens, self.back)
        score = torch.full((len(tokens),), torch.inf, device=tokens.x.device)
        here = (before >= 0).nonzero()[:, 0]
        if not len(here):
            return score
        there = before[here]
        first, offset = int(here[0]), int(here[0] - there[0])
        whole = int(here[-1]) - first + 1 == len(here) and bool((here - there == offset).all())
        if whole:  # frames behind one another: two views, nothing is copied
            now, then = tokens.x[first : first + len(here)], tokens.x[first - offset : first - offset + len(here)]
        else:
            now, then = tokens.x[here], tokens.x[there]
        score[here] = 1 - token_similarity(now, then)
        return score


def previous(tokens: Tokens, back: int) -> torch.Tensor:
    """(N,) int64: the row at the same place ``back`` frames before, −1 where there is none (and for all of a still image)."""
    frame = tokens.place[:, 0].long()
    width = int(tokens.place[:, 1:].max()) + 2 if len(tokens) else 1
    frames = int(frame.max()) + 1 if len(tokens) else 1
    inside = tokens.place[:, 1].long() * width + tokens.place[:, 2]
    key = (tokens.image() * frames + frame) * width * width + inside + width + 1
    order = key.argsort(stable=True)
    wanted = key - back * width * width
    at = torch.searchsorted(key[order], wanted).clamp_max(len(tokens) - 1)
    found = order[at]
    there = (key[found] == wanted) & (frame >= back) & (tokens.place[:, 1] >= 0) & tokens.in_video()
    return torch.where(there, found, -1)


@dataclass(frozen=True)
class Negative:
    """The opposite of a score."""

    of: Score

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.of.needs

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        return -self.of(tokens)


@dataclass(frozen=True)
class Scaled:
    """A score made comparable within each group: ``"minmax"`` to 0 … 1, ``"l2"`` by its norm, ``"softmax"`` of score /
    ``tau``."""

    of: Score
    how: str = "minmax"
    group: Group = field(default_factory=Image)
    tau: float = 1.0

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.of.needs

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        score, parts = self.of(tokens).float(), Segments.of(tokens, self.group)
        if self.how == "l2":
            return score / parts.sums(score * score).sqrt().clamp_min(1e-12)[parts.label]
        empty = score.new_empty(parts.count)
        high = empty.fill_(-torch.inf).scatter_reduce(0, parts.label, score, "amax")[parts.label]
        if self.how == "softmax":
            e = ((score - high) / self.tau).exp()
            return e / parts.sums(e)[parts.label]
        low = empty.fill_(torch.inf).scatter_reduce(0, parts.label, score, "amin")[parts.label]
        return (score - low) / (high - low).clamp_min(1e-12)


@dataclass(frozen=True)
class Plus:
    """The sum of two scores."""

    a: Score
    b: Score

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.a.needs + self.b.needs

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        return self.a(tokens) + self.b(tokens)


@dataclass(frozen=True)
class Overview:
    """A score under which crop 0 wins against all other crops."""

    of: Score

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.of.needs

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        return self.of(tokens).masked_fill(tokens.place[:, 0] == 0, torch.inf)


def relevance() -> Signalled:
    """How well a token fits the prompt."""
    return Signalled(Text())


@dataclass(frozen=True)
class Likeness:
    """The largest cosine with ``pivots`` tokens of the same group, those of the largest norm (DART); the pivots themselves:
    −1."""

    pivots: int = 8
    group: Group = field(default_factory=Image)
    needs = ()

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        norm = torch.linalg.vector_norm(tokens.x, dim=1, dtype=torch.float32)
        parts = Segments.of(tokens, self.group)
        limit = torch.full((parts.count,), float(self.pivots), device=norm.device)
        pivot = parts.select(norm, limit, "top")
        score, _ = parts.match(tokens.x, 1 + pivot.to(torch.uint8))
        return score.masked_fill(pivot, -1.0)
