"""Inner units of experts: find the order in which one expert's units best match another's, and bring them into it.

An expert computes the same whatever the order of its inner units is, so two experts that learnt the same may store it in
different orders, and their mean would be neither (Ainsworth et al., "Git Re-Basin", arXiv 2209.04836, §3.2, weight matching).
"""

from __future__ import annotations

from typing import Any

import torch

from effvlm.experts.layers import fused


def _rows(experts: Any, order: torch.Tensor) -> torch.Tensor:
    """Rows of the up product, (I,) or (2·I,), that belong to inner units in an ``order`` (I,); gates first, or alternating."""
    if not experts.has_gate:
        return order
    if experts.is_concatenated:
        return torch.cat((order, order + len(order)))
    return torch.stack((2 * order, 2 * order + 1), 1).flatten()


def _unit_dim(experts: Any, name: str) -> int | None:
    """Which dimension of one expert's tensor counts inner units (or rows of the up product); None for the bias of the output."""
    if name == "down_proj_bias":
        return None
    if name.endswith("_bias"):
        return 0
    return int(experts.is_transposed) if name != "down_proj" else 1 - int(experts.is_transposed)


def permuted(experts: Any, name: str, one: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """One expert's tensor with its inner units in another order; the expert computes what it did."""
    dim = _unit_dim(experts, name)
    if dim is None:
        return one
    return one.index_select(dim, order if name == "down_proj" else _rows(experts, order))


def units(experts: Any, e: int) -> torch.Tensor:
    """(I, F) float32: everything that expert ``e`` stores about each of its inner units."""
    found = []
    for name in fused(experts):
        one, dim = getattr(experts, name)[e].detach().float(), _unit_dim(experts, name)
        if dim is None:
            continue
        by_row = one.movedim(dim, 0).reshape(one.shape[dim], -1)
        if name != "down_proj" and experts.has_gate:
            split = by_row.unflatten(0, (2, -1)) if experts.is_concatenated else by_row.unflatten(0, (-1, 2)).transpose(0, 1)
            by_row = torch.cat(tuple(split), 1)
        found.append(by_row)
    return torch.cat(found, 1)


def match(similarity: torch.Tensor) -> torch.Tensor:
    """(I, I) similarities of units of one expert (rows) and another (columns) → (I,) int64, a column for every row.

    Greedy: the largest similarity first. Pairs that are each other's best are exactly what that takes next, so a round takes all
    of them at once; about log I rounds. At least half of the optimum for similarities ≥ 0, without a solver for assignments.
    """
    left = similarity.clone()
    places = torch.arange(len(left), device=left.device)
    order = torch.full_like(places, -1)
    while bool((order < 0).any()):
        column = left.argmax(1)
        rows = places[(order < 0) & (left.argmax(0)[column] == places)]
        order[rows] = column[rows]
        left[rows] = -torch.inf
        left[:, column[rows]] = -torch.inf
    return order


def aligned(experts: Any, e: int, to: int) -> torch.Tensor:
    """(I,) order of the units of expert ``e`` in which they match those of expert ``to``."""
    return match(units(experts, to) @ units(experts, e).T)
