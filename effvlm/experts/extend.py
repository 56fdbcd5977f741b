"""Extend a mixture: one more expert per layer, to be trained (Zhong et al., "MoExtend", arXiv 2408.03511)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from effvlm.experts.layers import Layer, Resizing, resize, routed
from effvlm.experts.report import Report, counts, parameters
from effvlm.experts.usage import Usage, check_usage

ROUTERS = ("copy", "mean", "zeros", "closed")


@dataclass(frozen=True)
class ExtendReport(Report):
    """What :func:`extend` did.

    Attributes:
        rows: full name of each tensor that grew → (dimension, index) of the new expert's part in it: what to train.
        sources: name of each module of experts → the expert that was copied, or None for the mean.
    """

    rows: dict[str, tuple[int, int]]
    sources: dict[str, int | None]

    def notes(self) -> list[str]:
        return [f"train {name}, index {index} of dimension {dim}" for name, (dim, index) in list(self.rows.items())[:8]] + (
            [f"and {len(self.rows) - 8} more in report.rows"] if len(self.rows) > 8 else []
        )


def _sources(modules: dict[str, Any], from_expert: Any, usage: Usage | None) -> dict[str, int | None]:
    if from_expert is None and usage is None:
        raise ValueError("extend: expected from_expert, or usage to find the most used expert by, got neither")
    if usage is not None:
        check_usage("extend", usage, modules)
    if isinstance(from_expert, str):
        if from_expert != "mean":
            raise ValueError(f"extend: expected from_expert as an id, a mapping of ids or 'mean', got {from_expert!r}")
        return dict.fromkeys(modules)
    if isinstance(from_expert, Mapping) and set(from_expert) != set(modules):
        raise ValueError(f"extend: expected from_expert for exactly {', '.join(modules)}, got {', '.join(from_expert)}")
    found: dict[str, int | None] = {}
    for name, module in modules.items():
        if from_expert is None:
            assert usage is not None
            e = int(usage.order(name)[0])
        else:
            e = from_expert[name] if isinstance(from_expert, Mapping) else from_expert
        if isinstance(e, bool) or not isinstance(e, int):
            raise TypeError(f"extend: expected from_expert as an int, a mapping of ints or 'mean', got {type(e).__name__}")
        if not 0 <= e < module.num_experts:
            raise ValueError(f"extend: expected from_expert in 0 … {module.num_experts - 1} for {name}, got {e}")
        found[name] = e
    return found


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


def _check(layer: Layer, router: str) -> None:
    if layer.groups > 1:
        raise ValueError(
            f"extend: expected a router that chooses among all experts, got {layer.groups} groups of "
            f"{layer.count // layer.groups} in {layer.name}: one more would fit into none of them"
        )
    if router == "closed" and not any(layer.is_routers(n) and _is_bias(n) for n in layer.dims):
        raise ValueError(
            f"extend: expected a router with a bias for router='closed', got none in {layer.name}; a row alone cannot keep every "
            "token away"
        )


_CLOSED = -1e4  # below every logit and every corrected score, and a float16


def _new(layer: Layer, name: str, old: torch.Tensor, dim: int, source: int | None, router: str) -> torch.Tensor:
    """The new expert's part of one tensor, with size 1 along ``dim``."""
    mean = old.float().mean(dim, keepdim=True).to(old.dtype)
    copied = mean if source is None else old.narrow(dim, source, 1)
    matrix = old.dim() > 1 and not _is_bias(name)
    if not layer.is_routers(name) or not (matrix or _is_bias(name)):
        return copied  # experts' weights, and scales of their outputs
    if router == "closed" and _is_bias(name):
        return torch.full_like(copied, _CLOSED)
    return {"copy": copied, "mean": mean, "zeros": torch.zeros_like(mean), "closed": copied}[router]


def extend(
    model: Any,
    from_expert: int | str | Mapping[str, int] | None = None,
    *,
    usage: Usage | None = None,
    router: str = "copy",
) -> ExtendReport:
    """Add one expert, and its row of the router, to every layer of experts. In place; saves and loads as an ordinary model.

    As MoExtend does, the new expert starts as a copy of the layer's most used one; training it and its row is left to you, the
    report says where they are. MoExtend adds experts to half of the layers only; a stock config has one number for all layers.

    What a new row does to outputs before any training, with a router that chooses by its logits and normalises the weights of the
    choices (one that corrects its choice by a bias may choose a new row more often than this; use ``"closed"`` there):

    - ``"copy"``: the new expert ties with its source wherever that is chosen, so such tokens may get both, and lose another.
      Unchanged for top-1; for more, changed wherever the source is chosen.
    - ``"mean"``: its logit is the mean of the others', never above the best: unchanged for top-1, and for tokens of which at
      least top-k others are above the mean.
    - ``"zeros"``: its logit is 0: chosen wherever fewer than top-k others are above 0.
    - ``"closed"``: a copied row with a bias of -10,000, for routers that have one (gpt-oss, and those that correct their choice,
      such as DeepSeek-V3 without groups): never chosen, outputs unchanged until the bias is raised.

    Where a softmax runs over all experts and is not normalised over the choices, any new row takes a share of all weights.

    Args:
        model: a Hugging Face model whose experts are in transformers' registry.
        from_expert: id of the expert to copy, one per module of experts, or ``"mean"`` of all; default the most used
            by ``usage``.
        usage: of this model; needed where ``from_expert`` is not given.
        router: ``"copy"`` (of a mean expert: the mean row), ``"mean"``, ``"zeros"`` or ``"closed"``.

    Returns:
        The report, with the rows to train.

    Raises:
        ValueError: no routed experts; a router that chooses among groups of experts; an unknown ``router``, or ``"closed"``
            without a bias; an id out of range; usage of another model. Nothing has changed then.
        TypeError: not a Hugging Face model, or an argument of another type.
    """
    if router not in ROUTERS:
        raise ValueError(f"extend: expected router to be one of {', '.join(ROUTERS)}, got {router!r}")
    modules = routed(model, "extend")
    sources = _sources(modules, from_expert, usage)
    plan: Resizing = resize(model, "extend", {name: m.num_experts + 1 for name, m in modules.items()})
    for layer in plan.layers.values():
        _check(layer, router)
    before = parameters(model)
    plan.apply(lambda layer, name, old, dim: torch.cat((old, _new(layer, name, old, dim, sources[layer.name], router)), dim))
    return ExtendReport(
        "extend",
        tuple(plan.layers),
        (before, parameters(model)),
        (counts(layer.count for layer in plan.layers.values()), counts(layer.wanted for layer in plan.layers.values())),
        model,
        {name: (dim, layer.count) for layer in plan.layers.values() for name, dim in layer.dims.items()},
        sources,
    )
