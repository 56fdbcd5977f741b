"""Drop experts: keep the ones that a task uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effvlm.experts.layers import Layer, Resizing, check_routing, describe, resize, routed
from effvlm.experts.report import Report, counts, parameters
from effvlm.experts.usage import Usage, check_usage


@dataclass(frozen=True)
class DropReport(Report):
    """What :func:`drop` did.

    Attributes:
        kept: name of each module of experts → the old ids of those that are left, ascending; their new ids are 0, 1, …
        weight: share of all routing weight that went to the kept ones, if usage was given.
    """

    kept: dict[str, tuple[int, ...]]
    weight: float | None

    def notes(self) -> list[str]:
        if self.weight is None:
            return []
        return [f"the experts that are left had {100 * self.weight:.1f} % of the routing weight"]


def wanted_of(model: Any, method: str, name: str, value: Any) -> dict[str, int]:
    """How many experts an int or a fraction (of whole groups of the router) asks for, in each layer."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{method}: expected {name} to be an int or a fraction, got {type(value).__name__}")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"{method}: expected {name} as a fraction in (0, 1], got {value}")
    wanted = {}
    for layer, module in routed(model, method).items():
        E, groups = module.num_experts, describe(model, layer, 0).groups
        if isinstance(value, int) and not 1 <= value <= E:
            raise ValueError(f"{method}: expected {name} between 1 and the {E} experts of {layer}, got {value}")
        wanted[layer] = value if isinstance(value, int) else max(1, int(value * E / groups + 0.5)) * groups
    return wanted


def _given(keep: Mapping[str, Sequence[int]], modules: dict[str, Any]) -> dict[str, list[int]]:
    if set(keep) != set(modules):
        odd = sorted(set(keep) ^ set(modules))[0]
        raise ValueError(
            f"drop: expected keep for exactly the model's layers of experts ({', '.join(modules)}), got {odd!r} in one only"
        )
    chosen = {name: sorted(int(i) for i in keep[name]) for name in modules}
    for name, ids in chosen.items():
        if not ids or len(set(ids)) < len(ids) or ids[0] < 0 or ids[-1] >= modules[name].num_experts:
            raise ValueError(
                f"drop: expected different ids in 0 … {modules[name].num_experts - 1} for {name}, got {list(keep[name])}"
            )
    return chosen


def best(layer: Layer, usage: Usage) -> list[int]:
    """The ``layer.wanted`` most used ids, ascending; the same number from each of the router's groups."""
    per, size = layer.wanted // layer.groups, layer.count // layer.groups
    order = usage.order(layer.name).tolist()
    return sorted(i for g in range(layer.groups) for i in [i for i in order if i // size == g][:per])


def _check_groups(layer: Layer, ids: list[int]) -> None:
    size = layer.count // layer.groups
    each = [sum(i // size == g for i in ids) for g in range(layer.groups)]
    if len(set(each)) > 1:
        raise ValueError(f"drop: expected the same number from each of the router's groups in {layer.name}, got {each}")


def drop(model: Any, keep: int | float | Mapping[str, Sequence[int]], usage: Usage | None = None) -> DropReport:
    """Remove the least used experts of every layer, and their rows of the router. In place; saves and loads as an ordinary model.

    ::

        report = effvlm.experts.drop(model, keep=0.5, usage=effvlm.experts.usage(model, samples_of_my_task))
        model.save_pretrained(out)

    With the usage measured on one task's data this is the export of that task's experts (Chen et al., "An Efficient
    General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training", arXiv 2306.17165); with that of general data it
    is expert pruning as in Lu et al., "Not All Experts are Equal" (arXiv 2402.14800), with the routing weight in place of their
    search. Tokens that chose a dropped expert get their next best one. Where a router's softmax runs over all experts and is not
    normalised again, the weights of the others grow.

    Args:
        model: a Hugging Face model whose experts are in transformers' registry.
        keep: how many experts per layer; as a fraction in (0, 1] rounded half up, at least 1 per group; or name of each module of
            experts → ids to keep, the same number in every layer.
        usage: of this model; not needed where ``keep`` names the ids.

    Returns:
        The report. Optimisers that hold the old parameters must be made anew.

    Raises:
        ValueError: no routed experts; fewer left than a token chooses; a number that the router's groups do not divide, or ids
            that take more from one group than from another; layers of one config with different numbers; usage of another model;
            or something that depends on the number of experts in a way we do not know. Nothing has changed then.
        TypeError: not a Hugging Face model, or an argument of another type.
    """
    modules = routed(model, "drop")
    chosen = _given(keep, modules) if isinstance(keep, Mapping) else None
    if usage is not None:
        check_usage("drop", usage, modules)
    elif chosen is None:
        raise ValueError("drop: expected usage (effvlm.experts.usage) to choose by, or the ids to keep, got neither")
    plan = resize(model, "drop", {n: len(ids) for n, ids in chosen.items()} if chosen else wanted_of(model, "drop", "keep", keep))
    for layer in plan.layers.values():
        check_routing("drop", layer)
    if chosen is None:
        assert usage is not None
        chosen = {name: best(layer, usage) for name, layer in plan.layers.items()}
    for layer in plan.layers.values():
        _check_groups(layer, chosen[layer.name])
    return _apply(plan, chosen, usage)


def _apply(plan: Resizing, chosen: dict[str, list[int]], usage: Usage | None) -> DropReport:
    before, model = parameters(plan.model), plan.model
    plan.apply(lambda layer, _, old, dim: old.index_select(dim, torch.tensor(chosen[layer.name], device=old.device)))
    weight = None
    if usage is not None:
        total = sum(float(w.sum()) for w in usage.weights.values())
        weight = sum(float(usage.weights[name][ids].sum()) for name, ids in chosen.items()) / total
    return DropReport(
        "drop",
        tuple(plan.layers),
        (before, parameters(model)),
        (counts(layer.count for layer in plan.layers.values()), counts(layer.wanted for layer in plan.layers.values())),
        model,
        {name: tuple(ids) for name, ids in chosen.items()},
        weight,
    )
