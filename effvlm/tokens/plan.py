"""A plan: a sparse weighted map from tokens to fewer tokens. Drop, gather, merge, pool and cluster mean are all plans."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effvlm.ops.token_apply import token_apply
from effvlm.tokens.tokens import Tokens


@dataclass(frozen=True)
class Plan:
    """Which old tokens make up each new one, in CSR form. New tokens are in the order of their anchors.

    Attributes:
        start: (M + 1,) int32; new token m is made of entries ``start[m]`` … ``start[m + 1]``.
        source: (E,) int32, the old token of each entry.
        weight: (E,) float32, or None where all are 1.
        anchor: (M,) int64, ascending: the old token that gives each new one its position, place, protection and signals.
        images: row numbers of the images' bounds among the new tokens.
        mean: divide by the sum of the weights; else a plain weighted sum.
        old: how many old tokens there are.
    """

    start: torch.Tensor
    source: torch.Tensor
    weight: torch.Tensor | None
    anchor: torch.Tensor
    images: tuple[int, ...]
    mean: bool
    old: int

    @classmethod
    def keeping(cls, tokens: Tokens, mask: torch.Tensor) -> Plan:
        """Keep the tokens of ``mask`` (N,) bool and drop the others."""
        anchor = mask.nonzero()[:, 0]
        start = torch.arange(len(anchor) + 1, dtype=torch.int32, device=mask.device)
        return cls(start, anchor.int(), None, anchor, _bounds(tokens, anchor), True, len(tokens))

    @classmethod
    def assigning(cls, tokens: Tokens, anchor_of: torch.Tensor, weight: torch.Tensor | None = None, *, mean: bool = True) -> Plan:
        """Every token goes to the token ``anchor_of[n]`` (N,) int64, itself where it is an anchor; −1 drops it.

        ``weight`` (N,) float32 is what each one counts; default its size.
        """
        source = (anchor_of >= 0).nonzero()[:, 0]
        source = source[anchor_of[source].argsort(stable=True)]
        anchor, members = torch.unique_consecutive(anchor_of[source], return_counts=True)
        return cls.listing(tokens, source, members, anchor, (tokens.size if weight is None else weight)[source], mean=mean)

    @classmethod
    def listing(
        cls,
        tokens: Tokens,
        source: torch.Tensor,
        members: torch.Tensor,
        anchor: torch.Tensor,
        weight: torch.Tensor | None,
        *,
        mean: bool,
    ) -> Plan:
        """From the entries themselves: (E,) ``source`` and ``weight`` by new token, (M,) ``members`` of each and its
        ``anchor``."""
        start = torch.zeros(len(anchor) + 1, dtype=torch.int32, device=source.device)
        start[1:] = members.cumsum(0)
        return cls(start, source.int(), weight, anchor, _bounds(tokens, anchor), mean, len(tokens))

    @property
    def new(self) -> int:
        """How many new tokens there are."""
        return len(self.anchor)

    @property
    def selects(self) -> bool:
        """Whether this only keeps and drops."""
        return self.weight is None and len(self.source) == self.new

    @property
    def trivial(self) -> bool:
        """Whether nothing changes."""
        return self.selects and self.new == self.old

    def apply(self, tokens: Tokens) -> Tokens:
        """The new tokens, with everything that belongs to them."""
        if len(tokens) != self.old:
            raise ValueError(f"Plan: expected {self.old} tokens, got {len(tokens)}")
        if self.trivial:
            return tokens
        anchor = self.anchor
        size = tokens.size[anchor] if self.selects else self.sums(tokens.size)
        return Tokens(
            self.features(tokens.x),
            self.images,
            size,
            tokens.position[anchor],
            tokens.place[anchor],
            tokens.protected[anchor],
            tokens.original,
            tokens.video,
            tuple(self.features(t) for t in tokens.side),
            {key: t[anchor] for key, t in tokens.signals.items()},
        )

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, …) features → (M, …)."""
        if self.selects:
            return x.index_select(0, self.anchor)
        return token_apply(x.flatten(1), self.start, self.source, weight=self.weight, mean=self.mean).view(-1, *x.shape[1:])

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) float32 → (M,): the plain sum over each new token's sources."""
        return torch.zeros(self.new, device=values.device).index_add(0, self.rows(), values[self.source.long()])

    def rows(self) -> torch.Tensor:
        """(E,) int64: the new token of each entry."""
        index = torch.arange(self.new, device=self.start.device)
        return torch.repeat_interleave(index, self.start.diff().long(), output_size=len(self.source))

    def shares(self) -> torch.Tensor:
        """(E,) float32: the factor of each entry, after division by the sum where this is a mean."""
        weight = torch.ones(len(self.source), device=self.source.device) if self.weight is None else self.weight
        if not self.mean:
            return weight
        rows = self.rows()
        total = torch.zeros(self.new, device=weight.device).index_add(0, rows, weight)
        return weight / total[rows].where(total[rows] != 0, 1.0)

    def then(self, later: Plan) -> Plan:
        """This plan and ``later`` as one, from this one's old tokens to the later one's new ones."""
        if later.old != self.new:
            raise ValueError(f"Plan: expected a later plan for {self.new} tokens, got one for {later.old}")
        if self.trivial or later.trivial:
            return later if self.trivial else self
        middle = later.source.long()
        counts = self.start.diff().long()[middle]
        E = int(counts.sum())
        entry = torch.repeat_interleave(torch.arange(len(middle), device=middle.device), counts, output_size=E)
        offset = torch.arange(E, device=middle.device) - (counts.cumsum(0) - counts)[entry]
        mine = self.start.long()[middle][entry] + offset
        weight = None
        if not (self.selects and later.selects):
            weight = later.shares()[entry] * self.shares()[mine]
        members = torch.zeros(later.new, dtype=torch.long, device=middle.device).index_add(0, later.rows(), counts)
        start = torch.zeros(later.new + 1, dtype=torch.int32, device=middle.device)
        start[1:] = members.cumsum(0)
        return Plan(start, self.source[mine], weight, self.anchor[later.anchor], later.images, weight is None, self.old)


def _bounds(tokens: Tokens, anchor: torch.Tensor) -> tuple[int, ...]:
    """Where each image's new tokens begin, from the old rows of their anchors."""
    if tokens.images == 1:
        return (0, len(anchor))
    return tuple(torch.searchsorted(anchor, torch.tensor(tokens.start, device=anchor.device)).tolist())
