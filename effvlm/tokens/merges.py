"""Reductions that are not a pick: matching pairs, pooling grids, windows and frames, clusters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from effvlm.ops.token_match import token_match
from effvlm.tokens.budgets import kept
from effvlm.tokens.combines import nearest
from effvlm.tokens.groups import Crop, Group, Image, Segments, Window
from effvlm.tokens.plan import Plan
from effvlm.tokens.tokens import Tokens


@dataclass(frozen=True)
class Bipartite:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, §3), repeated until ``keep`` of each group's tokens are left.

    Every round merges at most half of the tokens into their most similar partner. In the vision tower (``Step(at="vision")``)
    there is one round per layer, on the layer's keys: ``r`` pairs, or as many as lead to ``keep`` at the end.

    Attributes:
        keep: share of the tokens to keep.
        metric: ``"cosine"`` or ``"dot"``.
        weighted: means weighted by size, as in the paper; else plain means (AIM).
        group: within what tokens are matched.
        r: pairs per layer in the vision tower: one number, or one per layer; None: from ``keep``.
        proportional: attention in the tower counts a token of size s s times (§3, proportional attention).
    """

    keep: float = 0.5
    metric: str = "cosine"
    weighted: bool = True
    group: Group = field(default_factory=Image)
    r: int | tuple[int, ...] | None = None
    proportional: bool = True
    needs = ()

    def schedule(self, layers: int, N: int) -> list[int]:
        """Pairs to merge after the attention of each layer, for N tokens that may be merged."""
        if isinstance(self.r, tuple):
            if len(self.r) != layers:
                raise ValueError(f"Bipartite: expected r for {layers} layers, got {len(self.r)}")
            wanted = list(self.r)
        elif self.r is not None:
            wanted = [self.r] * layers
        else:
            gone = N - kept(self.keep, N)
            wanted = [gone * (i + 1) // layers - gone * i // layers for i in range(layers)]
        pairs = _feasible(wanted, N)
        while self.r is None and sum(pairs) < sum(wanted):  # what late layers have too few tokens for, early ones take on
            missing = sum(wanted) - sum(pairs)
            first = next(i for i in range(layers) if pairs[i] < (N - sum(pairs[:i])) // 2)
            pairs = _feasible([r + missing if i == first else r for i, r in enumerate(pairs)], N)
        return pairs

    def plan(self, tokens: Tokens) -> Plan:
        whole = Plan.keeping(tokens, torch.ones(len(tokens), dtype=torch.bool, device=tokens.x.device))
        free = Segments.of(tokens, self.group).sums(~tokens.protected).tolist()
        targets = [kept(self.keep, int(n)) for n in free]
        while True:
            step = self._round(tokens, targets)
            if step is None:
                return whole
            tokens, whole = step.apply(tokens), whole.then(step)

    def _round(self, tokens: Tokens, targets: list[int]) -> Plan | None:
        anchor = torch.arange(len(tokens), device=tokens.x.device)
        busy = False
        for rows, target in _batches(tokens, self.group, targets):
            N = rows.shape[1]
            if target < N:
                M, busy = max(target, N - N // 2), True
                group = token_match(tokens.x[rows], N - M, metric=self.metric).group
                anchor[rows] = rows.gather(1, anchors(group, M).gather(1, group.long()))
        if not busy:
            return None
        return Plan.assigning(tokens, anchor, None if self.weighted else torch.ones_like(tokens.size))


def _feasible(wanted: Sequence[int], N: int) -> list[int]:
    """The pairs per layer, none negative and no layer merging more than half of what it gets of N tokens."""
    pairs: list[int] = []
    for r in wanted:
        pairs.append(min(max(r, 0), (N - sum(pairs)) // 2))
    return pairs


def _batches(tokens: Tokens, group: Group, targets: list[int]) -> Iterator[tuple[torch.Tensor, int]]:
    """(groups, n) row numbers of the groups with the same number of free tokens and the same target, and that target."""
    parts = Segments.of(tokens, group)
    bounds = parts.start.tolist()
    alike: dict[tuple[int, int], list[torch.Tensor]] = {}
    for a, b, target in zip(bounds, bounds[1:], targets, strict=False):
        rows = parts.order[a:b]
        rows = rows[~tokens.protected[rows]]
        alike.setdefault((len(rows), target), []).append(rows)
    for (_, target), members in alike.items():
        yield torch.stack(members), target


def anchors(group: torch.Tensor, M: int) -> torch.Tensor:
    """(B, N) groups numbered by anchor → (B, M) int64 place of each anchor: the last member but for sources that joined it.

    A group's anchor is its only odd member, or its only member: the other members are sources, at even places.
    """
    B, N = group.shape
    place = torch.arange(N, device=group.device)
    rank = torch.where(place % 2 == 1, place + N, place).expand(B, N)  # odd places outrank all even ones
    best = rank.new_full((B, M), -1).scatter_reduce(1, group.long(), rank, "amax")
    return torch.where(best >= N, best - N, best)


@dataclass(frozen=True)
class Grid:
    """The mean of each cell when every crop's grid is cut into about ``share`` as many cells, as square as it goes."""

    share: float = 0.25
    needs = ()

    def plan(self, tokens: Tokens) -> Plan:
        place = tokens.place.long()
        crop = Segments.of(tokens, Crop())
        high, wide = (_extent(place[:, d], crop) for d in (1, 2))
        cell = []
        for extent, values in ((high, place[:, 1]), (wide, place[:, 2])):
            cells = (extent.double() * self.share**0.5 + 0.5).floor().long().clamp_min(1)
            cell.append(values * cells[crop.label] // extent.clamp_min(1)[crop.label])
        width = int(wide.max()) + 1
        key = (crop.label * (int(high.max()) + 1) + cell[0]) * width + cell[1]
        alone = tokens.protected | (place[:, 1] < 0)
        key = torch.where(alone, int(key.max()) + 1 + torch.arange(len(key), device=key.device), key)
        _, label, counts = torch.unique(key, return_inverse=True, return_counts=True)
        order = label.argsort(stable=True)
        first = counts.cumsum(0) - counts
        middle = order[first + counts // 2]  # the anchor: a cell's middle token
        return Plan.assigning(tokens, middle[label], torch.ones_like(tokens.size))


def _extent(values: torch.Tensor, parts: Segments) -> torch.Tensor:
    """(S,) int64: 1 + the largest value of each group."""
    largest = torch.full((parts.count,), -1, dtype=torch.long, device=values.device)
    return largest.scatter_reduce(0, parts.label, values, "amax") + 1


@dataclass(frozen=True)
class Uniform:
    """Windows of ``window`` × ``window`` tokens whose mean pairwise cosine exceeds ``threshold`` become one token (MustDrop,
    stage 1)."""

    window: int = 3
    threshold: float = 0.8
    needs = ()

    def plan(self, tokens: Tokens) -> Plan:
        parts = Segments.of(tokens, Window(self.window, self.window))
        n = parts.sums(~tokens.protected)
        unit = torch.nn.functional.normalize(tokens.x.float(), dim=1).masked_fill(tokens.protected[:, None], 0)
        total = parts.means(unit) * parts.start.diff()[:, None]
        # Σ_{i≠j} cos = |Σ u|² − n, without the matrix
        alike = ((total * total).sum(1) - n) / (n * (n - 1)).clamp_min(1)
        merged = (alike > self.threshold) & (n > 1)
        last = parts.order[parts.start[1:].long() - 1]
        own = torch.arange(len(tokens), device=n.device)
        return Plan.assigning(tokens, torch.where(merged[parts.label] & ~tokens.protected, last[parts.label], own))


@dataclass(frozen=True)
class Frames:
    """Frames that look alike become one, place by place: repeated bipartite matching of the frames' mean tokens until ``keep``
    of the frames are left (B-VLLM's temporal merging)."""

    keep: float = 0.5
    needs = ()

    def plan(self, tokens: Tokens) -> Plan:
        whole = Plan.keeping(tokens, torch.ones(len(tokens), dtype=torch.bool, device=tokens.x.device))
        frames = Segments.of(tokens, Crop())
        image = tokens.image()[frames.order[frames.start[:-1].long()]]
        frames_of = torch.bincount(image, minlength=tokens.images).tolist()
        targets = [kept(self.keep, n) if film else n for n, film in zip(frames_of, tokens.video, strict=True)]
        while True:
            step = self._round(tokens, targets)
            if step is None:
                return whole
            tokens, whole = step.apply(tokens), whole.then(step)

    def _round(self, tokens: Tokens, targets: list[int]) -> Plan | None:
        frames = Segments.of(tokens, Crop())
        means = frames.means(tokens.x)
        first = frames.order[frames.start[:-1].long()]
        image = tokens.image()[first].tolist()
        into = torch.arange(frames.count, device=means.device)
        busy = False
        for i, target in enumerate(targets):
            mine = torch.tensor([f for f, owner in enumerate(image) if owner == i], device=means.device)
            if len(mine) > target:
                M, busy = max(target, len(mine) - len(mine) // 2), True
                group = token_match(means[mine][None], len(mine) - M).group
                into[mine] = mine[anchors(group, M).gather(1, group.long())[0]]
        if not busy:
            return None
        there = nearest_place(tokens, frames, into)
        return Plan.assigning(tokens, there)


def nearest_place(tokens: Tokens, frames: Segments, into: torch.Tensor) -> torch.Tensor:
    """(N,) int64: for each token the one at its place in frame ``into[its frame]``; itself where there is none."""
    place = tokens.place.long()
    width = int(place[:, 1:].max()) + 2 if len(tokens) else 1
    inside = (place[:, 1] + 1) * width + place[:, 2] + 1
    key = frames.label * (width * width + width) + inside
    order = key.argsort(stable=True)
    wanted = into[frames.label] * (width * width + width) + inside
    found = order[torch.searchsorted(key[order], wanted).clamp_max(len(tokens) - 1)]
    own = torch.arange(len(tokens), device=key.device)
    return torch.where((key[found] == wanted) & ~tokens.protected, found, own)


@dataclass(frozen=True)
class Centres:
    """Density peaks of each group and the mean of what is nearest to each (DPC-kNN: density × distance to a denser token).

    Attributes:
        keep: share of the tokens that become centres.
        neighbours: k of the density, exp(−mean squared distance to the k nearest).
    """

    keep: float = 0.5
    neighbours: int = 5
    group: Group = field(default_factory=Image)
    needs = ()

    def plan(self, tokens: Tokens) -> Plan:
        parts = Segments.of(tokens, self.group)
        centre = tokens.protected.clone()
        bounds = parts.start.tolist()
        for a, b in itertools.pairwise(bounds):
            rows = parts.order[a:b]
            rows = rows[~tokens.protected[rows]]
            if len(rows):
                peaks = density_peaks(tokens.x[rows], kept(self.keep, len(rows)), self.neighbours)
                centre[rows[peaks]] = True
        anchor = nearest(tokens, tokens.x, ~centre, centre & ~tokens.protected, self.group)
        own = torch.arange(len(tokens), device=anchor.device)
        return Plan.assigning(tokens, torch.where(centre, own, anchor))


def density_peaks(x: torch.Tensor, count: int, neighbours: int) -> torch.Tensor:
    """(N, C) → (count,) int64: the tokens with the largest density × distance to the nearest denser one (DPC-kNN)."""
    x = x.float()
    distance = torch.cdist(x, x) / x.shape[1] ** 0.5
    near = distance.topk(min(neighbours + 1, len(x)), largest=False).values[:, 1:]  # without itself
    density = (-(near * near).mean(1).nan_to_num()).exp()
    place = torch.arange(len(x), device=x.device)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (place[None] < place[:, None]))
    far = distance.amax()
    peak = torch.where(denser, distance, far).amin(1)
    order: torch.Tensor = (density * peak).argsort(descending=True, stable=True)
    return order[:count]
