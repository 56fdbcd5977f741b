"""Combines: what becomes of the tokens that were not picked. Each turns a pick into a :class:`Plan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from effvlm.tokens.groups import Group, Image, Segments
from effvlm.tokens.plan import Plan
from effvlm.tokens.signals import Attention, Keys, Signal
from effvlm.tokens.tokens import Tokens


class Combine(Protocol):
    """Anything that turns a pick, (N,) int64 with 0 for what is not picked, into a plan."""

    @property
    def needs(self) -> tuple[Signal, ...]: ...
    def __call__(self, tokens: Tokens, picked: torch.Tensor) -> Plan: ...


@dataclass(frozen=True)
class Drop:
    """They are gone."""

    needs = ()

    def __call__(self, tokens: Tokens, picked: torch.Tensor) -> Plan:
        return Plan.keeping(tokens, picked > 0)


@dataclass(frozen=True)
class Nearest:
    """Each joins the most similar picked token of its group.

    Attributes:
        by: the signal to compare; None: the features themselves.
        how: ``"mean"``, of all members; ``"size"``, weighted by size; ``"target_plus_mean"``, the picked token plus the mean of
            those that joined it.
        into: number of the pick (of a union) whose tokens may be joined; 0: any.
    """

    by: Keys | None = None
    how: str = "mean"
    into: int = 0
    group: Group = field(default_factory=Image)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (self.by,) if self.by else ()

    def __call__(self, tokens: Tokens, picked: torch.Tensor) -> Plan:
        features = tokens.signal(self.by) if self.by else tokens.x
        target = ((picked == self.into) if self.into else picked > 0) & ~tokens.protected
        anchor = nearest(tokens, features, picked == 0, target, self.group)
        anchor = torch.where(picked > 0, torch.arange(len(tokens), device=anchor.device), anchor)
        if self.how == "size":
            return Plan.assigning(tokens, anchor)
        ones = torch.ones(len(tokens), device=anchor.device)
        if self.how == "mean":
            return Plan.assigning(tokens, anchor, ones)
        joined = torch.zeros(len(tokens), device=anchor.device).index_add(0, anchor.clamp_min(0), (anchor >= 0).float()) - 1
        weight = torch.where(picked > 0, ones, 1 / joined[anchor.clamp_min(0)].clamp_min(1))
        return Plan.assigning(tokens, anchor, weight, mean=False)


def nearest(tokens: Tokens, features: torch.Tensor, source: torch.Tensor, target: torch.Tensor, group: Group) -> torch.Tensor:
    """(N,) int64: for each token of ``source`` the ``target`` of its group with the highest cosine (ties: the lowest); −1
    elsewhere, and where a group has no target."""
    role = torch.where(target, 2, source.to(torch.uint8))
    return Segments.of(tokens, group).match(features, role.to(torch.uint8))[1]


@dataclass(frozen=True)
class Absorb:
    """Each picked token adds the ``neighbours`` nearest tokens by key, weighted by their attention; the rest make one more token.

    x_i + Σ_j a_j·x_j over the nearest by key that were not picked; Σ_j a_j·x_j over what was not picked (LLaVA-PruMerge).
    """

    attention: Attention = field(default_factory=lambda: Attention(-1))
    keys: Keys = field(default_factory=lambda: Keys(-1, "all"))
    neighbours: int = 32
    rest: bool = True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (self.attention, self.keys)

    def __call__(self, tokens: Tokens, picked: torch.Tensor) -> Plan:
        weight = tokens.signal(self.attention).float()
        unit = torch.nn.functional.normalize(tokens.signal(self.keys).float(), dim=-1)
        source, members, anchors, values = [], [], [], []
        for a, b in zip(tokens.start, tokens.start[1:], strict=False):
            rows = torch.arange(a, b, device=unit.device)
            mine, others = rows[picked[a:b] > 0], rows[picked[a:b] == 0]
            near = min(self.neighbours, len(others))
            index = torch.zeros((len(mine), 1 + near), dtype=torch.long, device=unit.device)
            index[:, 0] = mine
            if near:
                index[:, 1:] = others[(unit[mine] @ unit[others].T).topk(near, dim=1).indices]
            value = weight[index]
            value[:, 0] = 1
            value[tokens.protected[mine], 1:] = 0
            parts = [(anchor, i, v) for anchor, i, v in zip(mine.tolist(), index, value, strict=True)]
            if self.rest and len(others):
                parts.append((int(others[weight[others].argmax()]), others, weight[others]))
            for anchor, i, v in sorted(parts, key=lambda part: part[0]):
                source.append(i)
                values.append(v)
                members.append(len(i))
                anchors.append(anchor)
        device = unit.device
        return Plan.listing(
            tokens,
            torch.cat(source),
            torch.tensor(members, device=device),
            torch.tensor(anchors, device=device),
            torch.cat(values),
            mean=False,
        )
