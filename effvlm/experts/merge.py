"""Merge experts: groups of similar ones become one (Li et al., "Merge, Then Compress", arXiv 2310.01334: M-SMoE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from effvlm.experts.alignment import aligned, permuted
from effvlm.experts.drop import best, wanted_of
from effvlm.experts.layers import Layer, check_routing, fused, resize, routed
from effvlm.experts.report import Report, counts, parameters
from effvlm.experts.usage import Usage, check_usage


@dataclass(frozen=True)
class MergeReport(Report):
    """What :func:`merge` did.

    Attributes:
        groups: name of each module of experts → (E,) the new id of each old expert.
        centres: name → the old id of each new expert's centre.
    """

    groups: dict[str, tuple[int, ...]]
    centres: dict[str, tuple[int, ...]]

    def notes(self) -> list[str]:
        sizes = [list(group).count(new) for group in self.groups.values() for new in set(group)]
        return [f"groups of 1 to {max(sizes)} experts; {sizes.count(1)} of {len(sizes)} kept as they were"]


def _router_rows(layer: Layer, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """(E, H) float32: what of the router is compared."""
    names = [n for n, dim in layer.dims.items() if layer.is_routers(n) and dim == 0 and tensors[n].dim() == 2]
    if len(names) != 1:
        raise ValueError(
            f"merge: expected one matrix with a row per expert beside {layer.name}, got {names or 'none'}; try by='weights'"
        )
    return tensors[names[0]].detach().float()


def _assign(layer: Layer, features: torch.Tensor, usage: Usage) -> tuple[list[int], list[int]]:
    """Centres (old ids, ascending), and each old expert's group: the centre most similar by cosine, among its router's group."""
    centres, size = best(layer, usage), layer.count // layer.groups
    rows = F.normalize(features, dim=1)
    similarity = rows @ rows[centres].T
    ids = torch.arange(layer.count, device=rows.device)
    similarity[ids[:, None] // size != ids[centres] // size] = -torch.inf
    group = similarity.argmax(1).tolist()
    for new, old in enumerate(centres):  # also where two rows are equal
        group[old] = new
    return centres, group


class _Merger:
    """The weighted means of one layer's groups."""

    def __init__(self, layer: Layer, usage: Usage, centres: list[int], group: list[int], router: str, align: bool) -> None:
        self.layer, self.centres, self.group, self.router = layer, centres, group, router
        weight = usage.weights[layer.name].clone()
        for new in range(len(centres)):
            members = torch.tensor([g == new for g in group])
            total = weight[members].sum()
            weight[members] = weight[members] / total if total > 0 else 1 / members.sum().double()
        self.share = weight.tolist()
        lone = {new for new in range(len(centres)) if group.count(new) == 1}
        self.order = {
            e: aligned(layer.experts, e, centres[new])
            for e, new in enumerate(group)
            if align and e not in centres and new not in lone
        }

    def __call__(self, name: str, old: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensor with one entry per group along ``dim``."""
        if self.layer.is_routers(name) and self.router == "centre":
            return old.index_select(dim, torch.tensor(self.centres, device=old.device))
        last, one_each = name.rpartition(".")[2], old.movedim(dim, 0)
        new = torch.zeros((len(self.centres), *one_each.shape[1:]), dtype=torch.float32, device=old.device)
        for e, (g, share) in enumerate(zip(self.group, self.share, strict=True)):
            one = one_each[e]
            if e in self.order and not self.layer.is_routers(name) and last in fused(self.layer.experts):
                one = permuted(self.layer.experts, last, one, self.order[e])
            new[g] += share * one.float()
        return new.to(old.dtype).movedim(0, dim)


def merge(
    model: Any, num_experts: int | float, usage: Usage, *, by: str = "router", router: str = "centre", align: bool = True
) -> MergeReport:
    """Merge the experts of every layer into ``num_experts``. In place; saves and loads as an ordinary model.

    As M-SMoE does: the most used experts are the centres of groups, every other expert joins the most similar centre, and a group
    becomes the mean of its members, weighted by usage, after their inner units were brought into the order that best matches the
    centre's. Two differences: similarity is taken between rows of the router's matrix (or weights of experts) instead of logits
    on data, and usage is the sum of routing weights instead of a count. And one that a stock config forces: M-SMoE keeps the old
    router and adds up the weights of choices that fall into one group; here a group has one row, so a token that chose two of
    its members now gets the group once, and another expert.

    Args:
        model: a Hugging Face model whose experts are in transformers' registry.
        num_experts: per layer, or a fraction in (0, 1]; where a router chooses among groups, a multiple of them (experts merge
            within their group).
        usage: of this model, from :func:`effvlm.experts.usage`.
        by: ``"router"``: cosine of rows of the router; ``"weights"``: cosine of all weights of the experts, which says something
            only where experts come from one (upcycled ones).
        router: a group's row: its ``"centre"``'s, or the usage-weighted ``"mean"``; biases of the choice and scales alike.
        align: match inner units first: (I, I) similarities per merged expert, matched greedily.

    Returns:
        The report, with the new id of every old expert.

    Raises:
        ValueError: as in :func:`effvlm.experts.drop`; an unknown ``by`` or ``router``; or a router that is not one matrix.
        TypeError: not a Hugging Face model, or an argument of another type.
    """
    if by not in ("router", "weights"):
        raise ValueError(f"merge: expected by 'router' or 'weights', got {by!r}")
    if router not in ("centre", "mean"):
        raise ValueError(f"merge: expected router 'centre' or 'mean', got {router!r}")
    check_usage("merge", usage, routed(model, "merge"))
    plan = resize(model, "merge", wanted_of(model, "merge", "num_experts", num_experts))
    before, tensors = parameters(model), dict(model.named_parameters()) | dict(model.named_buffers())
    groups, centres = {}, {}
    for name, layer in plan.layers.items():
        check_routing("merge", layer)
        if by == "router":
            features = _router_rows(layer, tensors)
        else:
            features = torch.cat([getattr(layer.experts, n).detach().flatten(1).float() for n in fused(layer.experts)], 1)
        centres[name], groups[name] = _assign(layer, features, usage)
    mergers: dict[str, _Merger] = {}

    def change(layer: Layer, name: str, old: torch.Tensor, dim: int) -> torch.Tensor:
        if layer.name not in mergers:  # before the layer's first tensor changes
            mergers[layer.name] = _Merger(layer, usage, centres[layer.name], groups[layer.name], router, align)
        return mergers[layer.name](name, old, dim)

    plan.apply(change)
    return MergeReport(
        "merge",
        tuple(plan.layers),
        (before, parameters(model)),
        (counts(layer.count for layer in plan.layers.values()), counts(layer.wanted for layer in plan.layers.values())),
        model,
        {name: tuple(group) for name, group in groups.items()},
        {name: tuple(ids) for name, ids in centres.items()},
    )
