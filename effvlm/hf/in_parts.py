"""Experts whose gate is not one that :func:`effvlm.moe_ffn` fuses: two products by id, and the module's own code between."""

from __future__ import annotations

from collections.abc import Callable

import torch

from effvlm.ops.grouped_linear import grouped_linear

Rows = Callable[[torch.Tensor], torch.Tensor]


def experts_in_parts(
    x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, up: Rows, between: Rows, down: Rows, after: Rows | None = None
) -> torch.Tensor:
    """(T, O): the sum over a token's choices of ``weight * after(down(between(up(x))))``.

    Args:
        x: (T, H).
        ids: (T, K) int64; the product of a choice outside the experts is zeros, which ``after`` gets.
        weight: (T, K).
        up, down: (S, …) rows, one for each choice → the products of their experts; :func:`by_id` makes them.
        between: (S, R) → (S, I), the gate.
        after: (S, O) → (S, O), for instance a norm after each expert.
    """
    made = down(between(up(x.repeat_interleave(ids.shape[1], 0))))
    if after is not None:
        made = after(made)
    return (made.view(*ids.shape, made.shape[1]).float() * weight[..., None].float()).sum(1).to(made.dtype)


def by_id(ids: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Rows:
    """Rows through the layers that (T, K) ``ids`` name: weight (E, O, C), bias (E, O)."""
    flat = ids.flatten()
    return lambda rows: grouped_linear(rows, flat, weight, bias=bias)
